// Package sink kills a sink at chosen places.
package sink

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/backend/tempo"
	"github.com/penstock/penstock/test/daemon"
)

var binary = daemon.NewBinary("failpoints", "sink")

func TestMain(m *testing.M) { binary.Main(m) }

// world is a hub, backends with a tenant for each instance, and a sink of one partition.
type world struct {
	*testing.T
	sig   otlpwire.Signal
	conn  *bus.Conn
	loki  *loki.Server
	tempo *tempo.Server
	sink  daemon.Process
	admin string
	sent  map[string][]string
	ids   int
}

func newWorld(t *testing.T, sig otlpwire.Signal) *world {
	t.Helper()
	bin, err := binary.Path()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, sig: sig, loki: loki.Start(t), tempo: tempo.Start(t), admin: daemon.FreeAddr(), sent: map[string][]string{}}
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	b, err := broker.Start(broker.Config{Name: "hub", Dir: t.TempDir(), Listen: daemon.FreeAddr()}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Stop)
	top := bus.DefaultTopology()
	top.Partitions, top.MaxBytes = 1, 64<<20
	if w.conn, err = bus.OpenHub(t.Context(), bus.Config{Name: "test", InProcess: b}, top, quiet); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.conn.Close)
	dir := t.TempDir()
	config := fmt.Sprintf("admin: {listen: %q}\nhub: {url: %q}\nmember: one\nstreams: {partitions: 1, max_bytes: 64MiB}\nsampling: {file: %s}\nfile: {dir: %q}\ntempo: {endpoint: %q, tenant: {from: instance}}\nloki: {url: %q, tenant: {from: instance}}\n",
		w.admin, b.URL(), filepath.Join(dir, "sampling.yaml"), filepath.Join(dir, "data"), w.tempo.Addr, w.loki.URL)
	for name, text := range map[string]string{"sink.yaml": config, "sampling.yaml": "decision_wait: 1s\npolicies: [{name: all, type: always_sample}]\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w.sink = daemon.Process{Args: []string{bin, "-config.file", filepath.Join(dir, "sink.yaml")}, Log: filepath.Join(dir, "log")}
	t.Cleanup(func() {
		w.sink.End(syscall.SIGKILL)
		if t.Failed() {
			text, _ := os.ReadFile(w.sink.Log)
			t.Logf("the sink's log:\n%s", text[max(0, len(text)-4<<10):])
		}
	})
	return w
}

// start starts the sink, which is killed when it reaches a place for the first time; "" for none.
func (w *world) start(place string) {
	w.Helper()
	w.sink.Env = nil
	if place != "" {
		w.sink.Env = []string{"PENSTOCK_KILL_AT=" + place + ":1"}
	}
	if err := w.sink.Start(); err != nil {
		w.Fatal(err)
	}
}

func (w *world) until(what string, ok func() bool) {
	w.Helper()
	if err := daemon.Until(w.Context(), 2*time.Minute, func() error {
		if !ok() {
			return fmt.Errorf("not yet")
		}
		return nil
	}); err != nil {
		for instance, sent := range w.sent {
			got := w.stored(instance)
			w.Logf("%s: %d sent, %d stored, up to %v", instance, len(sent), len(got), got[max(0, len(got)-5):])
		}
		w.Fatalf("%s: never", what)
	}
}

