package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/need"
)

const module = "github.com/fleetingd/fleetingd/"

// mayImport lists which of the project's own packages each package may import. It only names packages
// above it in this table. New packages must be added here.
var mayImport = []struct {
	pkg  string
	own  []string
	pure bool // see forbidden
}{
	{pkg: "appliance/netrange", pure: true},
	{pkg: "appliance/suggest", pure: true},
	{pkg: "appliance/landlockabi"},
	{pkg: "hcl/hostspec", own: []string{"appliance/netrange", "appliance/suggest"}, pure: true},
	{pkg: "templates", pure: true},
	{pkg: "appliance/visible", pure: true},
	{pkg: "seed", pure: true},
	{pkg: "appliance/plan", own: []string{"seed"}, pure: true},
	{pkg: "appliance/compile", own: []string{"appliance/netrange", "hcl/hostspec", "templates", "seed", "appliance/plan"}, pure: true},
	{pkg: "hcl/convert", own: []string{"appliance/netrange", "appliance/visible", "hcl/hostspec"}, pure: true},
	// state writes files atomically and locks them. Packages that keep something come after it.
	{pkg: "appliance/state", own: []string{"appliance/plan"}},
	{pkg: "appliance/need", own: []string{"appliance/state"}},
	{pkg: "appliance/host", own: []string{"appliance/visible", "appliance/landlockabi", "appliance/netrange", "appliance/plan", "appliance/state"}},
	{pkg: "appliance/apply", own: []string{"appliance/visible", "appliance/plan", "appliance/state", "appliance/host"}},
	{pkg: "appliance/vm", own: []string{"appliance/landlockabi", "appliance/visible", "appliance/plan", "appliance/state"}},
	{pkg: "appliance/guest", own: []string{"appliance/visible", "seed", "appliance/plan"}},
	{pkg: "appliance/image", own: []string{"appliance/visible", "appliance/plan", "seed", "appliance/state", "appliance/vm", "appliance/guest"}},
	{pkg: "appliance/fleet", own: []string{
		"appliance/suggest", "appliance/visible", "appliance/plan", "appliance/state", "seed", "appliance/vm", "appliance/guest",
		"appliance/image"}},
	{pkg: "appliance/hostlab"},
	// Only used by tests: helpers that several packages' tests share.
	{pkg: "appliance/vm/vmtest", own: []string{"appliance/need", "appliance/vm"}},
}

// forbidden lists what a pure package must not reach, not even through a library: it executes no programs, uses no network and
// does not look at the machine. Otherwise the same spec could give another plan elsewhere.
var forbidden = []string{"os/exec", "net/http", "github.com/vishvananda/netlink", "github.com/mdlayher/netlink",
	"github.com/google/nftables", "golang.org/x/crypto/ssh"}

// vague are names that do not say what belongs in a package, so that everything ends up there.
var vague = []string{"util", "utils", "types", "common", "models", "helpers", "misc"}

type goPackage struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

func goList(t *testing.T, args ...string) []goPackage {
	t.Helper()
	need.Tools(t, "go")
	out, err := exec.CommandContext(t.Context(), "go", append([]string{"list", "-json=ImportPath,Imports,Deps"}, args...)...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("go list: %v\n%s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var all []goPackage
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

func TestImports(t *testing.T) {
	for _, p := range goList(t, module+"...") {
		name := strings.TrimPrefix(p.ImportPath, module)
		for part := range strings.SplitSeq(name, "/") {
			if slices.Contains(vague, part) {
				t.Errorf("%s: a package called %q is about nothing", name, part)
			}
		}
		if strings.HasPrefix(name, "cmd/") {
			continue // wiring: it may import all
		}
		allowed, pure, ok := rules(name)
		if !ok {
			t.Errorf("%s is not in the table of this test: say there what it may import", name)
			continue
		}
		for _, imported := range p.Imports {
			own, isOwn := strings.CutPrefix(imported, module)
			if isOwn && !slices.Contains(allowed, own) {
				t.Errorf("%s imports %s, which it may not", name, own)
			}
		}
		for _, dep := range p.Deps {
			for _, f := range forbidden {
				if pure && (dep == f || strings.HasPrefix(dep, f+"/")) {
					t.Errorf("%s reaches %s", name, dep)
				}
			}
		}
	}
}

// rules returns those of a package, or of the closest parent that has rules, which the package may then import too.
func rules(name string) (allowed []string, pure, ok bool) {
	var parents []string
	for at := name; at != "."; at = path.Dir(at) {
		for _, r := range mayImport {
			if r.pkg == at {
				return append(parents, append(r.own, at)...), r.pure, true
			}
		}
		parents = append(parents, at)
	}
	return nil, false, false
}

// TestImportTable checks the table itself: a package imports only from above it.
func TestImportTable(t *testing.T) {
	var above []string
	for _, r := range mayImport {
		for _, own := range r.own {
			if !slices.Contains(above, own) {
				t.Errorf("%s may import %s, which does not stand above it", r.pkg, own)
			}
		}
		if slices.Contains(above, r.pkg) {
			t.Errorf("%s is in the table twice", r.pkg)
		}
		above = append(above, r.pkg)
	}
}

// TestArchitecture compares the table in the documentation with the enforced one, and with the existing packages.
func TestArchitecture(t *testing.T) {
	text, err := os.ReadFile("../../packaging/docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "<!-- packages -->")
	table, _, ok := strings.Cut(after, "<!-- /packages -->")
	if !ok {
		t.Fatal("architecture.md has no table of packages between its marks")
	}
	var documented []string
	row := regexp.MustCompile("^\\| `([^`]+)`( \\(pure\\))? \\| .+ \\|(.*)\\|$")
	code := regexp.MustCompile("`([^`]+)`")
	for line := range strings.Lines(table) {
		m := row.FindStringSubmatch(strings.TrimSuffix(line, "\n"))
		if m == nil {
			continue
		}
		var own []string
		for _, name := range code.FindAllStringSubmatch(m[3], -1) {
			own = append(own, name[1])
		}
		documented = append(documented, fmt.Sprint(m[1], " pure: ", m[2] != "", " imports: ", own))
	}
	there := map[string]bool{}
	for _, p := range goList(t, module+"...") {
		there[strings.TrimPrefix(p.ImportPath, module)] = true
	}
	var enforced []string
	for _, r := range mayImport {
		if !there[r.pkg] {
			continue // not written yet
		}
		enforced = append(enforced, fmt.Sprint(r.pkg, " pure: ", r.pure, " imports: ", r.own))
	}
	if diff := cmp.Diff(enforced, documented); diff != "" {
		t.Errorf("architecture.md's table is stale (-enforced +documented)\n%s", diff)
	}
}
