package fleet

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/go-hclog"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
	"golang.org/x/crypto/ssh"

	"github.com/fleetingd/fleetingd/appliance/guest"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
	"github.com/fleetingd/fleetingd/seed"
)

func TestWorkerLife(t *testing.T) {
	h := newHost(t, 4)
	g := h.group()
	info := h.init(g)
	if info.MaxSize != 4 || info.ID != "fleetingd/testhost/small" || info.Version != "1.2.3" || len(info.Capabilities) != 0 {
		t.Errorf("ProviderInfo %+v", info)
	}
	increase(t, g, 3)
	waitState(t, g, provider.StateRunning, 3)
	all := ids(g)

	keys := map[string]bool{}
	for i, id := range all {
		c, err := g.ConnectInfo(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		signer, err := ssh.ParsePrivateKey(c.Key)
		if err != nil || signer.PublicKey().Type() != ssh.KeyAlgoED25519 {
			t.Errorf("key of %s: %v", id, err)
		}
		keys[string(c.Key)] = true
		if want := h.plan.Slots[i].Address.String(); c.InternalAddr != want || c.ExternalAddr != want {
			t.Errorf("%s: addresses %s, %s; want %s", id, c.InternalAddr, c.ExternalAddr, want)
		}
		if c.Username != "ubuntu" || c.OS != "linux" || c.Arch == "" || c.Protocol != provider.ProtocolSSH || c.ProtocolPort != 22 || c.Expires != nil {
			t.Errorf("%s: %+v", id, c.ConnectorConfig)
		}
		if err := g.Heartbeat(t.Context(), id); err != nil {
			t.Error(err)
		}
		wantPrivate(t, h, g, id, c.Key)
	}
	if len(keys) != 3 {
		t.Errorf("%d keys for 3 workers", len(keys))
	}

	gone := all[0]
	if got, err := g.Decrease(t.Context(), []string{gone, "no-such-worker"}); err != nil || len(got) != 2 {
		t.Fatalf("Decrease = %v, %v", got, err)
	}
	waitState(t, g, provider.StateDeleted, 1)
	if err := g.Heartbeat(t.Context(), gone); !errors.Is(err, provider.ErrInstanceUnhealthy) {
		t.Errorf("Heartbeat of a deleted worker: %v", err)
	}
	if _, err := g.ConnectInfo(t.Context(), gone); err == nil || !strings.Contains(err.Error(), "is deleted, not running") {
		t.Errorf("ConnectInfo of a deleted worker: %v", err)
	}
	// It was never reported alive: reported as deleting once, as deleted for some rounds, then forgotten.
	var seen []provider.State
	for range tombstoneRounds + 3 {
		if s, ok := states(t, g)[gone]; ok {
			seen = append(seen, s)
		}
	}
	want := append([]provider.State{provider.StateDeleting}, slices.Repeat([]provider.State{provider.StateDeleted}, tombstoneRounds)...)
	if !slices.Equal(seen, want) {
		t.Errorf("shown as %v", seen)
	}

	if _, err := g.Decrease(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "all workers gone", func() bool { return len(ids(g)) == 0 })
	h.wantNothingLeft(g)
	if strings.Contains(h.log.String(), "PRIVATE KEY") {
		t.Error("a private key is in the log")
	}
}

// wantPrivate checks that a worker's key is only in its own 0600 file, and that the seed has the public half and the
// names.
func wantPrivate(t *testing.T, h *host, g *Group, id string, key []byte) {
	t.Helper()
	st, err := os.Stat(g.keyPath(id))
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v %v", st, err)
	}
	for _, dir := range []string{g.runDir(id), g.cloneDir(id)} {
		if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v %v", dir, st, err)
		}
	}
	rec, err := os.ReadFile(g.recordPath(id))
	if err != nil || strings.Contains(string(rec), "PRIVATE") {
		t.Errorf("record: %s, %v", rec, err)
	}
	iso, err := os.Open(filepath.Join(g.cloneDir(id), "seed.iso"))
	if err != nil {
		t.Fatal(err)
	}
	defer iso.Close()
	s, err := seed.ReadISO(iso)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.ParsePrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	public := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))
	if s.InstanceID != id || s.Hostname != id || len(s.Users) != 1 || s.Users[0].Name != "ubuntu" ||
		len(s.Users[0].AuthorizedKeys) != 1 || !strings.HasPrefix(s.Users[0].AuthorizedKeys[0], public) {
		t.Errorf("seed of %s: %+v", id, s)
	}
}

