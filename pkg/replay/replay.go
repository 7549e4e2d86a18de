// Package replay has the jobs by which operators have a time range of the hub's streams sent to the
// backends again: the content of a job, how it is filed, and its progress. A job is a key in the hub's
// bucket REPLAYS; the sinks see it and do the work, in one lane for each signal and partition.
//
//	job, filed, err := jobs.File(ctx, job, ...)      // the same request twice is one job
//	plan, err := replay.MakePlan(ctx, conn, request) // the range in sequences; called by a sink
//	status, err := jobs.Status(ctx, id)
//
// # The range
//
// Metrics and logs belong to a range by the arrival of their message at the edge. A
// trace belongs to the range in which its first span arrived, and is replayed whole:
// two consecutive ranges have every trace once. An edge that was disconnected delivers late, so reading
// continues to the end that the stream had when the job was planned, or to [Request.Late] after the
// range.
//
// # Promises
//
//   - The same request gives the same job, however often it is filed.
//   - A job cannot exceed its key: one in the scope of an instance can name no other instance.
//   - The process that filed a job need not run while the job does.
//
// # Not here
//
// Reading, deciding, writing: package sink.
package replay

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/domain"
)

// Point is an end of a range: a time, or a sequence of the signal's stream.
type Point struct {
	Time time.Time `json:"time,omitzero"`
	Seq  uint64    `json:"seq,omitempty"`
}

// ParsePoint reads RFC 3339, a time before now as -2h, now, or a sequence.
func ParsePoint(text string, now time.Time) (Point, error) {
	if text == "now" {
		return Point{Time: now}, nil
	}
	if seq, err := strconv.ParseUint(text, 10, 63); err == nil && seq > 0 {
		return Point{Seq: seq}, nil
	}
	if ago, err := config.ParseDuration(text); err == nil && strings.HasPrefix(text, "-") {
		return Point{Time: now.Add(ago)}, nil
	}
	if t, err := time.Parse(time.RFC3339, text); err == nil {
		return Point{Time: t}, nil
	}
	return Point{}, fmt.Errorf("%q is not a point in time: want 2026-01-31T08:00:00Z, -2h for two hours ago, now, or a sequence of the stream", text)
}

func (p Point) String() string {
	if p.Seq > 0 {
		return strconv.FormatUint(p.Seq, 10)
	}
	return p.Time.UTC().Format(time.RFC3339)
}

// Request describes what is to be replayed. The job's id is derived from its fields.
type Request struct {
	From      Point    `json:"from"`
	To        Point    `json:"to"`                  // exclusive if it is a time, inclusive if it is a sequence
	Instances []string `json:"instances,omitempty"` // names or globs; none for all
	Signals   []string `json:"signals"`
	Backends  []string `json:"backends,omitempty"` // none for the backends without a name
	// Policies, if set, are used instead of those that were in force.
	Policies   string `json:"policies,omitempty"`
	NoSampling bool   `json:"no_sampling,omitempty"` // every span, whatever policies say
	// Late bounds how long after To the hub may have received what belongs to the range; 0 for no
	// bound.
	Late time.Duration `json:"late,omitempty"`
}

// The bounds of a request: the length of a glob, the number of globs, and the size of policies.
const (
	maxName     = 256
	maxNames    = 64
	maxPolicies = 128 << 10 // bytes
)

// Validate reports all errors at once.
func (r Request) Validate() error {
	var m mistakes
	r.checkRange(&m)
	r.checkSignals(&m)
	r.checkNames(&m)
	if len(r.Policies) > maxPolicies {
		m.add("the policies are %d bytes, want at most %d", len(r.Policies), maxPolicies)
	}
	if r.NoSampling && r.Policies != "" {
		m.add("policies and no sampling exclude each other: set one")
	}
	if r.Late < 0 {
		m.add("late is %v, want 0 or more", r.Late)
	}
	return errors.Join(m...)
}

// mistakes are what is wrong with a request.
type mistakes []error

func (m *mistakes) add(format string, args ...any) { *m = append(*m, fmt.Errorf(format, args...)) }

func (r Request) checkRange(m *mistakes) {
	if (r.From.Seq > 0) != (r.To.Seq > 0) {
		m.add("from is %v, to is %v: want two times or two sequences", r.From, r.To)
	}
	if r.From.Seq > 0 && len(r.Signals) != 1 {
		m.add("from is the sequence %d: every signal has its own stream, name one with --signal", r.From.Seq)
	}
	if r.From.Seq > 0 && r.From.Seq > r.To.Seq || r.From.Seq == 0 && !r.From.Time.Before(r.To.Time) {
		m.add("the range from %v to %v is empty", r.From, r.To)
	}
}

