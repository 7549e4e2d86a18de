package bus

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
)

var fenced = BucketConfig{Name: "FENCED", Description: "a bucket of a test", Fenced: true, MaxBytes: 1 << 20, MaxValue: 64 << 10}

func TestBucket(t *testing.T) {
	c := testHub(t, testBroker(t), 1)
	b, err := c.OpenBucket(t.Context(), fenced, 1)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	if _, _, err := b.Get(ctx, "a.b"); !errors.Is(err, ErrMissing) {
		t.Errorf("get: %v", err)
	}
	if err := b.Create(ctx, "a.b", []byte("1")); err != nil {
		t.Error(err)
	}
	if err := b.Create(ctx, "a.b", []byte("2")); !errors.Is(err, ErrExists) {
		t.Errorf("create twice: %v", err)
	}
	v, rev, err := b.Get(ctx, "a.b")
	if err != nil || string(v) != "1" {
		t.Errorf("%q, %v", v, err)
	}
	if _, err := b.Store(ctx, "a.b", []byte("3"), rev); err != nil {
		t.Error(err)
	}
	if _, err := b.Store(ctx, "a.b", []byte("4"), rev); !errors.Is(err, ErrChanged) {
		t.Errorf("update of an old revision: %v", err)
	}
	if err := b.Create(ctx, "c", []byte("5")); err != nil {
		t.Error(err)
	}
	for range 50 { // each ends a watch
		if all, err := b.All(ctx); err != nil || len(all) != 2 || string(all["a.b"]) != "3" {
			t.Fatalf("%q, %v", all, err)
		}
	}
	seen := make(chan string, 10)
	watching, stop := context.WithCancel(ctx)
	done := make(chan error)
	go func() {
		done <- b.Watch(watching, ">", func(key string, value []byte) { seen <- key + "=" + string(value) })
	}()
	expect := func(want ...string) {
		t.Helper()
		for _, w := range want {
			if got := <-seen; got != w {
				t.Errorf("seen %q, want %q", got, w)
			}
		}
	}
	expect("a.b=3", "c=5", "=")
	if err := b.Delete(ctx, "c"); err != nil {
		t.Error(err)
	}
	expect("c=")
	if err := b.Create(ctx, "c", []byte("6")); err != nil {
		t.Errorf("create what was deleted: %v", err)
	}
	expect("c=6")
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestNobodyDeletesAll: a credential that may write one key cannot purge the bucket.
func TestNobodyDeletesAll(t *testing.T) {
	c := testHub(t, testBroker(t), 1)
	b, err := c.OpenBucket(t.Context(), fenced, 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(b.Create(t.Context(), "job.as-1.a", []byte("1")), b.Create(t.Context(), "job.as-2.b", []byte("2"))); err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"all", "sub"} {
		m := nats.NewMsg("$KV.FENCED.job.as-1.a")
		m.Header.Set("Nats-Rollup", what)
		if _, err := c.js.PublishMsg(t.Context(), m); err == nil {
			t.Errorf("rollup %s is taken", what)
		}
	}
	if err := b.Create(t.Context(), "job.as-1.c", make([]byte, fenced.MaxValue+1)); err == nil {
		t.Error("a value of any size is taken")
	}
	if all, err := b.All(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("%d keys are left, %v", len(all), err)
	}
	next, err := b.Store(t.Context(), "lane.x", []byte("1"), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Store(t.Context(), "lane.x", []byte("2"), 0); !errors.Is(err, ErrExists) {
		t.Errorf("stored as new twice: %v", err)
	}
	if _, err := b.Store(t.Context(), "lane.x", []byte("2"), next); err != nil {
		t.Error(err)
	}
	if _, err := b.Store(t.Context(), "lane.x", []byte("3"), next); !errors.Is(err, ErrChanged) {
		t.Errorf("stored under an old revision: %v", err)
	}
}

// TestABucketThatCannotBeCreated says who creates it.
func TestABucketThatCannotBeCreated(t *testing.T) {
	c := testHub(t, testBroker(t), 1)
	large := BucketConfig{Name: "LARGE", MaxBytes: 1 << 60} // more than any hub has
	if _, err := c.OpenBucket(t.Context(), large, 1); err == nil || !strings.Contains(err.Error(), "routers and sinks create theirs") || !strings.Contains(err.Error(), "LARGE") {
		t.Errorf("got %v", err)
	}
	if _, err := c.OpenBucket(t.Context(), fenced, 1); err != nil {
		t.Error(err)
	}
}
