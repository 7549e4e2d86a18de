package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/partition"
	"github.com/penstock/penstock/test/backend"
)

// deployed starts the server of deploy/nats with its streams.
func deployed(t *testing.T) (url string) {
	t.Helper()
	deployEnv(t)
	s := startFromFile(t, "nats-server.conf", func(o *server.Options) { o.Port, o.StoreDir = server.RANDOM_PORT, t.TempDir() })
	topology := bus.DefaultTopology()
	topology.Partitions = 2
	openAs(t, s.ClientURL(), "router", topology)
	openAs(t, s.ClientURL(), "sink", topology)
	return s.ClientURL()
}

// TestCommandsOfAnOperator runs the commands of a hub with the operator's rights of
// deploy/nats, by flags and by a context.
func TestCommandsOfAnOperator(t *testing.T) {
	url := deployed(t)
	config := t.TempDir()
	dir := filepath.Join(config, "penstock")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	contexts := fmt.Sprintf("current: prod\ncontexts:\n  prod: {url: %q, user: operator, password: %q}\n  wrong: {url: %q, user: operator, password: wrong}\n  unset: {url: %q, password: \"${NOBODY_SETS_THIS}\"}\n", url, password, url, url)
	if err := os.WriteFile(filepath.Join(dir, "contexts.yaml"), []byte(contexts), 0o600); err != nil {
		t.Fatal(err)
	}
	sampling, err := filepath.Abs("../../examples/sampling.yaml")
	if err != nil {
		t.Fatal(err)
	}
	// Two lanes, one of which is read.
	topology := bus.DefaultTopology()
	topology.Partitions = 2
	conn := openAs(t, url, "sink", topology)
	reading, leave := context.WithCancel(t.Context())
	defer leave()
	for _, name := range []string{"loki-1", "read-1"} {
		l, err := conn.OpenLane(t.Context(), bus.LaneConfig{Stream: "LOGS", Filter: bus.PartitionFilter(otlpwire.Logs, 1), Name: name})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if name == "read-1" {
			read := make(chan struct{})
			go func() { defer close(read); l.Run(reading, func(bus.Delivery) bool { return true }) }()
			defer func() { leave(); <-read }()
		}
	}
	edges := openAs(t, url, "router", topology)
	for i := range 8 { // to an instance of the second partition
		if name := "as-" + strconv.Itoa(i); partition.OfInstance(name, 2) == 1 {
			if _, err := edges.Publish(t.Context(), bus.Message{Subject: bus.Subject(otlpwire.Logs, name), Body: []byte("x"), Header: envelope.Header{Items: 1, Arrival: 1}}); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	eventually(t, 30*time.Second, "the lane is read", func() error {
		floors, _, err := conn.Floors(t.Context(), "LOGS")
		if err == nil && (!floors["read-1"].Read || floors["loki-1"].Read || floors["loki-1"].Lag != 1) {
			err = fmt.Errorf("%+v", floors)
		}
		return err
	})
	byFlags := []string{"HUB_PASSWORD=" + password, "HUB_URL=" + url, "XDG_CONFIG_HOME=" + t.TempDir()}
	byContext := []string{"XDG_CONFIG_HOME=" + config, "HUB_URL=", "HUB_CREDS="}
	for _, tc := range []struct {
		env  []string
		args string
		code int
		says string
	}{
		{byFlags, "policies push " + sampling + " -user operator", 0, "version 1 is in force"},
		{byFlags, "policies list -user operator", 0, "VERSION"},
		{byFlags, "policies show 1 -user operator", 0, "policies:"},
		{byFlags, "replay list -user operator", 0, "JOB"},
		{byFlags, "deadletter list -user operator", 0, "no dead letters"},
		{byFlags, "lanes list -user operator", 0, "LOGS/loki-1"},
		{byFlags, "lanes list -o json -user operator", 0, `"name": "loki-1",`},
		{byFlags, "lanes list -o yaml -user operator", 2, "want text or json"},
		{byFlags, "audit -user operator", 0, "no losses recorded"},
		{byFlags, "audit -user operator -o json", 0, `"backend": "loki",`},
		{byFlags, "audit -o yaml -user operator", 2, "want text or json"},
		{byFlags, "audit all -user operator", 2, "unexpected argument"},
		{byFlags, "lanes abandon LOGS/loki-9 -yes -user operator", 1, "there is no lane"},
		{byFlags, "lanes abandon LOGS/read-1 -yes -user operator", 1, "is being read"},
		{byFlags, "lanes abandon LOGS/loki-1 -user operator", 1, "nothing was abandoned"},
		{byFlags, "lanes abandon LOGS/loki-1 -yes -user operator", 0, "with 1 messages"},
		{byFlags, "lanes abandon LOGS/loki-1 -yes -user operator", 1, "there is no lane"},
		{byFlags, "lanes abandon -user operator", 2, "STREAM/LANE"},
		{byContext, "policies list", 0, "VERSION"},
		{byContext, "policies list -context prod", 0, "VERSION"},
		{byContext, "policies list -context wrong", 1, "the hub refuses the credential"},
		{byContext, "policies list -context unset", 1, "environment variable NOBODY_SETS_THIS is not set"},
		{byContext, "policies list -context prod -hub nats://127.0.0.1:1", 1, "set one"},
		{byContext, "policies list -context other", 1, `has no context "other"; it has prod, unset, wrong`},
		{byFlags, "policies list -user operator -hub nats://127.0.0.1:1", 1, "nothing listens there"},
		{byFlags, "policies list -user operator -creds /nowhere.creds", 1, "hub.creds"},
		{byFlags, "policies list -user operator -tls-ca /nowhere.pem", 1, "hub.tls.ca_file"},
		{byFlags, "policies push", 2, "FILE is missing"},
		{byFlags, "policies", 2, "want one of list, push, show"},
		{byFlags, "replay", 2, "--from is not set"},
		{byFlags, "replay stop", 2, "ID of a job"},
		{byFlags, "replay --from -1x", 1, "-1x"},
		{byFlags, "whatif --from -1d", 2, "--policies is not set"},
		{byFlags, "deadletter show", 2, "SEQ"},
		{byFlags, "policies list -nonsense", 2, "flag provided but not defined: -nonsense"},
		{byFlags, "version", 0, "penstock "},
	} {
		p := run(t, tc.env, "penstock", strings.Fields(tc.args)...)
		code := p.exit(t, 60*time.Second)
		out := p.out.String()
		if code != tc.code || !strings.Contains(out, tc.says) {
			t.Errorf("penstock %s: exit code %d, want %d and %q:\n%s", tc.args, code, tc.code, tc.says, out)
		}
		if tc.code == 2 && strings.Count(out, "\n") > 1 {
			t.Errorf("penstock %s: more than a line:\n%s", tc.args, out)
		}
		if strings.Contains(out, password) {
			t.Errorf("penstock %s prints the password:\n%s", tc.args, out)
		}
	}
	if lines, err := openAs(t, url, "admin", topology).Recorded(t.Context(), "lanes.abandon"); err != nil || len(lines) != 1 || !strings.Contains(string(lines[0]), `"lane":"LOGS/loki-1"`) {
		t.Errorf("the audit says %q, %v", lines, err)
	}
}

// ask asks a page of a process, whatever its status.
func ask(url string) (code int, body string, err error) {
	res, err := http.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), err
}

// TestAnEdgeWithAnothersCredential takes data, is not ready, says why in one line, and
// shows no password. With a password that the hub does not know likewise.
func TestAnEdgeWithAnothersCredential(t *testing.T) {
	url := strings.TrimPrefix(deployed(t), "nats://")
	for name, tc := range map[string]struct{ user, says string }{
		"another's": {"edge-as-1:" + password, "is it another instance's?"},
		"wrong":     {"edge-as-1:wrong-" + password, "the hub refuses the credential"},
	} {
		t.Run(name, func(t *testing.T) {
			otlp, admin := backend.FreeAddr(t), backend.FreeAddr(t)
			p := run(t, nil, "edge", "-config.file", writeFile(t, "edge.yaml", fmt.Sprintf(
				"hub: {url: 'nats://%s@%s', inbox_prefix: _INBOX_as-1}\nadmin: {listen: %q}\ninstance: {id: as-9}\nreceive: {grpc: {listen: ''}, http: {listen: %q}}\nspool: {dir: %q}\ndrain_timeout: 1s\n",
				tc.user, url, admin, otlp, filepath.Join(t.TempDir(), "spool"))))
			eventually(t, 60*time.Second, "the edge takes data", func() error { return post(t.Context(), otlp, otlpwire.Logs, numbered(otlpwire.Logs, 1)) })
			eventually(t, 60*time.Second, "the edge is not ready", func() error {
				code, body, err := ask("http://" + admin + "/ready")
				if err == nil && (code != http.StatusServiceUnavailable || !strings.Contains(body, tc.says)) {
					err = fmt.Errorf("%d: %s", code, body)
				}
				return err
			})
			if n := strings.Count(p.out.String(), "the hub accepts nothing from this edge"); n != 1 {
				t.Errorf("said %d times", n)
			}
			code, body, err := ask("http://" + admin + "/config")
			if err != nil || code != http.StatusOK || !strings.Contains(body, "[redacted]@"+url) {
				t.Errorf("/config: %d, %v\n%s", code, err, body)
			}
			if all := body + p.out.String(); strings.Contains(all, password) {
				t.Errorf("the password is shown:\n%s", all)
			}
			// SIGHUP, as of a terminal that is closed, drains as SIGTERM does; under nohup it is
			// ignored, and by what this test starts, too.
			end := syscall.SIGHUP
			if signal.Ignored(end) {
				end = syscall.SIGTERM
			}
			if err := p.Process.Signal(end); err != nil {
				t.Fatal(err)
			}
			if code := p.exit(t, 60*time.Second); code != 0 {
				t.Errorf("%v: exit code %d", end, code)
			}
		})
	}
}

// TestAHubThatIsNotReachedSaysWhy in routers and sinks, too.
func TestAHubThatIsNotReachedSaysWhy(t *testing.T) {
	url := strings.TrimPrefix(deployed(t), "nats://")
	for _, role := range []string{"router", "sink"} {
		p := run(t, nil, role, "-config.file", writeFile(t, role+".yaml", fmt.Sprintf("hub: {url: 'nats://%s', user: %s, password: wrong}\nadmin: {listen: ''}\n", url, role)))
		eventually(t, 60*time.Second, role+" says why", func() error {
			if !strings.Contains(p.out.String(), "the hub refuses the credential") {
				return errors.New(p.out.String())
			}
			return nil
		})
		// Some attempts later it has not been said again, in these words or in others.
		before := strings.Count(p.out.String(), "\n")
		time.Sleep(3 * time.Second) // nothing is to come; there is nothing to wait for
		if after := strings.Count(p.out.String(), "\n"); after > before+1 {
			t.Errorf("%s says it again:\n%s", role, p.out)
		}
	}
}

// TestConfigCheckLooksAtFiles: what a start would read is read.
func TestConfigCheckLooksAtFiles(t *testing.T) {
	t.Parallel()
	bad := writeFile(t, "bad", "nonsense\n")
	for text, want := range map[string][2]string{
		"hub: {creds: /nowhere.creds}\n":                                    {"sink", "hub.creds: open /nowhere.creds"},
		"hub: {creds: " + bad + "}\n":                                       {"sink", "is no NATS credential"},
		"gateway: {tokens_file: /nowhere.yaml}\n":                           {"router", "tokens: stat /nowhere.yaml"},
		"gateway: {tokens_file: " + bad + "}\n":                             {"router", "bad:1: got \"nonsense\", want a mapping"},
		"receive: {tls: {cert_file: " + bad + ", key_file: " + bad + "}}\n": {"edge", "receive.tls"},
		"processing:\n  redaction:\n    blocked_values: ['ok', '(']\n":      {"edge", "edge.yaml:3: processing.redaction.blocked_values[1]"},
		"log: {level: verbose}\n":                                           {"edge", `edge.yaml:1: log.level: "verbose" is not a level; want debug, info, warn, error`},
		"hub: {url: 'nats://someone:s3cret@'}\n":                            {"sink", "hub.url"},
		"spool: {max_bytes: lots}\n":                                        {"edge", `edge.yaml:1: spool.max_bytes: "lots" is not a size`},
	} {
		file := writeFile(t, want[0]+".yaml", text)
		p := run(t, []string{"INSTANCE_ID=as-1"}, want[0], "-config.file", file, "-config.check")
		code, out := p.exit(t, 60*time.Second), ""
		if out = p.out.String(); code != 2 || !strings.Contains(out, want[1]) || strings.Contains(out, "s3cret") {
			t.Errorf("%s: exit code %d, want 2 and %q:\n%s", text, code, want[1], out)
		}
	}
}
