// Package fleet implements fleeting's provider.InstanceGroup on top of a Plan: when GitLab Runner asks for
// workers, it gives each a slot, a clone and a VM. It executes the Plan without changing the host:
// it creates no interface and no firewall rule, and needs no root.
//
// A worker consists of these files, listed in the order of creation; they are removed in reverse order:
//
//	Paths.Workers/POOL/ID.json   the record: written first, removed last
//	Paths.Run/ID/key             the private key of the worker's user (0600)
//	Paths.Run/ID/vm/             the VMM's folder: sockets, pid
//	Paths.Clones/POOL/ID/        the disk, the seed ISO, the console's log
//
// Records, keys and the rest of the run folder are not flushed to disk: they have to survive this process, not
// the machine. A power cut leaves no VM that they could belong to; clones that it leaves in Paths.Clones/POOL
// without a record are removed at the next start.
package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"

	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// Options connect a Group to what it may not import or build itself.
type Options struct {
	Version   string
	BuildInfo string
	// Driver returns the driver of a Plan's hypervisor.
	Driver func(plan.Hypervisor, *slog.Logger) (vm.Driver, error)
	// Routes checks the routes between the slots' workers, this host and the internet. It returns troubles that do not
	// keep workers from starting, and an error if the host cannot reach them.
	Routes func(*plan.Plan, []plan.Slot) (troubles []string, err error)

	// Secrets returns the value of a prebuild's secret by its place: see image.Options.
	Secrets func(from string) (string, error)
	// OnlyRemove makes a Group that only removes the workers of an earlier process. Its Init neither checks nor prepares what
	// starting workers needs.
	OnlyRemove bool
	// Predecessor handles a plugin_config with the predecessor's keys; if nil, such a config is an error.
	Predecessor *Predecessor
}

// Predecessor turns the predecessor's plugin_config into a host.
type Predecessor struct {
	Keys []string
	// Plan compiles the keys, decoded from JSON, to a Plan.
	Plan func(keys map[string]any) (*plan.Plan, error)
	// Up sets up the host according to the Plan: network and disks. It is called at every Init and does nothing
	// if the host matches. There is no counterpart, because workers outlive the plugin.
	Up func(context.Context, *plan.Plan) error
}

// images is the part of image.Store that a Group uses.
type images interface {
	Ensure(context.Context, *plan.Image) (*image.Sealed, error)
	Refresh(context.Context, *plan.Image) (*image.Sealed, error)
	Clone(ctx context.Context, img *image.Sealed, dst string, size int64) error
	Prune(ctx context.Context, inUse func(digest string) bool) ([]string, error)
}

// Group is one pool of one Plan. Use New to make one.
type Group struct {
	opts Options
	cfg  config

	// Tests replace these to inject faults.
	openImages func(*plan.Plan, image.Options) (images, error)
	checkLinks func(*plan.Plan, []plan.Slot) error
	tryStart   func(*plan.Plan) error
	waitReady  func(context.Context, *Group, *worker, *image.Sealed) error
	boots      int           // how many VMs may boot at the same time
	backoff    time.Duration // after the first failed build of an image

	log      hclog.Logger
	slog     *slog.Logger
	settings provider.Settings
	plan     *plan.Plan
	pool     *plan.Pool
	image    *plan.Image
	driver   vm.Driver
	images   images
	sealed   *sealer
	pace     *pacer
	lock     *state.Lock
	ids      *idSource

	ctx    context.Context // cancelled by Shutdown
	cancel context.CancelCauseFunc
	turn   chan struct{} // holds a token for each booting VM
	wg     sync.WaitGroup

	life sync.Mutex // held by Init, and by Shutdown while it checks whether Init was called

	mu      sync.Mutex
	closed  bool
	workers map[string]*worker
	busy    map[int]int // by slot index: the number of workers that hold it
	free    []plan.Slot // least recently used first
	ended   chan struct{}
}

