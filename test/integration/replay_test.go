package integration

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	logspb "go.opentelemetry.io/proto/otlp/logs/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sink"
	"github.com/penstock/penstock/test/backend/loki"
	"github.com/penstock/penstock/test/backend/tempo"
)

// pastItem is one item of the simulated hour.
type pastItem struct {
	instance string
	arrival  time.Time
	trace    uint64 // of spans
}

// past is a simulated hour of two instances, as their edges would have sent it.
type past struct {
	base                time.Time
	messages            []bus.Message
	spans, points, logs map[uint64]pastItem // by number
}

const (
	pastTick  = 2 * time.Second // a message of traces
	pastTicks = 1800            // an hour
)

func resourceOf(instance string) *resourcepb.Resource {
	return &resourcepb.Resource{Attributes: []*commonpb.KeyValue{
		{Key: "service.name", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: "shop"}}},
		{Key: "instance.id", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: instance}}},
	}}
}

// newPast makes the hour, with half a minute of silence in the middle: 57 spans each tick, in traces of up to four that take up to
// eight seconds; ten points and twenty records every fifth tick.
func newPast(t testing.TB, instances ...string) *past {
	t.Helper()
	p := &past{base: time.Now().Add(-62 * time.Minute).Truncate(time.Second), spans: map[uint64]pastItem{}, points: map[uint64]pastItem{}, logs: map[uint64]pastItem{}}
	rng := rand.New(rand.NewPCG(9, 9))
	number := uint64(0)
	open := map[string][]uint64{} // traces of the last four ticks
	for tick := range pastTicks {
		if tick >= pastTicks/2-15 && tick < pastTicks/2 {
			clear(open) // no trace spans the silence
			continue
		}
		at := p.base.Add(time.Duration(tick) * pastTick)
		nano := uint64(at.UnixNano())
		for _, instance := range instances {
			add := func(sig otlpwire.Signal, items int, m proto.Message) {
				body, err := proto.Marshal(m)
				if err != nil {
					t.Fatal(err)
				}
				msg := bus.Message{Subject: bus.Subject(sig, instance), Header: envelope.Header{
					ContentType: envelope.ContentTypeOTLP, Items: items, Arrival: at.UnixNano(), ID: fmt.Sprintf("%s-%v-%d", instance, sig, tick),
				}}
				msg.Body, msg.Header.Encoding = envelope.Compress(nil, body, envelope.S2)
				p.messages = append(p.messages, msg)
			}
			item := pastItem{instance: instance, arrival: at}
			var spans []*tracepb.Span
			for range 57 {
				number++
				recent := open[instance]
				if len(recent) == 0 || rng.IntN(3) == 0 {
					recent = append(recent, number)
				}
				item.trace = recent[len(recent)-1-rng.IntN(min(len(recent), 80))]
				open[instance] = recent[max(0, len(recent)-80):]
				id := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, item.trace*0x9e3779b97f4a7c15), item.trace)
				sp := &tracepb.Span{TraceId: id, SpanId: binary.BigEndian.AppendUint64(nil, number), Name: "op", StartTimeUnixNano: nano, EndTimeUnixNano: nano + 1e6}
				if rng.IntN(40) == 0 {
					sp.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR}
				}
				p.spans[number] = item
				spans = append(spans, sp)
			}
			add(otlpwire.Traces, len(spans), &tracepb.TracesData{ResourceSpans: []*tracepb.ResourceSpans{{Resource: resourceOf(instance), ScopeSpans: []*tracepb.ScopeSpans{{Spans: spans}}}}})
			if tick%5 != 0 {
				continue
			}
			var points []*metricspb.NumberDataPoint
			for i := range 10 {
				number++
				p.points[number] = item
				points = append(points, &metricspb.NumberDataPoint{TimeUnixNano: nano, Value: &metricspb.NumberDataPoint_AsInt{AsInt: int64(number)}, Attributes: []*commonpb.KeyValue{
					{Key: "series", Value: &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: int64(i)}}},
				}})
			}
			add(otlpwire.Metrics, len(points), &metricspb.MetricsData{ResourceMetrics: []*metricspb.ResourceMetrics{{Resource: resourceOf(instance), ScopeMetrics: []*metricspb.ScopeMetrics{{Metrics: []*metricspb.Metric{{Name: "n", Data: &metricspb.Metric_Gauge{Gauge: &metricspb.Gauge{DataPoints: points}}}}}}}}})
			var records []*logspb.LogRecord
			for range 20 {
				number++
				p.logs[number] = item
				records = append(records, &logspb.LogRecord{TimeUnixNano: nano, Body: &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: fmt.Sprint(number)}}})
			}
			add(otlpwire.Logs, len(records), &logspb.LogsData{ResourceLogs: []*logspb.ResourceLogs{{Resource: resourceOf(instance), ScopeLogs: []*logspb.ScopeLogs{{LogRecords: records}}}}})
		}
	}
	return p
}

