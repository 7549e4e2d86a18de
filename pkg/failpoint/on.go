//go:build failpoints

package failpoint

import (
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The bugs: see off.go.
var (
	AckBeforeExport   = named("ack_before_export")
	PinKept           = named("pin_kept")
	DecisionNotLogged = named("decision_not_logged")
	WallTime          = named("wall_time")
	DomainsIgnored    = named("domains_ignored")
	OneClock          = named("one_clock")
	RescueNotRecorded = named("rescue_not_recorded")
	FloorTooHigh      = named("floor_too_high")
	KeeperTooFar      = named("keeper_too_far")
	LaneIgnored       = named("lane_ignored")
	AnswerBeforeSpool = named("answer_before_spool")
	ForwardUnacked    = named("forward_unacked")
	AsideForgotten    = named("aside_forgotten")
	BackTooSoon       = named("back_too_soon")
	ForwardSwapped    = named("forward_swapped")
)

// Clock is by how much an edge's clock is wrong.
var Clock, _ = time.ParseDuration(os.Getenv("PENSTOCK_CLOCK"))

func named(bug string) bool {
	return slices.Contains(strings.Split(os.Getenv("PENSTOCK_FAILPOINTS"), ","), bug)
}

// killAt is where the process is killed: NAME:N for the Nth time that it reaches the place NAME, from the
// environment variable PENSTOCK_KILL_AT.
var killAt struct {
	sync.Mutex
	name string
	left int
}

func init() {
	name, count, ok := strings.Cut(os.Getenv("PENSTOCK_KILL_AT"), ":")
	if n, err := strconv.Atoi(count); ok && err == nil {
		killAt.name, killAt.left = name, n
	}
}

func due(name string) bool {
	killAt.Lock()
	defer killAt.Unlock()
	if name != killAt.name {
		return false
	}
	killAt.left--
	return killAt.left == 0
}

func kill() {
	if self, err := os.FindProcess(os.Getpid()); err == nil {
		_ = self.Kill()
	}
}

// Point kills the process if killAt has been reached.
func Point(name string) {
	if due(name) {
		kill()
		select {}
	}
}

// During kills the process during the operation that follows.
func During(name string) {
	if due(name) {
		time.AfterFunc(time.Duration(rand.Int64N(int64(2*time.Millisecond))), kill)
	}
}
