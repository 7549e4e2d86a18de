package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
)

// asCommand in the environment makes this test's binary the command itself.
const asCommand = "PENSTOCK_TEST_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		main()
		os.Exit(0) // as a main that returns
	}
	os.Exit(m.Run())
}

// penstock runs the command in a directory of its own, without a configuration, a hub or anything else
// in its environment but env.
func penstock(t *testing.T, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Dir, cmd.Env = dir, append([]string{asCommand + "=1", "HOME=" + dir, "XDG_CONFIG_HOME=" + dir}, env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// TestWrongArguments: a command line that says too little, too much or the wrong thing is answered with
// one message that names what, and the exit code 2; what is wrong with a file or the hub with 1. Nothing
// is printed where results go.
func TestWrongArguments(t *testing.T) {
	const nowhere = "-hub=nats://127.0.0.1:1"
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := file("good.yaml", "policies: [{name: all, type: always_sample}]\n")
	bad := file("bad.yaml", "policies: [{name: all, type: rare}]\n")
	for _, tc := range []struct {
		args string // divided by spaces
		code int
		want string // a part of the message
	}{
		{"", 2, "Usage: penstock <command> [flags]"},
		{"refurbish", 2, `penstock: unknown command "refurbish"`},

		{"audit now", 2, `penstock audit: unexpected argument "now"; see penstock audit -help`},
		{"audit -o xml", 2, `penstock audit: -o is "xml", want text or json`},
		{"audit -since yesterday", 2, `invalid value "yesterday" for flag -since`},
		{"audit -no-such-flag", 2, "penstock audit: flag provided but not defined: -no-such-flag; see penstock audit -help"},
		{"audit " + nowhere, 1, "penstock audit: "},
		{"audit -context prod " + nowhere, 1, "-context and -hub both name a hub: set one"},
		{"audit -context prod", 1, "contexts.yaml"},

		{"lanes", 2, "penstock lanes: no action given; want one of abandon, list; see penstock lanes -help"},
		{"lanes close", 2, `penstock lanes: unknown action "close"; want one of abandon, list`},
		{"lanes abandon", 2, "penstock lanes abandon: STREAM/LANE is missing"},
		{"lanes abandon LOGS/loki-0 LOGS/loki-1", 2, `penstock lanes abandon: unexpected argument "LOGS/loki-1"`},
		{"lanes list -o xml", 2, `penstock lanes: -o is "xml", want text or json`},
		{"lanes list " + nowhere, 1, "penstock lanes: "},

		{"policies", 2, "penstock policies: no action given; want one of list, push, show"},
		{"policies push", 2, "penstock policies push: FILE is missing"},
		{"policies show", 2, "penstock policies show: VERSION is missing"},
		{"policies list 3", 2, `penstock policies list: unexpected argument "3"`},
		{"policies push missing.yaml", 1, "penstock policies: open missing.yaml"},
		{"policies push " + bad, 1, `type "rare" is not supported here`},
		{"policies push " + good + " " + nowhere, 1, "penstock policies: "},

		{"replay", 2, "penstock replay: --from is not set: want the beginning of the range"},
		{"replay start", 2, `penstock replay: unknown action "start"; want one of list, remove, resume, status, stop`},
		{"replay stop", 2, "penstock replay stop: ID of a job, as penstock replay list shows it, is missing"},
		{"replay list all", 2, `penstock replay list: unexpected argument "all"`},
		{"replay -from -2h -as as-1 -dry-run", 2, "penstock replay: -dry-run reads telemetry"},
		{"replay -from yesterday", 1, `penstock replay: "yesterday" is not a point in time`},
		{"replay -from -1h -to -2h", 1, "is empty"},
		{"replay -from 5", 1, "every signal has its own stream, name one with --signal"},
		{"replay -from -2h -signal profiles", 1, "profiles"},
		{"replay -from -2h -no-sampling -policies " + good, 1, "policies and no sampling exclude each other"},
		{"replay -from -2h -policies " + bad, 1, `type "rare" is not supported here`},
		{"replay -from -2h -policies missing.yaml", 1, "open missing.yaml"},
		{"replay -from -2h -rate fast", 2, `invalid value "fast" for flag -rate`},
		{"replay -from -2h " + nowhere, 1, "penstock replay: "},
		{"replay list " + nowhere, 1, "penstock replay list: "},

		{"deadletter", 2, "penstock deadletter: no action given; want one of list, purge, resend, show"},
		{"deadletter show", 2, "penstock deadletter show: SEQ, the number of a dead letter, is missing"},
		{"deadletter show one", 1, `penstock deadletter: "one" is not the number of a dead letter`},
		{"deadletter purge 0", 1, `"0" is not the number of a dead letter`},
		{"deadletter list -signal profiles", 1, "profiles"},
		{"deadletter list -instance as-[", 1, `--instance "as-[" is not a valid glob`},
		{"deadletter list " + nowhere, 1, "penstock deadletter: "},

		{"whatif", 2, "penstock whatif: --policies is not set"},
		{"whatif -policies " + good, 2, "penstock whatif: --from is not set"},
		{"whatif -policies " + good + " -from -2h more", 2, `penstock whatif: unexpected argument "more"`},
		{"whatif -policies " + bad + " -from -2h", 1, `type "rare" is not supported here`},
		{"whatif -policies " + good + " -running " + bad + " -from -2h", 1, `type "rare" is not supported here`},
		{"whatif -policies " + good + " -from soon", 1, `"soon" is not a point in time`},

		{"token", 2, "penstock token: -instance-id is not set"},
		{"token -instance-id as.*", 2, "penstock token: "},
		{"token -instance-id as-1 -not-after tomorrow", 2, "want a time such as 2027-01-31T00:00:00Z, or a duration from now such as 30d"},
		{"token -instance-id as-1 -not-after -3d", 2, "want a time such as"},

		{"nats-config", 2, "penstock nats-config: no action given; want one of add-instance, ca, remove-instance"},
		{"nats-config add-instance", 2, "penstock nats-config add-instance: ID of an instance is missing"},
		{"nats-config ca", 2, "penstock nats-config: -host is not set"},
		{"nats-config add-instance as.*", 1, "penstock nats-config add-instance: "},

		{"generate -rate many", 2, `invalid value "many" for flag -rate`},
	} {
		t.Run(tc.args, func(t *testing.T) {
			t.Parallel()
			code, stdout, stderr := penstock(t, nil, strings.Fields(tc.args)...)
			if code != tc.code || !strings.Contains(stderr, tc.want) || stdout != "" {
				t.Errorf("exit code %d, want %d; stdout %q; stderr %q, want %q", code, tc.code, stdout, stderr, tc.want)
			}
			if tc.args != "" && !strings.HasPrefix(stderr, "penstock "+strings.Fields(tc.args)[0]) && !strings.HasPrefix(stderr, "penstock: unknown") {
				t.Errorf("stderr %q does not begin with the command", stderr)
			}
		})
	}
}

// TestHelpIsNoError: it goes to standard output, so that it can be read page by page.
func TestHelpIsNoError(t *testing.T) {
	for _, args := range []string{"help", "-h", "--help", "version", "-version", "audit -help", "lanes -help", "policies -h", "replay --help", "deadletter -help", "whatif -help", "token -help", "nats-config -help", "generate -help", "up -help"} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			if code, stdout, stderr := penstock(t, nil, strings.Fields(args)...); code != 0 || stderr != "" || !strings.Contains(stdout, "penstock") {
				t.Errorf("exit code %d, stdout %q, stderr %q", code, stdout, stderr)
			}
		})
	}
}