// send publishes the hour, in order.
func (p *past) send(t testing.TB, url string) {
	t.Helper()
	publish(t, url, p.messages)
}

// publish sends messages to the hub, in order.
func publish(t testing.TB, url string, messages []bus.Message) {
	t.Helper()
	log, _ := newLog(t)
	conn, err := bus.OpenHub(t.Context(), bus.Config{URL: url, Name: "past"}, bus.DefaultTopology(), log)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for window := range slices.Chunk(messages, 256) {
		var pending []bus.Pending
		for _, m := range window {
			pending = append(pending, conn.PublishAsync(m))
		}
		for i, one := range pending {
			err := one.Wait(t.Context())
			for again := 0; errors.Is(err, bus.ErrTimeout) && again < 20; again++ { // a busy machine; the id makes it the same message
				err = conn.PublishAsync(window[i]).Wait(t.Context())
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

// within returns the numbers of the items of an instance whose message arrived in a
// range; of spans, whose trace began in it.
func (p *past) within(of map[uint64]pastItem, instance string, from, to time.Time) map[uint64]bool {
	begins := map[uint64]time.Time{}
	for _, it := range of {
		if first, seen := begins[it.trace]; !seen || it.arrival.Before(first) {
			begins[it.trace] = it.arrival
		}
	}
	in := map[uint64]bool{}
	for n, it := range of {
		at := it.arrival
		if it.trace != 0 {
			at = begins[it.trace]
		}
		if it.instance == instance && !at.Before(from) && at.Before(to) {
			in[n] = true
		}
	}
	return in
}

// pastPolicies keep a part, by what the spans are and by budgets.
const pastPolicies = `
decision_wait: 10s
policies:
  - {name: errors, type: status_code, status_code: {status_codes: [ERROR]}}
  - {name: share, type: probabilistic, probabilistic: {sampling_percentage: 5}}
  - {name: few, type: rate_limiting, rate_limiting: {spans_per_second: 5}}
`

// spanBytes returns the spans of a Tempo by number, with their resource.
func spanBytes(t testing.TB, tmp *tempo.Server) map[uint64]string {
	t.Helper()
	found := map[uint64]string{}
	for _, s := range tmp.Spans() {
		r, err := proto.MarshalOptions{Deterministic: true}.Marshal(s.Resource)
		if err != nil {
			t.Fatal(err)
		}
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(s.Span)
		if err != nil {
			t.Fatal(err)
		}
		found[binary.BigEndian.Uint64(s.Span.GetSpanId())] = string(r) + string(b)
	}
	return found
}

// logNumbers returns the records of a Loki by number, and how many there are.
func logNumbers(l *loki.Server) (found map[uint64]bool, entries int) {
	found = map[uint64]bool{}
	for _, e := range l.Entries() {
		var n uint64
		_, _ = fmt.Sscan(e.Line, &n)
		found[n] = true
		entries++
	}
	return found, entries
}

// pointNumbers returns the points in a file of the file backend.
func pointNumbers(t testing.TB, dir string) map[uint64]bool {
	t.Helper()
	found := map[uint64]bool{}
	f, err := os.Open(filepath.Join(dir, "metrics.jsonl"))
	if err != nil {
		return found
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var line struct {
			ResourceMetrics []struct {
				ScopeMetrics []struct {
					Metrics []struct {
						Gauge struct {
							DataPoints []struct {
								AsInt json.Number `json:"asInt"`
							}
						}
					}
				}
			}
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatal(err)
		}
		for _, rm := range line.ResourceMetrics {
			for _, sm := range rm.ScopeMetrics {
				for _, m := range sm.Metrics {
					for _, p := range m.Gauge.DataPoints {
						n, err := p.AsInt.Int64()
						if err != nil {
							t.Fatal(err)
						}
						found[uint64(n)] = true
					}
				}
			}
		}
	}
	return found
}

// same fails unless two sets are equal.
func same(t testing.TB, what string, got, want map[uint64]bool) {
	t.Helper()
	if maps.Equal(got, want) {
		return
	}
	missing, phantom := 0, 0
	for n := range want {
		if !got[n] {
			missing++
		}
	}
	for n := range got {
		if !want[n] {
			phantom++
		}
	}
	t.Errorf("%s: %d found, want %d: %d are missing, %d should not be there", what, len(got), len(want), missing, phantom)
}

// onlyJob returns the job that there is, once there is one.
func onlyJob(t testing.TB, jobs *replay.Jobs) (s replay.Status) {
	t.Helper()
	eventually(t, 30*time.Second, "there is one job", func() error {
		table, err := jobs.Table(t.Context())
		if err != nil {
			return err
		}
		all := table.Jobs()
		if len(all) != 1 {
			return fmt.Errorf("%d jobs", len(all))
		}
		s = all[0]
		return nil
	})
	return s
}

// penstockReplay runs the command to its end.
func penstockReplay(t *testing.T, hub string, args ...string) (code int, out string) {
	t.Helper()
	p := run(t, nil, "penstock", append([]string{"replay"}, append(args, "-hub", hub)...)...)
	code = p.exit(t, 3*time.Minute)
	return code, p.out.String()
}

// sinceWhen is a line of a dry run that says since when the hub has an instance's logs.
var sinceWhen = regexp.MustCompile(`(?m)logs +as-1 .* 20\d\d-\d\d-\d\dT[0-9:]+Z *$`)

// TestReplay: two instances, more than 200,000 spans, metrics and logs over a simulated
// hour, live; then all backends are wiped, and 20 minutes of one instance replayed.
func TestReplay(t *testing.T) {
	t.Parallel()
	h := newPast(t, "as-1", "as-2")
	if len(h.spans) < 200_000 {
		t.Fatalf("%d spans only", len(h.spans))
	}
	liveTempo, liveLoki, liveDir := tempo.Start(t), loki.Start(t), t.TempDir()
	policies := writeFile(t, "policies.yaml", pastPolicies)
	p := startPipeline(t, func(c *sink.Config) {
		c.Tempo.Endpoint, c.Loki.URL, c.File.Dir, c.Sampling.File = liveTempo.Addr, liveLoki.URL, liveDir, policies
	})
	h.send(t, p.hub.url)
	settled := func(want int) {
		t.Helper()
		eventually(t, 2*time.Minute, "all is decided", func() error {
			out, in := count(t, otlpwire.Traces, "penstock_sampled_out_items_total", p.sink), count(t, otlpwire.Traces, "penstock_delivered_items_total", p.sink)
			m, l := count(t, otlpwire.Metrics, "penstock_delivered_items_total", p.sink), count(t, otlpwire.Logs, "penstock_delivered_items_total", p.sink)
			if in+out != want || m != len(h.points) || l != len(h.logs) {
				return fmt.Errorf("kept %d, sampled out %d of %d; %d of %d points, %d of %d records", in, out, want, m, len(h.points), l, len(h.logs))
			}
			return nil
		})
	}
	settled(len(h.spans))
	live := spanBytes(t, liveTempo)
	p.sink.stop()

	// Everything is lost.
	newTempo, newLoki, newDir := tempo.Start(t), loki.Start(t), t.TempDir()
	p.startSink(t, func(c *sink.Config) {
		c.Tempo.Endpoint, c.Loki.URL, c.File.Dir, c.Sampling.File = newTempo.Addr, newLoki.URL, newDir, policies
	})
	from, to := h.base.Add(20*time.Minute), h.base.Add(40*time.Minute)
	wanted := []string{"--from", from.Format(time.RFC3339), "--to", to.Format(time.RFC3339), "--instance", "as-1", "--rate", "0"}
	code, out := penstockReplay(t, p.hub.url, append(wanted, "--dry-run")...)
	if n := fmt.Sprint(len(h.within(h.logs, "as-1", from, to))); code != 0 || !strings.Contains(out, n) || strings.Contains(out, "as-2") || !sinceWhen.MatchString(out) {
		t.Errorf("dry run, %d, want %s records:\n%s", code, n, out)
	}
	if code, out = penstockReplay(t, p.hub.url, wanted...); code != 0 || !strings.Contains(out, " is done: ") {
		t.Fatalf("exit %d:\n%s", code, out)
	}
	again, got := map[uint64]bool{}, spanBytes(t, newTempo)
	for n, b := range got {
		again[n] = true
		if live[n] != b {
			t.Fatalf("span %d is another than the first time", n)
		}
	}
	kept := map[uint64]bool{}
	for n := range h.within(h.spans, "as-1", from, to) {
		if _, ok := live[n]; ok {
			kept[n] = true
		}
	}
	if len(kept) < 1000 || len(kept) > 30_000 {
		t.Errorf("%d spans of the range were kept: the policies decide nothing", len(kept))
	}
	same(t, "spans", again, kept)
	if n := len(newTempo.Spans()); n != len(kept) {
		t.Errorf("%d spans came, of %d", n, len(kept))
	}
	logs, entries := logNumbers(newLoki)
	same(t, "log records", logs, h.within(h.logs, "as-1", from, to))
	same(t, "data points", pointNumbers(t, newDir), h.within(h.points, "as-1", from, to))

	// The same request again files nothing and sends nothing.
	if code, out = penstockReplay(t, p.hub.url, wanted...); code != 0 || !strings.Contains(out, "exists already") {
		t.Errorf("exit %d:\n%s", code, out)
	}
	if _, n := logNumbers(newLoki); n != entries || len(newTempo.Spans()) != len(kept) {
		t.Errorf("the same job twice sent more: %d records, then %d", entries, n)
	}
	// Another one without sampling brings every span of the range, by their arrival.
	if code, out = penstockReplay(t, p.hub.url, append(wanted, "--signal", "traces", "--no-sampling")...); code != 0 {
		t.Fatalf("exit %d:\n%s", code, out)
	}
	every := map[uint64]bool{}
	for n, it := range h.spans {
		if it.instance == "as-1" && !it.arrival.Before(from) && it.arrival.Before(to) {
			every[n] = true
		}
	}
	all := map[uint64]bool{}
	for n := range spanBytes(t, newTempo) {
		all[n] = true
	}
	maps.Copy(every, kept) // those of the first job
	same(t, "spans without sampling", all, every)
	if n := count(t, otlpwire.Traces, "penstock_delivered_items_total", p.sink); n != 0 {
		t.Errorf("%d replayed spans count as delivered: the ledger is off", n)
	}

	code, out = penstockReplay(t, p.hub.url, "list")
	if code != 0 || strings.Count(out, " done ") != 2 {
		t.Errorf("list, %d:\n%s", code, out)
	}
	id := strings.Fields(strings.Split(out, "\n")[1])[0]
	if code, out = penstockReplay(t, p.hub.url, "status", id); code != 0 || strings.Count(out, "lane finished") != 3 {
		t.Errorf("status, %d:\n%s", code, out)
	}
	if code, out = penstockReplay(t, p.hub.url, "remove", id); code != 0 {
		t.Errorf("remove, %d:\n%s", code, out)
	}
	if code, out = penstockReplay(t, p.hub.url, "status", id); code != 1 || !strings.Contains(out, "there is no job") {
		t.Errorf("status of a removed job, %d:\n%s", code, out)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := bus.Dial(bus.Config{URL: p.hub.url, Name: "check"}, p.log)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, 10*time.Second, "nothing of the job is left", func() error {
		b, err := conn.OpenBucket(ctx, replay.Bucket, 1)
		if err != nil {
			return err
		}
		all, err := b.All(ctx)
		for key := range all {
			if strings.Contains(key, id) {
				err = fmt.Errorf("key %s", key)
			}
		}
		return err
	})
}
