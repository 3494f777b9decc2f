package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/need"
)

var update = flag.Bool("update", false, "write the generated files anew")

// architectures are those that `make cross` builds for. Each may link different modules.
var architectures = []string{"amd64", "arm64", "riscv64"}

// linkedModule is a module as `go list -json` shows it.
type linkedModule struct {
	Path, Version, Dir string
	Main               bool
	Replace            *linkedModule
}

// TestLicenses checks that licenses.txt is what the build links. `go test ./cmd/fleetingd -run TestLicenses -update` writes it.
func TestLicenses(t *testing.T) {
	need.Tools(t, "go")
	want := licenseText(t)
	if *update {
		if err := os.WriteFile("licenses.txt", []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(licenses, "\n")); diff != "" {
		t.Errorf("licenses.txt is stale; run: go test ./cmd/fleetingd -run TestLicenses -update\n(-want +got)\n%s", diff)
	}
}

// licenseText returns fleetingd's own licence, followed by each distinct text below the modules that it belongs to.
func licenseText(t *testing.T) string {
	t.Helper()
	owners := map[string][]string{} // by text
	add := func(owner, dir string) {
		files := licenseFiles(t, dir)
		if len(files) == 0 {
			t.Errorf("%s has no licence file in %s: we may not ship it", owner, dir)
		}
		for _, f := range files {
			data, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			text := string(bytes.TrimSpace(bytes.ReplaceAll(data, []byte("\r\n"), []byte("\n"))))
			owners[text] = append(owners[text], owner+" ("+filepath.Base(f)+")")
		}
	}
	modules := linkedModules(t)
	for _, path := range slices.Sorted(maps.Keys(modules)) {
		m := modules[path]
		add(m.Path+" "+m.Version, m.Dir)
	}
	add("Go's standard library and runtime", goRoot(t))

	own, err := os.ReadFile("../../LICENSE")
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "fleetingd is free software under the Apache License 2.0:\n\n%s\n\n", bytes.TrimSpace(own))
	fmt.Fprintf(&b, "It is built from Go's standard library and %d modules, under these licences:\n", len(modules))
	for _, text := range slices.SortedFunc(maps.Keys(owners), func(a, b string) int { return strings.Compare(owners[a][0], owners[b][0]) }) {
		fmt.Fprintf(&b, "\n%s\n%s\n\n%s\n", strings.Repeat("=", 80), strings.Join(owners[text], "\n"), text)
	}
	return b.String()
}

// linkedModules returns the modules that the binaries link on any architecture, by path.
func linkedModules(t *testing.T) map[string]linkedModule {
	t.Helper()
	modules := map[string]linkedModule{}
	for _, arch := range architectures {
		cmd := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=Module", module+"cmd/...")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go list for %s: %v", arch, err)
		}
		for d := json.NewDecoder(bytes.NewReader(out)); ; {
			var p struct{ Module *linkedModule }
			if err := d.Decode(&p); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			if m := p.Module; m != nil && !m.Main {
				if m.Replace != nil {
					m = m.Replace
				}
				modules[m.Path] = *m
			}
		}
	}
	return modules
}

var licenseName = regexp.MustCompile(`(?i)^(licen[cs]e|copying|notice|patents|unlicense)([-.].*)?$`)

func licenseFiles(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, e := range entries {
		if e.Type().IsRegular() && licenseName.MatchString(e.Name()) {
			files = append(files, filepath.Join(dir, e.Name()))
		}
	}
	return files
}

func goRoot(t *testing.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}