// steps are the steps of a worker's start at which it can be stopped: stop blocks there, or fails, or makes the
// step fail.
var steps = map[string]func(h *host, stop func(context.Context) error){
	"image": func(h *host, stop func(context.Context) error) { h.images.ensure = stop },
	"clone": func(h *host, stop func(context.Context) error) {
		h.images.clone = func(ctx context.Context, dst string) error {
			if err := stop(ctx); err != nil {
				return errors.Join(err, os.WriteFile(dst, nil, 0o600))
			}
			return nil
		}
	},
	"start": func(h *host, stop func(context.Context) error) {
		h.driver.start = func(ctx context.Context, _ vmConfig) error { return stop(ctx) }
	},
	"ready": func(h *host, stop func(context.Context) error) {
		h.ready = func(ctx context.Context, _ *worker) error { return stop(ctx) }
	},
}

// obstacles make the Group's own steps fail: something exists where they write, or a folder is missing.
var obstacles = map[string]func(h *host, g *Group){
	"folders": func(h *host, g *Group) { os.RemoveAll(filepath.Dir(g.cloneDir("x"))) },
	"seed": func(h *host, _ *Group) {
		h.images.clone = func(_ context.Context, dst string) error {
			return os.Mkdir(filepath.Join(filepath.Dir(dst), "seed.iso"), 0o700)
		}
	},
	"record": func(h *host, g *Group) {
		h.ready = func(_ context.Context, w *worker) error { return os.Mkdir(g.recordPath(w.id)+".new", 0o700) }
	},
}

func TestStepFails(t *testing.T) {
	errInjected := errors.New("injected")
	for name, inject := range steps {
		if name == "image" {
			continue // is retried: see TestImageRetried
		}
		t.Run(name, func(t *testing.T) {
			h := newHost(t, 2)
			inject(h, func(context.Context) error { return errInjected })
			wantFailure(t, h, h.start(), "injected")
		})
	}
	for name, inject := range obstacles {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, 2)
			g := h.start()
			inject(h, g)
			wantFailure(t, h, g, "")
		})
	}
}

// wantFailure asks for two workers, which are expected to fail.
func wantFailure(t *testing.T, h *host, g *Group, reason string) {
	t.Helper()
	increase(t, g, 2)
	waitState(t, g, provider.StateDeleted, 2)
	for id, s := range states(t, g) {
		if s != provider.StateDeleting { // never reported alive before
			t.Errorf("%s is shown as %s first", id, s)
		}
		err := g.Heartbeat(t.Context(), id)
		if !errors.Is(err, provider.ErrInstanceUnhealthy) || !strings.Contains(err.Error(), reason) {
			t.Errorf("Heartbeat: %v", err)
		}
		log := h.log.String()
		if !strings.Contains(log, "others wait until one can: worker="+id) && !strings.Contains(log, "for a known reason: worker="+id) {
			t.Errorf("%s is not in the log:\n%s", id, h.log)
		}
	}
	h.wantNothingLeft(g)
}

