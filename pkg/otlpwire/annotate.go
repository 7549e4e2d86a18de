package otlpwire

import (
	"bytes"
	"math/bits"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"
)

// Annotation is what a sampler writes into the spans that it has kept.
type Annotation struct {
	// Threshold is the rejection threshold of the decision, in 2^-56: a trace like
	// this is kept with the probability 1 - Threshold/2^56. It is combined with the one
	// that the span has (`th` of the member ot of its trace state: OpenTelemetry,
	// TraceState: Probability Sampling). 0 leaves the trace state unchanged, [Unknown] removes `th`.
	Threshold uint64
	// Key and Value are a string attribute that every span gets; none when Key is empty. An
	// existing attribute of this key is kept.
	Key, Value string
}

// Unknown is the threshold of a decision whose probability is unknown.
const Unknown = uint64(1) << 56

// Needed reports whether the annotation changes anything.
func (a Annotation) Needed() bool { return a.Threshold != 0 || a.Key != "" }

// Append appends a traces payload that Scan has accepted, with every span
// annotated.
func (a Annotation) Append(dst, payload []byte) []byte {
	return a.rewrite(dst, payload, 0)
}

// rewrite copies a message on the path request, ResourceSpans, ScopeSpans and annotates the spans
// in it.
func (a Annotation) rewrite(dst, b []byte, depth int) []byte {
	down := [...]int{1, 2, 2}[depth] // the field that leads to the spans
	for i := 0; i < len(b); {
		num, typ, value, end := nextField(b, i)
		if end < 0 {
			return append(dst, b[i:]...) // not accepted by Scan
		}
		if num != down || typ != bytesType {
			dst = append(dst, b[i:end]...)
			i = end
			continue
		}
		// The length is written as it was, and corrected when it has changed.
		dst = protowire.AppendTag(dst, FieldNumber(num), protowire.BytesType)
		start := len(dst)
		if depth == 2 {
			dst = a.span(dst, b[value:end])
		} else {
			dst = a.rewrite(dst, b[value:end], depth+1)
		}
		dst = insertLength(dst, start)
		i = end
	}
	return dst
}

// insertLength inserts the length of dst[start:] before it.
func insertLength(dst []byte, start int) []byte {
	size := len(dst) - start
	n := protowire.SizeVarint(uint64(size))
	dst = append(dst, make([]byte, n)...)
	copy(dst[start+n:], dst[start:start+size])
	protowire.AppendVarint(dst[:start], uint64(size))
	return dst
}

func (a Annotation) span(dst, b []byte) []byte {
	state, present := []byte(nil), a.Key == ""
	for i := 0; i < len(b); {
		num, typ, value, end := nextField(b, i)
		if end < 0 {
			return append(dst, b[i:]...)
		}
		switch {
		case num == spanTraceState && typ == bytesType && a.Threshold != 0:
			state = b[value:end]
			i = end
			continue
		case num == spanAttributes && typ == bytesType && !present:
			present = string(attributeKey(b[value:end])) == a.Key
		}
		dst = append(dst, b[i:end]...)
		i = end
	}
	if a.Threshold != 0 {
		if state := a.traceState(state); state != "" {
			dst = protowire.AppendString(protowire.AppendTag(dst, spanTraceState, protowire.BytesType), state)
		}
	}
	if !present {
		dst = AppendStringAttribute(dst, spanAttributes, a.Key, a.Value)
	}
	return dst
}

// The bounds of W3C Trace Context, section 3.3.1: members of a trace state, and
// characters of a member's value.
const (
	maxMembers = 32
	maxValue   = 256
)

// traceState returns a W3C trace state with the threshold in its member ot, which is first if it
// was changed; the last member is removed if there would be more than 32. A threshold above an
// explicit randomness (rv) would mean that the trace was not kept: then none is written.
func (a Annotation) traceState(state []byte) string {
	var others []string
	ot := probability{random: Unknown}
	for member := range bytes.SplitSeq(state, []byte(",")) {
		m := strings.TrimSpace(string(member))
		if value, is := strings.CutPrefix(m, "ot="); is {
			ot.read(value)
		} else if m != "" {
			others = append(others, m)
		}
	}
	if a.Threshold < Unknown {
		ot.keep(a.Threshold)
	}
	ot.shorten()
	if len(ot.keys) > 0 {
		others = append([]string{"ot=" + strings.Join(ot.keys, ";")}, others[:min(len(others), maxMembers-1)]...)
	}
	return strings.Join(others, ",")
}

// probability is what the member ot of a trace state says.
type probability struct {
	threshold uint64   // its sub-key th
	random    uint64   // its sub-key rv; Unknown for none
	keys      []string // its sub-keys but th
}

func (p *probability) read(value string) {
	for sub := range strings.SplitSeq(value, ";") {
		if th, is := strings.CutPrefix(sub, "th:"); is {
			p.threshold = parseThreshold(th)
			continue
		}
		if rv, is := strings.CutPrefix(sub, "rv:"); is && len(rv) == 14 {
			if v, err := strconv.ParseUint(rv, 16, 64); err == nil {
				p.random = v
			}
		}
		if sub != "" {
			p.keys = append(p.keys, sub)
		}
	}
}

// keep adds the threshold of a trace that is kept by both, the one that was there and another:
// the chances are multiplied.
func (p *probability) keep(threshold uint64) {
	high, low := bits.Mul64(Unknown-p.threshold, Unknown-threshold)
	if th := formatThreshold(Unknown - (high<<8 | low>>56)); parseThreshold(th) <= p.random {
		p.keys = append([]string{"th:" + th}, p.keys...)
	}
}

// shorten takes away sub-keys until they are no longer than a value may be, the last ones first, and
// randomness only when nothing else is left but the first.
func (p *probability) shorten() {
	for len(p.keys) > 1 && len(strings.Join(p.keys, ";")) > maxValue {
		last := len(p.keys) - 1
		for last > 1 && strings.HasPrefix(p.keys[last], "rv:") {
			last--
		}
		p.keys = slices.Delete(p.keys, last, last+1)
	}
}

// parseThreshold reads one to fourteen hexadecimal digits, the first ones of
// fourteen; anything else is no threshold.
func parseThreshold(s string) uint64 {
	if len(s) == 0 || len(s) > 14 {
		return 0
	}
	v, err := strconv.ParseUint(s, 16, 64)
	if err != nil {
		return 0
	}
	return v << (4 * (14 - len(s)))
}

// formatThreshold writes a threshold with four digits after leading f's, as the collector does by
// default, and without zeros at the end.
func formatThreshold(t uint64) string {
	digits := 4
	for shift := 52; shift > 0 && t>>shift&0xf == 0xf; shift -= 4 {
		digits++
	}
	if cut := 4 * (14 - digits); cut > 0 {
		if t += 1 << (cut - 1); t >= Unknown {
			t = Unknown - 1
		}
		t = t >> cut << cut
	}
	s := strconv.FormatUint(t, 16)
	s = strings.TrimRight(strings.Repeat("0", 14-len(s))+s, "0")
	if s == "" {
		return "0"
	}
	return s
}
