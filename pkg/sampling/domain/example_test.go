package domain_test

import (
	"fmt"

	"github.com/penstock/penstock/pkg/sampling/domain"
)

// Traces that begin at sequence 1000 or later may have spans of all instances of acme.
func ExampleVersions_Of() {
	acme := domain.New(domain.Config{{Name: "acme", Instances: []string{"acme-*", "portal"}}})
	all := domain.Versions{{Number: 1, From: 1000, Set: acme}}
	fmt.Println(all.Of("portal", 999))
	fmt.Println(all.Of("portal", 1000))
	fmt.Println(all.Of("bank", 1000))
	// Output:
	// portal []
	// @acme [portal]
	// bank []
}
