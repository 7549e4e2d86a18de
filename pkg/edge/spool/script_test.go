package spool

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/edge/edgetest"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/scripttest"
)

// TestScripts runs a spool of logs, with a clock that moves only by the commands wait and purge:
//
//	open max_bytes=40MiB on_full=drop_oldest retain=6m    a new directory
//	accept n=0..9 size=600000                             one request after the other
//	read                                                  what is behind the hub's position
//	forwarded seq=3 hub=77                                the hub has it, under its own sequence
//	purge after=6m                                        what the hub has had for long enough
//	wait for=1s
//	state
//	stop | start
//	kill                                                  start with the files as they are now
//	damage n=3                                            a bit of the record n
//	tear bytes=10                                         the end of the youngest file
//	delete file=logs/1                                    the first file of logs
//
// What is lost and dropped counts from the last start. A spool's ids are those of the first one until
// there is a new nonce.
func TestScripts(t *testing.T) {
	scripttest.Run(t, func(t *testing.T, s *scripttest.Script) {
		synctest.Test(t, func(t *testing.T) {
			sc := &script{t: t}
			s.Run(t, scripttest.Commands{
				"open": sc.open, "accept": sc.accept, "read": sc.read, "forwarded": sc.forwarded, "purge": sc.purge, "wait": sc.wait,
				"state": sc.state, "stop": sc.halt, "start": sc.start, "kill": sc.kill, "damage": sc.damage, "tear": sc.tear, "delete": sc.remove,
			})
		})
	})
}

type script struct {
	t      *testing.T
	cfg    Config
	s      *Spool
	stop   func()
	nonces []string // that there have been
}

func (sc *script) open(c *scripttest.Call) string {
	sc.cfg = testConfig(sc.t, sc.t.TempDir())
	if err := sc.cfg.MaxBytes.UnmarshalText([]byte(c.Text("max_bytes", "24MiB"))); err != nil {
		c.Fatalf("%v", err)
	}
	sc.cfg.OnFull, sc.cfg.Retain, sc.cfg.Durability = c.Text("on_full", Refuse), c.Duration("retain"), "os"
	return sc.start(c)
}

func (sc *script) start(*scripttest.Call) string {
	sc.s, sc.stop = startSpool(sc.t, sc.cfg)
	if nonce := sc.s.current.Load().Nonce(); !slices.Contains(sc.nonces, nonce) {
		sc.nonces = append(sc.nonces, nonce)
	}
	return ""
}

func (sc *script) halt(*scripttest.Call) string {
	sc.stop()
	return ""
}

// kill gives the files of the directory the content that they have now, whatever the stop writes. They stay
// the same files: the spool recognises a copy.
func (sc *script) kill(c *scripttest.Call) string {
	now := map[string][]byte{}
	each := func(do func(path string) error) {
		if err := filepath.WalkDir(sc.cfg.Dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			return do(path)
		}); err != nil {
			c.Fatalf("%v", err)
		}
	}
	each(func(path string) (err error) {
		now[path], err = os.ReadFile(path)
		return err
	})
	sc.stop()
	each(func(path string) error {
		if _, is := now[path]; !is {
			return os.Remove(path)
		}
		return nil
	})
	for path, b := range now {
		sc.edit(c, path, func([]byte) []byte { return b })
	}
	return sc.start(c)
}

func (sc *script) accept(c *scripttest.Call) string {
	from, to, several := strings.Cut(c.Text("n", ""), "..")
	if !several {
		to = from
	}
	first, err := strconv.Atoi(from)
	if err != nil {
		c.Fatalf("%v", err)
	}
	last, err := strconv.Atoi(to)
	if err != nil {
		c.Fatalf("%v", err)
	}
	size := c.Number("size", 10)
	var b strings.Builder
	for n := first; n <= last; n++ {
		if err := sc.s.Accept(sc.t.Context(), edgetest.Log(sc.t, n, size)); err != nil {
			fmt.Fprintf(&b, "%d refused: %v\n", n, err)
		}
	}
	return b.String()
}

