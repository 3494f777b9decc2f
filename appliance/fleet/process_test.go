package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"gitlab.com/gitlab-org/fleeting/fleeting"
	"gitlab.com/gitlab-org/fleeting/fleeting/connector"
	"gitlab.com/gitlab-org/fleeting/fleeting/integration"
	"gitlab.com/gitlab-org/fleeting/fleeting/plugin"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/appliance/vm"
	"github.com/fleetingd/fleetingd/seed"
)

// These tests run the plugin as GitLab Runner does, as a separate process behind gRPC. The program is this
// test binary: it is the plugin if go-plugin's cookie is in its environment, and a VM or a runner depending on
// these variables.
const (
	envVM     = "FLEET_TEST_VM"     // address:port to serve SSH on, seed ISO
	envRunner = "FLEET_TEST_RUNNER" // plan.json: start the plugin and two workers, then wait
	envPort   = "FLEET_TEST_PORT"   // the SSH port of all VMs
	envPID    = "FLEET_TEST_PID"    // file that the plugin writes its pid to
	envHold   = "FLEET_TEST_HOLD"   // TAP of the slot whose VM never starts
)

// backSuffix is appended to envPID's file for the plugin's back half.
const backSuffix = ".back"

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(envVM) != "":
		exit(serveVM(os.Getenv(envVM)))
	case os.Getenv("FLEETING_INSTANCE_GROUP_PLUGIN") != "":
		exit(servePlugin())
	case os.Getenv(envRunner) != "":
		exit(beRunner(os.Getenv(envRunner)))
	}
	os.Exit(m.Run())
}

func exit(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// servePlugin is the plugin, with processes instead of VMs.
func servePlugin() error {
	watchInterval = 50 * time.Millisecond
	pidFile := os.Getenv(envPID)
	if os.Getenv(backVariable) != "" {
		pidFile += backSuffix
	}
	if err := state.WriteFile(pidFile, []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
		return err
	}
	g := New(Options{Version: "1.2.3", Driver: func(plan.Hypervisor, *slog.Logger) (vm.Driver, error) { return processDriver{}, nil }})
	g.openImages = func(*plan.Plan, image.Options) (images, error) { return &fakeImages{noGuest: true}, nil }
	g.checkLinks = func(*plan.Plan, []plan.Slot) error { return nil }
	g.tryStart = func(*plan.Plan) error { return nil }
	Serve(g, plugin.VersionInfo{Name: "test"})
	return nil
}

// beRunner starts the plugin and waits to be killed with SIGKILL.
func beRunner(planPath string) error {
	cfg, err := json.Marshal(map[string]string{"plan": planPath, "pool": pool})
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	r, err := fleeting.RunPlugin(self, cfg)
	if err != nil {
		return err
	}
	g := r.InstanceGroup()
	if _, err := g.Init(context.Background(), hclog.Default(), testSettings()); err != nil {
		return err
	}
	if n, err := g.Increase(context.Background(), 2); n != 2 || err != nil {
		return fmt.Errorf("Increase = %d, %w", n, err)
	}
	quit := make(chan os.Signal, 1)
	signal.Notify(quit, unix.SIGQUIT)
	<-quit
	return os.WriteFile(planPath+".quit", nil, 0o600)
}

func testSettings() provider.Settings {
	port, err := strconv.Atoi(os.Getenv(envPort))
	if err != nil {
		panic(err)
	}
	return provider.Settings{ConnectorConfig: provider.ConnectorConfig{ProtocolPort: port, Timeout: 10 * time.Second, Keepalive: 10 * time.Second}}
}

// processDriver uses processes as VMs: they outlive the plugin, and can be killed.
type processDriver struct{}

func (processDriver) Name() string                           { return "qemu" }
func (processDriver) Probe(context.Context) (vm.Info, error) { return vm.Info{}, nil }
func (processDriver) address(tap string) string {
	n, err := strconv.Atoi(strings.TrimPrefix(tap, "fltest"))
	if err != nil {
		panic(err)
	}
	addr := netip.MustParseAddr("127.77.0.2").As4()
	addr[3] += byte(n)
	return net.JoinHostPort(netip.AddrFrom4(addr).String(), os.Getenv(envPort))
}

func (d processDriver) Start(ctx context.Context, cfg vm.Config) (vm.VM, error) {
	if cfg.Net.TAP == os.Getenv(envHold) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self)
	cmd.Env = []string{envVM + "=" + d.address(cfg.Net.TAP) + " " + cfg.Disks[1].Path}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go cmd.Wait()
	if err := state.WriteFile(filepath.Join(cfg.Dir, "pid"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
		return nil, errors.Join(err, cmd.Process.Kill())
	}
	return newProcess(cmd.Process.Pid)
}

func (processDriver) Adopt(_ context.Context, dir string) (vm.VM, error) {
	pid, err := readPID(filepath.Join(dir, "pid"))
	if errors.Is(err, os.ErrNotExist) { // its starter was killed in between, as the real drivers allow for
		for _, pid := range vmsBelow("/" + filepath.Base(filepath.Dir(dir)) + "/") {
			unix.Kill(pid, unix.SIGKILL)
		}
		return nil, vm.ErrNotRunning
	}
	if err != nil {
		return nil, err
	}
	p, err := newProcess(pid)
	if errors.Is(err, unix.ESRCH) {
		return nil, vm.ErrNotRunning
	}
	return p, err
}

// vmsBelow returns the pids of the VMs whose seed is below folder.
func vmsBelow(folder string) []int {
	var pids []int
	environs, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, path := range environs {
		if env, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(env), envVM+"=") && strings.Contains(string(env), folder) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			pids = append(pids, pid)
		}
	}
	return pids
}

