package fleet

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"

	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// fakeDriver keeps VMs by their folder, as a host does: a second Group with the same fakeDriver finds the VMs of
// the first.
type fakeDriver struct {
	mu    sync.Mutex
	vms   map[string]*fakeVM
	start func(context.Context, vm.Config) error // nil: no fault
	kill  func(dir string) error
	probe func() error
	adopt func(dir string) error
	cfgs  []vm.Config
}

func (d *fakeDriver) Name() string { return "qemu" }

func (d *fakeDriver) Probe(context.Context) (vm.Info, error) {
	if d.probe != nil {
		return vm.Info{}, d.probe()
	}
	return vm.Info{Binary: "/bin/fake", Version: "1", Accel: "none"}, nil
}

func (d *fakeDriver) Start(ctx context.Context, cfg vm.Config) (vm.VM, error) {
	if d.start != nil {
		if err := d.start(ctx, cfg); err != nil {
			return nil, err
		}
	}
	v := &fakeVM{d: d, dir: cfg.Dir, done: make(chan struct{})}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.vms == nil {
		d.vms = map[string]*fakeVM{}
	}
	d.vms[cfg.Dir] = v
	d.cfgs = append(d.cfgs, cfg)
	return v, nil
}

func (d *fakeDriver) Adopt(_ context.Context, dir string) (vm.VM, error) {
	if d.adopt != nil {
		if err := d.adopt(dir); err != nil {
			return nil, err
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if v, ok := d.vms[dir]; ok {
		return v, nil
	}
	return nil, vm.ErrNotRunning
}

func (d *fakeDriver) alive() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.vms)
}

type fakeVM struct {
	d    *fakeDriver
	dir  string
	once sync.Once
	done chan struct{}
}

func (v *fakeVM) PID() int              { return 4711 }
func (v *fakeVM) Done() <-chan struct{} { return v.done }

func (v *fakeVM) Exit() error {
	select {
	case <-v.done:
		return errors.New("signal: killed")
	default:
		return nil
	}
}

func (v *fakeVM) Channel(ctx context.Context) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}
func (v *fakeVM) Stop(context.Context) error { return v.Kill() }

func (v *fakeVM) Kill() error {
	if v.d.kill != nil {
		if err := v.d.kill(v.dir); err != nil {
			return err
		}
	}
	v.die()
	return nil
}

// die ends the VMM suddenly.
func (v *fakeVM) die() {
	v.once.Do(func() {
		v.d.mu.Lock()
		delete(v.d.vms, v.dir)
		v.d.mu.Unlock()
		close(v.done)
	})
}

// fakeImages returns an image at once and clones it as a small file, unless told otherwise.
type fakeImages struct {
	noGuest bool // without the guest part: ready once SSH answers
	ensure  func(context.Context) error
	refresh func()
	prune   func(inUse func(string) bool) ([]string, error)
	clone   func(ctx context.Context, dst string) error

	mu     sync.Mutex
	digest string // of the existing image; any other was removed
}

// replace makes another image and removes the previous one.
func (f *fakeImages) replace(digest string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.digest = digest
}

func (f *fakeImages) current() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return cmp.Or(f.digest, "d1")
}

func (f *fakeImages) Ensure(ctx context.Context, _ *plan.Image) (*image.Sealed, error) {
	if f.ensure != nil {
		if err := f.ensure(ctx); err != nil {
			return nil, err
		}
	}
	return &image.Sealed{Digest: f.current(), Kernel: "/k", Cmdline: "root=/dev/vda", User: "ubuntu", Guest: !f.noGuest, Cached: true}, nil
}

func (f *fakeImages) Refresh(ctx context.Context, img *plan.Image) (*image.Sealed, error) {
	if f.refresh != nil {
		f.refresh()
	}
	return f.Ensure(ctx, img)
}

func (f *fakeImages) Prune(_ context.Context, inUse func(string) bool) ([]string, error) {
	if f.prune == nil {
		return nil, nil
	}
	return f.prune(inUse)
}

