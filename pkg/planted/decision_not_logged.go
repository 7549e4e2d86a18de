//go:build bug_decision_not_logged

package planted

func init() { DecisionNotLogged = true }