var _ provider.InstanceGroup = (*Group)(nil)

// New returns a Group, which needs its plugin_config (UnmarshalJSON) and Init next.
func New(o Options) *Group {
	return &Group{
		opts: o,
		openImages: func(p *plan.Plan, io image.Options) (images, error) {
			return image.Open(p, io)
		},
		checkLinks: checkLinks,
		tryStart:   tryStart,
		pace:       newPacer(),
		waitReady:  waitReady,
		// Booting is mostly CPU work: more at the same time would only slow each other down.
		boots:   max(2, runtime.NumCPU()),
		backoff: minBackoff,
		workers: map[string]*worker{},
		busy:    map[int]int{},
		ended:   make(chan struct{}),
	}
}

// UnmarshalJSON checks and stores the plugin_config. Its error appears in the runner's log as
// "failed to update executor: … unmarshaling config: …".
func (g *Group) UnmarshalJSON(data []byte) error {
	var keys []string
	if g.opts.Predecessor != nil {
		keys = g.opts.Predecessor.Keys
	}
	cfg, err := parseConfig(data, keys)
	if err != nil {
		return err
	}
	g.cfg = cfg
	return nil
}

var _ json.Unmarshaler = (*Group)(nil)

var (
	errShutdown = errors.New("plugin shutting down")
	errDeleted  = errors.New("deletion requested")
)

// Init checks everything that could keep workers from starting, locks the pool for this process, and adopts or removes
// the workers of an earlier one. It does not wait for an image: while Init fails, the runner starts the plugin again at
// each job poll.
func (g *Group) Init(ctx context.Context, log hclog.Logger, settings provider.Settings) (provider.ProviderInfo, error) {
	g.life.Lock()
	defer g.life.Unlock()
	switch {
	case g.closed:
		return provider.ProviderInfo{}, errShutdown
	case g.plan != nil:
		return provider.ProviderInfo{}, errors.New("the plugin was initialized twice in one process; it serves one pool")
	}
	g.log = log.Named("fleetingd")
	g.slog = newSlog(g.log)
	g.settings = settings
	err := g.init(ctx)
	if err != nil {
		if g.lock != nil {
			err = errors.Join(err, g.lock.Unlock())
			g.lock = nil
		}
		return provider.ProviderInfo{}, oneLine(err)
	}
	return provider.ProviderInfo{
		ID:        "fleetingd/" + g.plan.Host + "/" + g.pool.Name,
		MaxSize:   g.pool.MaxInstances,
		Version:   g.opts.Version,
		BuildInfo: g.opts.BuildInfo,
	}, nil
}

func (g *Group) init(ctx context.Context) error {
	start := time.Now()
	p, err := g.load()
	if err != nil {
		return err
	}
	if err := g.take(ctx, p); err != nil {
		return err
	}
	if g.cfg.keys != nil {
		if err := g.opts.Predecessor.Up(ctx, p); err != nil {
			return err
		}
		g.log.Info("workers are reported as running only when they are ready: remove instance_ready_command (cloud-init status --wait) from " +
			"config.toml")
	}
	driver, err := g.canStart(ctx, p)
	if err := errors.Join(err, g.makeFolders(p)); err != nil {
		return err
	}
	if !g.opts.OnlyRemove {
		if err := g.tryStart(p); err != nil {
			return err
		}
	}
	progress := newProgressLog(g.log)
	store, err := g.openImages(p, image.Options{Log: g.slog, Driver: driver, Secrets: g.opts.Secrets, Progress: progress.show})
	if err != nil {
		return fmt.Errorf("images: %w", err)
	}

	g.plan, g.driver, g.images = p, driver, store
	g.ctx, g.cancel = context.WithCancelCause(context.Background())
	g.turn = make(chan struct{}, g.boots)
	g.ids = newIDSource(g.pool.Name)
	g.sealed = &sealer{
		log: g.log, image: g.image.Name, stop: g.ctx.Done(), start: g.background, backoff: g.backoff,
		ensure: func() (*image.Sealed, error) { return store.Ensure(g.ctx, g.image) },
	}
	if err := g.recover(ctx); err != nil {
		g.cancel(errShutdown)
		g.plan = nil
		return err
	}
	if g.opts.OnlyRemove {
		return nil
	}
	g.prepareImage()
	g.log.Info("plugin ready", "host", p.Host, "pool", g.pool.Name, "slots", g.pool.MaxInstances, "adopted", len(g.workers), "ms", ms(start))
	return nil
}

