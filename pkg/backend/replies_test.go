package backend

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/snappy"

	"github.com/penstock/penstock/pkg/httpclient"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// kinds are the writers that speak HTTP, each with a configuration for a server.
var kinds = map[string]struct {
	sig otlpwire.Signal
	set func(c *Config, url string)
	ok  func(http.ResponseWriter)
}{
	"remote_write 2.0": {otlpwire.Metrics, func(c *Config, url string) { c.Prometheus.URL, c.Prometheus.Protocol = url, "2.0" }, wrote(1000)},
	"remote_write 1.0": {otlpwire.Metrics, func(c *Config, url string) { c.Prometheus.URL, c.Prometheus.Protocol = url, "1.0" }, status(204)},
	"loki push":        {otlpwire.Logs, func(c *Config, url string) { c.Loki.URL = url }, status(204)},
	"loki otlp":        {otlpwire.Logs, func(c *Config, url string) { c.Loki.URL, c.Loki.Mode = url, "otlp" }, status(204)},
	"tempo http": {otlpwire.Traces, func(c *Config, url string) {
		c.Tempo.Endpoint, c.Tempo.Protocol, c.Tempo.Compression = url, "http", "gzip"
	}, status(200)},
}

func status(code int) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) { w.WriteHeader(code) }
}

func text(code int, body string) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) { http.Error(w, body, code) }
}

func header(code int, name, value string) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) { w.Header().Set(name, value); w.WriteHeader(code) }
}

// wrote answers as remote_write 2.0 does.
func wrote(samples int) func(http.ResponseWriter) {
	return func(w http.ResponseWriter) {
		w.Header().Set("X-Prometheus-Remote-Write-Samples-Written", strconv.Itoa(samples))
		w.Header().Set("X-Prometheus-Remote-Write-Histograms-Written", strconv.Itoa(samples))
		w.WriteHeader(204)
	}
}

func reset(http.ResponseWriter) { panic(http.ErrAbortHandler) }

// outcome is what became of a payload.
type outcome struct {
	delivered, dedup, dead int
	reason                 string
	paused, finished       bool
	still                  bool // paused at the end
	letters                int
	requests               int
}

// bring has a payload written to a server whose answers script gives, by number and body.
func bring(t *testing.T, kind string, payload []byte, within time.Duration, script func(n int, body string) func(http.ResponseWriter)) (o outcome) {
	t.Helper()
	return bringTo(t, kind, func(*Config) {}, payload, within, script)
}

// bringTo is bring with a configuration.
func bringTo(t *testing.T, kind string, set func(*Config), payload []byte, within time.Duration, script func(n int, body string) func(http.ResponseWriter)) (o outcome) {
	t.Helper()
	return bringAll(t, kind, set, [][]byte{payload}, time.Time{}, within, script)
}

// bringAll is bringTo for payloads that arrived a second apart; the zero time is none.
func bringAll(t *testing.T, kind string, set func(*Config), payloads [][]byte, arrival time.Time, within time.Duration, script func(n int, body string) func(http.ResponseWriter)) (o outcome) {
	t.Helper()
	var mu sync.Mutex
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		o.requests++
		n := o.requests
		mu.Unlock()
		script(n, plain(body))(w)
	}))
	defer srv.Close()
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	k := kinds[kind]
	cfg := DefaultConfig()
	k.set(&cfg, srv.URL)
	set(&cfg)
	w, err := cfg.Open(k.sig)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	d := Deliverer{
		Signal: k.sig, Writer: Session(w), Log: slog.New(slog.DiscardHandler),
		Delivered: func(n int) { o.delivered += n }, Deduplicated: func(n int) { o.dedup += n },
		Paused: func(now bool) { o.paused, o.still = o.paused || now, now },
		GiveUp: func(_ context.Context, _ string, p []byte, reason string, why error) bool {
			o.dead, o.reason = o.dead+otlpwire.Count(k.sig, p), reason
			o.letters++
			if why.Error() == "" || len(why.Error()) > 2048 || strings.ContainsAny(why.Error(), "\n\x1b") {
				t.Errorf("%s: the reason is no line for a log: %q", kind, why)
			}
			return true
		},
	}
	for i, payload := range payloads {
		if !arrival.IsZero() {
			d.Arrival = arrival.Add(time.Duration(i) * time.Second).UnixNano()
		}
		o.finished = d.Write(ctx, "as-1", payload, otlpwire.Count(k.sig, payload), false)
	}
	return o
}

