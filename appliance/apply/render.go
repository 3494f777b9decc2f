package apply

import (
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/aymanbagabas/go-udiff"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/visible"
)

// View says how a change is shown to people.
type View struct {
	Spec  string // the spec's file, for the first line; "" if there is none
	Color bool
}

// maxDiff is the most lines of a file's diff that are shown.
const maxDiff = 40

// Render writes a change as a tree that a person can scan. It shows no secret.
func (c *Change) Render(w io.Writer, v View) error {
	r := &renderer{view: v}
	r.title(c)
	for _, word := range c.Words() {
		r.line(sign(word.Action), strings.TrimSpace(word.Kind+" "+word.Name), word.Origin, word.Text)
	}
	for _, s := range slices.Concat(c.Steps, c.last) {
		r.step(s)
	}
	r.unchanged(c)
	_, err := io.WriteString(w, r.b.String())
	return err
}

// Words is what changes between the current plan and the new one, in words.
func (c *Change) Words() []Word {
	if c.Current == nil {
		return Words(nil, c.Plan)
	}
	return Words(c.Current.Plan, c.Plan)
}

type renderer struct {
	b    strings.Builder
	view View
}

var colors = map[string]string{"+": "\x1b[32m", "-": "\x1b[31m", "~": "\x1b[33m", "!": "\x1b[36m"}

func (r *renderer) paint(sign, text string) string {
	if c, ok := colors[sign]; ok && r.view.Color {
		return c + text + "\x1b[0m"
	}
	return text
}

func (r *renderer) title(c *Change) {
	switch {
	case c.Plan == nil:
		fmt.Fprintf(&r.b, "fleetingd will leave %s as it was before the first apply:\n\n", visible.Text(c.Current.Plan.Host))
		return
	case c.Empty():
		fmt.Fprintf(&r.b, "%s is what the plan says (plan %.6s, generation %d): nothing to do\n", visible.Text(c.Plan.Host), c.Digest, c.Current.Number)
		return
	}
	what := "the plan"
	if r.view.Spec != "" {
		what = visible.Text(r.view.Spec)
	}
	now := "nothing of it is there yet"
	if c.Current != nil {
		now = fmt.Sprintf("now %.6s", c.Current.Digest)
	}
	fmt.Fprintf(&r.b, "fleetingd will make %s what %s says (plan %.6s, %s):\n\n", visible.Text(c.Plan.Host), what, c.Digest, now)
}

// line is one row: a sign, an object, its line in the spec, and what happens to it.
func (r *renderer) line(sign, object, origin, text string) {
	row := fmt.Sprintf("%-42s %-14s %s", visible.Text(object), visible.Text(origin), visible.Text(text))
	fmt.Fprintf(&r.b, "  %s %s\n", r.paint(sign, sign), strings.TrimRight(row, " "))
}

func (r *renderer) step(s Step) {
	if isAction(s.Kind) {
		if text := actionText(s); text != "" {
			r.line("!", text, "", "")
		}
		return
	}
	r.line(stepSign(s), describe(s.Object), s.Origin, strings.Join(slices.DeleteFunc([]string{stepText(s), s.Conflict.text()},
		func(t string) bool { return t == "" }), "; "))
	for _, line := range r.diff(s) {
		sign := line[:1]
		fmt.Fprintf(&r.b, "      %s\n", r.paint(sign, visible.Text(line)))
	}
}

func (c Conflict) text() string {
	switch c {
	case Drift:
		return "DRIFT: changed by somebody else"
	case Foreign:
		return "FOREIGN: was there before fleetingd"
	}
	return ""
}

// actionText says what an action does; "" for one that nobody needs to know of.
func actionText(s Step) string {
	if s.After["do"] != "yes" {
		return ""
	}
	switch s.Kind {
	case KindRestart:
		if s.Name == runnerUnit {
			return "restart " + s.Name + " once its running jobs have ended"
		}
		return "restart " + s.Name
	case KindEmpty:
		return "remove what is in " + s.Name
	case KindEnd:
		return "end what still runs in " + s.Name
	}
	return ""
}

func sign(action string) string {
	switch action {
	case create:
		return "+"
	case remove:
		return "-"
	}
	return "~"
}

// action is the JSON's word for a step.
func (s Step) action() string {
	switch {
	case isAction(s.Kind):
		return "run"
	case s.Before == nil:
		return create
	case s.After == nil:
		return remove
	}
	return update
}

