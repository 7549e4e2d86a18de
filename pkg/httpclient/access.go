package httpclient

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/ledger"
)

// Access has the sender's credentials and tenants. Files are reloaded when they change.
type Access struct {
	TLS       config.ClientTLS `yaml:"tls"`
	BasicAuth BasicAuth        `yaml:"basic_auth"`
	// A file whose content is sent as a bearer token.
	BearerToken string `yaml:"bearer_token_file"`
	// Additional headers of every request.
	Headers map[string]config.Secret `yaml:"headers"`
	Tenant  Tenant                   `yaml:"tenant"`

	token, password *config.File[string]
	customers       *config.File[map[string]string] // by instance
}

// BasicAuth is a user name with a password, or with a file that has the password.
type BasicAuth struct {
	// The user name for basic authentication. Empty: none.
	Username string `yaml:"username"`
	// The password; it is never printed. Write ${NAME} and set that in the environment.
	Password config.Secret `yaml:"password"`
	// A file with the password in one line.
	PasswordFile string `yaml:"password_file"`
}

// Tenant says for which tenant a request is sent: in a multi-tenant backend each tenant sees only its own
// data.
type Tenant struct {
	// The name of the request header with the tenant; Mimir, Loki and Tempo read X-Scope-OrgID.
	Header string `yaml:"header"`
	// What names the tenant: instance (the instance of the data, as its credential says) or
	// customer (the instance's customer in customers_file). Empty: everything is sent for default.
	From string `yaml:"from"`
	// A YAML file with the customer of each instance, one a line, as-17: acme. It is reloaded when
	// it changes. A customer that a payload names is ignored.
	CustomersFile string `yaml:"customers_file"`
	// Maps instances or customers to other tenant names.
	Map map[string]string `yaml:"map"`
	// The tenant of instances or customers that are not in map. Empty: they keep their own name,
	// and data without a name is dead-lettered; if from is empty, too, no header is sent.
	Default string `yaml:"default"`
}

const tenantHeader = "X-Scope-OrgID"

// Open reads the files for the first time. section is the key under which a is configured; secure says
// whether the backend's address uses TLS.
func (a *Access) Open(section string, secure bool) error {
	var errs []error
	fail := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s.%s"+format, append([]any{section, key}, args...)...))
	}
	if _, err := a.TLS.Load(section + ".tls"); err != nil {
		errs = append(errs, err)
	}
	if a.TLS != (config.ClientTLS{}) && !secure {
		fail("tls", ": the backend's address is plain text; write https://")
	}
	a.checkIdentity(section, fail)
	a.openSecrets(fail)
	a.openTenant(fail)
	for name := range a.Headers {
		if strings.EqualFold(name, "Authorization") {
			fail("headers", ": set Authorization by basic_auth or bearer_token_file")
		}
	}
	return errors.Join(errs...)
}

// checkIdentity reports more or less than one way to say who this is.
func (a *Access) checkIdentity(section string, fail func(key, format string, args ...any)) {
	b := a.BasicAuth
	if b.Username == "" && (b.Password != "" || b.PasswordFile != "") {
		fail("basic_auth", " has a password and no username")
	}
	if b.Password != "" && b.PasswordFile != "" {
		fail("basic_auth", " has password and password_file: set one")
	}
	if b.Username != "" && a.BearerToken != "" {
		fail("basic_auth", " and %s.bearer_token_file are both set: set one", section)
	}
}

// openSecrets reads the files with a token and a password.
func (a *Access) openSecrets(fail func(key, format string, args ...any)) {
	for _, f := range []struct {
		key, path string
		file      **config.File[string]
	}{{"bearer_token_file", a.BearerToken, &a.token}, {"basic_auth.password_file", a.BasicAuth.PasswordFile, &a.password}} {
		if f.path == "" {
			continue
		}
		*f.file = config.NewFile(f.path, secretLine)
		if _, err := (*f.file).Get(); err != nil {
			fail(f.key, ": %s: %w", f.path, err)
		}
	}
}

// secretLine returns the only line of a file.
func secretLine(text []byte) (string, error) {
	s := strings.TrimSpace(string(text))
	if s == "" || strings.ContainsAny(s, "\r\n") {
		return "", errors.New("want one line with the secret")
	}
	return s, nil
}

// openTenant checks the tenants and reads the customers file.
func (a *Access) openTenant(fail func(key, format string, args ...any)) {
	t := a.Tenant
	switch {
	case !slices.Contains([]string{"", "instance", "customer"}, t.From):
		fail("tenant.from", " is %q, want instance or customer", t.From)
	case t.From == "customer" && t.CustomersFile == "":
		fail("tenant.from", " is customer, which needs tenant.customers_file")
	case t.From != "customer" && t.CustomersFile != "":
		fail("tenant.customers_file", " is used only with tenant.from: customer")
	}
	if t.Default != "" {
		if err := checkTenant(t.Default); err != nil {
			fail("tenant.default", ": %w", err)
		}
	}
	for name, tenant := range t.Map {
		if err := checkTenant(tenant); err != nil {
			fail("tenant.map", ": %s: %w", name, err)
		}
	}
	if t.CustomersFile == "" {
		return
	}
	a.customers = config.NewFile(t.CustomersFile, func(text []byte) (of map[string]string, err error) {
		if err := config.Load(t.CustomersFile, text, &of); err != nil {
			return nil, err
		}
		for instance, customer := range of {
			if _, mapped := t.Map[customer]; !mapped {
				if err := checkTenant(customer); err != nil {
					return nil, fmt.Errorf("%s: customer of %s: %w", t.CustomersFile, instance, err)
				}
			}
		}
		return of, nil
	})
	if _, err := a.customers.Get(); err != nil {
		fail("tenant.customers_file", ": %w", err)
	}
}

// Of returns the headers of a request with data of an instance, or, with an empty instance, of a query.
// An error is one of the configuration.
func (a *Access) Of(instance string) (http.Header, error) {
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
	tenant := a.tenant(instance)
	if a.Tenant.From != "" && instance != "" && tenant == "" {
		return nil, fault.Whole(ledger.DeadRefused, fmt.Errorf("no tenant for instance %s: tenant.from=%s yields none, and tenant.default is not set", instance, a.Tenant.From))
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

// tenant returns the tenant of an instance; empty for none.
func (a *Access) tenant(instance string) string {
	t, name := a.Tenant, ""
	switch t.From {
	case "":
		return t.Default
	case "instance":
		name = instance
	case "customer":
		if of, err := a.customers.Get(); err == nil { // it has been read at the start
			name = of[instance]
		}
	}
	if mapped, ok := t.Map[name]; ok && name != "" {
		return mapped
	}
	return cmp.Or(t.Default, name)
}

// tenantForm is what Mimir, Loki and Tempo accept as a tenant (dskit, tenant.ValidTenantID).
var tenantForm = regexp.MustCompile(`^[A-Za-z0-9!_.*'()-]{1,150}$`)

func checkTenant(name string) error {
	if !tenantForm.MatchString(name) || name == "." || name == ".." {
		return fmt.Errorf("%q is not a tenant name: want 1 to 150 of letters, digits and !-_.*'(), and neither . nor ..", name)
	}
	return nil
}
