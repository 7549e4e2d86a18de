package envelope

import (
	"errors"
	"testing"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestGuardWeighsWhatIsShared: a resource that thousands of items have in common is refused
// when it is large, and not when it is what resources are.
func TestGuardWeighsWhatIsShared(t *testing.T) {
	field := func(number byte, body []byte) []byte {
		return append(appendLength([]byte{number<<3 | 2}, len(body)), body...)
	}
	payload := func(resource, scope, items int) []byte {
		attribute := func(n int) []byte {
			return field(1, append(field(1, []byte("k")), field(2, field(1, make([]byte, n)))...))
		}
		sc := field(1, field(3, attribute(scope)[2:]))
		for range items {
			sc = append(sc, field(2, []byte{0x10, 0x00})...)
		}
		return field(1, append(field(1, attribute(resource)), field(2, sc)...))
	}
	var g Guard
	for _, tc := range []struct {
		resource, scope, items int
		refused                bool
	}{{100, 100, 20_000, false}, {8 << 10, 0, 20_000, false}, {100_000, 0, 2000, false}, {500_000, 0, 20_000, true}} {
		_, _, err := g.Open(otlpwire.Logs, "as-1", payload(tc.resource, tc.scope, tc.items))
		if errors.Is(err, errWeight) != tc.refused {
			t.Errorf("%+v: %v", tc, err)
		}
	}
}

func appendLength(b []byte, n int) []byte {
	for ; n >= 0x80; n >>= 7 {
		b = append(b, byte(n)|0x80)
	}
	return append(b, byte(n))
}
