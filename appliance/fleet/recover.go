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

// adoptTimeout is how long one VMM may take to answer the plugin that adopts it.
const adoptTimeout = 10 * time.Second

// recover handles the records of an earlier process: it adopts workers that are ready and whose VM is alive, and removes all
// others in the background. Afterwards every slot without a worker is free.
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
			why[i] = fmt.Errorf("two records claim slot %d", w.slot.Index)
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
	// Only after all slots are counted, because removing a worker frees its slot.
	for i, w := range found {
		if !g.register(w) {
			return errShutdown
		}
		go g.liveAgain(w, why[i])
	}
	g.background(func() { g.removeStrayClones(ids) })
	return nil
}

// liveAgain continues the life of a recorded worker. why is the reason to remove it, or nil if it was adopted.
func (g *Group) liveAgain(w *worker, why error) {
	defer g.wg.Done()
	if why != nil {
		g.end(w, fmt.Errorf("left behind by an earlier process: %w", why))
		return
	}
	g.log.Debug("adopted worker", "worker", w.id, "pid", w.vm.PID(), "address", w.slot.Address.String())
	g.watch(w)
}

// recorded returns the ids of all records of the pool.
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
			g.log.Debug("ignoring a file that is not a worker's record", "path", filepath.Join(dir, e.Name()))
		case name != e.Name():
			// The process died between writing and renaming it, so the older record is valid.
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
				return nil, err
			}
		default:
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// adopt returns the worker of a record, with an error if it cannot be used. A worker that an earlier plan placed, or started with another
// hypervisor or user, is used as it is: a changed plan ends no job.
func (g *Group) adopt(ctx context.Context, id string) (*worker, error) {
	w := g.newWorker(id, plan.Slot{Index: -1})
	r, err := readRecord(g.recordPath(id))
	if err != nil {
		return w, err
	}
	w.created, w.slot, w.user = r.Created, g.slotOf(r), r.User
	if r.Driver != w.driver.Name() {
		h := g.plan.Hypervisor
		h.Driver, h.Binary = r.Driver, r.Driver
		if w.driver, err = g.opts.Driver(h, g.slog); err != nil {
			w.driver = g.driver
			return w, fmt.Errorf("it was started with %s: %w", r.Driver, err)
		}
	}
	switch {
	case r.ID != id || r.Pool != g.pool.Name:
		return w, errors.New("its record belongs to another worker")
	case !r.Ready:
		return w, errUnfinished
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

// removeStrayClones removes clones without a record, which a power cut leaves behind because records are not flushed.
// The folder belongs to this pool, and no other process uses it while this one holds the pool's lock.
func (g *Group) removeStrayClones(recorded []string) {
	dir := filepath.Dir(g.cloneDir("x"))
	known := map[string]bool{}
	for _, id := range recorded {
		known[id] = true
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		g.log.Warn("cannot look for stray clones", "error", err)
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
			g.log.Warn("cannot remove a stray clone", "error", err)
			continue
		}
		g.log.Info("removed a clone without a record", "path", filepath.Join(dir, e.Name()))
	}
}
