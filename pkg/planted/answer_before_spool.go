//go:build bug_answer_before_spool

package planted

func init() { AnswerBeforeSpool = true }
