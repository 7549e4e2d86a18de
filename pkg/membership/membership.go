// Package membership shares the lanes of a role among its processes.
//
//	m := membership.New(hub, "sink", name, led, log)
//	m.Run(ctx, lanes) // runs those that are placed here
//
// # Promises
//
//   - Each lane is placed on one member; members that see the same members place lanes in the same way.
//   - When a member stops, its lanes have an owner again at once; when it dies or is cut off,
//     within ten seconds.
//   - A lane that nobody reads, or that makes no progress, is reported within ten seconds.
//
// # Not here
//
// Who owns a lane: that is the pin of [bus.Lane]. A wrong or late view of the members costs balance,
// never correctness.
package membership

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/pkg/stall"
)

// Members is the group of processes that share the lanes of a role. Each renews its
// own key in the hub's bucket MEMBERS, <group>.<name>, and watches those of the
// others.
//
// Time is measured by this process's clock, but it only advances when the watch reports
// a renewal of this process's own key: a member is gone when its key was last seen more
// than memberTTL before that. While our own renewals do not come back, this process is
// the one that is cut off, and no other member is considered gone.
type Members struct {
	hub   *bus.Hub
	group string
	self  string
	led   *ledger.Ledger
	log   *slog.Logger

	mu   sync.Mutex
	seen map[string]sighting // by name
	runs []*run              // the lanes, in the order given
	also []Shared            // further ones, as last set by Also
	told chan struct{}       // signals that Also has set others
	said backoff.Repeats
}

// Member is what a member reports about itself.
type Member struct {
	Name    string    `json:"name"`
	Version string    `json:"version"`
	Since   time.Time `json:"since"` // by its own clock
	Owns    []string  `json:"owns"`  // lanes, as <stream>/<consumer>
}

type sighting struct {
	Member
	at time.Time
}

// Shared is a lane that the members of a group share.
type Shared struct {
	bus.LaneConfig
	Signal    string
	Partition int
	Backend   string
	// Partitions is how many the stream has; 0 where every one has a lane. A temporary
	// lane has the owner of the lasting lane of its stream and partition, if there is
	// one.
	Partitions int
	// Quiet lanes have no gauges.
	Quiet bool
	// Journal is the subject of DECISIONS that the lane's owner writes; empty for none.
	Journal string
	// Hold, if not nil, returns for how long the floor need not move while the lane makes progress.
	Hold func() time.Duration
	// Tell, if not nil, returns what there is to say about the lane where it runs, for the page; it is called from other
	// goroutines.
	Tell func() string
	// Run reads the lane until ctx ends, finishes what it can within
	// [HandOver], and closes it.
	Run func(ctx context.Context, lane *bus.Lane)
}

func (s Shared) id() string { return s.Stream + "/" + s.Name }

// run is a lane and its state in this process.
type run struct {
	Shared
	stop context.CancelFunc // nil: it does not run here
	done chan struct{}
	lane *bus.Lane
	also bool // a temporary lane, set by Also
	gone bool // no longer wanted

	failed error           // why it is not open; nil when it is
	stall  *stall.Detector // nil: a quiet lane
	// As follow has seen it:
	floor uint64
	moved time.Time // when the floor last moved, or nothing was left
}

func (m *Members) newRun(s Shared, also bool) *run {
	r := &run{Shared: s, also: also}
	if !s.Quiet {
		r.stall = stall.New(m.led, s.Signal, strconv.Itoa(s.Partition), s.Backend, m.log)
	}
	return r
}

const (
	// HandOver is for how long a reader whose lane is placed on another member may finish
	// what it has begun.
	HandOver = 1500 * time.Millisecond

	renewInterval = time.Second
	memberTTL     = 5 * time.Second
)

// Bucket has a key for each member. It is in memory: what it holds is written again every second.
var Bucket = bus.BucketConfig{Name: "MEMBERS", Description: "who shares the lanes, a key each", TTL: memberTTL, Memory: true}

