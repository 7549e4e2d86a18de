package prometheus

import (
	"hash/maphash"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// A stream is identified, in OTLP, by the attributes of the resource, the scope, the metric, and the
// attributes of the points. Several streams can have the same labels, so that they are one series in
// Prometheus.

// mix combines two hashes.
func mix(a, b uint64) uint64 {
	h := (a ^ b*0x9e3779b97f4a7c15) * 0xff51afd7ed558ccd
	return h ^ h>>32
}

// streamOf is the hash of an attribute; those of several are added up, since they are unordered.
func streamOf(key, value []byte) uint64 {
	return mix(maphash.Bytes(seed, key), maphash.Bytes(seed, value))
}

func streamOfScope(scope []byte) (h uint64) {
	for i := 0; i < len(scope); {
		var f otlpwire.Field
		switch f, i = otlpwire.NextField(scope, i); f.Tag {
		case 1<<3 | otlpwire.Bytes, 2<<3 | otlpwire.Bytes, 3<<3 | otlpwire.Bytes: // name, version, attributes
			h += mix(uint64(f.Tag), maphash.Bytes(seed, f.Bytes))
		}
	}
	return h
}

func streamOfMetric(m *otlpwire.Metric) uint64 {
	kind := uint64(m.Kind)<<8 | uint64(m.Temporality)
	return mix(mix(maphash.Bytes(seed, m.Name), maphash.Bytes(seed, m.Unit)), kind)
}
