package receive

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
)

func TestBrowsersMaySend(t *testing.T) {
	d := open(t, false, func(c *Config) {
		c.HTTP.CORS = CORSConfig{AllowedOrigins: []string{"https://shop.example", "https://*.shop.example"}, AllowedHeaders: []string{"X-Custom"}, MaxAge: 600}
	})
	for origin, ok := range map[string]bool{"https://shop.example": true, "https://a.shop.example": true, "https://evil.example": false, "https://shop.example.evil": false, "null": false} {
		res, _ := d.do(t, req{method: http.MethodOptions, header: http.Header{"Origin": {origin}, "Access-Control-Request-Method": {"POST"}}})
		h := res.Header
		got := h.Get("Access-Control-Allow-Origin") == origin && strings.Contains(h.Get("Access-Control-Allow-Headers"), "X-Custom") && h.Get("Access-Control-Max-Age") == "600"
		if res.StatusCode != 204 || got != ok {
			t.Errorf("preflight from %s: %s %v, want allowed: %v", origin, res.Status, h, ok)
		}
		res, _ = d.do(t, req{body: []byte(goodJSON), ctype: typeJSON, header: http.Header{"Origin": {origin}}})
		if res.StatusCode != 200 || (res.Header.Get("Access-Control-Allow-Origin") == origin) != ok {
			t.Errorf("request from %s: %s %v", origin, res.Status, res.Header)
		}
	}
}

// beacon is what Chromium asks before it sends a Blob of application/json by
// navigator.sendBeacon, or by fetch with keepalive and credentials, and what it sends then.
func beacon(origin string, private bool) (preflight, request http.Header) {
	common := http.Header{
		"Origin": {origin}, "Accept": {"*/*"}, "Accept-Encoding": {"gzip, deflate, br, zstd"}, "Accept-Language": {"en-GB,en;q=0.9"}, "Connection": {"keep-alive"},
		"Referer": {origin + "/"}, "Sec-Fetch-Dest": {"empty"}, "Sec-Fetch-Mode": {"cors"}, "Sec-Fetch-Site": {"cross-site"},
		"User-Agent": {"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36"},
	}
	preflight, request = common.Clone(), common
	preflight["Access-Control-Request-Method"], preflight["Access-Control-Request-Headers"] = []string{"POST"}, []string{"content-type"}
	if private {
		preflight["Access-Control-Request-Private-Network"] = []string{"true"}
	}
	request["Cookie"] = []string{"session=1"}
	return preflight, request
}

// TestBeacons: a page whose origin is named may send with credentials, and nobody else.
func TestBeacons(t *testing.T) {
	const none, plain, credentials = "none", "plain", "credentials"
	for _, tc := range []struct {
		allowed []string
		origin  string
		want    string
	}{
		{[]string{"https://shop.example"}, "https://shop.example", credentials},
		{[]string{"https://SHOP.example"}, "https://shop.example", credentials},
		{[]string{"https://shop.example"}, "https://evil.example", none},
		{[]string{"https://*.shop.example"}, "https://a.shop.example", credentials},
		{[]string{"https://*.shop.example:8443"}, "https://a.shop.example:8443", credentials},
		{[]string{"https://*.shop.example"}, "https://shop.example.evil", none},
		{[]string{"*://shop.example"}, "http://shop.example", credentials},
		{[]string{"http://localhost:*"}, "http://localhost:3000", credentials},
		{[]string{"*", "https://shop.example"}, "https://shop.example", credentials},
		{[]string{"*", "https://shop.example"}, "https://evil.example", plain},
		{[]string{"*"}, "https://shop.example", plain},
		{[]string{"https://*"}, "https://shop.example", plain},
		{[]string{"https://*:8443"}, "https://evil.example:8443", plain},
		{[]string{"*://"}, "https://evil.example", none},
		{[]string{"https://shop*"}, "https://shop.evil.example", plain},
		{[]string{"https://*."}, "https://evil.", plain},
		{[]string{"null"}, "null", plain},
		{nil, "https://shop.example", none},
	} {
		d := open(t, false, func(c *Config) { c.HTTP.CORS = CORSConfig{AllowedOrigins: tc.allowed, MaxAge: 600} })
		for _, private := range []bool{false, true} {
			preflight, request := beacon(tc.origin, private)
			res, _ := d.do(t, req{method: http.MethodOptions, ctype: "-", header: preflight})
			checkCORS(t, tc.allowed, tc.origin, tc.want, res)
			h := res.Header
			if res.StatusCode != http.StatusNoContent || (h.Get("Access-Control-Allow-Private-Network") == "true") != (private && tc.want == credentials) {
				t.Errorf("preflight of %s where %v may: %s %v", tc.origin, tc.allowed, res.Status, h)
			}
			if may := h.Get("Access-Control-Allow-Methods") == "POST" && strings.Contains(strings.ToLower(h.Get("Access-Control-Allow-Headers")), "content-type"); may != (tc.want != none) {
				t.Errorf("preflight of %s where %v may: %v", tc.origin, tc.allowed, h)
			}
			res, _ = d.do(t, req{body: []byte(goodJSON), ctype: typeJSON, header: request})
			checkCORS(t, tc.allowed, tc.origin, tc.want, res)
			res, _ = d.do(t, req{body: []byte("no JSON"), ctype: typeJSON, header: request}) // a page may read why
			checkCORS(t, tc.allowed, tc.origin, tc.want, res)
		}
		if d.items() != 2 {
			t.Errorf("%d items came through: who may not read answers may still send", d.items())
		}
	}
}

func checkCORS(t *testing.T, allowed []string, origin, want string, res *http.Response) {
	t.Helper()
	h := res.Header
	got := "none"
	switch {
	case h.Get("Access-Control-Allow-Origin") != "" && h.Get("Access-Control-Allow-Origin") != origin:
		got = "another origin"
	case h.Get("Access-Control-Allow-Origin") == origin && h.Get("Access-Control-Allow-Credentials") == "true":
		got = "credentials"
	case h.Get("Access-Control-Allow-Origin") == origin && h.Get("Access-Control-Allow-Credentials") == "":
		got = "plain"
	}
	if got != want || (len(allowed) > 0) != slices.Contains(h.Values("Vary"), "Origin") {
		t.Errorf("%s, where %v may: %s %v, want %s", origin, allowed, res.Status, h, want)
	}
}

// TestAnswersAreForPeople: what stands in JSON is not written for HTML.
func TestAnswersAreForPeople(t *testing.T) {
	d := open(t, true, nil)
	res, out := d.do(t, req{body: []byte(goodJSON), ctype: typeJSON})
	var st struct{ Message string }
	if err := json.Unmarshal(out, &st); err != nil || res.StatusCode != 401 || strings.Contains(string(out), `\u00`) || !strings.Contains(string(out), "<token> & more") {
		t.Errorf("%s %s: %v", res.Status, out, err)
	}
	partial := jsonResponse(0, outcome{rejected: 1, message: "a <b> & c"})
	if want := `{"partialSuccess":{"errorMessage":"a <b> & c","rejectedSpans":"1"}}`; string(partial) != want {
		t.Errorf("%s, want %s", partial, want)
	}
}
