package membership

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

const lanesOfTest = 64 // what a large hub has

// peer is one member that reads its lanes and reports what it gets.
type peer struct {
	*Members
	conn *bus.Conn
	stop context.CancelFunc
	done chan struct{}
}

func startPeer(t testing.TB, b *broker.Broker, name string, got chan<- string) *peer {
	t.Helper()
	hub := connectTo(t, b, name, quiet)
	m := New(hub, "sink", name, ledger.New(prometheus.NewRegistry()), quiet)
	var lanes []Shared
	for p := range lanesOfTest {
		lanes = append(lanes, Shared{Signal: "logs", Partition: p, Backend: "test", LaneConfig: bus.LaneConfig{
			Stream: "LOGS", Filter: bus.PartitionFilter(otlpwire.Logs, p), Name: fmt.Sprint("test-", p),
		}, Tell: func() string { return "read by " + name }, Run: func(ctx context.Context, l *bus.Lane) {
			defer l.Close()
			l.Run(ctx, func(d bus.Delivery) bool {
				if d.Seq == 0 {
					return true
				}
				select {
				case got <- d.Subject + " " + string(d.Body):
				case <-ctx.Done():
					return false
				}
				return l.Ack(d.Seq) == nil
			})
		}})
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &peer{Members: m, conn: hub.Conn, stop: cancel, done: make(chan struct{})}
	go func() { defer close(p.done); m.Run(ctx, lanes) }()
	t.Cleanup(func() { cancel(); <-p.done })
	return p
}

// owned waits until the given members own all lanes, each one once and balanced,
// according to the page of the first one.
func owned(t testing.TB, within time.Duration, peers ...*peer) {
	t.Helper()
	var s Partitions
	start := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	if !backoff.Until(ctx, func() bool {
		r := httptest.NewRequest("GET", "/partitions?format=json", nil)
		w := httptest.NewRecorder()
		peers[0].Page().ServeHTTP(w, r)
		s = Partitions{}
		if err := json.Unmarshal(w.Body.Bytes(), &s); err != nil {
			t.Fatal(err)
		}
		load, good := map[string]int{}, 0
		for _, l := range s.Lanes {
			told := l.Placed != peers[0].self && l.Note == "" || l.Note == "read by "+peers[0].self // of its own lanes
			if len(l.Owners) == 1 && l.Owners[0] == l.Placed && l.Error == "" && told {
				good++
				load[l.Placed]++
			}
		}
		balanced := true
		for _, p := range peers {
			balanced = balanced && load[p.self] >= lanesOfTest/len(peers) && load[p.self] <= (lanesOfTest+len(peers)-1)/len(peers)
		}
		return good == lanesOfTest && balanced && len(s.Members) == len(peers)
	}) {
		t.Fatalf("after %v: %+v", within, s)
	}
	t.Logf("%d members own all lanes after %v", len(peers), time.Since(start).Truncate(100*time.Millisecond))
}

// TestMembersShareTheLanes lets members join, stop, die and come back while
// messages flow: every lane has an owner again soon, and no message is lost.
func TestMembersShareTheLanes(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	hub := testHub(t, b, lanesOfTest)
	got := make(chan string)
	seen := map[string]bool{}
	ready, end := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ready)
		for {
			select {
			case s := <-got:
				seen[s] = true
			case <-end:
				return
			}
		}
	}()
	sent := 0
	send := func() {
		for range 200 {
			publish(t, hub, fmt.Sprint("as-", sent%40), sent, sent+1)
			sent++
		}
	}
	one := startPeer(t, b, "one", got)
	send()
	owned(t, 10*time.Second, one)
	two, three := startPeer(t, b, "two", got), startPeer(t, b, "three", got)
	send()
	owned(t, 10*time.Second, one, two, three)
	send()
	two.stop()
	owned(t, 5*time.Second, one, three)
	<-two.done
	send()
	three.conn.Close() // as after a kill -9
	send()
	owned(t, 12*time.Second, one)
	four := startPeer(t, b, "four", got)
	owned(t, 10*time.Second, one, four)
	send()

	for p := range lanesOfTest {
		until(t, "all has been read", func() bool {
			at, err := hub.LaneFloor(t.Context(), bus.LaneConfig{Stream: "LOGS", Name: fmt.Sprint("test-", p)})
			return err == nil && at.Lag == 0
		})
	}
	close(end)
	<-ready
	if len(seen) != sent {
		t.Errorf("%d of %d messages came", len(seen), sent)
	}
	page := httptest.NewRecorder()
	one.Page().ServeHTTP(page, httptest.NewRequest("GET", "/partitions", nil))
	if text := page.Body.String(); !strings.Contains(text, "four") || !strings.Contains(text, "read by one") || !strings.Contains(text, "<title>penstock: partitions") || strings.Contains(text, "nobody yet") {
		t.Errorf("page:\n%s", text)
	}
}

// TestAReaderThatEndsBeginsAgain: a reader that has found that it is no longer the owner ends by itself.
// It is started again, because the lane is still placed here and no other member claims it.
func TestAReaderThatEndsBeginsAgain(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	testHub(t, b, 1)
	m := New(connectTo(t, b, "one", quiet), "sink", "one", ledger.New(prometheus.NewRegistry()), quiet)
	runs := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		m.Run(ctx, []Shared{{Signal: "logs", Backend: "test", LaneConfig: bus.LaneConfig{Stream: "LOGS", Filter: bus.PartitionFilter(otlpwire.Logs, 0), Name: "test-0"}, Run: func(ctx context.Context, l *bus.Lane) {
			defer l.Close()
			select {
			case runs <- struct{}{}:
			case <-ctx.Done():
			}
		}}})
	}()
	defer func() { cancel(); <-done }()
	for i := range 3 {
		select {
		case <-runs:
		case <-time.After(time.Minute):
			t.Fatalf("it has run %d times", i)
		}
	}
}

