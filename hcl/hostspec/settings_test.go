package hostspec

import (
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
)

// accepts is which of the values below GitLab Runner starts with, for each kind.
var accepts = map[kind]string{
	kindText: "string secret", kindAddress: "secret", kindInteger: "integer", kindSeconds: "integer", kindNumber: "integer fraction",
	kindBool: "boolean", kindDuration: "duration", kindTextOrList: "string secret list", kindList: "list", kindMap: "table",
	kindTable: "table", kindTables: "tables list",
}

// TestEverySetting gives every known setting a value of every type: the right ones pass, and each of the others is an error
// that names the setting and says what to write.
func TestEverySetting(t *testing.T) {
	values := map[string]any{
		"string": "x", "duration": "1m30s", "integer": int64(7), "fraction": 1.5, "boolean": true,
		"list":   []any{}, // empty, as good as any
		"tables": []any{map[string]any{}}, "table": map[string]any{}, "secret": Text{{Secret: Secret{From: "env:X"}}},
	}
	leaves := 0
	var try func(root settings, known settings, p settingPath)
	try = func(root, known settings, p settingPath) {
		for name, s := range known {
			at := p.to(name)
			if s.ours != "" || s.kind == kindAny {
				continue
			}
			leaves++
			for kind, value := range values {
				want := strings.Contains(" "+accepts[s.kind]+" ", " "+kind+" ")
				if kind == "tables" && s.kind == kindList || kind == "duration" && s.kind == kindText {
					continue // a list of the wrong things, and text like any other
				}
				if s.portless && kind == "string" || s.portless && kind == "duration" {
					want = true // a host
				}
				if s.values != nil && kind == "string" {
					want = false // no such value
				}
				l := &loader{attrs: map[attrKey]attrInfo{}}
				c := settingsCheck{l: l, owner: l, attr: "settings", root: root, what: "it"}
				c.value(at, value, s)
				if kind == "duration" && s.values != nil || kind == "tables" && s.kind == kindTextOrList {
					want = false
				}
				if got := !l.diags.HasErrors(); got != want {
					t.Errorf("%s with %s: accepted %v, want %v: %v", at, kind, got, want, l.diags)
				}
				for _, d := range l.diags {
					if !strings.Contains(d.Detail, at.String()) || !strings.Contains(d.Detail, "Write ") && !strings.Contains(d.Detail, "must be one of") {
						t.Errorf("%s with %s: no name or no cure: %s", at, kind, d.Detail)
					}
				}
			}
			try(root, s.keys, at)
		}
	}
	try(globalSettings, globalSettings, nil)
	try(runnerSettings, runnerSettings, nil)
	if leaves < 200 {
		t.Errorf("only %d settings were tried", leaves)
	}
}

// TestSettingElsewhere writes every setting where it does not belong: no such key passes without a word.
func TestSettingElsewhere(t *testing.T) {
	find := func(attr string, table map[string]any) hcl.Diagnostics {
		root := runnerSettings
		if attr == "gitlab_runner" {
			root = globalSettings
		}
		l := &loader{attrs: map[attrKey]attrInfo{}}
		c := settingsCheck{l: l, owner: l, attr: attr, root: root, what: "it"}
		c.table(nil, table, root)
		return l.diags
	}
	var try func(known settings, p settingPath)
	try = func(known settings, p settingPath) {
		for name, s := range known {
			at := p.to(name)
			tables := map[string]map[string]any{
				"dotted":    {at.String(): true},
				"as TOML":   {"runners." + at.String(): true},
				"upper":     {strings.ToUpper(name): true},
				"in cache":  {"cache": map[string]any{name: true}},
				"in docker": {"docker": map[string]any{"services": []any{map[string]any{name: true}}}},
				"typo":      {name + "x": true},
			}
			for way, table := range tables {
				for _, attr := range []string{"settings", "gitlab_runner"} {
					if way == "dotted" && len(at) == 1 || way == "in cache" && at[0] == "cache" {
						continue // that is its place
					}
					if diags := find(attr, table); len(diags) == 0 {
						t.Errorf("%s in %s, %s: nothing was found", at, attr, way)
					} else if way == "dotted" && !diags.HasErrors() {
						t.Errorf("%s in %s, %s: only a warning: %v", at, attr, way, diags)
					}
				}
			}
			try(s.keys, at)
		}
	}
	try(globalSettings, nil)
	try(runnerSettings, nil)
}
