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

// worker is one worker, from Increase until it is forgotten. One goroutine (live) drives it:
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
//	            ▼ Shutdown: stays, with its record         │
//	      (adopted by the next plugin as running, or ────────┘
//	       removed if that is not possible)
//
// A slot becomes free, and deleted or timeout is reported, only once nothing of the worker is left, because both make
// fleeting ask for the next worker. A worker never goes back to an earlier state and is never retried: fleeting asks for another.
type worker struct {
	id      string
	slot    plan.Slot
	created time.Time
	driver  vm.Driver // with which its VM was started
	ctx     context.Context
	cancel  context.CancelCauseFunc

	user string // of the image that it was made from, if an earlier process started it

	first bool // it tries on behalf of the waiting workers (see pacer); only used by live and its callees

	key []byte // private, PEM; never in a record or a log. Set before state becomes running, like vm

	// Guarded by Group.mu.
	state  provider.State
	image  string // digest of the image that it was cloned from; "" before that
	err    error  // why it is not running
	vm     vm.VM
	gone   bool // state is final: deleted or timeout
	shown  bool // Update has reported it
	rounds int  // how often Update has reported it as gone
}

// errUnfinished marks a worker that an earlier process was still creating when it ended. That is not a failure.
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

// live drives a new worker until its end.
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

// watch waits for whatever ends a running worker.
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

// exited returns the reason why a VM has ended.
func exited(v vm.VM) error { return fmt.Errorf("its VM has ended: %w", v.Exit()) }

// end removes a worker, trying as often as necessary, and frees its slot.
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

// logEnd logs why a worker ends, and tells the pacer.
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

// teardownUntilDone retries a failed teardown until it succeeds or the Group ends. In that case the record stays, and the next
// plugin continues. Meanwhile the slot stays in use: a second VM on its TAP would be worse than one worker less.
func (g *Group) teardownUntilDone(w *worker) bool {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, time.Minute) {
		err := g.teardown(w)
		if err == nil {
			return true
		}
		g.log.Error("cannot remove worker yet; its slot stays in use",
			"worker", w.id, "error", oneLine(err), "again_in", pause.String())
		select {
		case <-g.ctx.Done():
			return false
		case <-time.After(pause):
		}
	}
}

// teardown undoes the steps of create in reverse order, whether or not this or an earlier process has done them. It
// depends only on the worker's id, and is idempotent. It stops at the first failure, because the record must be
// removed last.
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

// killVM ends the worker's VM. If this process did not start it, killVM finds it through the worker's folder.
func (g *Group) killVM(w *worker) error {
	g.mu.Lock()
	v := w.vm
	g.mu.Unlock()
	if v == nil {
		if _, err := os.Stat(g.vmDir(w.id)); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		// Not g.ctx: VMs must be killed during Shutdown, too.
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