// TestMembersOutliveTheBucket deletes the members' bucket, as a hub does that loses
// what it held in memory.
func TestMembersOutliveTheBucket(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	testHub(t, b, lanesOfTest)
	got := make(chan string, 100)
	one, two := startPeer(t, b, "one", got), startPeer(t, b, "two", got)
	owned(t, 10*time.Second, one, two)
	if err := jetStream(t, b).DeleteKeyValue(t.Context(), Bucket.Name); err != nil {
		t.Fatal(err)
	}
	one.mu.Lock()
	clear(one.seen) // so that only what is seen from now on counts
	one.mu.Unlock()
	owned(t, 15*time.Second, one, two)
}

func TestMemberNames(t *testing.T) {
	for name, ok := range map[string]bool{"": true, "sink-1": true, "a.b": false, "*": false, "ä": false, strings.Repeat("x", 129): false} {
		if (CheckName(name) == nil) != ok {
			t.Errorf("%q: %v", name, CheckName(name))
		}
	}
	if m := New(nil, "sink", "", nil, quiet); CheckName(m.self) != nil || m.self == "" {
		t.Errorf("default name %q", m.self)
	}
}

// TestLanesForAWhile: a temporary lane begins at its start sequence and reads its subjects,
// has the owner of the lasting lane, continues after an owner that stops, and ends when it
// is no longer wanted.
func TestLanesForAWhile(t *testing.T) {
	b := testBroker(t)
	hub := testHub(t, b, 2)
	publish(t, hub, "as-1", 0, 40)
	publish(t, hub, "as-2", 0, 40)
	subjects, err := hub.Subjects(t.Context(), "LOGS", "otlp.logs.>")
	if err != nil || len(subjects) != 2 {
		t.Fatalf("%v, %v", subjects, err)
	}
	var filter, part string
	for s, n := range subjects {
		if p, instance := bus.SubjectPartition(s); instance == "as-2" && n == 40 {
			filter, part = s, p
		}
	}
	got, ended := make(chan uint64, 100), make(chan struct{})
	lane := Shared{Signal: "logs", Backend: "test", Quiet: true, Partitions: 2, LaneConfig: bus.LaneConfig{Stream: "LOGS", Filters: []string{filter}, Name: "replay", Start: 61, Raw: true}}
	_, _ = fmt.Sscan(part, &lane.Partition)
	lane.Run = func(ctx context.Context, l *bus.Lane) {
		defer close(ended)
		defer l.Close()
		l.Run(ctx, func(d bus.Delivery) bool {
			if d.Seq > 0 {
				got <- d.Seq
				return l.Ack(d.Seq) == nil
			}
			return true
		})
	}
	m := New(connectTo(t, b, "a", quiet), "sink", "a", ledger.New(prometheus.NewRegistry()), quiet)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); m.Run(ctx, nil) }()
	m.Also([]Shared{lane})
	for want := uint64(61); want <= 80; want++ {
		select {
		case seq := <-got:
			if seq != want {
				t.Fatalf("message %d, want %d", seq, want)
			}
		case <-time.After(20 * time.Second):
			t.Fatalf("message %d does not come", want)
		}
	}
	m.Also(nil)
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("a lane that is not wanted goes on")
	}
	// Set again, it begins at its floor: nothing is left.
	ended = make(chan struct{})
	m.Also([]Shared{lane})
	select {
	case seq := <-got:
		t.Errorf("message %d again", seq)
	case <-time.After(2 * time.Second):
	}
	stop()
	<-done
	<-ended
	if _, err := hub.LaneFloor(t.Context(), lane.LaneConfig); err != nil {
		t.Errorf("the floor is gone: %v", err)
	}
	for range 2 {
		if err := hub.DropLane(t.Context(), "LOGS", "replay"); err != nil {
			t.Error(err)
		}
	}
}

// TestWhoSeesNobodyIsNoMember: while the watch shows nothing, as where the credential may not read the
// bucket, the key is not renewed: others would give lanes to a member that runs none.
func TestWhoSeesNobodyIsNoMember(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := New(nil, "sink", "one", ledger.New(prometheus.NewRegistry()), quiet)
		ctx, stop := context.WithCancel(t.Context())
		changes, ended, renewals := make(chan change), make(chan error, 1), 0
		done := make(chan error)
		go func() {
			done <- m.track(ctx, ctx, changes, ended, func() error { renewals++; return nil })
		}()
		time.Sleep(10 * renewInterval)
		synctest.Wait()
		if renewals > 0 {
			t.Errorf("its key was written %d times", renewals)
		}
		changes <- change{}
		for range 3 {
			time.Sleep(renewInterval)
			synctest.Wait()
			value, _ := json.Marshal(Member{Name: "one", Since: time.Now()})
			changes <- change{"sink.one", value}
		}
		if renewals != 4 {
			t.Errorf("its key was written %d times, want 4", renewals)
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
