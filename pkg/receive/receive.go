// Package receive is the OTLP receiver, over gRPC and HTTP, for all three signals. It checks a
// request, stamps it with the instance of its sender and answers only after the next stage has
// accepted it.
//
//	r, err := receive.New(cfg, receive.Deps{Identify: ..., Accept: ..., ...})
//	stages = append(stages, app.Stage{Name: "receive", Service: r.Service()})
//
// # Promises
//
//   - Success means that Accept has returned nil for every item that the answer
//     does not name as rejected.
//   - The answer's code says correctly whether a retry can succeed (OTLP specification, sections
//     on failures and retries): a temporary failure is UNAVAILABLE or 503 with a pause of a
//     second, never INTERNAL or 500.
//   - A sender whose right to send is revoked is refused also on open connections, and for
//     requests in progress.
//   - A request over which the receiver panics is refused for good, since it would panic again;
//     all others are served as before.
//   - Idle connections do not delay other senders; one instance and one address get no more than
//     Config.Limits.
//   - Bodies are bounded while they are read, before and after decompression, and the bytes of
//     all requests together by Config.MaxInFlight (docs/adr/0006).
//
// # Not here
//
// Authentication (Deps.Identify) and storage (Deps.Accept).
package receive

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/grafana/dskit/services"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config is what an operator may set.
type Config struct {
	GRPC GRPCConfig `yaml:"grpc"`
	HTTP HTTPConfig `yaml:"http"`
	TLS  TLSConfig  `yaml:"tls"`
	// Allows listening beyond loopback without TLS.
	Insecure bool `yaml:"insecure"`
	// The size of one request, both compressed and decompressed; larger ones are refused. The OTLP
	// specification recommends 64 MiB.
	MaxRequest config.Bytes `yaml:"max_request_bytes"`
	// The decompressed bytes of all requests in progress, with the memory of their decompressors.
	// Beyond it requests are refused with a retryable code.
	MaxInFlight config.Bytes `yaml:"max_in_flight_bytes"`
	// How many connections of each protocol may be open. A new one replaces one that has no request
	// in progress; where all have one, the new one waits.
	MaxConnections int `yaml:"max_connections"`
	// Limits bound what one instance and one address may use.
	Limits LimitsConfig `yaml:"limits"`
	// How long a request may take to arrive and be answered.
	RequestTimeout time.Duration `yaml:"request_timeout"`
}

// GRPCConfig is for OTLP/gRPC.
type GRPCConfig struct {
	// The address for OTLP/gRPC, host:port. Empty: none.
	Listen string `yaml:"listen"`
	// After this time connections are closed, so that clients behind a load balancer spread again.
	// 0: never.
	MaxConnectionAge time.Duration `yaml:"max_connection_age"`
}

// HTTPConfig is for OTLP/HTTP.
type HTTPConfig struct {
	// The address for OTLP/HTTP, host:port. Empty: none.
	Listen string     `yaml:"listen"`
	CORS   CORSConfig `yaml:"cors"`
}

// CORSConfig lets browsers send. The names are the collector's.
type CORSConfig struct {
	// The origins from which browsers may send: exact, or with one * as in https://*.example.com. *
	// alone does not allow requests with credentials (sendBeacon, keepalive).
	AllowedOrigins []string `yaml:"allowed_origins"`
	// Request headers that browsers may send, besides Content-Type and Content-Encoding.
	AllowedHeaders []string `yaml:"allowed_headers"`
	// How long a browser may cache the answer to a preflight request, in seconds.
	MaxAge int `yaml:"max_age"`
}

// TLSConfig names files in PEM, which are reloaded when they change.
type TLSConfig struct {
	// A PEM file with the certificate chain. Empty: plain text.
	Cert string `yaml:"cert_file"`
	// A PEM file with the certificate's private key.
	Key string `yaml:"key_file"`
	// A PEM file with the authorities that may sign senders' certificates. At an edge every sender
	// then needs a certificate; at a gateway it may send a token instead. Empty: no client
	// certificates.
	ClientCA string `yaml:"client_ca_file"`
}

// DefaultConfig listens on loopback, on the standard ports of OTLP.
func DefaultConfig() Config {
	return Config{
		GRPC:        GRPCConfig{Listen: "127.0.0.1:4317"},
		HTTP:        HTTPConfig{Listen: "127.0.0.1:4318"},
		MaxRequest:  64 << 20,
		MaxInFlight: 256 << 20,

		MaxConnections: 4096,
		RequestTimeout: time.Minute,
	}
}

