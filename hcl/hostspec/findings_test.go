package hostspec

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
)

// TestFindings loads specs whose lines say in a comment what is to be found in them:
// "# ERROR: part of the text && WARNING: another". All of that, and nothing else, must
// be found, on that line.
func TestFindings(t *testing.T) {
	files, err := filepath.Glob("testdata/findings/*.hcl")
	if err != nil || len(files) == 0 {
		t.Fatalf("no fixtures: %v", err)
	}
	for _, path := range files {
		t.Run(filepath.Base(path), func(t *testing.T) {
			src, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			res, diags := Load(Options{Path: path, AnyHost: true})
			if res.Host != nil {
				t.Error("a spec with errors gave a host")
			}
			found := map[int][]string{}
			for _, d := range diags {
				if d.Subject == nil {
					t.Errorf("a finding without a place: %s", text(d))
					continue
				}
				found[d.Subject.Start.Line] = append(found[d.Subject.Start.Line], text(d))
			}
			for i, line := range strings.Split(string(src), "\n") {
				compareLine(t, i+1, expected(line), found[i+1])
			}
		})
	}
}

func text(d *hcl.Diagnostic) string {
	severity := "ERROR"
	if d.Severity == hcl.DiagWarning {
		severity = "WARNING"
	}
	return fmt.Sprintf("%s: %s: %s", severity, d.Summary, d.Detail)
}

func expected(line string) []string {
	_, comment, ok := strings.Cut(line, "# ")
	if !ok || !strings.HasPrefix(comment, "ERROR: ") && !strings.HasPrefix(comment, "WARNING: ") {
		return nil
	}
	return strings.Split(comment, " && ")
}

func compareLine(t *testing.T, line int, want, got []string) {
	t.Helper()
	for _, w := range want {
		severity, part, _ := strings.Cut(w, ": ")
		if !slices.ContainsFunc(got, func(g string) bool { return strings.HasPrefix(g, severity) && strings.Contains(g, part) }) {
			t.Errorf("line %d: not found: %s", line, w)
		}
	}
	for _, g := range got {
		if !slices.ContainsFunc(want, func(w string) bool {
			severity, part, _ := strings.Cut(w, ": ")
			return strings.HasPrefix(g, severity) && strings.Contains(g, part)
		}) {
			t.Errorf("line %d: found, but not expected:\n%s", line, g)
		}
	}
}
