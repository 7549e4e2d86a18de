package replay

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

var noon = time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)

func TestParsePoint(t *testing.T) {
	for text, want := range map[string]Point{
		"now":                       {Time: noon},
		"-2h":                       {Time: noon.Add(-2 * time.Hour)},
		"-90m":                      {Time: noon.Add(-90 * time.Minute)},
		"2026-01-31T08:00:00Z":      {Time: noon.Add(-4 * time.Hour)},
		"2026-01-31T09:00:00+01:00": {Time: noon.Add(-4 * time.Hour)},
		"12345":                     {Seq: 12345},
	} {
		got, err := ParsePoint(text, noon)
		if err != nil || got.Seq != want.Seq || !got.Time.Equal(want.Time) {
			t.Errorf("%s: %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "2h", "0", "-1", "yesterday", "2026-01-31", "99999999999999999999"} {
		if p, err := ParsePoint(text, noon); err == nil {
			t.Errorf("%q is %v", text, p)
		}
	}
}

func request(change func(*Request)) Request {
	r := Request{From: Point{Time: noon}, To: Point{Time: noon.Add(time.Hour)}, Signals: []string{"logs", "traces"}, Instances: []string{"as-1"}}
	if change != nil {
		change(&r)
	}
	return r
}

func TestMistakesAreNamed(t *testing.T) {
	for want, change := range map[string]func(*Request){
		"is empty":           func(r *Request) { r.To = r.From },
		"two times or two":   func(r *Request) { r.To = Point{Seq: 5} },
		"every signal has":   func(r *Request) { r.From, r.To = Point{Seq: 5}, Point{Seq: 6} },
		"no signal":          func(r *Request) { r.Signals = nil },
		"profiles":           func(r *Request) { r.Signals = []string{"profiles"} },
		"nor a glob":         func(r *Request) { r.Instances = []string{"as-["} },
		"exclude each other": func(r *Request) { r.NoSampling, r.Policies = true, "x" },
		"late is":            func(r *Request) { r.Late = -1 },
		"at most":            func(r *Request) { r.Backends = make([]string, 65) },
		"signals are named":  func(r *Request) { r.Signals = make([]string, 4) },
		"the policies are":   func(r *Request) { r.Policies = strings.Repeat("x", 128<<10+1) },
	} {
		if err := request(change).Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", want, err)
		}
	}
	if err := request(nil).Validate(); err != nil {
		t.Error(err)
	}
}

// TestSameRequestSameJob: the order of lists and the time zone do not matter, all else
// does.
func TestSameRequestSameJob(t *testing.T) {
	id := request(nil).JobID()
	same := request(func(r *Request) {
		r.Signals = []string{"traces", "logs", "traces"}
		r.From.Time = r.From.Time.In(time.FixedZone("x", 3600))
	})
	if same.JobID() != id || !idGrammar.MatchString(id) {
		t.Errorf("%s and %s", id, same.JobID())
	}
	seen := map[string]bool{id: true}
	for i, change := range []func(*Request){
		func(r *Request) { r.From.Time = r.From.Time.Add(time.Second) }, func(r *Request) { r.To.Time = r.To.Time.Add(time.Second) },
		func(r *Request) { r.Instances = []string{"as-2"} }, func(r *Request) { r.Signals = []string{"logs"} }, func(r *Request) { r.Backends = []string{"loki"} },
		func(r *Request) { r.Policies = "x" }, func(r *Request) { r.NoSampling = true }, func(r *Request) { r.Late = time.Hour },
	} {
		other := request(change).JobID()
		if seen[other] {
			t.Errorf("change %d: the same job", i)
		}
		seen[other] = true
	}
}

func TestRange(t *testing.T) {
	r := request(nil)
	at := func(d time.Duration) int64 { return noon.Add(d).UnixNano() }
	for d, want := range map[time.Duration]bool{-1: false, 0: true, time.Hour - 1: true, time.Hour: false} {
		if r.In(at(d), 7) != want {
			t.Errorf("%v: %v", d, !want)
		}
	}
	bySeq := Request{From: Point{Seq: 5}, To: Point{Seq: 6}}
	for seq, want := range map[uint64]bool{4: false, 5: true, 6: true, 7: false} {
		if bySeq.In(0, seq) != want {
			t.Errorf("sequence %d: %v", seq, !want)
		}
	}
	globs := request(func(r *Request) { r.Instances = []string{"shop-*", "as-1"} })
	for name, want := range map[string]bool{"shop-1": true, "shop": false, "as-1": true, "as-11": false} {
		if globs.Matches(name) != want {
			t.Errorf("%s: %v", name, !want)
		}
	}
	if !(Request{}).Matches("x") {
		t.Error("without a name all are meant")
	}
}

// TestForgedJobsAreNotRun: whoever may write the keys of one instance's jobs tries to
// have others replayed.
func TestForgedJobsAreNotRun(t *testing.T) {
	value := func(r Request) []byte {
		b, _ := json.Marshal(&Job{Request: r, State: Running})
		return b
	}
	mine := request(nil)
	for name, tc := range map[string]struct {
		key   string
		value []byte
		ok    bool
	}{
		"mine":                      {"job.as-1." + mine.JobID(), value(mine), true},
		"another's name":            {"job.as-1." + request(func(r *Request) { r.Instances = []string{"as-2"} }).JobID(), value(request(func(r *Request) { r.Instances = []string{"as-2"} })), false},
		"two names":                 {"job.as-1." + request(func(r *Request) { r.Instances = []string{"as-1", "as-2"} }).JobID(), value(request(func(r *Request) { r.Instances = []string{"as-1", "as-2"} })), false},
		"a glob":                    {"job.as-1." + request(func(r *Request) { r.Instances = []string{"as-?"} }).JobID(), value(request(func(r *Request) { r.Instances = []string{"as-?"} })), false},
		"all":                       {"job.as-1." + request(func(r *Request) { r.Instances = nil }).JobID(), value(request(func(r *Request) { r.Instances = nil })), false},
		"under all, one's own":      {"job._all." + mine.JobID(), value(mine), false},
		"another job's id":          {"job.as-1." + request(func(r *Request) { r.NoSampling = true }).JobID(), value(mine), false},
		"no id":                     {"job.as-1.x", value(mine), false},
		"no job":                    {"job.as-1." + mine.JobID(), []byte("{"), false},
		"an invalid one":            {"job.as-1." + request(func(r *Request) { r.Signals = nil }).JobID(), value(request(func(r *Request) { r.Signals = nil })), false},
		"a state that is none":      {"job.as-1." + mine.JobID(), []byte(strings.Replace(string(value(mine)), "running", "x", 1)), false},
		"a rate that cannot be":     {"job.as-1." + mine.JobID(), []byte(strings.Replace(string(value(mine)), `"by"`, `"rate":-1,"by"`, 1)), false},
		"tokens that are too many":  {"job.as-1.x." + mine.JobID(), value(mine), false},
		"an instance in the middle": {"job.as-1.." + mine.JobID(), value(mine), false},
	} {
		table := NewTable()
		err := table.Set(tc.key, tc.value)
		if (err == nil) != tc.ok || len(table.Jobs()) != map[bool]int{true: 1}[tc.ok] {
			t.Errorf("%s: %v, %d jobs", name, err, len(table.Jobs()))
		}
	}
}

// TestPhases walks a job through what can become of it.
func TestPhases(t *testing.T) {
	r := request(nil)
	id := r.JobID()
	table := NewTable()
	set := func(key string, v any) {
		t.Helper()
		b, _ := json.Marshal(v)
		if err := table.Set(key, b); err != nil {
			t.Fatal(err)
		}
	}
	phase := func(want string) Status {
		t.Helper()
		s, ok := table.Status(id)
		if !ok || s.Phase() != want {
			t.Errorf("phase %s, want %s", s.Phase(), want)
		}
		return s
	}
	job := &Job{ID: id, At: noon, Request: r, State: Running}
	logs, traces := Lane{Signal: "logs", Partition: 3, First: 11, Last: 20, Messages: 10}, Lane{Signal: "traces", Partition: 3, First: 1, Last: 100, Messages: 30}
	set("job.as-1."+id, job)
	phase(Checking)
	set(job.PlanKey(), Plan{Lanes: []Lane{logs, traces}})
	phase(Checking)
	set(job.CheckKey("logs"), Check{OK: true})
	phase(Checking)
	set(job.CheckKey("traces"), Check{Text: "too old"})
	if s := phase(Refused); len(s.Refusals()) != 1 || s.Refusals()[0] != "traces: too old" {
		t.Errorf("refused for %q", s.Refusals())
	}
	job.AcceptLoss = true
	set("job.as-1."+id, job)
	phase(Running)
	set(job.LaneKey(logs), Progress{Floor: 15, Delivered: 5})
	set(job.LaneKey(traces), Progress{Floor: 0})
	sum, share := phase(Running).Sum("")
	if sum.Delivered != 5 || share != 0.125 { // half of 10 of 40
		t.Errorf("%+v, %v", sum, share)
	}
	job.State = Stopped
	set("job.as-1."+id, job)
	phase(Stopped)
	set(job.LaneKey(logs), Progress{Done: true})
	set(job.LaneKey(traces), Progress{Done: true})
	phase(Done)
	if err := table.Set("job.as-1."+id, nil); err != nil || len(table.Orphans()) != 5 {
		t.Errorf("%v, left behind: %q", err, table.Orphans())
	}
	for _, key := range table.Orphans() {
		_ = table.Set(key, nil)
	}
	if len(table.Orphans()) != 0 {
		t.Errorf("left behind: %q", table.Orphans())
	}
	set("job.as-1."+id, &Job{At: noon, Request: r, State: Running, AcceptLoss: true})
	set(job.PlanKey(), Plan{Error: "nothing there"})
	phase(Refused)
}

// TestWhatOthersWriteHarmsNobody: delete markers under another scope, values and keys that
// nobody can read.
func TestWhatOthersWriteHarmsNobody(t *testing.T) {
	table := NewTable()
	victim := &Job{ID: request(nil).JobID(), At: noon, Request: request(nil), State: Running}
	value, _ := json.Marshal(victim)
	plan, _ := json.Marshal(Plan{Lanes: []Lane{{Signal: "logs"}}})
	for key, v := range map[string][]byte{"job.as-1." + victim.ID: value, victim.PlanKey(): plan} {
		if err := table.Set(key, v); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{"job.as-2." + victim.ID, "job._all." + victim.ID, "job." + victim.ID, "job", "plan", "x"} {
		_ = table.Set(key, nil)
		_ = table.Set(key, []byte("{"))
		_ = table.Orphans()
	}
	if s, ok := table.Status(victim.ID); !ok || len(s.Lanes) != 1 {
		t.Errorf("the job of another is gone: %+v", s)
	}
	// One of a newer version, which we cannot read, keeps what belongs to it.
	newer := &Job{ID: request(func(r *Request) { r.Late = time.Hour }).JobID(), At: noon}
	_ = table.Set("job.as-1."+newer.ID, []byte(`{"request":{"new":1}}`))
	_ = table.Set(newer.PlanKey(), plan)
	for _, key := range table.Orphans() {
		if key == newer.PlanKey() || key == victim.PlanKey() {
			t.Errorf("%s is swept away", key)
		}
	}
	// What is left of an earlier run does not count.
	again := &Job{ID: victim.ID, At: noon.Add(time.Minute), Request: victim.Request, State: Running}
	value, _ = json.Marshal(again)
	if err := table.Set("job.as-1."+victim.ID, value); err != nil {
		t.Fatal(err)
	}
	if s, _ := table.Status(victim.ID); s.Plan != nil || s.Phase() != Checking {
		t.Errorf("filed again: %s with the plan of before", s.Phase())
	}
}

// TestOneJobOfAnInstanceAtATime: who may have one instance replayed leaves room for others.
func TestOneJobOfAnInstanceAtATime(t *testing.T) {
	table := NewTable()
	var phases []string
	for i, instances := range [][]string{{"as-1"}, {"as-1"}, {"as-*"}, {"as-2"}} {
		r := request(func(r *Request) { r.Instances, r.Late = instances, time.Duration(i+1)*time.Hour })
		j := &Job{ID: r.JobID(), At: noon.Add(time.Duration(i) * time.Second), Request: r, State: Running}
		for key, v := range map[string]any{jobKey(j.scope(), j.ID): j, j.PlanKey(): Plan{Lanes: []Lane{{Signal: "logs"}}}, j.CheckKey("logs"): Check{OK: true}} {
			b, _ := json.Marshal(v)
			if err := table.Set(key, b); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, s := range table.Jobs() {
		phases = append(phases, s.Phase())
	}
	if got := strings.Join(phases, " "); got != "running waiting running running" {
		t.Error(got)
	}
}

// TestJobsWait: so many at a time, in the order in which they were filed.
func TestJobsWait(t *testing.T) {
	table := NewTable()
	set := func(key string, v any) {
		b, _ := json.Marshal(v)
		if err := table.Set(key, b); err != nil {
			t.Fatal(err)
		}
	}
	var jobs []*Job
	for i := range MaxRunning + 2 {
		r := request(func(r *Request) { r.Instances = []string{fmt.Sprint("as-", i)} })
		j := &Job{ID: r.JobID(), At: noon.Add(time.Duration(i) * time.Second), Request: r, State: Running}
		jobs = append(jobs, j)
		set(jobKey(j.scope(), j.ID), j)
		set(j.PlanKey(), Plan{Lanes: []Lane{{Signal: "logs"}}})
		set(j.CheckKey("logs"), Check{OK: true})
	}
	phases := func() (all []string) {
		for _, s := range table.Jobs() {
			all = append(all, s.Phase())
		}
		return all
	}
	if got := strings.Join(phases(), " "); got != "running running running running waiting waiting" {
		t.Error(got)
	}
	set(jobs[1].LaneKey(Lane{Signal: "logs"}), Progress{Done: true})
	if got := strings.Join(phases(), " "); got != "running done running running running waiting" {
		t.Error(got)
	}
	set(jobs[0].CheckKey("logs"), Check{Wrong: true})
	jobs[0].AcceptLoss = true
	set(jobKey(jobs[0].scope(), jobs[0].ID), jobs[0])
	if got := phases()[0]; got != Refused {
		t.Errorf("another backend than was asked for: %s", got)
	}
}