// maxRequestBytes is the largest that max_request_bytes may be.
const maxRequestBytes = 1 << 30

// Validate reports all errors at once; section is the key under which c is configured.
func (c Config) Validate(section string) error {
	var errs []error
	for _, l := range []struct{ key, addr string }{{section + ".grpc.listen", c.GRPC.Listen}, {section + ".http.listen", c.HTTP.Listen}} {
		if l.addr == "" {
			continue
		}
		host, _, err := net.SplitHostPort(l.addr)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", l.key, err))
			continue
		}
		ip := net.ParseIP(host)
		loopback := host == "localhost" || (ip != nil && ip.IsLoopback())
		if !loopback && c.TLS.Cert == "" && !c.Insecure {
			errs = append(errs, fmt.Errorf("%s is %s, which others can reach: set %s.tls, or %s.insecure: true to allow plain text", l.key, l.addr, section, section))
		}
	}
	if _, err := c.TLS.load(); err != nil {
		errs = append(errs, fmt.Errorf("%s.tls: %w", section, err))
	}
	if c.MaxRequest < 1<<10 || c.MaxRequest > maxRequestBytes {
		errs = append(errs, fmt.Errorf("%s.max_request_bytes is %v, want 1KiB to 1GiB", section, c.MaxRequest))
	}
	if c.MaxInFlight < c.MaxRequest+maxZstdWindow {
		errs = append(errs, fmt.Errorf("%s.max_in_flight_bytes is %v, want at least %s.max_request_bytes (%v) and 8MiB to decompress", section, c.MaxInFlight, section, c.MaxRequest))
	}
	if c.MaxConnections < 1 {
		errs = append(errs, fmt.Errorf("%s.max_connections is %d, want at least 1", section, c.MaxConnections))
	}
	if c.RequestTimeout < 100*time.Millisecond {
		errs = append(errs, fmt.Errorf("%s.request_timeout is %v, want at least 100ms", section, c.RequestTimeout))
	}
	return errors.Join(append(errs, c.Limits.validate(section+".limits"))...)
}

// Sender is the sender of a request.
type Sender struct {
	Instance envelope.Instance
	Stamp    *otlpwire.Stamp
	pace     pace
}

// NewSender prepares an instance's stamp.
func NewSender(i envelope.Instance) *Sender { return &Sender{Instance: i, Stamp: i.Stamp()} }

// Batch is one request, checked and stamped, or a piece of a request that was too large for a
// message.
type Batch struct {
	Signal   otlpwire.Signal
	Instance string
	Items    int
	Payload  []byte
	// Origin is what the sender says about the request, where Deps.Origin allows it.
	Origin Origin
}

// Origin is the origin of a request whose sender is an edge.
type Origin struct {
	ID      string // the same when the request is sent again; "" for none
	Arrival int64  // at the edge, in Unix nanoseconds; 0 for none
	Load    envelope.Load
}

// maxOriginID is longer than the ids that edges generate.
const maxOriginID = 128

// origin reads the headers of a request. Invalid values are ignored: they could only harm the
// sender itself, because the credential determines its instance.
func (r *Receiver) origin(get func(string) string) (o Origin) {
	if !r.deps.Origin {
		return o
	}
	if id := get(envelope.OriginID); len(id) <= maxOriginID {
		o.ID = id
	}
	if at, err := strconv.ParseInt(get(envelope.OriginArrival), 10, 64); err == nil && at > 0 && at < time.Now().Add(time.Minute).UnixNano() {
		o.Arrival = at
	}
	o.Load, _ = envelope.ParseLoad(get(envelope.OriginLoad))
	return o
}

// ErrFull is wrapped by Accept's errors when there is no room.
var ErrFull = errors.New("no room")

// Credentials identify the sender of a request.
type Credentials struct {
	Authorization string            // the header's value; "" for none
	Certificate   *x509.Certificate // verified; nil for none
}