// New returns the group; name is this process's, unique in the group.
// If it is empty, it is the host's name with a random suffix.
func New(hub *bus.Hub, group, name string, led *ledger.Ledger, log *slog.Logger) *Members {
	if name == "" {
		host, _ := os.Hostname()
		name = unfit.ReplaceAllString(host, "-") + "-" + strings.ToLower(rand.Text()[:6])
	}
	return &Members{hub: hub, group: group, self: name, led: led, log: log.With("member", name), seen: map[string]sighting{}, told: make(chan struct{}, 1)}
}

var unfit = regexp.MustCompile(`[^A-Za-z0-9_-]`)

// CheckName returns an error if a name cannot be part of a key of the bucket. It may
// be empty.
func CheckName(name string) error {
	if len(name) > 128 || unfit.MatchString(name) {
		return fmt.Errorf("member is %q, want up to 128 letters, digits, - and _", name)
	}
	return nil
}

// Self returns this process's name in the group.
func (m *Members) Self() string { return m.self }

// Run runs the lanes that are placed here until ctx ends; then it leaves, so that
// others take over at once, and waits until all are closed.
func (m *Members) Run(ctx context.Context, lanes []Shared) {
	m.mu.Lock()
	for _, l := range lanes {
		m.runs = append(m.runs, m.newRun(l, false))
	}
	m.mu.Unlock()
	// Lanes end one by one, by place; not all at once with ctx.
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var others sync.WaitGroup
	others.Go(func() { m.followOthers(ctx) })
	since := time.Now()
	for ctx.Err() == nil {
		if err := m.watch(ctx, work, since); ctx.Err() == nil {
			if more, due := m.said.Due("members", time.Now()); due {
				m.log.Warn("members cannot be watched, will try again", "err", err, "more_since_last_said", more)
			}
			backoff.Sleep(ctx, renewInterval)
		}
	}
	others.Wait()
	if b, err := m.hub.OpenBucket(work, Bucket); err == nil {
		_ = b.Delete(work, m.key())
	}
	stop()
	for _, r := range m.runs {
		if r.done != nil {
			<-r.done
		}
	}
}

// Also sets the temporary lanes, besides those of [Members.Run]: new ones are placed, those
// that are no longer among them are stopped. A lane is identified by its stream and name.
func (m *Members) Also(lanes []Shared) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.also = lanes
	select {
	case m.told <- struct{}{}:
	default: // a signal is pending
	}
}

// adopt applies what Also has set. A lane that runs here and is no longer wanted stays
// until it has ended.
func (m *Members) adopt() {
	m.mu.Lock()
	defer m.mu.Unlock()
	wanted := map[string]Shared{}
	for _, l := range m.also {
		wanted[l.id()] = l
	}
	m.runs = slices.DeleteFunc(m.runs, func(r *run) bool {
		_, keep := wanted[r.id()]
		delete(wanted, r.id())
		if r.gone = r.also && !keep; !r.gone {
			return false
		}
		if r.stop != nil {
			r.stop()
			r.stop = nil
		}
		return r.done == nil
	})
	for _, l := range m.also {
		if _, missing := wanted[l.id()]; missing {
			m.runs = append(m.runs, m.newRun(l, true))
		}
	}
}

func (m *Members) key() string { return m.group + "." + m.self }

// change is what the watch reports of one key; without a key it reports that all existing keys
// have been reported.
type change struct {
	key   string
	value []byte
}

// watch renews this member's key, follows those of the others and places lanes, until
// ctx ends or the watch turns out to be stale.
func (m *Members) watch(ctx, work context.Context, since time.Time) error {
	b, err := m.hub.OpenBucket(ctx, Bucket)
	if err != nil {
		return err
	}
	watching, stop := context.WithCancel(ctx)
	changes, ended := make(chan change), make(chan error, 1)
	go func() {
		ended <- b.Watch(watching, m.group+".*", func(key string, value []byte) {
			select {
			case changes <- change{key, value}:
			case <-watching.Done():
			}
		})
	}()
	err = m.track(ctx, work, changes, ended, func() error { return m.renew(ctx, b, since) })
	stop()
	<-ended //nolint:errcheck // the first error counts
	return err
}

