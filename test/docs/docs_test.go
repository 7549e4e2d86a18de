// Package docs runs every command line of the documentation and of -help: those of
// daemons with -config.check, those that ask a hub against the hub of a penstock up.
package docs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/penstock/penstock/test/daemon"
)

const root = "../.."

// line is a command line of the documentation.
type line struct{ where, text string }

var (
	ours = regexp.MustCompile(`^(    |  )(([A-Z][A-Z0-9_]*=\S+\s+)*(bin/)?(edge|router|sink|penstock (up|generate|replay|whatif|deadletter|policies|token|nats-config|version))\b|[A-Z][A-Z0-9_]*=\S+ .*\\$|curl |grep )`)
	// usage is a line that shows a form, and not a command.
	usage = regexp.MustCompile(`\[|FILE|\bT\b|SEQ|VERSION|ID \||  [a-z]+ .*  [a-z]`)
)

// lines finds the command lines of a text: indented, with what follows behind a backslash.
func lines(name, text string) (all []line) {
	rows := strings.Split(text, "\n")
	for i := 0; i < len(rows); i++ {
		indent := "    "
		if strings.HasSuffix(name, "-help") {
			indent = "  "
		}
		if !ours.MatchString(rows[i]) || !strings.HasPrefix(rows[i], indent) {
			continue
		}
		l := line{where: fmt.Sprintf("%s:%d", name, i+1), text: rows[i]}
		for strings.HasSuffix(l.text, `\`) && i+1 < len(rows) {
			i++
			l.text = strings.TrimSuffix(l.text, `\`) + strings.TrimSpace(rows[i])
		}
		l.text, _, _ = strings.Cut(strings.TrimSpace(l.text), " # ")
		if strings.Contains(name, "-help") && usage.MatchString(l.text) {
			continue
		}
		all = append(all, l)
	}
	return all
}

func TestEveryCommandOfTheDocumentation(t *testing.T) {
	w := newWorld(t)
	var all []line
	files := []string{root + "/README.md", root + "/CONTRIBUTING.md"}
	if err := filepath.WalkDir(root+"/docs", func(path string, _ os.DirEntry, err error) error {
		if strings.HasSuffix(path, ".md") {
			files = append(files, path)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, lines(strings.TrimPrefix(file, root+"/"), string(text))...)
	}
	for _, c := range []string{"edge", "router", "sink", "penstock", "penstock up", "penstock generate", "penstock replay", "penstock whatif", "penstock deadletter", "penstock policies", "penstock token", "penstock nats-config"} {
		out, err := w.command("bin/" + c + " -help").CombinedOutput()
		if err != nil {
			t.Errorf("%s -help: %v", c, err)
		}
		all = append(all, lines(c+" -help", string(out))...)
	}
	if len(all) < 25 {
		t.Fatalf("only %d command lines found: %v", len(all), all)
	}
	for _, l := range all {
		t.Run(strings.ReplaceAll(l.where, "/", "_"), func(t *testing.T) {
			cmd := w.command(w.adapt(t, l.text))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %s\nrun as: %s\n%v\n%s", l.where, l.text, cmd.Args[2], err, out)
			}
		})
	}
}

var (
	credential = regexp.MustCompile(`-creds \S+`)
	hubs       = regexp.MustCompile(`(tls|nats)://hub[a-z.]*:4222`)
	daemons    = regexp.MustCompile(`\b(bin/)?(edge|router|sink|penstock up)( |$)`)
	bare       = regexp.MustCompile(`(^|\s)(edge|router|sink|penstock)( |$)`)
	config     = regexp.MustCompile(`-config.file \S+`)
	job        = regexp.MustCompile(`\bID\b`)
	letter     = regexp.MustCompile(`deadletter show \d+`)
	asks       = regexp.MustCompile(`deadletter purge (.*)`)
)

// adapt makes a line fit for the world of the test: its hub, its ports and files, a job
// that there is; daemons check their configuration.
func (w *world) adapt(t *testing.T, text string) string {
	switch {
	case daemons.MatchString(text) && !strings.Contains(text, "penstock generate"):
		if !strings.Contains(text, "-config.check") {
			text += " -config.check"
		}
	case strings.Contains(text, "generate"):
		return strings.ReplaceAll(text, "4318", w.otlp[strings.LastIndex(w.otlp, ":")+1:]) + " -for 1s -endpoint http://" + w.otlp
	case strings.HasPrefix(text, "curl "):
		return "curl --fail-with-body -s " + strings.ReplaceAll(strings.TrimPrefix(text, "curl "), "127.0.0.1:4318", w.otlp)
	case strings.HasPrefix(text, "grep "): // of what the line before has sent
		return "for i in $(seq 600); do " + text + " && exit 0; sleep 0.1; done; exit 1"
	default:
		text = hubs.ReplaceAllString(credential.ReplaceAllString(text, ""), "nats://"+w.hub)
	}
	text = asks.ReplaceAllString(text, "echo yes | penstock deadletter purge $1")
	text = strings.Replace(text, "bin/penstock echo yes | ", "echo yes | bin/", 1)
	text = strings.Replace(text, "penstock echo yes |", "echo yes |", 1)
	text = letter.ReplaceAllString(text, "deadletter list") // there is none
	text = config.ReplaceAllString(text, "-config.file sink.yaml")
	text = strings.ReplaceAll(text, "'shop-*'", "'lo*'")
	if strings.Contains(text, "penstock replay") {
		if job.MatchString(text) {
			text = job.ReplaceAllString(text, w.fileJob(t))
		} else if strings.Contains(text, "--from") {
			text += " --detach"
		}
	}
	if !strings.Contains(text, "bin/") {
		text = bare.ReplaceAllString(text, "${1}bin/$2$3")
	}
	return text
}

// world is a directory with the files that the documentation names, and a running
// penstock up.
type world struct {
	dir, admin, hub, otlp string
}

func (w *world) command(text string) *exec.Cmd {
	cmd := exec.Command("bash", "-c", text)
	cmd.Dir = w.dir
	cmd.Env = append(os.Environ(), "HUB_URL=nats://"+w.hub)
	return cmd
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{dir: t.TempDir(), admin: daemon.FreeAddr(), hub: daemon.FreeAddr(), otlp: daemon.FreeAddr()}
	if err := daemon.Build(t.Context(), filepath.Join(w.dir, "bin"), "", "edge", "router", "sink", "penstock"); err != nil {
		t.Fatal(err)
	}
	sampling, err := os.ReadFile(root + "/examples/sampling.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"sampling.yaml": string(sampling), "new.yaml": string(sampling), "second-chance.yaml": string(sampling), "examples/sampling.yaml": string(sampling),
		"sink.yaml": "loki: {url: 'http://127.0.0.1:1'}\n", "edge.yaml": "instance: {id: as-1}\n",
		"up.yaml": fmt.Sprintf("admin: {listen: %q}\nnats: {listen: %q}\nreceive: {grpc: {listen: %q}, http: {listen: %q}}\nstreams: {partitions: 2}\nreport_interval: 0s\n",
			w.admin, w.hub, daemon.FreeAddr(), w.otlp),
	} {
		file := filepath.Join(w.dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.CopyFS(filepath.Join(w.dir, "deploy", "nats"), os.DirFS(root+"/deploy/nats")); err != nil {
		t.Fatal(err)
	}
	creds, err := daemon.Credential()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"as-17.creds", "router.creds", "sink.creds", "admin.creds"} {
		if err := os.WriteFile(filepath.Join(w.dir, name), creds, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	must(t, w.command("(echo tokens:; bin/penstock token -instance-id as-0) >tokens.yaml"))
	up := &daemon.Process{Args: []string{filepath.Join(w.dir, "bin/penstock"), "up", "-config.file", filepath.Join(w.dir, "up.yaml"), "-data-dir", filepath.Join(w.dir, "penstock-data")}, Log: filepath.Join(w.dir, "up.log")}
	if err := up.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { up.End(syscall.SIGKILL) })
	if err := daemon.Until(t.Context(), time.Minute, func() error { _, err := daemon.Page(w.admin, "/ready"); return err }); err != nil {
		log, _ := os.ReadFile(up.Log)
		t.Fatalf("%v\n%s", err, log)
	}
	must(t, w.command("bin/penstock generate -for 2s -endpoint http://"+w.otlp))
	return w
}

var filed = regexp.MustCompile(`job (\S+?):? `)

// fileJob files a replay, unless it is there, and returns its id.
func (w *world) fileJob(t *testing.T) string {
	t.Helper()
	out := must(t, w.command("bin/penstock replay --from 1 --signal logs --detach"))
	id := filed.FindSubmatch(out)
	if id == nil {
		t.Fatalf("no job was filed: %s", out)
	}
	return string(id[1])
}

// must returns what a command prints.
func must(t *testing.T, cmd *exec.Cmd) []byte {
	t.Helper()
	out, err := cmd.Output()
	if err != nil {
		if failed, is := errors.AsType[*exec.ExitError](err); is {
			out = append(out, failed.Stderr...)
		}
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return out
}