// Deps are the dependencies of a receiver.
type Deps struct {
	// Identify returns the sender of a request. It is called when the request begins and again
	// when it has arrived.
	Identify func(Credentials) (*Sender, error)
	// Tokens says that senders may have a token instead of a certificate.
	Tokens bool
	// Accept stores a batch. The batch must be durable when Accept returns nil. Accept does not
	// keep the payload. After an error the sender retries.
	Accept func(context.Context, Batch) error
	// Process, if not nil, changes a payload before it is stamped, and returns how many items it
	// has dropped; these count as a success to the sender.
	Process func(sig otlpwire.Signal, payload []byte) (out []byte, dropped int)
	// Origin lets senders declare the origin of a request ([Batch.Origin]).
	Origin bool
	// Over, if not nil, reports that memory is short: then requests are refused before they are read.
	Over func() bool
	// MaxPayload is the largest payload that Accept takes; larger requests are split, and a single
	// item that is larger is rejected.
	MaxPayload int
	Ledger     *ledger.Ledger
	Log        *slog.Logger
}

// Receiver serves OTLP.
type Receiver struct {
	cfg      Config
	deps     Deps
	inFlight atomic.Int64 // bytes
	buffers  sync.Pool    // *[]byte
	limits   otlpwire.Limits
	certs    *certificates
	said     backoff.Repeats

	grpc *grpc.Server
	http *httpServer
	lns  []net.Listener
}

// New returns a receiver that listens when its service starts.
func New(cfg Config, deps Deps) (*Receiver, error) {
	r := &Receiver{cfg: cfg, deps: deps, limits: otlpwire.DefaultLimits}
	r.limits.MaxBytes = int(cfg.MaxRequest)
	r.deps.Log = deps.Log.With("component", "receive")
	r.buffers.New = func() any { return new([]byte) }
	var err error
	if r.certs, err = cfg.TLS.load(); err != nil {
		return nil, err
	}
	r.certs.log, r.certs.optional = r.deps.Log, deps.Tokens
	r.grpc = r.newGRPC(r.certs.config("h2"))
	r.http = r.newHTTP(r.certs.config("http/1.1"))
	return r, nil
}

// Service listens and serves; when it stops it first answers the requests in progress.
func (r *Receiver) Service() services.Service {
	var grpcLn, httpLn net.Listener
	start := func(ctx context.Context) (err error) {
		if grpcLn, err = r.listen(ctx, "OTLP/gRPC", r.cfg.GRPC.Listen); err != nil {
			return err
		}
		httpLn, err = r.listen(ctx, "OTLP/HTTP", r.cfg.HTTP.Listen)
		if err != nil && grpcLn != nil {
			_ = grpcLn.Close()
		}
		return err
	}
	run := func(ctx context.Context) error {
		served := make(chan error, 2) // one a server
		if grpcLn != nil {
			go func() { served <- r.grpc.Serve(grpcLn) }()
		}
		if httpLn != nil {
			go func() { served <- r.http.serve(httpLn) }()
		}
		select {
		case err := <-served:
			return fmt.Errorf("serve OTLP: %w", err)
		case <-ctx.Done():
			r.shutdown()
			return nil
		}
	}
	return services.NewBasicService(start, run, nil)
}

func (r *Receiver) listen(ctx context.Context, what, addr string) (net.Listener, error) {
	if addr == "" {
		return nil, nil
	}
	ln, err := app.Listen(ctx, what, addr)
	if err == nil {
		ln = newGate(ln, r.cfg, r.deps.Ledger)
		r.lns = append(r.lns, ln)
		r.deps.Log.Info("receiving", "protocol", what, "address", ln.Addr().String())
	}
	return ln, err
}

// Addrs returns the addresses on which the receiver listens: gRPC first, then HTTP, as far as they
// are enabled.
func (r *Receiver) Addrs() []string {
	addrs := make([]string, 0, len(r.lns))
	for _, ln := range r.lns {
		addrs = append(addrs, ln.Addr().String())
	}
	return addrs
}

// graceTimeout is how long requests in progress may take when the process stops.
const graceTimeout = 5 * time.Second

func (r *Receiver) shutdown() {
	ctx, cancel := context.WithTimeout(context.Background(), graceTimeout)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() { r.http.shutdown(ctx) })
	wg.Go(func() {
		done := context.AfterFunc(ctx, r.grpc.Stop)
		r.grpc.GracefulStop()
		done()
	})
	wg.Wait()
}

// refusal is an answer other than success.
type refusal struct {
	code   codes.Code
	status int           // HTTP
	retry  time.Duration // 0: the sender must not retry
	reason string        // of the ledger
	text   string
}

func (r *refusal) Error() string { return r.text }

// retryAfter is the pause that a sender is asked to make. SDKs give up after 10 s in total; a
// longer pause makes Python, JavaScript and .NET drop the batch.
const retryAfter = time.Second

