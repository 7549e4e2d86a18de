package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
)

const (
	// refusedPause is the time before a request is sent again.
	refusedPause = 100 * time.Millisecond

	// answerTimeout is when a sender gives up.
	answerTimeout = time.Minute
)

// sender is one connection. send returns when the request was answered; the body is
// not kept.
type sender interface {
	send(ctx context.Context, body []byte) error
	close()
}

// errRefused is an answer that asks for the request again.
var errRefused = errors.New("refused for now")

// openSenders makes n connections to addr.
func openSenders(protocol, addr string, n int) (all []sender, err error) {
	for range n {
		if protocol == "http" {
			all = append(all, &httpSender{url: "http://" + addr + "/v1/traces", client: &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1, MaxIdleConnsPerHost: 1}}})
			continue
		}
		conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.ForceCodecV2(otlpgrpc.Codec{})))
		if err != nil {
			return all, err
		}
		all = append(all, grpcSender{conn})
	}
	return all, nil
}

func closeAll(senders []sender) {
	for _, s := range senders {
		s.close()
	}
}

type grpcSender struct{ conn *grpc.ClientConn }

func (s grpcSender) close() { _ = s.conn.Close() }

func (s grpcSender) send(ctx context.Context, body []byte) error {
	var answer []byte
	err := s.conn.Invoke(ctx, otlpgrpc.Method(otlpwire.Traces), body, &answer)
	switch status.Code(err) {
	case codes.OK:
		return complete(answer)
	case codes.Unavailable, codes.ResourceExhausted, codes.Aborted:
		return fmt.Errorf("%w: %w", errRefused, err)
	}
	return err
}

type httpSender struct {
	url    string
	client *http.Client
}

func (s *httpSender) close() { s.client.CloseIdleConnections() }

func (s *httpSender) send(ctx context.Context, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-protobuf")
	res, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	answer, err := io.ReadAll(res.Body)
	switch {
	case err != nil:
		return err
	case res.StatusCode == http.StatusOK:
		return complete(answer)
	case res.StatusCode == http.StatusTooManyRequests || res.StatusCode == http.StatusServiceUnavailable:
		return fmt.Errorf("%w: %s", errRefused, res.Status)
	}
	return fmt.Errorf("%s: %s", res.Status, answer)
}

// complete reports an answer that does not mean all: empty is what it should be, and
// two bytes are a partial success with nothing in it.
func complete(answer []byte) error {
	if len(answer) > 2 {
		return fmt.Errorf("a part was rejected: %q", answer)
	}
	return nil
}

// traffic is what senders do at the same time.
type traffic struct {
	senders []sender
	spans   int           // a request
	every   time.Duration // from the start of a request to that of the next; 0: when it was answered
	// next returns the next request of a connection; nil ends the connection's part.
	next  func(connection int) []byte
	acked atomic.Int64 // spans answered with success so far
}

// outcome is what came of it.
type outcome struct {
	spans   int           // answered with success
	refused int           // answers that asked for the request again
	took    time.Duration // until the last answer
	answers []time.Duration
}

// run sends until next ends it, or ctx, or an answer that is for good.
func (t *traffic) run(ctx context.Context) (outcome, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	parts := make([]outcome, len(t.senders))
	start := time.Now()
	for i, s := range t.senders {
		wg.Go(func() {
			var err error
			if parts[i], err = t.connection(ctx, i, s); err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	sum := outcome{took: time.Since(start)}
	for _, p := range parts {
		sum.spans += p.spans
		sum.refused += p.refused
		sum.answers = append(sum.answers, p.answers...)
	}
	return sum, context.Cause(ctx)
}

func (t *traffic) connection(ctx context.Context, i int, s sender) (o outcome, err error) {
	due := time.Now()
	for body := t.next(i); body != nil && ctx.Err() == nil; body = t.next(i) {
		if t.every > 0 {
			time.Sleep(time.Until(due))
			due = due.Add(t.every)
		}
		start := time.Now()
		for {
			err := once(ctx, s, body)
			if err == nil {
				break
			}
			if !errors.Is(err, errRefused) {
				return o, fmt.Errorf("send on connection %d: %w", i, err)
			}
			o.refused++
			time.Sleep(refusedPause)
		}
		o.answers = append(o.answers, time.Since(start))
		o.spans += t.spans
		t.acked.Add(int64(t.spans))
	}
	return o, ctx.Err()
}

// once sends a body and waits for the answer.
func once(ctx context.Context, s sender, body []byte) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	return s.send(ctx, body)
}