func (r Request) checkSignals(m *mistakes) {
	if len(r.Signals) == 0 {
		m.add("no signal is named")
	}
	if len(r.Signals) > len(otlpwire.Signals) {
		m.add("%d signals are named, there are %d", len(r.Signals), len(otlpwire.Signals))
		return
	}
	for _, s := range r.Signals {
		if _, err := otlpwire.ParseSignal(s); err != nil {
			*m = append(*m, err)
		}
	}
}

func (r Request) checkNames(m *mistakes) {
	if len(r.Instances) > maxNames || len(r.Backends) > maxNames {
		m.add("%d instances and %d backends are named, want at most %d: use a glob", len(r.Instances), len(r.Backends), maxNames)
		return
	}
	for _, g := range r.Instances {
		if _, err := path.Match(g, ""); err != nil || g == "" || len(g) > maxName {
			m.add("instance %q is neither a name nor a glob such as shop-*", g)
		}
	}
}

// Matches reports whether the request names an instance.
func (r Request) Matches(instance string) bool {
	return len(r.Instances) == 0 || slices.ContainsFunc(r.Instances, func(g string) bool {
		ok, _ := path.Match(g, instance)
		return ok
	})
}

// Samples reports whether policies decide what is sent of a signal.
func (r Request) Samples(sig otlpwire.Signal) bool { return sig == otlpwire.Traces && !r.NoSampling }

// Alone reports whether nothing but what matches counts for decisions: with policies of its own a job for one
// instance could otherwise ask what the spans of others in its domain have.
func (r Request) Alone() bool { return r.Policies != "" && r.scope() != AllInstances }

// JobID is the id of the job; it is the same for the same request.
func (r Request) JobID() string {
	r.Instances, r.Signals, r.Backends = sorted(r.Instances), sorted(r.Signals), sorted(r.Backends)
	r.From.Time, r.To.Time = r.From.Time.UTC(), r.To.Time.UTC()
	b, _ := json.Marshal(r) // cannot fail
	sum := sha256.Sum256(b)
	return strings.ToLower(base32.StdEncoding.EncodeToString(sum[:]))[:10]
}

func sorted(list []string) []string {
	return slices.Compact(slices.Sorted(slices.Values(list)))
}

// Run distinguishes this filing of the job from an earlier one that was removed: the progress of that
// one does not count for this one.
func (j *Job) Run() string { return j.ID + "-" + strconv.FormatInt(j.At.UnixMilli(), 36) }

// scope is the token of the job's key that says whose data it replays: the instance if there is only
// one, else [AllInstances].
func (r Request) scope() string {
	if len(r.Instances) == 1 && (envelope.Instance{ID: r.Instances[0]}).Validate() == nil {
		return r.Instances[0]
	}
	return AllInstances
}

// AllInstances is the scope of a job that may touch any instance.
const AllInstances = "_all"

// The states that operators give a job.
const (
	Running = "running"
	Stopped = "stopped"
)

// Job is a filed request.
type Job struct {
	ID      string `json:"-"`
	Request `json:"request"`
	State   string    `json:"state"`
	By      string    `json:"by"`
	At      time.Time `json:"at"`
	// Rate bounds the whole job, in bytes of messages as stored a second; 0 for none.
	Rate int64 `json:"rate,omitempty"`
	// AcceptLoss runs the job although a backend may refuse data of that age.
	AcceptLoss bool `json:"accept_loss,omitempty"`
}

// Plan is what a request means for the streams as they were at the time of planning.
type Plan struct {
	At time.Time `json:"at"`
	// Oldest is the arrival of the first message of the range.
	Oldest time.Time `json:"oldest,omitzero"`
	Lanes  []Lane    `json:"lanes,omitempty"`
	// Error says why the request cannot be carried out; then there are no lanes.
	Error string `json:"error,omitempty"`
}

// Lane is the part of a job in one partition of a signal's stream, or in several whose instances may share traces.
type Lane struct {
	Signal    string `json:"signal"`
	Partition int    `json:"partition"` // the lowest one
	// Partitions are all of them, where there are several.
	Partitions []int `json:"partitions,omitempty"`
	// First is where reading begins: for traces so early that budgets and windows are as they were at
	// the beginning of the range. Last is where it ends.
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
	// Domains are those that matching instances share with others.
	Domains []string `json:"domains,omitempty"`
	// Instances are the matching ones, and those of the domains, if they are few; else the reader reads all and
	// filters.
	Instances []string `json:"instances,omitempty"`
	Messages  uint64   `json:"messages"` // of those instances, in the whole stream
}