func readPID(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(b))
}

type process struct {
	pid  int
	done chan struct{}
}

func newProcess(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, err
	}
	p := &process{pid: pid, done: make(chan struct{})}
	go func() {
		defer unix.Close(fd)
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			if _, err := unix.Poll(fds, -1); err == nil {
				close(p.done)
				return
			}
		}
	}()
	return p, nil
}

func (p *process) PID() int              { return p.pid }
func (p *process) Done() <-chan struct{} { return p.done }
func (p *process) Exit() error           { return errors.New("signal: killed") }
func (p *process) Channel(context.Context) (net.Conn, error) {
	return nil, errors.New("there is no channel")
}
func (p *process) Stop(context.Context) error { return p.Kill() }
func (p *process) Kill() error {
	if err := unix.Kill(p.pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	<-p.done
	return nil
}

// serveVM is a "VM": an SSH server that admits the users of the seed, and runs commands.
func serveVM(spec string) error {
	addr, isoPath, _ := strings.Cut(spec, " ")
	iso, err := os.Open(isoPath)
	if err != nil {
		return err
	}
	s, err := seed.ReadISO(iso)
	if err != nil {
		return err
	}
	allowed, _, _, _, err := ssh.ParseAuthorizedKey([]byte(s.Users[0].AuthorizedKeys[0]))
	if err != nil {
		return err
	}
	cfg := &ssh.ServerConfig{PublicKeyCallback: func(c ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		if c.User() == s.Users[0].Name && string(key.Marshal()) == string(allowed.Marshal()) {
			return nil, nil
		}
		return nil, errors.New("not the key of the seed")
	}}
	_, hostKey, err := newKey("host")
	if err != nil {
		return err
	}
	signer, err := ssh.ParsePrivateKey(hostKey)
	if err != nil {
		return err
	}
	cfg.AddHostKey(signer)
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go serveSSH(conn, cfg)
	}
}

func serveSSH(conn net.Conn, cfg *ssh.ServerConfig) {
	_, chans, reqs, err := ssh.NewServerConn(conn, cfg)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(reqs)
	for c := range chans {
		ch, reqs, err := c.Accept()
		if err != nil {
			return
		}
		go func() {
			for r := range reqs {
				if r.Type != "exec" {
					r.Reply(r.Type == "env", nil)
					continue
				}
				var payload struct{ Command string }
				if err := ssh.Unmarshal(r.Payload, &payload); err != nil {
					return
				}
				r.Reply(true, nil)
				cmd := exec.Command("/bin/sh", "-c", payload.Command)
				cmd.Stdout, cmd.Stderr = ch, ch.Stderr()
				var status struct{ Status uint32 }
				if cmd.Run() != nil {
					status.Status = 1
				}
				ch.SendRequest("exit-status", false, ssh.Marshal(status))
				ch.Close()
			}
		}()
	}
}

