package receive

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"log"
	"log/slog"
	"mime"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/penstock/penstock/pkg/failpoint"
	"github.com/penstock/penstock/pkg/ledger"
	"github.com/penstock/penstock/pkg/otlpwire"
)

const (
	typeProtobuf = "application/x-protobuf"
	typeJSON     = "application/json"

	headerTimeout = 5 * time.Second // from the connection, with TLS, to the end of the first header
	answerTimeout = 5 * time.Second // to send an answer, in addition to RequestTimeout
	idleTimeout   = 2 * time.Minute // between requests
)

type httpServer struct {
	srv *http.Server
	tls bool
}

func (r *Receiver) newHTTP(tlsConfig *tls.Config) *httpServer {
	// OTLP/HTTP needs no HTTP/2, and net/http's has had vulnerabilities (GO-2026-6617).
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &httpServer{tls: tlsConfig != nil, srv: &http.Server{
		Handler:           http.HandlerFunc(r.serveHTTP),
		TLSConfig:         tlsConfig,
		ReadHeaderTimeout: min(headerTimeout, r.cfg.RequestTimeout),
		ReadTimeout:       r.cfg.RequestTimeout,
		WriteTimeout:      r.cfg.RequestTimeout + answerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ConnState:         httpState,
		ErrorLog:          log.New(serverLog{r.deps.Log}, "", 0),
		Protocols:         protocols,
	}}
}

// serverLog logs net/http's messages, such as each failed handshake, at debug level, since a
// hostile sender must not fill our log.
type serverLog struct{ to *slog.Logger }

func (l serverLog) Write(line []byte) (int, error) {
	level := slog.LevelDebug
	if bytes.Contains(line, []byte("panic serving")) {
		level = slog.LevelError
	}
	l.to.Log(context.Background(), level, string(bytes.TrimSpace(line)))
	return len(line), nil
}

func (h *httpServer) serve(ln net.Listener) error {
	if h.tls {
		return h.srv.ServeTLS(ln, "", "")
	}
	return h.srv.Serve(ln)
}

func (h *httpServer) shutdown(ctx context.Context) {
	if h.srv.Shutdown(ctx) != nil {
		_ = h.srv.Close()
	}
}

// serveHTTP answers one OTLP/HTTP request. Paths are compared without normalisation:
// //v1/traces and /v1/%2e%2e/ are not found.
func (r *Receiver) serveHTTP(w http.ResponseWriter, req *http.Request) {
	name, ok := strings.CutPrefix(req.URL.EscapedPath(), "/v1/")
	sig, err := otlpwire.ParseSignal(name)
	if !ok || err != nil {
		http.Error(w, "no such path; OTLP is POST /v1/traces, /v1/metrics, /v1/logs", http.StatusNotFound)
		return
	}
	r.cfg.HTTP.CORS.allow(w, req)
	if req.Method == http.MethodOptions && req.Header.Get("Access-Control-Request-Method") != "" {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if req.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "method not allowed; OTLP requests use POST", http.StatusMethodNotAllowed)
		return
	}
	ctype, ok := contentType(req)
	if !ok {
		http.Error(w, "content type must be "+typeProtobuf+" or "+typeJSON+" (UTF-8)", http.StatusUnsupportedMediaType)
		return
	}
	out, ref := r.guarded(sig, http.ErrAbortHandler, func(held *holding) (outcome, *refusal) { return r.exportHTTP(held, req, sig, ctype) })
	if ref != nil {
		r.refused(sig, ref)
		writeRefusal(w, ctype, ref)
		return
	}
	w.Header().Set("Content-Type", ctype)
	answer := appendResponse(nil, out)
	if ctype == typeJSON {
		answer = jsonResponse(sig, out)
	}
	_, _ = w.Write(answer)
	failpoint.During("after-answer")
}

func contentType(req *http.Request) (string, bool) {
	vals := req.Header.Values("Content-Type")
	if len(vals) != 1 {
		return "", false
	}
	t, params, err := mime.ParseMediaType(vals[0])
	if err != nil || (t != typeProtobuf && t != typeJSON) {
		return "", false
	}
	cs, has := params["charset"]
	return t, !has || strings.EqualFold(cs, "utf-8")
}

