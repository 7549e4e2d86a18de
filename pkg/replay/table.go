package replay

import (
	"encoding/json"
	"slices"
	"strings"
)

// Table is what the bucket holds, kept up to date by [Table.Set]. It is for one
// goroutine.
type Table struct {
	jobs   map[string]*Job // by id
	plans  map[string]*Plan
	checks map[string]Check
	lanes  map[string]Progress
}

// NewTable returns an empty table.
func NewTable() *Table {
	return &Table{jobs: map[string]*Job{}, plans: map[string]*Plan{}, checks: map[string]Check{}, lanes: map[string]Progress{}}
}

// Set takes in a key, nil for one that was deleted. What cannot be read is an error
// and left out.
func (t *Table) Set(key string, value []byte) error {
	kind, _, _ := strings.Cut(key, ".")
	if kind == "job" {
		id := key[strings.LastIndexByte(key, '.')+1:]
		if value == nil {
			delete(t.jobs, id)
			return nil
		}
		j, err := parse(key, value)
		if err == nil {
			t.jobs[id] = j
		}
		return err
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

// Status is a job and how far it is.
type Status struct {
	*Job
	Plan   *Plan            // nil: not made yet
	Checks map[string]Check // by signal; none while the backend is being asked
	Lanes  []LaneStatus
}

// LaneStatus is a lane and how far it is.
type LaneStatus struct {
	Lane
	Progress
}

// Jobs returns all of them, the oldest first.
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
	return all
}

// Status returns a job; ok is false when there is none of this id.
func (t *Table) Status(id string) (s Status, ok bool) {
	j := t.jobs[id]
	if j == nil {
		return s, false
	}
	return t.status(j), true
}

func (t *Table) status(j *Job) Status {
	s := Status{Job: j, Plan: t.plans[PlanKey(j.ID)], Checks: map[string]Check{}}
	for _, sig := range j.Signals {
		if c, ok := t.checks[CheckKey(j.ID, sig)]; ok {
			s.Checks[sig] = c
		}
	}
	if s.Plan == nil {
		return s
	}
	for _, l := range s.Plan.Lanes {
		s.Lanes = append(s.Lanes, LaneStatus{l, t.lanes[LaneKey(j.ID, l)]})
	}
	return s
}

// Orphans returns the keys that belong to no job any more.
func (t *Table) Orphans() (keys []string) {
	check := func(key string) {
		if id := strings.Split(key, ".")[1]; t.jobs[id] == nil {
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

// The phases that a job is in by itself.
const (
	Checking = "checking" // it is being planned, and backends are being asked
	Refused  = "refused"  // before the first item: see [Status.Refusals]
	Done     = "done"
)

// Phase says where a job is: what people have made of it, or what has come of it.
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
	}
	return Running
}

// Unasked returns the signals, among those that have lanes, whose backends have not
// said yet whether they take data that old.
func (s Status) Unasked() (signals []string) {
	for _, sig := range s.Signals {
		has := slices.ContainsFunc(s.Lanes, func(l LaneStatus) bool { return l.Signal == sig })
		if _, asked := s.Checks[sig]; has && !asked {
			signals = append(signals, sig)
		}
	}
	return signals
}

// Refusals returns why the job is not run: what is wrong with the request, or what the
// backends said, unless losses are accepted.
func (s Status) Refusals() (why []string) {
	if s.Plan != nil && s.Plan.Error != "" {
		return []string{s.Plan.Error}
	}
	for _, sig := range s.Signals {
		if c, ok := s.Checks[sig]; ok && !c.OK && !s.AcceptLoss {
			why = append(why, sig+": "+c.Text)
		}
	}
	return why
}

// Share returns how much of a lane is done, from 0 to 1, and its weight.
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
		sum.Bytes += l.Bytes
	}
	return sum, share / max(weights, 1)
}
