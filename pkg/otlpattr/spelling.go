package otlpattr

// The environment has two names in the semantic conventions: the stable one, and the previous one.
const (
	environment    = "deployment.environment.name"
	environmentOld = "deployment.environment"
)

// OtherSpelling returns the other name of an attribute that has two, or "".
func OtherSpelling(key []byte) string {
	switch string(key) {
	case environment:
		return environmentOld
	case environmentOld:
		return environment
	}
	return ""
}
