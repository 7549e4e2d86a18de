package bus

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/envelope"
)

// TestPoliciesAreVersions pushes more versions than are kept, while somebody
// watches.
func TestPoliciesAreVersions(t *testing.T) {
	b := testBroker(t)
	c := testHub(t, b, 1)
	top := DefaultTopology()
	h := &Hub{Conn: connectTo(t, b, "sink"), topology: top, log: quiet}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	seen := make(chan *Policies, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.WatchPolicies(ctx, func(p *Policies) { seen <- p }, func(err error) { t.Error(err) })
	}()
	if p := <-seen; p != nil {
		t.Errorf("a new hub has policies: %+v", p)
	}
	for i := range maxPolicies + 3 {
		text := fmt.Sprintf("policies: %d", i)
		p, err := c.PushPolicies(t.Context(), top, text, "me")
		if err != nil {
			t.Fatal(err)
		}
		if p.Number != uint64(i+1) || p.From != uint64(i+1) {
			t.Errorf("push %d is version %d from %d", i, p.Number, p.From)
		}
		select {
		case got := <-seen:
			if got == nil || got.Text != text || got.Number != p.Number || got.From != p.From || got.By != "me" {
				t.Errorf("the watch says %+v", got)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("the watch says nothing")
		}
		m := Message{Subject: SpansSubject(0), Header: envelope.Header{ContentType: envelope.ContentTypeFrames}}
		if _, err := c.Publish(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	all, err := c.AllPolicies(t.Context(), top)
	if err != nil || len(all) != maxPolicies || all[0].Number != 4 {
		t.Errorf("%d versions, %v", len(all), err)
	}
	cancel()
	<-done
}

// TestARecordThatIsNoVersion is told, and does not hide the versions beside it.
func TestARecordThatIsNoVersion(t *testing.T) {
	t.Parallel()
	b := testBroker(t)
	c := testHub(t, b, 1)
	kv, err := c.ensurePolicies(t.Context(), DefaultTopology())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := kv.Put(t.Context(), "1", []byte("not JSON")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	refused, known := make(chan error, 1), make(chan struct{}, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		h := &Hub{Conn: c, topology: DefaultTopology(), log: quiet}
		h.WatchPolicies(ctx, func(p *Policies) { known <- struct{}{} }, func(err error) { refused <- err })
	}()
	defer func() { cancel(); <-done }()
	if err := <-refused; !strings.Contains(err.Error(), `policies "1"`) {
		t.Error(err)
	}
	<-known
}
