package tokens

import (
	"testing"

	"go.uber.org/goleak"
)

// TestMain fails when the tests leave goroutines running.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
