package hostspec

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestExamples: every example is valid without a word to say about it, on every
// machine, with no secret at hand; and is in fmt's layout.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob("../../packaging/examples/*/host.hcl*")
	if err != nil || len(files) < 5 {
		t.Fatalf("only %d examples: %v", len(files), err)
	}
	for _, path := range files {
		t.Run(filepath.Base(filepath.Dir(path)), func(t *testing.T) {
			res, diags := Load(Options{Path: path, AnyHost: true})
			for _, d := range diags {
				t.Errorf("%s", d)
			}
			for _, name := range res.Hosts {
				if _, diags := Load(Options{Path: path, Host: name}); diags.HasErrors() {
					t.Errorf("--host %s: %v", name, diags)
				}
			}
			if strings.HasSuffix(path, ".json") {
				return
			}
			src, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if formatted, diags := Format(src, path); diags.HasErrors() || string(formatted) != string(src) {
				t.Errorf("not formatted: fleetingd fmt %s", path)
			}
		})
	}
}
