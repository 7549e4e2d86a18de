// Package daemon runs penstock's commands as processes, for tests that kill them.
package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"

	"github.com/penstock/penstock/pkg/broker"
)

// Build builds the commands into dir; tags are build tags.
func Build(ctx context.Context, dir, tags string, commands ...string) error {
	args := []string{"build", "-C", moduleRoot(), "-tags", tags, "-o", dir + "/"}
	for _, c := range commands {
		args = append(args, "./cmd/"+c)
	}
	if out, err := exec.CommandContext(ctx, "go", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w\n%s", err, out)
	}
	return nil
}

// Binary is a command that is built once for all tests of a package, when it is first asked for.
type Binary struct {
	path func() (string, error)
	dir  string
}

// NewBinary is for a command, and build tags.
func NewBinary(tags, command string) *Binary {
	b := new(Binary)
	b.path = sync.OnceValues(func() (_ string, err error) {
		if b.dir, err = os.MkdirTemp("", "penstock-"+command+"-"); err == nil {
			err = Build(context.Background(), b.dir, tags, command)
		}
		return filepath.Join(b.dir, command), err
	})
	return b
}

// Path returns where it is.
func (b *Binary) Path() (string, error) { return b.path() }

// Main runs the tests, removes the binary and exits.
func (b *Binary) Main(m interface{ Run() int }) {
	code := m.Run()
	_ = os.RemoveAll(b.dir)
	os.Exit(code)
}

// moduleRoot is the product's module, above this one.
func moduleRoot() string {
	dir, err := os.Getwd()
	for err == nil && dir != "/" {
		if _, err := os.Stat(filepath.Join(dir, "cmd", "sink")); err == nil {
			return dir
		}
		dir = filepath.Dir(dir)
	}
	return "."
}

// runHub is the hub's process: the embedded server of `penstock up`, with fsync
// for every message. arg is directory,address.
func runHub(arg string) int {
	dir, addr, _ := strings.Cut(arg, ",")
	b, err := broker.Start(broker.Config{Name: "hub", Dir: dir, Listen: addr, Sync: true, MaxPayload: 8 << 20}, slog.New(slog.NewTextHandler(os.Stderr, nil)))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer b.Stop()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	<-ctx.Done()
	return 0
}

// Process is a command that runs, or has run.
type Process struct {
	Args []string
	Env  []string // beside this process's own
	Log  string   // file that its output is appended to
	Done chan struct{}
	cmd  *exec.Cmd
}

// Start starts it, for the first time or again.
func (p *Process) Start() error {
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	p.cmd = exec.Command(p.Args[0], p.Args[1:]...)
	p.cmd.Env = append(os.Environ(), p.Env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		_ = log.Close()
		return err
	}
	p.Done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan<- struct{}) {
		defer close(done)
		_ = cmd.Wait()
		_ = log.Close()
	}(p.cmd, p.Done)
	return nil
}

// Signal sends it a signal.
func (p *Process) Signal(sig syscall.Signal) { _ = p.cmd.Process.Signal(sig) }

// End sends a signal and waits for the end.
func (p *Process) End(sig syscall.Signal) {
	p.Signal(sig)
	<-p.Done
}

// PID is its process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// ExitCode is how it has ended; -1 while it runs or when a signal ended it.
func (p *Process) ExitCode() int { return p.cmd.ProcessState.ExitCode() }

// FreeAddr is an address of loopback that nobody listens on now. It is below the ports that connections begin
// from: another test's connection could take one of those before it is listened on.
func FreeAddr() string {
	for range 100 {
		addr := fmt.Sprintf("127.0.0.1:%d", 20000+rand.IntN(12000))
		if ln, err := net.Listen("tcp", addr); err == nil {
			_ = ln.Close()
			return addr
		}
	}
	return "127.0.0.1:0"
}

var impatient = &http.Client{Timeout: 2 * time.Second}

// Fetch asks a process's admin server, and decodes a JSON answer.
func Fetch(addr, path string, into any) error {
	body, err := Page(addr, path)
	if err == nil && into != nil {
		err = json.Unmarshal(body, into)
	}
	return err
}

// Page asks a process's admin server.
func Page(addr, path string) ([]byte, error) {
	res, err := impatient.Get("http://" + addr + path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, body)
	}
	return body, err
}

// Running returns nil when all stages of a process run, whether it is ready or not.
func Running(addr string) error {
	var stages []struct{ Name, State string }
	if err := Fetch(addr, "/services", &stages); err != nil {
		return err
	}
	for _, s := range stages {
		if s.State != "Running" {
			return fmt.Errorf("%s is %s", s.Name, s.State)
		}
	}
	return nil
}

// Credential is the file of a NATS user that no hub knows.
func Credential() ([]byte, error) {
	account, err := nkeys.CreateAccount()
	if err != nil {
		return nil, err
	}
	user, err := nkeys.CreateUser()
	if err != nil {
		return nil, err
	}
	public, err := user.PublicKey()
	if err != nil {
		return nil, err
	}
	seed, err := user.Seed()
	if err != nil {
		return nil, err
	}
	token, err := jwt.NewUserClaims(public).Encode(account)
	if err != nil {
		return nil, err
	}
	return jwt.FormatUserConfig(token, seed)
}

// Metric returns one sample of a process's /metrics, named with its labels.
func Metric(addr, name string) (string, error) {
	body, err := Page(addr, "/metrics")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(body)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strings.TrimSpace(value), nil
		}
	}
	return "", fmt.Errorf("no metric %s", name)
}

// Until waits for ok, and returns what is wrong when patience or ctx ends.
func Until(ctx context.Context, patience time.Duration, ok func() error) error {
	for deadline := time.Now().Add(patience); ; {
		err := ok()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}
