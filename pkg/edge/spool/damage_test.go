package spool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/edge/edgetest"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/wal"
)

const perDamageTest = 16

// TestDamagedFiles damages a spool in every way that disks do, and opens it: what is
// undamaged is read, in order, and what is damaged is counted and kept aside.
func TestDamagedFiles(t *testing.T) {
	segments := func(t *testing.T, dir string) []string {
		t.Helper()
		all := segmentFiles(t, dir)
		if len(all) < 3 {
			t.Fatalf("%v: the test wants several segments", all)
		}
		return all
	}
	last := func(t *testing.T, dir string) string { return segments(t, dir)[len(segments(t, dir))-1] }
	edit := func(t *testing.T, path string, do func([]byte) []byte) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(path, do(b), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, tc := range map[string]struct {
		damage func(t *testing.T, dir string)
		// lost is how many messages may be lost at most, and whether one must be.
		lost  int
		must  bool
		aside bool
	}{
		"nothing":          {func(*testing.T, string) {}, 0, false, false},
		"bit flip":         {func(t *testing.T, dir string) { edit(t, segments(t, dir)[0], flip(1000)) }, 1, true, true},
		"bit in a length":  {func(t *testing.T, dir string) { edit(t, segments(t, dir)[0], flip(25)) }, 1, true, true},
		"bit in a header":  {func(t *testing.T, dir string) { edit(t, segments(t, dir)[1], flip(1)) }, 0, false, true},
		"flip in youngest": {func(t *testing.T, dir string) { edit(t, last(t, dir), flip(1000)) }, 1, true, true},
		"zero page": {func(t *testing.T, dir string) {
			edit(t, segments(t, dir)[0], func(b []byte) []byte { clear(b[8192:12288]); return b })
		}, 1, true, true},
		"segment truncated": {func(t *testing.T, dir string) {
			edit(t, segments(t, dir)[0], func(b []byte) []byte { return b[:len(b)-10] })
		}, 1, true, true},
		"tail torn": {func(t *testing.T, dir string) {
			edit(t, last(t, dir), func(b []byte) []byte { return b[:len(b)-10] })
		}, 1, true, true},
		"garbage behind the tail": {func(t *testing.T, dir string) {
			edit(t, last(t, dir), func(b []byte) []byte { return append(b, "garbage that is no record"...) })
		}, 0, false, true},
		"segment deleted": {func(t *testing.T, dir string) {
			if err := os.Remove(segments(t, dir)[1]); err != nil {
				t.Fatal(err)
			}
		}, 2, true, false},
		"first segment deleted": {func(t *testing.T, dir string) {
			if err := os.Remove(segments(t, dir)[0]); err != nil {
				t.Fatal(err)
			}
		}, 2, true, false},
		"last segment deleted": {func(t *testing.T, dir string) {
			if err := os.Remove(last(t, dir)); err != nil {
				t.Fatal(err)
			}
		}, 2, true, false},
		"marks garbage": {func(t *testing.T, dir string) { edit(t, filepath.Join(dir, "marks"), flip(0)) }, 0, false, false},
		"epoch garbage": {func(t *testing.T, dir string) { edit(t, filepath.Join(dir, "epoch"), flip(0)) }, 0, false, false},
		"two bits": {func(t *testing.T, dir string) {
			edit(t, segments(t, dir)[0], flip(1000))
			edit(t, segments(t, dir)[1], flip(1000))
		}, 2, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t, t.TempDir())
			cfg.MaxBytes, cfg.Durability = 48<<20, "os"
			s, stop := startSpool(t, cfg)
			for i := range perDamageTest {
				if err := s.Accept(t.Context(), edgetest.Log(t, i, 600<<10)); err != nil {
					t.Fatal(err)
				}
			}
			s.watch()
			before := s.current.Load().Nonce()
			stop()
			tc.damage(t, cfg.Dir)

			s, stop = startSpool(t, cfg)
			got := numbers(t, s)
			if lost := perDamageTest - len(got); lost < 0 || lost > tc.lost || (tc.must && lost == 0) {
				t.Errorf("%d messages are gone, want up to %d", lost, tc.lost)
			}
			if !slices.IsSorted(got) {
				t.Errorf("out of order: %v", got)
			}
			if n := int(testutil.ToFloat64(s.led.SpoolLost(otlpwire.Logs))); n != perDamageTest-len(got) && name != "marks garbage" {
				t.Errorf("%d reported as lost, %d are", n, perDamageTest-len(got))
			}
			aside, _ := filepath.Glob(filepath.Join(cfg.Dir, damagedDir, "logs@*"))
			if (len(aside) > 0) != tc.aside {
				t.Errorf("put aside: %v, want some: %v", aside, tc.aside)
			}
			if s.current.Load().logs[otlpwire.Logs].State().Last < perDamageTest && s.current.Load().Nonce() == before {
				t.Error("sequences are given again, under the same ids")
			}
			// The spool continues, and the next start finds no damage.
			if err := s.Accept(t.Context(), edgetest.Log(t, 99, 10)); err != nil {
				t.Fatal(err)
			}
			stop()
			s, _ = startSpool(t, cfg)
			if again := numbers(t, s); len(again) != len(got)+1 || again[len(again)-1] != 99 {
				t.Errorf("after another start: %v", again)
			}
			if n := testutil.ToFloat64(s.led.SpoolLost(otlpwire.Logs)); n != 0 {
				t.Errorf("after another start: %v reported as lost", n)
			}
		})
	}
}

