package apply

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
)

// Engine changes one host.
type Engine struct {
	// Doors are the host's doors. Objects of a kind without a door are skipped: they belong to a live system.
	Doors map[host.Kind]host.Door
	Dir   *state.Dir
	// Version is that of this fleetingd, for the generations that it writes.
	Version string
	// Arm has `fleetingd rollback --unconfirmed` run after a while, whatever becomes of this process. nil: it cannot be done here.
	Arm func(ctx context.Context, after time.Duration) error
	// Progress is told of each step before it is done. nil: nobody is.
	Progress func(s Step, i, of int)
}

// undoer is a door whose undo after a crash is more than a Write of the former state.
type undoer interface {
	Undo(ctx context.Context, name string, before host.State) error
}

// confirmer is a door that keeps what it needs for an undo until the change is final.
type confirmer interface{ Confirm() error }

// Change is what would make a host equal to a plan.
type Change struct {
	Plan      *plan.Plan // nil for destroy
	Digest    string     // of the plan
	Current   *state.Generation
	Steps     []Step
	Unchanged map[host.Kind]int
	Skipped   []host.Object // no door of this host leads to them
	Have      map[host.Object]host.State

	want     []Item
	packages bool // packages that are no longer wanted are removed
	// last are steps that can only be done once the change is final: until then, files that it needs for its undo lie in these folders.
	last []Step
}

// Empty reports whether there is nothing to do: the host is what the plan says, and the current generation says so.
func (c *Change) Empty() bool {
	return len(c.Steps) == 0 && c.Plan != nil && c.Current != nil && c.Current.Digest == c.Digest
}

// Look reads the host and compares it with a plan. It changes nothing.
func (e *Engine) Look(ctx context.Context, p *plan.Plan) (*Change, error) {
	digest, err := p.Digest()
	if err != nil {
		return nil, err
	}
	want, err := Want(p)
	if err != nil {
		return nil, err
	}
	c := &Change{Plan: p, Digest: digest, want: want}
	return c, e.look(ctx, c)
}

func (e *Engine) look(ctx context.Context, c *Change) error {
	var err error
	if c.Current, err = e.Dir.Current(); err != nil {
		return err
	}
	c.want = slices.DeleteFunc(slices.Clone(c.want), func(w Item) bool {
		if e.Doors[w.Kind] == nil {
			c.Skipped = append(c.Skipped, w.Object)
			return true
		}
		return false
	})
	var owned []state.Owned
	if c.Current != nil {
		owned = slices.DeleteFunc(slices.Clone(c.Current.Objects), func(o state.Owned) bool {
			return e.Doors[host.Kind(o.Kind)] == nil || host.Kind(o.Kind) == host.KindPackage && !c.packages
		})
	}
	objects := make([]host.Object, 0, len(c.want))
	for _, w := range c.want {
		objects = append(objects, w.Object)
	}
	for _, o := range owned {
		objects = append(objects, objectOf(o))
	}
	if c.Have, err = e.read(ctx, objects); err != nil {
		return err
	}
	c.Steps = slices.DeleteFunc(Diff(c.Have, c.want, owned), func(s Step) bool { return e.Doors[s.Kind] == nil }) // actions on a live system
	c.Unchanged = map[host.Kind]int{}
	for _, w := range c.want {
		if satisfied(w.Kind, c.Have[w.Object], w.State) {
			c.Unchanged[w.Kind]++
		}
	}
	return nil
}

// read returns the states of objects.
func (e *Engine) read(ctx context.Context, objects []host.Object) (map[host.Object]host.State, error) {
	names := map[host.Kind][]string{}
	for _, o := range objects {
		if !slices.Contains(names[o.Kind], o.Name) {
			names[o.Kind] = append(names[o.Kind], o.Name)
		}
	}
	have := make(map[host.Object]host.State, len(objects))
	var errs []error
	for _, kind := range slices.Sorted(maps.Keys(names)) {
		found, err := e.Doors[kind].Read(ctx, names[kind])
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, name := range names[kind] {
			have[host.Object{Kind: kind, Name: name}] = found[name]
		}
	}
	return have, errors.Join(errs...)
}

