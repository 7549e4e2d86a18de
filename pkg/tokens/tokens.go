// Package tokens checks the credential of a sender at a gateway: a bearer token or a client certificate.
//
//	f, err := tokens.Load("tokens.yaml", log)
//	sender, err := f.Identify(credentials)
//
// # Promises
//
//   - A token or certificate that is removed from the file, or has expired, is refused within 5 s, also on
//     open connections. A broken file changes nothing.
//   - File and memory hold only the SHA-256 of a token.
//
// # Not here
//
// Where a credential comes from in a request: package receive. The credentials of edges at the hub: the hub
// checks those itself.
package tokens

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/receive"
)

// lookEvery is how often the tokens file is checked while requests arrive: a removed entry is refused
// a second later.
const lookEvery = time.Second

// File identifies a sender's instance by its token or certificate and a tokens file, which is
// reloaded when it changes. If the new file is broken, the previous entries stay in force.
//
// File and memory hold only the SHA-256 of a token: reading them does not allow sending.
type File struct {
	file *config.File[*table]
	log  *slog.Logger
	said backoff.Repeats
	now  func() time.Time

	mu     sync.Mutex
	looked time.Time
	table  *table
}

// table is the content of a tokens file.
type table struct {
	tokens       map[[sha256.Size]byte]entry
	certificates map[string]entry // by instance
}

// entry is the sender that a token or a certificate identifies.
type entry struct {
	sender   *receive.Sender // the same for all tokens of an instance
	notAfter time.Time       // zero for never
}

// tokensFile is the format of the file to which `penstock token` adds an entry.
type tokensFile struct {
	Tokens []struct {
		SHA256      string `yaml:"sha256"`
		Certificate bool   `yaml:"certificate"`
		ID          string `yaml:"instance_id"`
		Name        string `yaml:"instance_name"`
		Customer    string `yaml:"customer_id"`
		Namespace   string `yaml:"service_namespace"`
		Environment string `yaml:"deployment_environment"`
		NotAfter    string `yaml:"not_after"`
	} `yaml:"tokens"`
}

// Load reads a tokens file:
//
//	tokens:
//	  - sha256: 64 hex digits, of the token
//	    instance_id: as-1
//	    instance_name: Checkout Berlin     # this and the following keys are optional
//	    customer_id: acme
//	    service_namespace: appserver
//	    deployment_environment: production
//	    not_after: 2027-01-31T00:00:00Z    # refused from then on
//
//	  - certificate: true                  # no token: a client certificate names the instance
//	    instance_id: as-2
//
// An instance may have several tokens, so that a new one can replace an old one.
func Load(path string, log *slog.Logger) (*File, error) {
	t := &File{log: log, now: time.Now}
	t.file = config.NewFile(path, func(text []byte) (*table, error) { return parseTokens(path, text) })
	var err error
	if t.table, err = t.file.Get(); err != nil {
		return nil, fmt.Errorf("tokens: %w", err)
	}
	if len(t.table.tokens)+len(t.table.certificates) == 0 {
		return nil, fmt.Errorf("tokens: %s holds no token; `penstock token` creates one", path)
	}
	t.looked = t.now()
	return t, nil
}

// Check reports what is wrong with the text of a tokens file; path names it in the error.
func Check(path string, text []byte) error {
	_, err := parseTokens(path, text)
	return err
}

func parseTokens(path string, text []byte) (*table, error) {
	var file tokensFile
	lines, err := config.LoadLines(path, text, &file)
	if err != nil {
		return nil, err
	}
	if lines["tokens"] == 0 { // such as a file that is being written; an empty list is valid
		return nil, fmt.Errorf("%s has no key tokens; `penstock token -file` creates it", path)
	}
	t := &table{tokens: map[[sha256.Size]byte]entry{}, certificates: map[string]entry{}}
	senders := map[string]*receive.Sender{} // by instance
	first := map[string]int{}               // the first line with an instance or a token
	var errs []error
	for i, e := range file.Tokens {
		line := lines[fmt.Sprintf("tokens[%d]", i)]
		wrong := func(format string, args ...any) {
			errs = append(errs, fmt.Errorf("%s:%d: tokens[%d]: %w", path, line, i, fmt.Errorf(format, args...)))
		}
		inst := envelope.Instance{ID: e.ID, Name: e.Name, Customer: e.Customer, Namespace: e.Namespace, Environment: e.Environment}
		if err := inst.Validate(); err != nil {
			wrong("%w", err)
			continue
		}
		if s := senders[inst.ID]; s == nil {
			senders[inst.ID], first[inst.ID] = receive.NewSender(inst), line
		} else if s.Instance != inst {
			wrong("instance %s differs from line %d: its name, customer, namespace and environment must be the same in both", inst.ID, first[inst.ID])
		}
		one := entry{sender: senders[inst.ID]}
		if e.NotAfter != "" {
			if one.notAfter, err = time.Parse(time.RFC3339, e.NotAfter); err != nil {
				wrong("not_after is %q, want a time as 2027-01-31T00:00:00Z", e.NotAfter)
			}
		}
		if e.Certificate {
			if _, twice := t.certificates[inst.ID]; twice || e.SHA256 != "" {
				wrong("certificate: true may occur once for an instance, and without sha256: a token needs its own entry")
			}
			t.certificates[inst.ID] = one
			continue
		}
		hash, err := hex.DecodeString(e.SHA256)
		if err != nil || len(hash) != sha256.Size {
			wrong("sha256 must be 64 hex digits, or certificate true")
			continue
		}
		if _, twice := t.tokens[[sha256.Size]byte(hash)]; twice {
			wrong("same token as in line %d", first[string(hash)])
		}
		t.tokens[[sha256.Size]byte(hash)], first[string(hash)] = one, line
	}
	return t, errors.Join(errs...)
}

