// Command writers measures what the writers of sinks do with OTLP bytes, a core each, beside
// what the collector's exporters do with the same bytes:
//
//	metrics  remotewrite against contrib's FromMetricsV2, alone and with decoding and encoding
//	logs     the push API against otlphttp, which decodes and encodes (there is no translation
//	         to Loki in contrib any more)
//	traces   the same; penstock's writer sends the bytes as they are
//
// Nothing is sent. Rounds of both sides alternate, and the median counts.
package main

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/gogo/protobuf/proto"
	"github.com/golang/snappy"
	"github.com/open-telemetry/opentelemetry-collector-contrib/pkg/translator/prometheusremotewrite"
	writev2 "github.com/prometheus/prometheus/prompb/io/prometheus/write/v2"
	"go.opentelemetry.io/collector/pdata/plog/plogotlp"
	"go.opentelemetry.io/collector/pdata/pmetric"
	"go.opentelemetry.io/collector/pdata/pmetric/pmetricotlp"
	"go.opentelemetry.io/collector/pdata/ptrace/ptraceotlp"

	"github.com/penstock/penstock/bench/internal/load"
	"github.com/penstock/penstock/pkg/backend/loki"
	"github.com/penstock/penstock/pkg/backend/prometheus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

func main() {
	items := flag.Int("items", 1000, "metrics, records or spans a request")
	attrs := flag.Int("attrs", 5, "attributes an item")
	rounds := flag.Int("rounds", 9, "rounds; the median counts")
	round := flag.Duration("round", 300*time.Millisecond, "how long one side of a round takes")
	flag.Parse()

	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "%s, requests of %d items with %d attributes, one core\n\n", runtime.Version(), *items, *attrs)
	fmt.Fprintln(w, "side\titem\tCPU ns/item\titems/s\tallocs/item\tpenstock is\t")
	runtime.GOMAXPROCS(1)
	for _, g := range groups(*items, *attrs) {
		results := make([][]result, len(g.sides))
		for range *rounds {
			for i, s := range g.sides {
				results[i] = append(results[i], measure(s, *round))
			}
		}
		ours := median(results[g.ours])
		for i, s := range g.sides {
			m := median(results[i])
			ratio := ""
			if i != g.ours {
				ratio = fmt.Sprintf("%.1fx", m.cpu/ours.cpu)
			}
			fmt.Fprintf(w, "%s\t%s\t%.0f\t%.0f\t%.2f\t%s\t\n", s.name, g.item, m.cpu, 1e9/m.cpu, m.allocs, ratio)
		}
	}
	_ = w.Flush()
}

// side does one request and returns how many items it had.
type side struct {
	name string
	do   func() int
}

type group struct {
	item  string
	sides []side
	ours  int // what the others are compared with
}

type result struct{ cpu, allocs float64 }

func measure(s side, atLeast time.Duration) (r result) {
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	start, used, n := time.Now(), cpu(), 0
	for time.Since(start) < atLeast {
		n += s.do()
	}
	took := cpu() - used
	runtime.ReadMemStats(&after)
	return result{float64(took) / float64(n), float64(after.Mallocs-before.Mallocs) / float64(n)}
}

func median(all []result) result {
	slices.SortFunc(all, func(a, b result) int { return int(a.cpu*1000 - b.cpu*1000) })
	return all[len(all)/2]
}

// cpu is what this process has used, in nanoseconds.
func cpu() int64 {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return u.Utime.Nano() + u.Stime.Nano()
}

// stamped is a request as an edge would have sent it on.
func stamped(sig otlpwire.Signal, items, attrs int) []byte {
	out, err := envelope.Instance{ID: "as-1", Name: "Berlin", Customer: "c-1", Environment: "prod"}.Stamp().Append(nil, load.Request(sig, items, attrs))
	if err != nil {
		panic(err) // BUG: load makes sound requests
	}
	return out
}

func must[T any](v T, err error) T {
	if err != nil {
		fmt.Fprintln(os.Stderr, "writers:", err)
		os.Exit(1)
	}
	return v
}

func groups(items, attrs int) []group {
	metrics, logs, traces := stamped(otlpwire.Metrics, items, attrs), stamped(otlpwire.Logs, items, attrs), stamped(otlpwire.Traces, items, attrs)

	pcfg := prometheus.DefaultConfig()
	pcfg.URL = "http://127.0.0.1:9"
	pcfg.Limits.NewSeries = 0 // contrib has no guard
	prom := must(prometheus.New(pcfg))
	pcfg.Limits = prometheus.DefaultConfig().Limits
	guarded := must(prometheus.New(pcfg))
	var packed []byte
	translate := func(w *prometheus.Writer, pack bool) func() int {
		return func() (n int) {
			w.Translate("as-1", metrics, func(body []byte, samples int) {
				if n += samples; pack {
					packed = snappy.Encode(packed[:cap(packed)], body)
				}
			})
			return n
		}
	}
	settings := prometheusremotewrite.Settings{AddMetricSuffixes: true, TranslationStrategy: "UnderscoreEscapingWithSuffixes", SendMetadata: true, DisableScopeInfo: true}
	decode := func() pmetric.Metrics {
		req := pmetricotlp.NewExportRequest()
		if err := req.UnmarshalProto(metrics); err != nil {
			panic(err)
		}
		return req.Metrics()
	}
	md := decode()
	contrib := func(md pmetric.Metrics) (*writev2.Request, int) {
		series, symbols, err := prometheusremotewrite.FromMetricsV2(md, settings)
		if err != nil {
			panic(err)
		}
		req, n := &writev2.Request{Symbols: symbols.Symbols()}, 0
		for _, ts := range series {
			req.Timeseries = append(req.Timeseries, *ts)
			n += len(ts.Samples) + len(ts.Histograms)
		}
		return req, n
	}

	lcfg := loki.DefaultConfig()
	lcfg.URL = "http://127.0.0.1:9"
	lok := must(loki.New(lcfg))
	return []group{
		{"sample", []side{
			{"penstock: OTLP bytes to remote_write 2.0 bytes", translate(prom, false)},
			{"contrib: FromMetricsV2 alone", func() int { _, n := contrib(md); return n }},
			{"contrib: decode, FromMetricsV2, encode", func() int {
				req, n := contrib(decode())
				must(proto.Marshal(req))
				return n
			}},
			{"penstock: the same with the cardinality guard", translate(guarded, false)},
			{"penstock: and with snappy, as it is sent", translate(guarded, true)},
		}, 0},
		{"log line", []side{
			{"penstock: OTLP bytes to a push, with snappy", func() int {
				lok.Translate("as-1", logs, func(body []byte) { packed = snappy.Encode(packed[:cap(packed)], body) })
				return items
			}},
			{"collector: decode, encode, with snappy", func() int {
				req := plogotlp.NewExportRequest()
				if err := req.UnmarshalProto(logs); err != nil {
					panic(err)
				}
				packed = snappy.Encode(packed[:cap(packed)], must(req.MarshalProto()))
				return items
			}},
		}, 0},
		{"span", []side{
			{"penstock: check, as every sink does; the bytes go as they are", func() int {
				must(otlpwire.Scan(otlpwire.Traces, traces, otlpwire.DefaultLimits))
				return items
			}},
			{"collector: decode, encode", func() int {
				req := ptraceotlp.NewExportRequest()
				if err := req.UnmarshalProto(traces); err != nil {
					panic(err)
				}
				must(req.MarshalProto())
				return items
			}},
		}, 0},
	}
}
