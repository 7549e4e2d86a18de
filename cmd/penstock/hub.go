package main

import (
	"bufio"
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
)

// hubFlags say how a command reaches the hub: by a context, by the environment, and by flags, which
// override these.
type hubFlags struct {
	fs      *flag.FlagSet
	context string
	given   bus.Config // by flags
	top     bus.Topology
}

const hubUsage = `The hub is taken from -context; else from -hub or HUB_URL, with HUB_CREDS, or with
-user and HUB_PASSWORD; else the current context; else nats://127.0.0.1:4222. Contexts
are in %s:

  current: prod        # used if neither -context nor HUB_URL is set
  contexts:
    prod: {url: tls://hub:4222, creds: /home/me/admin.creds}
    test: {url: nats://test:4222, user: operator, password: "${TEST_PASSWORD}", insecure: true}
`

func (h *hubFlags) add(fs *flag.FlagSet, name string) {
	h.fs = fs
	h.given = bus.Config{Name: name}
	h.top = bus.DefaultTopology()
	fs.StringVar(&h.context, "context", "", "`name` of a hub in "+contextsFile())
	fs.StringVar(&h.given.URL, "hub", "", "`URL` of the hub; default: HUB_URL, or nats://127.0.0.1:4222")
	fs.StringVar(&h.given.Creds, "creds", "", "`file` with a NATS credential; default: HUB_CREDS")
	fs.StringVar(&h.given.User, "user", "", "`name` of a NATS user, whose password is in HUB_PASSWORD")
	fs.BoolVar(&h.given.Insecure, "insecure", false, "allow plain text to a hub that is not on this machine; default: HUB_INSECURE")
	fs.StringVar(&h.given.TLS.CA, "tls-ca", "", "`file` with the authorities that signed the hub's certificate; default: HUB_CA_FILE, or the system's")
	fs.StringVar(&h.given.TLS.Cert, "tls-cert", "", "`file` with a client certificate")
	fs.StringVar(&h.given.TLS.Key, "tls-key", "", "`file` with its private key")
	fs.BoolVar(&h.given.HandshakeFirst, "tls-handshake-first", false, "the hub has tls.handshake_first")
	fs.StringVar(&h.given.InboxPrefix, "inbox-prefix", "", "prefix of the `subject` on which answers arrive, if the credential allows only its own; default: _INBOX_"+name)
	fs.IntVar(&h.top.Replicas, "replicas", h.top.Replicas, "replicas of the bucket, if it is created")
}

// contextsFile is the file with the contexts.
func contextsFile() string {
	dir, err := os.UserConfigDir()
	if err != nil {
		return filepath.Join("~", ".config", "penstock", "contexts.yaml")
	}
	return filepath.Join(dir, "penstock", "contexts.yaml")
}

// fromContext returns the configuration of a context; the current one if the name is empty, and an empty
// one if there is no current one.
func fromContext(name string) (cfg bus.Config, err error) {
	file := contextsFile()
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) && name == "" {
		return cfg, nil
	} else if err != nil {
		return cfg, err
	}
	var all struct {
		Current  string               `yaml:"current"`
		Contexts map[string]yaml.Node `yaml:"contexts"`
	}
	if err := yaml.Unmarshal(text, &all); err != nil {
		return cfg, fmt.Errorf("%s: %w", file, err)
	}
	name = cmp.Or(name, all.Current)
	node, there := all.Contexts[name]
	switch {
	case name == "":
		return cfg, nil
	case !there:
		return cfg, fmt.Errorf("%s has no context %q; it has %s", file, name, strings.Join(slices.Sorted(maps.Keys(all.Contexts)), ", "))
	}
	// Parsed separately, because variables of other contexts may not be set.
	if text, err = yaml.Marshal(&node); err == nil {
		err = config.Load(fmt.Sprintf("%s, context %s", file, name), text, &cfg)
	}
	return cfg, err
}

