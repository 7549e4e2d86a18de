package otlpwire

// Splitter cuts payloads by a key. It keeps its scratch space between calls and
// does not allocate once that has grown; the zero Splitter is ready. It is not
// safe for concurrent use.
type Splitter struct {
	chains []chain // by key
	keys   []int   // of the current resource, in the order in which they came
	runs   []run
	items  []item
	scopes [][]byte // of the current resource: every field of a scope except its items
	rest   []byte   // of the current resource: every field except its scopes
	head   []byte   // backing for scopes
	heads  *Heads   // of the current resource; nil until they are requested
	out    []byte
}

// chain lists the runs of one key within a resource. Links are indices + 1.
type chain struct {
	first, last int
}

// run is a stretch of items of one key within one scope.
type run struct {
	scope       int
	size        int // of its items
	first, last int
	next        int
}

// item is one span, metric or log record as a complete field 2 of its scope.
type item struct {
	raw  []byte
	next int
}

// Split calls emit for every key of every resource, in the order in which the keys come up, with a
// payload that holds the items of that key in their order, under a copy of their resource and scope
// with schema URLs. keyOf sees the bytes of a span, metric or log record; a negative key leaves the
// item out. Keys are indices of a table: small numbers. The payload that emit gets is valid until
// emit returns.
func (s *Splitter) Split(payload []byte, keyOf func(item []byte) int, emit func(key int, payload []byte)) error {
	return s.Groups(payload, keyOf, func(key int, g Group) {
		s.out = s.appendResource(s.out[:0], g.c)
		emit(key, s.out)
	})
}

// Groups is Split for callers that keep items: it calls visit where Split calls emit.
func (s *Splitter) Groups(payload []byte, keyOf func(item []byte) int, visit func(key int, g Group)) error {
	for i := 0; i < len(payload); {
		num, typ, value, end := nextField(payload, i)
		if end < 0 {
			return errTruncated
		}
		i = end
		if num != 1 || typ != bytesType {
			continue
		}
		err := s.collect(payload[value:end], keyOf)
		for _, key := range s.keys {
			if err == nil {
				visit(key, Group{s, s.chains[key]})
			}
			s.chains[key] = chain{}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// collect reads one resource into the scratch space.
func (s *Splitter) collect(body []byte, keyOf func([]byte) int) error {
	s.keys, s.runs, s.items, s.scopes = s.keys[:0], s.runs[:0], s.items[:0], s.scopes[:0]
	s.rest, s.head, s.heads = s.rest[:0], s.head[:0], nil
	for i := 0; i < len(body); {
		num, typ, value, end := nextField(body, i)
		if end < 0 {
			return errTruncated
		}
		if num == 2 && typ == bytesType {
			if err := s.collectScope(body[value:end], keyOf); err != nil {
				return err
			}
		} else {
			s.rest = append(s.rest, body[i:end]...)
		}
		i = end
	}
	return nil
}

func (s *Splitter) collectScope(scope []byte, keyOf func([]byte) int) error {
	n, from := len(s.scopes), len(s.head)
	s.scopes = append(s.scopes, nil)
	for i := 0; i < len(scope); {
		num, typ, value, end := nextField(scope, i)
		if end < 0 {
			return errTruncated
		}
		if num == 2 && typ == bytesType {
			if key := keyOf(scope[value:end]); key >= 0 {
				s.add(key, n, scope[i:end])
			}
		} else {
			s.head = append(s.head, scope[i:end]...)
		}
		i = end
	}
	// When s.head grows, earlier scopes stay in the old array, which remains valid.
	s.scopes[n] = s.head[from:len(s.head):len(s.head)]
	return nil
}

// add appends an item to the last run of its key, or to a new one.
func (s *Splitter) add(key, scope int, raw []byte) {
	for key >= len(s.chains) {
		s.chains = append(s.chains, chain{})
	}
	c := &s.chains[key]
	s.items = append(s.items, item{raw: raw})
	if c.last != 0 && s.runs[c.last-1].scope == scope {
		r := &s.runs[c.last-1]
		s.items[r.last-1].next = len(s.items)
		r.last = len(s.items)
		r.size += len(raw)
		return
	}
	s.runs = append(s.runs, run{scope: scope, size: len(raw), first: len(s.items), last: len(s.items)})
	if c.last == 0 {
		s.keys = append(s.keys, key)
		c.first = len(s.runs)
	} else {
		s.runs[c.last-1].next = len(s.runs)
	}
	c.last = len(s.runs)
}

// appendResource appends the items of one chain under their resource.
func (s *Splitter) appendResource(dst []byte, c chain) []byte {
	size := len(s.rest)
	for n := c.first; n != 0; n = s.runs[n-1].next {
		r := &s.runs[n-1]
		size += lenSize(len(s.scopes[r.scope]) + r.size)
	}
	dst = appendLen(dst, 1, size)
	dst = append(dst, s.rest...)
	for n := c.first; n != 0; n = s.runs[n-1].next {
		r := &s.runs[n-1]
		dst = appendLen(dst, 2, len(s.scopes[r.scope])+r.size)
		dst = append(dst, s.scopes[r.scope]...)
		for it := r.first; it != 0; it = s.items[it-1].next {
			dst = append(dst, s.items[it-1].raw...)
		}
	}
	return dst
}
