package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/test/daemon"
	"github.com/penstock/penstock/test/faultproxy"
)

// chaos injects one fault after the other, each when the pipeline has recovered
// from the one before, until the time is over. In the first third one sink is
// wanted, then four, then two. Once at least all backends are away, they have
// trouble with one instance, an edge is cut off, and the clock of one is set.
func (w *world) chaos(ctx context.Context) error {
	end := time.Now().Add(w.For)
	for (time.Now().Before(end) || !w.wasStepped || !w.wasCut || !w.wasApart || !w.wereAway) && ctx.Err() == nil {
		w.pause(ctx, 500*time.Millisecond, 2*time.Second)
		want, past := 1, w.For-time.Until(end)
		switch {
		case past > 2*w.For/3:
			want = 2
		case past > w.For/3:
			want = 4
		}
		if err := w.scale(ctx, want); err != nil {
			return err
		}
		fault := w.fault
		shop := w.of("edge")[:len(instances)-1] // those of the domain
		switch {
		case !w.wasStepped:
			w.faults++
			fault = func(ctx context.Context) error { return w.stepClock(ctx, shop[w.rng.IntN(len(shop))]) }
		case past > w.For/6 && !w.wasCut:
			w.faults++
			fault = func(ctx context.Context) error { return w.cutEdge(ctx, shop[w.rng.IntN(len(shop))]) }
		case past > w.For/3 && !w.wasApart:
			w.faults++
			fault = w.trouble
		}
		if past > w.For/2 && w.wasCut && !w.wereAway {
			w.faults++
			fault = func(ctx context.Context) error { return w.away(ctx, "all") }
		}
		if err := fault(ctx); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// pause sleeps for a time that the seed says.
func (w *world) pause(ctx context.Context, from, to time.Duration) {
	select {
	case <-time.After(from + time.Duration(w.rng.Int64N(int64(to-from)))):
	case <-ctx.Done():
	}
}

// scale starts sinks, or stops them one after the other.
func (w *world) scale(ctx context.Context, want int) error {
	for have := len(w.of("sink")); have < want; have++ {
		p, err := w.add("sink")
		if err != nil {
			return err
		}
		w.faults++
		w.say("%s joins", p.name)
		if have+1 == want {
			if err := w.recovered(ctx, "join", time.Now(), false); err != nil {
				return err
			}
		}
	}
	for sinks := w.of("sink"); len(sinks) > want; sinks = sinks[1:] {
		if err := w.handOver(ctx, sinks[0]); err != nil {
			return err
		}
	}
	return nil
}

// handOver stops a process as an operator does.
func (w *world) handOver(ctx context.Context, p *proc) error {
	w.faults++
	w.say("SIGTERM %s", p.name)
	from := time.Now()
	p.Signal(syscall.SIGTERM)
	w.mu.Lock()
	delete(w.procs, p.name) // it owns nothing from now on
	w.mu.Unlock()
	select {
	case <-p.Done:
	case <-time.After(30 * time.Second):
		p.Signal(syscall.SIGKILL)
		return fmt.Errorf("%s does not stop", p.name)
	}
	return w.recovered(ctx, "SIGTERM "+p.role, from, true)
}

// fault does one thing to one part.
func (w *world) fault(ctx context.Context) error {
	w.faults++
	pick := func(role string) *proc { all := w.of(role); return all[w.rng.IntN(len(all))] }
	switch n := w.rng.IntN(40); {
	case n < 6:
		return w.kill(ctx, pick("sink"))
	case n < 8:
		return w.kill(ctx, pick("router"))
	case n < 11:
		return w.stall(ctx, pick("sink"), bySignal, 10*time.Second)
	case n < 13:
		return w.stall(ctx, pick("router"), bySignal, 10*time.Second)
	case n < 15:
		p := pick("sink")
		if len(w.of("sink")) == 1 {
			if _, err := w.add("sink"); err != nil {
				return err
			}
			if err := w.recovered(ctx, "join", time.Now(), false); err != nil {
				return err
			}
		}
		return w.handOver(ctx, p)
	case n < 17:
		which := kinds[w.rng.IntN(len(kinds))]
		w.say("%s refuse", which)
		w.backends(which, true)
		w.pause(ctx, time.Second, 4*time.Second)
		w.backends(which, false)
		return nil
	case n < 18:
		return w.stall(ctx, pick("edge"), bySignal, 3*time.Second)
	case n < 19:
		return w.restart(ctx, pick("edge"))
	case n < 20:
		return w.restart(ctx, pick("hub"))
	case n < 21:
		return w.stepClock(ctx, pick("edge"))
	case n < 22:
		return w.push(ctx)
	case n < 24:
		return w.keeper(ctx)
	case n < 26:
		return w.stall(ctx, pick("sink"), byCutting, 15*time.Second)
	case n < 28:
		return w.fillDisk(ctx, pick("hub"))
	case n < 31:
		return w.cutEdge(ctx, pick("edge"))
	case n < 33:
		return w.away(ctx, kinds[w.rng.IntN(len(kinds))])
	default:
		return w.trouble(ctx)
	}
}

// kinds are backends that fail together.
var kinds = []string{"tempo", "loki", "prometheus", "all"}

// backends makes some refuse, or take again.
func (w *world) backends(which string, refuse bool) {
	var grpc error
	http := 0
	if refuse {
		grpc, http = status.Error(codes.Unavailable, "no"), 503
	}
	if which == "tempo" || which == "all" {
		w.tempo.Fail(grpc)
	}
	if which == "loki" || which == "all" {
		w.loki.Fail(http)
	}
	if which == "prometheus" || which == "all" {
		w.prometheus.Fail(http)
	}
}

// tenantTrouble is what backends may have with one instance: an answer to each of its pushes, or none for long. The zero value
// is none.
type tenantTrouble struct {
	http int
	grpc codes.Code
	slow time.Duration
	what string
}

var troubles = []tenantTrouble{
	{429, codes.ResourceExhausted, 0, "answer 429 to"},
	{401, codes.Unauthenticated, 0, "answer 401 to"},
	{500, codes.Internal, 0, "answer 500 to"},
	{0, codes.OK, 30 * time.Second, "are slow for"},
}

// trouble lets all backends have trouble with one instance for some seconds. In half of the cases a sink is killed meanwhile;
// in the others it prints for how long log records of others were under way.
func (w *world) trouble(ctx context.Context) error {
	const earlier = 5 * time.Second
	w.wasApart = true
	instance, t := instances[w.rng.IntN(len(instances))], troubles[w.rng.IntN(len(troubles))]
	d := 5*time.Second + time.Duration(w.rng.Int64N(int64(7*time.Second)))
	kill := w.rng.IntN(2) == 0
	w.say("all backends %s %s for %v", t.what, instance, d.Truncate(100*time.Millisecond))
	from := time.Now()
	w.failTenant(instance, t)
	healed := make(chan struct{})
	go func() { // whatever happens to the sink
		defer close(healed)
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
		w.failTenant(instance, tenantTrouble{})
	}()
	defer func() { <-healed }()
	if kill {
		w.pause(ctx, time.Second, 4*time.Second)
		all := w.of("sink")
		return w.kill(ctx, all[w.rng.IntN(len(all))])
	}
	<-healed
	before, meanwhile := w.delays(otlpwire.Logs, interval{from.Add(-earlier), from}, instance), w.delays(otlpwire.Logs, interval{from, time.Now()}, instance)
	w.say("p99 of the delay of the others' log records: %v of %d before, %v of %d meanwhile", quantile(before, 99), len(before), quantile(meanwhile, 99), len(meanwhile))
	return nil
}

// failTenant lets all backends have trouble with one instance from now on.
func (w *world) failTenant(instance string, t tenantTrouble) {
	w.tempo.FailTenant(instance, status.Error(t.grpc, "no")) // nil for OK
	w.loki.FailTenant(instance, t.http)
	w.prometheus.FailTenant(instance, t.http)
	w.tempo.SlowTenant(instance, t.slow)
	w.loki.SlowTenant(instance, t.slow)
	w.prometheus.SlowTenant(instance, t.slow)
}

// away lets backends refuse until the streams are full of what they are owed, the edges' spools,
// too, and edges refuse. A sink and a router are killed meanwhile.
func (w *world) away(ctx context.Context, which string) error {
	const longest, refusals = 40 * time.Second, 20
	w.wereAway = w.wereAway || which == "all"
	w.say("%s refuse until edges do", which)
	from, before := time.Now(), w.journal.refused.Load()
	defer func() { w.disturb(from) }()
	w.backends(which, true)
	w.journal.large.Store(true)
	defer w.journal.large.Store(false)
	err := daemon.Until(ctx, longest, func() error {
		if n := w.journal.refused.Load() - before; n < refusals {
			return fmt.Errorf("%d requests were refused", n)
		}
		return nil
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil {
		w.filled++
	}
	w.journal.large.Store(false)
	for _, role := range []string{"sink", "router"} {
		if err := w.kill(ctx, w.of(role)[0]); err != nil {
			return err
		}
	}
	w.say("%s take again after %.0f s; %d requests were refused", which, time.Since(from).Seconds(), w.journal.refused.Load()-before)
	w.backends(which, false)
	// A spool counts what the hub has had for long as not forwarded, until its segment is deleted, or nothing comes.
	if err := daemon.Until(ctx, 3*time.Minute, func() error { return w.arrivedAt(segment+256<<10, 100, "router") }); err != nil {
		return fmt.Errorf("%s took again, and not all was forwarded: %w", which, err)
	}
	return nil
}

// fillDisk takes the hub's disk for some seconds. nats-server stores nothing more then until it is
// started again.
func (w *world) fillDisk(ctx context.Context, hub *proc) error {
	if w.disk == nil {
		return nil
	}
	w.say("the hub's disk is full")
	from := time.Now()
	defer func() { w.disturb(from) }()
	free, err := w.disk.Fill()
	if err != nil {
		return err
	}
	w.pause(ctx, time.Second, 5*time.Second)
	if err := free(); err != nil {
		return err
	}
	return w.restart(ctx, hub)
}

// keeper kills, stops or cuts off the sink that makes room in the streams.
func (w *world) keeper(ctx context.Context) error {
	var keeper *proc
	if err := daemon.Until(ctx, time.Minute, func() error {
		for _, p := range w.of("sink") {
			if n, err := daemon.Metric(p.admin, "penstock_keeper"); err == nil && n == "1" {
				keeper = p
				return nil
			}
		}
		return errors.New("no sink is the keeper")
	}); err != nil {
		return err
	}
	w.say("%s is the keeper", keeper.name)
	switch w.rng.IntN(3) {
	case 0:
		return w.kill(ctx, keeper)
	case 1:
		return w.stall(ctx, keeper, bySignal, 15*time.Second)
	default:
		return w.stall(ctx, keeper, byCutting, 15*time.Second)
	}
}

// push makes the policies a new version, which says the same.
func (w *world) push(ctx context.Context) error {
	conn, err := w.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	t := bus.DefaultTopology()
	t.Partitions = partitions
	p, err := versions.Push(ctx, conn, t, policies, "chaos", func(error) {})
	w.say("policies version %d from %d", p.Number, p.From)
	return err
}

// kill ends a process with SIGKILL and starts another in its place.
func (w *world) kill(ctx context.Context, p *proc) error {
	w.say("kill -9 %s", p.name)
	from := time.Now()
	w.end(p, syscall.SIGKILL)
	if len(w.of(p.role)) == 0 {
		// Nobody could take over but its successor.
		if _, err := w.add(p.role); err != nil {
			return err
		}
		from = time.Now()
		return w.recovered(ctx, "kill -9 "+p.role, from, false)
	}
	if err := w.recovered(ctx, "kill -9 "+p.role, from, false); err != nil {
		return err
	}
	_, err := w.add(p.role)
	return err
}

// A pause is a way to keep a process from what it does.
type pause struct {
	begins, ends  string
	begin, finish func(*proc)
}

var (
	bySignal = pause{"SIGSTOP", "SIGCONT", func(p *proc) { p.Signal(syscall.SIGSTOP) }, func(p *proc) { p.Signal(syscall.SIGCONT) }}
	// byCutting takes the hub from a sink, without a word.
	byCutting = pause{"cut off", "connect", func(p *proc) { p.link.Set(faultproxy.Fault{DropUp: true, DropDown: true}) }, func(p *proc) {
		p.link.Set(faultproxy.Fault{})
		p.link.Reset()
	}}
)

// stall pauses a process for up to long: longer than a pin lives, often.
func (w *world) stall(ctx context.Context, p *proc, how pause, long time.Duration) error {
	d := time.Duration(w.rng.Int64N(int64(long)))
	w.say("%s %s for %v", how.begins, p.name, d.Truncate(100*time.Millisecond))
	from := time.Now()
	if p.role == "edge" {
		defer func() { w.disturb(from) }()
	}
	w.mu.Lock()
	p.stopped = true
	w.mu.Unlock()
	how.begin(p)
	end := time.After(d)
	if p.role != "edge" && len(w.of(p.role)) > 1 && d > pinLife {
		if err := w.recovered(ctx, how.begins+" "+p.role, from, false); err != nil {
			return err
		}
	}
	select {
	case <-end:
	case <-ctx.Done():
	}
	how.finish(p)
	w.mu.Lock()
	p.stopped = false
	w.mu.Unlock()
	if p.role == "edge" {
		return nil
	}
	return w.recovered(ctx, how.ends+" "+p.role, time.Now(), false)
}

// cutEdge takes the hub from an edge for longer than the policies wait. Where there are others, and their clocks agree, their
// traces wait for it, and the decisions are those that they would be without. Errors bring their traces back in any
// case.
func (w *world) cutEdge(ctx context.Context, e *proc) error {
	from := time.Now()
	w.wasCut = true
	d := wait + time.Duration(w.rng.Int64N(int64(2*time.Second)))
	if w.rng.IntN(2) == 0 {
		d += lag
	}
	w.say("%s %s of %s for %v", byCutting.begins, e.name, e.instance, d.Truncate(100*time.Millisecond))
	byCutting.begin(e)
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
	byCutting.finish(e)
	if err := forwarded(ctx, e); err != nil {
		return fmt.Errorf("%s was cut off: %w", e.name, err)
	}
	if took := time.Since(from); took > lag || e.instance == instances[len(instances)-1] {
		w.disturb(from)
	}
	return nil
}

// forwarded waits until the hub has the spans that an edge has accepted.
func forwarded(ctx context.Context, e *proc) error {
	accepted, err := spans(e, "accepted")
	if err != nil {
		return err
	}
	return daemon.Until(ctx, 3*time.Minute, func() error {
		n, err := spans(e, "forwarded")
		if err == nil && n < accepted {
			err = fmt.Errorf("%.0f of %.0f spans are forwarded", n, accepted)
		}
		return err
	})
}

// lag is for how long the sampler waits for the spans of another edge, less a second.
const lag = 9 * time.Second

// stepped is where the edge is whose clock can be wrong.
const stepped = "stepped"

// stepClock sets the clock of an edge, which sees that when it is started again.
func (w *world) stepClock(ctx context.Context, e *proc) error {
	w.wasStepped = true
	e.clock = time.Duration(w.rng.Int64N(int64(time.Hour))) - 30*time.Minute
	if w.rng.IntN(2) == 0 {
		e.clock /= 100
	}
	e.clock = e.clock.Truncate(time.Millisecond)
	if max(e.clock, -e.clock) > lag/2 && e.instance != instances[len(instances)-1] && w.apart.IsZero() {
		w.apart = time.Now()
	}
	w.say("the clock of %s is set to be wrong by %v", e.name, e.clock)
	e.Args[0] = filepath.Join(w.bin, stepped, "edge")
	return w.restart(ctx, e)
}

// pinLife is longer than a pin lives, and a member's key: whoever is paused for so
// long has lost its lanes.
const pinLife = 8 * time.Second

// restart kills an edge or the hub, and starts it again.
func (w *world) restart(ctx context.Context, p *proc) error {
	w.say("kill -9 %s", p.name)
	from := time.Now()
	defer func() { w.disturb(from) }()
	w.end(p, syscall.SIGKILL)
	w.pause(ctx, 200*time.Millisecond, 1500*time.Millisecond)
	w.mu.Lock()
	err := w.launch(p)
	w.procs[p.name] = p
	w.mu.Unlock()
	if err != nil {
		return err
	}
	return w.recovered(ctx, "kill -9 "+p.role, time.Now(), false)
}

// watchMachine notes when the machine itself stands still: this process, or its disk.
func (w *world) watchMachine(ctx context.Context) {
	const beat, still = 50 * time.Millisecond, 500 * time.Millisecond
	f, err := os.Create(filepath.Join(w.dir, "beat"))
	if err != nil {
		return
	}
	defer func() { _ = f.Close() }()
	for last := time.Now(); ctx.Err() == nil; {
		_, _ = f.WriteAt([]byte("x"), 0)
		_ = f.Sync()
		now := time.Now()
		if now.Sub(last) > still {
			w.say("the machine stood still for %v", now.Sub(last).Truncate(time.Millisecond))
			w.disturb(last)
		}
		last = now
		time.Sleep(beat)
	}
}

// disturb notes that since from the way to the hub was not as usual.
func (w *world) disturb(from time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.disturbed = append(w.disturbed, interval{from, time.Now().Add(2 * time.Second)})
}

// recovered waits until every lane has an owner that runs.
func (w *world) recovered(ctx context.Context, what string, from time.Time, planned bool) error {
	if err := daemon.Until(ctx, time.Minute, w.healthy); err != nil {
		return fmt.Errorf("no recovery from %s: %w", what, err)
	}
	w.recovery = append(w.recovery, recovery{what, time.Since(from), planned})
	return nil
}

// spans returns how many an edge has accepted, or forwarded, since it was started.
func spans(e *proc, what string) (float64, error) {
	text, err := daemon.Metric(e.admin, "penstock_"+what+`_items_total{signal="traces"}`)
	if err != nil {
		return 0, err
	}
	return strconv.ParseFloat(text, 64)
}

// segment is the size of a file of the edges' spools.
const segment = 1 << 20

// spooled wants an edge to have at most so many bytes that the hub does not have. While applications send,
// something is always on its way.
func spooled(p *proc, most float64) error {
	text, err := daemon.Metric(p.admin, "penstock_spool_bytes")
	if err != nil {
		return err
	}
	n, err := strconv.ParseFloat(text, 64)
	if err == nil && (n > most || math.IsNaN(n)) {
		err = fmt.Errorf("%s has %s bytes in its spool", p.name, text)
	}
	return err
}