// TestWhichHub: flags win over the environment, and the environment over a context that is current.
func TestWhichHub(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the directory of configurations is elsewhere on " + runtime.GOOS)
	}
	contexts := filepath.Join(t.TempDir(), "penstock")
	if err := os.MkdirAll(contexts, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(contexts, "contexts.yaml"), []byte("current: prod\ncontexts:\n  prod: {url: nats://127.0.0.1:12}\n  test: {url: nats://127.0.0.1:13}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	config := "XDG_CONFIG_HOME=" + filepath.Dir(contexts) // the last one of a name counts
	for _, tc := range []struct {
		env  string
		args string
		want string
	}{
		{"", "audit", "127.0.0.1:12"},
		{"HUB_URL=nats://127.0.0.1:14", "audit", "127.0.0.1:14"},
		{"HUB_URL=nats://127.0.0.1:14", "audit -context test", "127.0.0.1:13"},
		{"HUB_URL=nats://127.0.0.1:14", "audit -hub nats://127.0.0.1:15", "127.0.0.1:15"},
		{"", "audit -context test", "127.0.0.1:13"},
		{"", "audit -context other", `has no context "other"; it has prod, test`},
	} {
		t.Run(tc.env+" "+tc.args, func(t *testing.T) {
			t.Parallel()
			env := []string{config}
			if tc.env != "" {
				env = append(env, tc.env)
			}
			if code, _, stderr := penstock(t, env, strings.Fields(tc.args)...); code != 1 || !strings.Contains(stderr, tc.want) {
				t.Errorf("exit code %d, stderr %q, want %q", code, stderr, tc.want)
			}
		})
	}
}