// track is watch with a watch that has begun. The key is renewed only once the watch has shown what
// exists: a member that sees nobody would own lanes, and run none.
func (m *Members) track(ctx, work context.Context, changes <-chan change, ended chan error, renew func() error) error {
	tick := time.NewTicker(renewInterval)
	defer tick.Stop()
	var started time.Time // when the watch had shown everything; zero before
	for {
		var err error
		select {
		case c := <-changes:
			if c.key != "" {
				m.note(c)
				break
			}
			started = time.Now()
			m.refresh()
			err = renew()
		case err = <-ended:
			ended <- nil
		case <-tick.C:
			if !started.IsZero() {
				err = renew()
			}
		case <-m.told:
		case <-ctx.Done():
			return nil
		}
		if err != nil {
			return err // a hub that was restarted has lost the bucket
		}
		if started.IsZero() {
			continue
		}
		if m.expire(started) {
			return errors.New("own heartbeats not received; membership watch is stale")
		}
		m.place(work)
	}
}

// refresh gives every member time to be seen on a new watch.
func (m *Members) refresh() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, s := range m.seen {
		s.at = time.Now()
		m.seen[name] = s
	}
}

// renew writes this member's key.
func (m *Members) renew(ctx context.Context, b *bus.Bucket, since time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, renewInterval)
	defer cancel()
	me := Member{Name: m.self, Version: app.Version, Since: since.Truncate(time.Second)}
	m.mu.Lock()
	for _, r := range m.runs {
		if r.lane != nil && r.lane.Owned() {
			me.Owns = append(me.Owns, r.id())
		}
	}
	m.mu.Unlock()
	value, _ := json.Marshal(me) // cannot fail
	if err := b.Put(ctx, m.key(), value); err != nil {
		return fmt.Errorf("renew membership: %w", err)
	}
	return nil
}

func (m *Members) note(c change) {
	name := strings.TrimPrefix(c.key, m.group+".")
	m.mu.Lock()
	defer m.mu.Unlock()
	if c.value == nil {
		delete(m.seen, name)
		return
	}
	member, err := parseMember(name, c.value)
	if err != nil {
		if _, due := m.said.Due("member "+name, time.Now()); due {
			m.log.Error("member ignored: its key in the hub was not written by a process of this group", "key", c.key, "err", err)
		}
		return
	}
	m.seen[name] = sighting{member, time.Now()}
}

// parseMember reads what a member reports about itself: its own name, and since when it runs.
// Anything else in its place would own partitions and read none.
func parseMember(name string, value []byte) (m Member, err error) {
	if err = json.Unmarshal(value, &m); err == nil && (m.Name != name || m.Since.IsZero() || CheckName(name) != nil) {
		err = fmt.Errorf("it names %.128q, since %v", m.Name, m.Since)
	}
	return m, err
}

// expire removes members that are gone. It reports whether our own key has not been seen
// for too long, on a watch that was begun at started.
func (m *Members) expire(started time.Time) (deaf bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	us, there := m.seen[m.self]
	if !there || us.at.Before(started) {
		us.at = started
	}
	for name, s := range m.seen {
		if us.at.Sub(s.at) > memberTTL {
			m.log.Warn("member is gone: its key was not renewed", "gone", name)
			delete(m.seen, name)
		}
	}
	return time.Since(us.at) > memberTTL
}

// place starts and stops lanes according to the current members.
func (m *Members) place(work context.Context) {
	m.adopt()
	owners := m.owners()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.runs {
		select {
		case <-r.done: // has ended; a nil channel never does
			r.done = nil
		default:
		}
		switch mine := owners[r.Stream][r.Partition] == m.self; {
		case mine && r.done == nil && !r.gone:
			if r.stop != nil {
				r.stop() // releases the context of the reader that has ended by itself
			} else if r.stall != nil { // the lane begins now
				r.moved = time.Now()
				r.stall.Look(r.moved, true, nil)
			}
			ctx, stop := context.WithCancel(work)
			r.stop, r.done = stop, make(chan struct{})
			go m.runLane(ctx, r, r.done)
		case !mine && r.stop != nil:
			r.stop()
			r.stop = nil
		}
	}
}

