// Command compress compares the encodings a bus message could have, in time and
// in bytes per item: those of klauspost/compress, on messages of the sizes that
// an edge commits. All sides run alternately; the shortest round counts.
package main

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"

	"github.com/penstock/penstock/bench/internal/load"
	"github.com/penstock/penstock/pkg/generate"
	"github.com/penstock/penstock/pkg/otlpwire"
)

func main() {
	rounds := flag.Int("rounds", 9, "rounds of each side; the shortest counts")
	flag.Parse()
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "message\titems\tbytes\tencoding\tratio\tbytes/item\tcompress ns/item\tdecompress ns/item\t")
	for _, m := range messages() {
		for _, r := range measure(m.body, *rounds) {
			n := float64(m.items)
			fmt.Fprintf(w, "%s\t%d\t%d\t%s\t%.1f\t%.0f\t%.0f\t%.0f\t\n", m.name, m.items, len(m.body), r.name, float64(len(m.body))/float64(r.size), float64(r.size)/n, r.compress/n, r.decompress/n)
		}
	}
	_ = w.Flush()
}

type message struct {
	name  string
	items int
	body  []byte
}

func messages() (all []message) {
	for _, n := range []int{1, 64, 512, 2048} {
		all = append(all, message{"synthetic traces", n, load.Request(otlpwire.Traces, n, 10)})
	}
	all = append(all, message{"synthetic logs", 512, load.Request(otlpwire.Logs, 512, 5)}, message{"synthetic metrics", 512, load.Request(otlpwire.Metrics, 512, 5)})
	// What `penstock generate` sends: one request a checkout, many in a message.
	shop := generate.NewShop(1, time.Unix(1_790_000_000, 0))
	var spans, logs []byte
	for i := range 64 {
		c := shop.Checkout(time.Unix(1_790_000_000+int64(i), 0))
		spans, logs = append(spans, marshal(c.Spans)...), append(logs, marshal(c.Logs)...)
	}
	return append(all,
		message{"shop traces", otlpwire.Count(otlpwire.Traces, spans), spans},
		message{"shop logs", otlpwire.Count(otlpwire.Logs, logs), logs})
}

func marshal(m proto.Message) []byte {
	b, err := proto.Marshal(m)
	if err != nil {
		panic(err) // BUG: the generator's messages are complete
	}
	return b
}

type result struct {
	name                 string
	size                 int
	compress, decompress float64 // ns a message
}

type side struct {
	name               string
	encode, decode     func(dst, src []byte) []byte
	packed, out        []byte
	encodeNS, decodeNS []float64
}

func measure(body []byte, rounds int) (results []result) {
	zdec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1))
	if err != nil {
		panic(err)
	}
	decodeS2 := func(dst, src []byte) []byte {
		out, err := s2.Decode(dst[:cap(dst)], src)
		if err != nil {
			panic(err)
		}
		return out
	}
	decodeZstd := func(dst, src []byte) []byte {
		out, err := zdec.DecodeAll(src, dst[:0])
		if err != nil {
			panic(err)
		}
		return out
	}
	encodeZstd := func(level zstd.EncoderLevel) func(dst, src []byte) []byte {
		enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(level), zstd.WithEncoderConcurrency(1))
		if err != nil {
			panic(err)
		}
		return func(dst, src []byte) []byte { return enc.EncodeAll(src, dst[:0]) }
	}
	full := func(f func(dst, src []byte) []byte) func(dst, src []byte) []byte {
		return func(dst, src []byte) []byte { return f(dst[:cap(dst)], src) }
	}
	sides := []*side{
		{name: "s2", encode: full(s2.Encode), decode: decodeS2},
		{name: "s2 better", encode: full(s2.EncodeBetter), decode: decodeS2},
		{name: "zstd fastest", encode: encodeZstd(zstd.SpeedFastest), decode: decodeZstd},
		{name: "zstd default", encode: encodeZstd(zstd.SpeedDefault), decode: decodeZstd},
	}
	for _, s := range sides {
		s.packed, s.out = make([]byte, 0, s2.MaxEncodedLen(len(body))), make([]byte, 0, len(body))
	}
	for range rounds {
		for _, s := range sides {
			s.encodeNS = append(s.encodeNS, perCall(func() { s.packed = s.encode(s.packed, body) }))
			s.decodeNS = append(s.decodeNS, perCall(func() { s.out = s.decode(s.out, s.packed) }))
		}
	}
	for _, s := range sides {
		results = append(results, result{s.name, len(s.packed), slices.Min(s.encodeNS), slices.Min(s.decodeNS)})
	}
	return results
}

// perCall runs f for a while and returns ns a call.
func perCall(f func()) float64 {
	const round = 15 * time.Millisecond
	n, start := 0, time.Now()
	for time.Since(start) < round {
		f()
		n++
	}
	return float64(time.Since(start).Nanoseconds()) / float64(n)
}
