//go:build !points

package planted

// Point is a place at which `make chaos-edge` kills a process that was built with
// -tags points. In others it is nothing.
func Point(string) {}

// During is a Point within what comes next.
func During(string) {}
