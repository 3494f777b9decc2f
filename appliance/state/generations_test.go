package state

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// smallPlan is a plan that passes its own checks, as a generation keeps one.
func smallPlan(t *testing.T) *plan.Plan {
	t.Helper()
	b, err := os.ReadFile("testdata/plan.json")
	if err != nil {
		t.Fatal(err)
	}
	p, err := plan.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func openDir(t *testing.T) *Dir {
	t.Helper()
	d, err := OpenDir(filepath.Join(t.TempDir(), "apply"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestGenerations(t *testing.T) {
	d := openDir(t)
	if g, err := d.Current(); g != nil || err != nil {
		t.Fatalf("a new folder has the generation %v, %v", g, err)
	}
	if _, err := d.Generation(1); !errors.Is(err, ErrNoGeneration) {
		t.Errorf("generation 1 of none: %v", err)
	}
	p := smallPlan(t)
	for n := 1; n <= 12; n++ {
		next, err := d.Next()
		if err != nil || next != n {
			t.Fatalf("the next generation is %d, %v; want %d", next, err, n)
		}
		g := &Generation{Number: n, Created: time.Unix(int64(n), 0).UTC(), Digest: "d", Fleetingd: "v", Plan: p, Objects: []Owned{
			{Kind: "file", Name: "/etc/x", State: map[string]string{"content": "\x00<&>"}},
			{Kind: "file", Name: "/etc/y", State: map[string]string{}, Original: map[string]string{"content": ""}},
		}}
		if err := errors.Join(d.Save(g), d.SetCurrent(n)); err != nil {
			t.Fatal(err)
		}
		back, err := d.Current()
		if err != nil {
			t.Fatal(err)
		}
		// A missing object and an empty state are not the same.
		if diff := cmp.Diff(g, back, cmpopts.IgnoreFields(plan.Plan{}, "Network", "Slots")); diff != "" {
			t.Fatalf("(-written +read)\n%s", diff)
		}
	}
	if err := d.SetCurrent(2); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(d.Path("generations/13.new"), 0o700); err != nil { // a crash's
		t.Fatal(err)
	}
	removed, err := d.Prune(10)
	if err != nil || !slices.Equal(removed, []int{1}) {
		t.Errorf("removed %v, %v; want only 1, since 2 is the current one", removed, err)
	}
	all, err := d.Numbers()
	if err != nil || len(all) != 11 {
		t.Errorf("%v are left, %v", all, err)
	}
	if entries, _ := os.ReadDir(d.Path("generations")); len(entries) != 11 {
		t.Errorf("prune left what a crash left: %v", entries)
	}
	if err := d.Remove(12); err != nil {
		t.Fatal(err)
	}
	if err := d.SetCurrent(0); err != nil {
		t.Fatal(err)
	}
	if n, err := d.CurrentNumber(); n != 0 || err != nil {
		t.Errorf("the current generation is %d, %v", n, err)
	}
}

// A generation that is saved again, as rollback does, is the old one or the new one at every moment.
func TestSaveAgain(t *testing.T) {
	d := openDir(t)
	g := &Generation{Number: 1, Digest: "first", Plan: smallPlan(t)}
	if err := d.Save(g); err != nil {
		t.Fatal(err)
	}
	g.Digest = "second"
	if err := d.Save(g); err != nil {
		t.Fatal(err)
	}
	back, err := d.Generation(1)
	if err != nil || back.Digest != "second" {
		t.Errorf("got %v, %v", back, err)
	}
	if entries, _ := os.ReadDir(d.Path("generations")); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestDamagedGeneration(t *testing.T) {
	d := openDir(t)
	if err := d.Save(&Generation{Number: 1, Plan: smallPlan(t)}); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", "{}", "[]", `{"version":9,"number":1}`, `{"version":1,"number":2}`, `{"version":1,"number":1,"objects":[{}]}`} {
		if err := os.WriteFile(d.Path("generations/1/generation.json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Generation(1); err == nil {
			t.Errorf("%q was read", text)
		}
	}
	if err := os.Symlink("../elsewhere", d.Path("current")); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Current(); err == nil {
		t.Error("a link to elsewhere is a generation")
	}
}

func FuzzGeneration(f *testing.F) {
	f.Add([]byte(`{"version":1,"number":1,"objects":[{"kind":"file","name":"/x","state":{"a":"b"},"original":null}]}`))
	f.Add([]byte(`{"version":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := parseGeneration(b)
		if (g == nil) == (err == nil) {
			t.Errorf("got %v, %v", g, err)
		}
	})
}
