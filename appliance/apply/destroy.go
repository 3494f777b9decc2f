package apply

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// ErrNothing is the answer to a question for the current generation on a host that fleetingd has nothing on.
var ErrNothing = errors.New("fleetingd has applied nothing on this host")

// DestroyOptions say how much of a host is taken back, and how.
type DestroyOptions struct {
	Packages bool // also those that apply installed
	Drain    bool // running jobs end first; else they are ended
}

// LookDestroy returns the change that leaves the host as it was found before the first apply. What is in the folders that fleetingd made for
// images, clones and downloads goes with them, and that has no undo.
func (e *Engine) LookDestroy(ctx context.Context, o DestroyOptions) (*Change, error) {
	c := &Change{packages: o.Packages}
	if err := e.look(ctx, c); err != nil {
		return nil, err
	}
	if c.Current == nil {
		return nil, ErrNothing
	}
	configFolders := map[string]bool{}
	for _, owned := range c.Current.Objects {
		if host.Kind(owned.Kind) == host.KindSecretFile {
			configFolders[path.Dir(owned.Name)] = true
		}
	}
	var steps []Step
	add := func(s Step) {
		if e.Doors[s.Kind] != nil {
			steps = append(steps, s)
		}
	}
	for _, s := range c.Steps {
		switch unit := s.Kind == host.KindUnit; {
		case unit && s.Name == runnerUnit && !o.Drain:
			// Its stop waits until all jobs have ended.
			add(doNow(KindEnd, runnerUnit))
			add(s)
		case unit && s.Name == runnerUnit:
			// Idle workers outlive the runner.
			add(s)
			add(doNow(KindEnd, runnerUnit))
		case unit && s.Name == refreshTimer:
			add(s)
			add(doNow(KindEnd, refreshUnit))
		case s.Kind == host.KindFolder && s.After == nil && isData(s.Name, c.Current.Plan):
			add(doNow(KindEmpty, s.Name))
			add(s)
		case s.Kind == host.KindFolder && s.After == nil && configFolders[s.Name]:
			c.last = append(c.last, s)
		default:
			add(s)
		}
	}
	c.Steps = steps
	return c, nil
}

// isData reports whether all that is in a folder of the plan's is fleetingd's own, or its runner's.
func isData(name string, p *plan.Plan) bool {
	own := []string{p.Paths.Disks, p.Paths.Workers, p.Paths.Cache, p.Paths.Run, p.RunnerFolder()}
	return slices.ContainsFunc(own, func(dir string) bool { return name == dir || strings.HasPrefix(name, dir+"/") })
}

// Destroy does a change that LookDestroy returned, and forgets all generations.
func (e *Engine) Destroy(ctx context.Context, c *Change, a Allow) error {
	if _, err := e.Apply(ctx, c, Options{Allow: a}); err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	for _, s := range c.last {
		// The runner's own id of this system, and a file that its package brought: both are of no use to anybody else.
		for _, name := range []string{".runner_system_id", ".config.toml.fleetingd-original"} {
			if door := e.Doors[KindEmpty]; door != nil {
				if err := door.Write(ctx, s.Name+"/"+name, host.State{"do": "yes"}); err != nil {
					return err
				}
			}
		}
		if err := e.Doors[s.Kind].Write(ctx, s.Name, s.After); err != nil {
			return fmt.Errorf("all but one folder is as it was before the first apply: %w", err)
		}
	}
	return e.Dir.RemoveAll()
}
