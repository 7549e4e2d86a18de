package keeper

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/tally"
)

// scripted is a hub that gives the answers of a test.
type scripted struct {
	hub
	last    uint64 // that First finds
	err     error  // of First
	denied  string // what Remove refuses
	asked   int    // how often SequenceAt was
	removed map[string]uint64
}

func (h *scripted) First(context.Context, string, string, uint64) (uint64, time.Time, error) {
	return h.last, time.Time{}, h.err
}

func (h *scripted) SequenceAt(context.Context, string, time.Time) (uint64, error) {
	h.asked++
	return 11, nil
}

func (h *scripted) Remove(_ context.Context, _, subject string, upTo uint64) error {
	if subject == h.denied {
		return errors.New("denied")
	}
	h.removed[subject] = upTo
	return nil
}

// TestWhoIsTrusted: nothing is removed on the word of a server that does not have the end of the
// stream, nor on answers that are old.
func TestWhoIsTrusted(t *testing.T) {
	s := &kept{name: "LOGS", state: bus.StreamState{LastSeq: 7}}
	for name, tc := range map[string]struct {
		hub   scripted
		began time.Time
		want  string
	}{
		"sound":     {scripted{last: 7}, time.Now(), ""},
		"no answer": {scripted{err: errors.New("no responders")}, time.Now(), "no responders"},
		"behind":    {scripted{}, time.Now(), "does not have its last message"},
		"slept":     {scripted{last: 7}, time.Now().Add(-2 * patience), "this process was suspended"},
	} {
		err := s.trusted(t.Context(), &tc.hub, tc.began)
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

// TestOneLaneHoldsUpNoOther: decisions of a lane are removed though those of another cannot be, and
// the hub is asked once for the place of a time.
func TestOneLaneHoldsUpNoOther(t *testing.T) {
	at := time.Now()
	h := &scripted{denied: "d.0", removed: map[string]uint64{}}
	r := removal{began: at, first: 1, cuts: map[time.Time]uint64{}}
	if err := r.remove(t.Context(), h, "d.0", at); err == nil {
		t.Error("no error of the lane that is refused")
	}
	if err := r.remove(t.Context(), h, "d.1", at); err != nil || h.removed["d.1"] != 10 || h.asked != 1 {
		t.Errorf("%v, removed %v, asked %d times", err, h.removed, h.asked)
	}
	r.first = 11
	if err := r.remove(t.Context(), h, "d.2", at); err != nil || len(h.removed) != 1 {
		t.Errorf("nothing is that old: %v, removed %v", err, h.removed)
	}
	r = removal{began: at.Add(-2 * patience), first: 1, cuts: map[time.Time]uint64{}}
	if err := r.remove(t.Context(), h, "d.2", at); err != nil || len(h.removed) != 1 {
		t.Errorf("on old answers: %v, removed %v", err, h.removed)
	}
}

// TestOnlyWhatIsCountedIsRemoved: of what has just been finished only what the lanes' tallies have goes, although
// the stream is full; after some time all.
func TestOnlyWhatIsCountedIsRemoved(t *testing.T) {
	w := newWorld(t, "a")
	w.Keeper.settle = time.Hour
	counts := tally.Open(tally.Config{Conn: func() *bus.Conn { return w.conn }, Replicas: 1, Stream: "LOGS", Lane: "a-0", Log: w.said.Logger(slog.LevelInfo)})
	if _, err := counts.Claim(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	sent := w.fill(0)
	w.read("a-0", uint64(sent))
	if first := w.keep(); first != 1 {
		t.Errorf("the first message is %d, and none is counted", first)
	}
	store := counts.Keep()
	counts.Do(func(b *tally.Book) { b.Saw(3, "as-1", 1, "") })
	counts.Floor(3)
	store()
	if first := w.keep(); first != 4 {
		t.Errorf("the first message is %d, and 3 are counted", first)
	}
	w.Keeper.settle = 0
	if first := w.keep(); first <= 4 {
		t.Errorf("the first message is %d after a long time", first)
	}
}

// TestWhatIsReadAgainStays, although all lanes have finished it and the stream is full; not for a lane that is gone.
func TestWhatIsReadAgainStays(t *testing.T) {
	w := newWorld(t, "a")
	s := w.stream("LOGS")
	s.again = &again{seen: map[string]seenTally{}} // as SPANS
	open := func(lane string, from uint64) *tally.Lane {
		counts := tally.Open(tally.Config{Conn: func() *bus.Conn { return w.conn }, Replicas: 1, Stream: "LOGS", Lane: lane, Log: w.said.Logger(slog.LevelInfo)})
		if _, err := counts.Claim(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		counts.Again(t.Context(), from)
		return counts
	}
	counts := open("a-0", 3)
	open("b-0", 1)
	w.read("a-0", uint64(w.fill(0)))
	if first := w.keep(); first != 3 {
		t.Errorf("the first message is %d, and 3 is read again", first)
	}
	store := counts.Keep()
	counts.Again(t.Context(), 5) // less is held: it is stored in a moment
	store()
	if first := w.keep(); first != 5 {
		t.Errorf("the first message is %d, and 5 is read again", first)
	}
	none := open("a-0", 0)
	none.Keep()()
	s.again.denied = time.Now().Add(time.Hour)
	if first := w.keep(); first <= 5 {
		t.Errorf("the first message is %d, and nothing is read again", first)
	}
}

// TestATallyThatIsNotStored any more, while its lane goes on, holds nothing for ever.
func TestATallyThatIsNotStored(t *testing.T) {
	w := newWorld(t, "a")
	s := w.stream("LOGS")
	s.again = &again{seen: map[string]seenTally{}}
	counts := tally.Open(tally.Config{Conn: func() *bus.Conn { return w.conn }, Replicas: 1, Stream: "LOGS", Lane: "a-0", Log: w.said.Logger(slog.LevelInfo)})
	if _, err := counts.Claim(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	counts.Again(t.Context(), 3)
	w.read("a-0", uint64(w.fill(0)))
	for _, step := range []struct {
		seen  seenTally
		first bool
	}{{seenTally{0, time.Now()}, false}, {seenTally{1, time.Now().Add(-2 * againPause)}, false}, {seenTally{0, time.Now().Add(-2 * againPause)}, true}} {
		s.again.seen["a-0"] = step.seen
		if first := w.keep(); first > 3 != step.first {
			t.Errorf("%+v: the first message is %d", step.seen, first)
		}
	}
}
