package receive

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestPace: a second's worth passes at once, then as much as the rate allows, whatever the
// clock does; a request may be larger than a second's worth, and is paid for.
func TestPace(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	var p pace
	passed := func(l InstanceLimits, n int) (count int) {
		for range n {
			if p.begin(l, now) == nil {
				count++
			}
		}
		return count
	}
	ten := InstanceLimits{Requests: 10}
	for _, tc := range []struct {
		after time.Duration
		want  int
	}{{0, 10}, {0, 0}, {100 * time.Millisecond, 1}, {time.Second / 2, 5}, {time.Hour, 10}, {-time.Hour, 0}, {time.Hour + 300*time.Millisecond, 3}} {
		now = now.Add(tc.after)
		if got := passed(ten, 100); got != tc.want {
			t.Errorf("after %v: %d requests pass, want %d", tc.after, got, tc.want)
		}
	}
	p = pace{}
	kilo := InstanceLimits{Bytes: 1000}
	read := func(n int) bool { return p.begin(kilo, now) == nil && p.read(kilo, now, n) == nil }
	for _, tc := range []struct {
		after time.Duration
		bytes int
		want  bool
	}{{0, 600, true}, {0, 3400, true}, {2 * time.Second, 1, false}, {1001500 * time.Microsecond, 1, true}, {0, 1, false}, {time.Hour, 1000, true}, {0, 1, false}} {
		now = now.Add(tc.after)
		if got := read(tc.bytes); got != tc.want {
			t.Errorf("%d bytes after %v: %v, want %v", tc.bytes, tc.after, got, tc.want)
		}
	}
	// Of many that are read at the same time one may go over.
	p, now = pace{}, now.Add(time.Hour)
	if got := passed(kilo, 5); got != 5 {
		t.Errorf("%d of 5 begin", got)
	}
	if p.read(kilo, now, 5000) != nil || p.read(kilo, now, 5000) == nil {
		t.Error("want the first of two large requests to pass, and not the second")
	}
	if l := (InstanceLimits{}); passed(l, 1000) != 1000 || p.read(l, now, 1<<40) != nil || passed(l, 1) != 1 {
		t.Error("there is a limit where none is set")
	}
}

// TestRateIsRefusedRetryably over both protocols, for the instance that is too fast alone.
func TestRateIsRefusedRetryably(t *testing.T) {
	d := open(t, false, func(c *Config) { c.Limits.Instance.Bytes = 1 }) // a request is paid for after minutes
	p := good(t)
	if res, body := d.do(t, req{body: p}); res.StatusCode != 200 {
		t.Errorf("the first: %s %q", res.Status, body)
	}
	res, body := d.do(t, req{body: p})
	if res.StatusCode != 429 || res.Header.Get("Retry-After") != "1" || !strings.Contains(string(body), "more than 1 bytes a second") {
		t.Errorf("%s, Retry-After %q, %q", res.Status, res.Header.Get("Retry-After"), body)
	}
	st := status.Convert(d.export(t, p))
	if st.Code() != codes.ResourceExhausted || len(st.Details()) != 1 {
		t.Fatalf("gRPC: %v %v", st, st.Details())
	}
	if ri, is := st.Details()[0].(*errdetails.RetryInfo); !is || ri.GetRetryDelay().AsDuration() != retryAfter {
		t.Errorf("gRPC: %v", st.Details())
	}
	if res, _ := d.do(t, req{body: p, header: http.Header{"Authorization": {"another"}}}); res.StatusCode != 200 {
		t.Errorf("another instance: %s", res.Status)
	}
	if n := testutil.ToFloat64(d.led.Of(otlpwire.Traces).Refused(ledger.RefusedRate)); n != 2 {
		t.Errorf("refused{rate} is %v, want 2", n)
	}
	if n := d.items(); n != 2 {
		t.Errorf("%d items came through, want 2", n)
	}
}
