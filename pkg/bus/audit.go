package bus

import (
	"context"

	"github.com/penstock/penstock/pkg/envelope"
)

// Record writes a line to the stream AUDIT, under audit.<what>. body is JSON.
func (c *Conn) Record(ctx context.Context, what string, body []byte) error {
	_, err := c.Publish(ctx, Message{Subject: "audit." + what, Header: envelope.Header{ContentType: envelope.ContentTypeJSON}, Body: body})
	return err
}

// Recorded returns the lines under audit.<what>, oldest first.
func (c *Conn) Recorded(ctx context.Context, what string) (lines [][]byte, err error) {
	r, err := c.OpenReaderOf(ctx, ReaderConfig{Stream: Audit, Filters: []string{"audit." + what}})
	if err != nil {
		return nil, err
	}
	defer r.Close()
	err = r.Each(ctx, func(d Delivery) bool {
		lines = append(lines, d.Body)
		return true
	})
	return lines, err
}
