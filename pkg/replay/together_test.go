package replay

import (
	"reflect"
	"slices"
	"testing"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/sampling/domain"
)

// TestTogether: what shares a domain, or did, is read in one lane; what shares none with what is wanted is not read.
func TestTogether(t *testing.T) {
	acme := domain.New(domain.Config{{Name: "acme", Instances: []string{"a*"}}})
	bank := domain.New(domain.Config{{Name: "bank", Instances: []string{"a2", "b*"}}})
	for _, tc := range []struct {
		name     string
		grouping domain.Versions
		wanted   []string
		want     [][]string
	}{
		{"no domains", nil, []string{"a1", "a2", "b1"}, [][]string{{"a1"}, {"a2", "b1"}}},
		{"one domain", domain.Versions{{Number: 1, From: 5, Set: acme}}, []string{"a1", "b1"}, [][]string{{"a1", "a2", "b1"}}},
		{"the other instances are read", domain.Versions{{Number: 1, From: 5, Set: acme}}, []string{"a2"}, [][]string{{"a1", "a2"}}},
		{"others are not", domain.Versions{{Number: 1, From: 5, Set: acme}}, []string{"b1", "c1"}, [][]string{{"b1"}, {"c1"}}},
		{"domains that have met", domain.Versions{{Number: 1, From: 5, Set: acme}, {Number: 2, From: 7, Set: bank}}, []string{"b2"}, [][]string{{"a1", "a2", "b1", "b2"}}},
		{"a later version", domain.Versions{{Number: 1, From: 11, Set: acme}}, []string{"a1"}, [][]string{{"a1"}}},
	} {
		all := []holding{{instance: "c1", part: 3}, {instance: "b2", part: 2}, {instance: "b1", part: 1}, {instance: "a2", part: 1}, {instance: "a1", part: 0}}
		for i := range all {
			all[i].wanted = slices.Contains(tc.wanted, all[i].instance)
		}
		var got [][]string
		for _, held := range together(all, tc.grouping, 10) {
			var names []string
			for _, h := range held {
				names = append(names, h.instance)
			}
			slices.Sort(names)
			got = append(got, names)
			if l := laneOf(held); slices.ContainsFunc(l.Domains, func(d string) bool { return !domain.Shared(d) }) || len(l.Domains) == 0 && len(tc.grouping) == 1 && tc.grouping[0].From < 10 && names[0] < "b" {
				t.Errorf("%s: the lane of %v is of the domains %v", tc.name, names, l.Domains)
			}
		}
		if !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

// TestLanesOfDomains: what such a lane reads, and what it says of others.
func TestLanesOfDomains(t *testing.T) {
	grouping := domain.Versions{{Number: 1, From: 1, Set: domain.New(domain.Config{{Name: "acme", Instances: []string{"a*"}}})}}
	l := Lane{Signal: otlpwire.Traces.String(), Partition: 1, Partitions: []int{1, 4}, Last: 9, Domains: []string{"@acme"}, Messages: 7}
	if got := l.Filters(); !slices.Equal(got, []string{bus.PartitionFilter(otlpwire.Traces, 1), bus.PartitionFilter(otlpwire.Traces, 4)}) {
		t.Errorf("it reads %v", got)
	}
	if !l.Shares(grouping, "a2") || l.Shares(grouping, "b1") || (Lane{Last: 9}).Shares(grouping, "a2") {
		t.Error("an instance of another domain counts, or one of this does not")
	}
	l.Instances = []string{"a1", "a2"}
	if got := l.Filters(); !slices.Equal(got, []string{"otlp.traces.*.a1", "otlp.traces.*.a2"}) {
		t.Errorf("it reads %v", got)
	}
	p := Plan{Lanes: []Lane{l, {Signal: "logs", Messages: 3}}}
	p.only("a1")
	if want := []Lane{{Signal: "traces", Partition: 1, Last: 9, Instances: []string{"a1"}}, {Signal: "logs", Messages: 3}}; !reflect.DeepEqual(p.Lanes, want) {
		t.Errorf("a1 learns %+v", p.Lanes)
	}
	for _, tc := range []struct {
		r    Request
		want bool
	}{{Request{Instances: []string{"a1"}}, false}, {Request{Instances: []string{"a1"}, Policies: "x"}, true}, {Request{Instances: []string{"a*"}, Policies: "x"}, false}} {
		if tc.r.Alone() != tc.want {
			t.Errorf("%+v: %v", tc.r, !tc.want)
		}
	}
}
