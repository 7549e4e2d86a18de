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
// can guess it. The rest of an id is the message's sequence. The hub treats two
// messages with one id as the same message and does not store the second, so a nonce
// is used only as long as no sequence of the spool can be given twice.
//
// That happens when the end of a log is lost: a power cut may take messages that the
// hub has seen, if they were not synced, and the next messages get their sequences.
// Without a boot this cannot happen, because the page cache survives the process. It
// also happens when a copy of the directory is used. So the nonce is bound to the
// kernel's boot id and to the directory's inode, which is another one for a copy.
//
// The nonce also changes when messages are missing from the end of a log (see
// opener.open), when messages were deleted and the positions could not be written
// (see Spool.letGo), and when the hub knows an id that was never sent (see
// [Store.Renew]). What was sent under the old nonce and not acknowledged may then be
// stored twice in the hub, but no message is mistaken for another.
type epoch struct {
	Nonce string `json:"nonce"`
	Boot  string `json:"boot"`  // of the kernel
	Inode uint64 `json:"inode"` // of the directory
}

const epochFile = "epoch"

// loadEpoch returns the nonce of a spool directory, a new one where necessary or if
// anew is set. If a new one cannot be stored, it returns it with an error: it can be
// used, and the next start makes another.
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
