package versions

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/domain"
	"github.com/penstock/penstock/pkg/sampling/policy"
)

// named is a configuration with one domain, of all instances whose names begin with x.
func named(name string) domain.Config {
	return domain.Config{{Name: name, Instances: []string{"x*"}}}
}

// testSink is a sink that watches the hub until it is stopped, or the test ends.
type testSink struct {
	*Versions
	led  *ledger.Ledger
	said logtest.Log
	stop func()
}

func startSink(t *testing.T, c *bus.Conn, name string, own domain.Config) *testSink {
	t.Helper()
	s := &testSink{led: ledger.New(prometheus.NewRegistry())}
	v, err := New(DefaultConfig(), own, 1, s.led, s.said.Logger(slog.LevelInfo))
	if err != nil {
		t.Fatal(err)
	}
	s.Versions = v
	ctx, cancel := context.WithCancel(t.Context())
	var watch sync.WaitGroup
	watch.Go(func() { v.Watch(ctx, &bus.Hub{Conn: c, Topology: bus.DefaultTopology()}, name) })
	s.stop = func() { cancel(); watch.Wait() }
	t.Cleanup(s.stop)
	if !v.Await(t.Context()) {
		t.Fatal("the versions are not known")
	}
	return s
}

// in waits until a sink knows n versions of the domains, and returns in which an instance x is, from the last one on.
func (s *testSink) in(t *testing.T, n int) (now string, before []string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d versions of the domains", n), func() bool { return len(s.Domains()) == n })
	return s.Domains().Of("x", 1<<40)
}

func (s *testSink) refusals() float64 { return testutil.ToFloat64(s.led.PoliciesRefused) }

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if !backoff.Until(ctx, is) {
		t.Fatalf("not within 20 s: %s", what)
	}
}

// keys returns the keys of the domains in the hub.
func keys(t *testing.T, c *bus.Conn) (all []string) {
	t.Helper()
	for _, key := range slices.Sorted(maps.Keys(contents(t, c))) {
		if strings.HasPrefix(key, domainsKey) {
			all = append(all, key)
		}
	}
	return all
}

