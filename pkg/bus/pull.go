package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// pull is one subscription with the pull requests that fill it. The client
// library's own iterator hides the pin and ends asynchronously, so that messages
// go to an inbox that nobody reads. Here the lane controls both: after stop the
// server sends nothing more to this inbox.
type pull struct {
	conn    *Conn
	nc      *nats.Conn
	subject string // to ask for messages
	sub     *nats.Subscription
	msgs    chan *nats.Msg
	inbox   string
	group   string // of a lane; a reader has none
	pin     string // empty until the server has served us
	asked   []request
	left    int // requests that were given up and may still be served
	taken   int // messages received from msgs
	count   int
	active  time.Time // when the server last sent anything
	single  bool      // a message is larger than a request may be: ask for one, of any size
	always  bool      // ask for one at a time
}

// request is a pull request that has not ended.
type request struct {
	reply  string
	single bool // for one message: the server does not report its end
}

// pullRequest is the server's format (ADR-13, ADR-42).
type pullRequest struct {
	Batch     int           `json:"batch"`
	MaxBytes  int           `json:"max_bytes,omitempty"`
	Expires   time.Duration `json:"expires,omitempty"`
	Heartbeat time.Duration `json:"idle_heartbeat,omitempty"`
	NoWait    bool          `json:"no_wait,omitempty"`
	Group     string        `json:"group,omitempty"`
	Pin       string        `json:"id,omitempty"`
}

const (
	// Two requests are out at a time, so that one fills while the other is read.
	requests     = 2
	requestCount = 128

	// The requests of all readers of a connection share connBytes, within these bounds:
	// a server closes a connection to which it has more than 64 MiB to send (nats-server,
	// max_pending). A message that is larger than a request is requested alone.
	connBytes       = 48 << 20
	minRequestBytes = 256 << 10
	maxRequestBytes = 4 << 20

	requestExpiry    = 5 * time.Second
	requestHeartbeat = 2 * time.Second

	// deaf is how long the server may be silent before the requests are considered
	// lost: two heartbeats.
	deaf = 2*requestHeartbeat + time.Second

	// deafForGood is after how long a silence reading begins again with another subscription.
	deafForGood = 30 * time.Second

	// Requests that were considered lost may still be served, by a server that was only slow:
	// the channel has room for as many requests again, and no more than these are given up.
	maxLeft = requests
)

// errPinLost reports that the server serves another reader, or none.
var errPinLost = errors.New("the pin is lost")

// errGone reports that the consumer no longer exists.
var errGone = errors.New("the consumer was deleted")

// errDeaf reports that the server has repeatedly not answered requests.
var errDeaf = errors.New("the server does not answer requests for messages")

// newPull subscribes; pin is the pin that is still ours, or empty.
func newPull(c *Conn, stream, consumer, group, pin string) (*pull, error) {
	nc := c.nc
	p := &pull{conn: c, nc: nc, group: group, subject: "$JS.API.CONSUMER.MSG.NEXT." + stream + "." + consumer, inbox: nc.NewInbox(), pin: pin, active: time.Now()}
	p.msgs = make(chan *nats.Msg, (requests+maxLeft)*(requestCount+16)) // messages, and the server's answers to a request
	var err error
	p.sub, err = nc.ChanSubscribe(p.inbox+".*", p.msgs)
	if err == nil {
		c.pulls.Add(1)
	}
	return p, err
}

// stop ends the subscription. The server handles the unsubscription before any later
// request of this connection, and sends nothing more to the inbox.
func (p *pull) stop() {
	if p.sub.Unsubscribe() == nil {
		p.conn.pulls.Add(-1)
	}
}

// requestBytes is how many bytes of messages one request may bring.
func (c *Conn) requestBytes() int {
	return min(max(connBytes/requests/max(int(c.pulls.Load()), 1), minRequestBytes), maxRequestBytes)
}

// unread returns the pin of a message that has arrived and was not read, if there is
// one.
func (p *pull) unread() (pin string) {
	for pin == "" {
		select {
		case msg := <-p.msgs:
			pin = pinOf(msg)
		default:
			return ""
		}
	}
	return pin
}

// pinHeader is in every message of a pinned consumer. The server appends it to the sender's
// own fields and does not remove one that a sender has written: only the last one may be the
// server's, and in a header that a sender did not terminate not even that one.
const pinHeader = "Nats-Pin-Id"

