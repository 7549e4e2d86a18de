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
	// The directory of the spool, on a local disk. Every edge needs its own.
	Dir string `yaml:"dir"`
	// The size of the spool, for all signals together, with the messages that are held back. When
	// it is full, on_full decides what happens.
	MaxBytes config.Bytes `yaml:"max_bytes"`
	// How much of max_bytes each signal has, in percent, so that a burst of one signal does not
	// take the room of the others.
	Shares SharesConfig `yaml:"shares"`
	// How much of the disk stays free. Below it requests are refused with a retryable code, because
	// a spool on a full disk cannot be trusted.
	Reserve config.Bytes `yaml:"disk_reserve"`
	// What happens when a signal's share is full: refuse (requests are refused with a retryable
	// code, nothing is lost) or drop_oldest (the oldest messages are lost, and counted).
	OnFull string `yaml:"on_full"`
	// What an acknowledgement means: fsync (the data survives a power cut) or os (it survives kill
	// -9).
	Durability string `yaml:"durability"`
	// How long a request waits for others that could share its fsync. Requests that arrive while
	// the previous group is written share one anyway.
	Linger time.Duration `yaml:"linger"`
	// The most items in a group of requests that share an fsync; a single request may have more.
	MaxItems int `yaml:"max_group_items"`
	// How messages are compressed: s2 (fast) or zstd (a quarter to a third fewer bytes on disk and
	// to the hub, for three to five times the CPU time).
	Compression envelope.Encoding `yaml:"compression"`
	// How long messages are kept after the hub has acknowledged them: three times the sync_interval
	// of its servers, or 0 where they sync always and are never restored from a backup. They are
	// the first to be deleted when the spool is full.
	Retain time.Duration `yaml:"retain_after_ack"`
}

// SharesConfig is in percent of spool.max_bytes.
type SharesConfig struct {
	// Share of traces, in percent of spool.max_bytes.
	Traces int64 `yaml:"traces"`
	// Share of metrics, in percent of spool.max_bytes.
	Metrics int64 `yaml:"metrics"`
	// Share of logs, in percent of spool.max_bytes.
	Logs int64 `yaml:"logs"`
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

// minShare has room for a few messages of the largest size.
const minShare = 4 << 20

// Validate reports every mistake at once.
func (c Config) Validate() error { //nolint:gocyclo // a table: one condition a key
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
