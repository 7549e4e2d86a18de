package config

import "net"

// Loopback reports whether the host of an address is reachable only from this machine.
func Loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// Env sets *to if the variable is set and not empty.
func Env(getenv func(string) string, name string, to *string) {
	if v := getenv(name); v != "" {
		*to = v
	}
}
