package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/s2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip" // what a collector sends by default

	"github.com/penstock/penstock/pkg/broker"
	"github.com/penstock/penstock/pkg/bus"
	"github.com/penstock/penstock/pkg/otlpgrpc"
	"github.com/penstock/penstock/pkg/otlpwire"
)

const (
	childFlag = "-child" // then the role and its arguments
	readyLine = "ready\n"

	roleHub     = "hub"
	roleDiscard = "discard"
	roleLimit   = "limit"
)

// child is this program in another role: what stands behind edge and collector, or the
// limit. Each is a process, so that nobody's CPU time is counted as another's. It ends
// when its standard input does, which is when the bench has ended.
func child(args []string) int {
	var err error
	switch role := args[0]; {
	case role == roleHub && len(args) == 5:
		err = runHub(args[1], args[2], hubKind{whole: args[3] == "true", fsync: args[4] == "true"})
	case role == roleDiscard && len(args) == 2:
		err = runDiscard(args[1])
	case role == roleLimit && len(args) == 5:
		err = runLimit(args[1], args[2], args[3], args[4])
	default:
		err = fmt.Errorf("unknown role %q", args)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// answer says that the child is ready, then answers every line with a number.
func answer(count func() int) {
	fmt.Print(readyLine)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		fmt.Println(count())
	}
}

// hubKind is how a hub stores.
type hubKind struct {
	whole bool // keeps everything; otherwise the oldest messages go
	fsync bool
}

func (k hubKind) topology() bus.Topology {
	t := bus.DefaultTopology()
	if t.MaxBytes = 4 << 30; k.whole { // nothing is removed: a full stream would refuse
		t.MaxBytes = 1 << 40
	}
	return t
}

// startHub starts a hub in a new process; its streams are there.
func (b *bench) startHub(ctx context.Context, dir, addr string, k hubKind) (*process, error) {
	return b.startChild(ctx, roleHub, dir, addr, strconv.FormatBool(k.whole), strconv.FormatBool(k.fsync))
}

// runHub is a hub with its streams.
func runHub(dir, addr string, k hubKind) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	b, err := broker.Start(broker.Config{Name: "hub", Dir: dir, Listen: addr, Sync: k.fsync, MaxPayload: 8 << 20}, log)
	if err != nil {
		return err
	}
	defer b.Stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	conn, err := bus.OpenHub(ctx, bus.Config{Name: "bench", InProcess: b}, k.topology(), log)
	if err != nil {
		return fmt.Errorf("make the hub's streams: %w", err)
	}
	defer conn.Close()
	answer(func() int { return 0 })
	return nil
}

// runDiscard is a server that counts spans and forgets them.
func runDiscard(addr string) error {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	var spans atomic.Int64
	srv := grpc.NewServer(grpc.ForceServerCodecV2(otlpgrpc.Codec{}), grpc.MaxRecvMsgSize(1<<30))
	srv.RegisterService(&grpc.ServiceDesc{
		ServiceName: otlpgrpc.Service(otlpwire.Traces),
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Export", Handler: func(_ any, _ context.Context, read func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			var body []byte
			if err := read(&body); err != nil {
				return nil, err
			}
			spans.Add(int64(otlpwire.Count(otlpwire.Traces, body)))
			return []byte{}, nil
		}}},
	}, nil)
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(ln) }()
	answer(func() int { return int(spans.Load()) })
	srv.Stop()
	return <-failed
}

func init() { encoding.RegisterCompressor(snappy{}) }

// snappy lets the server take what the collector's exporter calls so.
type snappy struct{}

func (snappy) Name() string { return "snappy" }

func (snappy) Compress(w io.Writer) (io.WriteCloser, error) {
	return s2.NewWriter(w, s2.WriterSnappyCompat(), s2.WriterConcurrency(1)), nil
}

func (snappy) Decompress(r io.Reader) (io.Reader, error) {
	return s2.NewReader(r, s2.ReaderMaxBlockSize(64<<10)), nil
}
