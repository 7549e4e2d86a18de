package loki

import (
	"bytes"
	"strconv"

	"github.com/penstock/penstock/pkg/otlpattr"
	"github.com/penstock/penstock/pkg/otlpwire"
)

// levels are the names of the severity ranges of the OpenTelemetry log model,
// four numbers each.
var levels = [...]string{"trace", "debug", "info", "warn", "error", "fatal"}

// The levels by number; 0 is unknown.
const (
	trace = iota + 1
	debug
	info
	warn
	failed
	fatal
)

// spellings are the loggers' names for severities, in lower case and without the digit at the end of
// those of the log model (ERROR2). Where the log model has an example it is followed: syslog's notice is
// INFO2, FINE of java.util.logging DEBUG2, Verbose of Windows DEBUG, panic of zap ERROR3. Critical is
// ERROR2 for syslog and FATAL for .NET and Python.
var spellings = map[string]int{
	"trace": trace, "trc": trace, "trce": trace, "t": trace, "finest": trace, "silly": trace,
	"debug": debug, "dbg": debug, "dbug": debug, "deb": debug, "d": debug, "finer": debug, "fine": debug, "config": debug, "verbose": debug, "verb": debug, "vrb": debug, "v": debug,
	"info": info, "inf": info, "i": info, "information": info, "informational": info, "notice": info, "note": info, "n": info, "success": info, "log": info,
	"warn": warn, "warning": warn, "wrn": warn, "wrning": warn, "w": warn,
	"error": failed, "err": failed, "eror": failed, "e": failed, "severe": failed, "fail": failed, "failure": failed, "alert": failed, "panic": failed, "dpanic": failed,
	"fatal": fatal, "ftl": fatal, "fata": fatal, "f": fatal, "critical": fatal, "crit": fatal, "c": fatal, "emergency": fatal, "emerg": fatal,
}

// levelKeys are the keys under which loggers write the severity, in lower case and without
// separators, the best first: some write it as a text and as a number.
var levelKeys = []string{"severitytext", "levelname", "level", "severity", "loglevel", "lvl", "@level", "@l", "severitynumber", "levelno"}

// level is the severity of a record in Loki's terms, an index of levels plus one: from its number, else
// from its text, else from an attribute, else from its body, else 0, unknown. attributes calls its
// argument with the record's attributes.
func level(number uint64, text, body []byte, attributes func(func(key, value []byte))) int {
	if l := bySeverityNumber(float64(number)); l != 0 {
		return l
	}
	if l := known(text); l != 0 {
		return l
	}
	var found finding
	attributes(func(key, value []byte) { found.add(key, value, false) })
	if l := found.level(); l != 0 {
		return l
	}
	switch v := otlpwire.ParseValue(body); v.Kind {
	case otlpwire.Map:
		found.addMap(v.Str, false)
	case otlpwire.String:
		found.addText(v.Str)
	}
	return found.level()
}

// finding is the severities found in a record: a level for each of levelKeys.
type finding [10]int

func (f *finding) level() int {
	for _, l := range f {
		if l != 0 {
			return l
		}
	}
	return 0
}

// set records the value of a key; the first of several counts.
func (f *finding) set(key, value []byte) {
	var buf [16]byte
	if len(key) > len(buf) {
		return
	}
	n := 0
	for _, c := range key {
		if c != '.' && c != '_' && c != '-' {
			buf[n] = lower(c)
			n++
		}
	}
	for i, k := range levelKeys {
		if k == string(buf[:n]) && f[i] == 0 {
			if f[i] = known(value); f[i] == 0 && len(value) <= maxSpelling {
				v, _ := strconv.ParseFloat(string(bytes.TrimSpace(value)), 64)
				f[i] = byNumber(k, v)
			}
		}
	}
}

func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// add records an attribute; an inner one is in the map log.
func (f *finding) add(key, value []byte, inner bool) {
	switch v := otlpwire.ParseValue(value); v.Kind {
	case otlpwire.String:
		f.set(key, v.Str)
	case otlpwire.Int, otlpwire.Double:
		var buf [32]byte
		f.set(key, otlpattr.Append(buf[:0], value))
	case otlpwire.Map:
		if string(key) == "log" && !inner { // of the Elastic Common Schema: {"log":{"level":"error"}}
			f.addMap(v.Str, true)
		}
	}
}

// addMap records the values of a map.
func (f *finding) addMap(content []byte, inner bool) {
	for i := 0; i < len(content); {
		var kv otlpwire.Field
		if kv, i = otlpwire.NextField(content, i); kv.Tag == otlpwire.Tag(1, otlpwire.Bytes) {
			key, value := otlpwire.Attribute(kv.Bytes)
			f.add(key, value, inner)
		}
	}
}

