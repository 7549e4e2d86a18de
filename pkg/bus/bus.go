// Package bus is the only package that imports the NATS client: connections,
// publishing, lanes and the topology of the hub. docs/bus.md documents the
// contract for third parties.
//
//	conn, err := bus.Connect(cfg, log)
//	ack := conn.PublishAsync(msg)                // in order; ack.Wait is the promise
//	lane, err := conn.OpenLane(ctx, laneConfig)  // one ordered reader of one partition
//	r, err := conn.OpenReader(ctx, stream, seq)  // of a stream that one process owns
//
// # Promises
//
//   - A publish is done when the stream's leader has acknowledged it, with the
//     durability that the stream has. Nothing is buffered while disconnected.
//   - A [Lane] has one owner and delivers in order without a gap from its floor;
//     where it cannot, it reports that and starts again at the floor.
//   - A [Journal] has one writer: one that has been replaced can store nothing.
//   - The subject is the identity: [Delivery.Instance] comes from the subject
//     that the credential allowed, never from a header or body.
//
// # Not here
//
// What a body means. Who should own a partition.
package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/ledger"
)

// Config says how to reach the hub.
type Config struct {
	// Addresses of the hub, as nats:// or tls://, or as ws:// or wss:// (WebSocket) where only port
	// 443 is open; several are separated by commas.
	URL string `yaml:"url"`
	// A file with a NATS credential.
	Creds string `yaml:"creds"`
	// The user name, for a hub without credential files.
	User string `yaml:"user"`
	// The password of user; it is never printed. Write ${HUB_PASSWORD} and set that in the
	// environment.
	Pass config.Secret `yaml:"password"`
	// The token, for a server with authorization.token.
	Token config.Secret    `yaml:"token"`
	TLS   config.ClientTLS `yaml:"tls"`
	// Starts TLS before anything else is sent, for a server with tls.handshake_first, which offers
	// no plain text at all.
	HandshakeFirst bool `yaml:"tls_handshake_first"`
	// Allows plain text, nats:// or ws://, to a hub on another machine: anyone on the network path
	// can read the credential and all telemetry.
	Insecure bool `yaml:"insecure"`
	// The prefix of the subjects on which answers arrive, for a credential that may subscribe to no
	// other. Empty: _INBOX_<name>.
	InboxPrefix string `yaml:"inbox_prefix"`

	// Name shows in the server's connection list.
	Name string `yaml:"-"`
	// Counts, if not nil, counts what goes wrong with the connection, and shows whether there is one.
	Counts *ledger.Ledger `yaml:"-"`
	// InProcess connects to a server in this process instead of to URL.
	InProcess interface{ InProcessConn() (net.Conn, error) } `yaml:"-"`
}

// Validate reports every mistake at once; section is the key of c in the configuration.
func (cfg Config) Validate(section string) error {
	if cfg.InProcess != nil {
		return nil
	}
	var errs []error
	for u := range strings.SplitSeq(cfg.URL, ",") {
		parsed, err := url.Parse(strings.TrimSpace(u))
		if err == nil && (parsed.Host == "" || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, parsed.Scheme)) {
			err = errors.New("want nats://host:4222, tls://host:4222, ws://host or wss://host:443")
		}
		if err == nil && cfg.plain(parsed) {
			err = fmt.Errorf("plain text: others can read the credential and all data; write tls:// or wss://, or set %s.insecure: true", section)
		}
		if wrong, is := errors.AsType[*url.Error](err); is {
			err = wrong.Err // it would print the URL, password and all
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s.url: %q: %w", section, redacted(u), err))
		}
	}
	ways := 0
	for _, set := range []bool{cfg.Creds != "", cfg.User != "", cfg.Token != ""} {
		if set {
			ways++
		}
	}
	if ways > 1 {
		errs = append(errs, fmt.Errorf("%s.creds, %s.user and %s.token are alternatives: set one", section, section, section))
	}
	_, err := cfg.TLS.Load(section + ".tls")
	return errors.Join(append(errs, err)...)
}

