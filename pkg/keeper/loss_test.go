package keeper

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// api asks the hub as an operator with all rights does.
func (w *world) api(subject, body string) {
	w.Helper()
	nc, err := nats.Connect("", nats.InProcessServer(w.broker))
	if err != nil {
		w.Fatal(err)
	}
	defer nc.Close()
	if res, err := nc.Request("$JS.API."+subject, []byte(body), 10*time.Second); err != nil || !strings.Contains(string(res.Data), `"success":true`) {
		w.Fatalf("%s: %v %s", subject, err, res.Data)
	}
}

// sends sends n messages of an instance of a partition.
func (w *world) sends(p, n int) {
	w.Helper()
	for range n {
		if err := w.send(p); err != nil {
			w.Fatal(err)
		}
	}
}

// owes waits until the hub has counted what a lane is owed: a message is acknowledged before it is counted.
func (w *world) owes(lane string, n uint64) {
	w.Helper()
	w.until(fmt.Sprintf("%s is owed %d", lane, n), func() bool {
		floors, _, err := w.conn.Floors(w.Context(), "LOGS")
		return err == nil && floors[lane].Lag == n
	})
}

// losses returns what is on record, by the stream.
func (w *world) losses() (all []string) {
	w.Helper()
	losses, err := Losses(w.Context(), w.conn)
	if err != nil {
		w.Fatal(err)
	}
	for _, l := range losses {
		all = append(all, fmt.Sprintf("%s %d %v %v", l.Stream, l.Messages, l.Lanes, l.Items))
	}
	return all
}

// next is a keeper that begins, with the counters of the one before.
func (w *world) next() *Keeper {
	k := New(func() *bus.Conn { return w.conn }, func() bool { return true }, topology, w.shared, w.led, w.Keeper.log)
	k.settle = 0
	return k
}

// TestWhatSomebodyElseRemovesIsCounted: of what an operator purges that counts which lanes had not
// finished, once, also when the keeper of then is gone.
func TestWhatSomebodyElseRemovesIsCounted(t *testing.T) {
	for _, another := range []bool{false, true} {
		t.Run(fmt.Sprintf("another keeper %v", another), func(t *testing.T) {
			w := newWorld(t, "a", "b")
			w.sends(0, 5) // 1 to 5
			w.sends(1, 4) // 6 to 9
			for _, lane := range []string{"a-0", "b-0"} {
				w.read(lane, 5)
			}
			w.keep()
			w.api("STREAM.PURGE.LOGS", `{"seq":6}`) // all have finished that
			w.keep()
			if got := w.losses(); len(got) > 0 {
				t.Fatalf("what all have finished is no loss: %v", got)
			}
			w.read("b-1", 7)
			w.owes("a-1", 4)
			w.owes("b-1", 2)
			w.stream("LOGS").memory.stored = time.Time{} // it is time
			w.keep()
			w.api("STREAM.PURGE.LOGS", `{"seq":9}`) // leaves one
			want := "LOGS 3 map[a-1:3 b-1:1] map[]"
			for range 2 {
				if another {
					w.Keeper = w.next()
				}
				w.keep()
				if got := w.losses(); len(got) != 1 || got[0] != want {
					t.Fatalf("on record: %v, want %s", got, want)
				}
			}
			if n := testutil.ToFloat64(w.led.Lost("LOGS")); n != 3 || !w.said.Says("disappeared from the stream", "a-1:3") {
				t.Errorf("lost=%v", n)
			}
			if got := w.read("a-1", 9); len(got) != 1 || got[0] != 9 {
				t.Errorf("a-1 gets %v", got)
			}
		})
	}
}

// TestAStreamThatIsMadeAgain: what lanes were owed of the one before is lost.
func TestAStreamThatIsMadeAgain(t *testing.T) {
	w := newWorld(t, "a")
	w.sends(0, 5)
	w.read("a-0", 2)
	w.owes("a-0", 3)
	w.keep()
	w.api("STREAM.DELETE.LOGS", "")
	if err := w.conn.EnsureHub(w.Context(), topology); err != nil {
		t.Fatal(err)
	}
	w.sends(0, 9)
	w.Keeper = w.next()
	for range 2 {
		w.keep()
		if got := w.losses(); len(got) != 1 || got[0] != "LOGS 3 map[a-0:3] map[]" {
			t.Fatalf("on record: %v", got)
		}
	}
}

