package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"text/template"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/disk"
	"github.com/penstock/penstock/pkg/envelope"
)

const natsConfigUsage = `Usage: penstock nats-config add-instance ID [-dir DIR]
       penstock nats-config remove-instance ID [-dir DIR]
       penstock nats-config ca [-dir DIR] -host NAME

Writes the parts of the hub's configuration that differ between installations. DIR is the directory
deploy/nats, or a copy of it.

add-instance creates an account for an instance, in instances/ID.conf, and includes it in
instances.conf. The passwords of its edge and of the user that may have it replayed are shown
once; the file holds their bcrypt hashes. A running hub reads it after
nats-server --signal reload. remove-instance removes it again; the reload ends its
connections.

ca creates a private certificate authority, for trials, and a certificate for the hub:
ca.crt, ca.key, server.crt and server.key. Routers, sinks and edges then set
hub.tls.ca_file to ca.crt. An existing ca.key is used again.

Examples:
  penstock nats-config add-instance as-7 -dir deploy/nats
  penstock nats-config ca -dir tls -host hub.example.com,10.0.0.5

Flags:
`

// natsConfig writes parts of the hub's configuration.
func natsConfig(args []string) int {
	fs := flag.NewFlagSet("penstock nats-config", flag.ContinueOnError)
	dir, hosts, valid := fs.String("dir", ".", "`directory` to write to"), list{}, config.Duration(365*24*time.Hour)
	fs.Var(&hosts, "host", "`names` and addresses of the hub, separated by commas (ca)")
	fs.Var(&valid, "valid", "how long the hub's certificate is valid (ca)")
	fs.Usage = func() { fmt.Fprint(fs.Output(), natsConfigUsage); fs.PrintDefaults() }
	words, err := words(fs, args)
	if err != nil {
		return parseExit(err)
	}
	id := []string{"ID of an instance"}
	if !choose("nats-config", words, map[string][]string{"add-instance": id, "remove-instance": id, "ca": {}}) {
		return 2
	}
	switch words[0] {
	case "add-instance":
		err = addInstance(*dir, words[1])
	case "remove-instance":
		err = removeInstance(*dir, words[1])
	case "ca":
		if len(hosts) == 0 {
			return missing("nats-config", "-host is not set: want the names by which the hub is reached")
		}
		err = makeCA(*dir, hosts, time.Duration(valid))
	}
	if err != nil {
		return failed("nats-config "+words[0], err)
	}
	return 0
}

// instanceConf is the account of one instance.
var instanceConf = template.Must(template.New("").Parse(`# Instance {{.ID}}, by penstock nats-config. An edge may publish to the three subjects of its own
# instance and receive the answers; it can read nothing, not even its own data, and use no
# API. The other user may have this one instance replayed: the sinks do it for it
# (penstock replay -as {{.ID}}).
"instance-{{.ID}}": {
  imports: [
    { service: { account: HUB, subject: "otlp.*.{{.ID}}" } }
    { service: { account: HUB, subject: "penstock.jobs.{{.ID}}.*" } }
    { service: { account: HUB, subject: "penstock.hold.{{.ID}}" } }
  ]
  limits: { max_connections: 32, max_subscriptions: 64, max_payload: 1114112 }
  users: [
    {
      user: edge-{{.ID}}, password: "{{.Edge}}"
      permissions: {
        publish:   { allow: ["otlp.traces.{{.ID}}", "otlp.metrics.{{.ID}}", "otlp.logs.{{.ID}}", "penstock.hold.{{.ID}}"] }
        subscribe: { allow: ["_INBOX_{{.ID}}.>"] }
      }
    }
    {
      user: replay-{{.ID}}, password: "{{.Replay}}"
      permissions: {
        publish:   { allow: ["penstock.jobs.{{.ID}}.*"] }
        subscribe: { allow: ["_INBOX_replay-{{.ID}}.>"] }
      }
    }
  ]
}
`))

func instanceLine(id string) string { return "include ./instances/" + id + ".conf" }