// load reads the plan, finds the pool in it, and checks the runner's settings.
func (g *Group) load() (*plan.Plan, error) {
	p, err := g.loadPlan()
	if err != nil {
		return nil, err
	}
	if g.pool, err = p.Pool(g.cfg.pool); err != nil {
		return nil, fmt.Errorf("plugin_config pool: %w", err)
	}
	if err := p.CanStart(g.pool); err != nil {
		return nil, err
	}
	if g.image, err = p.Image(g.pool.Image); err != nil {
		return nil, err
	}
	return p, checkSettings(g.settings, g.image.User)
}

// canStart checks whether the host has what workers need. It changes nothing.
func (g *Group) canStart(ctx context.Context, p *plan.Plan) (vm.Driver, error) {
	driver, err := g.probe(ctx, p)
	if g.opts.OnlyRemove {
		return driver, err
	}
	if err := errors.Join(err, g.checkLinks(p, p.PoolSlots(g.pool))); err != nil {
		return nil, err
	}
	return driver, g.checkRoutes(p, p.PoolSlots(g.pool))
}

// tryOut does as much of Init as is possible next to the process that holds the pool.
func (g *Group) tryOut(ctx context.Context, settings provider.Settings) error {
	g.log, g.settings = hclog.NewNullLogger(), settings
	g.slog = newSlog(g.log)
	p, err := g.load()
	if err != nil || g.cfg.keys != nil { // with the predecessor's keys, the plugin has yet to set up the network
		return err
	}
	_, err = g.canStart(ctx, p)
	return err
}

// creating returns the number of workers that are being created.
func (g *Group) creating() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := 0
	for _, w := range g.workers {
		if w.state == provider.StateCreating {
			n++
		}
	}
	return n
}

// lockTimeout is how long a killed plugin may take to release its lock: that happens when its last thread ends, and the
// runner starts the next plugin immediately.
const lockTimeout = time.Second

// take locks the pool on this host for this process. The lock is in the run folder, which all plans of a host
// share: two plans with a pool of the same name would use the same TAPs.
func (g *Group) take(ctx context.Context, p *plan.Plan) error {
	if err := makeFolder(p, p.Paths.Run, 0o755); err != nil {
		return err
	}
	path := filepath.Join(p.Paths.Run, g.pool.Name+".lock")
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	l, err := state.WaitLock(ctx, path)
	if errors.Is(err, state.ErrLocked) {
		return fmt.Errorf("pool %q is served by another plugin process on this host (it holds %s): "+
			"give each [[runners]] section its own pool, or stop the other runner", g.pool.Name, path)
	}
	if err != nil {
		return fmt.Errorf("lock pool %q: %w", g.pool.Name, err)
	}
	g.lock = l
	return nil
}

// prepareImage builds the image before the first worker asks for it. Without an applied host there is no refresh
// timer, so the plugin refreshes the image itself.
func (g *Group) prepareImage() {
	g.background(func() {
		if _, err := g.sealed.get(g.ctx, time.Hour); err != nil || g.cfg.keys == nil || g.plan.Refresh <= 0 {
			return
		}
		for {
			if err := g.refresh(); err != nil && g.ctx.Err() == nil {
				g.log.Warn("cannot refresh the image; keeping the one in use", "image", g.image.Name, "error", err)
			}
			select {
			case <-g.ctx.Done():
				return
			case <-time.After(time.Duration(g.plan.Refresh)):
			}
		}
	})
}