func refuse(code codes.Code, status int, reason, format string, args ...any) *refusal {
	return &refusal{code: code, status: status, reason: reason, text: fmt.Sprintf(format, args...)}
}

func busy(reason, text string) *refusal {
	return &refusal{code: codes.Unavailable, status: 503, retry: retryAfter, reason: reason, text: text}
}

// outcome is the result of a request that was accepted, perhaps in part.
type outcome struct {
	rejected int
	message  string
}

// holding is what a request holds: bytes of MaxInFlight.
type holding struct {
	receiver *Receiver
	bytes    int
	instance string // its sender, once it has arrived
}

// admit reserves n bytes.
func (h *holding) admit(n int) *refusal {
	if h.add(n) > int64(h.receiver.cfg.MaxInFlight) {
		h.release(n)
		return busy(ledger.RefusedOverload, "too many bytes in flight")
	}
	return nil
}

// add adds n bytes that need not be asked for, and returns what all requests hold.
func (h *holding) add(n int) int64 {
	h.bytes += n
	return h.receiver.inFlight.Add(int64(n))
}

func (h *holding) release(n int) { h.add(-n) }

// guarded does the work for a request, and then releases what it holds. If it panics, the request is refused as bad data, so
// that an edge that forwards here halves it until it has found the culprit, unless
// it panics with the value pass, which is for others to recover.
func (r *Receiver) guarded(sig otlpwire.Signal, pass any, work func(*holding) (outcome, *refusal)) (out outcome, ref *refusal) {
	held := &holding{receiver: r}
	defer func() { held.release(held.bytes) }()
	err := fault.Guard(func() error {
		out, ref = work(held)
		return nil
	})
	p, panicked := errors.AsType[*fault.Panic](err)
	switch {
	case !panicked:
		return out, ref
	case p.Value == pass:
		panic(pass)
	}
	r.deps.Ledger.Panics(ledger.PanicReceiver).Inc()
	if more, due := r.said.Due("panic", time.Now()); due {
		r.deps.Log.Error("bug: a request made the receiver panic; it is refused", "signal", sig, "instance", held.instance, "err", p, "stack", p.Stack, "more_since_last_said", more)
	}
	return outcome{}, refuse(codes.InvalidArgument, 400, ledger.RefusedMalformed, "this request makes penstock panic, which is a bug: it is not accepted, and sent again it would not be accepted either")
}

// requirement says what the rejected items of a partial success violate.
var requirement = [...]string{
	otlpwire.Traces: "a span needs one trace ID (16 bytes, not zero) and one span ID (8 bytes, not zero), and other IDs of those lengths",
	otlpwire.Metrics: fmt.Sprintf("a data point needs a metric with a name, bucket counts one more than the bounds, finite rising bounds, "+
		"a scale from -11 to 52, exemplar IDs of 16 and 8 bytes, and at most %d attributes", otlpwire.MaxAttributes),
	otlpwire.Logs: "a log record's trace ID has 16 bytes or none, its span ID 8 or none",
}

// take handles every request: check, mend, stamp, split, accept. It keeps no reference to it.
func (r *Receiver) take(ctx context.Context, sig otlpwire.Signal, sender *Sender, from Origin, in request) (outcome, *refusal) {
	led, payload := r.deps.Ledger.Of(sig), in.payload
	rep, err := otlpwire.Scan(sig, payload, r.limits)
	if err == nil && rep.Items == 0 && in.foreign(sig) {
		return r.nothing(sig, in), nil
	}
	if err == nil && !rep.Sound() {
		payload, err = otlpwire.Mend(sig, payload)
	}
	if err != nil {
		return outcome{}, refuse(codes.InvalidArgument, 400, ledger.RefusedMalformed, "%v%s", err, in.hint(sig, r.limits))
	}
	large, items, dropped := 0, rep.Items-rep.Invalid, 0
	if r.deps.Process != nil && items > 0 {
		payload, dropped = r.deps.Process(sig, payload)
		items -= dropped
	}
	if items > 0 {
		buf := r.buffer()
		defer r.recycle(buf)
		if *buf, err = sender.Stamp.Append((*buf)[:0], payload); err != nil {
			return outcome{}, refuse(codes.InvalidArgument, 400, ledger.RefusedMalformed, "%v", err)
		}
		large, err = r.accept(ctx, Batch{Signal: sig, Instance: sender.Instance.ID, Items: items, Payload: *buf, Origin: from})
		switch {
		case errors.Is(err, ErrFull):
			return outcome{}, busy(ledger.RefusedFull, err.Error())
		case err != nil:
			return outcome{}, busy(ledger.RefusedUnavailable, err.Error())
		}
	}
	led.Accepted.Add(float64(dropped))
	led.Filtered.Add(float64(dropped))
	led.Refused(ledger.RefusedInvalid).Add(float64(rep.Invalid))
	led.Refused(ledger.RefusedTooLarge).Add(float64(large))
	led.Sanitised.Add(float64(rep.BadStrings))
	led.Crowded.Add(float64(rep.Crowded))
	out := outcome{rejected: rep.Invalid + large, message: r.why(sig, rep.Invalid, large)}
	if rep.Invalid > 0 && rep.Invalid == rep.Items {
		out.message += in.hint(sig, r.limits)
	}
	return out, nil
}

