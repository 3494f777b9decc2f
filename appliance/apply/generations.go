package apply

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/state"
)

// Former returns the number of the kept generation before the current one.
func Former(d *state.Dir) (int, error) {
	all, err := d.Numbers()
	if err != nil {
		return 0, err
	}
	current, err := d.CurrentNumber()
	if err != nil {
		return 0, err
	}
	if current == 0 {
		return 0, ErrNothing
	}
	former := 0
	for _, n := range all {
		if n < current {
			former = n
		}
	}
	if former == 0 {
		return 0, fmt.Errorf("there is no generation before %d; `fleetingd destroy` leaves the host as it was before the first", current)
	}
	return former, nil
}

// Between returns what changed from one generation to another.
func Between(from, to *state.Generation) (*Change, error) {
	want, err := Want(to.Plan)
	if err != nil {
		return nil, err
	}
	have := map[host.Object]host.State{}
	for _, o := range from.Objects {
		have[objectOf(o)] = o.State
	}
	c := &Change{Plan: to.Plan, Digest: to.Digest, Current: from, want: want, Have: have, Unchanged: map[host.Kind]int{}}
	for _, s := range Diff(have, want, from.Objects) {
		if !isAction(s.Kind) {
			c.Steps = append(c.Steps, s)
		}
	}
	for _, w := range want {
		if satisfied(w.Kind, have[w.Object], w.State) {
			c.Unchanged[w.Kind]++
		}
	}
	return c, nil
}

// Status is how a host is doing, as apply sees it.
type Status struct {
	Current *state.Generation // nil: nothing is applied
	// Unfinished is the journal of an apply that runs, was cut off, or waits for its confirmation; nil if there is none.
	Unfinished *state.Journal
	Drift      []Drifted
	Objects    int // of the current generation
	Units      []Unit
}

// Drifted is an object that is not as the current generation wrote it.
type Drifted struct {
	host.Object
	Problem string // in a line
}

// Unit is the state of a unit of the current generation.
type Unit struct {
	Name       string `json:"name"`
	Enablement string `json:"enablement"`
	Active     string `json:"active"`
}

// Status reads the host. It needs no secret and changes nothing.
func (e *Engine) Status(ctx context.Context) (*Status, error) {
	s := &Status{}
	var err, err1 error
	s.Current, err = e.Dir.Current()
	s.Unfinished, err1 = e.Dir.Journal()
	if err := errors.Join(err, err1); err != nil || s.Current == nil {
		return s, err
	}
	owned := slices.DeleteFunc(slices.Clone(s.Current.Objects), func(o state.Owned) bool { return e.Doors[host.Kind(o.Kind)] == nil })
	s.Objects = len(owned)
	objects := make([]host.Object, 0, len(owned))
	for _, o := range owned {
		objects = append(objects, objectOf(o))
	}
	have, err := e.read(ctx, objects)
	if err != nil {
		return nil, err
	}
	for _, o := range owned {
		object := objectOf(o)
		now := have[object]
		if object.Kind == host.KindUnit {
			s.Units = append(s.Units, Unit{o.Name, now["enablement"], now["active"]})
		}
		if satisfied(object.Kind, now, o.State) || object.Kind == host.KindSecretFile && host.SameButSecrets(now, o.State) {
			continue
		}
		problem := strings.TrimPrefix(strings.TrimSpace(differences(o.State, now)), ": ")
		if object.Kind == KindNetwork && now != nil {
			problem = networkText(Step{Before: now, After: o.State})
		}
		s.Drift = append(s.Drift, Drifted{object, problem})
	}
	return s, nil
}