func contents(t *testing.T, c *bus.Conn) map[string][]byte {
	t.Helper()
	all, err := testBucket(t, c).All(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func testBucket(t *testing.T, c *bus.Conn) *bus.Bucket {
	t.Helper()
	b, err := c.OpenBucket(t.Context(), Bucket, 1)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func put(t *testing.T, c *bus.Conn, key, value string) {
	t.Helper()
	if err := testBucket(t, c).Put(t.Context(), key, []byte(value)); err != nil {
		t.Fatal(err)
	}
}

// fill adds messages to SPANS and TRACES, so that the next of them has the given sequence.
func fill(t *testing.T, c *bus.Conn, spans, traces uint64) {
	t.Helper()
	for _, one := range []struct {
		subject, kind string
		next          uint64
	}{
		{bus.SpansSubject(0), envelope.ContentTypeFrames, spans},
		{bus.Subject(otlpwire.Traces, "x"), envelope.ContentTypeOTLP, traces},
	} {
		for seq := uint64(0); seq+1 < one.next; {
			var err error
			if seq, err = c.Publish(t.Context(), bus.Message{Subject: one.subject, Header: envelope.Header{ContentType: one.kind}}); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestDomainsOfASink are the next version when it starts, if they are others than those of the hub.
func TestDomainsOfASink(t *testing.T) {
	t.Parallel()
	c := testHub(t)
	fill(t, c, 5, 3)
	follows := startSink(t, c, "follows", nil)
	_, changes := follows.All()
	a := startSink(t, c, "a", named("acme"))
	for _, s := range []*testSink{a, follows} {
		if now, before := s.in(t, 1); now != "@acme" || !slices.Equal(before, []string{"x"}) {
			t.Errorf("x is in %s, before %v", now, before)
		}
		if v := s.Domains()[0]; v.Number != 1 || v.From != 3 {
			t.Errorf("version %d from %d", v.Number, v.From)
		}
		if now, _ := s.Domains().Of("x", 2); now != "x" {
			t.Errorf("before its sequence x is in %s", now)
		}
		if !s.said.Says("INFO", "new domains", "version=1", "from=3", "by=a") || s.refusals() != 0 {
			t.Errorf("it says %s", s.said.String())
		}
	}
	if _, now := follows.All(); now != changes+1 {
		t.Errorf("%d changes, want %d", now, changes+1)
	}
	a.stop()

	if now, _ := startSink(t, c, "new", nil).in(t, 1); now != "@acme" {
		t.Errorf("a sink that starts later has x in %s", now)
	}
	startSink(t, c, "same", named("acme")).in(t, 1) // it proposes nothing, as the next versions show
	fill(t, c, 9, 6)
	startSink(t, c, "b", named("bank")).in(t, 2)
	startSink(t, c, "empty", domain.Config{}).in(t, 3)
	if now, before := follows.in(t, 3); now != "x" || !slices.Equal(before, []string{"@acme", "@bank"}) {
		t.Errorf("x is in %s, before %v", now, before)
	}
	if v := follows.Domains()[1]; v.Number != 2 || v.From != 6 {
		t.Errorf("version %d from %d", v.Number, v.From)
	}
	if got := keys(t, c); !slices.Equal(got, []string{"domains.1", "domains.2", "domains.3"}) {
		t.Errorf("the hub has %v", got)
	}
}

// TestAnEmptyListIsNoVersion where the hub has none: there is nothing to dissolve.
func TestAnEmptyListIsNoVersion(t *testing.T) {
	t.Parallel()
	c := testHub(t)
	hub := &bus.Hub{Conn: c, Topology: bus.DefaultTopology()}
	if err := propose(t.Context(), hub, domain.Config{}, "me"); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, c); got != nil {
		t.Errorf("the hub has %v", got)
	}
}

// TestSinksWithDifferentDomains: the last one that starts counts, the other warns and does not push its own again.
func TestSinksWithDifferentDomains(t *testing.T) {
	t.Parallel()
	c := testHub(t)
	a := startSink(t, c, "sink-a", named("acme"))
	a.in(t, 1)
	b := startSink(t, c, "sink-b", named("bank"))
	third := startSink(t, c, "sink-c", nil)
	for _, s := range []*testSink{a, b, third} {
		if now, _ := s.in(t, 2); now != "@bank" {
			t.Errorf("x is in %s", now)
		}
	}
	const warning = "another sink has other domains"
	if !a.said.Says("WARN", warning, "member=sink-b") {
		t.Errorf("sink-a says %s", a.said.String())
	}
	startSink(t, c, "sink-d", named("corp")).in(t, 3)
	a.in(t, 3)
	b.in(t, 3)
	if n := strings.Count(a.said.String(), warning); n != 1 {
		t.Errorf("sink-a warns %d times: %s", n, a.said.String())
	}
	if !b.said.Says("WARN", warning, "member=sink-d") || strings.Contains(third.said.String(), warning) {
		t.Errorf("sink-b says %s, sink-c %s", b.said.String(), third.said.String())
	}
	if _, err := Push(t.Context(), c, bus.DefaultTopology(), "policies: [{name: all, type: always_sample}]", "me", func(err error) { t.Error(err) }); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*testSink{a, b} { // they have seen everything, and had time to answer it
		eventually(t, "the policies", func() bool { all, _ := s.All(); return len(all) == 1 })
		s.stop()
	}
	if got := keys(t, c); len(got) != 3 {
		t.Errorf("the hub has %v", got)
	}
}

// TestProposalsAtTheSameTime: equal ones are one version, different ones a version each.
func TestProposalsAtTheSameTime(t *testing.T) {
	t.Parallel()
	const sinks = 8
	for _, different := range []bool{false, true} {
		c := testHub(t)
		hub := &bus.Hub{Conn: c, Topology: bus.DefaultTopology()}
		var all sync.WaitGroup
		for i := range sinks {
			own := named("acme")
			if different {
				own = named(fmt.Sprint("d", i))
			}
			all.Go(func() {
				if err := propose(t.Context(), hub, own, fmt.Sprint("sink-", i)); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		versions, err := AllDomains(t.Context(), c, hub.Topology, func(err error) { t.Error(err) })
		if err != nil {
			t.Fatal(err)
		}
		want := 1
		if different {
			want = sinks
		}
		_, before := versions.Of("x", 1)
		if len(versions) != want || len(before) != want || versions[want-1].Number != uint64(want) {
			t.Errorf("%d versions, before the last %v; want %d", len(versions), before, want)
		}
	}
}

// TestOldVersionsAreDeleted of each kind, but never version 0 of the policies.
func TestOldVersionsAreDeleted(t *testing.T) {
	t.Parallel()
	c := testHub(t)
	hub := &bus.Hub{Conn: c, Topology: bus.DefaultTopology()}
	if err := publish(t.Context(), hub, "", policy.Settings{}, "me"); err != nil {
		t.Fatal(err)
	}
	for i := range maxKept + 3 {
		if _, err := Push(t.Context(), c, hub.Topology, "policies: []", "me", func(err error) { t.Error(err) }); err != nil {
			t.Fatal(err)
		}
		if err := propose(t.Context(), hub, named(fmt.Sprint("d", i)), "me"); err != nil {
			t.Fatal(err)
		}
	}
	all, err := AllDomains(t.Context(), c, hub.Topology, func(err error) { t.Error(err) })
	if err != nil || len(all) != maxKept || all[0].Number != 4 || all[maxKept-1].Number != maxKept+3 {
		t.Errorf("%d versions of the domains, %v", len(all), err)
	}
	policies, err := All(t.Context(), c, hub.Topology, func(err error) { t.Error(err) })
	if err != nil || len(policies) != 1+maxKept || policies[0].Number != 0 || policies[1].Number != 4 {
		t.Errorf("policies are %+v, %v", policies, err)
	}
}

// TestDomainsThatAreNoVersion are refused, and the previous ones stay in force. Their numbers are not used again.
func TestDomainsThatAreNoVersion(t *testing.T) {
	t.Parallel()
	c := testHub(t)
	put(t, c, "domains.1", "not JSON")
	s := startSink(t, c, "me", named("acme"))
	if now, _ := s.in(t, 1); now != "@acme" || s.refusals() != 1 || !s.said.Says("ERROR", "domains", "domains.1", "cannot be read") {
		t.Errorf("x is in %s, %v are refused, it says %s", now, s.refusals(), s.said.String())
	}
	if got := keys(t, c); !slices.Equal(got, []string{"domains.1", "domains.2"}) {
		t.Errorf("the hub has %v", got)
	}
	pushed := string(contents(t, c)["domains.2"])
	put(t, c, "domains.3", strings.Replace(pushed, `"acme"`, `"no name"`, 1))
	eventually(t, "invalid domains are refused", func() bool { return s.refusals() == 2 })
	if !s.said.Says("ERROR", "domains.3", "domains[0].name", "no name") {
		t.Errorf("it says %s", s.said.String())
	}
	put(t, c, "domains.2", strings.Replace(pushed, "acme", "other", 1))
	eventually(t, "a version that was overwritten is refused", func() bool { return s.refusals() == 3 })
	if now, _ := s.in(t, 1); now != "@acme" || !s.said.Says("ERROR", "domains version 2", "overwritten") {
		t.Errorf("x is in %s, it says %s", now, s.said.String())
	}
}

// TestRecords has what is a version, and what is not.
func TestRecords(t *testing.T) {
	const head = `{"from":1,"at":"2026-01-31T08:00:00Z"`
	for _, tc := range []struct {
		key, value string
		number     uint64
		fails      string
	}{
		{"1", head + `,"text":"policies: []"}`, 1, ""},
		{"0", `{"at":"2026-01-31T08:00:00Z"}`, 0, ""},
		{"domains.1", head + `,"domains":[{"name":"a","instances":["x"]}]}`, 1, ""},
		{"domains.2", head + `,"domains":[]}`, 2, ""},
		{"domains.2", head + `}`, 2, `domains "domains.2"`},
		{"domains.2", head + `,"domains":null}`, 2, "not written by penstock"},
		{"domains.2", head + `,"text":"policies: []"}`, 2, "not written by penstock"},
		{"domains.2", head + `,"text":"policies: []","domains":[]}`, 2, "not written by penstock"},
		{"domains.2", `{"at":"2026-01-31T08:00:00Z","domains":[]}`, 2, "not written by penstock"},
		{"domains.2", `{"from":1,"domains":[]}`, 2, "not written by penstock"},
		{"domains.2", head + `,"domains":[{"name":"a"}]}`, 2, "domains[0].instances"},
		{"domains.0", head + `,"domains":[]}`, 0, "not written by penstock"},
		{"domains.02", head + `,"domains":[]}`, 2, "not written by penstock"},
		{"domains.x", head + `,"domains":[]}`, 0, "invalid syntax"},
		{"domains.99999999999999999999", head + `,"domains":[]}`, 0, "out of range"},
		{"2", head + `,"domains":[]}`, 2, `policies "2"`},
		{"2", head + `,"text":"policies: []","domains":[]}`, 2, "not written by penstock"},
		{"02", head + `,"text":"policies: []"}`, 2, "not written by penstock"},
		{"2", head + `}`, 2, "not written by penstock"},
	} {
		r, err := parse(tc.key, []byte(tc.value))
		if r.Number != tc.number || (err == nil) != (tc.fails == "") || err != nil && !strings.Contains(err.Error(), tc.fails) {
			t.Errorf("%s, %s: number %d, %v; want %d, %q", tc.key, tc.value, r.Number, err, tc.number, tc.fails)
		}
	}
	text, err := json.Marshal(Record{From: 1, By: "me", Domains: named("acme")})
	const want = `{"from":1,"spans":"0001-01-01T00:00:00Z","traces":0,"at":"0001-01-01T00:00:00Z","by":"me","domains":[{"name":"acme","instances":["x*"]}]}`
	if string(text) != want {
		t.Errorf("written as %s, %v, want %s", text, err, want)
	}
}

// TestVersionsInOtherStreams: a version is in force from the start in streams that were created after it.
func TestVersionsInOtherStreams(t *testing.T) {
	at := time.Unix(1000, 0)
	for _, tc := range []struct {
		name         string
		spans        time.Time
		traces       time.Time
		from, replay uint64
	}{
		{"the same", at, at, 7, 5},
		{"SPANS was created again", at.Add(time.Hour), at, 0, 5},
		{"TRACES was created again", at, at.Add(time.Hour), 7, 0},
	} {
		s := states{spans: bus.StreamState{Created: tc.spans, ByTrace: true}, traces: bus.StreamState{Created: tc.traces}}
		r := Record{Number: 1, From: 7, Traces: 5, Spans: at, At: at.Add(time.Minute), Domains: named("acme")}
		if err := s.place(&r); err != nil || r.From != tc.from || r.Traces != tc.replay {
			t.Errorf("%s: from %d of SPANS and %d of TRACES, %v", tc.name, r.From, r.Traces, err)
		}
	}
}

// TestSpansByInstance: where SPANS has the spans of each instance in partitions of its own, no domains are in force,
// whether the hub has them or the sink.
func TestSpansByInstance(t *testing.T) {
	t.Parallel()
	c, b := testHubOf(t)
	hub := &bus.Hub{Conn: c, Topology: bus.DefaultTopology()}
	if err := propose(t.Context(), hub, named("acme"), "me"); err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect("", nats.InProcessServer(b))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), bus.Spans)
	if err != nil {
		t.Fatal(err)
	}
	cfg := stream.CachedInfo().Config
	cfg.Metadata = nil // as an earlier version creates it
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	s := startSink(t, c, "me", named("other"))
	eventually(t, "both are refused", func() bool { return s.refusals() == 2 })
	s.stop()
	for _, version := range []string{"domains version 1", "domains version 2"} {
		if !s.said.Says("ERROR", version, "docs/upgrading.md") {
			t.Errorf("nothing of %s in %s", version, s.said.String())
		}
	}
	var refused []error
	all, err := AllDomains(t.Context(), c, hub.Topology, func(err error) { refused = append(refused, err) })
	if err != nil || len(all) != 0 || len(refused) != 1 {
		t.Errorf("%v, refused %v, %v", all, refused, err)
	}
	if now, _ := s.in(t, 0); now != "x" || len(keys(t, c)) != 1 {
		t.Errorf("x is in %s, the hub has %v", now, keys(t, c))
	}
}

// TestReplayedDomains are in force from sequences of TRACES on, whatever policies a job has.
func TestReplayedDomains(t *testing.T) {
	t.Parallel()
	c := testHub(t)
	fill(t, c, 9, 3)
	startSink(t, c, "a", named("acme")).in(t, 1)
	fill(t, c, 9, 6)
	startSink(t, c, "b", named("bank")).in(t, 2)
	s := startSink(t, c, "c", nil)
	s.in(t, 2)
	all, err := AllDomains(t.Context(), c, bus.DefaultTopology(), func(err error) { t.Error(err) })
	if err != nil {
		t.Fatal(err)
	}
	replays := map[string]domain.Versions{"AllDomains": all}
	for _, text := range []string{"", "policies: [{name: all, type: always_sample}]"} {
		if alone, err := s.Replayed(text, true); err != nil || len(alone.Domains()) != 0 {
			t.Errorf("alone it has %v, %v", alone.Domains(), err)
		}
		past, err := s.Replayed(text, false)
		if err != nil || !past.Await(t.Context()) {
			t.Fatal(err)
		}
		replays["Replayed "+text] = past.Domains()
	}
	for name, v := range replays {
		for seq, want := range map[uint64]string{2: "x", 3: "@acme", 5: "@acme", 6: "@bank"} {
			if now, _ := v.Of("x", seq); now != want {
				t.Errorf("%s: at %d x is in %s, want %s", name, seq, now, want)
			}
		}
	}
}
