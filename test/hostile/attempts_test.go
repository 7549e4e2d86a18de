package hostile

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/klauspost/compress/s2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// attempt is one thing that an attacker tries.
type attempt struct {
	name string
	// denied: it must be refused, with the server's word. Others may be taken, and must
	// harm nobody.
	denied bool
	do     func(w *world) (refused bool, answer string)
}

// group is attempts of one kind, after which a check is made in the quick form; the whole form
// checks after each.
type group struct {
	name     string
	attempts []attempt
}

// asUser says something to the server with a credential.
func asUser(user, text string) func(*world) (bool, string) {
	return func(w *world) (bool, string) {
		r, answer, err := dialRaw(w.addr, user)
		if err != nil {
			return true, err.Error()
		}
		defer r.close()
		if !strings.Contains(answer, "-ERR") {
			answer = r.say(text)
		}
		return strings.Contains(answer, "-ERR") || strings.HasSuffix(answer, "closed"), answer
	}
}

// each makes an attempt of every text.
func each(user string, denied bool, say func(text string) string, texts ...string) (all []attempt) {
	for _, text := range texts {
		all = append(all, attempt{user + " " + strings.ToValidUTF8(text[:min(len(text), 60)], "?"), denied, asUser(user, say(text))})
	}
	return all
}

func publishTo(subject string) string { return pub(subject, "", "", []byte("x")) }

func subscribeTo(subject string) string { return "SUB " + subject + " 1\r\n" }

func reflectTo(reply string) string { return pub("otlp.logs.as-1", reply, "", []byte("x")) }

// lines makes a header of lines, complete.
func lines(more ...string) string {
	return "NATS/1.0\r\n" + strings.Join(append(more, ""), "\r\n") + "\r\n"
}

// sound are the lines of a header that penstock would write.
func sound(items int64, arrival int64, more ...string) string {
	return lines(append([]string{"Content-Type: application/x-protobuf", fmt.Sprintf("Penstock-Items: %d", items), fmt.Sprintf("Penstock-Arrival: %d", arrival)}, more...)...)
}

// withHeader publishes a sound log record, and a sound span, under a header; an empty body, too.
func withHeader(header func() string) func(string) string {
	return func(string) string {
		var b strings.Builder
		for _, sig := range otlpwire.Signals {
			subject := "otlp." + sig.String() + ".as-1"
			b.WriteString(pub(subject, "_INBOX_as-1.x", header(), payload(sig, rand.IntN(1<<30), time.Now())))
			b.WriteString(pub(subject, "", header(), nil))
		}
		return b.String()
	}
}

