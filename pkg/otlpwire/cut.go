package otlpwire

// Cut cuts a payload into pieces of at most limit bytes, in order, and calls emit
// with each and the number of its items until emit fails. The piece is valid
// until emit returns. tooLarge counts the items that no piece could hold: those
// larger than it, and those under a resource, scope or metric that would take
// more than half of it, since that is copied into every piece.
func Cut(sig Signal, payload []byte, limit int, emit func(piece []byte, items int) error) (tooLarge int, err error) {
	c := cutter{}
	err = c.cut(requests[sig], payload, limit, emit)
	return c.tooLarge, err
}

type cutter struct{ tooLarge int }

// maxWrap is how many bytes tag and length of a message in a piece take at most.
const maxWrap = 1 + 5

// cut cuts b, a message m, into messages of the same kind with at most limit
// bytes each.
func (c *cutter) cut(m *message, b []byte, limit int, emit func([]byte, int) error) error {
	head, children := parts(m, b)
	if limit < 0 || len(head) > limit/2 {
		c.tooLarge += count(m, b)
		return nil
	}
	piece, items := append(make([]byte, 0, min(limit, len(b))), head...), 0
	flush := func() error {
		if items == 0 {
			return nil
		}
		err := emit(piece, items)
		piece, items = append(piece[:0], head...), 0
		return err
	}
	for i := 0; i < len(children); {
		num, typ, value, end := nextField(children, i)
		if end < 0 {
			return errTruncated
		}
		whole, content := children[i:end], children[value:end]
		i = end
		f := m.leading(num, typ)
		n := 1
		if !f.msg.role.item() {
			if n = count(f.msg, content); n == 0 {
				continue
			}
		}
		if len(piece)+len(whole) > limit {
			if err := flush(); err != nil {
				return err
			}
		}
		switch {
		case len(piece)+len(whole) <= limit:
			piece, items = append(piece, whole...), items+n
		case f.msg.role.item():
			c.tooLarge++
		default:
			err := c.cut(f.msg, content, limit-len(head)-maxWrap, func(part []byte, n int) error {
				piece = appendLen(piece, FieldNumber(num), len(part))
				piece, items = append(piece, part...), n
				return flush()
			})
			if err != nil {
				return err
			}
		}
	}
	return flush()
}

// parts returns the fields of a message that go with each of its items, and those
// that are items or lead to them. The points of a metric become one field.
func parts(m *message, b []byte) (head, children []byte) {
	points, from := points(m, b)
	var data []byte
	for i := 0; i < len(b); {
		num, typ, value, end := nextField(b, i)
		if end < 0 {
			break
		}
		switch f := m.leading(num, typ); {
		case f == nil:
			if m.lookup(num) != nil {
				head = append(head, b[i:end]...)
			}
		case !f.oneof:
			children = append(children, b[i:end]...)
		case i >= from:
			data = append(data, b[value:end]...)
		}
		i = end
	}
	if points != nil {
		children = append(appendLen(children, FieldNumber(points.num), len(data)), data...)
	}
	return head, children
}