func flip(at int) func([]byte) []byte {
	return func(b []byte) []byte { b[at] ^= 0x10; return b }
}

// TestDamageToWhatTheHubHas: only what the hub does not have counts as lost.
func TestDamageToWhatTheHubHas(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	s, stop := startSpool(t, cfg)
	accept(t, s, 0, 10)
	s.positions.advance(Hub, otlpwire.Logs, 4, 77)
	stop()
	spoil(t, cfg.Dir, 2, 3, 4, 6) // the hub has the first two of them
	s, _ = startSpool(t, cfg)
	if got := numbers(t, s); !slices.Equal(got, []int{0, 1, 5, 7, 8, 9}) {
		t.Errorf("the spool holds %v", got)
	}
	if lost := testutil.ToFloat64(s.led.SpoolLost(otlpwire.Logs)); lost != 2 {
		t.Errorf("%v reported as lost, want 2", lost)
	}
	if m := s.positions.get(Hub, otlpwire.Logs); m != (Position{Done: 4, Hub: 77}) {
		t.Errorf("the mark is %+v", m)
	}
}

// TestMendingThatFails: a log that cannot be repaired is read as it is, nothing is accepted,
// and the spool continues when the repair succeeds.
func TestMendingThatFails(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	s, stop := startSpool(t, cfg)
	accept(t, s, 0, 5)
	stop()
	spoil(t, cfg.Dir, 2)
	obstacle := filepath.Join(cfg.Dir, damagedDir) // where a directory should be
	if err := os.WriteFile(obstacle, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s, _ = startSpool(t, cfg)
	if err := s.Accept(t.Context(), edgetest.Log(t, 5, 10)); !errors.Is(err, errClosed) {
		t.Errorf("accepted: %v", err)
	}
	s.watch()
	if testutil.ToFloat64(s.led.SpoolWritable) != 0 {
		t.Error("said to be writable")
	}
	if got := numbers(t, s); !slices.Equal(got, []int{0, 1, 3, 4}) {
		t.Errorf("read %v", got)
	}
	if err := os.Remove(obstacle); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if !backoff.Until(ctx, func() bool { return s.Accept(ctx, edgetest.Log(t, 5, 10)) == nil }) {
		t.Fatal("nothing is taken, though it can be mended")
	}
	if got := numbers(t, s); !slices.Equal(got, []int{0, 1, 3, 4, 5}) {
		t.Errorf("afterwards %v", got)
	}
}

// TestSequencesGoOn: if the files with what the hub has are deleted, its sequences are not
// given again.
func TestSequencesGoOn(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	s, stop := startSpool(t, cfg)
	accept(t, s, 0, 3)
	s.positions.advance(Hub, otlpwire.Logs, 3, 0)
	nonce := s.current.Load().Nonce()
	stop()
	if err := os.Remove(filepath.Join(cfg.Dir, "logs", "00000000000000000001.seg")); err != nil {
		t.Fatal(err)
	}
	s, _ = startSpool(t, cfg)
	accept(t, s, 3, 4)
	if last := s.current.Load().logs[otlpwire.Logs].State().Last; last != 4 || s.current.Load().Nonce() != nonce {
		t.Errorf("the fourth message has sequence %d", last)
	}
	if n := testutil.ToFloat64(s.led.SpoolLost(otlpwire.Logs)); n != 0 {
		t.Errorf("%v reported as lost", n)
	}
}

// TestOnlyWhatIsOwedIsLost: neither what the hub has and the disk has lost counts as lost, nor
// what was released before everything had to be sent to the hub again.
func TestOnlyWhatIsOwedIsLost(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	s, stop := startSpool(t, cfg)
	accept(t, s, 0, 5)
	s.positions.advance(Hub, otlpwire.Logs, 5, 9)
	s.positions.advance("local-file", otlpwire.Logs, 5, 0)
	stop()
	spoil(t, cfg.Dir, 4)
	s, stop = startSpool(t, cfg)
	if n := testutil.ToFloat64(s.led.SpoolLost(otlpwire.Logs)); n != 0 {
		t.Errorf("%v reported as lost, and the hub has all", n)
	}
	if m := s.positions.get("local-file", otlpwire.Logs); m.Done != 5 {
		t.Errorf("a local backend has had 5 messages, its mark is %+v", m)
	}
	st := s.current.Load()
	for n := 5; len(segmentFiles(t, cfg.Dir)) < 3; n++ {
		if err := s.Accept(t.Context(), edgetest.Log(t, n, 400<<10)); err != nil {
			t.Fatal(err)
		}
	}
	last := st.logs[otlpwire.Logs].State().Last
	s.positions.advance(Hub, otlpwire.Logs, last-1, 99)
	if err := st.logs[otlpwire.Logs].Release(last - 1); err != nil {
		t.Fatal(err)
	}
	s.Rewind(st, otlpwire.Logs)
	stop()
	s, _ = startSpool(t, cfg)
	if n := testutil.ToFloat64(s.led.SpoolLost(otlpwire.Logs)); n != 0 {
		t.Errorf("%v reported as lost, and they were released", n)
	}
}

// spoil changes records of a spool's first file that is closed.
func spoil(t *testing.T, dir string, records ...int) {
	t.Helper()
	path := segmentFiles(t, dir)[0]
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range records {
		at := bytes.Index(b, fmt.Appendf(nil, "n=%d ", n))
		if at < 0 {
			t.Fatalf("no record %d in %s", n, path)
		}
		b[at] ^= 1
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func segmentFiles(t *testing.T, dir string) []string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, "logs", "*.seg"))
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestForeignRecords: records that no edge has written are not sent.
func TestForeignRecords(t *testing.T) {
	for _, body := range []string{"", "short", "\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x09encoding 9"} {
		if m := parse(wal.Record{Seq: 7, Body: []byte(body)}); m.Missing != 1 || m.Body != nil {
			t.Errorf("%q: %+v", body, m)
		}
	}
	cut := "\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x80\x05" // a load without an end
	if m := parse(wal.Record{Seq: 7, Body: []byte(cut)}); m.Missing != 1 || m.Body != nil {
		t.Errorf("%+v", m)
	}
	for _, h := range []envelope.Header{
		{ContentType: envelope.ContentTypeOTLP, Items: 3, Arrival: 5},
		{ContentType: envelope.ContentTypeOTLP, Items: 3, Arrival: 5, Encoding: envelope.Zstd, Load: envelope.Load{1, 2, 3, 4e9}},
	} {
		if m := parse(wal.Record{Body: append(appendHead(nil, h), "body"...)}); m.Header != h || string(m.Body) != "body" || m.Missing != 0 {
			t.Errorf("%+v, want %+v", m, h)
		}
	}
}
