package spool

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/penstock/penstock/pkg/disk"
)

// epoch is the nonce that begins the ids of a spool's messages; no other instance
// can guess it. The hub takes two messages with one id for the same message, so a
// nonce is used only as long as a sequence of the spool cannot be given twice:
// for the same directory, on the same boot of the machine. A copy of the
// directory has another inode; a power cut may take messages that the hub has
// seen, but not without a boot.
type epoch struct {
	Nonce string `json:"nonce"`
	Boot  string `json:"boot"`  // of the kernel
	Inode uint64 `json:"inode"` // of the directory
}

const epochFile = "epoch"

// loadEpoch returns the nonce of a spool directory, a new one where it must be, or
// where anew says so. A new one is good also when it cannot be written down, with an
// error: the next start makes another.
func loadEpoch(dir string, anew bool) (string, error) {
	path := filepath.Join(dir, epochFile)
	now, err := newEpoch(dir)
	if err != nil {
		return "", fmt.Errorf("spool epoch: %w", err)
	}
	var old epoch
	if text, err := os.ReadFile(path); err == nil && !anew && json.Unmarshal(text, &old) == nil {
		if now.Boot != "" && old.Nonce != "" && old.Boot == now.Boot && old.Inode == now.Inode {
			return old.Nonce, nil
		}
	}
	text, err := json.Marshal(now)
	if err == nil {
		err = disk.WriteSynced(path, text)
	}
	if err != nil {
		_ = os.Remove(path)
		return now.Nonce, fmt.Errorf("spool epoch: %w", err)
	}
	return now.Nonce, nil
}

func newEpoch(dir string) (e epoch, err error) {
	inode, err := disk.Inode(dir)
	if err != nil {
		return e, err
	}
	boot, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	var nonce [16]byte
	_, _ = rand.Read(nonce[:])
	return epoch{Nonce: hex.EncodeToString(nonce[:]), Boot: strings.TrimSpace(string(boot)), Inode: inode}, nil
}