// TestKeepersCountNoLossOfTheirOwn: whoever of several removes, and dies between the word and
// the removal, and when one who has removed nothing for long comes back.
func TestKeepersCountNoLossOfTheirOwn(t *testing.T) {
	w := newWorld(t, "a")
	one, other := w.Keeper, w.next()
	sent := w.fill(0)
	w.owes("a-0", uint64(sent))
	w.keep() // it is written down that all are owed
	w.read("a-0", uint64(sent))
	w.keep() // removes some, which are finished now
	w.Keeper = w.next()
	w.keep()
	if got := w.losses(); len(got) > 0 {
		t.Fatalf("on record: %v", got)
	}
	for range 4 {
		for _, k := range []*Keeper{one, other} {
			sent += w.fill(0)
			w.read("a-0", uint64(sent-20))
			w.Keeper = k
			before := w.state("LOGS").FirstSeq
			for range 2 { // the first finds that another was here
				if err := w.look(t.Context(), w.stream("LOGS")); err != nil && !strings.Contains(err.Error(), bus.ErrChanged.Error()) {
					t.Fatal(err)
				}
			}
			if first := w.state("LOGS").FirstSeq; first == before {
				t.Fatalf("nothing was removed of %d", sent)
			}
		}
	}
	floors, state, err := w.conn.Floors(t.Context(), "LOGS")
	if err != nil {
		t.Fatal(err)
	}
	if err := w.account(t.Context(), w.stream("LOGS"), state, floors, state.FirstSeq+9); err != nil { // and dies
		t.Fatal(err)
	}
	w.api("STREAM.PURGE.LOGS", fmt.Sprintf(`{"seq":%d}`, state.FirstSeq+5))
	w.Keeper = w.next()
	w.keep()
	if got := w.losses(); len(got) > 0 || testutil.ToFloat64(w.led.Lost("LOGS")) > 0 {
		t.Errorf("on record: %v", got)
	}
}

