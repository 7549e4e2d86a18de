package receive

import (
	"net/http"
	"strconv"
	"strings"
)

// allow tells the browser whether a page's origin may send, and read the answer. Where the
// operator has listed the origin, the page may send in any mode: sendBeacon and keepalive requests
// have the credentials mode, whether there are credentials or not.
func (c CORSConfig) allow(w http.ResponseWriter, req *http.Request) {
	if len(c.AllowedOrigins) == 0 {
		return
	}
	h := w.Header()
	h.Add("Vary", "Origin") // also without permission, and without an Origin
	allowed, named := c.find(req.Header.Get("Origin"))
	if !allowed {
		return
	}
	h.Set("Access-Control-Allow-Origin", req.Header.Get("Origin"))
	if named {
		h.Set("Access-Control-Allow-Credentials", "true")
	}
	if req.Method != http.MethodOptions {
		return
	}
	h.Set("Access-Control-Allow-Methods", http.MethodPost)
	h.Set("Access-Control-Allow-Headers", strings.Join(append([]string{"Content-Type", "Content-Encoding"}, c.AllowedHeaders...), ", "))
	if c.MaxAge > 0 {
		h.Set("Access-Control-Max-Age", strconv.Itoa(c.MaxAge))
	}
	// A page from the internet asks before it sends to a private network.
	if named && req.Header.Get("Access-Control-Request-Private-Network") == "true" {
		h.Set("Access-Control-Allow-Private-Network", "true")
	}
}

// find reports whether an origin may send, and whether that is because a pattern names it, and
// not because every origin may.
func (c CORSConfig) find(origin string) (allowed, named bool) {
	if origin == "" {
		return false, false
	}
	for _, p := range c.AllowedOrigins {
		if matchOrigin(p, origin) {
			allowed = true
			named = named || names(p)
		}
	}
	return allowed, named
}

// matchOrigin compares an origin with a pattern that may hold one *.
func matchOrigin(pattern, origin string) bool {
	before, after, wild := strings.Cut(pattern, "*")
	if !wild {
		return strings.EqualFold(pattern, origin)
	}
	return len(origin) >= len(before)+len(after) && strings.HasPrefix(origin, before) && strings.HasSuffix(origin, after)
}

// names reports whether a pattern fixes the end of a host, so that not everybody can register one
// that matches: https://*.shop.example and http://localhost:* do; *, https://* and
// https://shop.* do not.
func names(pattern string) bool {
	before, after, wild := strings.Cut(pattern, "*")
	if !wild {
		return !strings.EqualFold(pattern, "null") // sent by pages without an origin
	}
	if after == "" { // the port, after a whole host
		_, host, _ := strings.Cut(before, "://")
		return len(host) > 1 && strings.HasSuffix(host, ":")
	}
	if _, host, found := strings.Cut(after, "://"); found {
		after = host
	}
	host, _, _ := strings.Cut(after, ":")
	return strings.Trim(host, ".") != ""
}
