package bus

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/penstock/penstock/pkg/config"
	"github.com/penstock/penstock/pkg/envelope"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// Topology is how the hub's streams are created when they do not exist.
type Topology struct {
	// The number of partitions of every stream. It can never be changed for an existing stream,
	// because traces would be split.
	Partitions int `yaml:"partitions"`
	// The number of servers that store each message: 1 for a single server, 3 for a cluster.
	Replicas int `yaml:"replicas"`
	// How long TRACES, METRICS and LOGS keep messages for replays, as far as max_bytes has room for
	// them beside what some backend has not stored yet. Messages that a backend has not stored are
	// kept for any length of time.
	MaxAge time.Duration `yaml:"max_age"`
	// The size of each of TRACES, METRICS and LOGS; SPANS has half of it. A stream that is full of
	// what backends have not stored refuses more, and edges keep it.
	MaxBytes config.Bytes `yaml:"max_bytes"`
	// Which share of what backends have not stored yet on a stream one instance may have, once the stream is more
	// than half full of it and there are others: its edges and gateways are told to hold back what is beyond.
	// 1: any.
	InstanceShare float64 `yaml:"instance_share"`
}

// DefaultTopology suits one server.
func DefaultTopology() Topology {
	return Topology{Partitions: 8, Replicas: 1, MaxAge: 72 * time.Hour, MaxBytes: 16 << 30, InstanceShare: 0.5}
}

// Validate reports every mistake at once.
func (t Topology) Validate() error {
	var errs []error
	if t.Partitions < 1 || t.Partitions > 1024 {
		errs = append(errs, fmt.Errorf("streams.partitions is %d, want 1 to 1024", t.Partitions))
	}
	if t.Replicas < 1 || t.Replicas > 5 {
		errs = append(errs, fmt.Errorf("streams.replicas is %d, want 1 to 5", t.Replicas))
	}
	if t.MaxAge < time.Hour {
		errs = append(errs, fmt.Errorf("streams.max_age is %v, want at least 1h", t.MaxAge))
	}
	if !(t.InstanceShare > 0 && t.InstanceShare <= 1) {
		errs = append(errs, fmt.Errorf("streams.instance_share is %v, want more than 0 and up to 1", t.InstanceShare))
	}
	if t.MaxBytes < 32<<20 { // SPANS has half of it, and messages have up to 1 MiB
		errs = append(errs, fmt.Errorf("streams.max_bytes is %v, want at least 32MiB", t.MaxBytes))
	}
	return errors.Join(errs...)
}

// The streams of the hub. Those of the signals are named by [Stream].
const (
	Spans      = "SPANS"
	Decisions  = "DECISIONS"
	DeadLetter = "DEADLETTER"
	Audit      = "AUDIT"
	// Replayed has the decisions of replays: many in a short time, which must not push
	// out those of live traffic.
	Replayed = "REPLAYED"
)

const (
	auditAge = 365 * 24 * time.Hour

	// maxMessage is the largest message that penstock sends, with its header, in bytes.
	maxMessage = envelope.MaxPayload + 64<<10

	// duplicateWindow is for how long the hub recognises a message id. What a sender
	// that reconnects sends again within it is not stored twice.
	duplicateWindow = 2 * time.Minute
)

// Stream returns the name of a signal's stream.
func Stream(sig otlpwire.Signal) string { return strings.ToUpper(sig.String()) }

// StreamOf returns the name of the stream that a stored subject belongs to.
func StreamOf(subject string) string {
	kind, rest, _ := strings.Cut(subject, ".")
	if kind == "otlp" {
		kind, _, _ = strings.Cut(rest, ".")
	}
	return strings.ToUpper(kind)
}

// Subject returns where an instance publishes a signal.
func Subject(sig otlpwire.Signal, instance string) string {
	return "otlp." + sig.String() + "." + instance
}

// RouterLane begins the names of the consumers by which routers read TRACES.
const RouterLane = "router-"

// SpansSubject returns where routers publish the spans of a partition.
func SpansSubject(partition int) string { return "spans." + strconv.Itoa(partition) }

// DecisionsSubject returns where the sink that owns a partition of SPANS records
// its decisions.
func DecisionsSubject(partition int) string { return "decisions." + strconv.Itoa(partition) }

