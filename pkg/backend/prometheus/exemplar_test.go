package prometheus

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// exemplarsOf names the exemplars of every series, by its bucket.
func exemplarsOf(tr *translation) (out []string) {
	for _, s := range tr.series {
		bucket := "-"
		for i := s.labels; i+1 < s.end; i += 2 {
			if string(tr.symbols.get(tr.pairs[i])) == leLabel {
				bucket = string(tr.symbols.get(tr.pairs[i+1]))
			}
		}
		for k := s.firstSeen; k != none; k = tr.exemplars[k].next {
			e := tr.exemplars[k]
			text := fmt.Sprintf("%s: %v", bucket, e.value)
			for i := e.labels; i < e.end; i += 2 {
				text += fmt.Sprintf(" %s=%s", tr.symbols.get(tr.pairs[i]), tr.symbols.get(tr.pairs[i+1]))
			}
			out = append(out, text)
		}
	}
	slices.Sort(out)
	return out
}

// TestExemplars: each goes to the bucket it is in, with its IDs and what it has of attributes, unless
// that is too long.
func TestExemplars(t *testing.T) {
	const (
		ids  = `"traceId":"5b8efff798038103d269b633813fc60c","spanId":"eee19b7ec3c1b174",`
		none = `"traceId":"00000000000000000000000000000000","spanId":"",`
		want = "span_id=eee19b7ec3c1b174 trace_id=5b8efff798038103d269b633813fc60c"
	)
	exemplar := func(value, ids, attributes string) string {
		return fmt.Sprintf(`{"timeUnixNano":"@-1s","asDouble":%s,%s"filteredAttributes":[%s]}`, value, ids, attributes)
	}
	attribute := func(key, value string) string {
		return fmt.Sprintf(`{"key":%q,"value":{"stringValue":%q}}`, key, value)
	}
	histogram := `{"name":"h","histogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"@-1s","count":"3","bucketCounts":["1","1","1"],"explicitBounds":[1,2],"exemplars":[%s]}]}}`
	exponential := `{"name":"h","exponentialHistogram":{"aggregationTemporality":2,"dataPoints":[{"timeUnixNano":"@-1s","count":"1","zeroCount":"1","exemplars":[%s]}]}}`
	for name, tc := range map[string]struct {
		metric    string
		exemplars []string
		want      []string
	}{
		"one a bucket":    {histogram, []string{exemplar("9", ids, ""), exemplar("0.5", none, ""), exemplar("1", none, ""), exemplar("2", none, "")}, []string{"+Inf: 9 " + want, "1: 0.5", "1: 1", "2: 2"}},
		"attributes":      {histogram, []string{exemplar("1", ids, attribute("user", "u1"))}, []string{"1: 1 " + want + " user=u1"}},
		"too long":        {histogram, []string{exemplar("1", ids, attribute("user", strings.Repeat("x", 128)))}, []string{"1: 1 " + want}},
		"a key twice":     {histogram, []string{exemplar("1", none, attribute("user", "u1")+","+attribute("user", "u2"))}, []string{"1: 1 user=u1"}},
		"without a value": {histogram, []string{`{"timeUnixNano":"@-1s",` + ids + `"filteredAttributes":[]}`}, nil},
		"an integer":      {histogram, []string{`{"timeUnixNano":"@-1s","asInt":"2"}`}, []string{"2: 2"}},
		"exponential":     {exponential, []string{exemplar("1", ids, ""), exemplar("3", none, "")}, []string{"-: 1 " + want, "-: 3"}},
	} {
		tr := keeper(nil)
		deliver(t, tr, metrics(t, "", "", fmt.Sprintf(tc.metric, strings.Join(tc.exemplars, ","))))
		if got := exemplarsOf(tr); dead(tr) != "" || !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q, want %q, dead: %s", name, got, tc.want, dead(tr))
		}
	}
}
