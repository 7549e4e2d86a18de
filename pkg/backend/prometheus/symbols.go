package prometheus

import "hash/maphash"

// seed makes hashes of one process comparable.
var seed = maphash.MakeSeed()

// table maps hashes to numbers: open addressing, at most half full.
type table struct {
	slots []uint32 // number + 1
	used  int
}

func (t *table) reset() {
	const large = 1 << 16 // from one huge request: not kept
	if len(t.slots) > large {
		t.slots = nil
	}
	clear(t.slots)
	t.used = 0
}

// grow makes room for one more; hash returns the hash of a number.
func (t *table) grow(hash func(uint32) uint64) {
	if 2*t.used < len(t.slots) {
		return
	}
	before := t.slots
	t.slots = make([]uint32, max(64, 2*len(before)))
	for _, n := range before {
		if n == 0 {
			continue
		}
		i := int(hash(n - 1))
		for t.slots[i&(len(t.slots)-1)] != 0 {
			i++
		}
		t.slots[i&(len(t.slots)-1)] = n
	}
}

// symbols numbers the distinct texts of a request; number 0 is the empty one.
type symbols struct {
	table
	text   []byte
	ends   []uint32
	hashes []uint64
}

func (s *symbols) reset() {
	s.table.reset()
	s.text, s.ends, s.hashes = s.text[:0], append(s.ends[:0], 0), append(s.hashes[:0], 0)
}

func (s *symbols) len() int { return len(s.ends) }

// get returns the text of a symbol, valid until the next one is added.
func (s *symbols) get(n uint32) []byte {
	if n == 0 {
		return nil
	}
	return s.text[s.ends[n-1]:s.ends[n]]
}

// add returns the number of a text.
func (s *symbols) add(text []byte) uint32 {
	if len(text) == 0 {
		return 0
	}
	h := maphash.Bytes(seed, text)
	s.grow(func(n uint32) uint64 { return s.hashes[n] })
	i := int(h)
	for ; ; i++ {
		n := s.slots[i&(len(s.slots)-1)]
		if n == 0 {
			break
		}
		if n--; s.hashes[n] == h && string(s.get(n)) == string(text) {
			return n
		}
	}
	n := uint32(len(s.ends))
	s.slots[i&(len(s.slots)-1)] = n + 1
	s.used++
	s.text = append(s.text, text...)
	s.ends = append(s.ends, uint32(len(s.text)))
	s.hashes = append(s.hashes, h)
	return n
}

// addString is add for a string.
func (s *symbols) addString(text string) uint32 {
	var buf [128]byte
	return s.add(append(buf[:0], text...))
}
