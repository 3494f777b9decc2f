package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"

	"github.com/fleetingd/fleetingd/appliance/fleet"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

func readme(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// readmeBlocks returns README's code blocks in a language.
func readmeBlocks(t *testing.T, lang string) []string {
	t.Helper()
	var blocks []string
	for _, m := range regexp.MustCompile("(?s)```"+lang+"\n(.*?)```").FindAllStringSubmatch(readme(t), -1) {
		blocks = append(blocks, m[1])
	}
	if len(blocks) == 0 {
		t.Fatalf("README has no block of %s", lang)
	}
	return blocks
}

// readmeBlock returns the shell block with that beginning.
func readmeBlock(t *testing.T, begin string) string {
	t.Helper()
	for _, b := range readmeBlocks(t, "sh") {
		if strings.HasPrefix(b, begin) {
			return b
		}
	}
	t.Fatalf("README has no block of sh that begins with %q", begin)
	return ""
}

// TestReadme: examples that a newcomer copies from README work. TestApplianceInLab runs its shell block; CI and the demo
// run its make targets.
func TestReadme(t *testing.T) {
	for i, spec := range readmeBlocks(t, "hcl") {
		path := filepath.Join(t.TempDir(), fmt.Sprintf("%d.hcl", i))
		if err := os.WriteFile(path, []byte(spec), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, diags := hostspec.Load(hostspec.Options{Path: path}); len(diags) > 0 {
			t.Errorf("README's spec: %v\n%s", diags, spec)
		}
	}
	for _, config := range readmeBlocks(t, "toml") {
		var doc struct {
			Runners struct {
				Autoscaler struct {
					PluginConfig map[string]any `toml:"plugin_config"`
				}
			}
		}
		if _, err := toml.Decode(config, &doc); err != nil {
			t.Fatalf("%v\n%s", err, config)
		}
		data, err := json.Marshal(doc.Runners.Autoscaler.PluginConfig)
		if err != nil {
			t.Fatal(err)
		}
		if err := fleet.New(fleet.Options{}).UnmarshalJSON(data); err != nil {
			t.Errorf("README's plugin_config: %v\n%s", err, config)
		}
	}
	listed := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `fleetingd ([a-z]+)").FindAllStringSubmatch(readme(t), -1) {
		listed[m[1]] = true
	}
	for _, c := range commands() {
		if !listed[c.Name] && !c.Hidden {
			t.Errorf("README does not list the command %s", c.Name)
		}
		delete(listed, c.Name)
	}
	for name := range listed {
		t.Errorf("README lists the command %s, which does not exist", name)
	}
}

// TestReadmeConvert runs README's example of convert on a config.toml.
func TestReadmeConvert(t *testing.T) {
	src, err := os.ReadFile("../../hcl/convert/testdata/configs/aws-spot.toml")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(config, src, 0o600); err != nil {
		t.Fatal(err)
	}
	line := strings.TrimSpace(readmeBlock(t, "fleetingd convert"))
	line = strings.NewReplacer("/etc/gitlab-runner/config.toml", config, "host.hcl", filepath.Join(dir, "host.hcl"), "/etc/fleetingd", dir).Replace(line)
	if code := run(strings.Fields(line)); code != 0 {
		t.Fatalf("%s: exit code %d", line, code)
	}
	res, diags := hostspec.Load(hostspec.Options{Path: filepath.Join(dir, "host.hcl")})
	if len(diags) > 0 {
		t.Fatal(diags)
	}
	for what, s := range res.Host.Runners[0].Secrets() {
		if _, err := s.Read(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestReadmeInit runs README's example of init on this machine.
func TestReadmeInit(t *testing.T) {
	file := filepath.Join(t.TempDir(), "host.hcl")
	line := strings.Replace(strings.TrimSpace(readmeBlock(t, "fleetingd init")), "host.hcl", file, 1)
	if code := run(strings.Fields(line)); code != 0 {
		t.Fatalf("%s: exit code %d", line, code)
	}
	res, diags := hostspec.Load(hostspec.Options{Path: file})
	if len(diags) > 0 {
		t.Fatal(diags)
	}
	if got := res.Host.Pools[0].MaxInstances; got != 2 {
		t.Errorf("%d workers", got)
	}
}