// send publishes one more item of each, as edges and routers do.
func (w *world) send(instances ...string) {
	w.Helper()
	for _, instance := range instances {
		w.ids++
		item, now := fmt.Sprintf("%s-%03d", instance, len(w.sent[instance])), time.Now().UnixNano()
		w.sent[instance] = append(w.sent[instance], item)
		m := bus.Message{Subject: bus.Subject(w.sig, instance), Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: now, ID: fmt.Sprint(w.ids)}}
		text := fmt.Sprintf(`{"resourceLogs":[{"scopeLogs":[{"logRecords":[{"timeUnixNano":"%d","body":{"stringValue":%q}}]}]}]}`, now, item)
		if w.sig == otlpwire.Traces {
			// The clock of each instance is half a minute further with every span, so that it closes the windows before.
			now += int64(w.ids) * int64(30*time.Second)
			text = fmt.Sprintf(`{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"%032x","spanId":"%016x","name":%q}]}]}]}`, w.ids, w.ids, item)
		}
		payload, _, err := otlpwire.FromJSON(nil, w.sig, []byte(text), otlpwire.DefaultLimits)
		if err != nil {
			w.Fatal(err)
		}
		if m.Body = payload; w.sig == otlpwire.Traces {
			m.Subject, m.Header.ContentType = bus.SpansSubject(0), envelope.ContentTypeFrames
			m.Body = envelope.AppendFrame(nil, envelope.Frame{Instance: instance, Arrival: now, Seq: uint64(w.ids), Payload: payload})
		}
		if _, err := w.conn.Publish(w.Context(), m); err != nil {
			w.Fatal(err)
		}
	}
}

// stored is what a backend has of an instance, in the order in which it first came.
func (w *world) stored(instance string) (items []string) {
	add := func(item string) {
		if strings.HasPrefix(item, instance+"-") && !slices.Contains(items, item) {
			items = append(items, item)
		}
	}
	for _, e := range w.loki.Entries() {
		add(e.Line)
	}
	for _, s := range w.tempo.Spans() {
		add(s.Span.GetName())
	}
	return items
}

// has reports whether a backend has all of an instance, in order, but for the last span, whose window is open.
func (w *world) has(instances ...string) func() bool {
	return func() bool {
		for _, instance := range instances {
			want := w.sent[instance]
			if w.sig == otlpwire.Traces {
				want = want[:len(want)-1]
			}
			if got := w.stored(instance); !slices.Equal(got, want) {
				return false
			}
		}
		return true
	}
}

// refuse makes the backends refuse as-1, or take it again.
func (w *world) refuse(yes bool) {
	var err error
	code := 0
	if yes {
		err, code = status.Error(codes.ResourceExhausted, "too many"), 429
	}
	w.tempo.FailTenant("as-1", err)
	w.loki.FailTenant("as-1", code)
}

// dead reports whether the sink has been killed.
func (w *world) dead() bool {
	select {
	case <-w.sink.Done:
		return true
	default:
		return false
	}
}

func (w *world) aside() (n uint64) {
	w.Helper()
	there, err := w.conn.Subjects(w.Context(), bus.Aside, "aside.>")
	if err != nil {
		w.Fatal(err)
	}
	for _, messages := range there {
		n += messages
	}
	return n
}

// TestKilledWhileAnInstanceIsAside: a sink is killed in each state of setting an instance aside, of delivering what was and of
// handing it back. Nothing of anybody is lost, and each instance's data comes in order.
func TestKilledWhileAnInstanceIsAside(t *testing.T) {
	for _, sig := range []otlpwire.Signal{otlpwire.Logs, otlpwire.Traces} {
		for _, place := range []string{"aside-begun", "aside-behind", "aside-delivered", "aside-removed", "aside-back"} {
			t.Run(sig.String()+" "+place, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, sig)
				dies := place == "aside-begun" || place == "aside-behind"
				first := ""
				if dies {
					first = place
				}
				w.start(first)
				w.send("as-1", "as-2")
				w.send("as-1", "as-2")
				w.until("both", w.has("as-1", "as-2"))
				w.refuse(true)
				for range 5 {
					w.send("as-1", "as-2")
				}
				if dies {
					w.until("it dies", w.dead)
					w.start("")
				}
				w.send("as-1", "as-2")
				w.until("the other", w.has("as-2"))
				w.until("it is set aside", func() bool { return w.aside() > 0 })
				if !dies {
					w.sink.End(syscall.SIGTERM)
					w.start(place)
				}
				w.refuse(false)
				if !dies {
					w.until("it dies", w.dead)
					w.send("as-1", "as-2")
					w.start("")
				}
				w.send("as-1", "as-2")
				w.until("all", w.has("as-1", "as-2"))
				w.until("nothing is set aside", func() bool { return w.aside() == 0 })
			})
		}
	}
}