// current returns the table, and checks the file if lookEvery has passed.
func (t *File) current(now time.Time) *table {
	t.mu.Lock()
	defer t.mu.Unlock()
	if since := now.Sub(t.looked); since >= 0 && since < lookEvery {
		return t.table
	}
	t.looked = now
	table, _, err := t.file.Look()
	if err != nil {
		if held, due := t.said.Due(err.Error(), now); due {
			t.log.Error("cannot read the tokens file; its previous entries stay in force", "err", err, "held_back", held)
		}
	} else if table != t.table {
		t.log.Info("tokens file reloaded", "tokens", len(table.tokens), "certificates", len(table.certificates))
	}
	t.table = table
	return table
}

var (
	errToken   = errors.New("no valid bearer token: send the header Authorization: Bearer <token> (in OTEL_EXPORTER_OTLP_HEADERS: authorization=Bearer%20<token>)")
	errExpired = errors.New("token has expired: ask for a new one")
	errEnded   = errors.New("the permission of this certificate's instance to send has expired (not_after of its entry)")
)

// Identify returns the sender that token and certificate identify. If there are both, they must belong
// to the same instance.
func (t *File) Identify(c receive.Credentials) (*receive.Sender, error) {
	now := t.now()
	table := t.current(now)
	if c.Certificate == nil {
		return table.byToken(c.Authorization, now)
	}
	sender, err := table.byCertificate(c.Certificate, now)
	if err != nil || c.Authorization == "" {
		return sender, err
	}
	other, err := table.byToken(c.Authorization, now)
	if err == nil && other != sender {
		err = fmt.Errorf("the client certificate belongs to instance %s and the token to another one", sender.Instance.ID)
	}
	return sender, err
}

// byToken compares tokens by their hashes, whose bytes are not secret: the time that it takes reveals
// nothing useful.
func (t *table) byToken(authorization string, now time.Time) (*receive.Sender, error) {
	scheme, secret, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "bearer") || secret == "" {
		return nil, errToken
	}
	e, known := t.tokens[sha256.Sum256([]byte(secret))]
	if !known {
		return nil, errToken
	}
	return e.at(now, errExpired)
}

func (t *table) byCertificate(cert *x509.Certificate, now time.Time) (*receive.Sender, error) {
	id, err := instanceOf(cert)
	if err != nil {
		return nil, err
	}
	e, known := t.certificates[id]
	if !known {
		return nil, fmt.Errorf("instance %q of the client certificate is not in the gateway's tokens file, with certificate: true", id)
	}
	return e.at(now, errEnded)
}

func (e entry) at(now time.Time, ended error) (*receive.Sender, error) {
	if !e.notAfter.IsZero() && !now.Before(e.notAfter) {
		return nil, ended
	}
	return e.sender, nil
}

// instanceOf returns the id after /instance/ at the end of the path of a URI, of which the
// certificate's alternative names must have exactly one.
func instanceOf(cert *x509.Certificate) (string, error) {
	var ids []string
	for _, u := range cert.URIs {
		if dir, id := path.Split(u.EscapedPath()); id != "" && strings.HasSuffix(dir, "/instance/") {
			ids = append(ids, id)
		}
	}
	if len(ids) != 1 {
		return "", fmt.Errorf("client certificate: %d of its alternative names are URIs that end in /instance/<id>, want one", len(ids))
	}
	return ids[0], nil
}