func (r *Receiver) exportHTTP(held *holding, req *http.Request, sig otlpwire.Signal, ctype string) (outcome, *refusal) {
	auth := req.Header.Values("Authorization")
	if len(auth) != 1 {
		auth = []string{""}
	}
	if ref := r.begin(auth[0], req.TLS); ref != nil {
		return outcome{}, ref
	}
	ctx, cancel := context.WithTimeout(req.Context(), r.cfg.RequestTimeout)
	defer cancel()
	buf := r.buffer()
	defer r.recycle(buf)
	encoding := strings.ToLower(strings.Join(req.Header.Values("Content-Encoding"), ","))
	if ref := r.readBody(held, req.Body, encoding, req.ContentLength, buf); ref != nil {
		return outcome{}, ref
	}
	sender, ref := r.arrived(held, auth[0], req.TLS, len(*buf))
	if ref != nil {
		return outcome{}, ref
	}
	in := request{payload: *buf, size: len(*buf)}
	if ctype == typeJSON {
		conv := r.buffer()
		defer r.recycle(conv)
		unknown, ref := r.fromJSON(held, sig, conv, *buf)
		if ref != nil {
			return outcome{}, ref
		}
		in.payload, in.json, in.unknown = *conv, true, unknown
	}
	return r.take(ctx, sig, sender, r.origin(req.Header.Get), in)
}

// fromJSON converts a body. It returns an unknown name in it, if any.
func (r *Receiver) fromJSON(held *holding, sig otlpwire.Signal, conv *[]byte, body []byte) (unknown string, ref *refusal) {
	*conv = (*conv)[:0]
	if len(body) == 0 {
		return "", nil
	}
	size := max(cap(*conv), len(body)) // names are longer than lengths and tags
	if ref := held.admit(size); ref != nil {
		return "", ref
	}
	out, notes, err := otlpwire.ReadJSON(slices.Grow(*conv, len(body)), sig, body, r.limits)
	if err != nil {
		return "", refuse(codes.InvalidArgument, 400, ledger.RefusedMalformed, "%v", err)
	}
	*conv = out
	held.add(max(cap(out)-size, 0))
	r.deps.Ledger.Of(sig).Sanitised.Add(float64(notes.Sanitised))
	return notes.Unknown, nil
}

// appendResponse appends an Export*ServiceResponse; the three have the same
// fields. partial_success is left out when it is empty.
func appendResponse(dst []byte, out outcome) []byte {
	if out == (outcome{}) {
		return dst
	}
	var partial []byte
	if out.rejected > 0 {
		partial = protowire.AppendTag(partial, 1, protowire.VarintType)
		partial = protowire.AppendVarint(partial, uint64(out.rejected))
	}
	partial = protowire.AppendTag(partial, 2, protowire.BytesType)
	partial = protowire.AppendString(partial, out.message)
	dst = protowire.AppendTag(dst, 1, protowire.BytesType)
	return protowire.AppendBytes(dst, partial)
}

// rejectedNames are the JSON names of the count in partialSuccess.
var rejectedNames = [...]string{otlpwire.Traces: "rejectedSpans", otlpwire.Metrics: "rejectedDataPoints", otlpwire.Logs: "rejectedLogRecords"}

func jsonResponse(sig otlpwire.Signal, out outcome) []byte {
	if out == (outcome{}) {
		return []byte("{}")
	}
	return asJSON(map[string]any{"partialSuccess": map[string]string{
		rejectedNames[sig]: strconv.Itoa(out.rejected), "errorMessage": out.message,
	}})
}

// asJSON writes v without HTML escapes: <token> stays readable, and no browser shows it as HTML.
func asJSON(v any) []byte {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		panic("BUG: cannot encode an answer as JSON: " + err.Error())
	}
	return bytes.TrimSuffix(buf.Bytes(), []byte("\n"))
}

// writeRefusal writes a google.rpc.Status in the request's encoding.
func writeRefusal(w http.ResponseWriter, ctype string, ref *refusal) {
	h := w.Header()
	h.Set("Content-Type", ctype)
	if ref.retry > 0 {
		h.Set("Retry-After", strconv.Itoa(int((ref.retry+time.Second-1)/time.Second)))
	}
	if ref.status == http.StatusUnauthorized {
		h.Set("WWW-Authenticate", "Bearer")
	}
	w.WriteHeader(ref.status)
	if ctype == typeJSON {
		_, _ = w.Write(asJSON(map[string]any{"code": ref.code, "message": ref.text}))
		return
	}
	b := protowire.AppendTag(nil, 1, protowire.VarintType)
	b = protowire.AppendVarint(b, uint64(ref.code))
	b = protowire.AppendTag(b, 2, protowire.BytesType)
	_, _ = w.Write(protowire.AppendString(b, ref.text))
}
