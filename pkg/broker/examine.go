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
	"strconv"
	"strings"
	"syscall"

	"github.com/minio/highwayhash"
)

// The files of a stream as nats-server 2.15.2 keeps them (filestore.go): blocks
// msgs/1.blk, msgs/2.blk and so on, each a row of records
//
//	length(4) sequence(8) time(8) subject length(2) subject [header length(4) header] body hash(8)
//
// in little endian. The highest bit of the length says that there is a header. The
// hash is HighwayHash-64 of what stands between length and hash but for the
// lengths, keyed by the SHA-256 of stream and block number.
const (
	recordHead   = 22
	recordHash   = 8
	maxRecord    = 32 << 20
	withHeader   = 1 << 31
	erasedSeq    = 1 << 63
	tombstoneSeq = 1 << 62
)

// Record is one message as a stream's files hold it.
type Record struct {
	Seq     uint64
	Size    int // bytes in the file
	Subject string
	Header  []byte // as on the NATS wire, with its first line; nil for none
	Body    []byte // valid until visit returns
}

// Condition is what [Examine] has found.
type Condition struct {
	Records     int
	First, Last uint64 // sequences; 0 when there are no records
	Bytes       int64
	// Damage names every place that is not as the server wrote it; empty for a
	// sound stream. Messages that are missing between others count, those missing
	// at either end cannot be seen.
	Damage []Damage
	// Torn is the youngest block when its end is no whole record: a write that was
	// cut off, or damage in the last record. TornBytes is how much of it that is.
	Torn      string
	TornBytes int64
}

// Damage is one place in a stream's files.
type Damage struct {
	File     string
	Offset   int64
	What     string
	From, To uint64 // sequences known to be missing; 0 when that shows only later
}

func (d Damage) String() string {
	s := fmt.Sprintf("%s at byte %d: %s", filepath.Base(d.File), d.Offset, d.What)
	if d.To > 0 {
		s += fmt.Sprintf(" (messages %d to %d)", d.From, d.To)
	}
	return s
}

// StreamDir returns where the server of a directory keeps a stream.
func StreamDir(dir, stream string) string {
	return filepath.Join(dir, "jetstream", "$G", "streams", stream)
}

// Examine reads a stream's files, which no server may have open, and calls visit
// for every whole record in order; nil for none. It changes nothing. A stream that
// is not there is sound and empty. The server itself looks at a block's checksums
// only when it has lost its index, and then cuts the file at the first bad one.
func Examine(streamDir string, visit func(Record) error) (Condition, error) {
	var c Condition
	stream, _, _ := strings.Cut(filepath.Base(streamDir), "@")
	if _, err := os.Stat(streamDir); errors.Is(err, fs.ErrNotExist) {
		return c, nil
	}
	if err := checkMeta(streamDir, stream); errors.Is(err, fs.ErrPermission) {
		return c, fmt.Errorf("examine: %w", err)
	} else if err != nil {
		c.Damage = append(c.Damage, Damage{File: filepath.Join(streamDir, "meta.inf"), What: err.Error()})
	}
	blocks, err := blockFiles(streamDir)
	if err != nil {
		return c, err
	}
	for i, b := range blocks {
		if err := c.block(b, stream, i == len(blocks)-1, visit); err != nil {
			return c, err
		}
	}
	return c, nil
}

// checkMeta compares a stream's configuration with the checksum beside it.
func checkMeta(dir, stream string) error {
	text, err := os.ReadFile(filepath.Join(dir, "meta.inf"))
	if err != nil {
		return fmt.Errorf("the stream's configuration cannot be read: %w", err)
	}
	sum, err := os.ReadFile(filepath.Join(dir, "meta.sum"))
	if err != nil {
		return fmt.Errorf("the checksum of the stream's configuration cannot be read: %w", err)
	}
	if key := sha256.Sum256([]byte(stream)); hex.EncodeToString(hash(key[:], text)) != string(sum) {
		return errors.New("the stream's configuration does not match its checksum")
	}
	return nil
}

func hash(key []byte, parts ...[]byte) []byte {
	h, err := highwayhash.NewDigest64(key)
	if err != nil {
		panic("BUG: key of a hash: " + err.Error())
	}
	for _, p := range parts {
		_, _ = h.Write(p)
	}
	return h.Sum(nil)
}

type blockFile struct {
	path  string
	index int
}