func headers() (all []attempt) {
	now := func() int64 { return time.Now().UnixNano() }
	add := func(name string, header func() string) {
		all = append(all, attempt{"header: " + name, false, asUser("edge-as-1", withHeader(header)(""))})
	}
	for _, line := range []string{
		"Nats-Pin-Id: x", "Nats-Pin-Id: x\r\nNats-Pin-Id: y", "Status: 423", "Status: 409\r\nDescription: Consumer Deleted", "Status: 100", "Status: 503",
		"Nats-Msg-Size: 9000000000", "Nats-Msg-Id: ", "Nats-Msg-Id: " + strings.Repeat("i", 60_000), "Nats-Rollup: all", "Nats-Rollup: sub", "Nats-TTL: 1s", "Nats-TTL: never",
		"Nats-Expected-Stream: TRACES", "Nats-Expected-Last-Sequence: 0", "Nats-Expected-Last-Subject-Sequence: 0", "Nats-Expected-Last-Msg-Id: x",
		"Nats-Schedule: @every 1s\r\nNats-Schedule-Target: otlp.logs.as-2", "Nats-Schedule: @at 2030-01-01T00:00:00Z\r\nNats-Schedule-Target: spans.0",
		"Nats-Trace-Dest: otlp.logs.as-2", "Nats-Trace-Dest: $KV.MEMBERS.sink.x\r\nNats-Trace-Only: true", "Accept-Encoding: x\r\ntraceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
		"Nats-Incr: 5", "Nats-Batch-Id: b\r\nNats-Batch-Sequence: 1", "Nats-Batch-Id: b\r\nNats-Batch-Sequence: 1\r\nNats-Batch-Commit: 1", "Nats-Stream-Source: OTHER 1 > > otlp.logs.as-2", "Nats-Request-Info: {\"acc\":\"HUB\"}", "Nats-Subject: otlp.logs.as-2", "Nats-Sequence: 1",
		"KV-Operation: PURGE", "Penstock-Reason: x\r\nPenstock-Source: LOGS 1", "Penstock-Load: 9,9,9,9", "Penstock-Load: -1,0,0,0", "Penstock-Load: " + strings.Repeat("9", 5000),
		"Content-Encoding: s2", "Content-Encoding: zstd", "Content-Encoding: br", "Content-Type: application/x-penstock-decisions", "Content-Type: application/json",
	} {
		add(line[:min(len(line), 60)], func() string { return sound(1, now(), line) })
	}
	for _, n := range []int64{-1, 0, 1 << 40, math.MaxInt64} {
		add(fmt.Sprint("items ", n), func() string { return sound(n, now()) })
	}
	for _, at := range []int64{math.MinInt64, -1, 0, 1, math.MaxInt64, 1 << 62} {
		add(fmt.Sprint("arrival ", at), func() string { return sound(1, at) })
	}
	for name, open := range map[string]string{
		"a block without an end": "NATS/1.0\r\nContent-Type: application/x-protobuf\r\n", "a line without an end": "NATS/1.0\r\nX: y", "a pin left open": "NATS/1.0\r\nNats-Pin-Id: x",
		"no version": "X: y\r\n\r\n", "another version": "NATS/9.9\r\nX: y\r\n\r\n", "no colon": "NATS/1.0\r\nnothing\r\n\r\n", "bytes": "NATS/1.0\r\n\x00\xff: \x01\r\n\r\n", "a status line": "NATS/1.0 503\r\n\r\n", "a status line of a request": "NATS/1.0 423 Pin\r\n\r\n",
		"a thousand fields": lines(slices.Repeat([]string{"A: b"}, 1000)...), "none at all": "NATS/1.0\r\n\r\n",
	} {
		add(name, func() string { return open })
	}
	return all
}

// bodies are those of one message, under a sound header.
func bodies() (all []attempt) {
	add := func(name string, sig otlpwire.Signal, encoding string, times int, body func(i int) []byte) {
		all = append(all, attempt{"body: " + name, false, func(w *world) (bool, string) {
			var b strings.Builder
			for i := range times {
				header := []string{}
				if encoding != "" {
					header = append(header, "Content-Encoding: "+encoding)
				}
				b.WriteString(pub("otlp."+sig.String()+".as-1", "", sound(1, time.Now().UnixNano(), header...), body(i)))
			}
			return asUser("edge-as-1", b.String())(w)
		}})
	}
	random := make([]byte, 10_000)
	for i := range random {
		random[i] = byte(rand.Uint32())
	}
	zeros := make([]byte, envelope.MaxPayload)
	for _, sig := range otlpwire.Signals {
		add("garbage as "+sig.String(), sig, "", 20, func(int) []byte { return random })
		add("empty "+sig.String(), sig, "", 20, func(int) []byte { return nil })
		add("a small bomb of "+sig.String(), sig, "s2", 20, func(int) []byte { return s2.Encode(nil, zeros) })
		add("a bomb of "+sig.String(), sig, "s2", 5, func(int) []byte { return s2.Encode(nil, make([]byte, 64<<20)) })
		add("nested "+sig.String(), sig, "", 3, func(int) []byte { return nested(20_000) })
		add("a million elements of "+sig.String(), sig, "", 2, func(int) []byte { return bytes.Repeat([]byte{0x0a, 0x00}, 400_000) })
		add("another's instance as "+sig.String(), sig, "", 3, func(i int) []byte { return claim(payload(sig, 1<<20+i, time.Now()), "as-2") })
		add("cut off "+sig.String(), sig, "", 40, func(i int) []byte { p := payload(sig, 7, time.Now()); return p[:len(p)*i/40] })
		add("a message of its own size limit as "+sig.String(), sig, "", 1, func(int) []byte { return make([]byte, 1<<20-4096) })
	}
	all = append(all, attempt{"7 MiB", true, asUser("edge-as-1", pub("otlp.logs.as-1", "", "", make([]byte, 7<<20)))})
	return all
}

// nested is a protobuf message in itself, so deep.
func nested(depth int) (b []byte) {
	for range depth {
		if b = append(binary.AppendUvarint([]byte{0x0a}, uint64(len(b))), b...); len(b) > 60_000 {
			break
		}
	}
	return b
}