// plain reports whether the connection to a server on another machine is in plain text.
func (cfg Config) plain(u *url.URL) bool {
	if cfg.Insecure || cfg.HandshakeFirst || cfg.TLS != (config.ClientTLS{}) || u.Scheme == "tls" || u.Scheme == "wss" {
		return false
	}
	return !config.Loopback(u.Hostname())
}

// ApplyEnv overrides the file with the environment.
func (cfg *Config) ApplyEnv(getenv func(string) string) {
	config.Env(getenv, "HUB_URL", &cfg.URL)
	config.Env(getenv, "HUB_CREDS", &cfg.Creds)
	config.Env(getenv, "HUB_CA_FILE", &cfg.TLS.CA)
	cfg.Insecure = cfg.Insecure || getenv("HUB_INSECURE") == "true"
}

// CheckFiles reports what is wrong with the file of the credential. A start does not check it: the
// file is read at each connection, and may be created later.
func (cfg Config) CheckFiles(section string) error {
	if cfg.Creds == "" || cfg.InProcess != nil {
		return nil
	}
	if err := checkCreds(cfg.Creds); err != nil {
		return fmt.Errorf("%s.creds: %w", section, err)
	}
	return nil
}

func checkCreds(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if _, err = nkeys.ParseDecoratedJWT(text); err == nil {
		_, err = nkeys.ParseDecoratedUserNKey(text)
	}
	if err != nil {
		return fmt.Errorf("%s is no NATS credential (a user's JWT and seed, as nsc writes them): %w", file, err)
	}
	return nil
}

// Conn is a connection to one NATS system.
type Conn struct {
	nc  *nats.Conn
	js  jetstream.JetStream
	log *slog.Logger

	pulls atomic.Int32 // readers that have requests out
	// answered is when the hub last answered a publish to a stream, *atomic.Int64 in Unix
	// nanoseconds by [streamPart].
	answered sync.Map
	// denials are the server's last permission errors.
	denials *denials
	said    backoff.Repeats
	silence func() // ends [Conn.sayWhy], and waits for it
}

const (
	// publishTimeout is how long a PubAck may take before the publish counts as
	// failed, and how long a stream may acknowledge nothing at all before all pending
	// publishes to it do. A leader election of a three-node hub took 2 s when tried.
	publishTimeout = 5 * time.Second

	// pendingTimeout bounds a publish in a full window on a hub that is slow but keeps
	// acknowledging: the publish waits for all messages before it. With publishTimeout for
	// each, a hub of 12 messages a second never acknowledged the end of a window of 64, which
	// was sent again and again (TestASlowHubIsNotAwayWhileItAcknowledges).
	pendingTimeout = 2 * time.Minute

	// apiTimeout is how long any other request may take. A cluster without a
	// leader does not answer at all; the caller asks again.
	apiTimeout = 5 * time.Second

	reconnectWait   = 500 * time.Millisecond
	reconnectJitter = 500 * time.Millisecond
)

// Connect returns a connection that reconnects for ever. The hub need not be
// running yet: what is published meanwhile fails at once.
func Connect(cfg Config, log *slog.Logger) (*Conn, error) {
	log = log.With("component", "bus", "server", cfg.target())
	connected := slog.LevelInfo
	if cfg.InProcess != nil {
		connected = slog.LevelDebug
	}
	said := new(backoff.Repeats)
	conn, err := connect(cfg, log,
		nats.RetryOnFailedConnect(true),
		// A credential may be corrected or restored while this process waits.
		nats.IgnoreAuthErrorAbort(),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(reconnectWait),
		nats.ReconnectJitter(reconnectJitter, reconnectJitter),
		nats.ConnectHandler(func(*nats.Conn) {
			cfg.connected(1)
			log.Log(context.Background(), connected, "hub connected")
		}),
		nats.ReconnectHandler(func(*nats.Conn) {
			cfg.connected(1)
			log.Info("hub back")
		}),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			cfg.connected(0)
			if err != nil {
				log.Warn("hub unreachable", "err", err)
			}
		}))
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); conn.sayWhy(ctx, said) }()
	conn.silence = func() { stop(); <-ended }
	return conn, nil
}

