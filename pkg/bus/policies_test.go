package bus

import (
	"context"
	"fmt"
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
	go func() { defer close(done); h.WatchPolicies(ctx, func(p *Policies) { seen <- p }) }()
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
