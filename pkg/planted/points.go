//go:build points

package planted

import (
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// killAt is where the process ends: NAME:N for the Nth time that it comes by, from
// the environment variable PENSTOCK_KILL_AT.
var killAt = func() (at struct {
	sync.Mutex
	name string
	left int
}) {
	name, count, ok := strings.Cut(os.Getenv("PENSTOCK_KILL_AT"), ":")
	if n, err := strconv.Atoi(count); ok && err == nil {
		at.name, at.left = name, n
	}
	return at
}()

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

// Point kills the process when its time has come.
func Point(name string) {
	if due(name) {
		kill()
		select {}
	}
}

// During kills the process while it does what comes next.
func During(name string) {
	if due(name) {
		time.AfterFunc(time.Duration(rand.Int64N(int64(2*time.Millisecond))), kill)
	}
}