// config combines context, environment and flags.
func (h *hubFlags) config() (cfg bus.Config, err error) {
	if h.context != "" && h.given.URL != "" {
		return cfg, errors.New("-context and -hub both name a hub: set one")
	}
	url := os.Getenv("HUB_URL")
	if h.context != "" || url+h.given.URL == "" {
		if cfg, err = fromContext(h.context); err != nil {
			return cfg, err
		}
	}
	if cfg.URL == "" {
		cfg.ApplyEnv(os.Getenv)
	}
	cfg.Name, cfg.InboxPrefix = h.given.Name, cmp.Or(h.given.InboxPrefix, cfg.InboxPrefix)
	if cfg.URL == "" {
		cfg.URL = "nats://127.0.0.1:4222"
	}
	h.fs.Visit(func(f *flag.Flag) {
		switch f.Name {
		case "hub":
			cfg.URL = h.given.URL
		case "creds":
			cfg.Creds, cfg.User, cfg.Pass, cfg.Token = h.given.Creds, "", "", ""
		case "user":
			cfg.User, cfg.Pass, cfg.Creds, cfg.Token = h.given.User, config.Secret(os.Getenv("HUB_PASSWORD")), h.given.Creds, ""
		case "insecure":
			cfg.Insecure = h.given.Insecure
		case "tls-ca":
			cfg.TLS.CA = h.given.TLS.CA
		case "tls-cert":
			cfg.TLS.Cert = h.given.TLS.Cert
		case "tls-key":
			cfg.TLS.Key = h.given.TLS.Key
		case "tls-handshake-first":
			cfg.HandshakeFirst = h.given.HandshakeFirst
		}
	})
	return cfg, errors.Join(cfg.Validate("hub"), cfg.CheckFiles("hub"))
}

// dial connects once.
func (h *hubFlags) dial() (*bus.Conn, error) {
	cfg, err := h.config()
	if err != nil {
		return nil, err
	}
	return bus.Dial(cfg, slog.New(slog.DiscardHandler))
}

// help prints a command's usage, its flags and how it finds the hub.
func (h *hubFlags) help(usage string) func() {
	return func() {
		fmt.Fprint(h.fs.Output(), usage)
		h.fs.PrintDefaults()
		fmt.Fprintf(h.fs.Output(), "\n"+hubUsage, contextsFile())
	}
}

// confirmed asks a question at the terminal.
func confirmed(question string, args ...any) bool {
	fmt.Printf(question+"? yes or no: ", args...)
	answer, _ := bufio.NewReader(os.Stdin).ReadString('\n')
	return strings.TrimSpace(answer) == "yes"
}

// caller is the name of the user who runs this command.
func caller() string {
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return os.Getenv("USER")
}

// words returns the arguments before the first flag, and those after the last.
func words(fs *flag.FlagSet, args []string) (list []string, err error) {
	for len(args) > 0 && len(args[0]) > 0 && args[0][0] != '-' {
		list, args = append(list, args[0]), args[1:]
	}
	err = app.Parse(fs, args)
	return append(list, fs.Args()...), err
}

// failed prints an error of a command.
func failed(command string, err error) int {
	fmt.Fprintf(os.Stderr, "penstock %s: %v\n", command, err)
	return 1
}

// missing reports what is missing in a command line.
func missing(command, what string) int {
	fmt.Fprintf(os.Stderr, "penstock %s: %s; see penstock %s -help\n", command, what, command)
	return 2
}

// choose checks a command's verb and its arguments, and reports what is wrong.
func choose(command string, words []string, takes map[string][]string) (ok bool) {
	names := strings.Join(slices.Sorted(maps.Keys(takes)), ", ")
	if len(words) == 0 {
		missing(command, "no action given; want one of "+names)
		return false
	}
	want, known := takes[words[0]]
	switch {
	case !known:
		missing(command, fmt.Sprintf("unknown action %q; want one of %s", words[0], names))
	case want == nil:
		return true // any number
	case len(words)-1 < len(want):
		missing(command+" "+words[0], want[len(words)-1]+" is missing")
	case len(words)-1 > len(want):
		missing(command+" "+words[0], fmt.Sprintf("unexpected argument %q", words[len(want)+1]))
	default:
		return true
	}
	return false
}
