package receive

import (
	"fmt"

	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// request is a request that has been read.
type request struct {
	payload []byte // protobuf
	size    int    // of the decompressed body
	json    bool
	unknown string // see [otlpwire.Notes]
}

// nouns name the items of each signal.
var nouns = [...]string{otlpwire.Traces: "spans", otlpwire.Metrics: "data points", otlpwire.Logs: "log records"}

// foreign reports whether a request has other content instead of items.
func (in request) foreign(sig otlpwire.Signal) bool {
	return in.unknown != "" || !in.json && otlpwire.HasUnknown(sig, in.payload)
}

// nothing is the answer to such a request. Unknown fields must be ignored, so it is a success; the
// message in it is the only way in which the sender learns of the loss.
func (r *Receiver) nothing(sig otlpwire.Signal, in request) outcome {
	text := fmt.Sprintf("no %s were found in a body of %d bytes%s", nouns[sig], in.size, in.hint(sig, r.limits))
	r.deps.Ledger.Of(sig).Refused(ledger.RefusedMalformed).Inc()
	r.deps.Log.Debug("nothing found", "signal", sig, "err", text)
	return outcome{message: text}
}

// hint describes what is probably wrong with a request without items; it begins with a semicolon,
// or is empty.
func (in request) hint(sig otlpwire.Signal, lim otlpwire.Limits) string {
	if !in.json {
		return in.readAsAnother(sig, lim)
	}
	if in.unknown == "" {
		return ""
	}
	if other, is := otlpwire.SignalOf(in.unknown); is && other != sig {
		return fmt.Sprintf("; %q belongs to /v1/%s", in.unknown, other)
	}
	if name := otlpwire.Spelling(sig, in.unknown); name != "" && name != in.unknown {
		return fmt.Sprintf("; names in OTLP/JSON are lowerCamelCase: %q, not %q", name, in.unknown)
	}
	return fmt.Sprintf("; OTLP/JSON has no name %q there", in.unknown)
}

// readAsAnother says for which other signal the request would be valid. Items without fields
// could belong to any.
func (in request) readAsAnother(sig otlpwire.Signal, lim otlpwire.Limits) string {
	for _, other := range otlpwire.Signals {
		if other == sig {
			continue
		}
		rep, err := otlpwire.Scan(other, in.payload, lim)
		if err != nil || !rep.Sound() || rep.Items == 0 || otlpwire.HasUnknown(other, in.payload) {
			continue
		}
		for item := range otlpwire.Items(in.payload) {
			if len(item) > 0 {
				return fmt.Sprintf("; read as %s it holds %d %s: those go to /v1/%s", other, rep.Items, nouns[other], other)
			}
		}
	}
	return ""
}
