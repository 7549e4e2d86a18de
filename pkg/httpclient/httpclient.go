// Package httpclient sends a request to an HTTP backend and classifies its answer, in the terms of package
// fault.
//
// # Promises
//
//   - Redirects are not followed and the environment's proxy is not used: data
//     and credentials go to the configured host only.
//   - No more than 64 KiB of an answer is read, within the request's deadline.
//
// # Not here
//
// The content of requests: packages prometheus and loki.
package httpclient

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
)

// Client posts to one URL.
type Client struct {
	url     string
	headers http.Header
	http    *http.Client
	access  Access
	// Refused, if not nil, lets a backend's writer recognise permanent failures: it returns the reason
	// for dead letters, or [Misconfigured]; empty for other answers.
	Refused func(status int, body string) (reason string)
}

// Misconfigured means that the backend refuses because of its configuration, which an operator must
// change.
const Misconfigured = "misconfigured"

// blocked is Loki's answer while an operator has blocked a tenant: a success that stores nothing.
const blocked = 260

const (
	timeout = 30 * time.Second
	maxBody = 64 << 10
)

// New returns a client. base is the configured address; path is added if base has none.
func New(base, path string, headers map[string]string) (*Client, error) {
	u, err := url.Parse(base)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, fmt.Errorf("backend URL %q: want http://host:port or https://host:port", base)
	}
	if u.User != nil {
		return nil, errors.New("backend URL: a name or password in it would be logged; set basic_auth")
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

// TLS sets which servers are trusted and which certificate is presented; nil means the system's roots. The
// configuration is copied, because a transport modifies its own.
func (c *Client) TLS(cfg *tls.Config) {
	c.http.Transport.(*http.Transport).TLSClientConfig = cfg.Clone()
}

// Use sets credentials and tenants. section is the key under which a is in the operator's configuration.
func (c *Client) Use(section string, a Access) error {
	if err := a.Open(section, strings.HasPrefix(c.url, "https://")); err != nil {
		return err
	}
	u, err := url.Parse(c.url)
	if err != nil {
		return err
	}
	cfg, err := a.TLS.LoadFor(section+".tls", u.Hostname())
	if err != nil {
		return err
	}
	c.TLS(cfg)
	c.access = a
	return nil
}

// maxPage bounds the answer to a query.
const maxPage = 8 << 20

// Get returns the backend's page at another path: path replaces instead, the end of the URL to which data
// is sent. A URL without that end is an error.
func (c *Client) Get(ctx context.Context, instead, path string) ([]byte, error) {
	base, ok := strings.CutSuffix(c.url, instead)
	if !ok {
		return nil, fmt.Errorf("%s does not end with %s, so the backend cannot be queried", c.url, instead)
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+path, nil)
	if err != nil {
		return nil, fmt.Errorf("request: %w", err)
	}
	if req.Header, err = c.access.Of(""); err != nil {
		return nil, err
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

// Gzip appends a compressed body to dst.
func Gzip(dst, body []byte) []byte {
	out := sliceWriter(dst)
	z, _ := gzip.NewWriterLevel(&out, gzip.BestSpeed) // the level is valid
	_, _ = z.Write(body)
	_ = z.Close() // writing to a slice does not fail
	return out
}

type sliceWriter []byte

func (w *sliceWriter) Write(p []byte) (int, error) {
	*w = append(*w, p...)
	return len(p), nil
}

// ErrBegun says that a part of a payload was stored before the request that failed.
var ErrBegun = errors.New("payload partially stored before the error")

// Error is an answer other than success.
type Error struct {
	Status int
	text   string
}

func (e *Error) Error() string { return e.text }

// Send posts data of an instance in the form of body, with further headers, and
// returns header and body of the answer, as much of it as could be read. An answer other than success is
// an [Error] with a mark of package fault.
func (c *Client) Send(ctx context.Context, instance string, body []byte, headers http.Header) (http.Header, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url, bytes.NewReader(body))
	if err != nil {
		return nil, nil, fmt.Errorf("request: %w", err)
	}
	own, err := c.access.Of(instance)
	if err != nil {
		return nil, nil, err
	}
	req.Header = c.headers.Clone()
	maps.Copy(req.Header, headers)
	maps.Copy(req.Header, own)
	res, err := c.http.Do(req)
	if err != nil {
		return nil, nil, Untrusted(err) // its text has method and URL
	}
	text, err := io.ReadAll(io.LimitReader(res.Body, maxBody))
	_ = res.Body.Close()
	if res.StatusCode/100 == 2 && res.StatusCode != blocked {
		return res.Header, text, nil // an error after a success does not matter
	}
	if err != nil {
		return nil, nil, fmt.Errorf("answer of %s: %w", c.url, err)
	}
	if auth := req.Header.Get("Authorization"); auth != "" {
		own.Set("Authorization", auth) // set by the caller
	}
	return res.Header, text, c.meaning(res, clean(c.access.hide(string(text), own)))
}

// hide removes our credentials from an answer, which may echo them.
func (a *Access) hide(text string, own http.Header) string {
	const shortest = 4
	for name, values := range own {
		if name == http.CanonicalHeaderKey(a.Tenant.header()) {
			continue // not secret, and useful
		}
		for _, v := range values {
			_, secret, found := strings.Cut(v, " ") // after Bearer or Basic
			if !found {
				secret = v
			}
			if len(secret) >= shortest {
				text = strings.ReplaceAll(text, secret, "[redacted]")
			}
		}
	}
	return text
}

// Untrusted marks an error of a connection in which one side does not trust the other's certificate as one
// of configuration. Other errors are returned unchanged.
func Untrusted(err error) error {
	remote, alert := errors.AsType[*net.OpError](err) // TLS alerts have no exported type
	alert = alert && remote.Op == "remote error"
	_, verify := errors.AsType[*tls.CertificateVerificationError](err)
	_, plain := errors.AsType[tls.RecordHeaderError](err)
	_, authority := errors.AsType[x509.UnknownAuthorityError](err)
	_, invalid := errors.AsType[x509.CertificateInvalidError](err)
	_, name := errors.AsType[x509.HostnameError](err)
	if alert || verify || plain || authority || invalid || name {
		return fault.Configuration(err)
	}
	return err
}

func (c *Client) meaning(res *http.Response, text string) error {
	err := &Error{res.StatusCode, fmt.Sprintf("%s answered %s: %s", c.url, res.Status, text)}
	if c.Refused != nil {
		switch reason := c.Refused(res.StatusCode, text); reason {
		case "":
		case Misconfigured:
			return fault.Sender(fault.Configuration(err))
		default:
			return fault.Permanent(reason, err)
		}
	}
	switch code := res.StatusCode; {
	case code == 429:
		return fault.Sender(fault.After(err, retryAfter(res.Header.Get("Retry-After"), time.Now())))
	case code/100 == 5:
		return fault.After(err, retryAfter(res.Header.Get("Retry-After"), time.Now()))
	case code == 401, code == 403, code == 404, code == blocked:
		return fault.Sender(fault.Configuration(err))
	case code == 405, code/100 == 3:
		return fault.Configuration(err)
	case code == http.StatusRequestEntityTooLarge:
		return fault.Permanent(ledger.DeadTooLarge, err)
	case code/100 == 4:
		return fault.Permanent(ledger.DeadRefused, err)
	}
	return err
}

// retryAfter reads seconds or a date; 0 for anything else, and for a date in the past.
func retryAfter(v string, now time.Time) time.Duration {
	if s, err := strconv.ParseInt(v, 10, 32); err == nil {
		return max(0, time.Duration(s)*time.Second)
	}
	if at, err := http.ParseTime(v); err == nil {
		return max(0, at.Sub(now))
	}
	return 0
}

// clean makes an answer fit for our log: printable and at most 512 bytes.
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