// refresh rebuilds the image if its source has changed, and removes unreferenced images.
func (g *Group) refresh() error {
	if _, err := g.images.Refresh(g.ctx, g.image); err != nil {
		return err
	}
	removed, err := g.images.Prune(g.ctx, g.startsFrom)
	if len(removed) > 0 {
		g.log.Info("removed unreferenced images", "number", len(removed))
	}
	return err
}

// startsFrom reports whether a worker is being created from the image.
func (g *Group) startsFrom(digest string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, w := range g.workers {
		if w.image == digest && w.state == provider.StateCreating {
			return true
		}
	}
	return false
}

// background runs fn, and Shutdown waits for it. Only Init and functions that already run in the background may call it.
func (g *Group) background(fn func()) {
	g.wg.Add(1)
	go func() {
		defer g.wg.Done()
		fn()
	}()
}

// Update reports every worker. A worker that is gone is reported for some more rounds, in case an answer gets lost.
// One that was never reported alive is reported as deleting first: fleeting forgets a new instance that is reported
// as deleted, and keeps its request pending forever.
func (g *Group) Update(_ context.Context, fn func(id string, state provider.State)) error {
	type shown struct {
		id    string
		state provider.State
	}
	g.mu.Lock()
	all := make([]shown, 0, len(g.workers))
	for id, w := range g.workers {
		s := w.state
		switch {
		case !w.gone:
		case !w.shown:
			s = provider.StateDeleting
		case w.rounds >= tombstoneRounds:
			delete(g.workers, id)
			continue
		default:
			w.rounds++
		}
		w.shown = true
		all = append(all, shown{id, s})
	}
	g.mu.Unlock()
	slices.SortFunc(all, func(a, b shown) int { return strings.Compare(a.id, b.id) })
	for _, s := range all {
		fn(s.id, s.state)
	}
	return nil
}

// tombstoneRounds is how many Updates still report a worker that is gone.
const tombstoneRounds = 10

// Increase gives n workers a slot and a record and starts creating them. It returns how many it started: fewer than n if
// slots or records fail, which is then only logged, because gRPC carries either an answer or an error. It returns an
// error if there is none.
func (g *Group) Increase(_ context.Context, n int) (int, error) {
	var err error
	made := 0
	for made < n {
		if err = g.add(); err != nil {
			break
		}
		made++
	}
	if made == 0 {
		return 0, err
	}
	if err != nil {
		g.log.Error("made fewer workers than requested", "requested", n, "made", made, "error", err)
	}
	return made, nil
}

// add starts one worker: it takes a slot and writes the record now, and leaves the rest to the background.
func (g *Group) add() error {
	slot, err := g.takeSlot()
	if err != nil {
		return err
	}
	w := g.newWorker(g.ids.next(), slot)
	if err := g.writeRecord(w, nil); err != nil {
		err = fmt.Errorf("worker %s: write its record: %w", w.id, err)
		g.giveSlot(slot)
		return errors.Join(err, g.removeRecord(w.id))
	}
	if !g.register(w) {
		g.giveSlot(slot)
		return errors.Join(errShutdown, g.removeRecord(w.id))
	}
	go g.live(w)
	return nil
}

func (g *Group) takeSlot() (plan.Slot, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return plan.Slot{}, errShutdown
	}
	if len(g.free) == 0 {
		return plan.Slot{}, fmt.Errorf("all %d slots of pool %q are in use (a slot becomes free once its worker is cleaned up)",
			g.pool.MaxInstances, g.pool.Name)
	}
	slot := g.free[0]
	g.free = g.free[1:]
	g.busy[slot.Index]++
	return slot, nil
}

func (g *Group) giveSlot(slot plan.Slot) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.giveSlotLocked(slot)
}

