package spool

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"strings"
	"sync"

	"github.com/penstock/penstock/pkg/disk"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Position is how far a reader of the spool has come with one signal.
type Position struct {
	Done uint64 `json:"done"` // sequence of the spool up to which it owes nothing
	// Hub is the sequence that the hub's stream gave to the last message that it
	// acknowledged; 0 when none has been, or with other readers.
	Hub uint64 `json:"hub,omitempty"`
}

// positions are those of all readers, in a file beside the streams: a checksum, and
// the state in JSON. It is written every second. If a position in it is too low, messages
// are sent again; the hub recognises their ids, unless the machine was booted in between.
type positions struct {
	path   string
	saving sync.Mutex // one writer of the file

	mu struct {
		sync.Mutex
		state positionFile
		dirty bool
	}
}

type positionFile struct {
	// Appended is the last known sequence of each signal's stream.
	Appended map[string]uint64 `json:"appended"`
	// Readers are by name and signal: hub/traces.
	Readers map[string]Position `json:"readers"`
}

// loadPositions reads the file; one that cannot be read counts as missing.
func loadPositions(path string) (*positions, error) {
	m := &positions{path: path}
	text, err := os.ReadFile(path)
	if err == nil {
		sum, state, _ := strings.Cut(string(text), "\n")
		if sum != fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(state))) {
			err = errors.New("the checksum does not match")
		} else if err = json.Unmarshal([]byte(state), &m.mu.state); err != nil {
			m.mu.state = positionFile{}
		}
	}
	if m.mu.state.Appended == nil {
		m.mu.state.Appended = map[string]uint64{}
	}
	if m.mu.state.Readers == nil {
		m.mu.state.Readers = map[string]Position{}
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("positions of the spool: %w", err)
	}
	return m, err
}

func (m *positions) get(reader string, sig otlpwire.Signal) Position {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.state.Readers[reader+"/"+sig.String()]
}

// advance moves a position forward, never back.
func (m *positions) advance(reader string, sig otlpwire.Signal, done, hub uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	key := reader + "/" + sig.String()
	now := m.mu.state.Readers[key]
	now.Done = max(now.Done, done)
	if hub > 0 {
		now.Hub = hub
	}
	m.mu.state.Readers[key], m.mu.dirty = now, true
}

// rewind sets a position, also to a lower one.
func (m *positions) rewind(reader string, sig otlpwire.Signal, to Position) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mu.state.Readers[reader+"/"+sig.String()], m.mu.dirty = to, true
}

// appended notes the last sequence of a stream.
func (m *positions) appended(sig otlpwire.Signal, seq uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.mu.state.Appended[sig.String()] < seq {
		m.mu.state.Appended[sig.String()], m.mu.dirty = seq, true
	}
}

// end returns the last sequence that was ever noted.
func (m *positions) end(sig otlpwire.Signal) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mu.state.Appended[sig.String()]
}

// reconcile compares the positions with a log that was opened and ends at last. It returns
// how many messages were once in the log, are missing from its end and are not known to be
// in the hub. Their sequences will be given to other messages, so no position may be above
// last. The sequences of messages that the hub has are not given again.
func (m *positions) reconcile(sig otlpwire.Signal, last uint64) (missing uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	highest := m.mu.state.Appended[sig.String()]
	last = max(last, m.mu.state.Readers[Hub+"/"+sig.String()].Done)
	for key, mk := range m.of(sig) {
		highest = max(highest, mk.Done)
		m.mu.state.Readers[key] = Position{Done: min(mk.Done, last), Hub: mk.Hub}
	}
	m.mu.state.Appended[sig.String()], m.mu.dirty = last, true
	return max(highest, last) - last
}

// of returns the positions of a signal by key.
func (m *positions) of(sig otlpwire.Signal) map[string]Position {
	all := map[string]Position{}
	for key, mk := range m.mu.state.Readers {
		if strings.HasSuffix(key, "/"+sig.String()) {
			all[key] = mk
		}
	}
	return all
}

// save writes the file if something has changed, and returns when it is on the
// disk: before messages are deleted from the spool, their positions must be stored.
func (m *positions) save() error {
	m.saving.Lock()
	defer m.saving.Unlock()
	m.mu.Lock()
	if !m.mu.dirty {
		m.mu.Unlock()
		return nil
	}
	state, err := json.Marshal(m.mu.state)
	m.mu.dirty = false
	m.mu.Unlock()
	if err == nil {
		err = disk.WriteSynced(m.path, append(fmt.Appendf(nil, "%08x\n", crc32.ChecksumIEEE(state)), state...))
	}
	if err != nil {
		m.mu.Lock()
		m.mu.dirty = true
		m.mu.Unlock()
		return fmt.Errorf("positions of the spool: %w", err)
	}
	return nil
}
