package membership

import (
	"context"
	"encoding/json"
	"html/template"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Partitions is what the admin server serves on /partitions: a page or, if the client
// accepts application/json or asks with ?format=json, JSON.
type Partitions struct {
	Self    string       `json:"self"`
	Members []Member     `json:"members"`
	Lanes   []LaneStatus `json:"lanes"`
}

// LaneStatus is one lane as the members and the hub see it.
type LaneStatus struct {
	Signal    string   `json:"signal"`
	Partition int      `json:"partition"`
	Backend   string   `json:"backend"`
	Placed    string   `json:"placed"`         // the member that should own it
	Owners    []string `json:"owners"`         // the members that report to own it; two for a moment at a hand-over
	Floor     uint64   `json:"floor"`          // the stream's sequence up to which everything is finished
	Lag       uint64   `json:"lag"`            // messages not finished
	Note      string   `json:"note,omitempty"` // of a lane that this member reads
	Error     string   `json:"error,omitempty"`
}

// pageTimeout is how long the hub may take to answer for the whole page.
const pageTimeout = 5 * time.Second

// Page serves [Partitions].
func (m *Members) Page() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		status := m.status(r.Context())
		w.Header().Set("Vary", "Accept")
		if r.URL.Query().Get("format") == "json" || strings.Contains(r.Header.Get("Accept"), "application/json") {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(status)
			return
		}
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_ = partitionsPage.Execute(w, status)
	})
}

func (m *Members) status(ctx context.Context) Partitions {
	ctx, cancel := context.WithTimeout(ctx, pageTimeout)
	defer cancel()
	s := Partitions{Self: m.self, Members: m.All(), Lanes: []LaneStatus{}}
	owns := map[string][]string{}
	for _, member := range s.Members {
		for _, id := range member.Owns {
			owns[id] = append(owns[id], member.Name)
		}
	}
	placed := m.owners()
	for _, r := range m.shared() {
		l := LaneStatus{Signal: r.Signal, Partition: r.Partition, Backend: r.Backend, Owners: owns[r.id()]}
		if on := placed[r.Stream]; r.Partition < len(on) { // it may have been added just now
			l.Placed = on[r.Partition]
		}
		if at, err := m.hub.Conn.LaneFloor(ctx, r.LaneConfig); err != nil {
			l.Error = err.Error()
		} else {
			l.Floor, l.Lag = at.Done, at.Lag
		}
		if r.Tell != nil && slices.Contains(l.Owners, m.self) {
			l.Note = r.Tell()
		}
		s.Lanes = append(s.Lanes, l)
	}
	return s
}

var partitionsPage = template.Must(template.New("partitions").Funcs(template.FuncMap{
	"ago": func(t time.Time) string { return time.Since(t).Truncate(time.Second).String() },
}).Parse(`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="5"><title>penstock: partitions</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222 }
table { border-collapse: collapse; margin-bottom: 2em }
td, th { text-align: left; padding: .2em 1em .2em 0; border-bottom: 1px solid #ddd }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
.bad { color: #b00 }
</style></head><body>
<h1>Partitions</h1>
<p>As {{.Self}} sees them. <a href="?format=json">JSON</a></p>
<h2>Members</h2>
<table><tr><th>name</th><th>version</th><th class="n">up</th><th class="n">lanes</th></tr>
{{range .Members}}<tr><td>{{.Name}}</td><td>{{.Version}}</td><td class="n">{{ago .Since}}</td><td class="n">{{len .Owns}}</td></tr>
{{else}}<tr><td colspan="4" class="bad">none is known yet</td></tr>
{{end}}</table>
<h2>Lanes</h2>
<table><tr><th>signal</th><th class="n">partition</th><th>backend</th><th>owner</th><th class="n">floor</th><th class="n">lag</th><th></th><th></th></tr>
{{range .Lanes}}<tr><td>{{.Signal}}</td><td class="n">{{.Partition}}</td><td>{{.Backend}}</td>
<td>{{range .Owners}}{{.}} {{else}}<span class="bad">nobody yet</span>{{end}}</td><td class="n">{{.Floor}}</td><td class="n">{{.Lag}}</td>
<td>{{.Note}}</td><td class="bad">{{if .Error}}{{.Error}}{{else if ne (len .Owners) 1}}should be {{.Placed}}{{end}}</td></tr>
{{end}}</table>
</body></html>
`))
