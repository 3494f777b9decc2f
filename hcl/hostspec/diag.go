package hostspec

import (
	"fmt"
	"strings"

	"github.com/hashicorp/hcl/v2"

	"github.com/fleetingd/fleetingd/appliance/suggest"
)

// errorf adds an error. The summary names the problem, the detail gives the
// value, the reason and the cure.
func (l *loader) errorf(at *hcl.Range, summary, detail string, args ...any) {
	l.diags = append(l.diags, &hcl.Diagnostic{
		Severity: hcl.DiagError,
		Summary:  summary,
		Detail:   withoutStop(fmt.Sprintf(detail, args...)),
		Subject:  at,
	})
}

// warnf adds a warning: the spec is valid, but hardly what was meant.
func (l *loader) warnf(at *hcl.Range, summary, detail string, args ...any) {
	l.errorf(at, summary, detail, args...)
	l.diags[len(l.diags)-1].Severity = hcl.DiagWarning
}

// maxCompared is how many names one load compares to find suggestions. Without a limit, a spec of 1 MiB in which every name is
// wrong would take minutes.
const maxCompared = 20_000

// nearest returns the known name that a typo of given most likely stands for, or "".
func (l *loader) nearest(given string, known []string) string {
	if l.compared > maxCompared {
		return ""
	}
	l.compared += len(known)
	return suggest.Nearest(given, known)
}

// didYouMean is nearest as a part of a message.
func (l *loader) didYouMean(given string, known []string) string {
	if s := l.nearest(given, known); s != "" {
		return fmt.Sprintf(" (did you mean %q?)", s)
	}
	return ""
}

// quotedList is `"a", "b" and "c"`, cut where it gets long.
func quotedList(names []string) string {
	const most = 12
	var more string
	if len(names) > most {
		more = fmt.Sprintf(" and %d more", len(names)-most)
		names = names[:most]
	}
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = fmt.Sprintf("%q", n)
	}
	if more == "" {
		return and(quoted)
	}
	return strings.Join(quoted, ", ") + more
}

// and joins the parts of a sentence: "a, b and c".
func and(parts []string) string {
	if len(parts) < 2 {
		return strings.Join(parts, "")
	}
	last := len(parts) - 1
	return strings.Join(parts[:last], ", ") + " and " + parts[last]
}

// quote shows a value in a message: in quotes, control characters escaped, and not too long.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		return fmt.Sprintf("%q…", strings.ToValidUTF8(s[:most], ""))
	}
	return fmt.Sprintf("%q", s)
}
