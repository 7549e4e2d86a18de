// Command pushes turns OTLP log requests on its input into the bodies that penstock sends to
// Loki, on its output: for a module that cannot have penstock's dependencies beside Loki's.
//
//	in   4 bytes of length, a request; and so on
//	out  for each: 4 bytes with the number of bodies; of each 4 bytes of length, and itself
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"

	"github.com/penstock/penstock/pkg/backend/loki"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "pushes:", err)
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out io.Writer) error {
	var bodies [][]byte
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		bodies = append(bodies, body)
		w.WriteHeader(http.StatusNoContent)
	}))
	defer srv.Close()
	cfg := loki.DefaultConfig()
	cfg.URL = srv.URL
	if len(args) > 0 {
		cfg.Mode = args[0]
	}
	w, err := loki.New(cfg)
	if err != nil {
		return err
	}
	buffered := bufio.NewWriter(out)
	for {
		var size uint32
		if err := binary.Read(in, binary.BigEndian, &size); err != nil {
			if errors.Is(err, io.EOF) {
				return buffered.Flush()
			}
			return err
		}
		payload := make([]byte, size)
		if _, err := io.ReadFull(in, payload); err != nil {
			return err
		}
		bodies = bodies[:0]
		if err := w.Write(context.Background(), "as-1", payload); err != nil {
			return err
		}
		_ = binary.Write(buffered, binary.BigEndian, uint32(len(bodies)))
		for _, b := range bodies {
			_ = binary.Write(buffered, binary.BigEndian, uint32(len(b)))
			_, _ = buffered.Write(b) // Flush says what went wrong
		}
	}
}
