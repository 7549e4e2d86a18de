package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/penstock/penstock/pkg/app"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/edge"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/hold"
	"github.com/penstock/penstock/pkg/keeper"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/logtest"
	"github.com/penstock/penstock/pkg/membership"
	"github.com/penstock/penstock/pkg/otlpwire"
	"github.com/penstock/penstock/pkg/replay"
	"github.com/penstock/penstock/pkg/sampling/versions"
	"github.com/penstock/penstock/test/backend"
)

const password = "test-password-of-every-user"

// deployEnv sets what deploy/nats expects in the environment.
func deployEnv(t *testing.T) {
	for _, name := range []string{"NATS_ADMIN_PASSWORD", "ROUTER_PASSWORD", "SINK_PASSWORD", "EDGE_AS_1_PASSWORD", "OPERATOR_PASSWORD", "REPLAY_AS_1_PASSWORD"} {
		t.Setenv(name, password)
	}
	dir := t.TempDir()
	if p := run(t, nil, "penstock", "nats-config", "ca", "-dir", dir, "-host", "127.0.0.1,localhost"); p.exit(t, time.Minute) != 0 {
		t.Fatal(p.out)
	}
	for name, file := range map[string]string{"NATS_TLS_CERT": "server.crt", "NATS_TLS_KEY": "server.key", "NATS_TLS_CA": "ca.crt"} {
		t.Setenv(name, filepath.Join(dir, file))
	}
}

// startFromFile starts a real nats-server with a file of deploy/nats; only
// addresses and directories are changed, and TLS is left out.
func startFromFile(t *testing.T, file string, change func(*server.Options)) *server.Server {
	t.Helper()
	opts, err := server.ProcessConfigFile(filepath.Join("..", "..", "deploy", "nats", file))
	if err != nil {
		t.Fatalf("deploy/nats/%s: %v", file, err)
	}
	opts.Host, opts.HTTPPort, opts.TLS, opts.TLSConfig = "127.0.0.1", 0, false, nil
	opts.NoLog, opts.NoSigs = true, true
	change(opts)
	return startServer(t, opts)
}

func startServer(t *testing.T, opts *server.Options) *server.Server {
	t.Helper()
	s, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(30 * time.Second) {
		t.Fatal("nats-server is not ready")
	}
	return s
}

// openAs opens the hub as a central role would.
func openAs(t *testing.T, url, user string, topology bus.Topology) *bus.Conn {
	t.Helper()
	log, _ := newLog(t)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	conn, err := bus.OpenHub(ctx, bus.Config{URL: url, User: user, Pass: password, Name: user}, topology, log, buckets[user]...)
	if err != nil {
		t.Fatalf("%s opens the hub: %v", user, err)
	}
	t.Cleanup(conn.Close)
	return conn
}

// buckets are those that a role creates.
var buckets = map[string][]bus.BucketConfig{
	"router": {membership.Bucket},
	"sink":   {membership.Bucket, versions.Bucket, replay.Bucket},
}

