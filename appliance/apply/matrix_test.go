package apply

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// TestFaultMatrix hurts every step of a first apply, of a change, and of destroy, each with every fault. The steps are those that the diff
// returns: a new kind of step is covered without being named here. After each fault the host is what it was, the next apply converges, and the
// way back restores what was there at first.
func TestFaultMatrix(t *testing.T) {
	first := compiled(t, testSpec)
	changed := compiled(t, changedSpec())
	for _, c := range []struct {
		name   string
		before []*plan.Plan // applied first
		plan   *plan.Plan   // nil: destroy
	}{
		{"first apply", nil, first},
		{"change", []*plan.Plan{first}, changed},
		{"less", []*plan.Plan{first}, compiled(t, smallerSpec())},
		{"way back", []*plan.Plan{first, changed}, first},
		{"destroy", []*plan.Plan{first}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := matrix{before: c.before, plan: c.plan}
			h, dir := m.ready(t)
			steps := m.look(t, h, dir).Steps
			if len(steps) < 3 {
				t.Fatalf("only the steps %v", steps)
			}
			var b strings.Builder
			fmt.Fprintf(&b, "%d steps × %d faults\n%-90s", len(steps), len(faults), "")
			for _, f := range faults {
				fmt.Fprintf(&b, " %-12s", f)
			}
			for i, s := range steps {
				fmt.Fprintf(&b, "\n%-90s", stepName(s))
				for _, f := range faults {
					verdict := "ok"
					if err := m.hurt(t, i+1, f); err != nil {
						t.Errorf("%s, %s: %v", stepName(s), f, err)
						verdict = "FAILED"
					}
					fmt.Fprintf(&b, " %-12s", verdict)
				}
			}
			t.Log(b.String())
		})
	}
}

// changedSpec changes files, units, the disks, the network and the pools of testSpec.
func changedSpec() string {
	return strings.NewReplacer(
		`"24h"`, `"12h"`,
		"max_instances = 2", "max_instances = 3",
		`"20GiB"`, `"30GiB"`,
		"172.16.70.0/28", "172.16.71.0/28",
	).Replace(testSpec)
}

// smallerSpec is testSpec without its runner.
func smallerSpec() string {
	spec, _, _ := strings.Cut(testSpec, "runner ")
	return spec
}

type matrix struct {
	before []*plan.Plan
	plan   *plan.Plan
}

func (m matrix) ready(t *testing.T) (*fakeHost, string) {
	t.Helper()
	h, dir := bareHost(), stateFolder(t)
	for _, p := range m.before {
		mustApply(t, h.engine(t, dir), p, Options{})
	}
	return h, dir
}