// TestStopAtEachStep stops a worker at each step of its start, in each way.
func TestStopAtEachStep(t *testing.T) {
	ways := map[string]struct {
		stop  func(t *testing.T, h *host, g *Group)
		final provider.State
		// patience is the pool's start_timeout.
		patience time.Duration
		only     []string // steps; nil means all
	}{
		"Decrease": {stop: func(t *testing.T, _ *host, g *Group) {
			if _, err := g.Decrease(t.Context(), ids(g)); err != nil {
				t.Error(err)
			}
		}, final: provider.StateDeleted},
		"Shutdown": {stop: func(_ *testing.T, h *host, g *Group) { h.shutdown(g) }, final: provider.StateDeleted},
		"timeout": {stop: func(*testing.T, *host, *Group) {}, final: provider.StateTimeout, patience: 200 * time.Millisecond,
			only: []string{"clone", "start", "ready"}},
		"VMM exits": {stop: func(_ *testing.T, h *host, _ *Group) {
			h.driver.mu.Lock()
			var all []*fakeVM
			for _, v := range h.driver.vms {
				all = append(all, v)
			}
			h.driver.mu.Unlock()
			for _, v := range all {
				v.die()
			}
		}, final: provider.StateDeleted, only: []string{"ready"}},
	}
	for way, w := range ways {
		for step, inject := range steps {
			if w.only != nil && !slices.Contains(w.only, step) {
				continue
			}
			t.Run(way+" at "+step, func(t *testing.T) {
				h := newHost(t, 2)
				if w.patience != 0 {
					h.plan.Pools[0].StartTimeout = plan.Duration(w.patience)
					h.write()
				}
				held := make(chan struct{}, 8)
				inject(h, func(ctx context.Context) error {
					held <- struct{}{}
					<-ctx.Done()
					return ctx.Err()
				})
				g := h.start()
				increase(t, g, 1)
				if s := states(t, g); len(s) != 1 {
					t.Errorf("shown: %v", s)
				}
				if w.patience == 0 { // on a busy machine, time may run out one step earlier
					<-held
				}
				w.stop(t, h, g)
				waitState(t, g, w.final, 1)
				h.wantNothingLeft(g)
			})
		}
	}
}

func TestVMMDies(t *testing.T) {
	h := newHost(t, 2)
	g := h.start()
	increase(t, g, 1)
	waitState(t, g, provider.StateRunning, 1)
	id := ids(g)[0]
	g.mu.Lock()
	v := g.workers[id].vm.(*fakeVM)
	g.mu.Unlock()
	states(t, g)
	v.die()
	err := g.Heartbeat(t.Context(), id) // at once
	if !errors.Is(err, provider.ErrInstanceUnhealthy) || !strings.Contains(err.Error(), "its VM has ended: signal: killed") {
		t.Errorf("Heartbeat: %v", err)
	}
	waitState(t, g, provider.StateDeleted, 1)
	if s := states(t, g)[id]; s != provider.StateDeleted {
		t.Errorf("shown as %s", s)
	}
	if err := g.Heartbeat(t.Context(), id); err == nil || !strings.Contains(err.Error(), "signal: killed") {
		t.Errorf("Heartbeat afterwards: %v", err)
	}
	h.wantNothingLeft(g)
}

func TestTeardownIsRetried(t *testing.T) {
	h := newHost(t, 1)
	tries := 0
	h.driver.kill = func(string) error {
		if tries++; tries < 3 {
			return errors.New("the VMM does not die")
		}
		return nil
	}
	g := h.start()
	increase(t, g, 1)
	waitState(t, g, provider.StateRunning, 1)
	id := ids(g)[0]
	if _, err := g.Decrease(t.Context(), []string{id}); err != nil {
		t.Fatal(err)
	}
	if n, err := g.Increase(t.Context(), 1); n != 0 || err == nil || !strings.Contains(err.Error(), "all 1 slots") {
		t.Errorf("the slot was given away before its worker was gone: %d, %v", n, err)
	}
	waitState(t, g, provider.StateDeleted, 1)
	if tries != 3 || !strings.Contains(h.log.String(), "the VMM does not die") {
		t.Errorf("%d tries:\n%s", tries, h.log)
	}
	h.wantNothingLeft(g)
}

func TestMoreThanSlots(t *testing.T) {
	h := newHost(t, 3)
	g := h.start()
	if n, err := g.Increase(t.Context(), 5); n != 3 || err != nil {
		t.Errorf("Increase(5) with 3 slots = %d, %v", n, err)
	}
	if !strings.Contains(h.log.String(), "made fewer workers than requested: requested=5 made=3") {
		t.Errorf("log:\n%s", h.log)
	}
	if n, err := g.Increase(t.Context(), 1); n != 0 || err == nil || !strings.Contains(err.Error(), `all 3 slots of pool "small" are in use`) {
		t.Errorf("Increase(1) with none = %d, %v", n, err)
	}
}

