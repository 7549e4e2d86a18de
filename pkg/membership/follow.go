package membership

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/penstock/penstock/pkg/backoff"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/stall"
)

// follow keeps the gauges of a lane that is placed here until ctx ends.
func (m *Members) follow(ctx context.Context, r *run) {
	behind, owned, eta := m.led.Lane(r.Signal, strconv.Itoa(r.Partition), r.Backend)
	tick := time.NewTicker(stall.Interval)
	defer tick.Stop()
	var pace pace
	for goOn := true; goOn; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			goOn = false // one last time: what is left for the next owner
		}
		lane, at, err := m.ask(ctx, r)
		if err == nil {
			behind.Set(float64(at.Lag)) // also while another member has the pin: the lane is placed here
		}
		ours := lane != nil && lane.Owned()
		if owned.Set(0); ours {
			owned.Set(1)
		}
		switch {
		case !ours:
			eta.Set(0)
			pace.past = nil
		case err == nil:
			eta.Set(pace.left(time.Now(), lane.Waiting()))
		}
		r.look(lane, at, err)
	}
	owned.Set(0)
	eta.Set(0)
}

// ask asks the hub about a lane that is placed here.
func (m *Members) ask(ctx context.Context, r *run) (*bus.Lane, bus.Floor, error) {
	m.mu.Lock()
	lane, failed := r.lane, r.failed
	m.mu.Unlock()
	if lane == nil {
		if failed == nil {
			failed = errors.New("the lane is not open yet")
		}
		return nil, bus.Floor{}, failed
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stall.Interval)
	defer cancel()
	at, err := lane.Progress(ctx)
	if err != nil && !m.hub.Conn.Connected() {
		err = fmt.Errorf("the hub cannot be reached: %w", err)
	}
	return lane, at, err
}

// look notes whether a lane that is placed here makes progress: this reader owns it, and its
// floor has moved, or nothing is left, or the floor has not moved for less than Hold while the
// reader waits for nothing outside the lane.
func (r *run) look(lane *bus.Lane, at bus.Floor, err error) {
	now := time.Now()
	if err != nil || !lane.Owned() {
		r.stall.Look(now, false, func() error {
			if err != nil {
				return err
			}
			return lane.Why()
		})
		return
	}
	moved := at.Done > r.floor || at.Lag == 0
	if r.floor = at.Done; moved {
		r.moved = now
	}
	if !moved && r.Hold != nil && now.Sub(r.moved) < r.Hold() {
		since := now
		if waits := lane.WaitsSince(); !waits.IsZero() {
			since = waits
		}
		r.stall.Since(now, since, lane.Why)
		return
	}
	r.stall.Look(now, moved, lane.Why)
}

// maxQuestions is how many requests a second all members together send about lanes that run
// elsewhere.
const maxQuestions = 500

// followOthers checks the lasting lanes that do not run here, until ctx ends: some member must
// read each of them. A key that is renewed by something that reads no lanes has lanes placed on it.
func (m *Members) followOthers(ctx context.Context) {
	for backoff.Sleep(ctx, stall.Interval/2) {
		others, members := m.elsewhere()
		round := max(stall.Interval/2, time.Duration(len(others)*members)*time.Second/maxQuestions)
		for _, r := range others {
			if m.lookElsewhere(ctx, r, time.Now()); !backoff.Sleep(ctx, round/time.Duration(len(others))) {
				return
			}
		}
	}
}

// elsewhere returns the lasting lanes that do not run here, and how many members there are.
func (m *Members) elsewhere() (others []*run, members int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.runs {
		if r.done == nil && !r.also && r.stall != nil {
			others = append(others, r)
		}
	}
	return others, max(len(m.seen), 1)
}

// lookElsewhere asks whether any member reads a lane. If the hub does not answer, that is not known,
// and not reported here: the lanes that run here report it.
func (m *Members) lookElsewhere(ctx context.Context, r *run, now time.Time) {
	ctx, cancel := context.WithTimeout(ctx, stall.Interval)
	defer cancel()
	at, err := m.hub.Conn.LaneFloor(ctx, r.LaneConfig)
	read := err == nil && at.Read
	unknown := err != nil && !errors.Is(err, bus.ErrNoLane)
	m.mu.Lock()
	here := r.done != nil
	m.mu.Unlock()
	if here {
		return // it has been placed here meanwhile
	}
	r.stall.Look(now, read || unknown, func() error {
		return fmt.Errorf("nobody reads the lane; it is placed on %s", m.owners()[r.Stream][r.Partition])
	})
}

// pace estimates from how the number of waiting messages changes when none will wait.
type pace struct{ past []waited }

type waited struct {
	at       time.Time
	messages uint64
}

// left notes how many messages wait, and returns the seconds until none does.
func (p *pace) left(now time.Time, waiting uint64) float64 {
	if p.past = append(p.past, waited{now, waiting}); len(p.past) > 6 { // ten seconds
		p.past = p.past[1:]
	}
	first := p.past[0]
	switch {
	case waiting == 0:
		return 0
	case first.messages <= waiting:
		return math.Inf(1)
	}
	return float64(waiting) * now.Sub(first.at).Seconds() / float64(first.messages-waiting)
}
