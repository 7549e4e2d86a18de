package spool

import (
	"errors"
	"fmt"
	"time"

	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Config bounds the spool.
type Config struct {
	Dir string `yaml:"dir"` // one edge, one directory, on a local disk
	// MaxBytes is for all signals together, with what is held back. At the bound
	// OnFull says what happens.
	MaxBytes config.Bytes `yaml:"max_bytes"`
	// Shares is how much of MaxBytes each signal has, in percent: a storm of one
	// does not take the room of the others.
	Shares SharesConfig `yaml:"shares"`
	// Reserve is how much of the disk stays free: below it senders are told to
	// retry, because a spool that meets a full disk cannot be trusted.
	Reserve config.Bytes `yaml:"disk_reserve"`
	// OnFull is one of refuse (senders are told to retry, nothing is lost) and drop_oldest
	// (what is dropped is lost, and counted).
	OnFull string `yaml:"on_full"`
	// Durability is one of fsync (survives a power cut) and os (survives kill -9).
	Durability string `yaml:"durability"`
	// Linger is how long a request waits for others to share its fsync when none are
	// waiting. They share it anyway while the one before is written.
	Linger time.Duration `yaml:"linger"`
	// MaxItems bounds the items of a group; a single request may have more.
	MaxItems int `yaml:"max_group_items"`
	// Compression is one of s2 (quick) and zstd (a quarter to a third fewer bytes on disk
	// and on the way to the hub, for three to five times the CPU time).
	Compression envelope.Encoding `yaml:"compression"`
	// Retain is how long messages are kept that the hub has: three times the
	// sync_interval of its servers, and 0 where they sync always and are never
	// restored from a backup. They are the first to go when there is no room.
	Retain time.Duration `yaml:"retain_after_ack"`
}

// SharesConfig is in percent of spool.max_bytes.
type SharesConfig struct {
	Traces  int64 `yaml:"traces"`  // share of traces, in percent of spool.max_bytes
	Metrics int64 `yaml:"metrics"` // share of metrics, in percent
	Logs    int64 `yaml:"logs"`    // share of logs, in percent
}

// What happens when the spool is full.
const (
	Refuse     = "refuse"
	DropOldest = "drop_oldest"
)

// share returns the bytes that a signal may take.
func (c Config) share(sig otlpwire.Signal) config.Bytes {
	percent := [...]int64{otlpwire.Traces: c.Shares.Traces, otlpwire.Metrics: c.Shares.Metrics, otlpwire.Logs: c.Shares.Logs}[sig]
	return c.MaxBytes / 100 * config.Bytes(percent)
}

// minShare holds a few messages of the largest size.
const minShare = 4 << 20

func (c Config) Validate() error {
	var errs []error
	wrong := func(format string, args ...any) { errs = append(errs, fmt.Errorf("spool."+format, args...)) }
	if c.Dir == "" {
		wrong("dir is not set")
	}
	if c.Durability != "fsync" && c.Durability != "os" {
		wrong("durability is %q, want fsync or os", c.Durability)
	}
	if c.OnFull != Refuse && c.OnFull != DropOldest {
		wrong("on_full is %q, want %s or %s", c.OnFull, Refuse, DropOldest)
	}
	if c.Compression != envelope.S2 && c.Compression != envelope.Zstd {
		wrong("compression is %q, want s2 or zstd", c.Compression)
	}
	if sum := c.Shares.Traces + c.Shares.Metrics + c.Shares.Logs; sum > 100 || c.Shares.Traces < 1 || c.Shares.Metrics < 1 || c.Shares.Logs < 1 {
		wrong("shares are %d, %d and %d percent, want at least 1 each and 100 together", c.Shares.Traces, c.Shares.Metrics, c.Shares.Logs)
	} else if least := (minShare*100/config.Bytes(min(c.Shares.Traces, c.Shares.Metrics, c.Shares.Logs))>>20 + 1) << 20; c.MaxBytes < least {
		wrong("max_bytes is %v, want at least %v, so that the smallest share holds %v", c.MaxBytes, least, config.Bytes(minShare))
	}
	if c.Linger < 0 || c.Linger > 100*time.Millisecond {
		wrong("linger is %v, want 0 to 100ms", c.Linger)
	}
	if c.MaxItems < 1 {
		wrong("max_group_items is %d, want at least 1", c.MaxItems)
	}
	if c.Retain < 0 || c.Retain > 24*time.Hour {
		wrong("retain_after_ack is %v, want 0 to 24h", c.Retain)
	}
	return errors.Join(errs...)
}

// DefaultConfig is that of an edge beside one AppServer.
func DefaultConfig() Config {
	return Config{
		Dir: "penstock-data/spool", MaxBytes: 3 << 30, Shares: SharesConfig{Traces: 40, Metrics: 30, Logs: 30}, Reserve: 512 << 20,
		OnFull: Refuse, Durability: "fsync", MaxItems: 1 << 16, Compression: envelope.S2, Retain: 6 * time.Minute,
	}
}