func TestRecordCannotBeWritten(t *testing.T) {
	h := newHost(t, 2)
	g := h.start()
	dir := filepath.Dir(g.recordPath("x"))
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if n, err := g.Increase(t.Context(), 2); n != 0 || err == nil || !strings.Contains(err.Error(), "write its record") {
		t.Errorf("Increase = %d, %v", n, err)
	}
	h.wantNothingLeft(g)
}

func TestImageRetried(t *testing.T) {
	h := newHost(t, 2)
	fails := 2
	h.images.ensure = func(context.Context) error {
		if fails--; fails >= 0 {
			return &guest.StepError{Step: "run[0]: make it", Code: 7, Tail: []string{"line one", "cannot make it"}}
		}
		return nil
	}
	g := h.group()
	g.backoff = time.Millisecond
	h.init(g)
	increase(t, g, 2)
	waitState(t, g, provider.StateRunning, 2)
	for _, want := range []string{"attempt=1", "attempt=2", "run[0]: make it", "exit_code=7", "cannot make it"} {
		if !strings.Contains(h.log.String(), want) {
			t.Errorf("%q is not in the log:\n%s", want, h.log)
		}
	}
}

func TestImageNeverThere(t *testing.T) {
	h := newHost(t, 2)
	h.plan.Pools[0].StartTimeout = plan.Duration(50 * time.Millisecond)
	h.write()
	h.images.ensure = func(context.Context) error { return errors.New("checksum mismatch") }
	g := h.start()
	increase(t, g, 2)
	waitState(t, g, provider.StateTimeout, 2)
	for id := range states(t, g) {
		if err := g.Heartbeat(t.Context(), id); err == nil || !strings.Contains(err.Error(), "checksum mismatch") {
			t.Errorf("Heartbeat: %v", err)
		}
	}
	h.wantNothingLeft(g)
}

// TestImageIsMadeOnce counts builds while 50 workers wait.
func TestImageIsMadeOnce(t *testing.T) {
	h := newHost(t, 50)
	var mu sync.Mutex
	now, most := 0, 0
	release := make(chan struct{})
	h.images.ensure = func(context.Context) error {
		mu.Lock()
		now++
		most = max(most, now)
		mu.Unlock()
		<-release
		mu.Lock()
		now--
		mu.Unlock()
		return nil
	}
	g := h.start()
	increase(t, g, 50)
	if n := g.inState(provider.StateCreating); n != 50 {
		t.Errorf("%d are creating", n)
	}
	close(release)
	waitState(t, g, provider.StateRunning, 50)
	if most != 1 {
		t.Errorf("%d builders at once", most)
	}
}