// read shows messages with the sequence of the spool and the number of the record, runs of them in one
// line.
func (sc *script) read(c *scripttest.Call) string {
	st, done := sc.s.current.Load(), sc.s.Position(Hub, otlpwire.Logs).Done
	if sc.s.Empty(otlpwire.Logs) {
		return "nothing\n"
	}
	r := st.Read(otlpwire.Logs, done)
	defer r.Close()
	ctx, cancel := context.WithTimeout(sc.t.Context(), 10*time.Second)
	defer cancel()
	var b strings.Builder
	type message struct{ seq, n int }
	var first, last message
	end := func() {
		switch {
		case first.seq > 0 && first == last:
			fmt.Fprintf(&b, "%d: n=%d\n", first.seq, first.n)
		case first.seq > 0:
			fmt.Fprintf(&b, "%d..%d: n=%d..%d\n", first.seq, last.seq, first.n, last.n)
		}
		first = message{}
	}
	for {
		m, err := r.Next(ctx)
		if err != nil {
			c.Fatalf("%v", err)
		}
		if m.Missing > 0 {
			end()
			fmt.Fprintf(&b, "%d missing up to %d\n", m.Missing, m.Seq)
		} else {
			body, err := envelope.Decompress(nil, m.Body, m.Header.Encoding)
			if err != nil {
				c.Fatalf("%v", err)
			}
			for item := range otlpwire.Items(body) {
				now := message{int(m.Seq), edgetest.Number(item)}
				if first.seq == 0 || now != (message{last.seq + 1, last.n + 1}) {
					end()
					first = now
				}
				last = now
			}
		}
		if m.Behind == 0 {
			end()
			return b.String()
		}
	}
}

func (sc *script) forwarded(c *scripttest.Call) string {
	sc.s.Forwarded(otlpwire.Logs, uint64(c.Number("seq", 0)), uint64(c.Number("hub", 0)), 1)
	return ""
}

// purge deletes once, some time later.
func (sc *script) purge(c *scripttest.Call) string {
	time.Sleep(c.Duration("after"))
	once, cancel := context.WithCancel(sc.t.Context())
	cancel()
	sc.s.Purge(once, sc.s.current.Load(), otlpwire.Logs)
	return ""
}

func (sc *script) wait(c *scripttest.Call) string {
	time.Sleep(c.Duration("for"))
	synctest.Wait()
	return ""
}

func (sc *script) state(*scripttest.Call) string {
	st, at, led := sc.s.current.Load(), sc.s.Position(Hub, otlpwire.Logs), sc.s.led
	log := st.logs[otlpwire.Logs].State()
	aside, _ := filepath.Glob(filepath.Join(sc.cfg.Dir, damagedDir, "logs@*"))
	holds := "nothing"
	if log.Records() > 0 {
		holds = fmt.Sprintf("%d..%d", log.First, log.Last)
	}
	return fmt.Sprintf("holds %s, the hub has %d (its %d), ids %d\nlost=%v dropped=%v aside=%d\n",
		holds, at.Done, at.Hub, 1+slices.Index(sc.nonces, st.Nonce()),
		testutil.ToFloat64(led.SpoolLost(otlpwire.Logs)), testutil.ToFloat64(led.Of(otlpwire.Logs).Dropped(ledger.DroppedFull)), len(aside))
}

// edit changes a file of the spool.
func (sc *script) edit(c *scripttest.Call, path string, do func([]byte) []byte) {
	b, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, do(b), 0o600)
	}
	if err != nil {
		c.Fatalf("%v", err)
	}
}

func (sc *script) damage(c *scripttest.Call) string {
	text := fmt.Sprintf("n=%d ", c.Number("n", 0))
	for _, path := range segmentFiles(sc.t, sc.cfg.Dir) {
		b, err := os.ReadFile(path)
		if err != nil {
			c.Fatalf("%v", err)
		}
		if at := strings.Index(string(b), text); at >= 0 {
			sc.edit(c, path, flip(at))
			return ""
		}
	}
	c.Fatalf("no file has this record")
	return ""
}

func (sc *script) tear(c *scripttest.Call) string {
	all, n := segmentFiles(sc.t, sc.cfg.Dir), c.Number("bytes", 0)
	sc.edit(c, all[len(all)-1], func(b []byte) []byte { return b[:len(b)-n] })
	return ""
}

func (sc *script) remove(c *scripttest.Call) string {
	path := filepath.Join(sc.cfg.Dir, c.Text("file", ""))
	if n, err := strconv.Atoi(filepath.Base(path)); err == nil {
		path = segmentFiles(sc.t, sc.cfg.Dir)[n-1]
	}
	if err := os.Remove(path); err != nil {
		c.Fatalf("%v", err)
	}
	return ""
}