// claim puts a resource attribute instance.id in front.
func claim(payload []byte, instance string) []byte {
	value := append([]byte{0x0a, byte(len(instance))}, instance...)
	attribute := append([]byte{0x0a, 11}, "instance.id"...)
	attribute = append(append(attribute, 0x12, byte(len(value))), value...)
	resource := append([]byte{0x0a, byte(len(attribute))}, attribute...)
	resource = append([]byte{0x0a, byte(len(resource))}, resource...)
	return append(append([]byte{0x0a, byte(len(resource))}, resource...), payload...)
}

// floods are many messages under stamps that stand still or go to and fro.
func floods() (all []attempt) {
	spans := func(from, n int) []byte {
		var b []byte
		for i := range n {
			b = append(b, payload(otlpwire.Traces, from+i, time.Unix(1, 0))...)
		}
		return b
	}
	flood := func(name string, messages int, arrival func(now int64, i int) int64) {
		all = append(all, attempt{"flood: " + name, false, func(w *world) (bool, string) {
			now := time.Now().UnixNano()
			var b strings.Builder
			for i := range messages {
				body, enc := envelope.Compress(nil, spans(i*2000, 2000), envelope.S2)
				b.WriteString(pub("otlp.traces.as-1", "", sound(2000, arrival(now, i), "Content-Encoding: "+string(enc)), body))
			}
			return asUser("edge-as-1", b.String())(w)
		}})
	}
	flood("one stamp, more than a sampler holds", 30, func(now int64, _ int) int64 { return now })
	flood("an hour to and fro", 20, func(now int64, i int) int64 { return now - int64(i%2)*int64(time.Hour) })
	flood("back and back", 20, func(now int64, i int) int64 { return now - int64(i)*int64(24*time.Hour) })
	flood("from the future", 10, func(now int64, i int) int64 { return now + int64(59*time.Minute) })
	all = append(all, attempt{"flood: 20,000 small messages", false, func(w *world) (bool, string) {
		var b strings.Builder
		for range 20_000 {
			b.WriteString(pub("otlp.logs.as-1", "", "", []byte("x")))
		}
		return asUser("edge-as-1", b.String())(w)
	}}, attempt{"flood: 100 connections", false, func(w *world) (bool, string) {
		refused := 0
		for range 100 {
			if r, answer, err := dialRaw(w.addr, "edge-as-1"); err == nil {
				defer r.close()
				if strings.Contains(answer, "-ERR") {
					refused++
				}
			}
		}
		return refused > 0, fmt.Sprint(refused, " refused")
	}})
	return all
}

// overHTTP asks the gateway.
func overHTTP(name string, denied bool, request func(w *world) (*http.Request, error)) attempt {
	return attempt{"gateway: " + name, denied, func(w *world) (bool, string) {
		req, err := request(w)
		if err != nil {
			return true, err.Error()
		}
		res, err := (&http.Client{Timeout: 30 * time.Second}).Do(req)
		if err != nil {
			return true, err.Error()
		}
		text, _ := io.ReadAll(io.LimitReader(res.Body, 4096))
		_ = res.Body.Close()
		return res.StatusCode >= 400, fmt.Sprintf("%s %s", res.Status, text)
	}}
}