func TestBootsAreBounded(t *testing.T) {
	h := newHost(t, 12)
	booting := make(chan struct{}, 12)
	release := make(chan struct{})
	h.ready = func(context.Context, *worker) error {
		booting <- struct{}{}
		<-release
		return nil
	}
	g := h.group()
	g.boots = 3
	h.init(g)
	increase(t, g, 12)
	for range 3 {
		<-booting
	}
	select {
	case <-booting:
		t.Error("a fourth VM boots while three do")
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	waitState(t, g, provider.StateRunning, 12)
}

// TestImageReplacedWhileInLine: workers that have waited use the image that is current when it is their turn.
func TestImageReplacedWhileInLine(t *testing.T) {
	h := newHost(t, 3)
	booting, release := make(chan struct{}, 3), make(chan struct{})
	h.ready = func(context.Context, *worker) error {
		booting <- struct{}{}
		<-release
		return nil
	}
	g := h.group()
	g.boots = 1
	h.init(g)
	increase(t, g, 3)
	<-booting
	// By now the others have the old one; if not, this test proves nothing.
	time.Sleep(50 * time.Millisecond)
	h.images.replace("d2")
	close(release)
	waitState(t, g, provider.StateRunning, 3)
}

func TestShutdownLeavesRunning(t *testing.T) {
	h := newHost(t, 4)
	a := h.start()
	increase(t, a, 2)
	waitState(t, a, provider.StateRunning, 2)
	running := ids(a)
	before, err := a.ConnectInfo(t.Context(), running[0])
	if err != nil {
		t.Fatal(err)
	}
	held := make(chan struct{}, 2)
	h.ready = func(ctx context.Context, _ *worker) error {
		held <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	increase(t, a, 2)
	<-held
	h.shutdown(a)
	if n := h.driver.alive(); n != 2 {
		t.Errorf("%d VMs after Shutdown, want the 2 that were running", n)
	}
	if n, err := a.Increase(t.Context(), 1); n != 0 || err == nil {
		t.Errorf("Increase after Shutdown = %d, %v", n, err)
	}
	h.ready = nil

	b := h.start()
	if s := states(t, b); len(s) != 2 || s[running[0]] != provider.StateRunning || s[running[1]] != provider.StateRunning {
		t.Errorf("after a restart: %v, want %v running", s, running)
	}
	after, err := b.ConnectInfo(t.Context(), running[0])
	if err != nil || string(after.Key) != string(before.Key) || after.InternalAddr != before.InternalAddr {
		t.Errorf("ConnectInfo after a restart: %v", err)
	}
	increase(t, b, 2) // the other two slots are free
	waitState(t, b, provider.StateRunning, 4)
	if n, _ := b.Increase(t.Context(), 1); n != 0 {
		t.Error("a slot of an adopted worker was given away")
	}
	if _, err := b.Decrease(t.Context(), ids(b)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "all gone", func() bool { return len(ids(b)) == 0 })
	h.wantNothingLeft(b)
}

// TestCrashAtEachStep kills the plugin, without any cleanup, with a worker at each step of its start; the next one
// removes everything.
func TestCrashAtEachStep(t *testing.T) {
	for step, inject := range steps {
		t.Run(step, func(t *testing.T) {
			h := newHost(t, 2)
			held := make(chan struct{}, 8)
			over := make(chan struct{})
			inject(h, func(context.Context) error {
				held <- struct{}{}
				<-over
				return errors.New("not asked any more")
			})
			a := h.group()
			if _, err := a.Init(t.Context(), h.logger(), provider.Settings{}); err != nil {
				t.Fatal(err)
			}
			increase(t, a, 1)
			<-held
			h.crash(a)
			dead := ids(a)[0]

			h2 := *h
			h2.images, h2.ready = &fakeImages{}, nil
			h2.driver.mu.Lock()
			h2.driver.start = nil
			h2.driver.mu.Unlock()
			b := h2.start()
			s := states(t, b)
			if len(s) != 1 || (s[dead] != provider.StateDeleting) {
				t.Errorf("after the crash: %v", s)
			}
			waitFor(t, "the worker is gone", func() bool { return len(ids(b)) == 0 })
			h2.wantNothingLeft(b)
			close(over)
			a.cancel(errShutdown)
			a.wg.Wait()
		})
	}
}

// TestRecordsThatCannotBeAdopted changes the record, key, VM or plan of a running worker.
func TestRecordsThatCannotBeAdopted(t *testing.T) {
	tests := map[string]struct {
		change func(h *host, g *Group, id string) error
		reason string
	}{
		"VM has ended": {func(h *host, g *Group, id string) error {
			h.driver.vms[g.vmDir(id)].die()
			return nil
		}, "its VM has ended"},
		"record is torn": {func(_ *host, g *Group, id string) error {
			return os.WriteFile(g.recordPath(id), []byte(`{"version":`), 0o600)
		}, "unexpected end"},
		"record is empty": {func(_ *host, g *Group, id string) error { return os.Truncate(g.recordPath(id), 0) }, "unexpected end"},
		"record of the future": {func(_ *host, g *Group, id string) error {
			return os.WriteFile(g.recordPath(id), []byte(`{"version":99}`), 0o600)
		}, "version 99"},
		"another's record": {func(_ *host, g *Group, id string) error {
			b, err := os.ReadFile(g.recordPath(id))
			return errors.Join(err, os.WriteFile(g.recordPath(id), []byte(strings.ReplaceAll(string(b), id, "x"+id)), 0o600))
		}, "its record belongs to another worker"},
		"no key":   {func(_ *host, g *Group, id string) error { return os.Remove(g.keyPath(id)) }, "its key"},
		"torn key": {func(_ *host, g *Group, id string) error { return os.Truncate(g.keyPath(id), 40) }, "its key"},
		"VMM does not answer": {func(h *host, _ *Group, _ string) error {
			tries := 0
			h.driver.adopt = func(string) error {
				if tries++; tries < 2 {
					return errors.New("no answer")
				}
				return nil
			}
			return nil
		}, "no answer"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, 2)
			a := h.start()
			increase(t, a, 1)
			waitState(t, a, provider.StateRunning, 1)
			id := ids(a)[0]
			h.shutdown(a)
			if err := tt.change(h, a, id); err != nil {
				t.Fatal(err)
			}
			b := h.start()
			waitFor(t, "the worker is gone", func() bool { return len(ids(b)) == 0 })
			if err := b.Heartbeat(t.Context(), id); err == nil || !strings.Contains(err.Error(), tt.reason) {
				t.Errorf("Heartbeat: %v, want %q", err, tt.reason)
			}
			h.wantNothingLeft(b)
		})
	}
}

