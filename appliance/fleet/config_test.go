package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"gitlab.com/gitlab-org/fleeting/fleeting/provider"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

var oldKeys = []string{"egress_interface", "vm_subnet"}

func TestConfig(t *testing.T) {
	tests := []struct {
		in   string
		want []string // in the error; nil for success
	}{
		{`{"plan":"/p","pool":"small"}`, nil},
		{`{"egress_interface":"eth0","vm_subnet":3}`, nil}, // values are checked when they are compiled
		{`{}`, []string{`plan and pool are missing: write plan = "/etc/fleetingd/plan.json"`}},
		{`null`, []string{"plan and pool are missing"}},
		{`[]`, []string{"plugin_config is not a table"}},
		{`"x"`, []string{"plugin_config is not a table"}},
		{`{"plan":"/p"}`, []string{"pool is missing"}},
		{`{"pool":"small"}`, []string{"plan is missing"}},
		{`{"plan":"","pool":"small"}`, []string{"plan is empty"}},
		{`{"plan":["/p"],"pool":true}`, []string{"plan must be a string", "not a list of 1", "pool must be a string", "not true"}},
		{`{"plan":1e400,"pool":null}`, []string{"not the number 1e400", "not null"}},
		{`{"Plan":"/p","pool":"small"}`, []string{`unknown key "Plan" (did you mean "plan"?)`, "plan is missing"}},
		{`{"plan":"/p","pool":"small","vm_subnett":"x"}`, []string{`unknown key "vm_subnett" (did you mean "vm_subnet"?)`}},
		{`{"plan":"/p","pool":"small","max":{}}`, []string{`unknown key "max": known are plan, pool, egress_interface, vm_subnet`}},
		{`{"plan":"/p","vm_subnet":"x"}`, []string{`plan and "vm_subnet" cannot be mixed`}},
		{`{"pool":"p","plan":"/p","vm_subnet":"x","egress_interface":"e"}`, []string{`plan and pool and "egress_interface", "vm_subnet" cannot be mixed`}},
		{`{"` + strings.Repeat("k", 5000) + `":1}`, []string{"unknown key \"kkkk"}},
	}
	for _, tt := range tests {
		_, err := parseConfig([]byte(tt.in), oldKeys)
		if (err == nil) != (tt.want == nil) {
			t.Errorf("%.80s: %v", tt.in, err)
			continue
		}
		for _, want := range tt.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%.80s: %v\nwant %s", tt.in, err, want)
			}
		}
		if err != nil && (len(err.Error()) > 600 || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%.80s: an error of %d bytes", tt.in, len(err.Error()))
		}
	}
}

// FuzzConfig: no plugin_config may panic, an accepted one is complete, and an error is one short line.
func FuzzConfig(f *testing.F) {
	for _, s := range []string{
		`{"plan":"/p","pool":"small"}`, `{"egress_interface":"eth0"}`, `{"plan":3}`, `{"a":{"b":[1,null]}}`, `[]`,
		`{"plan":"\u0000\n"`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseConfig(data, oldKeys)
		if err == nil {
			if (c.keys == nil) == (c.plan == "" || c.pool == "") {
				t.Errorf("%q gave %+v", data, c)
			}
			return
		}
		if strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: more than a line: %v", data, err)
		}
	})
}

func TestInitErrors(t *testing.T) {
	tests := map[string]struct {
		change   func(t *testing.T, h *host, g *Group)
		settings provider.ConnectorConfig
		want     []string
	}{
		"no plan":          {change: func(t *testing.T, h *host, _ *Group) { remove(t, h.path) }, want: []string{"plugin_config plan: read the plan: open ", "`fleetingd compile HOST -o DIR` writes it below DIR"}},
		"plan is a folder": {change: func(_ *testing.T, _ *host, g *Group) { g.cfg.plan = "/" }, want: []string{"/ is not a regular file"}},
		"plan is no plan":  {change: func(_ *testing.T, h *host, _ *Group) { os.WriteFile(h.path, []byte("x = 1"), 0o600) }, want: []string{"plugin_config plan: "}},
		"no such pool":     {change: func(_ *testing.T, _ *host, g *Group) { g.cfg.pool = "large" }, want: []string{`plugin_config pool: host "testhost" has no pool "large": it has small`}},
		"warm": {change: func(_ *testing.T, h *host, _ *Group) {
			h.plan.Pools[0].Start = "warm"
			h.write()
		}, want: []string{`write start = "cold"`}},
		"hypervisor": {change: func(_ *testing.T, h *host, _ *Group) {
			h.driver.probe = func() error { return errors.New("no /dev/kvm") }
		}, want: []string{"hypervisor qemu: no /dev/kvm"}},
		"two at once": {change: func(_ *testing.T, h *host, g *Group) {
			h.driver.probe = func() error { return errors.New("no /dev/kvm") }
			g.checkLinks = checkLinks
		}, want: []string{"no /dev/kvm; 2 of the pool's 2 TAPs do not exist (the first is fltest0): `fleetingd network up"}},
		"no folder": {change: func(_ *testing.T, h *host, _ *Group) {
			os.MkdirAll(filepath.Dir(h.plan.Paths.Clones), 0o700)
			os.WriteFile(h.plan.Paths.Clones, nil, 0o600)
		}, want: []string{"cannot create or write the folder ", "/disks/clones/small", "not a directory"}},
		"protocol": {settings: provider.ConnectorConfig{Protocol: provider.ProtocolWinRM}, want: []string{`connector_config protocol = "winrm"`}},
		"username": {settings: provider.ConnectorConfig{Username: "root", OS: "windows"}, want: []string{`os = "windows"`, `username = "root"`, `the image's user "ubuntu"`}},
		"images": {change: func(_ *testing.T, h *host, g *Group) {
			g.openImages = func(*plan.Plan, imageOptions) (images, error) { return nil, errors.New("cannot write") }
		}, want: []string{"images: cannot write"}},
		"nothing": {change: func(_ *testing.T, _ *host, g *Group) { g.cfg = config{} }, want: []string{"plan and pool are missing"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, 2)
			g := h.group()
			if tt.change != nil {
				tt.change(t, h, g)
			}
			_, err := g.Init(t.Context(), h.logger(), provider.Settings{ConnectorConfig: tt.settings})
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%v\nwant %s", err, want)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than a line: %v", err)
			}
			if g.lock != nil {
				t.Error("the pool is still locked")
			}
			h.shutdown(g)
		})
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

