package membership

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// TestFinish: what a reader has begun may take HandOver longer than the reader, and no longer than it says.
func TestFinish(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		work, stop := Finish(ctx)
		defer stop()
		time.Sleep(time.Hour)
		if work.Err() != nil {
			t.Error("it ends before the reader")
		}
		ended := time.Now()
		cancel()
		<-work.Done()
		if took := time.Since(ended); took != HandOver {
			t.Errorf("it ends %v after the reader, want %v", took, HandOver)
		}

		ctx, cancel = context.WithCancel(t.Context())
		work, stop = Finish(ctx)
		cancel()
		time.Sleep(HandOver - 1)
		if work.Err() != nil {
			t.Error("it ends too early")
		}
		stop()
		synctest.Wait() // nothing of it is left, or the test fails
		if work.Err() == nil {
			t.Error("it goes on after stop")
		}

		// A reader that has not ended leaves nothing behind, either.
		work, stop = Finish(t.Context())
		stop()
		if work.Err() == nil {
			t.Error("it goes on after stop")
		}
	})
}
