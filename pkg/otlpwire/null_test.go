package otlpwire

import (
	"errors"
	"strings"
	"testing"
)

// TestNullInArrays: what JavaScript makes of holes, undefined and NaN. The rest of the
// request is taken, and nothing moves to another place.
func TestNullInArrays(t *testing.T) {
	const ids = `"traceId":"5b8efff798038103d269b633813fc60c","spanId":"eee19b7ec3c1b174"`
	span := func(members string) string {
		return `{"resourceSpans":[{"scopeSpans":[{"spans":[{` + ids + members + `}]}]}]}`
	}
	point := func(kind, members string) string {
		return `{"resourceMetrics":[{"scopeMetrics":[{"metrics":[{"name":"m","` + kind + `":{"dataPoints":[{"timeUnixNano":"1"` + members + `}]}}]}]}]}`
	}
	for _, tc := range []struct {
		name      string
		sig       Signal
		text      string
		want      string // what it is the same as; "" for refused
		bad, good int    // items
	}{
		{"resource", Traces, `{"resourceSpans":[null,` + span("")[len(`{"resourceSpans":[`):], span(""), 0, 1},
		{"last resource", Traces, strings.TrimSuffix(span(""), "]}") + `,null]}`, span(""), 0, 1},
		{"only nulls", Traces, `{"resourceSpans":[null, null ,null]}`, `{}`, 0, 0},
		{"scope", Traces, `{"resourceSpans":[{"scopeSpans":[null]}]}`, `{"resourceSpans":[{"scopeSpans":[]}]}`, 0, 0},
		{"span", Traces, strings.Replace(span(""), `"spans":[`, `"spans":[null,`, 1), span(""), 0, 1},
		{"record", Logs, `{"resourceLogs":[{"scopeLogs":[{"logRecords":[{},null,{}]}]}]}`, `{"resourceLogs":[{"scopeLogs":[{"logRecords":[{},{}]}]}]}`, 0, 2},
		{"metric", Metrics, strings.Replace(point("gauge", ""), `"metrics":[`, `"metrics":[null,`, 1), point("gauge", ""), 0, 1},
		{"point", Metrics, strings.Replace(point("sum", ""), `"dataPoints":[`, `"dataPoints":[null,`, 1), point("sum", ""), 0, 1},
		{"attribute", Traces, span(`,"attributes":[null,{"key":"a","value":{"intValue":1}},null]`), span(`,"attributes":[{"key":"a","value":{"intValue":1}}]`), 0, 1},
		{"event, link", Traces, span(`,"events":[null,{"name":"e"}],"links":[null]`), span(`,"events":[{"name":"e"}]`), 0, 1},
		{"value of an array", Traces, span(`,"attributes":[{"key":"a","value":{"arrayValue":{"values":[{"intValue":1},null,{"intValue":3}]}}}]`), span(`,"attributes":[{"key":"a","value":{"arrayValue":{"values":[{"intValue":1},{},{"intValue":3}]}}}]`), 0, 1},
		{"entry of a map", Traces, span(`,"attributes":[{"key":"a","value":{"kvlistValue":{"values":[null,{"key":"k"}]}}}]`), span(`,"attributes":[{"key":"a","value":{"kvlistValue":{"values":[{"key":"k"}]}}}]`), 0, 1},
		{"name of an entity's key", Traces, `{"resourceSpans":[{"resource":{"entityRefs":[{"idKeys":["a",null]}]}}]}`, `{"resourceSpans":[{"resource":{"entityRefs":[{"idKeys":["a"]}]}}]}`, 0, 0},
		{"exemplar, quantile", Metrics, point("summary", `,"quantileValues":[null,{"value":1}]`), point("summary", `,"quantileValues":[{"value":1}]`), 0, 1},
		{"count of a bucket", Metrics, point("histogram", `,"bucketCounts":["1",null,"2"],"explicitBounds":[1,2]`), point("histogram", `,"bucketCounts":["1","0","2"],"explicitBounds":[1,2]`), 0, 1},
		{"count of an exponential bucket", Metrics, point("exponentialHistogram", `,"positive":{"bucketCounts":["1",null,"2"]}`), point("exponentialHistogram", `,"positive":{"bucketCounts":["1","0","2"]}`), 0, 1},
		{"bound", Metrics, point("histogram", `,"bucketCounts":["1","1","2"],"explicitBounds":[1,null]`), point("histogram", `,"bucketCounts":["1","1","2"],"explicitBounds":[1,"NaN"]`), 1, 0},
		{"unknown array", Traces, span(`,"x":[null,{"y":null}]`), span(""), 0, 1},

		{"not quite", Traces, `{"resourceSpans":[nul]}`, "", 0, 0},
		{"more than null", Traces, `{"resourceSpans":[nullx]}`, "", 0, 0},
		{"trailing comma", Traces, `{"resourceSpans":[null,]}`, "", 0, 0},
		{"no comma", Traces, `{"resourceSpans":[null null]}`, "", 0, 0},
		{"cut short", Traces, `{"resourceSpans":[null`, "", 0, 0},
	} {
		got, _, err := FromJSON(nil, tc.sig, []byte(tc.text), DefaultLimits)
		if tc.want == "" {
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("%s: %v", tc.name, err)
			}
			continue
		}
		want, _, werr := FromJSON(nil, tc.sig, []byte(tc.want), DefaultLimits)
		if werr != nil {
			t.Fatal(werr)
		}
		if err != nil || string(got) != string(want) {
			t.Errorf("%s: %v, %x, want %x", tc.name, err, got, want)
			continue
		}
		if rep, err := Scan(tc.sig, got, DefaultLimits); err != nil || rep.Invalid != tc.bad || rep.Items-rep.Invalid != tc.good {
			t.Errorf("%s: %+v, %v", tc.name, rep, err)
		}
	}
	// Nulls that become something are bounded as it is.
	values := span(`,"attributes":[{"key":"a","value":{"arrayValue":{"values":[null` + strings.Repeat(",null", 1000) + `]}}}]`)
	if _, _, err := FromJSON(nil, Traces, []byte(values), Limits{MaxElements: 500}); !errors.Is(err, ErrMalformed) {
		t.Errorf("a thousand empty values, where 500 are allowed: %v", err)
	}
	counts := point("histogram", `,"bucketCounts":[null`+strings.Repeat(",null", 1000)+`]`)
	if _, _, err := FromJSON(nil, Metrics, []byte(counts), Limits{MaxElements: 500, MaxBytes: 4000}); !errors.Is(err, ErrMalformed) {
		t.Errorf("a thousand counts in 4000 bytes: %v", err)
	}
}
