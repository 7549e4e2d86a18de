package config

import (
	"fmt"
	"regexp"
	"strings"
	"time"
)

// Duration is a flag that is read by [ParseDuration].
type Duration time.Duration

// Set reads the flag.
func (d *Duration) Set(text string) error {
	v, err := ParseDuration(text)
	*d = Duration(v)
	return err
}

// String returns it in Go's format.
func (d *Duration) String() string { return time.Duration(*d).String() }

var (
	durationParts = regexp.MustCompile(`^[+-]?(([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h|d|w))+$`)
	durationPart  = regexp.MustCompile(`([0-9]+(\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h|d|w)`)
	noUnit        = regexp.MustCompile(`^[+-]?[0-9]+(\.[0-9]*)?$`)
)

// ParseDuration is time.ParseDuration with days and weeks, of 24 hours and 7 days.
func ParseDuration(text string) (sum time.Duration, err error) {
	if text == "0" {
		return 0, nil
	}
	if noUnit.MatchString(text) {
		return 0, fmt.Errorf("%s has no unit; write 5s, 200ms or 1m", text)
	}
	wrong := fmt.Errorf("%q is not a duration; write 200ms, 5s, 1m30s, 12h, 3d or 2w", text)
	if !durationParts.MatchString(text) {
		return 0, wrong
	}
	for _, part := range durationPart.FindAllString(text, -1) {
		times := time.Duration(1)
		if days, is := strings.CutSuffix(part, "d"); is {
			part, times = days+"h", 24
		} else if weeks, is := strings.CutSuffix(part, "w"); is {
			part, times = weeks+"h", 7*24
		}
		d, err := time.ParseDuration(part)
		if err != nil || d*times/times != d || sum+d*times < sum {
			return 0, wrong // more than 292 years
		}
		sum += d * times
	}
	if text[0] == '-' {
		sum = -sum
	}
	return sum, nil
}