func (m matrix) look(t *testing.T, h *fakeHost, dir string) *Change {
	t.Helper()
	if m.plan != nil {
		return mustLook(t, h.engine(t, dir), m.plan)
	}
	c, err := h.engine(t, dir).LookDestroy(t.Context(), DestroyOptions{Packages: true})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (m matrix) do(ctx context.Context, e *Engine, c *Change) error {
	if m.plan == nil {
		return e.Destroy(ctx, c, Allow{})
	}
	_, err := e.Apply(ctx, c, Options{})
	return err
}

// hurt does all of it with one fault, and checks what follows.
func (m matrix) hurt(t *testing.T, at int, f fault) error {
	t.Helper()
	h, dir := m.ready(t)
	before := h.snapshot()
	c := m.look(t, h, dir)
	h.writes, h.at, h.fault = 0, at, f
	err, wasKilled := killed(func() error { return m.do(t.Context(), h.engine(t, dir), c) })
	if wasKilled != (f != anError) || err == nil && !wasKilled {
		return fmt.Errorf("the fault was missed: %w, killed %v", err, wasKilled)
	}
	h.at = 0
	if f != anError {
		got, err := h.engine(t, dir).Recover(t.Context())
		if err != nil || got != Undone {
			return fmt.Errorf("recover: %v, %w", got, err)
		}
	}
	if diff := cmp.Diff(before, h.snapshot()); diff != "" {
		return fmt.Errorf("the host is not as it was (-before +after)\n%s", diff)
	}
	if j, err := h.engine(t, dir).Dir.Journal(); j != nil || err != nil {
		return fmt.Errorf("the journal is still there: %v, %w", j, err)
	}
	return m.converges(t, h, dir)
}

// converges tries again, and goes all the way back.
func (m matrix) converges(t *testing.T, h *fakeHost, dir string) error {
	t.Helper()
	e := h.engine(t, dir)
	if err := m.do(t.Context(), e, m.look(t, h, dir)); err != nil {
		return fmt.Errorf("again: %w", err)
	}
	if m.plan != nil {
		c := mustLook(t, e, m.plan)
		if !c.Empty() {
			return fmt.Errorf("after the apply there are still the steps %v", c.Steps)
		}
		c, err := e.LookDestroy(t.Context(), DestroyOptions{Packages: true})
		if err == nil {
			err = e.Destroy(t.Context(), c, Allow{})
		}
		if err != nil {
			return fmt.Errorf("destroy: %w", err)
		}
	}
	if diff := cmp.Diff(bareHost().snapshot(), h.snapshot()); diff != "" {
		return fmt.Errorf("destroy does not leave the host as it was found (-found +left)\n%s", diff)
	}
	return nil
}

// A kill while a failed apply is being taken back is taken back by the next one.
func TestKilledUndo(t *testing.T) {
	m := matrix{before: []*plan.Plan{compiled(t, testSpec)}, plan: compiled(t, changedSpec())}
	h, dir := m.ready(t)
	steps := len(m.look(t, h, dir).Steps)
	for undo := 1; undo <= steps; undo++ {
		h, dir := m.ready(t)
		before := h.snapshot()
		c := m.look(t, h, dir)
		h.writes, h.at, h.fault = 0, steps, killIn
		if _, wasKilled := killed(func() error { return m.do(t.Context(), h.engine(t, dir), c) }); !wasKilled {
			t.Fatal("not killed")
		}
		h.writes, h.at = 0, undo
		if _, wasKilled := killed(func() error { _, err := h.engine(t, dir).Recover(t.Context()); return err }); !wasKilled {
			t.Fatalf("undo %d of %d was not killed", undo, steps)
		}
		h.at = 0
		if got, err := h.engine(t, dir).Recover(t.Context()); err != nil || got != Undone {
			t.Fatalf("recover: %v, %v", got, err)
		}
		if diff := cmp.Diff(before, h.snapshot()); diff != "" {
			t.Fatalf("killed in undo %d: the host is not as it was (-before +after)\n%s", undo, diff)
		}
	}
	t.Logf("%d undos killed and taken up again", steps)
}

// The actions that follow from steps are done after them, and on the way back after them, too.
func TestActionsOnTheWayBack(t *testing.T) {
	m := matrix{before: []*plan.Plan{compiled(t, testSpec)}, plan: compiled(t, strings.Replace(testSpec, `"24h"`, `"12h"`, 1))}
	h, dir := m.ready(t)
	c := m.look(t, h, dir)
	last := c.Steps[len(c.Steps)-1]
	if last.Object != (host.Object{Kind: KindRestart, Name: "fleetingd-refresh.timer"}) {
		t.Fatalf("the last step is %v", last)
	}
	h.writes, h.at, h.fault, h.log = 0, len(c.Steps), anError, nil
	if err := m.do(t.Context(), h.engine(t, dir), c); err == nil {
		t.Fatal("no error")
	}
	var done []string
	for _, line := range h.log {
		if strings.HasSuffix(line, " yes") || strings.Contains(line, "fleetingd-refresh.timer") {
			done = append(done, strings.TrimSpace(line))
		}
	}
	want := []string{
		"file /etc/systemd/system/fleetingd-refresh.timer", "reload systemd yes", "restart fleetingd-refresh.timer yes",
		"restart fleetingd-refresh.timer",
		"file /etc/systemd/system/fleetingd-refresh.timer", "reload systemd yes", "restart fleetingd-refresh.timer yes",
	}
	// Before: what is only done on the way back.
	done = done[1:]
	if diff := cmp.Diff(want, done); diff != "" {
		t.Errorf("(-want +done)\n%s", diff)
	}
}

// A disk image that an apply grew stays as large when the apply is taken back, and the former plan is content with it.
func TestImageDoesNotShrink(t *testing.T) {
	first := compiled(t, testSpec)
	m := matrix{before: []*plan.Plan{first}, plan: compiled(t, changedSpec())}
	h, dir := m.ready(t)
	e := h.engine(t, dir)
	e.Doors[host.KindDiskImage] = growing{e.Doors[host.KindDiskImage]}
	c := m.look(t, h, dir)
	h.writes, h.at, h.fault = 0, len(c.Steps), anError
	if err := m.do(t.Context(), e, c); err == nil || !strings.Contains(err.Error(), "everything was undone") {
		t.Fatal(err)
	}
	h.at = 0
	if c := mustLook(t, e, first); !c.Empty() {
		t.Errorf("the former plan still has the steps %v", c.Steps)
	}
}

type growing struct{ host.Door }

func (d growing) Write(ctx context.Context, name string, want host.State) error {
	found, err := d.Read(ctx, []string{name})
	if err != nil {
		return err
	}
	if want != nil && !satisfied(host.KindDiskImage, want, found[name]) && found[name] != nil {
		return fmt.Errorf("%s: %w", name, host.ErrCannotShrink)
	}
	return d.Door.Write(ctx, name, want)
}

// The unit that runs at boot looks for the journal where apply writes it.
func TestRecoverUnit(t *testing.T) {
	p := compiled(t, testSpec)
	for _, f := range p.Files {
		if f.Path == unitDir+recoverUnit {
			if !strings.Contains(f.Content, "ConditionPathExists="+StateDir+"/journal\n") {
				t.Errorf("%s", f.Content)
			}
			return
		}
	}
	t.Error("the plan has no " + recoverUnit)
}

// A package starts its service as it brings it. The service is restarted once the plan's files for it are there, and destroy knows that it
// was not there before.
func TestPackageStartsUnit(t *testing.T) {
	h, dir := bareHost(), stateFolder(t)
	unit := host.Object{Kind: host.KindUnit, Name: runnerUnit}
	delete(h.objects, unit)
	e := h.engine(t, dir)
	e.Doors[host.KindPackage] = starting{e.Doors[host.KindPackage], h, unit}
	mustApply(t, e, compiled(t, testSpec), Options{})
	if !slices.Contains(h.log, "restart gitlab-runner.service yes") {
		t.Errorf("it was not restarted: %v", h.log)
	}
	g, err := e.Dir.Current()
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range g.Objects {
		if objectOf(o) == unit && o.Original != nil {
			t.Errorf("it is said to have been there: %v", o.Original)
		}
	}
}

type starting struct {
	host.Door
	host *fakeHost
	unit host.Object
}

func (d starting) Write(ctx context.Context, name string, want host.State) error {
	d.host.objects[d.unit] = host.State{"enablement": "enabled", "active": "active"}
	return d.Door.Write(ctx, name, want)
}
