package otlpwire

import (
	"bytes"

	"google.golang.org/protobuf/encoding/protowire"
)

// Stamp writes a fixed set of string attributes into every resource of a
// payload by copying bytes. The zero Stamp adds nothing.
type Stamp struct {
	attrs []stampAttr
}

type stampAttr struct {
	key, also string
	wire      []byte // the attribute as a complete field 1 of a Resource
	overwrite bool
}

// Overwrite sets key to val in every resource, whatever the sender set, however often and with
// whatever type. An empty val removes the key.
func (s *Stamp) Overwrite(key, val string) { s.add(stampAttr{key: key, overwrite: true}, val) }

// Insert sets key to val in every resource that does not have the key.
func (s *Stamp) Insert(key, val string) { s.add(stampAttr{key: key, also: key}, val) }

// InsertUnless is [Stamp.Insert] for a key with another spelling: a resource that has either key is
// not changed.
func (s *Stamp) InsertUnless(key, other, val string) { s.add(stampAttr{key: key, also: other}, val) }

func (s *Stamp) add(a stampAttr, val string) {
	if val != "" {
		a.wire = AppendStringAttribute(nil, 1, a.key, val)
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

// Append appends payload to dst with the stamp in every resource. A missing resource is created,
// one that is spread over repeated fields is merged. Unknown fields of the request itself are
// dropped. It keeps neither slice. An error means payload was not accepted by Scan.
func (s *Stamp) Append(dst, payload []byte) ([]byte, error) {
	for i := 0; i < len(payload); {
		num, typ, value, end := nextField(payload, i)
		if end < 0 {
			return dst, errTruncated
		}
		if num == 1 && typ == bytesType {
			var err error
			if dst, err = s.appendResource(dst, payload[value:end]); err != nil {
				return dst, err
			}
		}
		i = end
	}
	return dst, nil
}

// Holds reports whether payload already has the attributes that s overwrites, once in each resource
// and with the same values: then Append would change only the order. It is for stamps that only
// overwrite.
func (s *Stamp) Holds(payload []byte) bool {
	for i := 0; i < len(payload); {
		num, typ, value, end := nextField(payload, i)
		if end < 0 || num != 1 || typ != bytesType || !s.holdsResource(payload[value:end]) {
			return false
		}
		i = end
	}
	return true
}

// holdsResource is Holds for one ResourceSpans, ResourceMetrics or ResourceLogs.
func (s *Stamp) holdsResource(body []byte) bool {
	resources, found := 0, 0
	for i := 0; i < len(body); {
		num, typ, value, end := nextField(body, i)
		if end < 0 {
			return false
		}
		if i = end; num != 1 || typ != bytesType {
			continue
		}
		resources++
		for resource, j := body[value:end], 0; j < len(resource); {
			num, typ, value, end := nextField(resource, j)
			if end < 0 {
				return false
			}
			if num == 1 && typ == bytesType {
				if n := s.match(resource[value:end]); n >= 0 {
					if !bytes.Equal(resource[j:end], s.attrs[n].wire) {
						return false
					}
					found++
				}
			}
			j = end
		}
	}
	return resources == 1 && found == len(s.attrs)
}

// appendResource appends one ResourceSpans, ResourceMetrics or ResourceLogs.
func (s *Stamp) appendResource(dst, body []byte) ([]byte, error) {
	present, resourceLen, restLen, err := s.measure(body)
	if err != nil {
		return dst, err
	}
	for n, a := range s.attrs {
		if a.overwrite || present&(1<<n) == 0 {
			resourceLen += len(a.wire)
		}
	}
	dst = appendLen(dst, 1, lenSize(resourceLen)+restLen)
	dst = appendLen(dst, 1, resourceLen)
	for n, a := range s.attrs {
		if a.overwrite || present&(1<<n) == 0 {
			dst = append(dst, a.wire...)
		}
	}
	for i := 0; i < len(body); {
		num, typ, value, end := nextField(body, i)
		if i = end; num == 1 && typ == bytesType {
			dst = s.appendAttributes(dst, body[value:end])
		}
	}
	for i := 0; i < len(body); {
		num, typ, _, end := nextField(body, i)
		if num != 1 || typ != bytesType {
			dst = append(dst, body[i:end]...)
		}
		i = end
	}
	return dst, nil
}

// measure reads one ResourceSpans, ResourceMetrics or ResourceLogs: which attributes of the stamp it has, one
// bit each, how many bytes of the resource stay, and how many are not of the resource.
func (s *Stamp) measure(body []byte) (present uint64, resourceLen, restLen int, err error) {
	for i := 0; i < len(body); {
		num, typ, value, end := nextField(body, i)
		if end < 0 {
			return 0, 0, 0, errTruncated
		}
		if num == 1 && typ == bytesType {
			found, stays, err := s.measureAttributes(body[value:end])
			if err != nil {
				return 0, 0, 0, err
			}
			present |= found
			resourceLen += stays
		} else {
			restLen += end - i
		}
		i = end
	}
	return present, resourceLen, restLen, nil
}

// measureAttributes is measure of a resource.
func (s *Stamp) measureAttributes(resource []byte) (present uint64, stays int, err error) {
	for i := 0; i < len(resource); {
		num, typ, value, end := nextField(resource, i)
		if end < 0 {
			return 0, 0, errTruncated
		}
		n := -1
		if num == 1 && typ == bytesType {
			n = s.match(resource[value:end])
		}
		if n >= 0 {
			present |= 1 << n
		}
		if n < 0 || !s.attrs[n].overwrite {
			stays += end - i
		}
		i = end
	}
	return present, stays, nil
}

// appendAttributes appends the fields of a resource except those that the stamp overwrites.
func (s *Stamp) appendAttributes(dst, resource []byte) []byte {
	for i := 0; i < len(resource); {
		num, typ, value, end := nextField(resource, i)
		if num != 1 || typ != bytesType {
			dst = append(dst, resource[i:end]...)
		} else if n := s.match(resource[value:end]); n < 0 || !s.attrs[n].overwrite {
			dst = append(dst, resource[i:end]...)
		}
		i = end
	}
	return dst
}

// match returns the index of the stamp attribute that has the key of a resource
// attribute, or -1.
func (s *Stamp) match(attr []byte) int {
	key := attributeKey(attr)
	for i := range s.attrs {
		if string(key) == s.attrs[i].key || !s.attrs[i].overwrite && string(key) == s.attrs[i].also {
			return i
		}
	}
	return -1
}

// attributeKey returns the key of a KeyValue; the last one counts.
func attributeKey(kv []byte) (key []byte) {
	for i := 0; i < len(kv); {
		num, typ, value, end := nextField(kv, i)
		if end < 0 {
			return key
		}
		if i = end; num == 1 && typ == bytesType {
			key = kv[value:end]
		}
	}
	return key
}
