package integration

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// TestAHubMovesToAccounts: the streams of a hub with users.conf, which are in the account
// that a server has by itself, are those of the account HUB once their directory has been
// renamed, as docs/upgrading.md says: nothing is lost, and a lane goes on at its floor.
func TestAHubMovesToAccounts(t *testing.T) {
	deployEnv(t)
	dir := t.TempDir()
	old := filepath.Join(dir, "nats-server.conf")
	if err := os.WriteFile(old, []byte("server_name: hub\njetstream { store_dir: "+dir+", sync_interval: always }\ninclude ./users.conf\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	users, err := os.ReadFile("testdata/users.conf")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "users.conf"), users, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	topology := bus.DefaultTopology()
	topology.Partitions, topology.MaxBytes = 1, 64<<20
	send := func(url string, from, to int) {
		t.Helper()
		log, _ := newLog(t)
		c, err := bus.Dial(bus.Config{URL: url, User: "edge-as-1", Pass: config.Secret(password), Name: "edge-as-1", InboxPrefix: "_INBOX_as-1"}, log)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		for n := from; n < to; n++ {
			m := bus.Message{Subject: bus.Subject(otlpwire.Logs, "as-1"), Body: []byte{byte(n)}, Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: 1, ID: "id-" + string(rune('a'+n))}}
			if err := c.PublishAsync(m).Wait(t.Context()); err != nil {
				t.Fatalf("message %d: %v", n, err)
			}
		}
	}
	lane := bus.LaneConfig{Stream: bus.Stream(otlpwire.Logs), Filter: bus.PartitionFilter(otlpwire.Logs, 0), Name: "loki-0"}
	read := func(conn *bus.Conn, from, to uint64) {
		t.Helper()
		l, err := conn.OpenLane(t.Context(), lane)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		for seq := from; seq <= to; {
			d, err := l.Next(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if d.Seq == 0 {
				continue
			}
			if d.Seq != seq {
				t.Fatalf("message %d, want %d", d.Seq, seq)
			}
			if err := l.Ack(seq); err != nil {
				t.Fatal(err)
			}
			seq++
		}
	}

	opts, err := server.ProcessConfigFile(old)
	if err != nil {
		t.Fatal(err)
	}
	opts.Host, opts.Port, opts.NoLog, opts.NoSigs = "127.0.0.1", server.RANDOM_PORT, true, true
	before := startServer(t, opts)
	conn := openAs(t, before.ClientURL(), "sink", topology)
	send(before.ClientURL(), 0, 6)
	read(conn, 1, 3)
	conn.Close()
	before.Shutdown()
	before.WaitForShutdown()

	if err := os.Rename(filepath.Join(dir, "jetstream", "$G"), filepath.Join(dir, "jetstream", "HUB")); err != nil {
		t.Fatal(err)
	}
	after := startFromFile(t, "nats-server.conf", func(o *server.Options) { o.Port, o.StoreDir = server.RANDOM_PORT, dir })
	conn = openAs(t, after.ClientURL(), "sink", topology)
	send(after.ClientURL(), 4, 10) // two are known by their ids
	if st, err := conn.State(t.Context(), bus.Stream(otlpwire.Logs)); err != nil || st.Messages != 10 {
		t.Errorf("%+v, %v; want 10 messages", st, err)
	}
	read(conn, 4, 10)
}