// ReplayedSubject returns where the owner of a lane of a replay records its decisions.
func ReplayedSubject(run string, partition int) string {
	return "replayed." + run + "." + strconv.Itoa(partition)
}

// replayLane begins the names of the consumers of replays.
const replayLane = "replay-"

// ReplayLane returns the name of the consumer by which a partition is replayed.
func ReplayLane(run string, partition int) string {
	return replayLane + run + "-" + strconv.Itoa(partition)
}

// PartitionFilter returns the subjects of a partition as a signal's stream
// stores them.
func PartitionFilter(sig otlpwire.Signal, partition int) string {
	return "otlp." + sig.String() + "." + strconv.Itoa(partition) + ".*"
}

// SubjectPartition returns the partition in a subject as a signal's stream stores it,
// otlp.<signal>.<partition>.<instance>, and the instance.
func SubjectPartition(subject string) (partition, instance string) {
	tokens := strings.Split(subject, ".")
	if len(tokens) != 4 {
		return "", ""
	}
	return tokens[2], tokens[3]
}

// consumers is how many consumers a stream may have, where nats-server's own bound is
// 1,000: a lane for each partition, of up to 16 backends and as many replays that run or
// are stopped, and temporary readers. It cannot be changed for an existing stream.
func (t Topology) consumers() int { return 32*t.Partitions + serverConsumers }

// serverConsumers is nats-server's own bound, which also stands for "not set".
const serverConsumers = 1000

// streams returns the configuration of every stream of the hub.
func (t Topology) streams() []jetstream.StreamConfig {
	base := jetstream.StreamConfig{
		Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardOld, Storage: jetstream.FileStorage, Replicas: t.Replicas,
		Duplicates: duplicateWindow, DenyDelete: true, DenyPurge: true,
		MaxConsumers: t.consumers(), MaxMsgSize: maxMessage,
	}
	// What some lane has not finished stays until a keeper removes it: a full stream refuses.
	owed := base
	owed.Discard, owed.DenyPurge = jetstream.DiscardNew, false
	var all []jetstream.StreamConfig
	for _, sig := range otlpwire.Signals {
		s := owed
		s.Name, s.Description = Stream(sig), "OTLP "+sig.String()+" as they came, one subject an instance"
		s.Subjects = []string{Subject(sig, "*")}
		s.SubjectTransform = &jetstream.SubjectTransformConfig{
			Source:      Subject(sig, "*"),
			Destination: fmt.Sprintf("otlp.%s.{{partition(%d,1)}}.{{wildcard(1)}}", sig, t.Partitions),
		}
		s.MaxBytes = int64(t.MaxBytes)
		all = append(all, s)
	}
	spans := owed
	spans.Name, spans.Description, spans.Subjects = Spans, "spans by trace, one subject a partition", []string{"spans.*", "replay.*.*"}
	spans.MaxBytes, spans.Metadata = int64(t.MaxBytes)/2, map[string]string{spreadKey: spreadByTrace}
	decisions := owed
	decisions.Name, decisions.Description, decisions.Subjects = Decisions, "sampling decisions, one subject a partition", []string{"decisions.*"}
	decisions.MaxBytes = int64(t.MaxBytes) / 16
	dead := base
	dead.Name, dead.Description, dead.Subjects = DeadLetter, "what a backend refused for good", []string{"dead.*.*"}
	dead.MaxBytes, dead.DenyDelete = int64(t.MaxBytes)/16, false // an operator may delete what has been dealt with
	aside := owed
	aside.Name, aside.Description, aside.Subjects = Aside, "what a backend refuses of some instances, until it takes it", []string{"aside.*.*.*.*"}
	aside.MaxBytes = int64(t.MaxBytes) / 8
	replayed := base
	replayed.Name, replayed.Description, replayed.Subjects = Replayed, "sampling decisions of replays", []string{"replayed.*.*"}
	replayed.MaxAge, replayed.MaxBytes = t.MaxAge, int64(t.MaxBytes)/16
	audit := base
	audit.Name, audit.Description, audit.Subjects = Audit, "operator audit log", []string{"audit.>"}
	audit.MaxAge, audit.MaxBytes = auditAge, int64(t.MaxBytes)/64
	return append(all, spans, decisions, dead, aside, replayed, audit)
}

// The metadata of SPANS that says how traces are spread over its partitions ([partition.Spread]). Streams of earlier
// versions have none: by instance and trace ID.
const (
	spreadKey     = "penstock_spread"
	spreadByTrace = "trace"
)

