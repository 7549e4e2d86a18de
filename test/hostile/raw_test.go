package hostile

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// raw is a connection to nats-server without a library.
type raw struct {
	conn net.Conn
	in   *bufio.Reader
}

// dialRaw connects; user may be empty. An error of the server's is in the answer.
func dialRaw(addr, user string) (*raw, string, error) {
	conn, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return nil, "", err
	}
	r := &raw{conn, bufio.NewReaderSize(conn, 1<<16)}
	answer := r.say(fmt.Sprintf("CONNECT {\"verbose\":false,\"pedantic\":false,\"headers\":true,\"no_responders\":true,\"user\":%q,\"pass\":%q}\r\n", user, password))
	return r, answer, nil
}

// say sends bytes and returns what the server answers until it has taken them all in, or has
// closed the connection.
func (r *raw) say(text string) string {
	_ = r.conn.SetDeadline(time.Now().Add(30 * time.Second))
	go func() { _, _ = io.WriteString(r.conn, text+"PING\r\n") }() // it may be refused half way
	var all strings.Builder
	for {
		line, err := r.in.ReadString('\n')
		if strings.HasPrefix(line, "PONG") {
			return all.String()
		}
		if all.Len() < 1<<16 {
			all.WriteString(line)
		}
		if err != nil {
			return all.String() + "closed"
		}
	}
}

func (r *raw) close() { _ = r.conn.Close() }

// pub is a message with a header, or without when that is empty, and a reply subject.
func pub(subject, reply, header string, body []byte) string {
	if reply != "" {
		reply = " " + reply
	}
	if header == "" {
		return fmt.Sprintf("PUB %s%s %d\r\n%s\r\n", subject, reply, len(body), body)
	}
	return fmt.Sprintf("HPUB %s%s %d %d\r\n%s%s\r\n", subject, reply, len(header), len(header)+len(body), header, body)
}