func (f *fakeImages) Clone(ctx context.Context, img *image.Sealed, dst string, _ int64) error {
	if img.Digest != f.current() {
		return fmt.Errorf("clone %s: %w", img.Digest, os.ErrNotExist)
	}
	if f.clone != nil {
		if err := f.clone(ctx, dst); err != nil {
			return err
		}
	}
	return os.WriteFile(dst, []byte("disk"), 0o600)
}

// host is a host for tests: a plan on disk, and fakes that outlive a Group.
type host struct {
	t      testing.TB
	plan   *plan.Plan
	path   string // path of plan.json
	driver *fakeDriver
	images *fakeImages
	ready  func(context.Context, *worker) error
	log    *logBuffer
}

const pool = "small"

func newHost(t testing.TB, slots int) *host {
	t.Helper()
	// t.TempDir is too long for sockets below it.
	dir, err := os.MkdirTemp("", "fl")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	h := &host{t: t, plan: testPlan(dir, slots), path: filepath.Join(dir, "plan.json"),
		driver: &fakeDriver{}, images: &fakeImages{}, log: &logBuffer{}}
	h.write()
	return h
}

func (h *host) write() {
	h.t.Helper()
	data, err := h.plan.JSON()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(h.path, data, 0o600); err != nil {
		h.t.Fatal(err)
	}
}

func testPlan(dir string, slots int) *plan.Plan {
	p := &plan.Plan{
		Version: plan.Version, Host: "testhost", EgressInterface: "eth0", User: "root",
		Paths: plan.Paths{
			State: dir + "/state", Disks: dir + "/disks", Images: dir + "/disks/images", Clones: dir + "/disks/clones",
			Workers: dir + "/state/workers", Cache: dir + "/state/cache", Run: dir + "/run",
		},
		Disks:      plan.NewDisks(dir+"/state", "auto", 0),
		Hypervisor: plan.Hypervisor{Driver: "qemu", Binary: "qemu"},
		Network: plan.Network{
			Subnet: netip.MustParsePrefix("127.77.0.0/16"), Gateway: netip.MustParseAddr("127.77.0.1"), DNS: []netip.Addr{},
			MTU: 1500, HostMAC: "02:fd:00:00:00:01", GuestMAC: "02:fd:00:00:00:02", Egress: []plan.Egress{},
		},
		Images: []plan.Image{{Name: "base", Source: plan.Source{File: &plan.FileSource{Disk: "/d", Kernel: "/k"}}, User: "ubuntu", BuildSlot: slots}},
		Pools: []plan.Pool{{Name: pool, Image: "base", CPUs: 1, Memory: 1 << 30, Disk: 1 << 30, Start: "cold", MaxInstances: slots,
			StartTimeout: plan.Duration(time.Minute)}},
		Runners: []plan.Runner{}, Files: []plan.File{}, Units: []plan.Unit{}, Sysctls: []plan.Sysctl{},
	}
	addr := p.Network.Gateway
	for i := range slots + 1 {
		addr = addr.Next()
		p.Slots = append(p.Slots, plan.Slot{Index: i, TAP: fmt.Sprintf("fltest%d", i), Address: addr, Queues: 1})
	}
	return p
}

// group returns a Group of the host, before its Init.
func (h *host) group() *Group {
	g := New(Options{Version: "1.2.3", BuildInfo: "test", Driver: func(plan.Hypervisor, *slog.Logger) (vm.Driver, error) { return h.driver, nil }})
	g.openImages = func(*plan.Plan, image.Options) (images, error) { return h.images, nil }
	g.checkLinks = func(*plan.Plan, []plan.Slot) error { return nil }
	g.tryStart = func(*plan.Plan) error { return nil }
	g.pace.least = 10 * time.Millisecond
	g.waitReady = func(ctx context.Context, _ *Group, w *worker, _ *image.Sealed) error {
		if h.ready != nil {
			return h.ready(ctx, w)
		}
		return nil
	}
	cfg, err := json.Marshal(map[string]string{"plan": h.path, "pool": pool})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := json.Unmarshal(cfg, g); err != nil {
		h.t.Fatal(err)
	}
	return g
}

