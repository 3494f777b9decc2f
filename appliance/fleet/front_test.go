package fleet

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"gitlab.com/gitlab-org/fleeting/fleeting"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// soon is how long the runner may have to wait after a back was killed.
const soon = 3 * time.Second

func frontPID(t testing.TB) int { return pidOf(t, os.Getenv(envPID)) }
func backPID(t testing.TB) int  { return pidOf(t, os.Getenv(envPID)+backSuffix) }

func pidOf(t testing.TB, path string) int {
	t.Helper()
	pid, err := readPID(path)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func killBack(t testing.TB) (pid int) {
	t.Helper()
	pid = backPID(t)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		t.Fatal(err)
	}
	return pid
}

// errorLines returns the lines of the log that would alert a person.
func errorLines(log string) []string {
	var lines []string
	for line := range strings.Lines(log) {
		if strings.Contains(line, "[WARN]") || strings.Contains(line, "[ERROR]") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// TestBackIsKilled: running workers are not affected, the next worker starts soon, and the log has one line about it.
func TestBackIsKilled(t *testing.T) {
	h := processHost(t)
	_, g := h.initPlugin()
	if n, err := g.Increase(t.Context(), 2); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	waitFor(t, "two running", func() bool { return len(running(t, g)) == 2 })
	before := running(t, g)
	front, old := frontPID(t), killBack(t)
	start := time.Now()
	if after := running(t, g); !slices.Equal(after, before) {
		t.Errorf("running %v, before the kill %v", after, before)
	}
	if n, err := g.Increase(t.Context(), 1); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	waitFor(t, "three running", func() bool { return len(running(t, g)) == 3 })
	if took := time.Since(start); took > soon {
		t.Errorf("the next worker came %v after the kill", took)
	}
	for _, id := range running(t, g) {
		sayHello(t, g, id)
		if err := g.Heartbeat(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if frontPID(t) != front || backPID(t) == old {
		t.Errorf("front %d, then %d; back %d, then %d", front, frontPID(t), old, backPID(t))
	}
	waitFor(t, "its line in the log", func() bool { return len(errorLines(h.log.String())) > 0 })
	if lines := errorLines(h.log.String()); len(lines) != 1 || !strings.Contains(lines[0], "working half ended") || !strings.Contains(lines[0], "signal: killed") {
		t.Errorf("the log says\n%s", strings.Join(lines, "\n"))
	}
	h.removeAll(g)
	if err := g.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestBackIsKilledInCalls kills the back during each call, and while a worker is being created.
func TestBackIsKilledInCalls(t *testing.T) {
	h := processHost(t)
	_, g := h.initPlugin()
	kill := func() { killBack(t) }
	for round := range 8 {
		delay := time.Duration(rand.N(3)) * time.Millisecond
		after := func() { time.AfterFunc(delay, kill) }

		after()
		n, err := g.Increase(t.Context(), 1)
		if n != 1 || err != nil {
			t.Fatalf("round %d: Increase = %d, %v\n%s", round, n, err, h.log)
		}
		waitFor(t, "one running", func() bool {
			ids := running(t, g)
			if len(ids) == 0 && creating(t, g) == 0 { // the killed back had begun it: fleeting asks for another
				if _, err := g.Increase(t.Context(), 1); err != nil {
					t.Fatal(err)
				}
			}
			return len(ids) > 0
		})
		id := running(t, g)[0]
		after()
		if _, err := g.ConnectInfo(t.Context(), id); err != nil {
			t.Fatalf("round %d: ConnectInfo: %v\n%s", round, err, h.log)
		}
		sayHello(t, g, id)
		after()
		if err := g.Heartbeat(t.Context(), id); err != nil {
			t.Fatalf("round %d: Heartbeat: %v\n%s", round, err, h.log)
		}
		after()
		if ids := running(t, g); !slices.Contains(ids, id) {
			t.Fatalf("round %d: running %v without %s\n%s", round, ids, id, h.log)
		}
		after()
		if _, err := g.Decrease(t.Context(), running(t, g)); err != nil {
			t.Fatalf("round %d: Decrease: %v\n%s", round, err, h.log)
		}
		waitFor(t, "nothing is left", func() bool {
			// The killed back may have accepted a Decrease without carrying it out: fleeting repeats it.
			if _, err := g.Decrease(t.Context(), running(t, g)); err != nil {
				t.Fatal(err)
			}
			return len(h.left()) == 0
		})
	}
	if err := g.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

func creating(t *testing.T, g provider.InstanceGroup) int {
	t.Helper()
	n := 0
	if err := g.Update(t.Context(), func(_ string, s provider.State) {
		if s == provider.StateCreating {
			n++
		}
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// atomicInstances holds what the Provisioner has reported about instances.
type atomicInstances struct {
	mu  sync.Mutex
	all map[string]fleeting.Instance
}

func (a *atomicInstances) see(updated []fleeting.Instance) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.all == nil {
		a.all = map[string]fleeting.Instance{}
	}
	for _, inst := range updated {
		a.all[inst.ID()] = inst
	}
}

// running returns a running instance that nobody has asked to remove, or nil.
func (a *atomicInstances) running() fleeting.Instance {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, inst := range a.all {
		if inst.State() == provider.StateRunning {
			return inst
		}
	}
	return nil
}

// TestHundredKills drives the plugin with fleeting's own Provisioner while its back is killed again and again. In the end nothing is
// left: no worker, VM, folder, record, process or descriptor.
func TestHundredKills(t *testing.T) {
	need.Slow(t)
	h := processHost(t)
	cfg, err := json.Marshal(h.config())
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	r, err := fleeting.RunPlugin(self, cfg, fleeting.WithPluginLogger(h.logger()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Kill)
	t.Cleanup(func() {
		if log := strings.Split(h.log.String(), "\n"); t.Failed() {
			t.Log(strings.Join(log[max(0, len(log)-80):], "\n"))
		}
	})
	var alive atomicInstances
	p, err := fleeting.Init(t.Context(), h.logger(), r.InstanceGroup(),
		fleeting.WithInstanceGroupSettings(testSettings()), fleeting.WithMaxSize(3), fleeting.WithSubscriber(alive.see),
		fleeting.WithUpdateInterval(50*time.Millisecond), fleeting.WithUpdateIntervalWhenExpecting(10*time.Millisecond),
		fleeting.WithDeletionRetryInterval(100*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	fds := func() int {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", frontPID(t)))
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := fds()
	for kill := range 100 {
		old := killBack(t)
		if kill%10 == 0 { // an occasional job
			p.Request(1)
			waitFor(t, fmt.Sprintf("a worker after kill %d", kill), func() bool { return alive.running() != nil })
			inst := alive.running()
			if _, err := inst.ConnectInfo(t.Context()); err != nil {
				t.Fatal(err)
			}
			inst.Delete()
			waitFor(t, "it is gone", func() bool { return alive.running() == nil })
		}
		waitFor(t, fmt.Sprintf("another back after kill %d", kill), func() bool {
			pid, err := readPID(os.Getenv(envPID) + backSuffix)
			return err == nil && pid != old && r.InstanceGroup().Update(t.Context(), func(string, provider.State) {}) == nil
		})
	}
	waitFor(t, "nothing is left", func() bool { return len(h.left()) == 0 })
	waitFor(t, "no descriptor is left", func() bool { return fds() <= before })
	p.Shutdown(t.Context())
	last := backPID(t)
	r.Kill()
	waitGone(t, last)
}

// TestFrontIsKilled: GitLab Runner would never start another plugin, so it is stopped gracefully, but no other parent is.
func TestFrontIsKilled(t *testing.T) {
	for name, quits := range map[string]bool{runnerName: true, "another-program": false} {
		t.Run(name, func(t *testing.T) {
			h := processHost(t)
			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			program := filepath.Join(t.TempDir(), name)
			if err := os.Symlink(self, program); err != nil {
				t.Fatal(err)
			}
			runner := exec.Command(program)
			runner.Env = append(os.Environ(), envRunner+"="+h.path)
			runner.Stdout, runner.Stderr = h.log, h.log
			if err := runner.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- runner.Wait() }()
			t.Cleanup(func() { runner.Process.Kill() })
			ready := func() bool {
				return h.records("true") == 2
			}
			waitFor(t, "two workers", ready)
			back := backPID(t)
			if err := unix.Kill(frontPID(t), unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			waitGone(t, back)
			if !quits {
				if err := unix.Kill(runner.Process.Pid, 0); err != nil {
					t.Error("a program that is no gitlab-runner was ended")
				}
				runner.Process.Kill()
				<-ended
				return
			}
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("the runner ended with %v\n%s", err, h.log)
				}
			case <-time.After(10 * time.Second):
				t.Fatalf("the runner was not ended\n%s", h.log)
			}
			if _, err := os.Stat(h.path + ".quit"); err != nil {
				t.Errorf("it was not ended by SIGQUIT: %v", err)
			}
			// The running workers stay for the next runner.
			_, g := h.initPlugin()
			if n := len(running(t, g)); n != 2 {
				t.Errorf("%d workers were adopted\n%s", n, h.log)
			}
			h.removeAll(g)
		})
	}
}

// rewrite changes the host's plan on the disk, as apply does.
func (h *host) rewrite(change func(*plan.Plan)) {
	h.t.Helper()
	change(h.plan)
	data, err := h.plan.JSON()
	if err != nil {
		h.t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(h.path+".new", data, 0o600), os.Rename(h.path+".new", h.path)); err != nil {
		h.t.Fatal(err)
	}
}

// TestPlanChanges: a changed plan takes effect without restarting the runner or a worker; an unusable plan does not.
func TestPlanChanges(t *testing.T) {
	h := processHost(t)
	_, g := h.initPlugin()
	if n, err := g.Increase(t.Context(), 1); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	waitFor(t, "one running", func() bool { return len(running(t, g)) == 1 })
	before, front, back := running(t, g), frontPID(t), backPID(t)

	good, err := os.ReadFile(h.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the log names what is wrong", func() bool { return strings.Contains(h.log.String(), "cannot use the new version") })
	if after := running(t, g); !slices.Equal(after, before) || backPID(t) != back && !strings.Contains(h.log.String(), "continues with the old one") {
		t.Errorf("running %v, before %v", after, before)
	}
	if err := os.WriteFile(h.path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the good one is taken again", func() bool { return strings.Contains(h.log.String(), "replaced the plugin's working half") })
	h.rewrite(func(p *plan.Plan) { p.Pools[0].Memory *= 2 })
	waitFor(t, "the changed plan is taken", func() bool {
		return strings.Count(h.log.String(), "replaced the plugin's working half") == 2
	})
	if after := running(t, g); !slices.Equal(after, before) || frontPID(t) != front {
		t.Errorf("running %v, before %v; front %d, before %d", after, before, frontPID(t), front)
	}
	sayHello(t, g, before[0])
	if n, err := g.Increase(t.Context(), 1); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	waitFor(t, "two running", func() bool { return len(running(t, g)) == 2 })
	h.removeAll(g)
}

// TestBackDoesNotStart: calls return the reason, and everything works again once it is fixed.
func TestBackDoesNotStart(t *testing.T) {
	h := processHost(t)
	_, g := h.initPlugin()
	good, err := os.ReadFile(h.path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(h.path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	killBack(t)
	waitFor(t, "calls fail with the reason", func() bool {
		err := g.Update(t.Context(), func(string, provider.State) {})
		return err != nil && strings.Contains(err.Error(), "cannot be started") && strings.Contains(err.Error(), h.path)
	})
	if err := os.WriteFile(h.path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a back starts", func() bool { return g.Update(t.Context(), func(string, provider.State) {}) == nil })
	if err := g.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestBinaryChanges: an upgraded program takes over like a changed plan.
func TestBinaryChanges(t *testing.T) {
	h := processHost(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	link := filepath.Join(dir, "fleeting-plugin-fleetingd")
	copied := filepath.Join(dir, "v1")
	if out, err := exec.Command("cp", self, copied).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Symlink("v1", link); err != nil {
		t.Fatal(err)
	}
	cfg, err := json.Marshal(h.config())
	if err != nil {
		t.Fatal(err)
	}
	r, err := fleeting.RunPlugin(link, cfg, fleeting.WithPluginLogger(h.logger()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Kill)
	g := r.InstanceGroup()
	if _, err := g.Init(t.Context(), h.logger(), testSettings()); err != nil {
		t.Fatal(err)
	}
	if n, err := g.Increase(t.Context(), 1); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	waitFor(t, "one running", func() bool { return len(running(t, g)) == 1 })
	before, front, back := running(t, g), frontPID(t), backPID(t)
	if out, err := exec.Command("cp", copied, filepath.Join(dir, "v2")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := errors.Join(os.Symlink("v2", link+".new"), os.Rename(link+".new", link)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the new program runs", func() bool { return strings.Contains(h.log.String(), "replaced the plugin's working half") })
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", backPID(t)))
	if err != nil || filepath.Base(exe) != "v2" {
		t.Errorf("the back runs %s, %v", exe, err)
	}
	if after := running(t, g); !slices.Equal(after, before) || frontPID(t) != front || backPID(t) == back {
		t.Errorf("running %v, before %v; front %d, before %d; back %d, before %d", after, before, frontPID(t), front, backPID(t), back)
	}
	h.removeAll(g)
}
