package bus

import (
	"errors"
	"slices"
	"testing"

	"github.com/penstock/penstock/pkg/envelope"
)

func takeJournal(t testing.TB, c *Conn) (*Journal, []string) {
	t.Helper()
	var read []string
	j, err := c.TakeJournal(t.Context(), Decisions, decision(""), func(body []byte) error {
		if len(body) > 0 {
			read = append(read, string(body))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return j, read
}

func decision(body string) Message {
	return Message{Subject: DecisionsSubject(3), Body: []byte(body), Header: envelope.Header{ContentType: envelope.ContentTypeDecisions}}
}

// TestJournalHasOneWriter: a writer that has been replaced can record nothing, and the
// one that replaced it has read everything that was recorded before.
func TestJournalHasOneWriter(t *testing.T) {
	c := testHub(t, testBroker(t), 4)
	old, read := takeJournal(t, c)
	if len(read) > 0 {
		t.Errorf("an empty journal holds %q", read)
	}
	for _, s := range []string{"a", "b"} {
		entry := old.Entry(decision(s))
		for range 2 { // as after an acknowledgement that was lost
			if err := old.Append(t.Context(), entry); err != nil {
				t.Fatal(err)
			}
		}
	}
	other := decision("of another partition")
	other.Subject = DecisionsSubject(2)
	if _, err := c.Publish(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if err := old.Append(t.Context(), old.Entry(decision("c"))); err != nil {
		t.Fatal("another partition's decisions: ", err)
	}

	next, read := takeJournal(t, c)
	if !slices.Equal(read, []string{"a", "b", "c"}) {
		t.Errorf("read %q", read)
	}
	if err := old.Append(t.Context(), old.Entry(decision("too late"))); !errors.Is(err, ErrSuperseded) {
		t.Errorf("the writer before: %v, want %v", err, ErrSuperseded)
	}
	if err := next.Append(t.Context(), next.Entry(decision("d"))); err != nil {
		t.Error(err)
	}
	if _, read = takeJournal(t, c); !slices.Equal(read, []string{"a", "b", "c", "d"}) {
		t.Errorf("read %q", read)
	}
}
