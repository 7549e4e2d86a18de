package broker

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// record writes what a server would.
func record(stream string, block int, seq uint64, header, body string) []byte {
	size := recordHead + len("s") + len(body) + recordHash
	flag := uint32(0)
	if header != "" {
		size += 4 + len(header)
		flag = withHeader
	}
	b := binary.LittleEndian.AppendUint32(nil, uint32(size)|flag)
	b = binary.LittleEndian.AppendUint64(b, seq)
	b = binary.LittleEndian.AppendUint64(b, 7)
	b = binary.LittleEndian.AppendUint16(b, 1)
	b = append(b, 's')
	if header != "" {
		b = binary.LittleEndian.AppendUint32(b, uint32(len(header)))
		b = append(b, header...)
	}
	b = append(b, body...)
	key := sha256.Sum256(fmt.Appendf(nil, "%s-%d", stream, block))
	return append(b, hash(key[:], b[4:20], []byte("s"), []byte(header), []byte(body))...)
}

// writeStream makes a stream's directory of blocks with n records each, from seq on.
func writeStream(t *testing.T, seq uint64, blocks, n int) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "S")
	if err := os.MkdirAll(filepath.Join(dir, "msgs"), 0o700); err != nil {
		t.Fatal(err)
	}
	key := sha256.Sum256([]byte("S"))
	for name, text := range map[string]string{"meta.inf": "{}", "meta.sum": hex.EncodeToString(hash(key[:], []byte("{}")))} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i := range blocks {
		var b []byte
		for range n {
			b = append(b, record("S", i+1, seq, "NATS/1.0\r\nA: b\r\n\r\n", fmt.Sprintf("body %d", seq))...)
			seq++
		}
		if err := os.WriteFile(block(dir, i+1), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func block(dir string, i int) string { return filepath.Join(dir, "msgs", fmt.Sprintf("%d.blk", i)) }

func TestExamine(t *testing.T) {
	edit := func(i int, do func([]byte) []byte) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			b, err := os.ReadFile(block(dir, i))
			if err == nil {
				err = os.WriteFile(block(dir, i), do(b), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	flip := func(at int) func([]byte) []byte { return func(b []byte) []byte { b[at] ^= 4; return b } }
	const perBlock = 5
	for name, tc := range map[string]struct {
		from    uint64
		do      func(*testing.T, string)
		missing []uint64 // counted from 0
		damage  int
		torn    bool
	}{
		"sound":                        {1, func(*testing.T, string) {}, nil, 0, false},
		"high sequences":               {1 << 40, func(*testing.T, string) {}, nil, 0, false},
		"first record":                 {1, edit(1, flip(40)), []uint64{0}, 1, false},
		"first record, high sequences": {1 << 40, edit(1, flip(40)), []uint64{0}, 1, false},
		"a length":                     {1 << 40, edit(1, flip(0)), []uint64{0}, 1, false},
		"a length in the youngest":     {1, edit(3, flip(0)), []uint64{10}, 2, false}, // the place, and the gap
		"a sequence":                   {1, edit(2, flip(5)), []uint64{5}, 2, false},
		"end of the youngest":          {1, edit(3, func(b []byte) []byte { return b[:len(b)-3] }), []uint64{14}, 0, true},
		"end of another":               {1, edit(1, func(b []byte) []byte { return b[:len(b)-3] }), []uint64{4}, 2, false},
		"a block gone":                 {1, func(t *testing.T, dir string) { _ = os.Remove(block(dir, 2)) }, []uint64{5, 6, 7, 8, 9}, 1, false},
		"an empty youngest block":      {1, edit(3, func([]byte) []byte { return nil }), []uint64{10, 11, 12, 13, 14}, 0, false},
		"zeros":                        {1, edit(2, func(b []byte) []byte { clear(b[10:40]); return b }), []uint64{5}, 2, false},
		"configuration":                {1, func(t *testing.T, dir string) { _ = os.WriteFile(filepath.Join(dir, "meta.inf"), []byte("{ }"), 0o600) }, nil, 1, false},
	} {
		dir := writeStream(t, tc.from, 3, perBlock)
		tc.do(t, dir)
		var want, got []uint64
		for i := range uint64(3 * perBlock) {
			if !slices.Contains(tc.missing, i) {
				want = append(want, tc.from+i)
			}
		}
		c, err := Examine(dir, func(r Record) error {
			if string(r.Body) != fmt.Sprintf("body %d", r.Seq) || r.Subject != "s" || len(r.Header) == 0 {
				t.Errorf("%s: got %+v", name, r)
			}
			got = append(got, r.Seq)
			return nil
		})
		if err != nil || !slices.Equal(got, want) || (c.Torn != "") != tc.torn || len(c.Damage) != tc.damage {
			t.Errorf("%s: %v, read %v, want %v; torn %q, damage %v, want %d", name, err, got, want, c.Torn, c.Damage, tc.damage)
		}
		if len(got) > 0 && (c.First != got[0] || c.Last != got[len(got)-1] || c.Records != len(got)) {
			t.Errorf("%s: %+v", name, c)
		}
	}
	if c, err := Examine(filepath.Join(t.TempDir(), "none"), nil); err != nil || c.Records != 0 || len(c.Damage) != 0 {
		t.Errorf("a stream that is not there: %+v, %v", c, err)
	}
	// What may be mended is no damage.
	dir := writeStream(t, 1, 2, perBlock)
	if err := errors.Join(os.Remove(block(dir, 2)), os.Mkdir(block(dir, 2), 0o700)); err != nil {
		t.Fatal(err)
	}
	if c, err := Examine(dir, nil); err == nil {
		t.Errorf("a file that cannot be read counts as damaged: %+v", c)
	}
}

func TestRenew(t *testing.T) {
	dir := writeStream(t, 1, 2, 3)
	before, err := os.ReadFile(block(dir, 2))
	if err != nil {
		t.Fatal(err)
	}
	old, err := os.Open(block(dir, 2))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = old.Close() }()
	if err := Renew(dir); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(block(dir, 2))
	if err != nil || string(after) != string(before) {
		t.Errorf("%v: the block has changed", err)
	}
	was, _ := old.Stat()
	if now, err := os.Stat(block(dir, 2)); err != nil || os.SameFile(was, now) {
		t.Errorf("%v: it is the same file: what the kernel holds of it for clean may not be on the disk", err)
	}
	if err := Renew(filepath.Join(t.TempDir(), "none")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}