// TestPlanChangesUnderWorkers: a running worker is not affected by a new plan with another slot, user or
// hypervisor, and nobody else gets its slot before it ends.
func TestPlanChangesUnderWorkers(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*plan.Plan)
		free   int // slots, while the worker runs
		after  int // and when it has ended
	}{
		"fewer instances": {func(p *plan.Plan) { p.Pools[0].FirstSlot, p.Pools[0].MaxInstances = 1, 1 }, 1, 1},
		"another TAP":     {func(p *plan.Plan) { p.Slots[0].TAP = "other0" }, 1, 2},
		"another address": {func(p *plan.Plan) { p.Slots[0].Address = netip.MustParseAddr("127.77.0.200") }, 1, 2},
		"slots exchanged": {func(p *plan.Plan) { p.Slots[0].TAP, p.Slots[1].TAP = p.Slots[1].TAP, p.Slots[0].TAP }, 1, 2},
		"a new pool before": {func(p *plan.Plan) {
			first := plan.Slot{Index: 50, TAP: "new0", Address: netip.MustParseAddr("127.77.0.200"), Queues: 1}
			p.Slots = append([]plan.Slot{first}, p.Slots...)
			p.Images[0].BuildSlot++
			p.Pools[0].FirstSlot++
			added := p.Pools[0]
			added.Name, added.FirstSlot, added.MaxInstances = "new", 0, 1
			p.Pools = append(p.Pools, added)
		}, 1, 2},
		"another user": {func(p *plan.Plan) { p.Images[0].User = "ci" }, 1, 2},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, 2)
			a := h.start()
			increase(t, a, 1)
			waitState(t, a, provider.StateRunning, 1)
			id := ids(a)[0]
			before, err := a.ConnectInfo(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			h.shutdown(a)
			c.change(h.plan)
			h.write()
			b := h.start()
			after, err := b.ConnectInfo(t.Context(), id)
			if err != nil || after.InternalAddr != before.InternalAddr || after.Username != before.Username {
				t.Errorf("reached as %s@%s, then as %s@%s (%v)", before.Username, before.InternalAddr, after.Username, after.InternalAddr, err)
			}
			if err := b.Heartbeat(t.Context(), id); err != nil {
				t.Error(err)
			}
			if len(b.free) != c.free {
				t.Errorf("free: %v, want %d slots", b.free, c.free)
			}
			if _, err := b.Decrease(t.Context(), []string{id}); err != nil {
				t.Fatal(err)
			}
			waitFor(t, "the worker is gone", func() bool { return len(ids(b)) == 0 })
			if len(b.free) != c.after {
				t.Errorf("free at the end: %v, want %d slots", b.free, c.after)
			}
			h.wantNothingLeft(b)
		})
	}
}

