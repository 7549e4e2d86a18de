package replay

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
)

// Desk handles the jobs of one instance for clients with a credential of that instance: such a
// credential has no access to the hub's table, only to the sinks, under penstock.jobs.<instance>. The
// instance is taken from the subject, which the credential allows; a request cannot name another one,
// and does not see its jobs.
type Desk struct{ jobs *Jobs }

const (
	deskSubject = "penstock.jobs."

	// DeskSubjects are the subjects that the sinks answer.
	DeskSubjects = deskSubject + "*.*"

	// maxOwnJobs is how many jobs one instance may have filed at a time.
	maxOwnJobs = 16
)

// NewDesk returns a desk that works on the hub's table.
func NewDesk(jobs *Jobs) *Desk { return &Desk{jobs} }

// question is a request to a desk; the last token of the subject is its verb.
type question struct {
	By  string `json:"by"` // the user name that the client reports
	ID  string `json:"id,omitempty"`
	Job *Job   `json:"job,omitempty"`
}

// reply is the answer of a desk.
type reply struct {
	Error   string            `json:"error,omitempty"`
	ID      string            `json:"id,omitempty"`
	Filed   bool              `json:"filed,omitempty"`
	Values  map[string][]byte `json:"values,omitempty"` // of the table, by key
	Entries []Entry           `json:"entries,omitempty"`
}

// Answer answers one request. If it cannot be carried out, the answer says why.
func (d *Desk) Answer(ctx context.Context, subject string, body []byte) []byte {
	tokens := strings.Split(strings.TrimPrefix(subject, deskSubject), ".")
	var (
		r   reply
		q   question
		err = errors.New("unknown subject")
	)
	if len(tokens) == 2 {
		if err = json.Unmarshal(body, &q); err == nil {
			err = d.do(ctx, tokens[0], tokens[1], q, &r)
		}
	}
	if err != nil {
		r = reply{Error: err.Error()}
	}
	text, _ := json.Marshal(r) // cannot fail
	if text, _ = envelope.Compress(nil, text, envelope.S2); len(text) > envelope.MaxPayload {
		text, _ = json.Marshal(reply{Error: "the answer is larger than a message may be: remove finished jobs"})
	}
	return text
}

func (d *Desk) do(ctx context.Context, instance, what string, q question, r *reply) error {
	if err := (envelope.Instance{ID: instance}).Validate(); err != nil {
		return err
	}
	now, by := time.Now(), instance+": "+q.By
	own, err := d.own(ctx, instance)
	if err != nil {
		return err
	}
	if what == "file" {
		return d.file(ctx, instance, by, q.Job, own, r, now)
	}
	if what == "table" {
		r.Values = own.values
		return nil
	}
	if !own.has(q.ID) {
		return fmt.Errorf("there is no job %q of %s; penstock replay -as %s list shows the existing ones", q.ID, instance, instance)
	}
	switch what {
	case "stop":
		return d.jobs.Stop(ctx, q.ID, by, now)
	case "resume":
		return d.jobs.Resume(ctx, q.ID, by, now)
	case "remove":
		return d.jobs.Remove(ctx, q.ID, by, now)
	case "audit":
		r.Entries, err = d.jobs.Audit(ctx, q.ID)
		return err
	}
	return fmt.Errorf("unknown request %q", what)
}

func (d *Desk) file(ctx context.Context, instance, by string, j *Job, own ownTable, r *reply, now time.Time) error {
	if j == nil {
		return errors.New("the request has no job")
	}
	if err := j.Validate(); err != nil {
		return err
	}
	if j.scope() != instance {
		return fmt.Errorf("the credential is of %s, and the job is for %q: name that one instance", instance, j.Instances)
	}
	if !own.has(j.JobID()) && len(own.Jobs()) >= maxOwnJobs {
		return fmt.Errorf("%s has %d jobs, the maximum: remove finished ones", instance, maxOwnJobs)
	}
	job, filed, err := d.jobs.File(ctx, j, by, now)
	if err == nil {
		r.ID, r.Filed = job.ID, filed
	}
	return err
}

// ownTable is the part of the table that belongs to one instance.
type ownTable struct {
	*Table
	values map[string][]byte
}

