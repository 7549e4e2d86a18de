package otlpwire

import "strings"

// HasUnknown reports whether a payload that Scan has accepted has, in an item or in a message around
// items, a field that this signal does not have.
func HasUnknown(sig Signal, payload []byte) bool { return unknownIn(requests[sig], payload) }

func unknownIn(m *message, b []byte) bool {
	for i := 0; i < len(b); {
		num, typ, value, end := nextField(b, i)
		if end < 0 {
			return false
		}
		i = end
		if num > maxField || m.byNum[num] == nil {
			return true
		}
		if below := m.byNum[num].msg; below != nil && below.leads && typ == bytesType && unknownIn(below, b[value:end]) {
			return true
		}
	}
	return false
}

// SignalOf returns the signal whose requests begin with a name, such as resourceLogs,
// also when it is written as resource_logs or ResourceLogs.
func SignalOf(name string) (Signal, bool) {
	for _, sig := range Signals {
		if fold(requests[sig].fields[0].name) == fold(name) {
			return sig, true
		}
	}
	return 0, false
}

// Spelling returns the OTLP/JSON name of a field of an item, or of a message around items, for
// another spelling of it: spanId for span_id, SpanID and the like. "" if there is none.
func Spelling(sig Signal, name string) string {
	return spelling(requests[sig], fold(name))
}

func spelling(m *message, folded string) string {
	for i := range m.fields {
		if f := &m.fields[i]; fold(f.name) == folded {
			return f.name
		}
	}
	for i := range m.fields {
		if below := m.fields[i].msg; below != nil && below.leads {
			if name := spelling(below, folded); name != "" {
				return name
			}
		}
	}
	return ""
}

func fold(name string) string { return strings.ToLower(strings.ReplaceAll(name, "_", "")) }
