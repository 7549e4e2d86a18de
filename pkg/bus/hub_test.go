package bus

import (
	"errors"
	"log/slog"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
)

// TestErrorsOfTheHubAreCounted has a subscriber that is too slow, and a hub that goes away.
func TestErrorsOfTheHubAreCounted(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	led := ledger.New(prometheus.NewRegistry())
	c, err := Connect(Config{Name: "test", InProcess: b, Counts: led}, quiet)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	until(t, "connected", func() bool { return testutil.ToFloat64(led.HubConnected) == 1 })
	sub, err := c.nc.SubscribeSync("slow")
	if err != nil {
		t.Fatal(err)
	}
	if err := sub.SetPendingLimits(1, 1<<20); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if err := c.nc.Publish("slow", nil); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "a slow consumer", func() bool { return testutil.ToFloat64(led.HubErrors(ledger.HubSlowConsumer)) > 0 })
	cfg := Config{Counts: led}
	for _, err := range []error{nats.ErrPermissionViolation, nats.ErrAuthorization, nats.ErrBadHeaderMsg} {
		cfg.failed(err)
	}
	if denied, other := testutil.ToFloat64(led.HubErrors(ledger.HubDenied)), testutil.ToFloat64(led.HubErrors(ledger.HubOther)); denied != 2 || other != 1 {
		t.Errorf("%v denied, %v other", denied, other)
	}
	b.Stop()
	until(t, "away", func() bool { return testutil.ToFloat64(led.HubConnected) == 0 })
}

// TestAHubWithoutRoomForAside: a hub whose max_file_store was just enough before ASIDE existed
// is used without it.
func TestAHubWithoutRoomForAside(t *testing.T) {
	t.Parallel()
	const maxStore = 1 << 50 // of an embedded server
	top := DefaultTopology()
	top.MaxBytes = maxStore / 372 * 100 // all streams together: 3.70 times this, and ASIDE 0.125
	var said logtest.Log
	c, err := OpenHub(t.Context(), Config{Name: "sink", InProcess: testBroker(t)}, top, said.Logger(slog.LevelInfo))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Subjects(t.Context(), Aside, ">"); !errors.Is(err, ErrNoStream) || !said.Says("WARN", "stream cannot be created", "insufficient storage") {
		t.Errorf("%v; said %s", err, &said)
	}
	if _, err := c.State(t.Context(), Audit); err != nil {
		t.Error(err)
	}
}