func TestInitTwice(t *testing.T) {
	h := newHost(t, 1)
	g := h.start()
	if _, err := g.Init(t.Context(), h.logger(), provider.Settings{}); err == nil || !strings.Contains(err.Error(), "initialized twice") {
		t.Error(err)
	}
	h.shutdown(g)
	if _, err := g.Init(t.Context(), h.logger(), provider.Settings{}); !errors.Is(err, errShutdown) {
		t.Error(err)
	}
}

// TestPredecessor uses a plan from the predecessor's keys: the host is set up before anything else, and the plugin refreshes
// the image and removes old ones, but not one that a worker is being created from.
func TestPredecessor(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("skipped: the predecessor's keys need root")
	}
	h := newHost(t, 2)
	h.plan.Refresh = plan.Duration(time.Hour)
	g := h.group()
	var calls []string
	g.opts.Predecessor = &Predecessor{
		Keys: oldKeys,
		Plan: func(keys map[string]any) (*plan.Plan, error) {
			calls = append(calls, "plan")
			if keys["egress_interface"] != "eth0" || keys["vm_subnet"] != json.Number("1") {
				t.Errorf("keys %v", keys)
			}
			return h.plan, nil
		},
		Up: func(context.Context, *plan.Plan) error {
			calls = append(calls, "up")
			return nil
		},
	}
	g.checkLinks = func(*plan.Plan, []plan.Slot) error {
		calls = append(calls, "links")
		return nil
	}
	if err := json.Unmarshal([]byte(`{"egress_interface":"eth0","vm_subnet":1}`), g); err != nil {
		t.Fatal(err)
	}
	refreshed, pruned := make(chan struct{}), make(chan struct{})
	h.images.refresh = func() { <-refreshed }
	starting, start := make(chan struct{}), make(chan struct{})
	h.ready = func(context.Context, *worker) error {
		close(starting)
		<-start
		return nil
	}
	h.images.prune = func(inUse func(string) bool) ([]string, error) {
		if !inUse("d1") || inUse("d0") {
			t.Errorf("while a worker starts from d1: in use: d1 %v, d0 %v", inUse("d1"), inUse("d0"))
		}
		close(pruned)
		return []string{"d0"}, nil
	}
	h.init(g)
	increase(t, g, 1)
	<-starting
	close(refreshed)
	<-pruned
	close(start)
	if !slices.Equal(calls, []string{"plan", "up", "links"}) {
		t.Errorf("calls %v", calls)
	}
	waitState(t, g, provider.StateRunning, 1)
}

func TestIDs(t *testing.T) {
	long := newIDSource("Build.Runners_for-everybody")
	now := time.UnixMilli(1_800_000_000_000)
	long.now = func() time.Time { return now }
	var all []string
	for i := range 1000 {
		if i == 500 {
			now = now.Add(-time.Hour) // the clock is set back
		}
		all = append(all, long.next())
	}
	if !slices.IsSorted(all) {
		t.Error("not sorted by age")
	}
	if len(slices.Compact(slices.Clone(all))) != len(all) {
		t.Error("a name came twice")
	}
	for _, pool := range []string{"Build.Runners_for-everybody", "s", "-", "日本", "0-"} {
		id := newIDSource(pool).next()
		if !idForm.MatchString(id) || len(id) > 29 {
			t.Errorf("%q of pool %q", id, pool)
		}
	}
}
