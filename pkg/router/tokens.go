package router

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/proc"
	"github.com/penstock/penstock/pkg/receive"
)

// lookEvery is how often the tokens file is looked at while requests come: what was
// removed from it is refused a second later.
const lookEvery = time.Second

// Tokens says which instance a sender is, by a tokens file, which is read again when it
// changes. One that is broken then leaves what was before in force.
//
// The file and the memory hold the SHA-256 of a token only: whoever reads them cannot send.
type Tokens struct {
	file *proc.File[*table]
	log  *slog.Logger
	said proc.Repeats
	now  func() time.Time

	mu     sync.Mutex
	looked time.Time
	table  *table
}

// table is what a tokens file says.
type table struct {
	tokens map[[sha256.Size]byte]entry
}

// entry is what a token stands for.
type entry struct {
	sender   *receive.Sender // one of an instance, however many tokens it has
	notAfter time.Time       // zero for never
}

// tokensFile is what `penstock token` prints an entry of.
type tokensFile struct {
	Tokens []struct {
		SHA256      string `yaml:"sha256"`
		ID          string `yaml:"instance_id"`
		Name        string `yaml:"instance_name"`
		Customer    string `yaml:"customer_id"`
		Namespace   string `yaml:"service_namespace"`
		Environment string `yaml:"deployment_environment"`
		NotAfter    string `yaml:"not_after"`
	} `yaml:"tokens"`
}

// LoadTokens reads a tokens file:
//
//	tokens:
//	  - sha256: 64 hex digits, of the token
//	    instance_id: as-1
//	    instance_name: Checkout Berlin     # this and what follows may be absent
//	    customer_id: acme
//	    service_namespace: appserver
//	    deployment_environment: production
//	    not_after: 2027-01-31T00:00:00Z    # refused from then on
//
// An instance may have several tokens, so that a new one can take the place of an old one.
func LoadTokens(path string, log *slog.Logger) (*Tokens, error) {
	t := &Tokens{log: log, now: time.Now}
	t.file = proc.NewFile(path, func(text []byte) (*table, error) { return parseTokens(path, text) })
	var err error
	if t.table, err = t.file.Get(); err != nil {
		return nil, fmt.Errorf("tokens: %w", err)
	}
	if len(t.table.tokens) == 0 {
		return nil, fmt.Errorf("tokens: %s holds no token; `penstock token` makes one", path)
	}
	t.looked = t.now()
	return t, nil
}

// CheckTokens reports what is wrong with the text of a tokens file; path stands for it.
func CheckTokens(path string, text []byte) error {
	_, err := parseTokens(path, text)
	return err
}

func parseTokens(path string, text []byte) (*table, error) {
	var file tokensFile
	lines, err := proc.LoadLines(path, text, &file)
	if err != nil {
		return nil, err
	}
	if lines["tokens"] == 0 { // as one that is being written; a list may be empty
		return nil, fmt.Errorf("%s has no key tokens; `penstock token -file` makes one", path)
	}
	t := &table{tokens: map[[sha256.Size]byte]entry{}}
	senders := map[string]*receive.Sender{} // by instance
	first := map[string]int{}               // the line that named an instance, or a token, first
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
			wrong("instance %s is another one in line %d: its name, customer, namespace and environment must be the same in both", inst.ID, first[inst.ID])
		}
		one := entry{sender: senders[inst.ID]}
		if e.NotAfter != "" {
			if one.notAfter, err = time.Parse(time.RFC3339, e.NotAfter); err != nil {
				wrong("not_after is %q, want a time as 2027-01-31T00:00:00Z", e.NotAfter)
			}
		}
		hash, err := hex.DecodeString(e.SHA256)
		if err != nil || len(hash) != sha256.Size {
			wrong("sha256 must be 64 hex digits")
			continue
		}
		if _, twice := t.tokens[[sha256.Size]byte(hash)]; twice {
			wrong("the token of line %d again", first[string(hash)])
		}
		t.tokens[[sha256.Size]byte(hash)], first[string(hash)] = one, line
	}
	return t, errors.Join(errs...)
}

// current looks at the file when it is time to.
func (t *Tokens) current(now time.Time) *table {
	t.mu.Lock()
	defer t.mu.Unlock()
	if since := now.Sub(t.looked); since >= 0 && since < lookEvery {
		return t.table
	}
	t.looked = now
	table, _, err := t.file.Look()
	if err != nil {
		if held, due := t.said.Due(err.Error(), now); due {
			t.log.Error("the tokens file cannot be read: what it said before stays in force", "err", err, "held_back", held)
		}
	} else if table != t.table {
		t.log.Info("the tokens file was read again", "tokens", len(table.tokens))
	}
	t.table = table
	return table
}

var (
	errToken   = errors.New("no valid bearer token: send the header Authorization: Bearer <token> (in OTEL_EXPORTER_OTLP_HEADERS: authorization=Bearer%20<token>)")
	errExpired = errors.New("token has expired: ask for a new one")
)

// Identify finds the instance of an authorization header. Tokens are compared by their
// hashes, whose bytes are no secret: how long it takes says nothing of use.
func (t *Tokens) Identify(authorization string) (*receive.Sender, error) {
	now := t.now()
	table := t.current(now)
	scheme, secret, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "bearer") || secret == "" {
		return nil, errToken
	}
	e, known := table.tokens[sha256.Sum256([]byte(secret))]
	switch {
	case !known:
		return nil, errToken
	case !e.notAfter.IsZero() && !now.Before(e.notAfter):
		return nil, errExpired
	}
	return e.sender, nil
}
