package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// process is one that the bench has started and ends by its id. What it prints goes
// to a file, whose end stands in errors.
type process struct {
	name string
	cmd  *exec.Cmd
	log  string
	done chan struct{} // closed when it has ended

	// Of a child of this program only.
	in    io.WriteCloser
	out   *bufio.Reader
	pipes []io.Closer // both, closed by stop
}

// startProcess runs a program until stop.
func (b *bench) startProcess(name, path string, args ...string) (*process, error) {
	return b.launch(&process{name: name, cmd: exec.Command(path, args...)}, false)
}

// startChild runs this program in another role until stop, or until this process
// has ended, however that ends. It returns when the child is ready.
func (b *bench) startChild(ctx context.Context, role string, args ...string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p, err := b.launch(&process{name: role, cmd: exec.Command(self, append([]string{childFlag, role}, args...)...)}, true)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = p.cmd.Process.Kill() })
	defer stop()
	if line, err := p.out.ReadString('\n'); err != nil || line != readyLine {
		p.stop()
		return nil, p.failed(fmt.Errorf("it says %q, %w", line, err))
	}
	return p, nil
}

func (b *bench) launch(p *process, pipes bool) (_ *process, err error) {
	b.processes++
	p.log = filepath.Join(b.dir, fmt.Sprintf("%s-%d.log", p.name, b.processes))
	log, err := os.Create(p.log)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	p.cmd.Stderr = log
	if !pipes {
		p.cmd.Stdout = log
	} else {
		out, err := p.cmd.StdoutPipe()
		if err != nil {
			return nil, err
		}
		p.out = bufio.NewReader(out)
		if p.in, err = p.cmd.StdinPipe(); err != nil {
			return nil, err
		}
		p.pipes = []io.Closer{p.in, out}
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	p.done = make(chan struct{})
	go func() {
		defer close(p.done)
		_, _ = p.cmd.Process.Wait()
	}()
	return p, nil
}

// ask sends a child a line and returns its answer.
func (p *process) ask() (int, error) {
	if _, err := io.WriteString(p.in, "\n"); err != nil {
		return 0, p.failed(err)
	}
	line, err := p.out.ReadString('\n')
	if err != nil {
		return 0, p.failed(err)
	}
	return strconv.Atoi(strings.TrimSpace(line))
}

// stop kills the process and waits for its end. What it has written is thrown away.
func (p *process) stop() {
	_ = p.cmd.Process.Kill()
	<-p.done
	for _, c := range p.pipes {
		_ = c.Close()
	}
}

// failed adds to err what the process has said last.
func (p *process) failed(err error) error {
	const last = 2000 // bytes
	text, _ := os.ReadFile(p.log)
	if len(text) > last {
		text = text[len(text)-last:]
	}
	return fmt.Errorf("%s: %w\n%s", p.name, err, text)
}

// await waits until ok returns nil.
func (p *process) await(ctx context.Context, patience time.Duration, ok func() error) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := ok()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return p.failed(errors.New("has ended"))
		case <-ctx.Done():
			return ctx.Err()
		default:
		}
		if time.Now().After(deadline) {
			return p.failed(fmt.Errorf("not ready after %v: %w", patience, err))
		}
	}
}

// cpu is the time that the process has used, user and system, of all its threads.
// The kernel counts it in hundredths of a second.
func (p *process) cpu() (time.Duration, error) {
	const tick = 10 * time.Millisecond // USER_HZ, 100 on every Linux
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	// Behind the name, which is in brackets and may hold anything: state is the
	// third field, utime and stime are the 14th and 15th (proc_pid_stat(5)).
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	user, err1 := strconv.Atoi(fields[14-3])
	system, err2 := strconv.Atoi(fields[15-3])
	return time.Duration(user+system) * tick, errors.Join(err1, err2)
}

// peakRSS is the most memory that the process has had, in bytes.
func (p *process) peakRSS() (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	var kib int
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		return 0, fmt.Errorf("VmHWM of %s: %w", p.name, err)
	}
	return kib << 10, nil
}

// freeAddr is an address of this machine that nobody listens on.
func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return ln.Addr().String(), ln.Close()
}