// TestDeadLettersThatMakeRoom: the oldest go, and whose they are is counted.
func TestDeadLettersThatMakeRoom(t *testing.T) {
	w := newWorld(t, "a")
	letter := func(instance string) {
		err := w.conn.DeadLetter(t.Context(), otlpwire.Logs, instance, bus.Message{
			Header:  envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: 2, Arrival: 1},
			Refusal: &bus.Refusal{Reason: ledger.DeadRefused, Backend: "loki"}, Body: make([]byte, 100),
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		letter("quiet")
	}
	items := map[string]uint64{}
	left := func() map[string]uint64 {
		here := map[string]uint64{}
		if err := w.conn.Letters(t.Context(), "", "", false, func(l bus.Letter) bool { here["logs."+l.Instance] += 2; return true }); err != nil {
			t.Fatal(err)
		}
		return here
	}
	for sent := uint64(0); sent < 400; sent++ {
		if letter("noisy"); sent%5 == 0 {
			w.letters(t.Context())
		}
		items["logs.noisy"] += 2
	}
	items["logs.quiet"] = 6
	w.letters(t.Context())
	here, gone := left(), map[string]uint64{}
	for _, instance := range []string{"quiet", "noisy"} {
		gone["logs."+instance] = uint64(testutil.ToFloat64(w.led.Pushed("logs", instance)))
		if all := here["logs."+instance] + gone["logs."+instance]; all != items["logs."+instance] {
			t.Errorf("%s: %d items of letters are left and %d were pushed out, of %d", instance, here["logs."+instance], gone["logs."+instance], items["logs."+instance])
		}
	}
	if gone["logs.quiet"] != 6 || gone["logs.noisy"] == 0 {
		t.Fatalf("pushed out: %v", gone)
	}
	w.pushed.since = time.Now().Add(-pushedInterval)
	w.recordPushed(t.Context(), time.Now())
	losses, err := Losses(t.Context(), w.conn)
	if err != nil || len(losses) != 1 || !maps.Equal(losses[0].Items, gone) || losses[0].Messages != (gone["logs.quiet"]+gone["logs.noisy"])/2 {
		t.Errorf("on record: %+v, %v", losses, err)
	}
}

// TestTheAgeOfWhatIsOwed is told lane by lane.
func TestTheAgeOfWhatIsOwed(t *testing.T) {
	w := newWorld(t, "a")
	w.sends(0, 2)
	w.sends(1, 1)
	w.read("a-1", 3)
	s, began := w.stream("LOGS"), time.Now().Add(-time.Hour)
	floors, _, err := w.conn.Floors(t.Context(), "LOGS")
	if err != nil {
		t.Fatal(err)
	}
	w.age(t.Context(), s, began.Add(2*time.Hour), floors)
	for lane, want := range map[string]float64{"a-0": time.Hour.Seconds(), "a-1": 0} {
		if got := testutil.ToFloat64(w.led.Oldest("LOGS", lane)); got < want || got > want*1.1 {
			t.Errorf("%s: %v s, want %v", lane, got, want)
		}
	}
}

// TestNoAlarmWhereTheMemoryBegins: a hub of which much is gone already, and in which data flows.
func TestNoAlarmWhereTheMemoryBegins(t *testing.T) {
	w := newWorld(t, "a")
	w.sends(0, 9)
	w.read("a-0", 6)
	w.api("STREAM.PURGE.LOGS", `{"seq":5}`)
	for i := range 3 {
		w.keep()
		if w.sends(0, 2); i == 1 {
			w.read("a-0", 8)
		}
		w.stream("LOGS").memory.stored = time.Time{}
	}
	if m := w.stream("LOGS").memory; m.Removed < 4 || m.revision == 0 {
		t.Errorf("remembered: %+v", m)
	}
	if got := w.losses(); len(got) > 0 {
		t.Errorf("on record: %v", got)
	}
}

// TestPurgedSubjects: what is removed from the middle counts, too.
func TestPurgedSubjects(t *testing.T) {
	w := newWorld(t, "a")
	w.sends(0, 2)
	w.sends(1, 3)
	w.sends(0, 2)
	w.owes("a-0", 4)
	w.owes("a-1", 3)
	w.keep()
	w.api("STREAM.PURGE.LOGS", fmt.Sprintf(`{"filter":"otlp.logs.*.%s"}`, w.names[1]))
	for range 2 {
		w.keep()
		if got := w.losses(); len(got) != 1 || got[0] != "LOGS 3 map[a-1:3] map[]" {
			t.Fatalf("on record: %v", got)
		}
	}
}

// TestWithoutTheBucket: a keeper that cannot remember, or cannot read what was left, makes room.
func TestWithoutTheBucket(t *testing.T) {
	w := newWorld(t, "a")
	sent := w.fill(0)
	w.owes("a-0", uint64(sent))
	w.keep() // it is written down that all are owed
	w.read("a-0", uint64(sent))
	unable := errors.New("no leader")
	w.Keeper.conn = func() hub { return forgetful{w.conn, unable} }
	if first := w.keep(); first == 1 || !w.said.Says("KEEPER", "no leader") {
		t.Fatalf("the first message is %d", first)
	}
	// What was removed meanwhile is no loss.
	w.Keeper.conn = func() hub { return w.conn }
	w.keep()
	if got := w.losses(); len(got) > 0 {
		t.Errorf("on record: %v", got)
	}
	// Something else stands there.
	b, err := w.conn.OpenBucket(t.Context(), Bucket, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Put(t.Context(), "LOGS", []byte("x")); err != nil {
		t.Fatal(err)
	}
	w.Keeper = w.next()
	before := w.state("LOGS").FirstSeq
	sent += w.fill(0)
	w.read("a-0", uint64(sent))
	if first := w.keep(); first == before {
		t.Error("nothing more was removed")
	}
	if got := w.losses(); len(got) > 0 {
		t.Errorf("on record: %v", got)
	}
}

// forgetful is a hub without the bucket KEEPER.
type forgetful struct {
	*bus.Conn
	err error
}

func (f forgetful) OpenBucket(context.Context, bus.BucketConfig, int) (*bus.Bucket, error) {
	return nil, f.err
}

// TestGivenUpOnce: a lane that was given up is told of once, whoever is the keeper.
func TestGivenUpOnce(t *testing.T) {
	w := newWorld(t, "a")
	w.open(bus.LaneConfig{Stream: "LOGS", Filter: bus.PartitionFilter(otlpwire.Logs, 1), Name: "old-1"})
	w.sends(1, 3)
	w.owes("old-1", 3)
	w.keep()
	if err := w.conn.DropLane(t.Context(), "LOGS", "old-1"); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		w.keep()
		w.Keeper = w.next()
	}
	if got := w.losses(); len(got) != 1 || got[0] != "LOGS 3 map[old-1:3] map[]" || testutil.ToFloat64(w.led.Abandoned("LOGS")) != 3 {
		t.Errorf("on record: %v", got)
	}
}

// TestWhatIsOwedIsWrittenDown: also what came soon after the last time, and stays as it is.
func TestWhatIsOwedIsWrittenDown(t *testing.T) {
	w := newWorld(t, "a")
	w.sends(0, 1)
	w.keep()
	w.sends(0, 2)
	w.owes("a-0", 3)
	w.keep() // too soon
	w.stream("LOGS").memory.stored = time.Now().Add(-2 * rememberInterval)
	w.keep()
	m, err := w.load(t.Context(), "LOGS")
	if err != nil || m.Lanes["a-0"].Lag != 3 {
		t.Errorf("written down: %+v, %v", m, err)
	}
}

// TestAnotherHasWrittenMeanwhile: a keeper that does not know what another one has written down removes
// nothing before it has read that.
func TestAnotherHasWrittenMeanwhile(t *testing.T) {
	w := newWorld(t, "a")
	sent := w.fill(0)
	w.keep()
	other := w.next()
	if err := other.look(t.Context(), other.streams[otlpwire.Logs]); err != nil { // it has no news, and writes them down
		t.Fatal(err)
	}
	w.read("a-0", uint64(sent))
	if err := other.store(t.Context(), "LOGS", &other.streams[otlpwire.Logs].memory, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := w.look(t.Context(), w.stream("LOGS")); !errors.Is(err, bus.ErrChanged) || w.state("LOGS").FirstSeq != 1 {
		t.Fatalf("the first message is %d, %v", w.state("LOGS").FirstSeq, err)
	}
	if w.keep() == 1 {
		t.Error("nothing was removed")
	}
}
