package apply

import (
	"context"
	"errors"
	"path"
	"slices"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// ErrNothing is the answer to a question for the current generation on a host that fleetingd has nothing on.
var ErrNothing = errors.New("fleetingd has applied nothing on this host")

// LookDestroy returns the change that leaves the host as it was found before the first apply. What is in the folders that fleetingd made for
// images, clones and downloads goes with them, and that has no undo.
func (e *Engine) LookDestroy(ctx context.Context) (*Change, error) {
	c := &Change{}
	if err := e.look(ctx, c); err != nil {
		return nil, err
	}
	if c.Current == nil {
		return nil, ErrNothing
	}
	paths := c.Current.Plan.Paths
	configDirs := map[string]bool{}
	for _, o := range c.Current.Objects {
		if host.Kind(o.Kind) == host.KindSecretFile {
			configDirs[path.Dir(o.Name)] = true
		}
	}
	var steps []Step
	for _, s := range c.Steps {
		if s.Kind == host.KindFolder && s.After == nil && e.Doors[KindEmpty] != nil {
			switch {
			case isData(s.Name, paths):
				steps = append(steps, doNow(KindEmpty, s.Name))
			case configDirs[s.Name]:
				steps = append(steps, doNow(KindEmpty, s.Name+"/.runner_system_id"))
			}
		}
		steps = append(steps, s)
	}
	c.Steps = steps
	return c, nil
}

// isData reports whether all that is in a folder of the plan's is fleetingd's own, or its runner's.
func isData(name string, paths plan.Paths) bool {
	own := []string{paths.Disks, paths.Workers, paths.Cache, paths.Run, paths.State + "/runner"}
	return slices.ContainsFunc(own, func(dir string) bool { return name == dir || strings.HasPrefix(name, dir+"/") })
}

// Destroy does a change that LookDestroy returned, and forgets all generations.
func (e *Engine) Destroy(ctx context.Context, c *Change, a Allow) error {
	if _, err := e.Apply(ctx, c, Options{Allow: a}); err != nil {
		return err
	}
	return e.Dir.RemoveAll()
}