// addText records the severities in a line of JSON, or of key=value pairs.
func (f *finding) addText(line []byte) {
	line = bytes.TrimLeft(line, " \t\r\n")
	if len(line) > 0 && line[0] == '{' {
		f.addJSON(line, false)
		return
	}
	line = line[:min(len(line), maxPairsText)]
	for first := true; len(line) > 0; first = false {
		word := line
		if end := bytes.IndexByte(line, ' '); end >= 0 {
			word, line = line[:end], bytes.TrimLeft(line[end:], " ")
		} else {
			line = nil
		}
		key, value, ok := bytes.Cut(word, []byte("="))
		if !ok && first {
			return // not key=value pairs: prose may contain level=debug, too
		}
		f.set(key, bytes.Trim(value, `"`))
	}
}

// addJSON records the values of an object, as far as it can be parsed; nested ones only of log.
func (f *finding) addJSON(object []byte, inner bool) {
	eachMember(object, func(key, value []byte) {
		switch {
		case value[0] == '{' && string(key) == "log" && !inner:
			f.addJSON(value, true)
		case value[0] == '"':
			f.set(key, value[1:len(value)-1])
		case value[0] != '{' && value[0] != '[':
			f.set(key, value)
		}
	})
}

// eachMember calls visit with the members of a JSON object, unparsed, until it meets invalid JSON; keys
// without their quotes.
func eachMember(object []byte, visit func(key, value []byte)) {
	const blank = " \t\r\n"
	rest := object[1:]
	for {
		rest = bytes.TrimLeft(rest, blank+",")
		key := jsonValue(rest)
		if len(key) < 2 || key[0] != '"' {
			return
		}
		rest = bytes.TrimLeft(rest[len(key):], blank)
		if len(rest) == 0 || rest[0] != ':' {
			return
		}
		rest = bytes.TrimLeft(rest[1:], blank)
		value := jsonValue(rest)
		if len(value) == 0 {
			return
		}
		visit(key[1:len(key)-1], value)
		rest = rest[len(value):]
	}
}

// jsonValue returns the value at the beginning of text; nil if it has no end.
func jsonValue(text []byte) []byte {
	depth := 0
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == '"':
			if i = closingQuote(text, i); i == len(text) {
				return nil
			}
		case c == '{' || c == '[':
			depth++
			continue
		case depth == 0 && endsAtom(c):
			return text[:i]
		case c == '}' || c == ']':
			depth--
		default:
			continue
		}
		if depth == 0 {
			return text[:i+1]
		}
	}
	return nil
}

// closingQuote returns where the string ends that begins at i, len(text) when it does not.
func closingQuote(text []byte, i int) int {
	for i++; i < len(text); i++ {
		switch text[i] {
		case '\\':
			i++
		case '"':
			return i
		}
	}
	return len(text)
}

// endsAtom reports whether c comes behind a number, true, false or null, and is no part of it.
func endsAtom(c byte) bool {
	return c == ',' || c == ':' || c == '}' || c == ']' || c <= ' '
}

const (
	maxSpelling  = 64   // bytes of a severity
	maxPairsText = 1024 // bytes of a line of key=value pairs that are searched
)

func levelName(level int) string {
	if level == 0 {
		return "unknown"
	}
	return levels[level-1]
}

// known maps the spellings of a severity to its level, and others to 0: the number of a label's values
// must be bounded.
func known(text []byte) int {
	var buf [maxSpelling]byte
	if text = bytes.Trim(text, " \t\r\n[]()<>:\"'"); len(text) > len(buf) {
		return 0
	}
	for i, c := range text {
		buf[i] = lower(c)
	}
	t := bytes.TrimPrefix(buf[:len(text)], []byte("loglevel."))
	if l := spellings[string(t)]; l != 0 || len(t) < 4 {
		return l
	}
	if last := t[len(t)-1]; last >= '1' && last <= '5' { // ERROR2; PostgreSQL has DEBUG5
		return spellings[string(t[:len(t)-1])]
	}
	return 0
}

// byNumber is the level of a number under a key.
func byNumber(key string, n float64) int {
	switch {
	case key == "severitynumber":
		return bySeverityNumber(n)
	case !(n >= 10 && n < 100): // syslog's, Android's and others contradict each other
		return 0
	case key == "levelno": // Python has no trace
		return min(int(n)/10+1, fatal)
	}
	return min(int(n)/10, fatal) // pino, bunyan
}

// bySeverityNumber is the level of a number of the log model.
func bySeverityNumber(n float64) int {
	if n >= 1 && n <= 24 {
		return int(n-1)/4 + 1
	}
	return 0
}