// Shares reports whether an instance is in one of the lane's domains: what it sent counts for the decisions about
// traces of others.
func (l Lane) Shares(grouping domain.Versions, instance string) bool {
	if len(l.Domains) == 0 {
		return false
	}
	now, before := grouping.Of(instance, l.Last)
	return slices.ContainsFunc(append(before, now), func(d string) bool { return slices.Contains(l.Domains, d) })
}

// only removes what the plan says of other instances.
func (p *Plan) only(instance string) {
	for i := range p.Lanes {
		if l := &p.Lanes[i]; len(l.Domains) > 0 {
			l.Domains, l.Partitions, l.Instances, l.Messages = nil, nil, []string{instance}, 0
		}
	}
}

// Key identifies the lane within its job.
func (l Lane) Key() string { return l.Signal + "." + strconv.Itoa(l.Partition) }

// In reports whether something with this arrival, in Unix nanoseconds, and sequence
// is in the range.
func (r Request) In(arrival int64, seq uint64) bool {
	if r.From.Seq > 0 {
		return r.From.Seq <= seq && seq <= r.To.Seq
	}
	return r.From.Time.UnixNano() <= arrival && arrival < r.To.Time.UnixNano()
}

// Progress is the progress of a lane, as its owner last wrote it. A new owner continues counting from
// there: after a crash, what had not been written yet is counted again. Once Done is true it does not
// change any more.
type Progress struct {
	Floor      uint64 `json:"floor"`                   // done up to this sequence
	Delivered  int64  `json:"delivered"`               // items that the backend has
	SampledOut int64  `json:"sampled_out,omitempty"`   // spans
	Unchosen   int64  `json:"not_in_range,omitempty"`  // items read that are not in the range
	Dead       int64  `json:"dead_lettered,omitempty"` // items
	Bytes      int64  `json:"bytes"`                   // of messages read, as stored
	// Gone is how many sequences expired from the stream before they were read.
	Gone  uint64    `json:"gone,omitempty"`
	Done  bool      `json:"done,omitempty"`
	Owner string    `json:"owner"`
	Wait  string    `json:"wait,omitempty"` // why it waits, if it does
	At    time.Time `json:"at"`
}

// Check is a backend's answer to whether it accepts data of that age.
type Check struct {
	OK      bool      `json:"ok"`
	Wrong   bool      `json:"wrong,omitempty"` // the request names another backend
	Backend string    `json:"backend"`
	Text    string    `json:"text,omitempty"` // what to change, or what to know
	At      time.Time `json:"at"`
}

// Keys of the bucket: job.<scope>.<id>, plan.<run>, check.<run>.<signal>,
// lane.<run>.<signal>.<partition>. Operators write the first, sinks the others.
func jobKey(scope, id string) string { return "job." + scope + "." + id }

// PlanKey is the key of a [Plan].
func (j *Job) PlanKey() string { return "plan." + j.Run() }

// CheckKey is the key of a [Check].
func (j *Job) CheckKey(signal string) string { return "check." + j.Run() + "." + signal }

// LaneKey is the key of a [Progress].
func (j *Job) LaneKey(l Lane) string { return "lane." + j.Run() + "." + l.Key() }

var idGrammar = regexp.MustCompile(`^[a-z2-7]{10}$`)

// parse reads a job and refuses what its key does not allow: its writer may have had permission for this
// one instance only.
func parse(key string, value []byte) (*Job, error) {
	tokens := strings.Split(key, ".")
	if len(tokens) != 3 || tokens[0] != "job" || !idGrammar.MatchString(tokens[2]) {
		return nil, fmt.Errorf("key %q is not the key of a job", key)
	}
	j := &Job{ID: tokens[2]}
	if err := json.Unmarshal(value, j); err != nil {
		return nil, fmt.Errorf("job %s: %w", j.ID, err)
	}
	if err := j.Validate(); err != nil {
		return nil, fmt.Errorf("job %s: %w", j.ID, err)
	}
	if scope := j.scope(); scope != tokens[1] {
		return nil, fmt.Errorf("job %s is filed for %s and names %q; it is not run", j.ID, tokens[1], j.Instances)
	}
	if id := j.JobID(); id != j.ID {
		return nil, fmt.Errorf("job %s has the request of job %s; it is not run", j.ID, id)
	}
	if j.State != Running && j.State != Stopped {
		return nil, fmt.Errorf("job %s: unknown state %q", j.ID, j.State)
	}
	if j.Rate < 0 {
		return nil, fmt.Errorf("job %s: rate is %d", j.ID, j.Rate)
	}
	return j, nil
}