// EnsureHub creates the streams and the given buckets that do not exist yet. Those that exist are not
// changed; but subjects and number of partitions are checked: they must be the ones configured here.
func (c *Conn) EnsureHub(ctx context.Context, t Topology, buckets ...BucketConfig) error {
	for _, want := range t.streams() {
		err := c.ensureStream(ctx, want)
		if want.Name == Aside && willNotMake(err) {
			c.log.Warn("stream cannot be created: an instance that a backend refuses will hold up its lane", "stream", Aside, "err", err)
			continue
		}
		if err != nil {
			return err
		}
	}
	for _, want := range buckets {
		if _, err := c.OpenBucket(ctx, want, t.Replicas); err != nil {
			return err
		}
	}
	return nil
}

// noStorage is the server's error code where max_file_store has no room for a stream.
const noStorage = 10047

// willNotMake reports whether the server refuses to create a stream, also when it is asked again.
func willNotMake(err error) bool {
	refused, is := errors.AsType[*jetstream.APIError](err)
	return is && (refused.Code/100 == 4 || refused.ErrorCode == noStorage)
}

func (c *Conn) ensureStream(ctx context.Context, want jetstream.StreamConfig) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	s, err := c.js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		// Another process may create it at the same time; the same configuration is no error.
		if s, err = c.js.CreateStream(ctx, want); errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
			s, err = c.js.Stream(ctx, want.Name)
		}
	}
	if err != nil {
		return fmt.Errorf("stream %s: %w", want.Name, err)
	}
	have := s.CachedInfo().Config
	if w, h := transform(want), transform(have); w != h {
		return fmt.Errorf("%w: stream %s stores its subjects as %q, the configuration says %q: the number of partitions of a stream cannot change; set streams.partitions to what the stream has", errTopology, want.Name, h, w)
	}
	if w, h := strings.Join(want.Subjects, " "), strings.Join(have.Subjects, " "); w != h {
		return fmt.Errorf("%w: stream %s has the subjects %q, want %q", errTopology, want.Name, h, w)
	}
	if have.MaxConsumers <= 0 {
		have.MaxConsumers = serverConsumers
	}
	if twice := (want.MaxConsumers - serverConsumers) / 16; have.MaxConsumers < twice {
		c.log.Warn("stream of an older version: it allows fewer consumers than two for each partition, and lanes beyond that wait", "stream", want.Name, "max_consumers", have.MaxConsumers, "two_each", twice)
	}
	return nil
}

var errTopology = errors.New("the hub differs from the configuration")

// settled reports whether err will not go away by waiting.
func (c *Conn) settled(err error) bool {
	api, refused := errors.AsType[*jetstream.APIError](err)
	return errors.Is(err, errTopology) || (refused && api.Code/100 == 4)
}

func transform(s jetstream.StreamConfig) string {
	if s.SubjectTransform == nil {
		return ""
	}
	return s.SubjectTransform.Destination
}

var partitionsIn = regexp.MustCompile(`\{\{partition\((\d+),1\)\}\}`)

// Partitions returns the number of partitions that the hub's streams were created with.
func (c *Conn) Partitions(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	name := Stream(otlpwire.Traces)
	s, err := c.js.Stream(ctx, name)
	if err != nil {
		return 0, fmt.Errorf("partitions of stream %s: %w", name, err)
	}
	return storedPartitions(s.CachedInfo().Config)
}

// storedPartitions returns the number of partitions that a stream was created with.
func storedPartitions(s jetstream.StreamConfig) (int, error) {
	stored := transform(s)
	m := partitionsIn.FindStringSubmatch(stored)
	if m == nil {
		return 0, fmt.Errorf("%w: stream %s stores its subjects as %q", errTopology, s.Name, stored)
	}
	return strconv.Atoi(m[1])
}

// StreamState is what a stream holds.
type StreamState struct {
	Messages, Bytes, FirstSeq, LastSeq uint64
	FirstTime                          time.Time // when the first message was stored
	Created                            time.Time // if it changes, the same sequences have other messages
	After                              uint64    // of [Conn.Floors]: the last sequence when all lanes had been asked
	MaxBytes                           uint64    // its bound; 0 for none
	MaxMsgSize                         uint64    // of one message in bytes; 0 for none
	Partitions                         int       // that it was made with; 0 for a stream without any
	// ByTrace, of SPANS: its partitions have traces by their IDs alone; else by instance and ID.
	ByTrace bool
	// Kept: none of its messages may be deleted.
	Kept bool
	// Refuses: it stores nothing more when it is full.
	Refuses bool
	// Forgets names the settings by which it deletes messages by itself, or prevents a keeper
	// from removing them; empty for none.
	Forgets string
}