func pinOf(msg *nats.Msg) string {
	pins := msg.Header.Values(pinHeader)
	if len(pins) == 0 {
		return ""
	}
	return pins[len(pins)-1]
}

// next returns a message, or nil when none came within quiet. It returns a kind of
// errPinLost when the lane has to be claimed again.
func (p *pull) next(ctx context.Context, quiet time.Duration, forget <-chan string) (*nats.Msg, error) {
	timer := time.NewTimer(quiet)
	defer timer.Stop()
	for {
		if err := p.ask(); err != nil {
			return nil, err
		}
		select {
		case msg := <-p.msgs:
			p.active = time.Now()
			p.taken++
			// A message has its own subject, an answer that of the request. So a sender
			// cannot forge an answer of the server by a header.
			if strings.HasPrefix(msg.Subject, p.inbox+".") {
				i := slices.IndexFunc(p.asked, func(r request) bool { return r.reply == msg.Subject })
				if err := p.told(i, msg.Header.Get("Status"), msg); err != nil {
					return nil, err
				}
				continue
			}
			// Requests are served in order.
			if i := slices.IndexFunc(p.asked, func(r request) bool { return r.single }); i >= 0 {
				p.asked = slices.Delete(p.asked, i, i+1)
			}
			p.single = p.always
			return msg, nil
		case <-timer.C:
			return nil, p.giveUp(time.Now())
		case why := <-forget:
			return nil, forgotten(why)
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// giveUp considers the requests lost when the server has been silent for long.
func (p *pull) giveUp(now time.Time) error {
	silence := now.Sub(p.active)
	switch {
	case silence <= deaf:
		return nil
	case p.left+len(p.asked) <= maxLeft:
		p.left += len(p.asked)
		p.asked, p.active = p.asked[:0], now
		return nil
	case silence <= deafForGood:
		return nil // it may only be slow
	}
	return errDeaf
}

// ask keeps enough requests out, but only one while there is no pin: the server grants the
// pin to the first request without one, even if that was left by a reader that is gone
// (nats-server 2.15.2), and then serves nobody until the pin expires.
func (p *pull) ask() error {
	for len(p.asked) < requests && (p.pin != "" || len(p.asked) == 0) {
		p.count++
		r := request{p.inbox + "." + strconv.Itoa(p.count), p.single}
		body := pullRequest{Batch: requestCount, MaxBytes: p.conn.requestBytes(), Expires: requestExpiry, Heartbeat: requestHeartbeat, Group: p.group, Pin: p.pin}
		if p.single {
			body.Batch, body.MaxBytes = 1, 0
		}
		if err := p.nc.PublishRequest(p.subject, r.reply, marshal(body)); err != nil {
			return err
		}
		p.asked = append(p.asked, r)
	}
	return nil
}

func marshal(r pullRequest) []byte {
	b, _ := json.Marshal(r) // cannot fail: plain fields
	return b
}

// told handles what the server reports about request i.
func (p *pull) told(i int, status string, msg *nats.Msg) error {
	what := msg.Header.Get("Description")
	switch status {
	case "100": // heartbeat
		return nil
	case "423":
		return errPinLost
	case "408", "404", "409":
		// The request has ended: expired, complete, or the consumer's server changes.
		if strings.Contains(what, "Consumer Deleted") {
			return errGone
		}
		if strings.Contains(what, "Exceeds MaxBytes") && msg.Header.Get("Nats-Pending-Messages") == strconv.Itoa(requestCount) {
			p.single = true
		}
		if strings.Contains(what, "Leadership") || strings.Contains(what, "Shutdown") {
			return fmt.Errorf("the server reports: %s", what)
		}
		if i >= 0 {
			p.asked = slices.Delete(p.asked, i, i+1)
		} else {
			p.left = max(p.left-1, 0)
		}
		return nil
	}
	return fmt.Errorf("the server refuses to deliver: %s %s", status, what)
}

// hold renews the pin, also while the owner reads nothing: a request for a message of
// one byte renews it and is never served.
func (p *pull) hold(ctx context.Context, pin string) error {
	ctx, cancel := context.WithTimeout(ctx, pinTTL/2)
	defer cancel()
	msg, err := p.nc.RequestWithContext(ctx, p.subject, marshal(pullRequest{Batch: 1, MaxBytes: 1, NoWait: true, Group: pinGroup, Pin: pin}))
	if err == nil && msg.Header.Get("Status") == "423" {
		err = errPinLost
	}
	return err
}