// TestTwoRecordsForOneSlot tests what cannot happen: it must not end with two VMs on one TAP.
func TestTwoRecordsForOneSlot(t *testing.T) {
	h := newHost(t, 2)
	a := h.start()
	increase(t, a, 1)
	waitState(t, a, provider.StateRunning, 1)
	id := ids(a)[0]
	h.shutdown(a)
	twin := id[:len(id)-16] + "zzzzzzzzzzzzzzzz"
	rec, err := os.ReadFile(a.recordPath(id))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(a.recordPath(twin), []byte(strings.ReplaceAll(string(rec), id, twin)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(a.runDir(twin), os.DirFS(a.runDir(id))); err != nil {
		t.Fatal(err)
	}
	if _, err := h.driver.Start(t.Context(), vmConfig{Dir: a.vmDir(twin)}); err != nil {
		t.Fatal(err)
	}
	b := h.start()
	waitState(t, b, provider.StateDeleted, 1)
	if got := ids(b); len(got) != 1 || got[0] != id || h.driver.alive() != 1 || len(b.free) != 1 {
		t.Errorf("alive: %v, %d VMs, free: %v", got, h.driver.alive(), b.free)
	}
}

// TestPowerCut has clones without records, and unrelated files, which must stay.
func TestPowerCut(t *testing.T) {
	h := newHost(t, 1)
	a := h.start()
	h.shutdown(a)
	stray := a.cloneDir("small-00000000000000aa")
	if err := os.MkdirAll(stray, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(stray, "disk.raw"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	notes := filepath.Join(filepath.Dir(a.recordPath("x")), "notes.json")
	if err := os.WriteFile(notes, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	half := a.recordPath("small-00000000000000bb") + ".new"
	if err := os.WriteFile(half, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	h.start()
	waitFor(t, "the stray clone is gone", func() bool {
		_, err := os.Stat(stray)
		return errors.Is(err, os.ErrNotExist)
	})
	if _, err := os.Stat(notes); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(half); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half a record: %v", err)
	}
}

func TestTwoPluginsForOnePool(t *testing.T) {
	h := newHost(t, 1)
	a := h.start()
	_, err := h.group().Init(t.Context(), h.logger(), provider.Settings{})
	if err == nil || !strings.Contains(err.Error(), `pool "small" is served by another plugin process`) {
		t.Errorf("second Init: %v", err)
	}
	h.shutdown(a)
	h.start()
}

func TestConsoleIsKept(t *testing.T) {
	h := newHost(t, 1)
	h.plan.Pools[0].Console = true
	h.write()
	h.ready = func(_ context.Context, w *worker) error {
		h.driver.mu.Lock()
		path := h.driver.cfgs[len(h.driver.cfgs)-1].Console
		h.driver.mu.Unlock()
		return errors.Join(errors.New("no answer"), os.WriteFile(path, []byte(strings.Repeat("x", maxConsole)+"\nKernel \x1b[31mpanic\r\n"), 0o600))
	}
	g := h.start()
	increase(t, g, 1)
	id := ids(g)[0]
	waitState(t, g, provider.StateDeleted, 1)
	kept, err := os.ReadFile(filepath.Join(h.plan.Paths.Workers, pool, "console", id+".log"))
	if err != nil || len(kept) != maxConsole || !strings.HasSuffix(string(kept), "panic\r\n") {
		t.Errorf("%d bytes kept, %v", len(kept), err)
	}
	if log := h.log.String(); strings.Contains(log, "\x1b") || !strings.Contains(log, "panic") {
		t.Errorf("log:\n%s", log)
	}
	dir := filepath.Join(h.plan.Paths.Workers, pool, "console")
	for i := range maxConsoles + 5 {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("small-%016d.log", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	increase(t, g, 1)
	waitState(t, g, provider.StateDeleted, 2)
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != maxConsoles {
		t.Errorf("%d consoles kept, %v", len(entries), err)
	}
}

// TestVMConfig compares the driver's configuration with the plan.
func TestVMConfig(t *testing.T) {
	h := newHost(t, 2)
	h.plan.Pools[0].Limits = plan.Limits{CPUQuotaPercent: 150, DiskIOPS: 500, NetworkMbps: 10}
	h.plan.Hypervisor.Driver = "cloud-hypervisor" // QEMU with network_mbps is refused
	h.plan.Pools[0].CPUs, h.plan.Slots[0].Queues = 2, 2
	h.write()
	g := h.start()
	increase(t, g, 1)
	waitState(t, g, provider.StateRunning, 1)
	id := ids(g)[0]
	want := vmConfig{
		ID: id, Dir: g.vmDir(id), CPUs: 2, Memory: 1 << 30, Kernel: "/k", Cmdline: "root=/dev/vda",
		Disks: []vm.Disk{
			{Path: filepath.Join(g.cloneDir(id), "disk.raw"), Serial: "root"},
			{Path: filepath.Join(g.cloneDir(id), "seed.iso"), ReadOnly: true, Serial: "seed"},
		},
		Net:    &vm.Net{TAP: "fltest0", MAC: "02:fd:00:00:00:02", Queues: 2},
		Limits: vm.Limits{CPUQuotaPercent: 150, DiskIOPS: 500, NetworkMbps: 10},
	}
	if diff := cmp.Diff(want, h.driver.cfgs[0]); diff != "" {
		t.Error(diff)
	}
	// sun_path: the folder holds sockets.
	if n := len(want.Dir) - len(h.plan.Paths.Run); n > 80-40 {
		t.Errorf("the VM's folder is %d bytes below the run folder", n)
	}
}

func TestSuspendResume(t *testing.T) {
	g := New(Options{})
	if _, err := g.Suspend(t.Context(), nil); !errors.Is(err, provider.ErrSuspendResumeNotSupported) {
		t.Error(err)
	}
	if _, err := g.Resume(t.Context(), nil); !errors.Is(err, provider.ErrSuspendResumeNotSupported) {
		t.Error(err)
	}
}

func TestStaticCredentials(t *testing.T) {
	h := newHost(t, 1)
	g := h.group()
	_, err := g.Init(t.Context(), h.logger(), provider.Settings{ConnectorConfig: provider.ConnectorConfig{
		UseStaticCredentials: true, Username: "ops", Key: []byte("k"), ProtocolPort: 2222, Arch: "riscv64", Timeout: time.Minute,
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.shutdown(g) })
	increase(t, g, 1)
	waitState(t, g, provider.StateRunning, 1)
	c, err := g.ConnectInfo(t.Context(), ids(g)[0])
	if err != nil || c.Username != "ops" || string(c.Key) != "k" || c.ProtocolPort != 2222 || c.Arch != "riscv64" || c.Timeout != time.Minute {
		t.Errorf("%+v, %v", c, err)
	}
}

// TestRace calls everything concurrently.
func TestRace(t *testing.T) {
	h := newHost(t, 100)
	g := h.start()
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	loop := func(f func()) {
		wg.Go(func() {
			tick := time.NewTicker(200 * time.Microsecond)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
					f()
				}
			}
		})
	}
	loop(func() { states(t, g) })
	loop(func() {
		for _, id := range ids(g) {
			g.Heartbeat(ctx, id)
			g.ConnectInfo(ctx, id)
		}
	})
	loop(func() {
		all := ids(g)
		g.Decrease(ctx, all[:len(all)/2])
	})
	made := 0
	for range 3 {
		n, err := g.Increase(ctx, 100)
		if err != nil && !strings.Contains(err.Error(), "slots") {
			t.Error(err)
		}
		made += n
	}
	stop()
	wg.Wait()
	if _, err := g.Decrease(t.Context(), ids(g)); err != nil {
		t.Error(err)
	}
	waitFor(t, "all gone", func() bool { return len(ids(g)) == 0 })
	h.wantNothingLeft(g)
	if made < 100 {
		t.Errorf("only %d workers were made", made)
	}
}

// BenchmarkIncrease100 measures the fleet's own part of a start: from Increase until all are running, with a driver,
// images and guests that take no time. Records, keys and seeds are real, but in memory, so that the speed of the disk
// does not matter.
func BenchmarkIncrease100(b *testing.B) {
	if _, err := os.Stat("/dev/shm"); err == nil {
		b.Setenv("TMPDIR", "/dev/shm")
	}
	h := newHost(b, 100)
	g := h.group()
	if _, err := g.Init(b.Context(), hclog.NewNullLogger(), provider.Settings{}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { h.shutdown(g) })
	for b.Loop() {
		increase(b, g, 100)
		waitState(b, g, provider.StateRunning, 100)
		b.StopTimer()
		if _, err := g.Decrease(b.Context(), ids(g)); err != nil {
			b.Fatal(err)
		}
		waitFor(b, "all gone", func() bool { return len(ids(g)) == 0 })
		for len(states(b, g)) > 0 {
			continue
		}
		b.StartTimer()
	}
}
