package prometheus

import (
	"fmt"
	"slices"

	"github.com/penstock/penstock/pkg/otlpattr"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// setResource prepares the labels of every series of a resource.
func (t *translation) setResource(resource []byte) {
	t.about, t.resource, t.job, t.host, t.streams[0] = resource, t.resource[:0], 0, 0, 0
	t.attributes = t.attributes[:0]
	var namespace, service []byte // nil: absent, which is not the same as empty
	otlpwire.EachResourceAttribute(resource, func(key, value []byte) {
		switch string(key) {
		case "service.namespace":
			namespace = append([]byte{}, t.text(value)...)
		case "service.name":
			service = append([]byte{}, t.text(value)...)
		case "service.instance.id":
			t.host = t.symbols.add(t.text(value))
		}
		t.attributes = append(t.attributes, attribute{key, value})
		t.streams[0] += streamOf(key, value)
	})
	if service != nil {
		if namespace != nil {
			service = append(append(namespace, '/'), service...)
		}
		t.job = t.symbols.add(service)
	}
	t.resource = t.promoted(t.resource)
	if slices.Contains(t.cfg.Labels, instanceID) { // from the subject, whatever the resource says
		name, _ := t.names.labelName([]byte(instanceID)) // always a valid name
		t.resource = set(t.resource, label{name: t.symbols.addString(name), value: t.symbols.addString(t.instance)})
	}
	if t.job != 0 {
		t.resource = t.claim(t.resource, label{name: t.symbols.addString(jobLabel), value: t.job})
	}
	if t.host != 0 {
		t.resource = t.claim(t.resource, label{name: t.symbols.addString(instanceLabel), value: t.host})
	}
	t.resource = t.external(t.resource)
	t.resource = t.order(t.resource)
}

// promoted adds the labels of those current attributes that become labels of every series. Those whose
// names become equal are joined, like those of points.
func (t *translation) promoted(ls []label) []label {
	chosen := t.chosen[:0]
	var theirs map[string]bool // other spellings, and whether the resource has them
	for _, a := range t.attributes {
		if _, err := t.names.labelName(a.key); err == nil && slices.Contains(t.cfg.Labels, string(a.key)) { // a valid label name
			chosen = append(chosen, a)
		} else if other := otlpattr.OtherSpelling(a.key); other != "" && slices.Contains(t.cfg.Labels, other) {
			own, asked := theirs[other]
			if !asked {
				own = has(t.attributes, other)
				theirs = map[string]bool{other: own}
			}
			if !own {
				chosen = append(chosen, attribute{[]byte(other), a.value})
			}
		}
	}
	t.chosen = chosen
	ls, _ = t.addAttributes(ls, chosen, "") // without those that would be too long
	return ls
}

func has(as []attribute, key string) bool {
	return slices.ContainsFunc(as, func(a attribute) bool { return string(a.key) == key })
}

const instanceID = "instance.id"

// maxTarget is how many attributes a resource with a target_info may have, and a scope whose
// attributes are labels.
const maxTarget = 256

// external adds the external labels that ls does not have.
func (t *translation) external(ls []label) []label {
	for name, value := range t.cfg.External {
		n := t.symbols.addString(name)
		if !slices.ContainsFunc(ls, func(l label) bool { return l.name == n && l.value != 0 }) {
			ls = set(ls, label{name: n, value: t.symbols.addString(value), weak: true})
		}
	}
	return ls
}

// setScope adds the labels of a scope, if scope_labels is set.
func (t *translation) setScope(scope, around []byte) error {
	if !t.cfg.ScopeLabels {
		return nil
	}
	var name, version, schema []byte
	var as []attribute
	for i := 0; i < len(scope); {
		var f otlpwire.Field
		switch f, i = otlpwire.NextField(scope, i); f.Tag {
		case 1<<3 | otlpwire.Bytes:
			name = f.Bytes
		case 2<<3 | otlpwire.Bytes:
			version = f.Bytes
		case 3<<3 | otlpwire.Bytes:
			key, value := otlpwire.Attribute(f.Bytes)
			as = append(as, attribute{key, value})
		}
	}
	if len(name) == 0 {
		return nil
	}
	for i := 0; i < len(around); {
		var f otlpwire.Field
		if f, i = otlpwire.NextField(around, i); f.Tag == 3<<3|otlpwire.Bytes {
			schema = f.Bytes
		}
	}
	if len(as) > maxTarget {
		return fmt.Errorf("scope with more than %d attributes", maxTarget)
	}
	own, err := t.addAttributes(nil, as, "otel_scope_")
	if err != nil {
		return fmt.Errorf("scope attributes: %w", err)
	}
	own = set(own, label{name: t.symbols.addString("otel_scope_name"), value: t.symbols.add(name)})
	own = set(own, label{name: t.symbols.addString("otel_scope_version"), value: t.symbols.add(version)})
	own = set(own, label{name: t.symbols.addString("otel_scope_schema_url"), value: t.symbols.add(schema)})
	t.resource = slices.Clone(t.resource) // the next scope begins with the resource's labels
	for _, l := range own {
		t.resource = set(t.resource, l)
	}
	t.resource = t.order(t.resource)
	return nil
}

// targetInterval is the shortest interval at which target_info is written: half of the five minutes
// that PromQL looks back.
const targetInterval = 150_000 // milliseconds

// maxTargetSamples is how many samples of target_info one request may have for a resource.
const maxTargetSamples = 24

// targetInfo adds the samples of target_info for the current resource, from its first point to its
// last, unless it was written recently.
func (t *translation) targetInfo() {
	if !t.setTarget() {
		return
	}
	name := t.symbols.addString("target_info")
	t.labels = append(t.labels[:0], t.target...)
	t.place()
	id := t.identity(name)
	next, end := int64(t.first)/1e6, int64(min(t.last, t.now))/1e6
	next = max(next, end-maxTargetSamples*targetInterval) // a point may be of 1970
	if until, doubted := t.memory.doubts.get(id); t.alone || doubted && (len(t.memory.written) > 0 || int64(t.now)/1e6 < until) {
		return
	} else if before, ok := t.memory.target(id); ok {
		if next = max(next, before+targetInterval); next > end {
			return
		}
	}
	_, t.alone = t.memory.doubts.get(id)
	t.stream = summed // several resources may have the same one
	t.family = uint32(len(t.families))
	t.families = append(t.families, metadata{name: name, help: t.symbols.addString("Target metadata"), kind: typeGauge})
	n := t.at(name, label{}, false)
	for ; next < end; next += targetInterval {
		t.put(n, point{at: uint64(next) * 1e6}, 1, none)
	}
	t.put(n, point{at: uint64(end) * 1e6}, 1, none)
	t.memory.wroteTarget(id, end)
}

// setTarget makes t.target the labels of target_info of the current resource. It returns false where
// there is nothing to tell, or nobody to tell it of.
func (t *translation) setTarget() bool {
	t.attributes, t.target = t.attributes[:0], t.target[:0]
	otlpwire.EachResourceAttribute(t.about, func(key, value []byte) {
		if slices.Contains(identifying, string(key)) {
			return
		}
		if _, err := t.names.labelName(key); err == nil {
			t.attributes = append(t.attributes, attribute{key, value})
		}
	})
	if len(t.attributes) == 0 || len(t.attributes) > maxTarget || t.job == 0 && t.host == 0 {
		return false
	}
	var err error
	if t.target, err = t.addAttributes(t.target, t.attributes, ""); err != nil {
		return false
	}
	if t.job != 0 {
		t.target = t.claim(t.target, label{name: t.symbols.addString(jobLabel), value: t.job})
	}
	if t.host != 0 {
		t.target = t.claim(t.target, label{name: t.symbols.addString(instanceLabel), value: t.host})
	}
	t.target = t.order(t.external(t.target))
	return true
}