// Holes returns how many messages between the first and the last were deleted.
func (s StreamState) Holes() uint64 {
	all := s.LastSeq + 1 - min(s.FirstSeq, s.LastSeq+1)
	return all - min(s.Messages, all)
}

// Full reports whether the stream has no room for another message of the largest size.
func (s StreamState) Full() bool {
	return s.Refuses && s.MaxBytes > 0 && s.Bytes+maxMessage > s.MaxBytes
}

func stateOf(info *jetstream.StreamInfo) StreamState {
	st, cfg := info.State, info.Config
	s := StreamState{Messages: st.Msgs, Bytes: st.Bytes, FirstSeq: st.FirstSeq, LastSeq: st.LastSeq, FirstTime: st.FirstTime, Created: info.Created, MaxBytes: uint64(max(cfg.MaxBytes, 0)), MaxMsgSize: uint64(max(cfg.MaxMsgSize, 0)), Refuses: cfg.Discard == jetstream.DiscardNew, Kept: cfg.DenyDelete}
	s.Partitions, _ = storedPartitions(cfg)
	s.ByTrace = cfg.Metadata[spreadKey] == spreadByTrace
	var why []string
	for _, w := range []struct {
		is   bool
		what string
	}{
		{cfg.Discard == jetstream.DiscardOld, "discard: old"}, {cfg.MaxAge > 0, "max_age"}, {cfg.MaxMsgsPerSubject > 0, "max_msgs_per_subject"},
		{cfg.DenyPurge, "deny_purge"},
	} {
		if w.is {
			why = append(why, w.what)
		}
	}
	s.Forgets = strings.Join(why, ", ")
	return s
}

// State asks the stream's leader what it holds. [ErrNoStream]: there is no such stream.
func (c *Conn) State(ctx context.Context, stream string) (StreamState, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	s, err := c.js.Stream(ctx, stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		err = fmt.Errorf("%w: %w", ErrNoStream, err)
	}
	if err != nil {
		return StreamState{}, fmt.Errorf("state of stream %s: %w", stream, err)
	}
	return stateOf(s.CachedInfo()), nil
}

// SequenceAt returns the sequence of the first message that a stream stored at t or
// later, one more than its last when there is none.
func (c *Conn) SequenceAt(ctx context.Context, stream string, t time.Time) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	info, err := c.probe(ctx, stream, jetstream.ConsumerConfig{DeliverPolicy: jetstream.DeliverByStartTimePolicy, OptStartTime: &t})
	if err != nil {
		return 0, fmt.Errorf("look up %v in stream %s: %w", t, stream, err)
	}
	return info.Delivered.Stream + 1, nil
}

// probe returns what the server reports about a consumer that begins where cfg says.
func (c *Conn) probe(ctx context.Context, stream string, cfg jetstream.ConsumerConfig) (*jetstream.ConsumerInfo, error) {
	cfg.AckPolicy, cfg.InactiveThreshold, cfg.MemoryStorage, cfg.Replicas = jetstream.AckNonePolicy, readerIdle, true, 1
	cons, err := c.js.CreateConsumer(ctx, stream, cfg)
	if err != nil {
		return nil, err
	}
	info := cons.CachedInfo()
	_ = c.js.DeleteConsumer(ctx, stream, info.Name)
	return info, nil
}

// Subjects returns the subjects of a stream that a filter matches, and how many
// messages each has. [ErrNoStream]: there is no such stream.
func (c *Conn) Subjects(ctx context.Context, stream, filter string) (map[string]uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	s, err := c.js.Stream(ctx, stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		err = fmt.Errorf("%w: %w", ErrNoStream, err)
	}
	if err != nil {
		return nil, fmt.Errorf("subjects of stream %s: %w", stream, err)
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(filter))
	if err != nil {
		return nil, fmt.Errorf("subjects of stream %s: %w", stream, err)
	}
	return info.State.Subjects, nil
}
