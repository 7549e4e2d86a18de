package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// startTimeout is how long a side may take until it takes requests.
const startTimeout = 30 * time.Second

// The identity that both sides write into every resource.
const (
	instanceID   = "as-17"
	instanceName = "Shop, first floor"
	customerID   = "acme"
	namespace    = "appserver"
)

// side is one of those that are compared.
type side struct {
	name  string
	start func(ctx context.Context, fsync bool) (*running, error)
}

// sides are the edge, the limit, then the ways to run the collector: first the one that
// answers after the disk.
func (b *bench) sides() []side {
	all := []side{{"edge", b.startEdgeAndHub}, {"limit (receives, checks, stamps, writes; no more)", b.startLimit}}
	if b.peerBin != "" {
		all = append(all,
			side{"collector (answers after the disk)", func(ctx context.Context, fsync bool) (*running, error) {
				return b.startCollector(ctx, fsync, false)
			}},
			side{"collector (batch processor: answers before the disk)", func(ctx context.Context, fsync bool) (*running, error) {
				return b.startCollector(ctx, fsync, true)
			}})
	}
	return all
}

// running is a side at work with what stands behind it.
type running struct {
	measured *process            // whose CPU time and memory count
	behind   *process            // the next hop
	otlp     string              // where requests go
	store    string              // directory of what is not passed on yet
	passed   func() (int, error) // spans that the next hop has taken
	dirs     []string            // removed by stop
}

// stop ends the processes and removes what they have written.
func (r *running) stop() {
	for _, p := range []*process{r.measured, r.behind} {
		if p != nil {
			p.stop()
		}
	}
	for _, d := range r.dirs {
		_ = os.RemoveAll(d)
	}
}

// drained waits until the next hop has taken spans and returns when it had. It asks
// seldom: the edge's counters cost the edge CPU time.
func (r *running) drained(ctx context.Context, spans int) (time.Time, error) {
	const interval, patience = 100 * time.Millisecond, 2 * time.Minute
	for deadline := time.Now().Add(patience); ; time.Sleep(interval) {
		n, err := r.passed()
		if err != nil {
			return time.Now(), r.measured.failed(err)
		}
		if ctx.Err() != nil || n >= spans {
			return time.Now(), ctx.Err()
		}
		if time.Now().After(deadline) {
			return time.Now(), fmt.Errorf("%s: %v after the last answer the next hop has %d of %d spans", r.measured.name, patience, n, spans)
		}
	}
}

func durability(fsync bool) string {
	if fsync {
		return "fsync"
	}
	return "os"
}

// newDir makes a directory that stop removes.
func (r *running) newDir(parent string) (string, error) {
	dir, err := os.MkdirTemp(parent, "store-")
	if err == nil {
		r.dirs = append(r.dirs, dir)
	}
	return dir, err
}

// startEdgeAndHub starts an edge and behind it a hub that stands for another
// machine.
func (b *bench) startEdgeAndHub(ctx context.Context, fsync bool) (*running, error) {
	r := &running{}
	err := func() error {
		hubDir, err := r.newDir(b.hubDir)
		if err != nil {
			return err
		}
		hub, err := freeAddr()
		if err != nil {
			return err
		}
		if r.behind, err = b.startHub(ctx, hubDir, hub, hubKind{}); err != nil {
			return err
		}
		return b.startEdge(ctx, r, fsync, hub)
	}()
	if err != nil {
		r.stop()
	}
	return r, err
}

// startEdge starts an edge whose hub is, or will be, at an address.
func (b *bench) startEdge(ctx context.Context, r *running, fsync bool, hub string) error {
	dir, err := r.newDir(b.dir)
	if err != nil {
		return err
	}
	r.store = filepath.Join(dir, "spool")
	var addrs [3]string // gRPC, HTTP, admin
	for i := range addrs {
		if addrs[i], err = freeAddr(); err != nil {
			return err
		}
	}
	config := fmt.Sprintf(`log: {level: warn}
admin: {listen: %q}
instance: {id: %s, name: %q, customer: %s, service_namespace: %s}
spool: {dir: %q, durability: %s, max_bytes: 192GiB}
receive:
  grpc: {listen: %q}
  http: {listen: %q}
hub: {url: %q}
`, addrs[2], instanceID, instanceName, customerID, namespace, r.store, durability(fsync), addrs[0], addrs[1], "nats://"+hub)
	path := filepath.Join(dir, "edge.yaml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return err
	}
	if r.measured, err = b.startProcess("edge", b.edgeBin, "-config.file", path); err != nil {
		return err
	}
	r.otlp = addrs[0]
	if b.protocol == "http" {
		r.otlp = addrs[1]
	}
	r.passed = func() (int, error) { return counter(addrs[2], `penstock_forwarded_items_total{signal="traces"}`) }
	return r.measured.await(ctx, startTimeout, func() error {
		_, err := get(addrs[2], "/ready")
		return err
	})
}

func get(addr, path string) (string, error) {
	res, err := http.Get("http://" + addr + path)
	if err != nil {
		return "", err
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, body)
	}
	return string(body), err
}

// counter reads one metric of a process with an admin port.
func counter(admin, series string) (int, error) {
	page, err := get(admin, "/metrics")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(page) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			var v float64
			_, err := fmt.Sscan(value, &v)
			return int(v), err
		}
	}
	return 0, fmt.Errorf("%s is not on /metrics", series)
}

// listens reports whether somebody listens on an address.
func listens(addr string) error {
	conn, err := net.Dial("tcp", addr)
	if err == nil {
		_ = conn.Close()
	}
	return err
}
