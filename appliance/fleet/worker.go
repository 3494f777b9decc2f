package fleet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"gitlab.com/gitlab-org/fleeting/fleeting/provider"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// worker is one worker, from Increase until it is forgotten. One goroutine (live) leads it:
//
//	        Increase
//	            │
//	            ▼
//	        creating ──── a step failed, the VMM exited, ────┐
//	            │         no answer in time, Decrease,       │
//	guest ready │         Shutdown                           │
//	            ▼                                            ▼
//	        running ───── Decrease, the VMM exited ──────► deleting ──┬──► deleted
//	            │                                            ▲        └──► timeout (no answer in time)
//	            ▼ Shutdown: left alone, with its record      │
//	      (adopted by the next plugin as running, or ────────┘
//	       removed where that is not possible)
//
// A slot is free again, and deleted or timeout are shown, when nothing of the worker is left and not before: both
// make fleeting ask for the next one. There is no way back, and a worker is never tried twice: fleeting asks again.
type worker struct {
	id      string
	slot    plan.Slot
	created time.Time
	driver  vm.Driver // that its VM was started with
	ctx     context.Context
	cancel  context.CancelCauseFunc

	first bool // it tries to start for all that stand in line (pacer); only live and what it calls look at it

	key []byte // private, PEM; never in a record or a log. Set before state is running, as is vm

	// Guarded by Group.mu.
	state  provider.State
	image  string // digest of the image that it is made of; "" before that
	err    error  // why it is not running
	vm     vm.VM
	gone   bool // state is final: deleted or timeout
	shown  bool // Update has shown it
	rounds int  // how often Update has shown it as gone
}

// errUnfinished is a worker that an earlier process was making when it ended: that is no failure.
var errUnfinished = errors.New("it was not ready yet")

var errStartTimeout = errors.New("the worker was not ready in time")

func (g *Group) newWorker(id string, slot plan.Slot) *worker {
	w := &worker{id: id, slot: slot, created: time.Now(), driver: g.driver, state: provider.StateCreating}
	w.ctx, w.cancel = context.WithCancelCause(g.ctx)
	return w
}

func (g *Group) recordPath(id string) string {
	return filepath.Join(g.plan.Paths.Workers, g.pool.Name, id+".json")
}
func (g *Group) runDir(id string) string  { return filepath.Join(g.plan.Paths.Run, id) }
func (g *Group) vmDir(id string) string   { return filepath.Join(g.runDir(id), "vm") }
func (g *Group) keyPath(id string) string { return filepath.Join(g.runDir(id), "key") }
func (g *Group) cloneDir(id string) string {
	return filepath.Join(g.plan.Paths.Clones, g.pool.Name, id)
}

// live leads a new worker to its end.
func (g *Group) live(w *worker) {
	defer g.wg.Done()
	if err := g.create(w); err != nil {
		g.end(w, err)
		return
	}
	g.pace.ended(w.first, true, "")
	w.first = false
	g.watch(w)
}

// watch waits for what ends a running worker.
func (g *Group) watch(w *worker) {
	select {
	case <-w.vm.Done():
		g.end(w, exited(w.vm))
	case <-w.ctx.Done():
		if err := context.Cause(w.ctx); !errors.Is(err, errShutdown) {
			g.end(w, err)
		}
	}
}

// exited is why a VM that has ended did so.
func exited(v vm.VM) error { return fmt.Errorf("its VM has ended: %w", v.Exit()) }

// end removes a worker, as often as it takes, and frees its slot.
func (g *Group) end(w *worker, why error) {
	w.cancel(why)
	g.mu.Lock()
	w.state, w.err = provider.StateDeleting, why
	g.mu.Unlock()
	g.logEnd(w, why)
	start := time.Now()
	if !g.teardownUntilDone(w) {
		return
	}
	final := provider.StateDeleted
	if errors.Is(why, errStartTimeout) {
		final = provider.StateTimeout
	}
	g.mu.Lock()
	w.state, w.gone, w.key, w.vm = final, true, nil, nil
	g.giveSlotLocked(w.slot)
	g.mu.Unlock()
	g.log.Info("worker removed", "worker", w.id, "state", string(final), "phase", "remove", "ms", ms(start))
}

// logEnd says why a worker ends, and lets those in line behind it know.
func (g *Group) logEnd(w *worker, why error) {
	if failed, ok := errors.AsType[*startError](why); ok {
		g.failed(w, failed)
		return
	}
	if w.first {
		g.pace.ended(true, false, "")
	}
	if errors.Is(why, errDeleted) || errors.Is(why, errShutdown) || errors.Is(why, errUnfinished) {
		g.log.Debug("removing worker", "worker", w.id, "reason", why)
		return
	}
	args := []any{"worker", w.id, "error", oneLine(why), "age_ms", ms(w.created)}
	if tail := g.consoleTail(w.id); tail != nil {
		args = append(args, "console", tail)
	}
	g.log.Error("worker failed; removing it", args...)
}

// teardownUntilDone retries a failed teardown until the Group ends; the record stays then, and the next
// plugin goes on with it. The slot stays taken meanwhile: a second VM on its TAP would be worse than one place less.
func (g *Group) teardownUntilDone(w *worker) bool {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, time.Minute) {
		err := g.teardown(w)
		if err == nil {
			return true
		}
		g.log.Error("cannot remove worker yet; its slot stays taken",
			"worker", w.id, "error", oneLine(err), "again_in", pause.String())
		select {
		case <-g.ctx.Done():
			return false
		case <-time.After(pause):
		}
	}
}

// teardown undoes the steps of create in reverse. Each may have been done or not, by this process or an earlier
// one; it goes by the worker's id alone, and doing it twice is as good as once. It stops where a step fails:
// the record goes last.
func (g *Group) teardown(w *worker) error {
	steps := []struct {
		name string
		undo func() error
	}{
		{"end the VM", func() error { return g.killVM(w) }},
		{"keep the console's log", func() error { return g.keepConsole(w.id) }},
		{"remove the clone", func() error { return os.RemoveAll(g.cloneDir(w.id)) }},
		{"remove the run folder", func() error { return os.RemoveAll(g.runDir(w.id)) }},
		{"remove the record", func() error { return g.removeRecord(w.id) }},
	}
	for _, s := range steps {
		if err := s.undo(); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

// killVM ends the worker's VM; where this process never knew it, it is looked for in the worker's folder.
func (g *Group) killVM(w *worker) error {
	g.mu.Lock()
	v := w.vm
	g.mu.Unlock()
	if v == nil {
		if _, err := os.Stat(g.vmDir(w.id)); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		// A plugin that ends has to end its VMs, too: not g.ctx.
		ctx, cancel := context.WithTimeout(context.Background(), adoptTimeout)
		defer cancel()
		var err error
		if v, err = w.driver.Adopt(ctx, g.vmDir(w.id)); err != nil {
			if errors.Is(err, vm.ErrNotRunning) {
				return nil
			}
			return err
		}
	}
	return v.Kill()
}
