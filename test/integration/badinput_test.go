package integration

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/penstock/penstock/pkg/otlpwire/badinput"
)

// TestBadInputEndToEnd sends every row of bad input, large ones four at a time,
// to one process with all roles. Its memory stays bounded, what was accepted
// reaches the files, and nothing else does.
func TestBadInputEndToEnd(t *testing.T) {
	const maxResident = 640 << 20 // bytes, of which the in-flight bound is 128 MiB and the heap's 256

	f := newUp(t)
	text, err := os.ReadFile(f.config)
	if err != nil {
		t.Fatal(err)
	}
	f.config = writeFile(t, "bounded.yaml", strings.Replace(string(text), "receive:\n", "receive:\n  max_request_bytes: 32MiB\n  max_in_flight_bytes: 128MiB\n", 1))
	t.Setenv("GOMEMLIMIT", "256MiB")
	p := f.start(t)

	accepted := map[string]int{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	slots := make(chan struct{}, 4)
	for _, row := range badinput.Rows() {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			ctype := "application/x-protobuf"
			if row.JSON {
				ctype = "application/json"
			}
			body := row.Body()
			for {
				res, err := http.Post("http://"+f.otlp+"/v1/"+row.Signal, ctype, bytes.NewReader(body))
				if err != nil {
					t.Errorf("%s %s: %v", row.ID, row.Name, err)
					return
				}
				_, _ = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
				if res.StatusCode == http.StatusServiceUnavailable {
					time.Sleep(100 * time.Millisecond) // as it was told: too many bytes in flight
					continue
				}
				if (res.StatusCode == http.StatusOK) == row.Refused {
					t.Errorf("%s %s: %s, want refused: %v", row.ID, row.Name, res.Status, row.Refused)
				}
				break
			}
			mu.Lock()
			defer mu.Unlock()
			accepted[row.Signal] += row.Items
		})
	}
	wg.Wait()

	if n := resident(t, p); n > maxResident { // 0 where the system does not tell
		t.Errorf("%d MiB resident at the most, want at most %d", n>>20, maxResident>>20)
	}
	eventually(t, 60*time.Second, "what was accepted is written", func() error {
		var metrics string
		if err := get("http://"+f.admin+"/metrics", &metrics); err != nil {
			return err
		}
		if n := sum(metrics, "penstock_decided_traces_total", `decision="kept",policy="keep-all"`); n == 0 {
			return errors.New("no trace is decided yet")
		}
		if n := sum(metrics, "penstock_sampler_held_bytes", "partition="); n != 0 {
			return fmt.Errorf("%d bytes are held", n)
		}
		for sig, want := range accepted {
			label := `signal="` + sig + `"`
			if n := sum(metrics, "penstock_accepted_items_total", label); n != want {
				return fmt.Errorf("%s: %d accepted, want %d", sig, n, want)
			}
			if n := sum(metrics, "penstock_dead_lettered_items_total", label); n != 0 {
				return fmt.Errorf("%s: %d dead-lettered", sig, n)
			}
			// Many rows are of the same span.
			if n := sum(metrics, "penstock_delivered_items_total", label) + sum(metrics, "penstock_duplicate_items_total", label); n != want {
				return fmt.Errorf("%s: %d delivered or recognised as duplicates, want %d", sig, n, want)
			}
		}
		return nil
	})
}

// resident returns the most memory that a process has had, in bytes.
func resident(t *testing.T, p *process) (n int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
	if err != nil {
		t.Logf("the process's memory is not looked at: %v", err)
		return 0
	}
	_, rest, _ := strings.Cut(string(b), "VmHWM:")
	_, _ = fmt.Sscan(rest, &n)
	if n == 0 {
		t.Fatalf("no VmHWM in %s", b)
	}
	return n << 10
}

// sum adds up the series of a metric that have a label.
func sum(metrics, name, label string) (total int) {
	for sc := bufio.NewScanner(strings.NewReader(metrics)); sc.Scan(); {
		series, val, _ := strings.Cut(sc.Text(), "} ")
		if strings.HasPrefix(series, name+"{") && strings.Contains(series, label) {
			var n float64
			_, _ = fmt.Sscan(val, &n)
			total += int(n)
		}
	}
	return total
}
