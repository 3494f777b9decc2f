package apply

import (
	"bytes"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

var updateGolden = flag.Bool("update", false, "write the golden files anew")

// golden compares text with a file of testdata. `go test ./appliance/apply -update` writes it.
func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name)
	if *updateGolden {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got; -update writes it)\n%s", file, diff)
	}
}

func rendered(t *testing.T, c *Change, v View) string {
	t.Helper()
	var b bytes.Buffer
	if err := c.Render(&b, v); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func asJSON(t *testing.T, c *Change) string {
	t.Helper()
	var b bytes.Buffer
	if err := c.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestRender(t *testing.T) {
	first := compiled(t, testSpec)
	h, dir := bareHost(), stateFolder(t)
	e := h.engine(t, dir)
	c := mustLook(t, e, first)
	golden(t, "first.txt", rendered(t, c, View{Spec: "host.hcl"}))
	mustApply(t, e, first, Options{})
	golden(t, "nothing.txt", rendered(t, mustLook(t, e, first), View{Spec: "host.hcl"}))

	spec := strings.NewReplacer(`"1GiB"`, `"2GiB"`, "max_instances = 2", "max_instances = 3", `network { subnet = "172.16.70.0/28" }`, `network {
  subnet = "172.16.70.0/28"
  egress "registry" {
    action = "allow"
    to     = ["10.20.0.15/32"]
    ports  = ["tcp/443"]
  }
}`).Replace(testSpec)
	// Somebody edits one of the files, and a worker's link is gone.
	h.objects[host.Object{Kind: host.KindFile, Name: "/etc/sysctl.d/60-fleetingd.conf"}]["content"] = "net.ipv4.ip_forward = 0\x1b[2J\n"
	h.objects[host.Object{Kind: KindNetwork}]["differs"] = "TAP fleet1 is missing"
	c = mustLook(t, h.engine(t, dir), compiled(t, spec))
	golden(t, "change.txt", rendered(t, c, View{Spec: "host.hcl"}))
	golden(t, "change.json", asJSON(t, c))
	if text := rendered(t, c, View{Color: true}); !strings.Contains(text, "\x1b[33m~\x1b[0m") || strings.Contains(text, "\x1b[2J") {
		t.Errorf("colours, or what a file brings of them: %q", text)
	}

	c, err := h.engine(t, dir).LookDestroy(t.Context(), DestroyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "destroy.txt", rendered(t, c, View{}))
}

// A secret that changes shows as changed, and as nothing else.
func TestRenderSecret(t *testing.T) {
	s := Step{
		Object: host.Object{Kind: host.KindSecretFile, Name: "/etc/gitlab-runner/config.toml"},
		Before: host.State{"content": "a = 1\ntoken = \"" + host.FormerSecret + "\"\n"},
		After:  host.State{"content": "a = 1\ntoken = \"@SECRET:runner.small.token@\"\n"},
	}
	want := "@@ -1,2 +1,2 @@\n a = 1\n-token = \"(former value)\"\n+token = \"(secret)\"\n"
	if got := s.Diff(); got != want {
		t.Errorf("%q", got)
	}
}

func TestSaved(t *testing.T) {
	p := compiled(t, testSpec)
	h, dir := bareHost(), stateFolder(t)
	c := mustLook(t, h.engine(t, dir), p)
	file := filepath.Join(t.TempDir(), "saved.json")
	if err := c.Save(file, "host.hcl"); err != nil {
		t.Fatal(err)
	}
	s, err := ReadSaved(file)
	if err != nil {
		t.Fatal(err)
	}
	if s.Spec != "host.hcl" || s.Plan.Origins == nil {
		t.Errorf("got %+v", s)
	}
	if err := s.Moved(mustLook(t, h.engine(t, dir), s.Plan)); err != nil {
		t.Error(err)
	}
	h.objects[host.Object{Kind: host.KindSysctl, Name: "net.ipv4.ip_forward"}] = host.State{"value": "1"}
	if err := s.Moved(mustLook(t, h.engine(t, dir), s.Plan)); err == nil {
		t.Error("a host that changed since is taken")
	}
	for _, text := range []string{"", "host \"x\" {}", "{}", `{"fleetingd_saved_plan":7}`, `{"fleetingd_saved_plan":1,"plan":{}}`} {
		if _, err := parseSaved([]byte(text)); err == nil {
			t.Errorf("%q was read", text)
		}
	}
	if _, err := ReadSaved(filepath.Join("testdata", "first.txt")); !errors.Is(err, ErrNotSaved) {
		t.Errorf("some text: %v", err)
	}
}

// What somebody else changed or made is not overwritten unasked, and nothing is done then.
func TestConflicts(t *testing.T) {
	p := compiled(t, testSpec)
	config := host.Object{Kind: host.KindSecretFile, Name: "/etc/gitlab-runner/config.toml"}
	sysctl := host.Object{Kind: host.KindFile, Name: "/etc/sysctl.d/60-fleetingd.conf"}
	for _, c := range []struct {
		name  string
		first bool // applied before
		o     host.Object
		s     host.State
		allow Allow
		want  string // in the error; "" for none
	}{
		{"foreign file", false, sysctl, host.State{"content": "x"}, Allow{}, "fleetingd did not make it"},
		{"foreign file, adopt", false, sysctl, host.State{"content": "x"}, Allow{Adopt: true}, "fleetingd did not make it"},
		{"foreign file, overwrite", false, sysctl, host.State{"content": "x"}, Allow{Overwrite: true}, ""},
		{"foreign runners", false, config, host.State{"content": "[[runners]]\n"}, Allow{}, "fleetingd convert"},
		{"foreign runners, overwrite", false, config, host.State{"content": "[[runners]]\n"}, Allow{Overwrite: true}, "fleetingd convert"},
		{"foreign runners, adopt", false, config, host.State{"content": "[[runners]]\n"}, Allow{Adopt: true}, ""},
		{"no runners", false, config, host.State{"content": "concurrent = 1\n"}, Allow{}, ""},
		{"drift", true, sysctl, host.State{"content": "x"}, Allow{}, "changed by somebody else"},
		{"drift, gone", true, sysctl, nil, Allow{}, "changed by somebody else"},
		{"drift, overwrite", true, sysctl, host.State{"content": "x"}, Allow{Overwrite: true}, ""},
		{"stopped unit", true, host.Object{Kind: host.KindUnit, Name: runnerUnit}, host.State{"enablement": "enabled", "active": "inactive"}, Allow{},
			"changed by somebody else"},
		{"failed unit", true, host.Object{Kind: host.KindUnit, Name: runnerUnit}, host.State{"enablement": "enabled", "active": "failed"}, Allow{}, ""},
		{"network after a boot", true, host.Object{Kind: KindNetwork}, nil, Allow{}, ""},
	} {
		h, dir := bareHost(), stateFolder(t)
		e := h.engine(t, dir)
		if c.first {
			mustApply(t, e, p, Options{})
		}
		h.objects[c.o] = c.s
		if c.s == nil {
			delete(h.objects, c.o)
		}
		before := h.snapshot()
		_, err := e.Apply(t.Context(), mustLook(t, e, p), Options{Allow: c.allow})
		switch {
		case c.want == "" && err != nil, c.want != "" && (!errors.Is(err, ErrConflict) || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v", c.name, err)
		case c.want != "" && !cmp.Equal(before, h.snapshot()):
			t.Errorf("%s: something was changed", c.name)
		}
	}
}

// A host that changes between the plan and the yes is not touched.
func TestMoved(t *testing.T) {
	h, dir := bareHost(), stateFolder(t)
	e := h.engine(t, dir)
	c := mustLook(t, e, compiled(t, testSpec))
	o := host.Object{Kind: host.KindFile, Name: "/etc/sysctl.d/60-fleetingd.conf"}
	h.objects[o] = host.State{"content": "just now"}
	before := h.snapshot()
	if _, err := e.Apply(t.Context(), c, Options{}); err == nil || !strings.Contains(err.Error(), o.String()) {
		t.Errorf("%v; want an error that names %s", err, o)
	}
	if diff := cmp.Diff(before, h.snapshot()); diff != "" {
		t.Errorf("something was changed\n%s", diff)
	}
}

func TestStatusAndGenerations(t *testing.T) {
	first, changed := compiled(t, testSpec), compiled(t, changedSpec())
	h, dir := bareHost(), stateFolder(t)
	e := h.engine(t, dir)
	if s, err := e.Status(t.Context()); err != nil || s.Current != nil {
		t.Fatalf("a bare host: %+v, %v", s, err)
	}
	if _, err := Former(e.Dir); !errors.Is(err, ErrNothing) {
		t.Errorf("a bare host has a former generation: %v", err)
	}
	for _, p := range []*plan.Plan{first, changed} {
		mustApply(t, e, p, Options{})
	}
	if s, err := e.Status(t.Context()); err != nil || s.Current.Number != 2 || len(s.Drift) != 0 || len(s.Units) == 0 {
		t.Errorf("%+v, %v", s, err)
	}
	h.objects[host.Object{Kind: host.KindFile, Name: "/etc/sysctl.d/60-fleetingd.conf"}]["mode"] = "0600"
	s, err := e.Status(t.Context())
	if err != nil || len(s.Drift) != 1 || s.Drift[0].Problem != `mode is "0600" instead of "0644"` {
		t.Errorf("%+v, %v", s, err)
	}
	g1, err := e.Dir.Generation(1)
	if err != nil {
		t.Fatal(err)
	}
	g2, err := e.Dir.Generation(2)
	if err != nil {
		t.Fatal(err)
	}
	between, err := Between(g1, g2)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "between.txt", rendered(t, between, View{Spec: "generation 2"}))
	if n, err := Former(e.Dir); n != 1 || err != nil {
		t.Errorf("the former generation is %d, %v", n, err)
	}
}

// A unit that nothing brings is missed before anything changes.
func TestMissingUnit(t *testing.T) {
	spec := strings.Replace(testSpec, `egress_interface = "eth0"`, "egress_interface = \"eth0\"\n  install = false", 1)
	h, dir := bareHost(), stateFolder(t)
	delete(h.objects, host.Object{Kind: host.KindUnit, Name: runnerUnit})
	before := h.snapshot()
	e := h.engine(t, dir)
	_, err := e.Apply(t.Context(), mustLook(t, e, compiled(t, spec)), Options{})
	if err == nil || !strings.Contains(err.Error(), "this host has no unit gitlab-runner.service; nothing was changed") {
		t.Error(err)
	}
	if diff := cmp.Diff(before, h.snapshot()); diff != "" {
		t.Errorf("something was changed\n%s", diff)
	}
}

func FuzzSaved(f *testing.F) {
	f.Add([]byte(`{"fleetingd_saved_plan":1,"spec":"x","have":"","plan":{"version":2}}`))
	f.Add([]byte(`host "x" {}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseSaved(b); (s == nil) == (err == nil) {
			t.Errorf("got %v, %v", s, err)
		}
	})
}

// BenchmarkNothingToDo is an apply of a host with 1,000 slots that is as planned, but for the time that the host's own doors take.
func BenchmarkNothingToDo(b *testing.B) {
	spec := strings.NewReplacer("max_instances = 2", "max_instances = 1000", "172.16.70.0/28", "172.16.64.0/20").Replace(testSpec)
	p := compiled(b, spec)
	h, dir := bareHost(), stateFolder(b)
	mustApply(b, h.engine(b, dir), p, Options{})
	for b.Loop() {
		if c := mustLook(b, h.engine(b, dir), p); !c.Empty() {
			b.Fatal(c.Steps)
		}
	}
}