func addInstance(dir, id string) error {
	if err := (envelope.Instance{ID: id}).Validate(); err != nil {
		return err
	}
	index := filepath.Join(dir, "instances.conf")
	text, err := os.ReadFile(index)
	if err != nil {
		return fmt.Errorf("%w; -dir must be deploy/nats, or a copy of it", err)
	}
	file := filepath.Join(dir, "instances", id+".conf")
	if _, err := os.Stat(file); err == nil {
		return fmt.Errorf("%s exists already; remove-instance deletes it", file)
	}
	edge, replay := rand.Text(), rand.Text()
	var b bytes.Buffer
	hash := func(password string) string {
		// The lowest cost: 130 random bits need no stretching, and a server to which ten
		// thousand edges reconnect at once computes as many hashes.
		h, _ := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost) // fails only for longer passwords
		return string(h)
	}
	if err := instanceConf.Execute(&b, map[string]string{"ID": id, "Edge": hash(edge), "Replay": hash(replay)}); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return err
	}
	if err := disk.WriteSynced(file, b.Bytes()); err != nil {
		return err
	}
	if err := disk.Rewrite(index, append(bytes.TrimRight(text, "\n"), []byte("\n"+instanceLine(id)+"\n")...)); err != nil {
		return err
	}
	fmt.Printf("instance %s: %s, included in %s\n", id, file, index)
	fmt.Printf("  its edge   hub.user: edge-%s  hub.password: %s\n", id, edge)
	fmt.Printf("  replays    penstock replay -as %s -user replay-%s, with HUB_PASSWORD=%s\n", id, id, replay)
	fmt.Println("The passwords are shown only once. A running hub reads the account after nats-server --signal reload.")
	return nil
}

func removeInstance(dir, id string) error {
	index := filepath.Join(dir, "instances.conf")
	text, err := os.ReadFile(index)
	if err != nil {
		return fmt.Errorf("%w; -dir must be deploy/nats, or a copy of it", err)
	}
	var kept []string
	found := false
	for line := range strings.Lines(string(text)) {
		if strings.TrimSpace(line) == instanceLine(id) {
			found = true
			continue
		}
		kept = append(kept, line)
	}
	if !found {
		return fmt.Errorf("%s does not include instance %q", index, id)
	}
	if err := disk.Rewrite(index, []byte(strings.Join(kept, ""))); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, "instances", id+".conf")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	fmt.Printf("instance %s is removed. A running hub ends its connections after nats-server --signal reload.\n", id)
	return nil
}

// makeCA creates an authority, or uses the existing one, and a server certificate.
func makeCA(dir string, hosts []string, valid time.Duration) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	ca, key, err := authority(dir)
	if err != nil {
		return err
	}
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	cert := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: hosts[0]},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(valid),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, // servers are clients of each other's routes
	}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			cert.IPAddresses = append(cert.IPAddresses, ip)
		} else {
			cert.DNSNames = append(cert.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, ca, &own.PublicKey, key)
	if err != nil {
		return err
	}
	if err := writePair(dir, "server", der, own); err != nil {
		return err
	}
	fmt.Printf("%s: ca.crt for routers, sinks and edges (hub.tls.ca_file), server.crt and server.key for the hub, valid for %s until %s; keep ca.key secret\n",
		dir, strings.Join(hosts, ", "), cert.NotAfter.Format(time.DateOnly))
	return nil
}

func authority(dir string) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	certFile, keyFile := filepath.Join(dir, "ca.crt"), filepath.Join(dir, "ca.key")
	keyText, err := os.ReadFile(keyFile)
	if err == nil {
		certText, err := os.ReadFile(certFile)
		if err != nil {
			return nil, nil, err
		}
		keyBlock, _ := pem.Decode(keyText)
		certBlock, _ := pem.Decode(certText)
		if keyBlock == nil || certBlock == nil {
			return nil, nil, fmt.Errorf("%s or %s is not in PEM", keyFile, certFile)
		}
		cert, err := x509.ParseCertificate(certBlock.Bytes)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", certFile, err)
		}
		key, err := x509.ParseECPrivateKey(keyBlock.Bytes)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", keyFile, err)
		}
		return cert, key, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	ca := &x509.Certificate{
		SerialNumber: serial(), Subject: pkix.Name{CommonName: "penstock private CA"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(10 * 365 * 24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		return nil, nil, err
	}
	if ca, err = x509.ParseCertificate(der); err != nil {
		return nil, nil, err
	}
	return ca, key, writePair(dir, "ca", der, key)
}

func serial() *big.Int {
	n, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	return n
}

func writePair(dir, name string, der []byte, key *ecdsa.PrivateKey) error {
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	cert := filepath.Join(dir, name+".crt")
	return errors.Join(
		disk.WriteSynced(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		os.Chmod(cert, 0o644), // readable by everybody
		disk.WriteSynced(filepath.Join(dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private})))
}
