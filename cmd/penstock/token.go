package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"flag"
	"fmt"
	"os"

	"github.com/penstock/penstock/pkg/envelope"
)

// token prints a new token once, and the entry for the router's tokens file,
// which holds its hash only.
func token(args []string) int {
	fs := flag.NewFlagSet("penstock token", flag.ContinueOnError)
	var in envelope.Instance
	fs.StringVar(&in.ID, "instance-id", "", "instance.id that the token stands for (required)")
	fs.StringVar(&in.Name, "instance-name", "", "instance.name; default: the id")
	fs.StringVar(&in.Customer, "customer-id", "", "customer.id")
	fs.Usage = func() {
		fmt.Fprint(fs.Output(), "Usage: penstock token -instance-id ID [flags]\n\nMakes a bearer token for services that have no edge. The token goes to standard\nerror, once; the entry for the router's tokens file goes to standard output.\n\nFlags:\n")
		fs.PrintDefaults()
	}
	if err := fs.Parse(args); err != nil {
		return parseExit(err)
	}
	if err := in.Validate(); err != nil {
		fmt.Fprintf(os.Stderr, "penstock token: %v\n", err)
		return 2
	}
	var secret [32]byte
	_, _ = rand.Read(secret[:])
	tok := base64.RawURLEncoding.EncodeToString(secret[:])
	fmt.Fprintf(os.Stderr, "token (shown once): %s\n", tok)
	fmt.Printf("  - sha256: %x\n    instance_id: %s\n", sha256.Sum256([]byte(tok)), in.ID)
	if in.Name != "" {
		fmt.Printf("    instance_name: %q\n", in.Name)
	}
	if in.Customer != "" {
		fmt.Printf("    customer_id: %q\n", in.Customer)
	}
	return 0
}