// plain undoes the compression of a request's body.
func plain(body []byte) string {
	if z, err := gzip.NewReader(bytes.NewReader(body)); err == nil {
		if out, err := io.ReadAll(z); err == nil {
			return string(out)
		}
	}
	if out, err := snappy.Decode(nil, body); err == nil {
		return string(out)
	}
	return string(body)
}

// items makes a payload of n items of a signal, each with its own text in it.
func items(t *testing.T, sig otlpwire.Signal, n int, name func(int) string) []byte {
	t.Helper()
	var list []string
	for i := range n {
		attributes := fmt.Sprintf(`"attributes":[{"key":"id","value":{"stringValue":%q}}]`, name(i))
		switch sig {
		case otlpwire.Traces:
			list = append(list, fmt.Sprintf(`{"traceId":"%032x","spanId":"%016x","name":"s",%s}`, i+1, i+1, attributes))
		case otlpwire.Metrics:
			list = append(list, fmt.Sprintf(`{"timeUnixNano":"%d","asInt":"1",%s}`, time.Now().UnixNano(), attributes))
		case otlpwire.Logs:
			list = append(list, fmt.Sprintf(`{"timeUnixNano":"%d","body":{"stringValue":"line"},%s}`, time.Now().UnixNano(), attributes))
		}
	}
	form := map[otlpwire.Signal]string{
		otlpwire.Traces:  `{"resourceSpans":[{"scopeSpans":[{"spans":[%s]}]}]}`,
		otlpwire.Metrics: `{"resourceMetrics":[{"scopeMetrics":[{"metrics":[{"name":"m","gauge":{"dataPoints":[%s]}}]}]}]}`,
		otlpwire.Logs:    `{"resourceLogs":[{"scopeLogs":[{"logRecords":[%s]}]}]}`,
	}
	p, _, err := otlpwire.FromJSON(nil, sig, fmt.Appendf(nil, form[sig], strings.Join(list, ",")), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func numbered(i int) string { return fmt.Sprint("item-", i) }

// each runs a test for every kind of writer.
func each(t *testing.T, test func(t *testing.T, kind string, ok func(http.ResponseWriter), ten []byte)) {
	for kind, k := range kinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			test(t, kind, k.ok, items(t, k.sig, 10, numbered))
		})
	}
}

// TestWhatHealsIsTriedAgain: F32 and B3.
func TestWhatHealsIsTriedAgain(t *testing.T) {
	each(t, func(t *testing.T, kind string, ok func(http.ResponseWriter), ten []byte) {
		answers := map[string]func(http.ResponseWriter){
			"500": status(500), "502": status(502), "503": status(503), "504": status(504), "429": status(429), "reset": reset,
		}
		for _, after := range []string{"0", "-1", "abc", time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat), "99999999999999999999"} {
			answers["429 after "+after] = header(429, "Retry-After", after)
		}
		for name, answer := range answers {
			o := bring(t, kind, ten, 20*time.Second, func(n int, _ string) func(http.ResponseWriter) {
				if n == 1 {
					return answer
				}
				return ok
			})
			if o != (outcome{delivered: 10, finished: true, requests: 2}) {
				t.Errorf("%s: %+v", name, o)
			}
		}
	})
}

// TestOnlyTheCulpritIsGivenUp: F33.
func TestOnlyTheCulpritIsGivenUp(t *testing.T) {
	each(t, func(t *testing.T, kind string, ok func(http.ResponseWriter), _ []byte) {
		payload := items(t, kinds[kind].sig, 64, func(i int) string {
			if i == 37 {
				return "poison"
			}
			return numbered(i)
		})
		stored := map[string]bool{}
		o := bring(t, kind, payload, 20*time.Second, func(_ int, body string) func(http.ResponseWriter) {
			if strings.Contains(body, "poison") {
				return text(400, "that is poison\x1b[31m")
			}
			for i := range 64 {
				if strings.Contains(body, numbered(i)) {
					stored[numbered(i)] = true
				}
			}
			return ok
		})
		// Two requests for each of six halvings, and the first.
		if o != (outcome{delivered: 63, dead: 1, letters: 1, reason: ledger.DeadRefused, finished: true, requests: 13}) || len(stored) != 63 {
			t.Errorf("%+v, %d stored", o, len(stored))
		}
	})
}

