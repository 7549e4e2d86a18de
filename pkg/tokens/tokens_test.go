package tokens

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/receive"
)

func tokensPath(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tokens.yaml")
	write(t, path, text)
	return path
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func hash(s string) string { return fmt.Sprintf("%x", sha256.Sum256([]byte(s))) }

func bearer(auth string) receive.Credentials { return receive.Credentials{Authorization: auth} }

// tokensOf returns tokens with a clock of their own, which the caller moves, and their log.
func tokensOf(t *testing.T, text string) (tokens *File, path string, clock *time.Time, log *bytes.Buffer) {
	t.Helper()
	path, log = tokensPath(t, text), new(bytes.Buffer)
	tokens, err := Load(path, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	now := tokens.looked
	tokens.now = func() time.Time { return now }
	return tokens, path, &now, log
}

func TestTokensStandForInstances(t *testing.T) {
	tokens, _, _, _ := tokensOf(t, "tokens:\n  - {sha256: "+hash("one")+", instance_id: as-1, customer_id: acme}\n  - {sha256: "+hash("two")+", instance_id: as-2}\n"+
		"  - {sha256: "+hash("next one")+", instance_id: as-1, customer_id: acme}\n")
	for auth, want := range map[string]string{"Bearer one": "as-1", "bearer two": "as-2", "BEARER one": "as-1", "Bearer next one": "as-1"} {
		if s, err := tokens.Identify(bearer(auth)); err != nil || s.Instance.ID != want {
			t.Errorf("%s: %v, %v", auth, s, err)
		}
	}
	for _, auth := range []string{"", "Bearer", "Bearer ", "Bearer three", "Basic one", "one", "Bearer " + hash("one"), "Bearer  one"} {
		if s, err := tokens.Identify(bearer(auth)); err == nil {
			t.Errorf("%q is %v", auth, s.Instance)
		} else if strings.Contains(err.Error(), "three") {
			t.Errorf("the error names the token: %v", err)
		}
	}
}

func TestTokensFileSaysWhereItIsWrong(t *testing.T) {
	one := "tokens:\n  - {sha256: " + hash("x") + ", instance_id: as-1, customer_id: acme"
	for text, want := range map[string]string{
		"":           "no key tokens",
		"tokens: []": "holds no token",
		"tokens:\n  - {sha256: abc, instance_id: x}":                                                      "tokens.yaml:2: tokens[0]: sha256 must be 64 hex digits",
		"tokens:\n  - {sha256: " + hash("x") + ", instance: x}":                                           "tokens.yaml:2: tokens[0].instance: unknown key",
		"tokens:\n  - {sha256: " + hash("x") + ", instance_id: a.b}":                                      "NATS subject",
		one + ", not_after: soon}":                                                                        `tokens.yaml:2: tokens[0]: not_after is "soon", want a time`,
		one + "}\n  # a comment\n  - {sha256: " + hash("y") + ", instance_id: as-1, customer_id: other}":  "tokens.yaml:4: tokens[1]: instance as-1 differs from line 2",
		one + "}\n  - {sha256: " + hash("y") + ", instance_id: as-1}":                                     "tokens.yaml:3: tokens[1]: instance as-1 differs from line 2",
		one + "}\n  - {sha256: " + hash("x") + ", instance_id: as-1, customer_id: acme}":                  "tokens.yaml:3: tokens[1]: same token as in line 2",
		one + "}\n  - {certificate: true, instance_id: as-2}\n  - {certificate: true, instance_id: as-2}": "tokens.yaml:4: tokens[2]: certificate: true may occur once",
		"tokens:\n  - {certificate: true, sha256: " + hash("x") + ", instance_id: as-1}":                  "tokens.yaml:2: tokens[0]: certificate: true may occur",
		"tokens:\n  - {instance_id: as-1}":                                                                "sha256 must be 64 hex digits",
	} {
		if _, err := Load(tokensPath(t, text), nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}

func TestTokensExpire(t *testing.T) {
	end := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	tokens, _, now, _ := tokensOf(t, "tokens:\n  - {sha256: "+hash("one")+", instance_id: as-1, not_after: "+end.Format(time.RFC3339)+"}\n")
	*now = end.Add(-1)
	if _, err := tokens.Identify(bearer("Bearer one")); err != nil {
		t.Errorf("before its end: %v", err)
	}
	*now = end
	if _, err := tokens.Identify(bearer("Bearer one")); err == nil || !strings.Contains(err.Error(), "token has expired") {
		t.Errorf("at its end: %v", err)
	}
	if _, err := tokens.Identify(bearer("Bearer two")); err == nil || strings.Contains(err.Error(), "expired") {
		t.Errorf("a token that is none: %v", err)
	}
}

// certificate has a URI for each of uris among its alternative names.
func certificate(t *testing.T, uris ...string) *x509.Certificate {
	t.Helper()
	cert := new(x509.Certificate)
	for _, text := range uris {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		cert.URIs = append(cert.URIs, u)
	}
	return cert
}

// TestCertificatesStandForInstances: the certificate says which instance, the file whether
// and as whom it may send.
func TestCertificatesStandForInstances(t *testing.T) {
	tokens, path, now, _ := tokensOf(t, "tokens:\n  - {certificate: true, instance_id: as-1, customer_id: acme}\n  - {sha256: "+hash("one")+", instance_id: as-1, customer_id: acme}\n"+
		"  - {sha256: "+hash("two")+", instance_id: as-2}\n  - {certificate: true, instance_id: as-3, not_after: 2020-01-01T00:00:00Z}\n")
	const as1 = "spiffe://acme.example/ns/x/instance/as-1"
	for _, tc := range []struct {
		uris []string
		auth string
		want string // error; "" for as-1 of acme
	}{
		{[]string{as1}, "", ""},
		{[]string{as1, "spiffe://acme.example/host/x"}, "", ""},
		{[]string{"penstock:///instance/as-1"}, "", ""},
		{[]string{as1}, "Bearer one", ""},
		{[]string{as1}, "Bearer two", "to another one"},
		{[]string{as1}, "Bearer three", "no valid bearer token"},
		{[]string{as1}, "nonsense", "no valid bearer token"},
		{nil, "", "0 of its alternative names"},
		{nil, "Bearer one", "0 of its alternative names"},
		{[]string{as1, "spiffe://x/instance/as-3"}, "", "2 of its alternative names"},
		{[]string{as1, as1}, "", "2 of its alternative names"},
		{[]string{"spiffe://x/instance/as-1/"}, "", "0 of its alternative names"},
		{[]string{"spiffe://x/instance/as-1/y"}, "", "0 of its alternative names"},
		{[]string{"spiffe://x/noinstance/as-1"}, "", "0 of its alternative names"},
		{[]string{"spiffe://x/instance/as%2D1"}, "", `"as%2D1" of the client certificate is not in`},
		{[]string{"spiffe://x/instance/as-2"}, "", `"as-2" of the client certificate is not in`}, // has a token only
		{[]string{"spiffe://x/instance/as-3"}, "", "has expired"},
	} {
		s, err := tokens.Identify(receive.Credentials{Authorization: tc.auth, Certificate: certificate(t, tc.uris...)})
		if tc.want == "" && (err != nil || s.Instance.ID != "as-1" || s.Instance.Customer != "acme") {
			t.Errorf("%v %q: %v, %v", tc.uris, tc.auth, s, err)
		} else if tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%v %q: %v, want %q", tc.uris, tc.auth, err, tc.want)
		}
	}
	write(t, path, "tokens:\n  - {sha256: "+hash("one")+", instance_id: as-1, customer_id: acme}\n")
	*now = now.Add(lookEvery)
	if _, err := tokens.Identify(receive.Credentials{Certificate: certificate(t, as1)}); err == nil {
		t.Error("an instance that was removed may send with its certificate")
	}
}

// TestTokensAreReadAgain changes the file in every way that an editor, a deployment or a
// full disk does.
func TestTokensAreReadAgain(t *testing.T) {
	entry := func(token, id string) string { return "  - {sha256: " + hash(token) + ", instance_id: " + id + "}\n" }
	both := "tokens:\n" + entry("one", "as-1") + entry("two", "as-2")
	tokens, path, now, log := tokensOf(t, both)
	are := func(when string, one, two bool) {
		t.Helper()
		for token, want := range map[string]bool{"one": one, "two": two} {
			if _, err := tokens.Identify(bearer("Bearer " + token)); (err == nil) != want {
				t.Errorf("%s: token %s: %v, want accepted: %v", when, token, err, want)
			}
		}
	}
	write(t, path, "tokens:\n"+entry("two", "as-2"))
	are("within the same second", true, true)
	*now = now.Add(lookEvery)
	are("removed", false, true)

	moved := tokensPath(t, "tokens:\n"+entry("one", "as-1"))
	info, err := os.Stat(path) // another file of the same size and time
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(moved, info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(moved, path); err != nil {
		t.Fatal(err)
	}
	*now = now.Add(lookEvery)
	are("replaced", true, false)

	for what, text := range map[string]string{"broken": "tokens:\n  - {sha256: ", "empty": "", "of another kind": "hub: {url: x}\n"} {
		log.Reset()
		write(t, path, text)
		for range 30 { // half a minute
			*now = now.Add(lookEvery)
			are(what, true, false)
		}
		if n := strings.Count(log.String(), "stay in force"); n != 1 {
			t.Errorf("%s: said %d times in half a minute:\n%s", what, n, log)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	*now = now.Add(lookEvery)
	are("gone", true, false)

	write(t, path, "tokens: []\n")
	*now = now.Add(lookEvery)
	are("without tokens", false, false)
	write(t, path, both)
	*now = now.Add(-time.Hour) // the clock was set back
	are("there again", true, true)
}