func (g *Group) giveSlotLocked(slot plan.Slot) {
	if slot.Index < 0 {
		return // a worker of an earlier plan, whose slot is not in this one
	}
	if g.busy[slot.Index]--; g.busy[slot.Index] == 0 {
		delete(g.busy, slot.Index)
		slots := g.plan.PoolSlots(g.pool)
		if i := slices.IndexFunc(slots, func(s plan.Slot) bool { return s.Index == slot.Index }); i >= 0 {
			g.free = append(g.free, slots[i]) // as it is now: an adopted worker had an earlier one
		}
	}
}

// register adds a worker to the Group, unless the Group has ended.
func (g *Group) register(w *worker) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.workers[w.id] = w
	g.wg.Add(1)
	return true
}

// Decrease starts to remove workers. It reports an unknown worker as removed.
//
// The VM is killed, not shut down: its disk is deleted in the next step, so there is nothing to flush or to
// wait for.
func (g *Group) Decrease(_ context.Context, ids []string) ([]string, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, errShutdown
	}
	for _, id := range ids {
		if w, ok := g.workers[id]; ok && !w.gone && w.state != provider.StateDeleting {
			w.state = provider.StateDeleting
			w.cancel(errDeleted)
		}
	}
	return ids, nil
}

// Heartbeat returns an error with the reason if the worker is not running. It notices an exited VMM at once.
func (g *Group) Heartbeat(_ context.Context, id string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	w, ok := g.workers[id]
	if !ok {
		return fmt.Errorf("%w: worker %s does not exist", provider.ErrInstanceUnhealthy, id)
	}
	if w.state == provider.StateRunning {
		select {
		case <-w.vm.Done():
			return fmt.Errorf("%w: worker %s: %w", provider.ErrInstanceUnhealthy, id, exited(w.vm))
		default:
			return nil
		}
	}
	if w.err != nil {
		return fmt.Errorf("%w: worker %s is %s: %w", provider.ErrInstanceUnhealthy, id, w.state, w.err)
	}
	return fmt.Errorf("%w: worker %s is %s", provider.ErrInstanceUnhealthy, id, w.state)
}

// Suspend is not supported: ProviderInfo does not offer it.
func (g *Group) Suspend(context.Context, []string) ([]string, error) {
	return nil, provider.ErrSuspendResumeNotSupported
}

// Resume is not supported: ProviderInfo does not offer it.
func (g *Group) Resume(context.Context, []string) ([]string, error) {
	return nil, provider.ErrSuspendResumeNotSupported
}

// Shutdown deletes no running worker: that is what Decrease is for. It waits until workers that are being created or
// removed are cleaned up. Running workers stay, with their records, for the next plugin to adopt. It is idempotent.
func (g *Group) Shutdown(ctx context.Context) error {
	g.life.Lock()
	g.mu.Lock()
	first := !g.closed
	g.closed = true
	g.mu.Unlock()
	ready := g.plan != nil
	g.life.Unlock()
	if !ready {
		return nil // Init was not called, or failed
	}
	if first {
		g.cancel(errShutdown)
		go func() {
			g.wg.Wait()
			if err := g.lock.Unlock(); err != nil {
				g.log.Warn("cannot unlock the pool", "pool", g.pool.Name, "error", err)
			}
			close(g.ended)
		}()
	}
	select {
	case <-g.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the plugin of pool %q ends before all workers are cleaned up; the next start continues the cleanup: %w",
			g.pool.Name, context.Cause(ctx))
	}
}

func ms(since time.Time) int64 { return time.Since(since).Milliseconds() }

// oneLine turns joined errors into one line: each entry of the runner's log is one line.
func oneLine(err error) error {
	if strings.Contains(err.Error(), "\n") {
		return lineError{err}
	}
	return err
}

type lineError struct{ error }

func (e lineError) Error() string { return strings.ReplaceAll(e.error.Error(), "\n", "; ") }
func (e lineError) Unwrap() error { return e.error }