// TestConfigurationPausesTheLane: F34 and B2.
func TestConfigurationPausesTheLane(t *testing.T) {
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a redirect was followed") }))
	t.Cleanup(other.Close)
	each(t, func(t *testing.T, kind string, _ func(http.ResponseWriter), ten []byte) {
		for _, code := range []int{401, 403, 404, 405, 301, 302, 307, 308, 260} {
			o := bring(t, kind, ten, 200*time.Millisecond, func(int, string) func(http.ResponseWriter) { return header(code, "Location", other.URL) })
			if o != (outcome{paused: true, requests: 1}) { // not paused any more when it has ended
				t.Errorf("%d: %+v", code, o)
			}
		}
	})
}

// TestTooLargeIsSplit: F35.
func TestTooLargeIsSplit(t *testing.T) {
	each(t, func(t *testing.T, kind string, ok func(http.ResponseWriter), ten []byte) {
		huge := strings.Repeat("x", 5000)
		payload := items(t, kinds[kind].sig, 10, func(i int) string {
			if i == 3 {
				return huge
			}
			return numbered(i)
		})
		o := bring(t, kind, payload, 20*time.Second, func(_ int, body string) func(http.ResponseWriter) {
			if len(body) > 4000 {
				return status(413)
			}
			return ok
		})
		if o.delivered != 9 || o.dead != 1 || o.reason != ledger.DeadTooLarge || !o.finished {
			t.Errorf("%+v", o)
		}
		if o := bring(t, kind, ten, 20*time.Second, func(n int, _ string) func(http.ResponseWriter) {
			if n == 1 {
				return status(413)
			}
			return ok
		}); o != (outcome{delivered: 10, finished: true, requests: 3}) {
			t.Errorf("in halves: %+v", o)
		}
	})
}

// TestLostAnswersAreNoDeadLetters: F36. What the backend has from a try whose answer was
// lost it refuses as a duplicate; the same refusal of a first try is a dead letter (F40).
func TestLostAnswersAreNoDeadLetters(t *testing.T) {
	for _, kind := range []string{"remote_write 1.0", "remote_write 2.0"} {
		for _, why := range []string{"out of order sample", "duplicate sample for timestamp", "received a sample whose timestamp is older, out-of-order samples are not allowed (err-mimir-sample-out-of-order)"} {
			ten := items(t, otlpwire.Metrics, 10, numbered)
			refused := func(int, string) func(http.ResponseWriter) { return text(400, why) }
			if o := bring(t, kind, ten, 20*time.Second, refused); o.dead != 10 || o.reason != ledger.DeadOutOfOrder || o.delivered != 0 {
				t.Errorf("%s, first try: %+v", kind, o)
			}
			if o := bring(t, kind, ten, 20*time.Second, func(n int, body string) func(http.ResponseWriter) {
				if n == 1 {
					return reset
				}
				return refused(n, body)
			}); o.dead != 0 || o.dedup != 10 || o.delivered != 10 || !o.finished {
				t.Errorf("%s, after a lost answer: %+v", kind, o)
			}
		}
		ten := items(t, otlpwire.Metrics, 10, numbered)
		if o := bring(t, kind, ten, 20*time.Second, func(n int, body string) func(http.ResponseWriter) {
			if n == 1 {
				return status(429) // it has stored nothing, and has said so
			}
			return text(400, "out of order sample")
		}); o.dead != 10 || o.dedup != 0 {
			t.Errorf("%s, after a 429: %+v", kind, o)
		}
		old := items(t, otlpwire.Metrics, 2, numbered)
		if o := bring(t, kind, old, 20*time.Second, func(int, string) func(http.ResponseWriter) { return text(400, "too old sample") }); o.dead != 2 || o.reason != ledger.DeadTooOld {
			t.Errorf("%s, too old: %+v", kind, o)
		}
	}
	two := items(t, otlpwire.Logs, 2, numbered)
	for why, reason := range map[string]string{
		"entry with timestamp 2026-01-01 ignored, reason: 'entry too far behind, entry timestamp is: …'":                 ledger.DeadOutOfOrder,
		"entry for stream '{a=\"b\"}' has timestamp too old: 2020-01-01T00:00:00Z":                                       ledger.DeadTooOld,
		"max entry size '262144' bytes exceeded for stream '{a=\"b\"}' while adding an entry with length '400000' bytes": ledger.DeadTooLarge,
	} {
		if o := bring(t, "loki push", two, 20*time.Second, func(int, string) func(http.ResponseWriter) { return text(400, why) }); o.dead != 2 || o.reason != reason {
			t.Errorf("%s: %+v", why, o)
		}
	}
}

