package replay

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/domain"
)

// The margins of a plan; tests shorten them.
var (
	// leadIn is how long before a range the traces of its first moments are read, or four times as
	// long as policies wait: so their windows, and the budgets at that time, are as they were.
	leadIn = 10 * time.Minute

	// skew is how far the clock of an edge may be ahead of the hub's.
	skew = 10 * time.Minute
)

// fewInstances is up to how many instances the hub is asked for by name.
const fewInstances = 64

// Refusal says why a request cannot be carried out.
type Refusal struct{ Text string }

func (r *Refusal) Error() string { return r.Text }

func refusal(format string, args ...any) error { return &Refusal{fmt.Sprintf(format, args...)} }

// MakePlan determines what a request means for the streams as they are now. It returns a [Refusal] for
// a range that begins before the oldest message of a stream that has dropped older ones, and names that
// message; and for a range that has no messages.
//
// wait is how long policies may wait for a trace; where reading begins depends on it. Where policies decide, the
// instances that share a domain with those of the request are read, too.
func MakePlan(ctx context.Context, conn *bus.Conn, r Request, wait time.Duration, grouping domain.Versions, now time.Time) (*Plan, error) {
	if err := r.Validate(); err != nil {
		return nil, &Refusal{err.Error()}
	}
	p := &Plan{At: now.UTC(), Oldest: r.From.Time}
	var seen []string
	for _, name := range sorted(r.Signals) {
		sig, _ := otlpwire.ParseSignal(name)
		lanes, instances, err := p.signal(ctx, conn, r, sig, wait, grouping)
		if err != nil {
			return nil, err
		}
		seen = append(seen, instances...)
		p.Lanes = append(p.Lanes, lanes...)
	}
	if len(p.Lanes) == 0 {
		hold := ""
		if r.scope() == AllInstances { // a user who may replay one instance need not learn of others
			hold = "; the streams hold " + names(sorted(seen), "no instance")
		}
		return nil, refusal("nothing in the range from %v to %v is of %s%s", r.From, r.To, names(r.Instances, "an instance"), hold)
	}
	return p, nil
}

// names lists the first few names.
func names(list []string, none string) string {
	const few = 20
	switch {
	case len(list) == 0:
		return none
	case len(list) > few:
		return fmt.Sprintf("%q and %d more", list[:few], len(list)-few)
	}
	return fmt.Sprintf("%q", list)
}

// signal returns the lanes of one signal, and the instances of its stream.
func (p *Plan) signal(ctx context.Context, conn *bus.Conn, r Request, sig otlpwire.Signal, wait time.Duration, grouping domain.Versions) (lanes []Lane, instances []string, err error) {
	stream := bus.Stream(sig)
	state, err := conn.State(ctx, stream)
	if err != nil || state.Messages == 0 {
		return nil, nil, err
	}
	first, last, err := p.sequences(ctx, conn, r, sig, wait, state)
	if err != nil {
		return nil, nil, err
	}
	subjects, err := conn.Subjects(ctx, stream, "otlp."+sig.String()+".>")
	if err != nil {
		return nil, nil, err
	}
	var all []holding
	for subject, messages := range subjects {
		part, instance := bus.SubjectPartition(subject)
		if n, err := strconv.Atoi(part); err == nil {
			all = append(all, holding{instance: instance, part: n, messages: messages, wanted: r.Matches(instance)})
			instances = append(instances, instance)
		}
	}
	if first > last {
		return nil, instances, nil
	}
	if !r.Samples(sig) {
		grouping = nil
	}
	for _, held := range together(all, grouping, last) {
		l := laneOf(held)
		l.Signal, l.First, l.Last = sig.String(), first, last
		if len(l.Instances) > fewInstances || len(r.Instances) == 0 {
			l.Instances = nil
		}
		lanes = append(lanes, l)
	}
	return lanes, instances, nil
}

// sequences returns where reading begins and ends.
func (p *Plan) sequences(ctx context.Context, conn *bus.Conn, r Request, sig otlpwire.Signal, wait time.Duration, state bus.StreamState) (first, last uint64, err error) {
	stream := bus.Stream(sig)
	begin := r.From.Time
	if r.From.Seq > 0 {
		if r.From.Seq < state.FirstSeq || r.From.Seq > state.LastSeq {
			return 0, 0, refusal("stream %s holds the sequences %d to %d, not %d", stream, state.FirstSeq, state.LastSeq, r.From.Seq)
		}
		if begin, err = arrivalAt(ctx, conn, stream, r.From.Seq); err != nil {
			return 0, 0, err
		}
		p.Oldest = begin
		first, last = r.From.Seq, min(r.To.Seq, state.LastSeq)
	} else {
		if state.FirstSeq > 1 && begin.Before(state.FirstTime) {
			oldest, err := arrivalAt(ctx, conn, stream, state.FirstSeq)
			if err != nil {
				return 0, 0, err
			}
			return 0, 0, refusal("from is %s, but stream %s no longer has what came before %s (its oldest message, sequence %d, arrived at its edge at %s): begin there or later",
				begin.UTC().Format(time.RFC3339), stream, state.FirstTime.UTC().Format(time.RFC3339), state.FirstSeq, oldest.UTC().Format(time.RFC3339))
		}
		if first, err = conn.SequenceAt(ctx, stream, begin.Add(-skew)); err != nil {
			return 0, 0, err
		}
		last = state.LastSeq
		if r.Late > 0 {
			end, err := conn.SequenceAt(ctx, stream, r.To.Time.Add(r.Late))
			if err != nil {
				return 0, 0, err
			}
			last = min(last, end-1)
		}
	}
	if r.Samples(sig) {
		lead, err := conn.SequenceAt(ctx, stream, begin.Add(-skew-max(leadIn, 4*wait)))
		if err != nil {
			return 0, 0, err
		}
		first = min(first, lead)
		if r.From.Seq > 0 { // for the windows that are open at the end of the range
			last = state.LastSeq
		}
	}
	return max(first, state.FirstSeq), last, nil
}