func gatewayAttempts() (all []attempt) {
	post := func(name string, denied bool, sig otlpwire.Signal, body []byte, change func(w *world, r *http.Request)) {
		all = append(all, overHTTP(name, denied, func(w *world) (*http.Request, error) {
			r, err := http.NewRequest(http.MethodPost, "http://"+w.gateway+"/v1/"+sig.String(), bytes.NewReader(body))
			if err == nil {
				r.Header.Set("Content-Type", "application/x-protobuf")
				r.Header.Set("Authorization", "Bearer "+w.token)
				change(w, r)
			}
			return r, err
		}))
	}
	set := func(name, value string) func(*world, *http.Request) {
		return func(_ *world, r *http.Request) { r.Header[name] = []string{value} }
	}
	log := payload(otlpwire.Logs, 1<<21, time.Now())
	post("no token", true, otlpwire.Logs, log, func(_ *world, r *http.Request) { r.Header.Del("Authorization") })
	for name, auth := range map[string]string{"a wrong token": "Bearer x", "another scheme": "Basic YXMtMjp4", "an empty token": "Bearer ", "a long token": "Bearer " + strings.Repeat("x", 100_000), "the hash": "Bearer " + strings.Repeat("0", 64)} {
		post(name, true, otlpwire.Logs, log, set("Authorization", auth))
	}
	for _, h := range []string{"X-Scope-OrgID", "X-Forwarded-For", "Nats-Msg-Id", "Penstock-Instance", "Penstock-Id", "penstock-id", "penstock-arrival", "penstock-load"} {
		post("own token and "+h, false, otlpwire.Logs, log, set(h, "as-2/x-1"))
	}
	post("another's instance", false, otlpwire.Logs, claim(log, "as-2"), func(*world, *http.Request) {})
	post("garbage", true, otlpwire.Logs, []byte("\xff\xff\xff"), func(*world, *http.Request) {})
	post("nested", false, otlpwire.Logs, nested(20_000), func(*world, *http.Request) {})
	post("a bomb", true, otlpwire.Logs, s2.EncodeSnappy(nil, make([]byte, 200<<20)), set("Content-Encoding", "snappy"))
	post("an encoding that there is not", true, otlpwire.Logs, log, set("Content-Encoding", "br"))
	post("another type", true, otlpwire.Logs, log, set("Content-Type", "text/html"))
	all = append(all, overHTTP("GET", true, func(w *world) (*http.Request, error) {
		return http.NewRequest(http.MethodGet, "http://"+w.gateway+"/v1/logs", nil)
	}), overHTTP("a way up", true, func(w *world) (*http.Request, error) {
		return http.NewRequest(http.MethodPost, "http://"+w.gateway+"/v1/../config", nil)
	}))
	return all
}

// refusedTenant are messages of the attacker's, sound ones, whose tenant the backends do not want.
func refusedTenant() (all []attempt) {
	for http, code := range map[int]codes.Code{401: codes.Unauthenticated, 403: codes.PermissionDenied, 404: codes.NotFound, 429: codes.ResourceExhausted} {
		all = append(all, attempt{fmt.Sprint("a tenant answered with ", http), false, func(w *world) (bool, string) {
			w.loki.FailTenant("as-1", http)
			w.tempo.FailTenant("as-1", status.Error(code, "no"))
			var b strings.Builder
			for range 100 {
				for _, sig := range otlpwire.Signals {
					b.WriteString(pub("otlp."+sig.String()+".as-1", "", sound(1, time.Now().UnixNano()), payload(sig, rand.IntN(1<<30), time.Now())))
				}
			}
			return asUser("edge-as-1", b.String())(w)
		}})
	}
	return all
}