// TestAllThatIsRefusedIsGivenUpSoon: an instance whose every item is refused does not cost two
// requests for each of them.
func TestAllThatIsRefusedIsGivenUpSoon(t *testing.T) {
	each(t, func(t *testing.T, kind string, ok func(http.ResponseWriter), _ []byte) {
		payload := items(t, kinds[kind].sig, 5000, numbered)
		o := bring(t, kind, payload, 60*time.Second, func(int, string) func(http.ResponseWriter) { return text(400, "no") })
		if o.dead != 5000 || o.delivered != 0 || o.requests > 700 || o.letters > 300 || !o.finished {
			t.Errorf("%+v", o)
		}
	})
}

// TestAllThatIsThereAlreadyIsCounted: a lost answer to many items costs none of them.
func TestAllThatIsThereAlreadyIsCounted(t *testing.T) {
	payload := items(t, otlpwire.Metrics, 600, numbered)
	o := bring(t, "remote_write 1.0", payload, 60*time.Second, func(n int, _ string) func(http.ResponseWriter) {
		if n == 1 {
			return reset
		}
		return text(400, "duplicate sample for timestamp")
	})
	if o.dedup != 600 || o.delivered != 600 || o.dead != 0 {
		t.Errorf("%+v", o)
	}
}

// TestWhatIsGivenUpAsAWholeIsNoRepetition: of several items that are refused as duplicates some
// may not be there; they are dead-lettered, not counted as delivered.
func TestWhatIsGivenUpAsAWholeIsNoRepetition(t *testing.T) {
	payload := items(t, otlpwire.Metrics, 600, func(i int) string {
		if i < 300 {
			return fmt.Sprint("bad-", i)
		}
		return numbered(i)
	})
	o := bring(t, "remote_write 1.0", payload, 60*time.Second, func(n int, body string) func(http.ResponseWriter) {
		switch {
		case n == 1:
			return reset
		case strings.Contains(body, "bad-"):
			return text(400, "no")
		}
		return text(400, "duplicate sample for timestamp")
	})
	if o.dead != 600 || o.dedup != 0 || o.delivered != 0 {
		t.Errorf("%+v", o)
	}
}