// arrivalAt returns when the message of a sequence, or the next existing one, arrived at its edge.
func arrivalAt(ctx context.Context, conn *bus.Conn, stream string, seq uint64) (time.Time, error) {
	r, err := conn.OpenReaderOf(ctx, bus.ReaderConfig{Stream: stream, From: seq, Headers: true})
	if err != nil {
		return time.Time{}, err
	}
	defer r.Close()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	d, err := r.Next(ctx)
	if err != nil {
		return time.Time{}, err
	}
	return d.Header.Time(), nil
}

// Count is the content of a range, for one signal and instance.
type Count struct {
	Signal, Instance string
	Messages, Items  int64
	Bytes            int64 // as stored
}

// Count reads the headers of all messages that the plan of q reads, and counts those in the range; for
// traces by the arrival of each message. It calls told from time to time with the share that is done.
func (p *Plan) Count(ctx context.Context, conn *bus.Conn, q Request, told func(share float64)) ([]Count, error) {
	counts := map[[2]string]*Count{}
	for i, l := range p.Lanes {
		sig, _ := otlpwire.ParseSignal(l.Signal)
		r, err := conn.OpenReaderOf(ctx, bus.ReaderConfig{Stream: bus.Stream(sig), From: l.First, Filters: l.Filters(), Headers: true})
		if err != nil {
			return nil, err
		}
		n := 0
		err = r.Each(ctx, func(d bus.Delivery) bool {
			if d.Seq > l.Last {
				return false
			}
			if n++; n%1024 == 0 {
				told((float64(i) + float64(d.Seq-l.First)/float64(l.Last-l.First+1)) / float64(len(p.Lanes)))
			}
			if !q.Matches(d.Instance()) || !q.In(d.Header.Arrival, d.Seq) {
				return true
			}
			k := [2]string{l.Signal, d.Instance()}
			if counts[k] == nil {
				counts[k] = &Count{Signal: l.Signal, Instance: d.Instance()}
			}
			counts[k].Messages++
			counts[k].Items += int64(d.Header.Items)
			counts[k].Bytes += int64(d.Size)
			return true
		})
		r.Close()
		if err != nil {
			return nil, err
		}
	}
	var all []Count
	for _, c := range counts {
		all = append(all, *c)
	}
	slices.SortFunc(all, func(a, b Count) int {
		return slices.Compare([]string{a.Signal, a.Instance}, []string{b.Signal, b.Instance})
	})
	return all, nil
}

// Filters returns the subjects that a lane reads.
func (l Lane) Filters() (subjects []string) {
	sig, err := otlpwire.ParseSignal(l.Signal)
	if err != nil {
		return nil
	}
	switch {
	case len(l.Instances) > 0:
		part := "*"
		if len(l.Partitions) == 0 {
			part = strconv.Itoa(l.Partition)
		}
		for _, i := range l.Instances {
			subjects = append(subjects, "otlp."+l.Signal+"."+part+"."+i)
		}
	case len(l.Partitions) == 0:
		subjects = []string{bus.PartitionFilter(sig, l.Partition)}
	default:
		for _, p := range l.Partitions {
			subjects = append(subjects, bus.PartitionFilter(sig, p))
		}
	}
	return subjects
}

// Jobs files jobs, and changes them.
type Jobs struct {
	conn   *bus.Conn
	bucket *bus.Bucket
}

// Bucket has the jobs, and how far they are. It is fenced, since an instance's own credential may write
// the jobs of that instance.
var Bucket = bus.BucketConfig{Name: "REPLAYS", Description: "replay jobs, and how far they are", Fenced: true, MaxBytes: 64 << 20, MaxValue: 512 << 10}

// Open opens the hub's bucket REPLAYS.
func Open(ctx context.Context, conn *bus.Conn, t bus.Topology) (*Jobs, error) {
	b, err := conn.OpenBucket(ctx, Bucket, t.Replicas)
	if err != nil {
		return nil, err
	}
	return &Jobs{conn, b}, nil
}

// Entry is one line of the audit.
type Entry struct {
	At     time.Time `json:"at"`
	By     string    `json:"by"`
	What   string    `json:"what"` // filed, stopped, resumed, removed, or lane finished
	Job    string    `json:"job"`
	Lane   string    `json:"lane,omitempty"`
	Told   *Request  `json:"request,omitempty"`
	Counts *Progress `json:"counts,omitempty"`
}