func (cfg Config) connected(is float64) {
	if cfg.Counts != nil {
		cfg.Counts.HubConnected.Set(is)
	}
}

// failed counts an error that the client library reports.
func (cfg Config) failed(err error) {
	if cfg.Counts == nil {
		return
	}
	kind := ledger.HubOther
	switch {
	case errors.Is(err, nats.ErrSlowConsumer):
		kind = ledger.HubSlowConsumer
	case errors.Is(err, nats.ErrPermissionViolation), errors.Is(reason(err), ErrRefused):
		kind = ledger.HubDenied
	}
	cfg.Counts.HubErrors(kind).Inc()
}

// sayInterval is how often a connection that waits for its server looks for the reason.
const sayInterval = 2 * time.Second

// sayWhy logs once a minute why the hub cannot be reached, until the connection is closed. The
// client library reports some reasons at every attempt, and others never.
func (c *Conn) sayWhy(ctx context.Context, said *backoff.Repeats) {
	for backoff.Sleep(ctx, sayInterval) {
		switch {
		case c.nc.IsClosed():
			return
		case !c.nc.IsConnected():
			notReached(said, c.log, c.nc.LastError())
		}
	}
}

// Dial connects once: the connection does not reconnect, so that what reached the
// server is a prefix of what was published on it, in order.
func Dial(cfg Config, log *slog.Logger) (*Conn, error) {
	return connect(cfg, log.With("component", "bus"), nats.NoReconnect())
}

func (cfg Config) target() string {
	if cfg.InProcess != nil {
		return "in process"
	}
	return strings.Join(slices.Collect(func(yield func(string) bool) {
		for u := range strings.SplitSeq(cfg.URL, ",") {
			if !yield(redacted(u)) {
				return
			}
		}
	}), ",")
}

// redacted returns a URL without a password.
func redacted(text string) string {
	u, err := url.Parse(strings.TrimSpace(text))
	if err != nil {
		return "a URL that does not parse"
	}
	return u.Redacted()
}

func connect(cfg Config, log *slog.Logger, opts ...nats.Option) (*Conn, error) {
	if cfg.InboxPrefix == "" {
		cfg.InboxPrefix = "_INBOX_" + cfg.Name
	}
	denied, d := newDenials(), new(dialer)
	opts = append(opts,
		nats.Name("penstock-"+cfg.Name),
		nats.CustomInboxPrefix(cfg.InboxPrefix),
		nats.ReconnectBufSize(-1), // a publish that has failed must not be sent later
		nats.ErrorHandler(cfg.reportErrors(denied, log)))
	if cfg.InProcess != nil {
		opts = append(opts, nats.InProcessServer(cfg.InProcess))
	} else {
		opts = append(opts, nats.SetCustomDialer(d))
	}
	secured, err := cfg.security()
	if err != nil {
		return nil, fmt.Errorf("connect to hub %s: %w", cfg.target(), err)
	}
	nc, err := nats.Connect(cfg.URL, append(opts, secured...)...)
	if err != nil {
		return nil, fmt.Errorf("connect to hub %s: %w", cfg.target(), reason(d.of(err)))
	}
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncTimeout(2*pendingTimeout), jetstream.WithDefaultTimeout(publishTimeout))
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("connect to hub %s: %w", cfg.target(), err)
	}
	return &Conn{nc: nc, js: js, log: log, denials: denied, silence: func() {}}, nil
}

// reportErrors returns what counts and logs the errors that the client library reports.
func (cfg Config) reportErrors(denied *denials, log *slog.Logger) nats.ErrHandler {
	said := new(backoff.Repeats)
	return func(_ *nats.Conn, sub *nats.Subscription, err error) {
		subject := ""
		if sub != nil {
			subject = sub.Subject
		}
		cfg.failed(err)
		if errors.Is(reason(err), ErrRefused) {
			return // logged by what waits for the hub
		}
		if errors.Is(err, nats.ErrPermissionViolation) {
			denied.add(err.Error())
		}
		if errors.Is(err, nats.ErrPermissionViolation) || errors.Is(err, nats.ErrBadHeaderMsg) { // a sender can cause these
			if _, due := said.Due(err.Error(), time.Now()); !due {
				return
			}
		}
		log.Warn("bus error", "err", err, "subject", subject)
	}
}