func (h *host) logger() hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: h.log, DisableTime: true})
}

// start returns a Group of the host, after its Init. It is shut down when the test ends.
func (h *host) start() *Group {
	h.t.Helper()
	g := h.group()
	h.init(g)
	return g
}

func (h *host) init(g *Group) provider.ProviderInfo {
	h.t.Helper()
	info, err := g.Init(h.t.Context(), h.logger(), provider.Settings{})
	if err != nil {
		h.t.Fatalf("Init: %v", err)
	}
	h.t.Cleanup(func() { h.shutdown(g) })
	return info
}

func (h *host) shutdown(g *Group) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := g.Shutdown(ctx); err != nil {
		h.t.Error(err)
	}
}

// crash ends a Group's process suddenly: nothing is cleaned up, and the lock is released.
func (h *host) crash(g *Group) {
	h.t.Helper()
	if err := g.lock.Unlock(); err != nil {
		h.t.Fatal(err)
	}
}

// left lists everything that workers left on the host: files, folders, VMs. Locks and the plan do not count.
func (h *host) left() []string {
	h.t.Helper()
	var left []string
	p := h.plan.Paths
	for _, root := range []string{filepath.Join(p.Workers, pool), filepath.Join(p.Clones, pool), p.Run} {
		err := filepath.WalkDir(root, func(path string, e os.DirEntry, err error) error {
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			if err == nil && path != root && !strings.HasSuffix(path, ".lock") {
				left = append(left, path)
			}
			return err
		})
		if err != nil {
			h.t.Fatal(err)
		}
	}
	for range h.driver.alive() {
		left = append(left, "a VM")
	}
	for _, pid := range vmsBelow(p.Clones) {
		left = append(left, fmt.Sprintf("VM process %d", pid))
	}
	return left
}

func (h *host) wantNothingLeft(g *Group) {
	h.t.Helper()
	if left := h.left(); len(left) > 0 {
		h.t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.free) != h.plan.Pools[0].MaxInstances || len(g.busy) != 0 {
		h.t.Errorf("%d of %d slots are free, busy: %v", len(g.free), h.plan.Pools[0].MaxInstances, g.busy)
	}
}

// states returns the result of one Update.
func states(t testing.TB, g *Group) map[string]provider.State {
	t.Helper()
	all := map[string]provider.State{}
	if err := g.Update(t.Context(), func(id string, s provider.State) { all[id] = s }); err != nil {
		t.Fatal(err)
	}
	return all
}

// waitFor polls until cond holds.
func waitFor(t testing.TB, what string, cond func() bool) {
	t.Helper()
	deadline := time.NewTimer(20 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-deadline.C:
			t.Fatalf("timed out waiting for: %s", what)
		case <-tick.C:
		}
	}
}

// inState returns how many workers are in a state, without the bookkeeping of an Update.
func (g *Group) inState(s provider.State) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := 0
	for _, w := range g.workers {
		if w.state == s {
			n++
		}
	}
	return n
}

func waitState(t testing.TB, g *Group, s provider.State, n int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("%d workers in state %s", n, s), func() bool { return g.inState(s) == n })
}

func increase(t testing.TB, g *Group, n int) {
	t.Helper()
	if got, err := g.Increase(t.Context(), n); got != n || err != nil {
		t.Fatalf("Increase(%d) = %d, %v", n, got, err)
	}
}

func ids(g *Group) []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	var all []string
	for id, w := range g.workers {
		if !w.gone {
			all = append(all, id)
		}
	}
	slices.Sort(all)
	return all
}

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

type (
	vmConfig     = vm.Config
	imageOptions = image.Options
)