// Record writes a line of the audit, audit.replay.<id>.
func Record(ctx context.Context, conn *bus.Conn, e Entry) error {
	body, err := json.Marshal(e)
	if err == nil {
		err = conn.Record(ctx, "replay."+e.Job, body)
	}
	return err
}

// File stores a job with a valid request. filed is false if the job already exists: then the existing
// job is returned, after it was set to accept losses if j does. A job that was refused is filed again.
func (s *Jobs) File(ctx context.Context, j *Job, by string, now time.Time) (job *Job, filed bool, err error) {
	j.ID, j.State, j.By, j.At = j.JobID(), Running, by, now.UTC()
	value, err := json.Marshal(j)
	if err != nil {
		return nil, false, err
	}
	entry := Entry{At: j.At, By: by, What: "filed", Job: j.ID, Told: &j.Request}
	switch err := s.bucket.Create(ctx, jobKey(j.scope(), j.ID), value); {
	case err == nil:
		return j, true, Record(ctx, s.conn, entry)
	case !errors.Is(err, bus.ErrExists):
		return nil, false, fmt.Errorf("file job %s: %w", j.ID, err)
	}
	old, err := s.Status(ctx, j.ID)
	switch {
	case err != nil:
		return nil, false, err
	case old.Phase() == Refused:
		job, err = s.change(ctx, j.ID, entry, func(was *Job) { *was = *j })
		return job, true, err
	case j.AcceptLoss && !old.AcceptLoss:
		entry.What = "told to accept losses"
		job, err = s.change(ctx, j.ID, entry, func(was *Job) { was.AcceptLoss = true })
		return job, false, err
	}
	return old.Job, false, nil
}

// get returns a job and its revision.
func (s *Jobs) get(ctx context.Context, id string) (*Job, uint64, error) {
	t, err := s.Table(ctx)
	if err != nil {
		return nil, 0, err
	}
	st, ok := t.Status(id)
	if !ok {
		return nil, 0, fmt.Errorf("there is no job %q; penstock replay list shows the existing ones", id)
	}
	value, revision, err := s.bucket.Get(ctx, jobKey(st.scope(), id))
	if err != nil {
		return nil, 0, err
	}
	j, err := parse(jobKey(st.scope(), id), value)
	return j, revision, err
}

// change changes a job, and records it in the audit.
func (s *Jobs) change(ctx context.Context, id string, e Entry, do func(*Job)) (*Job, error) {
	for {
		j, revision, err := s.get(ctx, id)
		if err != nil {
			return nil, err
		}
		do(j)
		value, err := json.Marshal(j)
		if err != nil {
			return nil, err
		}
		switch _, err := s.bucket.Store(ctx, jobKey(j.scope(), id), value, revision); {
		case err == nil:
			e.Job = id
			return j, Record(ctx, s.conn, e)
		case !errors.Is(err, bus.ErrChanged):
			return nil, err
		}
	}
}

// Stop makes the sinks stop working on a job.
func (s *Jobs) Stop(ctx context.Context, id, by string, now time.Time) error {
	_, err := s.change(ctx, id, Entry{At: now.UTC(), By: by, What: "stopped"}, func(j *Job) { j.State = Stopped })
	return err
}

// Resume makes the sinks continue a job.
func (s *Jobs) Resume(ctx context.Context, id, by string, now time.Time) error {
	_, err := s.change(ctx, id, Entry{At: now.UTC(), By: by, What: "resumed"}, func(j *Job) { j.State = Running })
	return err
}

// Remove deletes a job and its progress; the sinks stop working on it. The audit stays.
func (s *Jobs) Remove(ctx context.Context, id, by string, now time.Time) error {
	j, _, err := s.get(ctx, id)
	if err != nil {
		return err
	}
	if err := s.bucket.Delete(ctx, jobKey(j.scope(), id)); err != nil {
		return err
	}
	return Record(ctx, s.conn, Entry{At: now.UTC(), By: by, What: "removed", Job: id})
}

// Table returns all jobs. A job that cannot be read is left out.
func (s *Jobs) Table(ctx context.Context) (*Table, error) {
	all, err := s.bucket.All(ctx)
	if err != nil {
		return nil, err
	}
	t := NewTable()
	for key, value := range all {
		_ = t.Set(key, value) // the sinks say what is wrong with it
	}
	return t, nil
}

// Status returns a job and its progress.
func (s *Jobs) Status(ctx context.Context, id string) (Status, error) {
	t, err := s.Table(ctx)
	if err != nil {
		return Status{}, err
	}
	return t.find(id)
}

// Audit returns what was done with a job, oldest first; "*" for all jobs.
func (s *Jobs) Audit(ctx context.Context, id string) (entries []Entry, err error) {
	lines, err := s.conn.Recorded(ctx, "replay."+id)
	for _, line := range lines {
		var e Entry
		if json.Unmarshal(line, &e) == nil {
			entries = append(entries, e)
		}
	}
	return entries, err
}