// security returns the options for the credential and for TLS.
func (cfg Config) security() (opts []nats.Option, err error) {
	if cfg.Creds != "" {
		opts = append(opts, nats.UserCredentials(cfg.Creds))
	}
	if cfg.User != "" {
		opts = append(opts, nats.UserInfo(cfg.User, string(cfg.Pass)))
	}
	if cfg.Token != "" {
		opts = append(opts, nats.Token(string(cfg.Token)))
	}
	if cfg.TLS != (config.ClientTLS{}) {
		tlsConfig, err := cfg.TLS.Load("tls")
		if err != nil {
			return nil, err
		}
		opts = append(opts, nats.Secure(tlsConfig))
	}
	if cfg.HandshakeFirst {
		opts = append(opts, nats.TLSHandshakeFirst())
	}
	return opts, nil
}

// Connected reports whether there is a connection to the server.
func (c *Conn) Connected() bool { return c.nc.IsConnected() }

// MaxPayload is the largest message that the server accepts, body and headers, in
// bytes.
func (c *Conn) MaxPayload() int64 { return c.nc.MaxPayload() }

// Close ends the connection; acknowledgements that were sent are flushed.
func (c *Conn) Close() {
	_ = c.nc.FlushTimeout(time.Second)
	c.nc.Close()
	c.silence()
}

// Message is what is published. Body is kept until the publish is done.
type Message struct {
	Subject string
	Header  envelope.Header
	Body    []byte
	// After is the sequence that the subject's last message must have in the stream;
	// otherwise the publish fails with a [LastSequenceError]. 0: any.
	After uint64
	// Refusal is set on dead letters only.
	Refusal *Refusal
}

func (m Message) nats() *nats.Msg {
	h := make(nats.Header, 6)
	m.Header.Fields(func(name, value string) { h[name] = []string{value} })
	if m.After > 0 {
		h[jetstream.ExpectedLastSubjSeqHeader] = []string{strconv.FormatUint(m.After, 10)}
	}
	if r := m.Refusal; r != nil {
		for name, value := range map[string]string{headerReason: r.Reason, headerDetail: r.Detail, headerBackend: r.Backend, headerSource: r.Source} {
			h[name] = []string{value}
		}
	}
	return &nats.Msg{Subject: m.Subject, Header: h, Data: m.Body}
}

// ErrFull reports that the stream has reached its bound and stored nothing.
var ErrFull = errors.New("stream is full")

// ErrStore reports that the stream's files cannot be written: it stores nothing
// more until its server is restarted (nats-server 2.15.2, fileStore.werr).
var ErrStore = errors.New("stream cannot write its files")

// ErrTimeout reports that the stream has not acknowledged in time.
var ErrTimeout = nats.ErrTimeout

// LastSequenceError reports that a subject's last message is not the one that was
// expected ([Message.After]).
type LastSequenceError struct {
	Last uint64 // the sequence of the last message; 0 for no message
}

func (e *LastSequenceError) Error() string {
	return fmt.Sprintf("the subject's last message has sequence %d", e.Last)
}

// wrongLast is how the server's description of this error begins.
const wrongLast = "wrong last sequence: "

// ErrNoStream reports that no stream stores the subject: the hub has no such
// stream, or JetStream is not up yet.
var ErrNoStream = errors.New("no stream stores the subject")

// storeFailed is the server's error code for a message that it has not stored;
// maxBytes is its description when the stream's bound was the reason.
const (
	storeFailed = 10077
	maxBytes    = "maximum bytes exceeded"
)

