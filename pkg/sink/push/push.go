// Package push sends a request to an HTTP backend and says what its answer
// means, in the words of package fault.
//
// # Promises
//
//   - Redirects are not followed and the environment's proxy is not used: data
//     and credentials go to the configured host only.
//   - No more than 64 KiB of an answer is read, within the request's deadline.
//
// # Not here
//
// What is sent: packages remotewrite and loki.
package push

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
)

// Client posts to one URL.
type Client struct {
	url     string
	headers http.Header
	http    *http.Client
	// Refused lets a backend name answers of its own that will not heal. nil
	// for none.
	Refused func(status int, body string) bool
}

const (
	timeout = 30 * time.Second
	maxBody = 64 << 10
)

// New returns a client. base is what the operator gave; path is added when base
// has none.
func New(base, path string, headers map[string]string) (*Client, error) {
	u, err := url.Parse(base)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, fmt.Errorf("backend URL %q: want http://host:port or https://host:port", base)
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = path
	}
	h := http.Header{"User-Agent": {"penstock"}}
	for k, v := range headers {
		h.Set(k, v)
	}
	tr := http.DefaultTransport.(*http.Transport).Clone()
	tr.Proxy = nil
	tr.DisableCompression = true
	tr.MaxResponseHeaderBytes = 64 << 10
	tr.MaxIdleConnsPerHost = 16
	return &Client{url: u.String(), headers: h, http: &http.Client{
		Transport:     tr,
		Timeout:       timeout,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// TLS sets what servers are trusted and which certificate is shown; nil leaves the
// system's roots. The configuration is copied: a transport writes into its own.
func (c *Client) TLS(cfg *tls.Config) {
	c.http.Transport.(*http.Transport).TLSClientConfig = cfg.Clone()
}

// maxPage bounds the answer to a question.
const maxPage = 8 << 20

// Get returns what the backend says under another path: path stands in the place of
// instead, the end of the URL that data goes to. A URL without that end is an error.
func (c *Client) Get(ctx context.Context, instead, path string) ([]byte, error) {
	base, ok := strings.CutSuffix(c.url, instead)
	if !ok {
		return nil, fmt.Errorf("%s does not end with %s: its backend cannot be asked", c.url, instead)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+path, nil)
	if err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	req.Header.Set("User-Agent", "penstock")
	res, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = res.Body.Close() }()
	text, err := io.ReadAll(io.LimitReader(res.Body, maxPage))
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answered %s: %s", base+path, res.Status, clean(string(text[:min(len(text), 200)])))
	}
	return text, err
}

// Post returns nil on any 2xx.
func (c *Client) Post(ctx context.Context, body []byte) error {
	_, err := c.Send(ctx, body, nil)
	return err
}

// Send posts with further headers and returns the answer of a 2xx, as much of it as
// could be read.
func (c *Client) Send(ctx context.Context, body []byte, headers http.Header) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	req.Header = c.headers.Clone()
	maps.Copy(req.Header, headers)
	res, err := c.http.Do(req)
	if err != nil {
		return nil, err // names method and URL
	}
	text, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
	_ = res.Body.Close()
	if res.StatusCode/100 == 2 {
		return text, nil // what follows a success is not our business
	}
	if err != nil {
		return nil, fmt.Errorf("answer of %s: %w", c.url, err)
	}
	return nil, c.meaning(res, clean(string(text)))
}

func (c *Client) meaning(res *http.Response, text string) error {
	err := fmt.Errorf("%s answered %s: %s", c.url, res.Status, text)
	switch code := res.StatusCode; {
	case c.Refused != nil && c.Refused(code, text):
		return fault.Permanent(ledger.DeadRefused, err)
	case code == 429 || code/100 == 5:
		return fault.After(err, retryAfter(res.Header.Get("Retry-After"), time.Now()))
	case code == 401, code == 403, code == 404, code == 405, code/100 == 3:
		return fault.Configuration(err)
	case code/100 == 4:
		return fault.Permanent(ledger.DeadRefused, err)
	}
	return err
}

// retryAfter reads seconds or a date; what is neither, or past, is 0.
func retryAfter(v string, now time.Time) time.Duration {
	if s, err := strconv.ParseInt(v, 10, 32); err == nil {
		return max(0, time.Duration(s)*time.Second)
	}
	if at, err := http.ParseTime(v); err == nil {
		return max(0, at.Sub(now))
	}
	return 0
}

// clean cuts an answer for our log: printable and at most 512 bytes.
func clean(s string) string {
	const most = 512
	if len(s) > most {
		s = s[:most]
	}
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r == 0x2028 || r == 0x2029 || r == '\uFFFD' {
			return ' '
		}
		return r
	}, s))
}
