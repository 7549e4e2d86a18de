package router

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/proc"
	"github.com/penstock/penstock/pkg/receive"
)

// Tokens maps bearer tokens to instances. The file and the memory hold the
// SHA-256 of a token only: whoever reads them cannot send.
type Tokens struct {
	entries []token
}

type token struct {
	hash   [sha256.Size]byte
	sender *receive.Sender
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
func LoadTokens(path string) (*Tokens, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("tokens: %w", err)
	}
	return ParseTokens(path, text)
}

// ParseTokens is LoadTokens on text that was read before; path stands for the file.
func ParseTokens(path string, text []byte) (*Tokens, error) {
	var file tokensFile
	if err := proc.Load(path, text, &file); err != nil {
		return nil, fmt.Errorf("tokens: %w", err)
	}
	t := new(Tokens)
	var errs []error
	for i, e := range file.Tokens {
		hash, err := hex.DecodeString(e.SHA256)
		if err != nil || len(hash) != sha256.Size {
			errs = append(errs, fmt.Errorf("tokens: %s: entry %d: sha256 must be 64 hex digits", path, i+1))
			continue
		}
		inst := envelope.Instance{ID: e.ID, Name: e.Name, Customer: e.Customer, Namespace: e.Namespace, Environment: e.Environment}
		if err := inst.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("tokens: %s: entry %d: %w", path, i+1, err))
		}
		t.entries = append(t.entries, token{[sha256.Size]byte(hash), receive.NewSender(inst)})
	}
	if len(file.Tokens) == 0 {
		errs = append(errs, fmt.Errorf("tokens: %s holds no token; `penstock token` makes one", path))
	}
	return t, errors.Join(errs...)
}

var errToken = errors.New("no valid bearer token: send the header Authorization: Bearer <token> (in OTEL_EXPORTER_OTLP_HEADERS: authorization=Bearer%20<token>)")

// Identify finds the instance of an authorization header. It looks at every
// entry, so that the time it takes says nothing about which one is near.
func (t *Tokens) Identify(authorization string) (*receive.Sender, error) {
	scheme, secret, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "bearer") || secret == "" {
		return nil, errToken
	}
	hash := sha256.Sum256([]byte(secret))
	var found *receive.Sender
	for _, e := range t.entries {
		if subtle.ConstantTimeCompare(hash[:], e.hash[:]) == 1 {
			found = e.sender
		}
	}
	if found == nil {
		return nil, errToken
	}
	return found, nil
}