func publishError(subject string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, jetstream.ErrAsyncPublishTimeout):
		err = fmt.Errorf("%w: %w", ErrTimeout, err)
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, jetstream.ErrNoStreamResponse):
		err = fmt.Errorf("%w: %w", ErrNoStream, err)
	default:
		if api, ok := errors.AsType[*jetstream.APIError](err); ok && api.ErrorCode == storeFailed {
			what := ErrStore
			if api.Description == maxBytes {
				what = ErrFull
			}
			err = fmt.Errorf("%w: %w", what, err)
		} else if ok && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence {
			if last, ok := strings.CutPrefix(api.Description, wrongLast); ok {
				if n, parseErr := strconv.ParseUint(last, 10, 64); parseErr == nil {
					err = &LastSequenceError{n}
				}
			}
		}
	}
	return fmt.Errorf("publish to %s: %w", subject, err)
}

// Publish returns when the stream has stored m.
func (c *Conn) Publish(ctx context.Context, m Message) (seq uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	ack, err := c.js.PublishMsg(ctx, m.nats(), jetstream.WithRetryAttempts(0))
	if err != nil {
		return 0, publishError(m.Subject, err)
	}
	return ack.Sequence, nil
}

// Pending is a publish that is on its way.
type Pending struct {
	conn     *Conn
	sent     time.Time
	answered *atomic.Int64
	subject  string
	future   jetstream.PubAckFuture
	err      error
}

// PublishAsync sends m and returns at once. Messages of one connection reach
// the server in the order of the calls.
func (c *Conn) PublishAsync(m Message) Pending {
	f, err := c.js.PublishMsgAsync(m.nats(), jetstream.WithRetryAttempts(0))
	answered, _ := c.answered.LoadOrStore(streamPart(m.Subject), new(atomic.Int64))
	return Pending{conn: c, sent: time.Now(), answered: answered.(*atomic.Int64), subject: m.Subject, future: f, err: err}
}

// streamPart is what the subjects of a stream have in common: the signal, or the first token.
func streamPart(subject string) string {
	tokens := strings.SplitN(subject, ".", 3)
	if tokens[0] == "otlp" && len(tokens) > 1 {
		return tokens[0] + "." + tokens[1]
	}
	return tokens[0]
}

// patience is how much longer the stream may take to answer, counted from when p was sent or
// from the stream's last answer, whichever is later.
func (p Pending) patience(now time.Time) time.Duration {
	last := p.sent
	if answered := time.Unix(0, p.answered.Load()); answered.After(last) {
		last = answered
	}
	return min(publishTimeout-now.Sub(last), pendingTimeout-now.Sub(p.sent))
}

// Stored is the stream's answer about a message that it has.
type Stored struct {
	Seq uint64 // of the stream
	// Duplicate: it already had one with this id, under Seq, and kept that one.
	Duplicate bool
}

// Wait blocks until the stream has stored the message or will not.
func (p Pending) Wait(ctx context.Context) error {
	_, err := p.Stored(ctx)
	return err
}

// Stored is Wait for callers that need the sequence.
func (p Pending) Stored(ctx context.Context) (Stored, error) {
	if p.err != nil {
		return Stored{}, publishError(p.subject, p.err)
	}
	patience := time.NewTimer(max(p.patience(time.Now()), 0))
	defer patience.Stop()
	for {
		denied, changed := p.conn.denials.since(p.sent, p.subject, "")
		if denied {
			return Stored{}, publishError(p.subject, ErrDenied)
		}
		select { // an answer that has arrived counts, even if the time is over
		case ack := <-p.future.Ok():
			p.answered.Store(time.Now().UnixNano())
			return Stored{ack.Sequence, ack.Duplicate}, nil
		default:
		}
		select {
		case <-changed:
		case ack := <-p.future.Ok():
			p.answered.Store(time.Now().UnixNano())
			return Stored{ack.Sequence, ack.Duplicate}, nil
		case err := <-p.future.Err():
			if _, is := errors.AsType[*jetstream.APIError](err); is {
				p.answered.Store(time.Now().UnixNano())
			}
			return Stored{}, publishError(p.subject, err)
		case now := <-patience.C:
			left := p.patience(now)
			if left <= 0 {
				return Stored{}, publishError(p.subject, fmt.Errorf("no acknowledgement from the stream for %v: %w", publishTimeout, nats.ErrTimeout))
			}
			patience.Reset(left)
		case <-ctx.Done():
			return Stored{}, ctx.Err()
		}
	}
}
