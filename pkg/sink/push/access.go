package push

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/proc"
)

// Access says who the sender is, and for whom it sends. Files are read again when they
// change.
type Access struct {
	TLS       proc.ClientTLS `yaml:"tls"`
	BasicAuth BasicAuth      `yaml:"basic_auth"`
	// BearerToken is a file whose content is sent as a bearer token.
	BearerToken string `yaml:"bearer_token_file"`
	// Headers are sent with every request.
	Headers map[string]proc.Secret `yaml:"headers"`
	Tenant  Tenant                 `yaml:"tenant"`

	token, password *proc.File[string]
}

// BasicAuth is a name with a password, or a file that holds one.
type BasicAuth struct {
	Username     string      `yaml:"username"`      // empty: none
	Password     proc.Secret `yaml:"password"`      // never printed; write ${NAME} and set it in the environment
	PasswordFile string      `yaml:"password_file"` // holds it in one line
}

// Tenant says for which tenant a request is sent: in a backend for several each sees its
// own data only.
type Tenant struct {
	// Header names it; Mimir, Loki and Tempo read X-Scope-OrgID.
	Header string `yaml:"header"`
	// From is instance or customer: the tenant is named by the instance that the data is
	// of, which its credential says, or by its customer.id, which its edge says. Empty: all is
	// sent for Default.
	From string `yaml:"from"`
	// Map gives instances or customers other names.
	Map map[string]string `yaml:"map"`
	// Default is the tenant of those that stand not in Map. Empty: they are named as they are,
	// and those without a name are dead-lettered; without From no header is sent.
	Default string `yaml:"default"`
}

const tenantHeader = "X-Scope-OrgID"

// Open reads the files for the first time. section is the key that a stands under; secure
// says whether the backend's address is one of TLS.
func (a *Access) Open(section string, secure bool) error {
	var errs []error
	fail := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s.%s"+format, append([]any{section, key}, args...)...))
	}
	if _, err := a.TLS.Load(section + ".tls"); err != nil {
		errs = append(errs, err)
	}
	if a.TLS != (proc.ClientTLS{}) && !secure {
		fail("tls", ": the backend's address is plain text; write https://")
	}
	b := a.BasicAuth
	if b.Username == "" && (b.Password != "" || b.PasswordFile != "") {
		fail("basic_auth", " has a password and no username")
	}
	if b.Password != "" && b.PasswordFile != "" {
		fail("basic_auth", " has password and password_file: set one")
	}
	if b.Username != "" && a.BearerToken != "" {
		fail("basic_auth", " and %s.bearer_token_file are two ways to say who this is: set one", section)
	}
	line := func(text []byte) (string, error) {
		s := strings.TrimSpace(string(text))
		if s == "" || strings.ContainsAny(s, "\r\n") {
			return "", errors.New("want one line with the secret")
		}
		return s, nil
	}
	for _, f := range []struct {
		key, path string
		file      **proc.File[string]
	}{{"bearer_token_file", a.BearerToken, &a.token}, {"basic_auth.password_file", b.PasswordFile, &a.password}} {
		if f.path == "" {
			continue
		}
		*f.file = proc.NewFile(f.path, line)
		if _, err := (*f.file).Get(); err != nil {
			fail(f.key, ": %s: %w", f.path, err)
		}
	}
	if t := a.Tenant; !slices.Contains([]string{"", "instance", "customer"}, t.From) {
		fail("tenant.from", " is %q, want instance or customer", t.From)
	}
	for name := range a.Headers {
		if strings.EqualFold(name, "Authorization") {
			fail("headers", ": Authorization is written by basic_auth and bearer_token_file")
		}
	}
	return errors.Join(errs...)
}

// Of returns the headers of a request with a payload of an instance. An error is a
// configuration's.
func (a *Access) Of(instance string, payload []byte) (http.Header, error) {
	h := http.Header{}
	for name, value := range a.Headers {
		h.Set(name, string(value))
	}
	switch {
	case a.token != nil:
		token, err := a.token.Get()
		if err != nil {
			return nil, fault.Configuration(err)
		}
		h.Set("Authorization", "Bearer "+token)
	case a.BasicAuth.Username != "":
		password := string(a.BasicAuth.Password)
		if a.password != nil {
			var err error
			if password, err = a.password.Get(); err != nil {
				return nil, fault.Configuration(err)
			}
		}
		h.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(a.BasicAuth.Username+":"+password)))
	}
	tenant := a.Tenant.of(instance, payload)
	if a.Tenant.From != "" && payload != nil && !printable(tenant) {
		return nil, fault.Whole(ledger.DeadRefused, fmt.Errorf("it is of no tenant: tenant.from is %s, which is %q there, and there is no tenant.default", a.Tenant.From, tenant))
	}
	if tenant != "" {
		h.Set(a.Tenant.header(), tenant)
	}
	return h, nil
}

func (t Tenant) header() string {
	if t.Header != "" {
		return t.Header
	}
	return tenantHeader
}

// of returns the tenant of a payload of an instance.
func (t Tenant) of(instance string, payload []byte) string {
	name := ""
	switch t.From {
	case "":
		return t.Default
	case "instance":
		name = instance
	case "customer":
		for r := range otlpwire.Resources(payload) { // all of an instance's have the same
			if v, ok := otlpwire.ResourceAttribute(r.Resource(), "customer.id"); ok && v.Kind == otlpwire.String {
				name = string(v.Str)
			}
			break
		}
	}
	if mapped, ok := t.Map[name]; ok && name != "" {
		return mapped
	}
	if t.Default != "" {
		return t.Default
	}
	return name
}

// printable reports whether a text can stand in a header of every protocol.
func printable(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}