// Allow is what somebody said yes to beyond the plan itself.
type Allow struct {
	Overwrite bool // objects that somebody else changed, or made
	Adopt     bool // a configuration of GitLab Runner that was there before
}

// ErrConflict is in the error of an apply that would overwrite what somebody else wrote.
var ErrConflict = errors.New("somebody else's changes would be overwritten")

// refusal names the steps that need somebody's word.
func (a Allow) refusal(steps []Step) error {
	var lines []string
	for _, s := range steps {
		switch {
		case s.Conflict == "" || a.Overwrite && s.Kind != host.KindSecretFile:
		case s.Conflict == Drift && a.Overwrite:
		case s.Conflict == Drift:
			lines = append(lines, fmt.Sprintf("%s was changed by somebody else since fleetingd wrote it; --overwrite writes it again", describe(s.Object)))
		case s.Kind == host.KindSecretFile && a.Adopt:
		case s.Kind == host.KindSecretFile:
			lines = append(lines, fmt.Sprintf("%s has runners that are not fleetingd's; `fleetingd convert %s` writes a spec with them; --adopt "+
				"replaces the file, and destroy puts it back", describe(s.Object), s.Name))
		default:
			lines = append(lines, fmt.Sprintf("%s exists, and fleetingd did not make it; --overwrite replaces it, and destroy puts it back",
				describe(s.Object)))
		}
	}
	if len(lines) == 0 {
		return nil
	}
	return fmt.Errorf("%w; nothing was changed:\n  %s", ErrConflict, strings.Join(lines, "\n  "))
}

// Refusal returns what keeps an apply from being done, or nil.
func (c *Change) Refusal(a Allow) error {
	if err := a.refusal(c.Steps); err != nil {
		return err
	}
	return c.missingUnits()
}

// missingUnits refuses to start what nothing brings: neither a file of the plan nor, as far as that can be known, a package.
func (c *Change) missingUnits() error {
	var brought []string
	for _, w := range c.want {
		if w.Kind == host.KindFile {
			brought = append(brought, strings.TrimPrefix(w.Name, unitDir))
		}
	}
	for _, s := range c.Steps {
		if s.Kind == host.KindPackage {
			return nil
		}
		if s.Kind == host.KindUnit && s.Before == nil && s.After != nil && !slices.Contains(brought, s.Name) {
			return fmt.Errorf("this host has no unit %s; nothing was changed: install its package (%s), or name a source for it in the spec's install block",
				s.Name, strings.TrimSuffix(s.Name, ".service"))
		}
	}
	return nil
}

// Options of an apply.
type Options struct {
	Allow
	// Confirm is how long the change waits for its confirmation after its last step; 0: it is final at once.
	Confirm time.Duration
	// Onto is the number of the kept generation that this apply goes back to; 0: it makes a new one.
	Onto int
}

// Result is what an apply did.
type Result struct {
	Generation int
	Steps      int
	Deadline   time.Time // for the confirmation; zero: none is needed
}

// Apply does the steps of a change. The caller holds the lock, and Recover has returned. If it fails, or ctx ends, the host is as it was; if
// even that cannot be done, the error says so, and the journal stays for the next Recover.
func (e *Engine) Apply(ctx context.Context, c *Change, o Options) (Result, error) {
	if err := c.Refusal(o.Allow); err != nil {
		return Result{}, err
	}
	if err := e.unmoved(ctx, c); err != nil {
		return Result{}, err
	}
	if err := e.confirmDoors(); err != nil { // of an apply that was killed between its last two deeds
		return Result{}, err
	}
	if o.Confirm > 0 {
		if err := e.arm(ctx, o.Confirm); err != nil {
			return Result{}, err
		}
	}
	r := &run{Engine: e, change: c}
	if err := r.begin(o); err != nil {
		return Result{}, err
	}
	err := r.steps(ctx)
	if err == nil {
		err = r.verify(ctx)
	}
	if err != nil {
		return Result{}, r.takeBack(context.WithoutCancel(ctx), err)
	}
	return r.finish(context.WithoutCancel(ctx), o)
}

