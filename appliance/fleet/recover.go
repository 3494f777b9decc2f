package fleet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sync/errgroup"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// adoptTimeout is how long one VMM may take to answer a plugin that adopts it.
const adoptTimeout = 10 * time.Second

// recover goes through the records of an earlier process: a worker that is ready and whose VM is alive is adopted, any
// other is removed, in the background. Then all slots that nobody holds are free.
func (g *Group) recover(ctx context.Context) error {
	ids, err := g.recorded()
	if err != nil {
		return err
	}
	found := make([]*worker, len(ids))
	why := make([]error, len(ids))
	var eg errgroup.Group
	eg.SetLimit(16)
	for i, id := range ids {
		eg.Go(func() error {
			found[i], why[i] = g.adopt(ctx, id)
			return nil
		})
	}
	if err := errors.Join(eg.Wait(), ctx.Err()); err != nil {
		return err
	}
	for i, w := range found {
		if w.slot.Index >= 0 {
			g.busy[w.slot.Index]++
		}
		if why[i] == nil && g.busy[w.slot.Index] > 1 {
			why[i] = fmt.Errorf("slot %d is held by two records", w.slot.Index)
		}
		if why[i] != nil {
			w.state = provider.StateDeleting
		}
	}
	for _, s := range g.plan.PoolSlots(g.pool) {
		if g.busy[s.Index] == 0 {
			g.free = append(g.free, s)
		}
	}
	// Not before all is counted: a worker that is removed gives its slot back.
	for i, w := range found {
		if !g.register(w) {
			return errShutdown
		}
		go g.liveAgain(w, why[i])
	}
	g.background(func() { g.removeStrayClones(ids) })
	return nil
}

// liveAgain leads a worker of an earlier process: why is nil where it was adopted.
func (g *Group) liveAgain(w *worker, why error) {
	defer g.wg.Done()
	if why != nil {
		g.end(w, fmt.Errorf("left by an earlier process: %w", why))
		return
	}
	g.log.Debug("adopted worker", "worker", w.id, "pid", w.vm.PID(), "address", w.slot.Address.String())
	g.watch(w)
}

// recorded are the ids of all records of the pool.
func (g *Group) recorded() ([]string, error) {
	dir := filepath.Dir(g.recordPath("x"))
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the worker records: %w", err)
	}
	var ids []string
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), ".new")
		id, isRecord := strings.CutSuffix(name, ".json")
		switch {
		case !isRecord || !idForm.MatchString(id):
			g.log.Debug("not a worker's record; left alone", "path", filepath.Join(dir, e.Name()))
		case name != e.Name():
			// The process died between writing and renaming it: the older record counts.
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, err
			}
		default:
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// adopt is the worker of a record, and why it cannot be used.
func (g *Group) adopt(ctx context.Context, id string) (*worker, error) {
	w := g.newWorker(id, plan.Slot{Index: -1})
	r, err := readRecord(g.recordPath(id))
	if err != nil {
		return w, err
	}
	w.created = r.Created
	var errSlot error
	w.slot, errSlot = g.slotOf(r)
	if r.Driver != w.driver.Name() {
		h := g.plan.Hypervisor
		h.Driver, h.Binary = r.Driver, r.Driver
		if w.driver, err = g.opts.Driver(h, g.slog); err != nil {
			w.driver = g.driver
			return w, fmt.Errorf("it was started with %s: %w", r.Driver, err)
		}
		return w, fmt.Errorf("it was started with %s, and the plan says %s now", r.Driver, g.driver.Name())
	}
	switch {
	case errSlot != nil:
		return w, errSlot
	case r.ID != id || r.Pool != g.pool.Name:
		return w, errors.New("its record is another worker's")
	case !r.Ready:
		return w, errUnfinished
	case r.User != g.image.User:
		return w, fmt.Errorf("its user is %q, and the plan says %q now", r.User, g.image.User)
	}
	if w.key, err = os.ReadFile(g.keyPath(id)); err != nil {
		return w, fmt.Errorf("its key: %w", err)
	}
	if _, err := ssh.ParsePrivateKey(w.key); err != nil {
		return w, fmt.Errorf("its key: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, adoptTimeout)
	defer cancel()
	v, err := w.driver.Adopt(ctx, g.vmDir(id))
	if errors.Is(err, vm.ErrNotRunning) {
		return w, errors.New("its VM has ended")
	}
	if err != nil {
		return w, err
	}
	w.vm, w.state = v, provider.StateRunning
	return w, nil
}

// removeStrayClones removes the clones that no record speaks of. They are there after a power cut, which takes the last
// records with it. The folder is the pool's own, and no other process works in it while this one holds the pool.
func (g *Group) removeStrayClones(recorded []string) {
	dir := filepath.Dir(g.cloneDir("x"))
	known := map[string]bool{}
	for _, id := range recorded {
		known[id] = true
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		g.log.Warn("look for clones that nobody uses", "error", err)
		return
	}
	for _, e := range entries {
		g.mu.Lock()
		_, live := g.workers[e.Name()]
		g.mu.Unlock()
		if live || known[e.Name()] {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			g.log.Warn("remove a clone that nobody uses", "error", err)
			continue
		}
		g.log.Info("removed a clone that no record speaks of", "path", filepath.Join(dir, e.Name()))
	}
}