func groups() []group {
	as1 := "edge-as-1"
	return []group{
		{"publishing elsewhere", each(as1, true, publishTo,
			"otlp.traces.as-2", "otlp.metrics.as-2", "otlp.logs.as-2", "otlp.logs.as-3", "otlp.traces.0.as-1", "otlp.traces", "otlp.traces.as-1.x", "otlp.traces.AS-1", "spans.0", "spans.1",
			"decisions.0", "decisions.1-loki", "dead.logs.as-1", "dead.logs.as-2", "replayed.x.0", "replay.x.0", "audit.replay.x", "audit.loss", "$KV.KEEPER.LOGS", "$KV.TALLIES.LOGS.loki-0", "$KV.MEMBERS.sink.x", "$KV.MEMBERS.router.x", "$KV.POLICIES.0", "$KV.POLICIES.1", "$KV.POLICIES.domains.1", "$KV.REPLAYS.job.as-1.x", "$KV.REPLAYS.job._all.x",
			"$JS.API.INFO", "$JS.API.STREAM.NAMES", "$JS.API.STREAM.LIST", "$JS.API.STREAM.INFO.LOGS", "$JS.API.STREAM.CREATE.X", "$JS.API.STREAM.UPDATE.LOGS", "$JS.API.STREAM.DELETE.LOGS", "$JS.API.STREAM.PURGE.LOGS", "$JS.API.STREAM.RESTORE.LOGS", "$JS.API.STREAM.SNAPSHOT.LOGS", "$JS.API.STREAM.MSG.GET.LOGS", "$JS.API.STREAM.MSG.DELETE.LOGS",
			"$JS.API.DIRECT.GET.LOGS", "$JS.API.DIRECT.GET.LOGS.otlp.logs.0.as-2", "$JS.API.CONSUMER.CREATE.LOGS.x", "$JS.API.CONSUMER.DURABLE.CREATE.LOGS.x", "$JS.API.CONSUMER.MSG.NEXT.LOGS.loki-0", "$JS.API.CONSUMER.RESET.LOGS.loki-0", "$JS.API.CONSUMER.DELETE.LOGS.loki-0", "$JS.API.CONSUMER.UNPIN.LOGS.loki-0", "$JS.API.CONSUMER.PAUSE.LOGS.loki-0", "$JS.ACK.LOGS.loki-0.1.1.1.1.0", "$JS.FC.LOGS.x.y",
			"$SYS.REQ.SERVER.PING", "$SYS.REQ.ACCOUNT.HUB.CONNZ", "_INBOX_sink.x", "_INBOX_router.x", "_R_.x", "penstock.jobs.as-1.table", "penstock.jobs.as-2.table")},
		{"publishing beyond subjects", each(as1, true, publishTo, "otlp.*.as-1", "otlp.>", ">", "*", "otlp..as-1", ".otlp.logs.as-1", "otlp.logs.as-1.", "otlp.logs.as-1 x y z", "otlp.logs."+strings.Repeat("x.", 3000)+"y")},
		{"subscribing", each(as1, true, subscribeTo, ">", "*", "otlp.>", "otlp.logs.as-1", "otlp.logs.as-2", "spans.0", "decisions.*", "dead.>", "$KV.>", "$JS.>", "$JS.API.>", "$JS.EVENT.>", "$SYS.>", "_INBOX.>", "_INBOX_sink.>", "_INBOX_as-2.>", "_R_.>", "penstock.jobs.*.*", "penstock.jobs.*.* sinks", "otlp.*.* q")},
		{"reflections", each(as1, false, reflectTo,
			"$KV.MEMBERS.sink.x", "$KV.MEMBERS.router.x", "$KV.POLICIES.0", "$KV.POLICIES.1", "$KV.POLICIES.domains.1", "$KV.REPLAYS.job._all.x", "decisions.0", "decisions.1", "spans.0", "spans.1", "dead.logs.as-2", "replayed.x.0", "replay.x.0", "audit.replay.x", "audit.loss", "$KV.KEEPER.LOGS", "$KV.TALLIES.LOGS.loki-0", "audit.x",
			"otlp.logs.as-2", "otlp.traces.as-2", "otlp.metrics.as-2", "otlp.logs.as-1", "penstock.jobs.as-1.table", "penstock.jobs.as-2.remove", "_INBOX_sink.x", "_INBOX_router.x",
			"$JS.API.STREAM.PURGE.LOGS", "$JS.API.STREAM.PURGE.TRACES", "$JS.API.STREAM.PURGE.SPANS", "$JS.API.STREAM.PURGE.DECISIONS",
			"$JS.API.STREAM.DELETE.LOGS", "$JS.API.CONSUMER.RESET.LOGS.loki-0", "$JS.API.CONSUMER.DELETE.LOGS.loki-0", "$JS.API.STREAM.CREATE.X", "$JS.API.STREAM.MSG.DELETE.LOGS", "$JS.ACK.LOGS.loki-0.1.1.1.1.0", "$JS.FC.LOGS.x", "$SYS.REQ.SERVER.PING", "_R_.x.y", "$GR.x", "_GR_.x", ">", "otlp.*.as-2")},
		{"headers", headers()},
		{"bodies", bodies()},
		{"floods", floods()},
		{"protocol", slices.Concat(
			each("", true, publishTo, "otlp.logs.as-1"), each("edge-as-9", true, publishTo, "otlp.logs.as-9"), each("$SYS", true, publishTo, "x"),
			each(as1, true, func(s string) string { return s }, "GARBAGE\r\n", "PUB otlp.logs.as-1\r\nx\r\n", "HPUB otlp.logs.as-1 30 10\r\n0123456789\r\n", "PUB otlp.logs.as-1 -5\r\n\r\n", "PUB otlp.logs.as-1 99999999999\r\n", "MSG otlp.logs.as-2 1 1\r\nx\r\n", "RMSG HUB otlp.logs.as-2 1\r\nx\r\n", "LS+ HUB otlp.logs.as-2\r\n", "A+ HUB\r\n", "RS+ HUB otlp.logs.>\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", strings.Repeat("A", 100_000)+"\r\n"),
			each(as1, true, func(s string) string { return pub("otlp.logs.as-1\r\nPUB otlp.logs.as-2", "", "", []byte(s)) }, "smuggled"),
			each(as1, false, func(s string) string {
				return "CONNECT {\"user\":\"" + s + "\",\"pass\":\"x\"}\r\n" + publishTo("otlp.logs.as-1")
			}, "sink", strings.Repeat("x", 900)))},
		{"the credential of a replay", slices.Concat(
			each("replay-as-1", true, publishTo, "$KV.REPLAYS.job.as-1.x", "$KV.REPLAYS.job._all.x", "$KV.REPLAYS.plan.x", "audit.replay.x", "otlp.logs.as-1", "otlp.logs.as-2", "$JS.API.INFO", "$JS.API.STREAM.INFO.KV_REPLAYS", "$JS.API.CONSUMER.CREATE.KV_REPLAYS.x", "$JS.API.DIRECT.GET.KV_REPLAYS.$KV.REPLAYS.job._all.x", "$JS.API.CONSUMER.RESET.LOGS.loki-0", "$JS.API.CONSUMER.MSG.NEXT.LOGS.loki-0", "penstock.jobs.as-2.table", "penstock.jobs.as-2.file", "penstock.jobs.*.table", "penstock.jobs.as-1"),
			each("replay-as-1", true, subscribeTo, ">", "penstock.jobs.>", "penstock.jobs.as-1.*", "_INBOX_sink.>", "_INBOX_as-1.>"),
			each("replay-as-1", false, func(reply string) string {
				return pub("penstock.jobs.as-1.table", reply, "", []byte("{}")) + pub("penstock.jobs.as-1.file", reply, "", []byte(`{"job":{"request":{"signals":["logs"],"instances":["as-2"],"from":{"seq":1},"to":{"seq":2}}}}`)) +
					pub("penstock.jobs.as-1.remove", reply, "", []byte(`{"id":"*"}`)) + pub("penstock.jobs.as-1.audit", reply, "", []byte(`{"id":">"}`)) + pub("penstock.jobs.as-1.x", reply, "", []byte(strings.Repeat("[", 50_000)))
			}, "_INBOX_replay-as-1.x", "$KV.REPLAYS.job._all.x", "$JS.API.CONSUMER.RESET.LOGS.loki-0", "otlp.logs.as-1", "otlp.logs.as-2", "audit.replay.x", "decisions.0"))},
		{"a router's credential", slices.Concat(
			each("router", true, publishTo, "$JS.API.CONSUMER.CREATE.LOGS.x", "$JS.API.CONSUMER.CREATE.METRICS.x", "$JS.API.CONSUMER.CREATE.DECISIONS.x", "$JS.API.CONSUMER.MSG.NEXT.LOGS.loki-0", "$JS.API.CONSUMER.MSG.NEXT.METRICS.file-0", "$JS.API.CONSUMER.RESET.LOGS.loki-0", "$JS.API.CONSUMER.UNPIN.LOGS.loki-0", "$JS.API.STREAM.MSG.GET.LOGS", "$JS.API.DIRECT.GET.LOGS", "$JS.API.STREAM.PURGE.LOGS", "$JS.API.STREAM.DELETE.LOGS", "$JS.API.STREAM.UPDATE.LOGS", "$KV.POLICIES.1", "$KV.POLICIES.domains.1", "$KV.REPLAYS.job._all.x", "$KV.MEMBERS.sink.x", "decisions.0", "replayed.x.0", "audit.replay.x", "audit.loss", "$KV.KEEPER.LOGS", "$KV.TALLIES.LOGS.loki-0", "$KV.TALLIES.SPANS.tempo-0", "$SYS.REQ.SERVER.PING"),
			// The server itself publishes the acknowledgement there: strict JSON refuses it.
			each("router", false, reflectTo, "$JS.API.STREAM.PURGE.LOGS", "$JS.API.STREAM.PURGE.TRACES", "$JS.API.STREAM.PURGE.SPANS", "$JS.API.STREAM.PURGE.DECISIONS"),
			each("router", true, subscribeTo, ">", "otlp.>", "_INBOX_sink.>", "$JS.>", "penstock.jobs.*.*"))},
		{"gateway", gatewayAttempts()},
		{"a tenant that the backends refuse", refusedTenant()}, // and stays refused
	}
}
