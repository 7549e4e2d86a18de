package replay

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Table is the content of the bucket, kept up to date by [Table.Set]. It is for one goroutine.
type Table struct {
	jobs   map[string]*Job   // by key
	unread map[string]string // keys of jobs that cannot be read, and their ids
	plans  map[string]*Plan
	checks map[string]Check
	lanes  map[string]Progress
}

// NewTable returns an empty table.
func NewTable() *Table {
	return &Table{jobs: map[string]*Job{}, unread: map[string]string{}, plans: map[string]*Plan{}, checks: map[string]Check{}, lanes: map[string]Progress{}}
}

// Set sets the value of a key, nil for a deleted one. A value that cannot be read is an error and is
// left out.
func (t *Table) Set(key string, value []byte) error {
	kind, _, _ := strings.Cut(key, ".")
	if kind == "job" {
		delete(t.jobs, key)
		delete(t.unread, key)
		if value == nil {
			return nil
		}
		j, err := parse(key, value)
		if err != nil {
			t.unread[key] = key[strings.LastIndexByte(key, '.')+1:]
			return err
		}
		t.jobs[key] = j
		return nil
	}
	if value == nil {
		delete(t.plans, key)
		delete(t.checks, key)
		delete(t.lanes, key)
		return nil
	}
	switch kind {
	case "plan":
		p := new(Plan)
		err := json.Unmarshal(value, p)
		t.plans[key] = p
		return err
	case "check":
		var c Check
		err := json.Unmarshal(value, &c)
		t.checks[key] = c
		return err
	}
	var p Progress
	err := json.Unmarshal(value, &p)
	t.lanes[key] = p
	return err
}

// Status is a job and its progress.
type Status struct {
	*Job
	Plan   *Plan            // nil: not planned yet
	Checks map[string]Check // by signal; absent while the backend is being queried
	Lanes  []LaneStatus
	queued bool
}

// LaneStatus is a lane and its progress.
type LaneStatus struct {
	Lane
	Progress
}

// Jobs returns all jobs, the oldest first.
func (t *Table) Jobs() []Status {
	var all []Status
	for _, j := range t.jobs {
		all = append(all, t.status(j))
	}
	slices.SortFunc(all, func(a, b Status) int {
		if c := a.At.Compare(b.At); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	running, of := 0, map[string]bool{}
	for i := range all {
		if all[i].Phase() != Running {
			continue
		}
		// Of jobs in the scope of one instance one runs at a time, so that others get their turn.
		scope := all[i].scope()
		own := scope != AllInstances
		if all[i].queued = running >= MaxRunning || own && of[scope]; !all[i].queued {
			running++
			of[scope] = own
		}
	}
	return all
}

// Status returns a job; ok is false if there is no job with this id.
func (t *Table) Status(id string) (s Status, ok bool) {
	for _, s := range t.Jobs() {
		if s.ID == id {
			return s, true
		}
	}
	return s, false
}

func (t *Table) find(id string) (Status, error) {
	s, ok := t.Status(id)
	if !ok {
		return s, fmt.Errorf("there is no job %q; penstock replay list shows the existing ones", id)
	}
	return s, nil
}

func (t *Table) status(j *Job) Status {
	s := Status{Job: j, Plan: t.plans[j.PlanKey()], Checks: map[string]Check{}}
	for _, sig := range j.Signals {
		if c, ok := t.checks[j.CheckKey(sig)]; ok {
			s.Checks[sig] = c
		}
	}
	if s.Plan == nil {
		return s
	}
	for _, l := range s.Plan.Lanes {
		s.Lanes = append(s.Lanes, LaneStatus{l, t.lanes[j.LaneKey(l)]})
	}
	return s
}

// Orphans returns the keys that belong to no job any more. Keys of a job that cannot be read are not
// among them: a newer sink may be able to read it.
func (t *Table) Orphans() (keys []string) {
	runs := map[string]bool{}
	for _, j := range t.jobs {
		runs[j.Run()] = true
	}
	check := func(key string) {
		_, rest, _ := strings.Cut(key, ".")
		run, _, _ := strings.Cut(rest, ".")
		id, _, _ := strings.Cut(run, "-")
		if !runs[run] && !slices.Contains(slices.Collect(maps.Values(t.unread)), id) {
			keys = append(keys, key)
		}
	}
	for key := range t.plans {
		check(key)
	}
	for key := range t.checks {
		check(key)
	}
	for key := range t.lanes {
		check(key)
	}
	return keys
}

// The phases of a job besides its states.
const (
	Checking = "checking" // it is being planned, and backends are being queried
	Waiting  = "waiting"  // for jobs that were filed earlier
	Refused  = "refused"  // before the first item: see [Status.Refusals]
	Done     = "done"
)

// Phase returns the phase of a job: the state that an operator gave it, or how far it has come.
func (s Status) Phase() string {
	done := s.Plan != nil && s.Plan.Error == ""
	for _, l := range s.Lanes {
		done = done && l.Done
	}
	switch {
	case done:
		return Done
	case s.State == Stopped:
		return Stopped
	case len(s.Refusals()) > 0:
		return Refused
	case s.Plan == nil || len(s.Unasked()) > 0:
		return Checking
	case s.queued:
		return Waiting
	}
	return Running
}

// MaxRunning is how many jobs run at a time, those that were filed first; of the jobs in the scope of
// one instance, only one at a time.
const MaxRunning = 4

// Unasked returns the signals, among those that have lanes, whose backends have not answered yet
// whether they accept data of that age.
func (s Status) Unasked() (signals []string) {
	for _, sig := range s.Signals {
		has := slices.ContainsFunc(s.Lanes, func(l LaneStatus) bool { return l.Signal == sig })
		if _, asked := s.Checks[sig]; has && !asked {
			signals = append(signals, sig)
		}
	}
	return signals
}

// Refusals returns why the job is not run: what is wrong with the request, or the backends' answers,
// unless losses are accepted.
func (s Status) Refusals() (why []string) {
	if s.Plan != nil && s.Plan.Error != "" {
		return []string{s.Plan.Error}
	}
	for _, sig := range s.Signals {
		if c, ok := s.Checks[sig]; ok && !c.OK && (c.Wrong || !s.AcceptLoss) {
			why = append(why, sig+": "+c.Text)
		}
	}
	return why
}

// Share returns the share of a lane that is done, from 0 to 1, and its weight.
func (l LaneStatus) Share() (share, weight float64) {
	weight = float64(max(l.Messages, 1))
	if l.Done || l.Last < l.First {
		return 1, weight
	}
	if l.Floor < l.First {
		return 0, weight
	}
	return float64(l.Floor-l.First+1) / float64(l.Last-l.First+1), weight
}

// Sum adds up the lanes of a signal, "" for all.
func (s Status) Sum(signal string) (sum Progress, share float64) {
	var weights float64
	for _, l := range s.Lanes {
		if signal != "" && l.Signal != signal {
			continue
		}
		part, weight := l.Share()
		share += part * weight
		weights += weight
		sum.Delivered += l.Delivered
		sum.SampledOut += l.SampledOut
		sum.Unchosen += l.Unchosen
		sum.Dead += l.Dead
		sum.Gone += l.Gone
		sum.Bytes += l.Bytes
	}
	return sum, share / max(weights, 1)
}
