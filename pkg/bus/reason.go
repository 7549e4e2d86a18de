package bus

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/penstock/penstock/pkg/backoff"
)

// ErrRefused reports that the hub does not know the credential, or no longer accepts it.
var ErrRefused = errors.New("the hub refuses the credential")

// reason adds to err, for the operator, why the hub was not reached and what to do.
func reason(err error) error {
	var authority x509.UnknownAuthorityError
	switch {
	case err == nil:
		return nil
	case errors.Is(err, nats.ErrAuthorization), errors.Is(err, nats.ErrAuthExpired), errors.Is(err, nats.ErrAuthRevoked), errors.Is(err, nats.ErrAccountAuthExpired):
		return fmt.Errorf("%w: check creds, user, password and token, and the hub's own log: %w", ErrRefused, err)
	case errors.As(err, &authority):
		return fmt.Errorf("the hub's certificate is signed by an unknown authority; set tls.ca_file: %w", err)
	case errors.Is(err, nats.ErrSecureConnRequired), errors.Is(err, nats.ErrSecureConnWanted):
		return fmt.Errorf("one side wants TLS and the other does not; write tls:// or nats://, and tls_handshake_first where the hub has that: %w", err)
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("a file of the credential or of TLS cannot be read: %w", err)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("nothing listens there: %w", err)
	}
	if _, is := errors.AsType[*tls.CertificateVerificationError](err); is {
		return fmt.Errorf("the hub's certificate is not valid: %w", err)
	}
	return err
}

// dialer keeps the reason why a server was not reached; the client library only reports that
// none was.
type dialer struct{ last atomic.Pointer[error] }

// dialTimeout is that of the client library.
const dialTimeout = 2 * time.Second

// Dial connects.
func (d *dialer) Dial(network, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(context.Background(), network, address)
	d.last.Store(&err)
	return conn, err
}

// of returns the reason instead of the library's error that no server was reached.
func (d *dialer) of(err error) error {
	if last := d.last.Load(); last != nil && *last != nil && errors.Is(err, nats.ErrNoServers) {
		return *last
	}
	return err
}

var localPort = regexp.MustCompile(`[0-9a-fA-F.:\[\]]+:[0-9]+->`)

// Kind is the text of an error without what differs from one attempt to the next: the local
// port.
func Kind(err error) string { return localPort.ReplaceAllString(err.Error(), "") }

// notReached logs why the hub cannot be reached, once a minute.
func notReached(said *backoff.Repeats, log *slog.Logger, err error) {
	if err = reason(err); err == nil {
		return
	}
	if _, due := said.Due(Kind(err), time.Now()); due {
		log.Warn("hub not reached, will try again", "err", err)
	}
}

// denials is a ring of the server's permission errors. The server reports them to the connection,
// not to the caller, whose request gets no answer.
type denials struct {
	sync.Mutex
	ring    [16]denial
	next    int
	changed chan struct{} // closed with the next one
}

type denial struct {
	text string // names the subject
	at   time.Time
}

func newDenials() *denials { return &denials{changed: make(chan struct{})} }

func (d *denials) add(text string) {
	d.Lock()
	defer d.Unlock()
	d.ring[d.next] = denial{text, time.Now()}
	d.next = (d.next + 1) % len(d.ring)
	close(d.changed)
	d.changed = make(chan struct{})
}

// since reports whether the server has denied the subject, or anything that names the
// stream, since began. changed is closed at the next denial.
func (d *denials) since(began time.Time, subject, stream string) (denied bool, changed <-chan struct{}) {
	d.Lock()
	defer d.Unlock()
	for _, one := range d.ring {
		if one.at.Before(began) {
			continue
		}
		if strings.Contains(one.text, `"`+subject+`"`) || stream != "" && strings.Contains(one.text, "."+stream) {
			return true, d.changed
		}
	}
	return false, d.changed
}