// owners places every stream's partitions; this process always counts as a member.
func (m *Members) owners() map[string][]string {
	m.mu.Lock()
	defer m.mu.Unlock()
	names := append(slices.Collect(maps.Keys(m.seen)), m.self)
	partitions := map[string]int{}
	for _, r := range m.runs {
		partitions[r.Stream] = max(partitions[r.Stream], r.Partition+1, r.Partitions)
	}
	owners := map[string][]string{}
	for stream, n := range partitions {
		owners[stream] = partition.Place(stream, n, names)
	}
	return owners
}

func (m *Members) runLane(ctx context.Context, r *run, done chan<- struct{}) {
	defer close(done)
	cfg := r.LaneConfig
	followed, stop := context.WithCancel(ctx)
	var follower sync.WaitGroup
	if !r.Quiet {
		cfg.Interrupted = m.led.Interrupted(r.Signal, r.Backend)
		follower.Go(func() { m.follow(followed, r) })
	}
	if lane := m.open(ctx, r, cfg); lane != nil {
		r.Run(ctx, lane)
	}
	stop() // a reader that has lost the lane ends by itself; it begins again if the lane is still ours
	follower.Wait()
	if r.stall != nil && ctx.Err() != nil {
		r.stall.Look(time.Now(), true, nil) // another member's from now on
	}
	m.mu.Lock()
	r.lane = nil
	m.mu.Unlock()
}

// open opens a lane, and tries again until it succeeds; nil when ctx ended first.
func (m *Members) open(ctx context.Context, r *run, cfg bus.LaneConfig) *bus.Lane {
	backoff.Retry(ctx, m.log, "open lane "+r.id(), func() error {
		lane, err := m.hub.Conn.OpenLane(ctx, cfg)
		m.mu.Lock()
		defer m.mu.Unlock()
		r.lane, r.failed = lane, err
		return err
	})
	return r.lane // set only by this goroutine
}

// Finish returns a context that ends [HandOver] after ctx: for what a reader has begun
// when its lane is placed on another member.
func Finish(ctx context.Context) (context.Context, context.CancelFunc) {
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	unhook := context.AfterFunc(ctx, func() {
		if backoff.Sleep(work, HandOver) {
			stop()
		}
	})
	return work, func() { unhook(); stop() }
}

// Drain waits until the lanes have nothing left, for at most d. It returns at once
// when there are other members to take over.
func (m *Members) Drain(ctx context.Context, d time.Duration, counts func(Shared) bool) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	backoff.Until(ctx, func() bool {
		if !m.Alone() {
			return true
		}
		for _, lane := range m.lanes(counts) {
			if at, err := lane.Progress(ctx); err == nil && at.Lag > 0 {
				return false
			}
		}
		return true
	})
}

// lanes returns those that are open here.
func (m *Members) lanes(counts func(Shared) bool) (lanes []*bus.Lane) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.runs {
		if r.lane != nil && !r.also && counts(r.Shared) {
			lanes = append(lanes, r.lane)
		}
	}
	return lanes
}

// Alone reports whether no other member could take the lanes over.
func (m *Members) Alone() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	_, seen := m.seen[m.self]
	return len(m.seen) == 0 || (len(m.seen) == 1 && seen)
}

// Behind returns how many messages wait for the lasting lane with the largest backlog,
// of those that are owned here.
func (m *Members) Behind() (most uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.runs {
		if r.lane != nil && !r.also {
			most = max(most, r.lane.Waiting())
		}
	}
	return most
}

// shared returns the lanes of the group.
func (m *Members) shared() (all []Shared) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.runs {
		all = append(all, r.Shared)
	}
	return all
}

// All returns the members, by name.
func (m *Members) All() (all []Member) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.seen {
		all = append(all, s.Member)
	}
	slices.SortFunc(all, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// First reports whether this process is the first, by name, of the current members: exactly one
// is, except for the seconds in which a member joins or leaves.
func (m *Members) First() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name := range m.seen {
		if name < m.self {
			return false
		}
	}
	return true
}
