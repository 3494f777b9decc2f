// Package fleet is fleeting's provider.InstanceGroup over a Plan: GitLab Runner asks for workers, and it
// gives them a slot, a clone and a VM. It executes the Plan and changes nothing of it: it
// makes no interface and no firewall rule, and it needs no root.
//
// What a worker is made of, in the order of making; it goes in the reverse order:
//
//	Paths.Workers/POOL/ID.json   the record: written before anything else, removed after all else
//	Paths.Run/ID/key             the private key of the worker's user (0600)
//	Paths.Run/ID/vm/             the VMM's folder: sockets, pid
//	Paths.Clones/POOL/ID/        the disk, the seed ISO, the console's log
//
// A record, the key and the rest of the run folder are not flushed to the disk: they have to survive this
// process, not the machine. After a power cut no VM is left that they could speak of; what lies in
// Paths.Clones/POOL with no record is removed then.
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

// Options wire a Group to what it may not import or build itself.
type Options struct {
	Version   string
	BuildInfo string
	// Driver makes the driver of a Plan's hypervisor.
	Driver func(plan.Hypervisor, *slog.Logger) (vm.Driver, error)
	// Routes says what keeps packets from the slots' workers or from the internet: troubles with which workers can still start,
	// and an error where the host does not reach them.
	Routes func(*plan.Plan, []plan.Slot) (troubles []string, err error)

	// Secrets gives the value of a secret of a prebuild, by its place: see image.Options.
	Secrets func(from string) (string, error)
	// Predecessor serves a plugin_config with the predecessor's keys; nil refuses them.
	Predecessor *Predecessor
}

// Predecessor makes a host of the predecessor's plugin_config.
type Predecessor struct {
	Keys []string
	// Plan compiles the keys, decoded from JSON, to a Plan.
	Plan func(keys map[string]any) (*plan.Plan, error)
	// Up makes the host what the Plan says: network and disks. It is called at every Init and does nothing
	// where all is there. Nothing takes it down: workers outlive the plugin.
	Up func(context.Context, *plan.Plan) error
}

// images is what a Group needs of image.Store.
type images interface {
	Ensure(context.Context, *plan.Image) (*image.Sealed, error)
	Refresh(context.Context, *plan.Image) (*image.Sealed, error)
	Clone(ctx context.Context, img *image.Sealed, dst string, size int64) error
	Prune(ctx context.Context, inUse func(digest string) bool) ([]string, error)
}

// Group is one pool of one Plan. Its zero value is of no use: see New.
type Group struct {
	opts Options
	cfg  config

	// What tests replace to inject faults.
	openImages func(*plan.Plan, image.Options) (images, error)
	checkLinks func(*plan.Plan, []plan.Slot) error
	tryStart   func(*plan.Plan) error
	waitReady  func(context.Context, *Group, *worker, *image.Sealed) error
	boots      int           // how many VMs boot at once
	backoff    time.Duration // after the first failure of an image

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

	ctx    context.Context // the Group's life; ended by Shutdown
	cancel context.CancelCauseFunc
	turn   chan struct{} // holds a token for each VM that boots
	wg     sync.WaitGroup

	life sync.Mutex // held by Init, and while Shutdown looks whether there was one

	mu      sync.Mutex
	closed  bool
	workers map[string]*worker
	busy    map[int]int // slot index: how many workers hold it
	free    []plan.Slot // least recently used first
	ended   chan struct{}
}

var _ provider.InstanceGroup = (*Group)(nil)

// New makes a Group that is ready for its plugin_config (UnmarshalJSON) and Init.
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
		// A boot is mostly work for the CPU. More at once only make each of them later.
		boots:   max(2, runtime.NumCPU()),
		backoff: minBackoff,
		workers: map[string]*worker{},
		busy:    map[int]int{},
		ended:   make(chan struct{}),
	}
}

// UnmarshalJSON takes the plugin_config. Its error reaches the runner's log as
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

// Init checks all that could keep workers from starting, takes the pool for this process, and adopts or removes
// what an earlier one left. It waits for no image: the runner starts a plugin anew at each job poll for as long
// as Init fails.
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
		g.log.Info("workers are ready when they are called running: instance_ready_command (cloud-init status --wait) can be removed from config.toml")
	}
	driver, err := g.canStart(ctx, p)
	if err := errors.Join(err, g.makeFolders(p)); err != nil {
		return err
	}
	if err := g.tryStart(p); err != nil {
		return err
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
	g.prepareImage()
	g.log.Info("plugin ready", "host", p.Host, "pool", g.pool.Name, "slots", g.pool.MaxInstances, "adopted", len(g.workers), "ms", ms(start))
	return nil
}

// load reads the plan, finds the pool in it, and checks what the runner wants of it.
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

// canStart looks whether the host has what workers need: it changes nothing.
func (g *Group) canStart(ctx context.Context, p *plan.Plan) (vm.Driver, error) {
	driver, err := g.probe(ctx, p)
	if err := errors.Join(err, g.checkLinks(p, p.PoolSlots(g.pool))); err != nil {
		return nil, err
	}
	return driver, g.checkRoutes(p, p.PoolSlots(g.pool))
}