func blockFiles(dir string) (all []blockFile, err error) {
	entries, err := os.ReadDir(filepath.Join(dir, "msgs"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("examine %s: %w", dir, err)
	}
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), ".blk"); ok {
			if n, err := strconv.Atoi(name); err == nil {
				all = append(all, blockFile{filepath.Join(dir, "msgs", e.Name()), n})
			}
		}
	}
	slices.SortFunc(all, func(a, b blockFile) int { return a.index - b.index })
	return all, nil
}

// block reads one file of records.
func (c *Condition) block(b blockFile, stream string, youngest bool, visit func(Record) error) error {
	buf, err := os.ReadFile(b.path)
	if errors.Is(err, syscall.EIO) {
		c.Damage = append(c.Damage, Damage{File: b.path, What: err.Error()})
		return nil
	}
	if err != nil {
		return fmt.Errorf("examine: %w", err) // it may be mended
	}
	key := sha256.Sum256([]byte(stream + "-" + strconv.Itoa(b.index)))
	damage := func(at int, what string) {
		c.Damage = append(c.Damage, Damage{File: b.path, Offset: int64(at), What: what})
	}
	for at := 0; at < len(buf); {
		rec, size, sound := parseRecord(key[:], buf[at:])
		switch {
		case !sound:
			next := c.resync(key[:], buf, at+1)
			if next == len(buf) && youngest {
				c.Torn, c.TornBytes = b.path, int64(len(buf)-at)
				return nil
			}
			damage(at, "no sound record")
			at = next
			continue
		case rec.Seq&(erasedSeq|tombstoneSeq) != 0 || rec.Seq <= c.Last:
			// what the server has left of deleted messages
		default:
			if c.Last > 0 && rec.Seq > c.Last+1 {
				c.Damage = append(c.Damage, Damage{b.path, int64(at), "messages before this one are missing", c.Last + 1, rec.Seq - 1})
			}
			if c.First == 0 {
				c.First = rec.Seq
			}
			c.Last = rec.Seq
			c.Records++
			c.Bytes += int64(size)
			if visit != nil {
				rec.Size = size
				if err := visit(rec); err != nil {
					return err
				}
			}
		}
		at += size
	}
	return nil
}

// resync returns where the next sound record begins, from at on.
func (c *Condition) resync(key, buf []byte, at int) int {
	const farthest = 1 << 20 // messages
	for ; at+recordHead+recordHash <= len(buf); at++ {
		if seq := binary.LittleEndian.Uint64(buf[at+4:]); seq <= c.Last || (c.Last > 0 && seq > c.Last+farthest) {
			continue
		}
		if _, _, sound := parseRecord(key, buf[at:]); sound {
			return at
		}
	}
	return len(buf)
}

// parseRecord reads the record at the start of b, of size bytes; sound is whether
// it is one and matches its checksum.
func parseRecord(key, b []byte) (rec Record, size int, sound bool) {
	if len(b) < recordHead+recordHash {
		return rec, 0, false
	}
	le := binary.LittleEndian
	length := le.Uint32(b)
	subjectLen := int(le.Uint16(b[20:]))
	size = int(length &^ withHeader)
	if size < recordHead+recordHash+subjectLen || size > len(b) || size > maxRecord {
		return rec, 0, false
	}
	rec.Seq = le.Uint64(b[4:])
	data := b[recordHead : size-recordHash]
	rec.Subject, rec.Body = string(data[:subjectLen]), data[subjectLen:]
	if length&withHeader != 0 {
		if len(rec.Body) < 4 || int(le.Uint32(rec.Body)) > len(rec.Body)-4 {
			return rec, size, false
		}
		n := int(le.Uint32(rec.Body))
		rec.Header, rec.Body = rec.Body[4:4+n], rec.Body[4+n:]
	}
	sum := hash(key, b[4:20], []byte(rec.Subject), rec.Header, rec.Body)
	return rec, size, string(sum) == string(b[size-recordHash:size])
}

// Renew writes the youngest block of a stream anew, under the same name. After a
// failed fsync the kernel may hold pages that never reached the disk for clean: a
// later fsync of the same file says nothing about them.
func Renew(streamDir string) error {
	blocks, err := blockFiles(streamDir)
	if err != nil || len(blocks) == 0 {
		return err
	}
	path := blocks[len(blocks)-1].path
	body, err := os.ReadFile(path)
	if err == nil {
		err = WriteSynced(path, body)
	}
	if err != nil {
		return fmt.Errorf("write %s anew: %w", path, err)
	}
	return nil
}

// WriteSynced replaces a file as a whole or not at all, and returns when it is on the
// disk, name and all.
func WriteSynced(path string, body []byte) error {
	tmp := path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(body)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
