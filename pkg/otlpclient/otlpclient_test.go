package otlpclient

import (
	"errors"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/penstock/penstock/pkg/fault"
)

func TestCodesMeanWhatTheySay(t *testing.T) {
	withRetry := func(c codes.Code, msg string, d time.Duration) error {
		st, err := status.New(c, msg).WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(d)})
		if err != nil {
			t.Fatal(err)
		}
		return st.Err()
	}
	for _, tc := range []struct {
		err   error
		want  string
		pause time.Duration
	}{
		{status.Error(codes.InvalidArgument, "trace ids must be 128 bit"), "permanent", 0},
		{withRetry(codes.ResourceExhausted, "RATE_LIMITED: ingestion rate limit exceeded", 5*time.Second), "again", 5 * time.Second},
		{withRetry(codes.ResourceExhausted, "RATE_LIMITED: batch size (9 bytes) exceeds ingestion limit", 5*time.Second), "permanent", 0},
		{withRetry(codes.Unavailable, "x", -time.Second), "again", 100 * time.Millisecond},
		{withRetry(codes.Unavailable, "x", 1<<62), "again", 30 * time.Second},
		{status.Error(codes.ResourceExhausted, "grpc: received message larger than max"), "permanent", 0},
		{status.Error(codes.Unavailable, "x"), "again", 100 * time.Millisecond},
		{status.Error(codes.Internal, "x"), "again", 100 * time.Millisecond},
		{status.Error(codes.Code(99), "x"), "again", 100 * time.Millisecond},
		{status.Error(codes.Unauthenticated, "x"), "configuration", 0},
		{status.Error(codes.PermissionDenied, "x"), "configuration", 0},
		{status.Error(codes.Unimplemented, "x"), "configuration", 0},
		{errors.New("no status"), "again", 100 * time.Millisecond},
	} {
		err := Meaning(tc.err)
		_, permanent := fault.Reason(err)
		got := "again"
		if permanent {
			got = "permanent"
		} else if fault.IsConfiguration(err) {
			got = "configuration"
		}
		if got != tc.want || (tc.pause > 0 && fault.Pause(err, 1, 0) != tc.pause) {
			t.Errorf("%v: %s, pause %v; want %s, %v", tc.err, got, fault.Pause(err, 1, 0), tc.want, tc.pause)
		}
	}
}

func TestPartialSuccessIsRead(t *testing.T) {
	answer := []byte{0x0a, 0x07, 0x08, 0x05, 0x12, 0x03, 'b', 'a', 'd'}
	if n, msg := partialSuccess(answer); n != 5 || msg != "bad" {
		t.Errorf("got %d, %q", n, msg)
	}
	for i := range answer {
		partialSuccess(answer[:i]) // must not panic
	}
	if n, _ := partialSuccess(nil); n != 0 {
		t.Errorf("empty answer: %d rejected", n)
	}
}