// tryOut is as much of Init as can be done beside the process that has the pool.
func (g *Group) tryOut(ctx context.Context, settings provider.Settings) error {
	g.log, g.settings = hclog.NewNullLogger(), settings
	g.slog = newSlog(g.log)
	p, err := g.load()
	if err != nil || g.cfg.keys != nil { // the network of the predecessor's keys is the plugin's to make
		return err
	}
	_, err = g.canStart(ctx, p)
	return err
}

// creating is how many workers are being made.
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

// lockTimeout is how long a plugin that was killed may take to be gone: its lock goes with its last thread, and the
// runner starts the next one at once.
const lockTimeout = time.Second

// take locks the pool on this host for this process. The lock is in the run folder, which all plans of a host
// share: two plans that name one pool would use the same TAPs.
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
			"a pool belongs to one [[runners]] section; give each its own pool, or end the other runner", g.pool.Name, path)
	}
	if err != nil {
		return fmt.Errorf("lock pool %q: %w", g.pool.Name, err)
	}
	g.lock = l
	return nil
}

// prepareImage makes the image before the first worker asks for it. Where there is no applied host there
// is no refresh timer either, and the plugin keeps the image fresh itself.
func (g *Group) prepareImage() {
	g.background(func() {
		if _, err := g.sealed.get(g.ctx, time.Hour); err != nil || g.cfg.keys == nil || g.plan.Refresh <= 0 {
			return
		}
		for {
			if err := g.refresh(); err != nil && g.ctx.Err() == nil {
				g.log.Warn("the image was not refreshed; the one in use stays", "image", g.image.Name, "error", err)
			}
			select {
			case <-g.ctx.Done():
				return
			case <-time.After(time.Duration(g.plan.Refresh)):
			}
		}
	})
}

// refresh makes the image anew where its source has changed, and removes what nothing stands for any more.
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

// startsFrom reports whether a worker is just being made of the image.
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

// background runs fn; Shutdown waits for it. It is called by Init and by what runs in the background itself.
func (g *Group) background(fn func()) {
	g.wg.Add(1)
	go func() {
		defer g.wg.Done()
		fn()
	}()
}

// Update shows every worker. A worker that is gone is shown as such for some rounds, in case that an answer got
// lost; one that was never seen alive is shown as deleting first: fleeting forgets a new instance that is
// deleted, and keeps the request for it pending for good.
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

// tombstoneRounds is in how many Updates a worker that is gone is still shown.
const tombstoneRounds = 10

// Increase gives n workers a slot and a record and starts to make them. Where there are fewer slots, or not all
// records can be written, it makes fewer and says so in the log: gRPC carries either an answer or an error, and
// an error would tell fleeting that none was made. It is an error that none was.
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
		g.log.Error("made fewer workers than requested", "asked", n, "made", made, "error", err)
	}
	return made, nil
}

// add makes one worker: its slot and its record now, the rest in the background.
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
		return plan.Slot{}, fmt.Errorf("all %d slots of pool %q are taken (a slot is free again once its worker is cleaned up)",
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
		return // the worker of another plan: no slot of this one
	}
	if g.busy[slot.Index]--; g.busy[slot.Index] == 0 {
		delete(g.busy, slot.Index)
		g.free = append(g.free, slot)
	}
}

// register makes a worker known, unless the Group has ended.
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

// Decrease starts to remove workers. One that is not there (any more) is removed already.
//
// The VM is killed and not shut down: its disk is thrown away in the next
// step, so there is nothing in it that would be worth a flush or a wait.
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

// Heartbeat fails where the worker is not running, with the reason; a VMM that has exited is noticed at once.
func (g *Group) Heartbeat(_ context.Context, id string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	w, ok := g.workers[id]
	if !ok {
		return fmt.Errorf("%w: there is no worker %s", provider.ErrInstanceUnhealthy, id)
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

// Shutdown deletes nothing: who wants that has called Decrease. Workers that are being made or removed are
// cleaned up, and it waits for that; those that run stay, with their records, for the next plugin to adopt. It
// may be called again.
func (g *Group) Shutdown(ctx context.Context) error {
	g.life.Lock()
	g.mu.Lock()
	first := !g.closed
	g.closed = true
	g.mu.Unlock()
	ready := g.plan != nil
	g.life.Unlock()
	if !ready {
		return nil // Init has not been there, or failed
	}
	if first {
		g.cancel(errShutdown)
		go func() {
			g.wg.Wait()
			if err := g.lock.Unlock(); err != nil {
				g.log.Warn("unlock the pool", "pool", g.pool.Name, "error", err)
			}
			close(g.ended)
		}()
	}
	select {
	case <-g.ended:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the plugin of pool %q ends before all workers are cleaned up; the next start goes on with it: %w",
			g.pool.Name, context.Cause(ctx))
	}
}

func ms(since time.Time) int64 { return time.Since(since).Milliseconds() }

// oneLine makes one line of joined errors: the runner's log is one line an entry.
func oneLine(err error) error {
	if strings.Contains(err.Error(), "\n") {
		return lineError{err}
	}
	return err
}

type lineError struct{ error }

func (e lineError) Error() string { return strings.ReplaceAll(e.error.Error(), "\n", "; ") }
func (e lineError) Unwrap() error { return e.error }
