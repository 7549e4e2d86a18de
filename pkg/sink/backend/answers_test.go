package backend

import (
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

var relative = regexp.MustCompile(`"@([+-]\d+)s"`)

// input reads an OTLP/JSON request, in which "@-5s" stands for five seconds ago.
func input(t *testing.T, sig otlpwire.Signal, name string) []byte {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	text = relative.ReplaceAllFunc(text, func(m []byte) []byte {
		n, _ := strconv.Atoi(string(m[2 : len(m)-2]))
		return fmt.Appendf(nil, `"%d"`, now.Add(time.Duration(n)*time.Second).UnixNano())
	})
	p, _, err := otlpwire.FromJSON(nil, sig, text, otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestConflict: Thanos answers 409 where Prometheus answers 400.
func TestConflict(t *testing.T) {
	one := input(t, otlpwire.Metrics, "thanos-409")
	for body, reason := range map[string]string{
		"store locally for endpoint : out of order sample": ledger.DeadOutOfOrder, "conflict": ledger.DeadOutOfOrder, "": ledger.DeadOutOfOrder,
		"add 1 samples: out of bounds": ledger.DeadTooOld, "too old sample": ledger.DeadTooOld, "out of bounds: timestamp is too far in the future": ledger.DeadTooNew,
	} {
		for _, kind := range []string{"remote_write 1.0", "remote_write 2.0"} {
			for _, code := range []int{400, 409} {
				want := reason
				if code == 400 && (body == "conflict" || body == "") {
					want = ledger.DeadRefused
				}
				if o := bring(t, kind, one, 20*time.Second, func(int, string) func(http.ResponseWriter) { return text(code, body) }); o.reason != want || o.dead != 1 || o.dedup != 0 {
					t.Errorf("%s, %d %q: %+v, want %s", kind, code, body, o, want)
				}
				// Behind an answer that may have been lost it is stored already.
				o := bring(t, kind, one, 20*time.Second, func(n int, _ string) func(http.ResponseWriter) {
					if n == 1 {
						return status(503)
					}
					return text(code, body)
				})
				if stored := want == ledger.DeadOutOfOrder; (o.dedup == 1) != stored || (o.delivered == 1) != stored || (o.dead == 0) != stored {
					t.Errorf("%s, 503 and %d %q: %+v", kind, code, body, o)
				}
			}
		}
	}
}

// TestOneRefusedTargetInfo: that of other resources goes on, and no point is lost for it.
func TestOneRefusedTargetInfo(t *testing.T) {
	var got []string
	refused := 0
	server := func(_ int, body string) func(http.ResponseWriter) {
		if strings.Contains(body, "host_name\x12\aculprit") {
			refused++
			return text(400, "label value too long")
		}
		for _, host := range []string{"host-a", "host-b", "host-c", "host-d"} {
			if strings.Contains(body, "host_name\x12\x06"+host) {
				got = append(got, host)
			}
		}
		return status(204)
	}
	payload := func(at time.Time, hosts ...string) []byte {
		var all []string
		for _, h := range hosts {
			all = append(all, fmt.Sprintf(`{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"s of %[1]s"}},{"key":"host.name","value":{"stringValue":%[1]q}}]},"scopeMetrics":[{"metrics":[{"name":"g","gauge":{"dataPoints":[{"timeUnixNano":"%[2]d","asInt":"1"}]}}]}]}`, h, at.UnixNano()))
		}
		p, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, []byte(`{"resourceMetrics":[`+strings.Join(all, ",")+`]}`), otlpwire.DefaultLimits)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	// Payloads go to one writer, a second apart.
	start := time.Now().Add(-2 * time.Hour)
	var payloads [][]byte
	for i := range 8 {
		payloads = append(payloads, payload(start.Add(time.Duration(i)*time.Second), "culprit", "host-a", "host-b"))
	}
	payloads = append(payloads, payload(start.Add(8*time.Second), "host-c"), payload(start.Add(8*time.Second), "host-d", "culprit"))
	if o := bringAll(t, "remote_write 1.0", func(*Config) {}, payloads, start, 20*time.Second, server); o.dead > 0 || o.delivered != 8*3+3 {
		t.Errorf("%+v", o)
	}
	if want := "host-a host-b host-c host-d"; strings.Join(got, " ") != want || refused != 2 {
		t.Errorf("got %v after %d refusals, want %s", got, refused, want)
	}
}

// TestRefusedPointsHoldUpNoTargetInfo: what is refused is a point, again and again.
func TestRefusedPointsHoldUpNoTargetInfo(t *testing.T) {
	infos := 0
	server := func(_ int, body string) func(http.ResponseWriter) {
		if strings.Contains(body, "bad-point") {
			return text(400, "label value too long")
		}
		infos += strings.Count(body, "Target metadata")
		return status(204)
	}
	var payloads [][]byte
	start := time.Now().Add(-time.Hour)
	for i := range 5 {
		point := `{"timeUnixNano":"%d","asInt":"1","attributes":[{"key":"k","value":{"stringValue":%q}}]}`
		resource := `{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"s-%d"}},{"key":"host.name","value":{"stringValue":"h"}}]},"scopeMetrics":[{"metrics":[{"name":"g","gauge":{"dataPoints":[` + point + `,` + point + `]}}]}]}`
		at := start.Add(time.Duration(i) * time.Second).UnixNano()
		for n, text := range []string{"bad-point", "fine"} {
			p, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, fmt.Appendf(nil, `{"resourceMetrics":[`+resource+`]}`, 2*i+n, at, text, at, "fine"), otlpwire.DefaultLimits)
			if err != nil {
				t.Fatal(err)
			}
			payloads = append(payloads, p)
		}
	}
	o := bringAll(t, "remote_write 1.0", func(*Config) {}, payloads, start, 20*time.Second, server)
	if o.dead != 5 || o.delivered != 5*3 || infos != 5 {
		t.Errorf("%+v, %d times target_info, want 5", o, infos)
	}
}