// processHost returns a host for the plugin as a process.
func processHost(t *testing.T) *host {
	t.Helper()
	h := newHost(t, 3)
	l, err := net.Listen("tcp", "127.77.0.2:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	t.Setenv(envPort, strconv.Itoa(port))
	t.Setenv(envPID, filepath.Join(filepath.Dir(h.path), "pid"))
	t.Cleanup(h.killVMs)
	return h
}

// killVMs kills the VMs that a failed test left.
func (h *host) killVMs() {
	for _, pid := range vmsBelow(h.plan.Paths.Clones) {
		unix.Kill(pid, unix.SIGKILL)
	}
}

func (h *host) config() map[string]string { return map[string]string{"plan": h.path, "pool": pool} }

// runPlugin starts the plugin like the runner does.
func (h *host) runPlugin(config any) (*fleeting.Runner, provider.InstanceGroup) {
	h.t.Helper()
	cfg, err := json.Marshal(config)
	if err != nil {
		h.t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		h.t.Fatal(err)
	}
	r, err := fleeting.RunPlugin(self, cfg, fleeting.WithPluginLogger(h.logger()))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(r.Kill)
	return r, r.InstanceGroup()
}

func (h *host) initPlugin() (*fleeting.Runner, provider.InstanceGroup) {
	h.t.Helper()
	r, g := h.runPlugin(h.config())
	if _, err := g.Init(h.t.Context(), h.logger(), testSettings()); err != nil {
		h.t.Fatal(err)
	}
	return r, g
}

func running(t *testing.T, g provider.InstanceGroup) []string {
	t.Helper()
	var all []string
	err := g.Update(t.Context(), func(id string, s provider.State) {
		if s == provider.StateRunning {
			all = append(all, id)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

// sayHello runs a command on a worker with fleeting's own connector.
func sayHello(t *testing.T, g provider.InstanceGroup, id string) {
	t.Helper()
	info, err := g.ConnectInfo(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	err = connector.Run(t.Context(), info, connector.ConnectorOptions{RunOptions: connector.RunOptions{Command: "echo hello", Stdout: &out}})
	if err != nil || out.String() != "hello\n" {
		t.Errorf("echo on %s: %q, %v", id, out.String(), err)
	}
}

// removeAll removes the workers and checks that nothing is left.
func (h *host) removeAll(g provider.InstanceGroup) {
	h.t.Helper()
	if _, err := g.Decrease(h.t.Context(), running(h.t.(*testing.T), g)); err != nil {
		h.t.Fatal(err)
	}
	waitFor(h.t, "nothing is left", func() bool { return len(h.left()) == 0 })
}

func TestUpstreamProvisioning(t *testing.T) {
	need.Slow(t)
	h := processHost(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	integration.TestProvisioning(t, self, integration.Config{
		PluginConfig: h.config(), ConnectorConfig: testSettings().ConnectorConfig, MaxInstances: 3,
	})
	if left := h.left(); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestPluginIsKilled(t *testing.T) {
	h := processHost(t)
	_, g := h.initPlugin()
	if n, err := g.Increase(t.Context(), 2); n != 2 || err != nil {
		t.Fatal(n, err)
	}
	waitFor(t, "two running", func() bool { return len(running(t, g)) == 2 })
	before := running(t, g)
	sayHello(t, g, before[0])
	pid, err := readPID(os.Getenv(envPID))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}

	waitGone(t, pid)
	_, g = h.initPlugin()
	if after := running(t, g); !slices.Equal(after, before) {
		t.Errorf("running %v, before the kill %v", after, before)
	}
	sayHello(t, g, before[0])
	h.removeAll(g)
}

func waitGone(t *testing.T, pid int) {
	t.Helper()
	waitFor(t, fmt.Sprintf("process %d is gone", pid), func() bool {
		// A zombie whose parent is this test has ended, too.
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(b), ") Z ")
	})
}

// TestParentDies kills a runner while one worker is running and one is being created.
func TestParentDies(t *testing.T) {
	orphan(t, func(runner *exec.Cmd, _ int) error { return runner.Process.Kill() })
}

func TestSIGTERM(t *testing.T) {
	orphan(t, func(_ *exec.Cmd, plugin int) error { return unix.Kill(plugin, unix.SIGTERM) })
}

func TestOtherSignals(t *testing.T) {
	h := processHost(t)
	_, g := h.initPlugin()
	pid, err := readPID(os.Getenv(envPID))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []unix.Signal{unix.SIGINT, unix.SIGQUIT, unix.SIGHUP, unix.SIGPIPE} {
		if err := unix.Kill(pid, s); err != nil {
			t.Fatal(err)
		}
		if err := g.Update(t.Context(), func(string, provider.State) {}); err != nil {
			t.Fatalf("after %s: %v", s, err)
		}
	}
	if err := g.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

// records counts the workers' records that are marked as ready.
func (h *host) records(ready string) int {
	n := 0
	files, err := filepath.Glob(filepath.Join(h.plan.Paths.Workers, pool, "*.json"))
	if err != nil {
		h.t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), `"ready":`+ready) {
			n++
		}
	}
	return n
}

// orphan kills a plugin: running workers are adopted, and those being created are cleaned up.
func orphan(t *testing.T, end func(runner *exec.Cmd, plugin int) error) {
	h := processHost(t)
	t.Setenv(envHold, "fltest1")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	runner := exec.Command(self)
	runner.Env = append(os.Environ(), envRunner+"="+h.path)
	runner.Stdout, runner.Stderr = h.log, h.log
	if err := runner.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		runner.Process.Kill()
		runner.Wait()
	})
	waitFor(t, "one worker ready, one held", func() bool { return h.records("true") == 1 && h.records("false") == 1 })
	plugin, err := readPID(os.Getenv(envPID))
	if err != nil {
		t.Fatal(err)
	}
	if err := end(runner, plugin); err != nil {
		t.Fatal(err)
	}
	waitGone(t, plugin)
	if h.records("true") != 1 || h.records("false") != 0 {
		t.Errorf("left: %v\n%s", h.left(), h.log)
	}

	t.Setenv(envHold, "")
	_, g := h.initPlugin()
	adopted := running(t, g)
	if len(adopted) != 1 {
		t.Fatalf("adopted %v\n%s", adopted, h.log)
	}
	sayHello(t, g, adopted[0])
	h.removeAll(g)
}

// TestOverGRPC: the runner sees errors with their reasons.
func TestOverGRPC(t *testing.T) {
	h := processHost(t)
	_, g := h.runPlugin(map[string]any{"plan": h.path, "pol": pool, "pool": 3})
	_, err := g.Init(t.Context(), h.logger(), testSettings())
	for _, want := range []string{`unmarshaling config: plugin_config: `, `unknown key "pol" (did you mean "pool"?)`, "pool must be a string such as \"small\", not the number 3"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Init: %v\nwant %s", err, want)
		}
	}

	_, g = h.initPlugin()
	// An error would have lost the count: gRPC carries one or the other.
	if n, err := g.Increase(t.Context(), 5); n != 3 || err != nil {
		t.Errorf("Increase(5) with 3 slots = %d, %v", n, err)
	}
	if n, err := g.Increase(t.Context(), 1); n != 0 || err == nil || !strings.Contains(err.Error(), "all 3 slots") {
		t.Errorf("Increase(1) with none = %d, %v", n, err)
	}
	if err := g.Heartbeat(t.Context(), "nobody"); err == nil || !strings.Contains(err.Error(), "instance is unhealthy: worker nobody does not exist") {
		t.Errorf("Heartbeat: %v", err)
	}
	if _, err := g.Suspend(t.Context(), []string{"x"}); err == nil || !strings.Contains(err.Error(), "not supported") {
		t.Errorf("Suspend: %v", err)
	}
	waitFor(t, "all running", func() bool { return len(running(t, g)) == 3 })
	h.removeAll(g)
}
