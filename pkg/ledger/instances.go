package ledger

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/penstock/penstock/pkg/otlpwire"
)

// instances are the metrics of what each instance sends, of those that a process has seen first.
type instances struct {
	items, bytes   *prometheus.CounterVec
	seen, owed     *prometheus.GaugeVec
	held, disobeys *prometheus.GaugeVec
	aside          *prometheus.GaugeVec

	mu sync.Mutex
	of map[string]*[len(otlpwire.Signals)]instance
}

// instance has the metrics of one instance and one signal.
type instance struct {
	items, bytes prometheus.Counter
	seen         prometheus.Gauge
	last         int64 // Unix milliseconds
}

const (
	// maxNamed is of how many instances a process has metrics by name.
	maxNamed = 1000

	// others stands for the rest.
	others = "_other"
)

func newInstances(counter func(name, help string, labels ...string) *prometheus.CounterVec, f promauto.Factory) *instances {
	return &instances{
		of:       map[string]*[len(otlpwire.Signals)]instance{},
		items:    counter("penstock_instance_items_total", "Items by the instance that sends them, as routers (traces) and sinks (metrics, logs) have finished them. A process names the first 1000 instances that it sees; the label of the rest is _other.", "instance"),
		bytes:    counter("penstock_instance_bytes_total", "Bytes of what instances send, as the hub stores them; see penstock_instance_items_total.", "instance"),
		owed:     f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_instance_owed_bytes", Help: "About how many bytes of an instance some lane has not finished, for the 20 instances with the most messages in a stream that is more than a quarter full of what is owed. Reported by the keeper."}, []string{"signal", "instance"}),
		held:     f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_instance_held_seconds", Help: "For how long an instance has been told to hold back, because it has more than streams.instance_share of what is owed on a stream that is more than half full of it, or because what is set aside of it fills ASIDE. Reported by the keeper. Alert on more than ten minutes."}, []string{"signal", "instance"}),
		disobeys: f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_instance_disobeys", Help: "1 for an instance that has been told to hold back for more than a minute and has sent something within the last one, 0 for others that are told. Reported by the keeper. Alert on 1."}, []string{"signal", "instance"}),
		aside:    f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_instance_aside_bytes", Help: "About how many bytes of an instance are set aside for a backend, for the 20 with the most messages. Reported by the keeper."}, []string{"signal", "backend", "instance"}),
		seen:     f.NewGaugeVec(prometheus.GaugeOpts{Name: "penstock_instance_last_seen_seconds", Help: "When the hub stored the last message of an instance that was finished, in Unix time. Alert on an instance that was not seen for long."}, []string{"signal", "instance"}),
	}
}

// Saw counts a message of an instance that has been finished; stored is when the hub stored it.
func (l *Ledger) Saw(sig otlpwire.Signal, name string, items, bytes int, stored time.Time) {
	s := l.instances
	s.mu.Lock()
	defer s.mu.Unlock()
	all := s.of[name]
	if all == nil && len(s.of) >= maxNamed {
		name = others
		all = s.of[name]
	}
	if all == nil {
		all = new([len(otlpwire.Signals)]instance)
		s.of[name] = all
	}
	one := &all[sig]
	if one.items == nil {
		n := sig.String()
		*one = instance{items: s.items.WithLabelValues(n, name), bytes: s.bytes.WithLabelValues(n, name), seen: s.seen.WithLabelValues(n, name)}
	}
	one.items.Add(float64(items))
	one.bytes.Add(float64(bytes))
	if at := stored.UnixMilli(); at > one.last {
		one.last = at
		one.seen.Set(float64(at) / 1000)
	}
}

// Owed returns the gauge of what is owed of an instance, in bytes.
func (l *Ledger) Owed(signal, name string) prometheus.Gauge {
	return l.instances.owed.WithLabelValues(signal, name)
}

// ForgetOwed removes the gauges of [Ledger.Owed] of a signal.
func (l *Ledger) ForgetOwed(signal string) {
	l.instances.owed.DeletePartialMatch(prometheus.Labels{"signal": signal})
}

// Held returns the gauge of for how long an instance has been told to hold back.
func (l *Ledger) Held(signal, name string) prometheus.Gauge {
	return l.instances.held.WithLabelValues(signal, name)
}

// AsideBytes returns the gauge of how much of an instance is set aside for a backend.
func (l *Ledger) AsideBytes(signal, backend, name string) prometheus.Gauge {
	return l.instances.aside.WithLabelValues(signal, backend, name)
}

// ForgetAsideBytes removes the gauges of [Ledger.AsideBytes].
func (l *Ledger) ForgetAsideBytes() { l.instances.aside.Reset() }

// Disobeys returns the gauge of whether an instance that is told to hold back does not.
func (l *Ledger) Disobeys(signal, name string) prometheus.Gauge {
	return l.instances.disobeys.WithLabelValues(signal, name)
}

// ForgetHeld removes the gauges of [Ledger.Held] and [Ledger.Disobeys].
func (l *Ledger) ForgetHeld(signal, name string) {
	l.instances.held.DeleteLabelValues(signal, name)
	l.instances.disobeys.DeleteLabelValues(signal, name)
}
