package main

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/user"

	"github.com/penstock/penstock/pkg/bus"
)

// hubFlags say how a command reaches the hub.
type hubFlags struct {
	cfg bus.Config
	top bus.Topology
}

func (h *hubFlags) add(fs *flag.FlagSet, name string) {
	h.cfg = bus.Config{URL: os.Getenv("HUB_URL"), Creds: os.Getenv("HUB_CREDS"), Name: name}
	if h.cfg.URL == "" {
		h.cfg.URL = "nats://127.0.0.1:4222"
	}
	h.top = bus.DefaultTopology()
	fs.StringVar(&h.cfg.URL, "hub", h.cfg.URL, "`URL` of the hub; default: HUB_URL")
	fs.StringVar(&h.cfg.Creds, "creds", h.cfg.Creds, "`file` with a NATS credential; default: HUB_CREDS")
	fs.StringVar(&h.cfg.InboxPrefix, "inbox-prefix", "", "`subject` that answers come to, where the credential allows no other than its own; default: _INBOX_"+name)
	fs.IntVar(&h.top.Replicas, "replicas", h.top.Replicas, "replicas of the bucket, when it is not there yet")
}

// dial connects once.
func (h *hubFlags) dial() (*bus.Conn, error) { return bus.Dial(h.cfg, slog.New(slog.DiscardHandler)) }

// caller names who runs this command.
func caller() string {
	if u, err := user.Current(); err == nil {
		return u.Username
	}
	return os.Getenv("USER")
}

// words takes the arguments before the first flag, and those after the last.
func words(fs *flag.FlagSet, args []string) (list []string, err error) {
	for len(args) > 0 && len(args[0]) > 0 && args[0][0] != '-' {
		list, args = append(list, args[0]), args[1:]
	}
	err = fs.Parse(args)
	return append(list, fs.Args()...), err
}

// failed prints an error of a command.
func failed(command string, err error) int {
	fmt.Fprintf(os.Stderr, "penstock %s: %v\n", command, err)
	return 1
}