// TestDeployedServer starts the server of deploy/nats, lets router and sink
// make the streams with their own permissions, lets an edge send, and then
// tries what a hostile edge would.
func TestDeployedServer(t *testing.T) {
	deployEnv(t)
	s := startFromFile(t, "nats-server.conf", func(o *server.Options) {
		o.Port, o.StoreDir = server.RANDOM_PORT, t.TempDir()
	})
	if !s.JetStreamEnabled() {
		t.Fatal("no JetStream")
	}
	topology := bus.DefaultTopology()
	topology.Partitions = 2
	router := openAs(t, s.ClientURL(), "router", topology)
	sink := openAs(t, s.ClientURL(), "sink", topology) // finds what the router has made

	log, _ := newLog(t)
	edgeConn, err := bus.Dial(bus.Config{URL: s.ClientURL(), User: "edge-as-1", Pass: password, Name: "edge-as-1", InboxPrefix: "_INBOX_as-1"}, log)
	if err != nil {
		t.Fatal(err)
	}
	defer edgeConn.Close()
	for _, sig := range otlpwire.Signals {
		msg := bus.Message{Subject: bus.Subject(sig, "as-1"), Header: envelope.Header{ContentType: envelope.ContentTypeOTLP, Items: 1, Arrival: 1, ID: "a-" + sig.String()}, Body: []byte("x")}
		if err := edgeConn.PublishAsync(msg).Wait(t.Context()); err != nil {
			t.Errorf("edge publishes its own %v: %v", sig, err)
		}
	}
	readOne(t, router, bus.Stream(otlpwire.Traces), otlpwire.Traces, "router")
	readOne(t, sink, bus.Stream(otlpwire.Metrics), otlpwire.Metrics, "sink")
	readOne(t, sink, bus.Stream(otlpwire.Logs), otlpwire.Logs, "sink")

	// The sink records and recalls decisions with its own permissions.
	mark := bus.Message{Subject: bus.DecisionsSubject(1), Header: envelope.Header{ContentType: envelope.ContentTypeDecisions, Arrival: 1}}
	recalled := ""
	for range 2 {
		journal, err := sink.TakeJournal(t.Context(), bus.Decisions, mark, func(b []byte) error { recalled += string(b); return nil })
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{"a", "b"} {
			entry := mark
			entry.Body = []byte(text)
			if err := journal.Append(t.Context(), journal.Entry(entry)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if recalled != "ab" {
		t.Errorf("recalled %q", recalled)
	}

	// An edge and a router ask whether to hold back, the sink answers.
	stop, err := hold.Serve(sink, func(instance string) hold.Answer {
		return hold.Answer{Signals: []string{"logs"}, Why: "it is " + instance}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	asker := hold.NewAsker(log)
	defer asker.Close()
	for instance, conn := range map[string]*bus.Conn{"as-1": edgeConn, "as-9": router} {
		eventually(t, time.Minute, "an answer about "+instance, func() error {
			if why := asker.Held(conn, instance, otlpwire.Logs, time.Now()); why != "it is "+instance {
				return fmt.Errorf("got %q", why)
			}
			return nil
		})
	}

	// An edge that may not ask does not hold back, says so, and does not ask again soon.
	var said logtest.Log
	stranger := hold.NewAsker(said.Logger(slog.LevelInfo))
	defer stranger.Close()
	stranger.Held(edgeConn, "as-2", otlpwire.Logs, time.Now())
	eventually(t, time.Minute, "the end of an attempt", func() error {
		if stranger.Asks() {
			return errors.New("it asks")
		}
		return nil
	})
	if why := stranger.Held(edgeConn, "as-2", otlpwire.Logs, time.Now().Add(time.Minute)); why != "" || stranger.Asks() || !said.Says("does not allow to ask", "instance=as-2") {
		t.Errorf("%q, %s", why, &said)
	}

	// Routers and sinks see each other, and give their lanes back.
	shareOne(t, router, "router", bus.Stream(otlpwire.Traces), otlpwire.Traces)
	shareOne(t, sink, "sink", bus.Stream(otlpwire.Logs), otlpwire.Logs)

	nc, err := nats.Connect(s.ClientURL(), nats.UserInfo("edge-as-1", password), nats.CustomInboxPrefix("_INBOX_as-1"), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	for _, subject := range []string{
		"otlp.traces.as-2", "penstock.hold.as-2", "penstock.hold.*", "otlp.traces.*", "otlp.traces.>", "otlp.traces", "otlp.traces.as-1.x", "otlp.traces.0.as-1", "spans.0", "decisions.0", "dead.traces.as-1", "replay.job.0",
		"$JS.API.STREAM.NAMES", "$JS.API.STREAM.INFO.TRACES", "$JS.API.STREAM.DELETE.TRACES", "$JS.API.STREAM.PURGE.TRACES", "$JS.API.STREAM.MSG.GET.TRACES",
		"$JS.API.STREAM.CREATE.MINE", "$JS.API.DIRECT.GET.TRACES", "$JS.API.DIRECT.GET.TRACES.otlp.traces.0.as-2", "$JS.API.CONSUMER.CREATE.TRACES.x", "$JS.API.CONSUMER.MSG.NEXT.TRACES.router-0",
		"$JS.API.CONSUMER.RESET.TRACES.router-0", "$JS.API.CONSUMER.DELETE.TRACES.router-0", "$JS.API.CONSUMER.UNPIN.TRACES.router-0", "$KV.MEMBERS.sink.evil", "$JS.API.STREAM.INFO.KV_MEMBERS", "$JS.ACK.TRACES.router-0.1.1.1.1.0", "$SYS.REQ.SERVER.PING", "_INBOX_router.x",
	} {
		if _, err := nc.Request(subject, nil, 300*time.Millisecond); !denied(nc, err) {
			t.Errorf("a hostile edge may publish to %s: %v", subject, err)
		}
	}
	for _, subject := range []string{">", "otlp.>", "spans.0", "_INBOX.>", "_INBOX_router.>", "$JS.>", "$SYS.>"} {
		sub, err := nc.SubscribeSync(subject)
		if err == nil {
			_ = nc.Flush()
			_, err = sub.NextMsg(100 * time.Millisecond)
		}
		if !denied(nc, err) {
			t.Errorf("a hostile edge may subscribe to %s: %v", subject, err)
		}
	}
	// An answer that reflects into an API subject must not purge anything.
	evil := nats.NewMsg("otlp.traces.as-1")
	evil.Reply = "$JS.API.STREAM.PURGE.TRACES"
	_ = nc.PublishMsg(evil)
	_ = nc.Flush()
	time.Sleep(100 * time.Millisecond) // nothing is to come; there is nothing to wait for
	if st, err := router.State(t.Context(), bus.Stream(otlpwire.Traces)); err != nil || st.Messages < 1 {
		t.Errorf("TRACES after a reflected purge: %+v, %v", st, err)
	}
}

// TestDeployedServerSpeaksTLS: with the files that penstock nats-config makes, and no plain
// text; and what add-instance writes can be loaded, by a server that runs, too.
func TestDeployedServerSpeaksTLS(t *testing.T) {
	deployEnv(t)
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("..", "..", "deploy", "nats"))); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "nats-server.conf")
	load := func() *server.Options {
		opts, err := server.ProcessConfigFile(conf)
		if err != nil {
			t.Fatal(err)
		}
		opts.Host, opts.HTTPPort, opts.Port, opts.StoreDir, opts.NoLog, opts.NoSigs = "127.0.0.1", 0, server.RANDOM_PORT, filepath.Join(dir, "store"), true, true
		return opts
	}
	opts := load()
	s := startServer(t, opts)
	url := "tls://" + s.Addr().String()
	log, _ := newLog(t)
	connect := func(user, password, ca string) error {
		c, err := bus.Dial(bus.Config{URL: url, User: user, Pass: config.Secret(password), Name: user, InboxPrefix: "_INBOX_x", TLS: config.ClientTLS{CA: ca}}, log)
		if err == nil {
			c.Close()
		}
		return err
	}
	ca := os.Getenv("NATS_TLS_CA")
	if err := connect("sink", password, ca); err != nil {
		t.Errorf("with the authority that nats-config made: %v", err)
	}
	if err := connect("sink", password, ""); err == nil {
		t.Error("a certificate of nobody known is believed")
	}
	if nc, err := nats.Connect("nats://"+s.Addr().String(), nats.UserInfo("sink", password)); err == nil {
		nc.Close()
		t.Error("the server speaks plain text")
	}
	p := run(t, nil, "penstock", "nats-config", "add-instance", "as-7", "-dir", dir)
	if p.exit(t, time.Minute) != 0 {
		t.Fatal(p.out)
	}
	_, secret, _ := strings.Cut(p.out.String(), "hub.password: ")
	secret = strings.Fields(secret)[0]
	if err := connect("edge-as-7", secret, ca); err == nil {
		t.Error("the instance is there before the reload")
	}
	reload := func() {
		t.Helper()
		next := load()
		next.Port = opts.Port
		if err := s.ReloadOptions(next); err != nil {
			t.Fatal(err)
		}
	}
	reload()
	if err := connect("edge-as-7", secret, ca); err != nil {
		t.Errorf("after the reload: %v", err)
	}
	if err := connect("edge-as-7", "wrong", ca); err == nil {
		t.Error("a wrong password is taken")
	}
	if p := run(t, nil, "penstock", "nats-config", "add-instance", "as-7", "-dir", dir); p.exit(t, time.Minute) == 0 {
		t.Errorf("added twice: %s", p.out)
	}
	if p := run(t, nil, "penstock", "nats-config", "remove-instance", "as-7", "-dir", dir); p.exit(t, time.Minute) != 0 {
		t.Error(p.out)
	}
	reload()
	if err := connect("edge-as-7", secret, ca); err == nil {
		t.Error("the instance is there after it was removed")
	}
}

// denied reports whether the server refused the last operation.
func denied(nc *nats.Conn, err error) bool {
	return errors.Is(err, nats.ErrPermissionViolation) || errors.Is(err, nats.ErrTimeout) && errors.Is(nc.LastError(), nats.ErrPermissionViolation) || errors.Is(err, nats.ErrBadSubject)
}

// readOne reads the one message of a stream through a lane.
func readOne(t *testing.T, conn *bus.Conn, stream string, sig otlpwire.Signal, name string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	got := make(chan bus.Delivery, 2)
	for p := range 2 {
		lane, err := conn.OpenLane(ctx, bus.LaneConfig{Stream: stream, Filter: bus.PartitionFilter(sig, p), Name: name + "-" + strconv.Itoa(p)})
		if err != nil {
			t.Fatal(err)
		}
		go lane.Run(ctx, func(d bus.Delivery) bool {
			if d.Seq > 0 {
				got <- d
			}
			return d.Seq == 0
		})
	}
	select {
	case d := <-got:
		if d.Instance() != "as-1" || d.Err != nil {
			t.Errorf("%s: got %+v", stream, d)
		}
	case <-ctx.Done():
		t.Errorf("%s: nothing came", stream)
	}
}

// shareOne lets a member own a lane, leave, and another one own it at once.
func shareOne(t *testing.T, conn *bus.Conn, group, stream string, sig otlpwire.Signal) {
	t.Helper()
	log, _ := newLog(t)
	for _, name := range []string{"first", "second"} {
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second) // less than a pin lives
		owned := false
		membership.New(&bus.Hub{Conn: conn}, group, name, ledger.New(prometheus.NewRegistry()), log).Run(ctx, []membership.Shared{{
			Signal: sig.String(), Backend: "test", LaneConfig: bus.LaneConfig{Stream: stream, Name: "test-0"}, Run: func(ctx context.Context, l *bus.Lane) {
				defer l.Close()
				l.Run(ctx, func(d bus.Delivery) bool {
					owned = owned || d.Seq > 0
					if owned {
						cancel()
					}
					return true
				})
			},
		}})
		if !owned {
			t.Errorf("%s %s does not own its lane: %v", group, name, ctx.Err())
		}
		cancel()
	}
}

// TestDeployedCluster starts three servers of deploy/nats/nats-cluster.conf,
// and runs an edge over streams with three replicas while the server that it is
// connected to dies. A keeper removes what has been read, and nothing else, with the rights that sinks have.
func TestDeployedCluster(t *testing.T) {
	servers, urls := startCluster(t)
	topology := bus.DefaultTopology()
	topology.Partitions, topology.Replicas = 2, 3
	topology.MaxBytes = 1 << 30
	router := openAs(t, urls, "router", topology)

	log, _ := newLog(t)
	ec := edge.DefaultConfig()
	ec.Instance.ID = "as-1"
	ec.Hub = bus.Config{URL: urls, User: "edge-as-1", Pass: password}
	ec.Spool.Dir, ec.Spool.Reserve = t.TempDir(), 1<<20
	ec.Receive.GRPC.Listen, ec.Receive.HTTP.Listen = backend.FreeAddr(t), backend.FreeAddr(t)
	p := app.NewProcess(log, &ec)
	stages, err := edge.Build(p, ec)
	e := start(t, p, stages, err)

	// Two sinks share the lanes; the server that dies leads their bucket.
	read := newShared(t, urls, topology)

	const n = 400
	for i := range n {
		if i == n/2 {
			victim := servers[0]
			for _, s := range servers {
				if s.JetStreamIsStreamLeader("HUB", "KV_MEMBERS") {
					victim = s
				}
			}
			victim.Shutdown()
			victim.WaitForShutdown()
		}
		if err := post(t.Context(), ec.Receive.HTTP.Listen, otlpwire.Logs, numbered(otlpwire.Logs, i)); err != nil {
			t.Fatalf("item %d: %v", i, err)
		}
	}
	eventually(t, 60*time.Second, "the hub has everything", func() error {
		if got := count(t, otlpwire.Logs, "penstock_forwarded_items_total", e); got < n {
			return fmt.Errorf("%d of %d forwarded", got, n)
		}
		return nil
	})
	st, err := router.State(t.Context(), bus.Stream(otlpwire.Logs))
	if err != nil || st.LastSeq == 0 {
		t.Errorf("LOGS: %+v, %v", st, err)
	}
	eventually(t, 60*time.Second, "two sinks share the lanes and have read everything", func() error { return read.done(n) })
	eventually(t, 60*time.Second, "the keeper has removed what was read", func() error {
		if st, err := router.State(t.Context(), bus.Stream(otlpwire.Logs)); err != nil || st.Messages > 0 {
			return fmt.Errorf("%+v, %v", st, err)
		}
		return nil
	})
}

// startCluster starts three servers of deploy/nats.
func startCluster(t *testing.T) (servers []*server.Server, urls string) {
	t.Helper()
	deployEnv(t)
	routes := make([]string, 3)
	for i := range routes {
		routes[i] = backend.FreeAddr(t)
		t.Setenv(fmt.Sprintf("ROUTE_%d", i+1), "nats-route://"+routes[i])
	}
	for i := range routes {
		t.Setenv("SERVER_NAME", fmt.Sprintf("hub-%d", i+1))
		t.Setenv("CLUSTER_LISTEN", routes[i])
		client := backend.FreeAddr(t)
		t.Setenv("CLIENT_LISTEN", client)
		t.Setenv("STORE_DIR", t.TempDir())
		opts, err := server.ProcessConfigFile(filepath.Join("..", "..", "deploy", "nats", "nats-cluster.conf"))
		if err != nil {
			t.Fatal(err)
		}
		opts.NoLog, opts.NoSigs, opts.TLS, opts.TLSConfig = true, true, false, nil
		s, err := server.NewServer(opts)
		if err != nil {
			t.Fatal(err)
		}
		s.Start()
		t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
		servers = append(servers, s)
		urls += ",nats://" + client
	}
	return servers, urls[1:]
}

// sharedLanes are two members that share the lanes of METRICS and LOGS.
type sharedLanes struct {
	members []*membership.Members

	mu    sync.Mutex
	items map[uint64]int // by sequence of LOGS
}

func newShared(t *testing.T, urls string, topology bus.Topology) *sharedLanes {
	t.Helper()
	s := &sharedLanes{items: map[uint64]int{}}
	log, _ := newLog(t)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	for _, name := range []string{"one", "two"} {
		hub := bus.NewHub(bus.Config{}, topology, log)
		hub.Conn = openAs(t, urls, "sink", topology)
		m := membership.New(hub, "sink", name, ledger.New(prometheus.NewRegistry()), log)
		s.members = append(s.members, m)
		var lanes []membership.Shared
		for _, sig := range []otlpwire.Signal{otlpwire.Metrics, otlpwire.Logs} {
			for p := range topology.Partitions {
				lanes = append(lanes, membership.Shared{Signal: sig.String(), Partition: p, Backend: "test", Run: s.read, LaneConfig: bus.LaneConfig{
					Stream: bus.Stream(sig), Filter: bus.PartitionFilter(sig, p), Name: "test-" + strconv.Itoa(p),
				}})
			}
		}
		wg.Go(func() { m.Run(ctx, lanes) })
		past := topology
		past.MaxAge = time.Nanosecond // what is finished goes at once
		wg.Go(func() {
			keeper.New(func() *bus.Conn { return hub.Conn }, m.First, past, lanes, ledger.New(prometheus.NewRegistry()), log).Run(ctx)
		})
	}
	return s
}

func (s *sharedLanes) read(ctx context.Context, l *bus.Lane) {
	defer l.Close()
	l.Run(ctx, func(d bus.Delivery) bool {
		if d.Seq > 0 {
			s.mu.Lock()
			s.items[d.Seq] = d.Header.Items
			s.mu.Unlock()
			_ = l.Ack(d.Seq)
		}
		return true
	})
}

// done wants every lane to have one owner, both sinks to own half of them, and n
// items read.
func (s *sharedLanes) done(n int) error {
	w := httptest.NewRecorder()
	s.members[0].Page().ServeHTTP(w, httptest.NewRequest("GET", "/partitions?format=json", nil))
	var status membership.Partitions
	if err := json.Unmarshal(w.Body.Bytes(), &status); err != nil {
		return err
	}
	owns := map[string]int{}
	for _, l := range status.Lanes {
		if len(l.Owners) != 1 || l.Error != "" || l.Lag > 0 {
			return fmt.Errorf("lane %+v", l)
		}
		owns[l.Owners[0]]++
	}
	if owns["one"] != 2 || owns["two"] != 2 {
		return fmt.Errorf("owners %v", owns)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	items := 0
	for _, n := range s.items {
		items += n
	}
	if items < n {
		return fmt.Errorf("%d of %d items read", items, n)
	}
	return nil
}
