package keeper

import (
	"context"
	"encoding/json"
	"time"

	"github.com/penstock/penstock/pkg/bus"
)

// Loss is a line of the stream AUDIT under [LossRecord]: what the hub has acknowledged, and no backend
// will get.
type Loss struct {
	At     time.Time `json:"at"`
	Stream string    `json:"stream"`
	// Messages is about how many: those that the backend with the most was owed.
	Messages uint64            `json:"messages"`
	Lanes    map[string]uint64 `json:"lanes,omitempty"`
	// Items are those of dead letters that made room for others, by signal and instance, as in
	// logs.as-1.
	Items   map[string]uint64 `json:"items,omitempty"`
	Because string            `json:"because"`
}

// LossRecord is where losses are recorded.
const LossRecord = "loss"

// Losses returns the losses on record, oldest first.
func Losses(ctx context.Context, conn *bus.Conn) (all []Loss, err error) {
	lines, err := conn.Recorded(ctx, LossRecord)
	for _, line := range lines {
		var l Loss
		if err := json.Unmarshal(line, &l); err != nil {
			l = Loss{Because: "a line that nobody can read: " + err.Error()}
		}
		all = append(all, l)
	}
	return all, err
}
