package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/disk"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/tokens"
)

const tokenUsage = `Usage: penstock token -instance-id ID [-file tokens.yaml] [flags]

Creates a bearer token for services that have no edge. The token is printed to standard
error, once. Its entry is appended to -file, which is created if necessary, or printed to
standard output: a router reads the entries below the key tokens of the file in
gateway.tokens_file, and reloads them when the file changes. They have only the token's
hash. A second token of an instance, with the same name and customer, allows a rotation.

Example:
  penstock token -instance-id as-1 -customer-id acme -file tokens.yaml

Flags:
`

// token prints a new token once, and adds its entry to a router's tokens file.
func token(args []string) int {
	fs := flag.NewFlagSet("penstock token", flag.ContinueOnError)
	var in envelope.Instance
	var file string
	var until notAfter
	fs.StringVar(&in.ID, "instance-id", "", "instance.id of the token's sender (required)")
	fs.StringVar(&in.Name, "instance-name", "", "instance.name; default: the id")
	fs.StringVar(&in.Customer, "customer-id", "", "customer.id")
	fs.StringVar(&in.Namespace, "service-namespace", "", "service.namespace, where the application sets none")
	fs.StringVar(&in.Environment, "deployment-environment", "", "deployment.environment, where the application sets none")
	fs.Var(&until, "not-after", "refuse the token from this `time` on, such as 2027-01-31T00:00:00Z, or 30d for 30 days from now")
	fs.StringVar(&file, "file", "", "add the entry to this tokens `file`")
	fs.Usage = func() { fmt.Fprint(fs.Output(), tokenUsage); fs.PrintDefaults() }
	if err := app.Parse(fs, args); err != nil {
		return parseExit(err)
	}
	if in.ID == "" {
		return missing("token", "-instance-id is not set: want the instance that the token identifies")
	}
	if err := in.Validate(); err != nil {
		fmt.Fprintf(os.Stderr, "penstock token: %v\n", err)
		return 2
	}
	var secret [32]byte
	_, _ = rand.Read(secret[:])
	tok := base64.RawURLEncoding.EncodeToString(secret[:])
	entry := fmt.Sprintf("  - sha256: %x\n    instance_id: %s\n", sha256.Sum256([]byte(tok)), in.ID)
	for key, value := range in.Rest() {
		entry += fmt.Sprintf("    %s: %q\n", key, value)
	}
	if !until.IsZero() {
		entry += fmt.Sprintf("    not_after: %s\n", &until)
	}
	if file != "" {
		if err := addToken(file, entry); err != nil {
			return failed("token", err)
		}
		fmt.Printf("added to %s\n", file)
	} else {
		fmt.Print(entry)
	}
	fmt.Fprintf(os.Stderr, "token (shown once): %s\n", tok)
	return 0
}

// notAfter is a flag: a time, or a duration from now.
type notAfter struct{ time.Time }

// Set reads the flag.
func (n *notAfter) Set(text string) (err error) {
	if n.Time, err = time.Parse(time.RFC3339, text); err == nil {
		return nil
	}
	d, err := config.ParseDuration(text)
	if err != nil || d <= 0 {
		return errors.New("want a time such as 2027-01-31T00:00:00Z, or a duration from now such as 30d")
	}
	n.Time = time.Now().Add(d)
	return nil
}

// String returns it in the format of a tokens file.
func (n *notAfter) String() string {
	if n.IsZero() {
		return ""
	}
	return n.UTC().Format(time.RFC3339)
}

// addToken adds an entry to a tokens file, which keeps its mode and owner, and which is replaced
// atomically. The result is checked before.
func addToken(file, entry string) error {
	text, err := os.ReadFile(file)
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && len(text) == 0:
		entry = "tokens:\n" + entry
	case err != nil:
		return err
	case text[len(text)-1] != '\n':
		entry = "\n" + entry
	}
	text = append(text, entry...)
	if err := tokens.Check(file, text); err != nil {
		return fmt.Errorf("%s would not be a valid tokens file; correct it, or add this by hand:\n%s%w", file, entry, err)
	}
	return disk.Rewrite(file, text)
}
