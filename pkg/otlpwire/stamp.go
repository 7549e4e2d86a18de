package otlpwire

import (
	"errors"

	"google.golang.org/protobuf/encoding/protowire"
)

var errTruncated = errors.New("truncated field")

// Stamp writes a fixed set of string attributes into every resource of a
// payload by copying bytes. The zero Stamp adds nothing.
type Stamp struct {
	attrs []stampAttr
}

type stampAttr struct {
	key       string
	wire      []byte // the attribute as a complete field 1 of a Resource
	overwrite bool
}

// Overwrite makes key hold val in every resource, whatever the sender set,
// however often and with whatever type. An empty val removes the key.
func (s *Stamp) Overwrite(key, val string) { s.add(key, val, true) }

// Insert makes key hold val in every resource that does not have the key.
func (s *Stamp) Insert(key, val string) { s.add(key, val, false) }

func (s *Stamp) add(key, val string, overwrite bool) {
	a := stampAttr{key: key, overwrite: overwrite}
	if val != "" {
		a.wire = AppendStringAttribute(nil, 1, key, val)
	}
	s.attrs = append(s.attrs, a)
}

// AppendStringAttribute appends a KeyValue with a string value as field num.
func AppendStringAttribute(dst []byte, num protowire.Number, key, val string) []byte {
	inner := protowire.SizeTag(1) + protowire.SizeBytes(len(val))
	size := protowire.SizeTag(1) + protowire.SizeBytes(len(key)) + protowire.SizeTag(2) + protowire.SizeBytes(inner)
	dst = appendLen(dst, num, size)
	dst = protowire.AppendString(protowire.AppendTag(dst, 1, protowire.BytesType), key)
	dst = appendLen(dst, 2, inner)
	return protowire.AppendString(protowire.AppendTag(dst, 1, protowire.BytesType), val)
}

func appendLen(dst []byte, num protowire.Number, size int) []byte {
	dst = protowire.AppendTag(dst, num, protowire.BytesType)
	return protowire.AppendVarint(dst, uint64(size))
}

// Append appends payload to dst with the stamp in every resource. A resource
// that is missing is made, one that is spread over repeated fields becomes one.
// It keeps neither slice. An error means payload was not accepted by Scan.
func (s *Stamp) Append(dst, payload []byte) ([]byte, error) {
	for len(payload) > 0 {
		num, body, raw, err := nextField(payload)
		if err != nil {
			return dst, err
		}
		payload = payload[len(raw):]
		if num != 1 || body == nil {
			dst = append(dst, raw...)
			continue
		}
		if dst, err = s.appendResource(dst, body); err != nil {
			return dst, err
		}
	}
	return dst, nil
}

// appendResource appends one ResourceSpans, ResourceMetrics or ResourceLogs.
func (s *Stamp) appendResource(dst, body []byte) ([]byte, error) {
	// First pass: how long the resource and the rest become.
	var present uint64
	resourceLen, restLen := 0, 0
	err := eachField(body, func(num protowire.Number, resource, raw []byte) error {
		if num != 1 || resource == nil {
			restLen += len(raw)
			return nil
		}
		return eachField(resource, func(num protowire.Number, attr, raw []byte) error {
			i := s.match(num, attr)
			if i >= 0 {
				present |= 1 << i
			}
			if i < 0 || !s.attrs[i].overwrite {
				resourceLen += len(raw)
			}
			return nil
		})
	})
	if err != nil {
		return dst, err
	}
	for i, a := range s.attrs {
		if a.overwrite || present&(1<<i) == 0 {
			resourceLen += len(a.wire)
		}
	}
	dst = appendLen(dst, 1, protowire.SizeTag(1)+protowire.SizeBytes(resourceLen)+restLen)
	dst = appendLen(dst, 1, resourceLen)
	for i, a := range s.attrs {
		if a.overwrite || present&(1<<i) == 0 {
			dst = append(dst, a.wire...)
		}
	}
	for b := body; len(b) > 0; {
		num, resource, raw, _ := nextField(b)
		b = b[len(raw):]
		for num == 1 && len(resource) > 0 {
			num, attr, raw, _ := nextField(resource)
			resource = resource[len(raw):]
			if i := s.match(num, attr); i < 0 || !s.attrs[i].overwrite {
				dst = append(dst, raw...)
			}
		}
	}
	for b := body; len(b) > 0; {
		num, resource, raw, _ := nextField(b)
		b = b[len(raw):]
		if num != 1 || resource == nil {
			dst = append(dst, raw...)
		}
	}
	return dst, nil
}

// match returns the index of the stamp attribute that has the key of the
// resource's field, or -1.
func (s *Stamp) match(num protowire.Number, attr []byte) int {
	if num != 1 || attr == nil {
		return -1
	}
	key := attributeKey(attr)
	for i := range s.attrs {
		if string(key) == s.attrs[i].key {
			return i
		}
	}
	return -1
}

// attributeKey returns the key of a KeyValue; the last one counts.
func attributeKey(kv []byte) (key []byte) {
	for len(kv) > 0 {
		num, body, raw, err := nextField(kv)
		if err != nil {
			return key
		}
		kv = kv[len(raw):]
		if num == 1 && body != nil {
			key = body
		}
	}
	return key
}

// nextField returns the first field of b: its number, its content when it is
// length-delimited (never nil then), and all its bytes.
func nextField(b []byte) (num protowire.Number, body, raw []byte, err error) {
	num, typ, n := protowire.ConsumeTag(b)
	if n < 0 {
		return 0, nil, nil, errTruncated
	}
	if typ == protowire.BytesType {
		body, m := protowire.ConsumeBytes(b[n:])
		if m < 0 {
			return 0, nil, nil, errTruncated
		}
		return num, body, b[:n+m], nil
	}
	m := protowire.ConsumeFieldValue(num, typ, b[n:])
	if m < 0 {
		return 0, nil, nil, errTruncated
	}
	return num, nil, b[:n+m], nil
}

func eachField(b []byte, visit func(num protowire.Number, body, raw []byte) error) error {
	for len(b) > 0 {
		num, body, raw, err := nextField(b)
		if err != nil {
			return err
		}
		if err := visit(num, body, raw); err != nil {
			return err
		}
		b = b[len(raw):]
	}
	return nil
}
