package replay

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/bus"
)

// TestDesk: a credential of one instance files, sees and changes jobs of that instance, and
// of no other, whatever its requests say.
func TestDesk(t *testing.T) {
	conn := openHub(t, bus.DefaultTopology())
	jobs, err := Open(t.Context(), conn, bus.DefaultTopology())
	if err != nil {
		t.Fatal(err)
	}
	desk := NewDesk(jobs)
	stop, err := conn.Serve(DeskSubjects, "sinks", func(subject string, body []byte) []byte { return desk.Answer(t.Context(), subject, body) })
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	job := func(late int, instances ...string) *Job {
		return &Job{Request: request(func(r *Request) { r.Instances, r.Late = instances, time.Duration(late)*time.Hour })}
	}
	now := time.Now()
	all, _, err := jobs.File(t.Context(), job(1, "as-*"), "operator", now)
	if err != nil {
		t.Fatal(err)
	}
	other, _, err := jobs.File(t.Context(), job(1, "as-2"), "operator", now)
	if err != nil {
		t.Fatal(err)
	}

	own, err := OpenRemote(conn, "as-1")
	if err != nil {
		t.Fatal(err)
	}
	for _, instances := range [][]string{{"as-2"}, {"as-*"}, {"as-1", "as-2"}, nil} {
		if _, _, err := own.File(t.Context(), job(1, instances...), "me", now); err == nil {
			t.Errorf("as-1 files a job for %q", instances)
		}
	}
	mine, filed, err := own.File(t.Context(), job(1, "as-1"), "me", now)
	if err != nil || !filed || mine.By != "as-1: me" {
		t.Fatalf("%+v, %v, %v", mine, filed, err)
	}
	if _, filed, err := own.File(t.Context(), job(1, "as-1"), "me", now); err != nil || filed {
		t.Errorf("the same once more: filed %v, %v", filed, err)
	}
	table, err := own.Table(t.Context())
	if err != nil || len(table.Jobs()) != 1 || table.Jobs()[0].ID != mine.ID {
		t.Errorf("as-1 sees %+v, %v", table, err)
	}
	plan, err := json.Marshal(Plan{At: now, Lanes: []Lane{{Signal: "traces", Last: 9, Instances: []string{"as-1", "as-2"}, Domains: []string{"@acme"}, Messages: 7}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := jobs.bucket.Create(t.Context(), mine.PlanKey(), plan); err != nil {
		t.Fatal(err)
	}
	if s, err := own.Status(t.Context(), mine.ID); err != nil || len(s.Lanes) != 1 || !slices.Equal(s.Lanes[0].Instances, []string{"as-1"}) || s.Lanes[0].Domains != nil || s.Lanes[0].Messages != 0 {
		t.Errorf("as-1 learns of the others of its domain: %+v, %v", s.Lanes, err)
	}
	for _, id := range []string{all.ID, other.ID, "", "*", ">"} {
		if err := own.Remove(t.Context(), id, "me", now); err == nil {
			t.Errorf("as-1 removes %q", id)
		}
		if err := own.Stop(t.Context(), id, "me", now); err == nil {
			t.Errorf("as-1 stops %q", id)
		}
		if entries, err := own.Audit(t.Context(), id); err == nil {
			t.Errorf("as-1 reads of %q: %v", id, entries)
		}
	}
	if err := own.Stop(t.Context(), mine.ID, "operator", now); err != nil {
		t.Error(err)
	}
	if s, err := own.Status(t.Context(), mine.ID); err != nil || s.Phase() != Stopped {
		t.Errorf("%+v, %v", s, err)
	}
	entries, err := own.Audit(t.Context(), mine.ID)
	if err != nil || len(entries) != 2 || entries[1].What != "stopped" || entries[1].By != "as-1: operator" {
		t.Errorf("the audit: %+v, %v", entries, err)
	}
	for n := 2; n <= maxOwnJobs+2; n++ {
		_, _, err = own.File(t.Context(), job(n, "as-1"), "me", now)
	}
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint(maxOwnJobs)) {
		t.Errorf("as many jobs as it likes: %v", err)
	}
	for _, garbage := range []string{"", "{", "[]", `{"job":{}}`, `{"job":{"request":{"instances":["as-2"]}}}`, strings.Repeat("[", 100_000)} {
		for _, what := range []string{"file", "table", "stop", "x", ""} {
			var r reply
			answer := desk.Answer(t.Context(), deskSubject+"as-1."+what, []byte(garbage))
			if len(answer) > 0 && answer[0] == '{' && json.Unmarshal(answer, &r) != nil {
				t.Errorf("%q of %.20q: %s", what, garbage, answer)
			}
			if r.Filed {
				t.Errorf("%.20q was filed", garbage)
			}
		}
	}
}
