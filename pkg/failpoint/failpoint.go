// Package failpoint has points at which a process can be made to fail: planted bugs, which `make chaos` and
// `make chaos-edge` must find, and places at which it is killed (docs/testing.md).
//
// In a default build every bug is the constant false and every place an empty function, so that the
// compiler removes them. Build with -tags failpoints, and name bugs in the environment variable
// PENSTOCK_FAILPOINTS, separated by commas, and a place in PENSTOCK_KILL_AT.
package failpoint