func (t ownTable) has(id string) bool {
	_, there := t.Status(id)
	return there
}

// own returns the part of the hub's table that belongs to an instance.
func (d *Desk) own(ctx context.Context, instance string) (ownTable, error) {
	all, err := d.jobs.bucket.All(ctx)
	if err != nil {
		return ownTable{}, err
	}
	own := ownTable{NewTable(), map[string][]byte{}}
	runs := map[string]bool{}
	for key, value := range all {
		if strings.HasPrefix(key, "job."+instance+".") && own.Set(key, value) == nil {
			own.values[key] = value
		}
	}
	for _, j := range own.jobs {
		runs[j.Run()] = true
	}
	for key, value := range all {
		kind, rest, _ := strings.Cut(key, ".")
		if run, _, _ := strings.Cut(rest, "."); kind == "job" || !runs[run] {
			continue
		}
		if kind == "plan" {
			var p Plan
			if json.Unmarshal(value, &p) != nil {
				continue
			}
			p.only(instance)
			value, _ = json.Marshal(p) // cannot fail
		}
		if own.Set(key, value) == nil {
			own.values[key] = value
		}
	}
	return own, nil
}

// Remote is Jobs for a credential of one instance: it sends requests to the sinks.
type Remote struct {
	conn     *bus.Conn
	instance string
}

// OpenRemote returns the jobs of an instance, of which conn has a credential.
func OpenRemote(conn *bus.Conn, instance string) (*Remote, error) {
	if err := (envelope.Instance{ID: instance}).Validate(); err != nil {
		return nil, err
	}
	return &Remote{conn, instance}, nil
}

func (c *Remote) ask(ctx context.Context, what string, q question) (r reply, err error) {
	body, err := json.Marshal(q)
	if err != nil {
		return r, err
	}
	answer, err := c.conn.Ask(ctx, deskSubject+c.instance+"."+what, body)
	if err != nil {
		return r, err
	}
	if len(answer) > 0 && answer[0] != '{' {
		if answer, err = envelope.Decompress(nil, answer, envelope.S2); err != nil {
			return r, fmt.Errorf("the answer of a sink: %w", err)
		}
	}
	if err = json.Unmarshal(answer, &r); err == nil && r.Error != "" {
		err = errors.New(r.Error)
	}
	return r, err
}

// File is [Jobs.File].
func (c *Remote) File(ctx context.Context, j *Job, by string, _ time.Time) (job *Job, filed bool, err error) {
	r, err := c.ask(ctx, "file", question{By: by, Job: j})
	if err != nil {
		return nil, false, err
	}
	s, err := c.Status(ctx, r.ID)
	return s.Job, r.Filed, err
}

// Stop is [Jobs.Stop].
func (c *Remote) Stop(ctx context.Context, id, by string, _ time.Time) error {
	_, err := c.ask(ctx, "stop", question{By: by, ID: id})
	return err
}

// Resume is [Jobs.Resume].
func (c *Remote) Resume(ctx context.Context, id, by string, _ time.Time) error {
	_, err := c.ask(ctx, "resume", question{By: by, ID: id})
	return err
}

// Remove is [Jobs.Remove].
func (c *Remote) Remove(ctx context.Context, id, by string, _ time.Time) error {
	_, err := c.ask(ctx, "remove", question{By: by, ID: id})
	return err
}

// Table is [Jobs.Table], of the instance.
func (c *Remote) Table(ctx context.Context) (*Table, error) {
	r, err := c.ask(ctx, "table", question{})
	if err != nil {
		return nil, err
	}
	t := NewTable()
	for key, value := range r.Values {
		_ = t.Set(key, value) // the sinks log what is wrong with it
	}
	return t, nil
}

// Status is [Jobs.Status].
func (c *Remote) Status(ctx context.Context, id string) (Status, error) {
	t, err := c.Table(ctx)
	if err != nil {
		return Status{}, err
	}
	return t.find(id)
}

// Audit is [Jobs.Audit], of one job.
func (c *Remote) Audit(ctx context.Context, id string) ([]Entry, error) {
	r, err := c.ask(ctx, "audit", question{ID: id})
	return r.Entries, err
}