// TestPartsAreGivenUpAtOnce: what a writer itself knows to be impossible is one dead letter,
// and takes nothing along; what is of no tenant is one, too.
func TestPartsAreGivenUpAtOnce(t *testing.T) {
	good, bad := `{"name":"m","gauge":{"dataPoints":[{"timeUnixNano":"1","asInt":"1"}]}}`, `{"name":"...","gauge":{"dataPoints":[{"timeUnixNano":"1","asInt":"1"},{"timeUnixNano":"2","asInt":"1"}]}}`
	payload, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, []byte(`{"resourceMetrics":[{"scopeMetrics":[{"metrics":[`+bad+","+good+","+bad+`]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	o := bring(t, "remote_write 1.0", payload, 20*time.Second, func(int, string) func(http.ResponseWriter) { return status(204) })
	if o != (outcome{delivered: 1, dead: 4, letters: 1, reason: ledger.DeadUnsupported, finished: true, requests: 1}) {
		t.Errorf("%+v", o)
	}
	customers := filepath.Join(t.TempDir(), "customers.yaml") // it does not have this instance
	if err := os.WriteFile(customers, []byte("another: acme\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	none := httpclient.Tenant{From: "customer", CustomersFile: customers}
	for kind, set := range map[string]func(*Config){
		"remote_write 1.0": func(c *Config) { c.Prometheus.Tenant = none },
		"loki push":        func(c *Config) { c.Loki.Tenant = none },
		"tempo http":       func(c *Config) { c.Tempo.Tenant = none },
	} {
		ten := items(t, kinds[kind].sig, 10, numbered)
		o := bringTo(t, kind, set, ten, 20*time.Second, func(int, string) func(http.ResponseWriter) { return status(204) })
		if o != (outcome{dead: 10, letters: 1, reason: ledger.DeadRefused, finished: true}) {
			t.Errorf("%s: %+v", kind, o)
		}
	}
}

// TestTargetInfoCostsNobody: a refused target_info takes nothing along.
func TestTargetInfoCostsNobody(t *testing.T) {
	payload, _, err := otlpwire.FromJSON(nil, otlpwire.Metrics, []byte(`{"resourceMetrics":[{"resource":{"attributes":[{"key":"service.name","value":{"stringValue":"shop"}},{"key":"host.name","value":{"stringValue":"h"}}]},"scopeMetrics":[{"metrics":[{"name":"m","gauge":{"dataPoints":[{"timeUnixNano":"1","asInt":"1"}]}}]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	for kind, ok := range map[string]func(http.ResponseWriter){"remote_write 1.0": status(204), "remote_write 2.0": wrote(1)} {
		o := bring(t, kind, payload, 20*time.Second, func(_ int, body string) func(http.ResponseWriter) {
			if strings.Contains(body, "target_info") {
				return text(400, "out of order sample")
			}
			return ok
		})
		if o != (outcome{delivered: 1, finished: true, requests: 2}) {
			t.Errorf("%s: %+v", kind, o)
		}
	}
}

// TestSuccessHasManyForms: B1 and B6.
func TestSuccessHasManyForms(t *testing.T) {
	each(t, func(t *testing.T, kind string, _ func(http.ResponseWriter), ten []byte) {
		if kind == "remote_write 2.0" {
			return
		}
		for _, code := range []int{200, 202, 204, 206, 299} {
			o := bring(t, kind, ten, 20*time.Second, func(int, string) func(http.ResponseWriter) {
				return func(w http.ResponseWriter) {
					w.WriteHeader(code)
					if code == 200 && kind != "tempo http" {
						_, _ = w.Write([]byte("<html>hello</html>"))
					}
				}
			})
			if o != (outcome{delivered: 10, finished: true, requests: 1}) {
				t.Errorf("%d: %+v", code, o)
			}
		}
	})
	partial, _ := hex.DecodeString("0a0708011203626164") // one span is bad
	ten := items(t, otlpwire.Traces, 10, numbered)
	// A receiver that has written fewer: those that were not are looked for.
	fewer := items(t, otlpwire.Metrics, 10, numbered)
	if o := bring(t, "remote_write 2.0", fewer, 20*time.Second, func(int, string) func(http.ResponseWriter) { return wrote(1) }); o.delivered != 10 || o.dead != 0 || o.requests != 19 {
		t.Errorf("written one at a time: %+v", o)
	}
	if o := bring(t, "tempo http", ten, 20*time.Second, func(_ int, body string) func(http.ResponseWriter) {
		return func(w http.ResponseWriter) {
			if strings.Contains(body, "item-4") {
				_, _ = w.Write(partial)
			}
		}
	}); o.delivered != 9 || o.dead != 1 || !o.finished {
		t.Errorf("partial success: %+v", o)
	}
	metrics := items(t, otlpwire.Metrics, 10, numbered)
	for name, tc := range map[string]struct {
		answer func(http.ResponseWriter)
		dead   int
	}{
		"all": {wrote(10), 0}, "more": {wrote(99), 0}, "garbage": {header(204, "X-Prometheus-Remote-Write-Samples-Written", "many"), 0},
		"400 for an exemplar": {func(w http.ResponseWriter) {
			w.Header().Set("X-Prometheus-Remote-Write-Samples-Written", "10")
			http.Error(w, "out of order exemplar", 400)
		}, 0},
		"none": {wrote(0), 10},
	} {
		if o := bring(t, "remote_write 2.0", metrics, 20*time.Second, func(int, string) func(http.ResponseWriter) { return tc.answer }); o.dead != tc.dead || o.delivered != 10-tc.dead || !o.finished {
			t.Errorf("written %s: %+v", name, o)
		}
	}
}

// TestProtocolIsNegotiated: a receiver that knows 1.0 only gets that, whatever it says to 2.0.
func TestProtocolIsNegotiated(t *testing.T) {
	for name, old := range map[string]func(http.ResponseWriter){"415": status(415), "400": text(400, "decode: bad wire type"), "204 and nothing stored": status(204)} {
		var versions []string
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			versions = append(versions, r.Header.Get("X-Prometheus-Remote-Write-Version"))
			if strings.Contains(r.Header.Get("Content-Type"), "proto=") {
				old(w)
				return
			}
			w.WriteHeader(204)
		}))
		cfg := DefaultConfig()
		cfg.Prometheus.URL = srv.URL
		w, err := cfg.Open(otlpwire.Metrics)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second session knows what the first has found out
			if err := Session(w).Write(t.Context(), "as-1", items(t, otlpwire.Metrics, 3, numbered)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if got := strings.Join(versions, " "); got != "2.0.0 0.1.0 0.1.0" {
			t.Errorf("%s: %s", name, got)
		}
		srv.Close()
	}
}
