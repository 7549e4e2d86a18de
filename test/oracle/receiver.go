package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"

	"github.com/golang/snappy"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/metadata"
	"github.com/prometheus/prometheus/prompb"
	writev2 "github.com/prometheus/prometheus/prompb/io/prometheus/write/v2"
)

// receiver takes remote_write in both versions and keeps it.
type receiver struct {
	*httptest.Server
	book book
	err  error
}

func newReceiver() *receiver {
	r := &receiver{book: book{}}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		samples, histograms, err := r.take(req)
		if err != nil {
			r.err = err
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("X-Prometheus-Remote-Write-Samples-Written", strconv.Itoa(samples))
		w.Header().Set("X-Prometheus-Remote-Write-Histograms-Written", strconv.Itoa(histograms))
		w.WriteHeader(http.StatusNoContent)
	}))
	return r
}

func (r *receiver) take(req *http.Request) (samples, histograms int, err error) {
	packed, err := io.ReadAll(req.Body)
	if err != nil {
		return 0, 0, err
	}
	body, err := snappy.Decode(nil, packed)
	if err != nil {
		return 0, 0, err
	}
	b := labels.NewScratchBuilder(0)
	if strings.Contains(req.Header.Get("Content-Type"), "v2.Request") {
		var m writev2.Request
		if err := m.Unmarshal(body); err != nil {
			return 0, 0, err
		}
		for _, ts := range m.Timeseries {
			ls, err := ts.ToLabels(&b, m.Symbols)
			if err != nil {
				return 0, 0, err
			}
			if err := sound(ls); err != nil {
				return 0, 0, err
			}
			md, err := ts.ToMetadata(m.Symbols)
			if err != nil {
				return 0, 0, err
			}
			var es []exemplar.Exemplar
			for _, e := range ts.Exemplars {
				x, err := e.ToExemplar(&b, m.Symbols)
				if err != nil {
					return 0, 0, err
				}
				es = append(es, x)
			}
			for _, s := range ts.Samples {
				samples++
				r.book.add(ls, md, s.StartTimestamp, s.Timestamp, s.Value, nil, es)
				es = nil
			}
			for _, h := range ts.Histograms {
				histograms++
				r.book.add(ls, md, h.StartTimestamp, h.Timestamp, 0, h.ToIntHistogram(), es)
				es = nil
			}
		}
		return samples, histograms, nil
	}
	var m prompb.WriteRequest
	if err := m.Unmarshal(body); err != nil {
		return 0, 0, err
	}
	for _, ts := range m.Timeseries {
		ls := ts.ToLabels(&b, nil)
		if err := sound(ls); err != nil {
			return 0, 0, err
		}
		var es []exemplar.Exemplar
		for _, e := range ts.Exemplars {
			es = append(es, e.ToExemplar(&b, nil))
		}
		for _, s := range ts.Samples {
			r.add(ls, s.Timestamp, s.Value, nil, es)
			es = nil
		}
		for _, h := range ts.Histograms {
			r.add(ls, h.Timestamp, 0, h.ToIntHistogram(), es)
			es = nil
		}
	}
	return 0, 0, nil
}

func (r *receiver) add(ls labels.Labels, at int64, v float64, h *histogram.Histogram, es []exemplar.Exemplar) {
	r.book.add(ls, metadata.Metadata{}, 0, at, v, h, es)
	s := r.book.of(ls, map[bool]string{true: "histogram ", false: "number "}[h != nil])
	s.metadata = ""
}

// sound reports labels that are not in order, twice there or empty.
func sound(ls labels.Labels) error {
	last := ""
	var err error
	ls.Range(func(l labels.Label) {
		if l.Name <= last || l.Value == "" {
			err = fmt.Errorf("labels of %s: %q behind %q, value %q", ls, l.Name, last, l.Value)
		}
		last = l.Name
	})
	return err
}