func stepSign(s Step) string { return sign(s.action()) }

// contents are the keys of a State that are shown as a diff, if at all.
var contents = []string{"content", "base64"}

// stepText says what a step does, but for contents.
func stepText(s Step) string {
	switch {
	case s.Kind == KindNetwork:
		return networkText(s)
	case s.Kind == host.KindUnit:
		return unitText(s)
	case s.Kind == host.KindDiskImage && s.After != nil:
		return changes(change("size", sizeText(s.Before), sizeText(s.After)))
	case s.Before == nil || s.After == nil:
		if s.After["value"] != "" {
			return s.After["value"]
		}
		return ""
	}
	var text []string
	for _, key := range slices.Sorted(maps.Keys(s.After)) {
		if !slices.Contains(contents, key) && s.Before[key] != s.After[key] {
			text = append(text, change(key, s.Before[key], s.After[key]))
		}
	}
	return strings.Join(text, ", ")
}

func sizeText(s host.State) string {
	var n int64
	if _, err := fmt.Sscan(s["size"], &n); err != nil {
		return "none"
	}
	return size(n)
}

func networkText(s Step) string {
	switch {
	case s.After == nil:
		return "links, routes and firewall go"
	case s.Before == nil:
		return "links, routes and firewall"
	case s.Before["differs"] != "":
		lines := strings.Split(s.Before["differs"], "\n")
		if len(lines) > 1 {
			return fmt.Sprintf("%s, and %d more", lines[0], len(lines)-1)
		}
		return lines[0]
	}
	return "only what differs is changed"
}

func unitText(s Step) string {
	if s.After == nil {
		return "stop and disable"
	}
	var text []string
	if s.Before["enablement"] != s.After["enablement"] {
		text = append(text, map[string]string{"enabled": "enable", "disabled": "disable"}[s.After["enablement"]])
	}
	if s.Before["active"] != s.After["active"] && (s.Before != nil || s.After["active"] == "active") {
		text = append(text, map[string]string{"active": "start", "inactive": "stop"}[s.After["active"]])
	}
	return strings.Join(slices.DeleteFunc(text, func(t string) bool { return t == "" }), " and ")
}

var secretPlace = regexp.MustCompile(`@SECRET:[A-Za-z0-9._:-]*@`)

// masked is a text for people: the place of a secret is no text that anybody could mistake for one.
func masked(text string) string { return secretPlace.ReplaceAllString(text, "(secret)") }

// Diff returns the unified diff of a file's content, without its head; "" where there is none that people read. A secret that changes shows as
// changed, and neither as itself nor as a digest.
func (s Step) Diff() string {
	before, hadText := s.Before["content"]
	after, hasText := s.After["content"]
	// What plan.json says differently is said in words.
	if !hadText || !hasText || before == after || s.Name == plan.Path {
		return ""
	}
	before, after = masked(before), masked(after)
	if before == after { // another secret in the same place
		return ""
	}
	_, text, _ := strings.Cut(udiff.Unified("a", "b", before, after), "\n+++ b\n")
	return text
}

// diff is what of it is shown.
func (r *renderer) diff(s Step) []string {
	text := s.Diff()
	if text == "" {
		return nil
	}
	var lines []string
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if line != "" && !strings.HasPrefix(line, "@@") && !strings.HasPrefix(line, `\`) && line[0] != ' ' {
			lines = append(lines, line[:1]+" "+line[1:])
		}
	}
	if len(lines) > maxDiff {
		lines = append(lines[:maxDiff], fmt.Sprintf("… %d lines more (--json shows all)", len(lines)-maxDiff))
	}
	return lines
}

// unchanged is the last line.
func (r *renderer) unchanged(c *Change) {
	if c.Empty() || c.Plan == nil {
		return
	}
	var parts []string
	for _, kind := range slices.Sorted(maps.Keys(c.Unchanged)) {
		if n := c.Unchanged[kind]; n > 0 {
			parts = append(parts, count(n, strings.ReplaceAll(string(kind), "-", " ")))
		}
	}
	if len(parts) > 0 {
		fmt.Fprintf(&r.b, "  · %s unchanged\n", strings.Join(parts, ", "))
	}
	if len(c.Skipped) > 0 {
		var names []string
		for _, o := range c.Skipped {
			names = append(names, visible.Text(describe(o)))
		}
		fmt.Fprintf(&r.b, "  · skipped, since it acts on a live system: %s\n", strings.Join(names, ", "))
	}
}