func (e *Engine) arm(ctx context.Context, after time.Duration) error {
	if e.Arm == nil {
		return errors.New("--confirm needs a running systemd, which would take the change back if nobody confirms it")
	}
	return e.Arm(ctx, after)
}

// unmoved refuses a change that was made for another state of the host.
func (e *Engine) unmoved(ctx context.Context, c *Change) error {
	now, err := e.read(ctx, slices.Collect(maps.Keys(c.Have)))
	if err != nil {
		return err
	}
	var moved []string
	for _, o := range sortedObjects(c.Have) {
		if !same(now[o], c.Have[o]) {
			moved = append(moved, describe(o))
		}
	}
	if len(moved) > 0 {
		return fmt.Errorf("the host changed since the plan was made; nothing was changed, make the plan again: %s", strings.Join(moved, ", "))
	}
	return nil
}

func sortedObjects(have map[host.Object]host.State) []host.Object {
	return slices.SortedFunc(maps.Keys(have), func(a, b host.Object) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Name, b.Name))
	})
}

// HaveDigest identifies the state of the host that a change was made for.
func (c *Change) HaveDigest() (string, error) {
	h := sha256.New()
	for _, o := range sortedObjects(c.Have) {
		if err := json.NewEncoder(h).Encode([]any{o, c.Have[o]}); err != nil { // maps are written in the order of their keys
			return "", err
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// run is one apply.
type run struct {
	*Engine
	change     *Change
	generation *state.Generation // nil for destroy
	journal    *state.Journal
}

func (r *run) begin(o Options) error {
	boot, err := state.BootID()
	if err != nil {
		return err
	}
	head := state.JournalHead{Started: time.Now().UTC(), Boot: boot}
	if r.change.Current != nil {
		head.From = r.change.Current.Number
	}
	if r.change.Plan != nil {
		head.Generation = o.Onto
		if head.Generation == 0 {
			if head.Generation, err = r.Dir.Next(); err != nil {
				return err
			}
			head.Fresh = true
		}
		r.generation = &state.Generation{
			Number: head.Generation, Created: time.Now().UTC().Truncate(time.Second), Digest: r.change.Digest, Fleetingd: r.Version, Plan: r.change.Plan,
		}
	}
	if r.journal, err = r.Dir.Begin(head); err != nil {
		return err
	}
	if head.Fresh {
		// Whoever takes this apply back after a crash needs its plan.
		if err := r.Dir.Save(r.generation); err != nil {
			return r.takeBack(context.Background(), err)
		}
	}
	return nil
}

func (r *run) steps(ctx context.Context) error {
	for i, s := range r.change.Steps {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("interrupted: %w", err)
		}
		if r.Progress != nil {
			r.Progress(s, i, len(r.change.Steps))
		}
		if err := r.step(ctx, s); err != nil {
			return stepError(s, err)
		}
	}
	return nil
}

func (r *run) step(ctx context.Context, s Step) error {
	before := s.Before
	if !isAction(s.Kind) {
		// Earlier steps have their effects: a package brings a unit, a user its group.
		now, err := r.read(ctx, []host.Object{s.Object})
		if err != nil {
			return err
		}
		before = now[s.Object]
		if isForeign(s.Kind, before) && !same(before, s.Before) {
			return errors.New("it changed while the plan was being applied")
		}
	}
	i, err := r.journal.Step(state.JournalStep{Kind: string(s.Kind), Name: s.Name, Before: before, After: s.After})
	if err != nil {
		return err
	}
	if err := r.Doors[s.Kind].Write(ctx, s.Name, s.After); err != nil {
		return err
	}
	if s.Kind == host.KindUnit && s.Before["active"] != "active" && before["active"] == "active" && s.After["active"] == "active" {
		// Its package started it before its files were there.
		if err := r.Doors[KindRestart].Write(ctx, s.Name, host.State{"do": "yes"}); err != nil {
			return err
		}
	}
	return r.journal.Done(i)
}

// verify reads everything back.
func (r *run) verify(ctx context.Context) error {
	objects := make([]host.Object, 0, len(r.change.want))
	for _, w := range r.change.want {
		objects = append(objects, w.Object)
	}
	have, err := r.read(ctx, objects)
	if err != nil {
		return fmt.Errorf("read the host back: %w", err)
	}
	var differ []string
	for _, w := range r.change.want {
		if !satisfied(w.Kind, have[w.Object], w.State) {
			differ = append(differ, describe(w.Object)+differences(w.State, have[w.Object]))
		}
	}
	if len(differ) > 0 {
		return fmt.Errorf("after the last step the host is not what the plan says: %s", strings.Join(differ, "; "))
	}
	return nil
}

// differences names what differs in two states, without contents.
func differences(want, have host.State) string {
	if have == nil {
		return " does not exist"
	}
	if want == nil {
		return " exists"
	}
	var keys []string
	for _, key := range slices.Sorted(maps.Keys(want)) {
		if want[key] == have[key] {
			continue
		}
		if key == "content" || key == "base64" || len(want[key])+len(have[key]) > 200 {
			keys = append(keys, key+" differs")
			continue
		}
		keys = append(keys, fmt.Sprintf("%s is %q instead of %q", key, have[key], want[key]))
	}
	for _, key := range slices.Sorted(maps.Keys(have)) {
		if _, ok := want[key]; !ok {
			keys = append(keys, fmt.Sprintf("%s is %q", key, have[key]))
		}
	}
	return ": " + strings.Join(keys, ", ")
}

// owned is what the new generation has on the host, and what was there before.
func (r *run) owned() []state.Owned {
	known := map[host.Object]state.Owned{}
	if r.change.Current != nil {
		for _, o := range r.change.Current.Objects {
			known[objectOf(o)] = o
		}
	}
	var all []state.Owned
	wanted := map[host.Object]bool{}
	for _, w := range r.change.want {
		wanted[w.Object] = true
		// Not as it was just before its step: what a package brought a moment ago was not found here.
		original := r.change.Have[w.Object]
		if o, ok := known[w.Object]; ok {
			original = o.Original
		}
		all = append(all, state.Owned{Kind: string(w.Kind), Name: w.Name, State: w.State, Original: original})
	}
	if r.change.Current == nil {
		return all
	}
	// What no door of this host leads to stays as it was noted, and so do packages, which destroy may take back.
	for _, o := range r.change.Current.Objects {
		if !wanted[objectOf(o)] && (r.Doors[host.Kind(o.Kind)] == nil || host.Kind(o.Kind) == host.KindPackage) {
			all = append(all, o)
		}
	}
	return all
}

// finish makes the change final, or has it wait.
func (r *run) finish(ctx context.Context, o Options) (Result, error) {
	res := Result{Steps: len(r.change.Steps)}
	if r.generation != nil {
		r.generation.Objects = r.owned()
		res.Generation = r.generation.Number
		if o.Confirm > 0 {
			// The kept generation that a rollback returns to must stay as it is until then.
			res.Deadline = time.Now().Add(o.Confirm)
			if err := r.arm(ctx, o.Confirm); err != nil {
				return Result{}, r.takeBack(ctx, err)
			}
			if err := r.Dir.Save(r.generation); err != nil {
				return Result{}, r.takeBack(ctx, err)
			}
			err := r.journal.Wait(state.Waiting{Deadline: res.Deadline.UTC(), Boot: r.journal.Head.Boot})
			if err != nil {
				return Result{}, r.takeBack(ctx, err)
			}
			return res, r.journal.Close()
		}
		if err := r.Dir.Save(r.generation); err != nil {
			return Result{}, r.takeBack(ctx, err)
		}
	}
	if err := r.journal.Commit(); err != nil {
		return Result{}, r.takeBack(ctx, err)
	}
	return res, r.commit(r.journal)
}

// commit makes the generation of a journal the current one. It can be done again after a crash in it.
func (e *Engine) commit(j *state.Journal) error {
	if err := e.Dir.SetCurrent(j.Head.Generation); err != nil {
		return err
	}
	if err := e.confirmDoors(); err != nil {
		return err
	}
	if err := e.Dir.End(j); err != nil {
		return err
	}
	_, err := e.Dir.Prune(state.Keep)
	return err
}

func (e *Engine) confirmDoors() error {
	for _, kind := range slices.Sorted(maps.Keys(e.Doors)) {
		if c, ok := e.Doors[kind].(confirmer); ok {
			if err := c.Confirm(); err != nil {
				return err
			}
		}
	}
	return nil
}

// takeBack undoes what a failed apply did.
func (r *run) takeBack(ctx context.Context, why error) error {
	begun := len(r.journal.Steps)
	if err := r.undo(ctx, r.journal); err != nil {
		return errors.Join(fmt.Errorf("%w\nand not all of it could be undone, so the host is half-way; once what follows is mended, "+
			"`fleetingd rollback --unconfirmed` undoes the rest", why), err, r.journal.Close())
	}
	if begun == 0 {
		return fmt.Errorf("%w; nothing was changed", why)
	}
	return fmt.Errorf("%w\neverything was undone: the host is as it was", why)
}

// undo takes back all steps of a journal and ends it.
func (e *Engine) undo(ctx context.Context, j *state.Journal) error {
	var errs, unrecorded []error
	for _, i := range j.Open() {
		s := j.Steps[i]
		if err := e.undoStep(ctx, host.Kind(s.Kind), s.Name, s.Before); err != nil {
			errs = append(errs, fmt.Errorf("undo: %w", err))
			continue
		}
		// The record only saves work: without it, on a full disk for one, another undo takes this step back once more. The rest must not wait.
		if err := j.Undone(i); err != nil {
			unrecorded = append(unrecorded, err)
		}
	}
	if len(errs) > 0 {
		return errors.Join(append(errs, unrecorded...)...)
	}
	if j.Head.Fresh {
		if err := e.Dir.Remove(j.Head.Generation); err != nil {
			return err
		}
	}
	return e.Dir.End(j)
}

func (e *Engine) undoStep(ctx context.Context, kind host.Kind, name string, before host.State) error {
	door := e.Doors[kind]
	if door == nil {
		return fmt.Errorf("%s %s: this fleetingd has no way to it here", kind, name)
	}
	if u, ok := door.(undoer); ok {
		return u.Undo(ctx, name, before)
	}
	err := door.Write(ctx, name, before)
	if err == nil || errors.Is(err, host.ErrCannotShrink) {
		return nil // a larger image serves as well (see satisfied)
	}
	// What kept the step from being done may keep it from being undone. Then nothing has to be.
	if now, readErr := door.Read(ctx, []string{name}); readErr == nil && same(now[name], before) {
		return nil
	}
	return err
}

func stepError(s Step, err error) error {
	text := err.Error()
	if strings.Contains(text, s.Name) && strings.HasPrefix(text, strings.ReplaceAll(string(s.Kind), "-", " ")) || s.Name == "" {
		return err // the door names its object
	}
	if strings.HasPrefix(text, string(s.Kind)) {
		return err
	}
	return fmt.Errorf("%s: %w", describe(s.Object), err)
}

// describe names an object for people.
func describe(o host.Object) string {
	switch o.Kind {
	case KindNetwork:
		return "the workers' network"
	case host.KindSecretFile:
		return "file " + o.Name
	case host.KindDiskImage:
		return "disk image " + o.Name
	case host.KindMember:
		user, group, _ := strings.Cut(o.Name, "/")
		return "membership of " + user + " in " + group
	}
	return o.String()
}
