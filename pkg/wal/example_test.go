package wal_test

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/penstock/penstock/pkg/wal"
)

// A record is appended, found again when the log is opened the next time, read, and released.
func Example() {
	dir, err := os.MkdirTemp("", "wal")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = os.RemoveAll(dir) }()
	cfg := wal.Config{Dir: dir, MaxBytes: 64 << 20, Sync: true}

	log, _, err := wal.Open(cfg)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, order := range []string{"tea", "cake"} {
		seq, err := log.Append([]byte("order: "), []byte(order)) // the parts of one record
		fmt.Println("appended", seq, err)
	}
	fmt.Println("closed", log.Close())

	log, report, err := wal.Open(cfg)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = log.Close() }()
	fmt.Println("opened with", report.Records, "records,", len(report.Damage), "damaged places")
	r := log.Read(log.State().First)
	defer r.Close()
	for range report.Records {
		rec, err := r.Next(context.Background())
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Printf("read %d: %s\n", rec.Seq, rec.Body)
	}

	fmt.Println("released", log.Release(1))
	state := log.State()
	fmt.Println("left", state.First, "to", state.Last)
	// Output:
	// appended 1 <nil>
	// appended 2 <nil>
	// closed <nil>
	// opened with 2 records, 0 damaged places
	// read 1: order: tea
	// read 2: order: cake
	// released <nil>
	// left 2 to 2
}

// Where MaxBytes would be exceeded nothing is appended, until something is released.
func ExampleLog_Append_full() {
	dir, err := os.MkdirTemp("", "wal")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = os.RemoveAll(dir) }()
	log, _, err := wal.Open(wal.Config{Dir: dir, MaxBytes: 3 << 20})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer func() { _ = log.Close() }()
	megabyte := make([]byte, 1<<20)
	for range 3 {
		seq, err := log.Append(megabyte)
		fmt.Println(seq, errors.Is(err, wal.ErrFull))
	}
	fmt.Println(log.Release(1))
	seq, err := log.Append(megabyte)
	fmt.Println(seq, err)
	// Output:
	// 1 false
	// 2 false
	// 0 true
	// <nil>
	// 3 <nil>
}
