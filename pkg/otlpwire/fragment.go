package otlpwire

import "iter"

// Group is the items that [Splitter.Groups] has found for one key of one resource. It is valid
// until the function that received it returns.
type Group struct {
	s *Splitter
	c chain
}

// Items iterates over the spans, metrics or log records of the group.
func (g Group) Items() iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		for item := range g.ItemsIn() {
			if !yield(item) {
				return
			}
		}
	}
}

// ItemsIn is Items, each with the fields of its scope except its items.
func (g Group) ItemsIn() iter.Seq2[[]byte, []byte] {
	return func(yield func(item, scope []byte) bool) {
		for n := g.c.first; n != 0; n = g.s.runs[n-1].next {
			run := &g.s.runs[n-1]
			for it := run.first; it != 0; it = g.s.items[it-1].next {
				raw := g.s.items[it-1].raw
				_, _, value, _ := nextField(raw, 0)
				if !yield(raw[value:], g.s.scopes[run.scope]) {
					return
				}
			}
		}
	}
}

// Resource returns the fields of the group's resource except its scopes.
func (g Group) Resource() []byte { return g.s.rest }

// Heads is a resource with its scopes, without any item: what the groups of one
// resource have in common.
type Heads struct {
	rest   []byte
	scopes [][]byte
	size   int
}

// Size returns the approximate size of h in bytes.
func (h *Heads) Size() int { return h.size }

// Heads returns the heads of the group's resource, a copy that all groups of the
// resource share.
func (g Group) Heads() *Heads {
	s := g.s
	if s.heads != nil {
		return s.heads
	}
	size := len(s.rest)
	for _, sc := range s.scopes {
		size += len(sc)
	}
	all := append(make([]byte, 0, size), s.rest...)
	h := &Heads{rest: all, scopes: make([][]byte, len(s.scopes)), size: size + 24*len(s.scopes) + 80}
	for i, sc := range s.scopes {
		from := len(all)
		all = append(all, sc...)
		h.scopes[i] = all[from:]
	}
	s.heads = h
	return h
}

// Fragment is items of one resource that were copied out of a payload; their heads are shared with
// other fragments.
type Fragment struct {
	Heads *Heads
	runs  []fragmentRun
	items []byte // each as a complete field of its scope
}

type fragmentRun struct{ scope, size int }

// Fragment copies the group's items, those for which keep is true in the order
// of Items; a nil keep takes all.
func (g Group) Fragment(keep []bool) Fragment {
	s := g.s
	f := Fragment{Heads: g.Heads()}
	size, i := 0, 0
	for n := g.c.first; n != 0; n = s.runs[n-1].next {
		for it := s.runs[n-1].first; it != 0; it = s.items[it-1].next {
			if keep == nil || keep[i] {
				size += len(s.items[it-1].raw)
			}
			i++
		}
	}
	f.items, i = make([]byte, 0, size), 0 // exactly as large as needed: Held is counted from it
	for n := g.c.first; n != 0; n = s.runs[n-1].next {
		from := len(f.items)
		for it := s.runs[n-1].first; it != 0; it = s.items[it-1].next {
			if keep == nil || keep[i] {
				f.items = append(f.items, s.items[it-1].raw...)
			}
			i++
		}
		if len(f.items) > from {
			f.runs = append(f.runs, fragmentRun{s.runs[n-1].scope, len(f.items) - from})
		}
	}
	return f
}

// Held returns the memory of f in bytes, without its heads.
func (f *Fragment) Held() int { return len(f.items) + 16*len(f.runs) }

// Size returns the bytes that Append appends.
func (f *Fragment) Size() int { return lenSize(f.content()) }

func (f *Fragment) content() (size int) {
	size = len(f.Heads.rest)
	for _, r := range f.runs {
		size += lenSize(len(f.Heads.scopes[r.scope]) + r.size)
	}
	return size
}

// Append appends a payload of the items under their resource and scopes.
func (f *Fragment) Append(dst []byte) []byte {
	dst = appendLen(dst, 1, f.content())
	dst = append(dst, f.Heads.rest...)
	items := f.items
	for _, r := range f.runs {
		dst = appendLen(dst, 2, len(f.Heads.scopes[r.scope])+r.size)
		dst = append(dst, f.Heads.scopes[r.scope]...)
		dst = append(dst, items[:r.size]...)
		items = items[r.size:]
	}
	return dst
}
