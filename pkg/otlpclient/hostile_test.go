package otlpclient

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/fault"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestEveryCodeHasAMeaning: B7. Whatever a backend says, it is tried again, waits for a
// person, or is given up with a reason.
func TestEveryCodeHasAMeaning(t *testing.T) {
	permanent := map[codes.Code]bool{codes.InvalidArgument: true, codes.FailedPrecondition: true, codes.AlreadyExists: true}
	configuration := map[codes.Code]bool{codes.Unauthenticated: true, codes.PermissionDenied: true, codes.NotFound: true, codes.Unimplemented: true}
	for code := codes.Code(1); code < 18; code++ {
		err := Meaning(status.Error(code, "x"))
		reason, given := fault.Reason(err)
		if given != permanent[code] || fault.IsConfiguration(err) != configuration[code] || given && reason == "" {
			t.Errorf("%v: given up %v (%q), configuration %v", code, given, reason, fault.IsConfiguration(err))
		}
	}
	for text, want := range map[string]string{
		"TRACE_TOO_LARGE: max size of trace (5000000) exceeded": "too_large",
		"LIVE_TRACES_EXCEEDED: max live traces exceeded":        "",
	} {
		for _, code := range []codes.Code{codes.FailedPrecondition, codes.ResourceExhausted, codes.InvalidArgument} {
			if reason, _ := fault.Reason(Meaning(status.Error(code, text))); reason != want {
				t.Errorf("%v %s: %q, want %q", code, text, reason, want)
			}
		}
	}
}

// TestHostileHTTP2: B9. A server that does not follow the protocol costs a request its
// deadline at the most, and the next one goes through when it does.
func TestHostileHTTP2(t *testing.T) {
	payload, _, err := otlpwire.FromJSON(nil, otlpwire.Traces, []byte(`{"resourceSpans":[{"scopeSpans":[{"spans":[{"traceId":"5b8efff798038103d269b633813fc60c","spanId":"eee19b7ec3c1b174"}]}]}]}`), otlpwire.DefaultLimits)
	if err != nil {
		t.Fatal(err)
	}
	for name, serve := range map[string]func(f *http2.Framer) error{
		"frames of no size": func(f *http2.Framer) error {
			return f.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 0})
		},
		"no window for ever": func(f *http2.Framer) error {
			return f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
		},
		"goes away": func(f *http2.Framer) error {
			return errors.Join(f.WriteSettings(), f.WriteGoAway(0, http2.ErrCodeEnhanceYourCalm, []byte("too_many_pings")))
		},
		"no HTTP/2": func(f *http2.Framer) error { return errors.New("close") },
	} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer func() { _ = c.Close() }()
					if _, err := io.ReadFull(c, make([]byte, len(http2.ClientPreface))); err != nil {
						return
					}
					f := http2.NewFramer(c, c)
					if serve(f) != nil {
						return
					}
					for {
						if _, err := f.ReadFrame(); err != nil {
							return
						}
					}
				}()
			}
		}()
		client, err := New("tempo.endpoint", Config{Endpoint: l.Addr().String()})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		began := time.Now()
		_, _, err = client.Export(ctx, otlpwire.Traces, payload, nil)
		cancel()
		if _, given := fault.Reason(err); err == nil || given || fault.IsConfiguration(err) {
			t.Errorf("%s: %v, want an error that may heal", name, err)
		}
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("%s: took %v", name, took)
		}
		_ = client.Close()
		_ = l.Close()
	}
}