// why returns the message of a partial success.
func (r *Receiver) why(sig otlpwire.Signal, invalid, large int) string {
	var parts []string
	if invalid > 0 {
		parts = append(parts, fmt.Sprintf("%d rejected: %s", invalid, requirement[sig]))
	}
	if large > 0 {
		parts = append(parts, fmt.Sprintf("%d rejected: larger than %d bytes, or with a resource and scope larger than half of that", large, r.deps.MaxPayload))
	}
	return strings.Join(parts, "; ")
}

// accept passes b to Deps.Accept, split if it is too large, and counts the accepted items. It
// returns how many items are too large for any message.
func (r *Receiver) accept(ctx context.Context, b Batch) (tooLarge int, err error) {
	id, count := b.Origin.ID, 0
	piece := func(payload []byte, items int) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		b.Payload, b.Items = payload, items
		if count++; id != "" && count > 1 {
			b.Origin.ID = id + "-" + strconv.Itoa(count) // a request is always split in the same way
		}
		if err := r.deps.Accept(ctx, b); err != nil {
			return err
		}
		r.deps.Ledger.Of(b.Signal).Accepted.Add(float64(items))
		return nil
	}
	if len(b.Payload) <= r.deps.MaxPayload {
		return 0, piece(b.Payload, b.Items)
	}
	return otlpwire.Cut(b.Signal, b.Payload, r.deps.MaxPayload, piece)
}

// refused counts a refusal and logs it at debug level: a hostile sender must
// not fill our log.
func (r *Receiver) refused(sig otlpwire.Signal, ref *refusal) {
	r.deps.Ledger.Of(sig).Refused(ref.reason).Inc()
	r.deps.Log.Debug("refused", "signal", sig, "reason", ref.reason, "err", ref.text)
}

// maxPooled is the largest buffer that is kept for reuse: one huge request must not make every small
// one after it count as huge.
const maxPooled = 1 << 20

func (r *Receiver) buffer() *[]byte { return r.buffers.Get().(*[]byte) }

func (r *Receiver) recycle(buf *[]byte) {
	if cap(*buf) <= maxPooled {
		r.buffers.Put(buf)
	}
}

// begin refuses a request that need not be read.
func (r *Receiver) begin(authorization string, state *tls.ConnectionState) *refusal {
	if r.deps.Over != nil && r.deps.Over() {
		return busy(ledger.RefusedOverload, "the memory limit is reached")
	}
	sender, ref := r.sender(authorization, state)
	if ref == nil {
		ref = sender.pace.begin(r.cfg.Limits.Instance, time.Now())
	}
	return ref
}

// arrived identifies the sender of a request that was read, or refuses.
func (r *Receiver) arrived(held *holding, authorization string, state *tls.ConnectionState, bytes int) (*Sender, *refusal) {
	sender, ref := r.sender(authorization, state)
	if ref == nil {
		held.instance = sender.Instance.ID
		ref = sender.pace.read(r.cfg.Limits.Instance, time.Now(), bytes)
	}
	return sender, ref
}

// sender identifies the sender, or refuses. It is called twice: while a request arrives, which may
// take RequestTimeout, its sender's right to send may be revoked.
func (r *Receiver) sender(authorization string, state *tls.ConnectionState) (sender *Sender, ref *refusal) {
	cert, err := r.certs.of(state)
	if err == nil {
		sender, err = r.deps.Identify(Credentials{authorization, cert})
	}
	if err != nil {
		return nil, refuse(codes.Unauthenticated, 401, ledger.RefusedUnauthorized, "%v", err)
	}
	return sender, nil
}
