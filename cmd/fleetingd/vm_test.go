package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"gitlab.com/gitlab-org/fleeting/fleeting"
	"gitlab.com/gitlab-org/fleeting/fleeting/connector"
	"gitlab.com/gitlab-org/fleeting/fleeting/integration"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// The tests of this file boot real VMs, through the built binary. Each has a
// network namespace of its own, in which egress leads nowhere.

const testSpec = `
host "test" {
  egress_interface = "eth0"
  state_dir        = %q
  network {
    subnet = "172.16.65.0/24"
  }
  hypervisor "qemu" {
    accel = "tcg"
  }
}
image "debian" {
  debian {
    suite = "trixie"
  }
  prebuild {
    run = ["echo prebuilt > /etc/fleetingd-test"]
  }
}
pool "small" {
  image         = image.debian
  cpus          = 1
  memory        = "1GiB"
  disk          = "4GiB"
  start         = "cold"
  max_instances = 3
}
`

// lab is a network namespace, and a spec whose state is kept between tests.
type lab struct {
	t     testing.TB
	ns    netns.NsHandle
	dir   string // for the test's own files, open to every user
	spec  string // path of host.hcl
	state string
	bin   string // the built binary
	plug  string // the same under the plugin's name
}

func newLab(t testing.TB) *lab {
	t.Helper()
	need.VM(t)
	need.Tools(t, "mmdebstrap", "mke2fs", "mkfs.xfs", "nft", "ip")
	l := &lab{t: t, dir: t.TempDir(), state: testState(t)}
	// The folders that the testing package makes are for root alone.
	for _, d := range []string{l.dir, filepath.Dir(l.dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	l.spec = filepath.Join(l.dir, "host.hcl")
	if err := os.WriteFile(l.spec, fmt.Appendf(nil, testSpec, l.state), 0o644); err != nil {
		t.Fatal(err)
	}
	l.bin = filepath.Join(l.dir, "fleetingd")
	l.plug = filepath.Join(l.dir, pluginName)
	// As `make build` does: the guest part is this binary, and its size is a part of each boot.
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", l.dir+"/", ".", "../fleetingd-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0") // it runs in the guest, too
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the binary: %v\n%s", err, out)
	}
	if err := os.Link(l.bin, l.plug); err != nil {
		t.Fatal(err)
	}
	l.ns = newNamespace(t)
	return l
}

// testState is where images are kept from one test to the next: in the cache below the
// repository, or where an unprivileged user cannot get at that, below /var/tmp.
func testState(t testing.TB) string {
	dir := filepath.Join(need.Cache(t), "state")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if reachable(dir) == nil {
		return dir
	}
	return "/var/tmp/fleetingd-test"
}

// newNamespace is a network namespace with lo and an eth0 that leads nowhere.
func newNamespace(t testing.TB) netns.NsHandle {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	outside, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	defer func() {
		if err := netns.Set(outside); err != nil {
			panic(err) // the thread is in the wrong namespace: nothing after this can be right
		}
	}()
	veth := netlink.NewVeth(netlink.NewLinkAttrs())
	veth.Name, veth.PeerName = "eth0", "peer0"
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"lo", "eth0", "peer0"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			t.Fatal(err)
		}
	}
	return ns
}

// within runs f on a thread that is in the lab's namespace; a process that f starts
// stays in it.
func (l *lab) within(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	outside, err := netns.Get()
	if err != nil {
		return err
	}
	defer outside.Close()
	if err := netns.Set(l.ns); err != nil {
		return err
	}
	defer func() {
		if err := netns.Set(outside); err != nil {
			panic(err)
		}
	}()
	return f()
}

// hostUp does by hand what run's root half does, and takes it down after the test.
func (l *lab) hostUp(spec string) *hostRun {
	l.t.Helper()
	r := l.imagesUp(spec)
	if err := l.within(func() error { return r.network(l.t.Context()) }); err != nil {
		l.t.Fatal(err)
	}
	return r
}

// imagesUp is hostUp without the network.
func (l *lab) imagesUp(spec string) *hostRun {
	t := l.t
	t.Helper()
	p := compileTestSpec(t, spec)
	r := &hostRun{plan: p, pool: &p.Pools[0], view: &view{}, req: jobRequest{Instances: p.Pools[0].MaxInstances}}
	t.Cleanup(func() {
		if err := l.within(r.unwind); err != nil {
			t.Error(err)
		}
	})
	var err error
	if r.user, err = findRuntimeUser(p); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	for _, up := range []func() error{
		func() error { return r.join(ctx) },
		func() error { return r.folders(ctx) },
		func() error { return r.disks(ctx) },
		func() error { return r.base(ctx) }, // the package mirror is outside of the namespace
	} {
		if err := up(); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func compileTestSpec(t testing.TB, path string) *plan.Plan {
	t.Helper()
	res, diags := hostspec.Load(hostspec.Options{Path: path})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	p, diags := compile.Compile(res.Host, compile.Options{})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	return p
}

// asUserEnv is set in a test process that asUser started.
const asUserEnv = "FLEETINGD_TEST_AS_USER"

// asUser runs this test once more, as an ordinary user within the namespace, with the
// environment that is given. It is how a test drives the plugin as GitLab Runner does.
func (l *lab) asUser(u runtimeUser, env ...string) {
	t := l.t
	t.Helper()
	cmd := exec.Command(selfExe, "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=20m")
	cmd.Env = append(append(os.Environ(), "HOME="+l.dir, "TMPDIR=/tmp", asUserEnv+"=1"), env...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: u.credential(), Pdeathsig: syscall.SIGKILL}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := l.within(cmd.Start)
	if err == nil {
		err = cmd.Wait()
	}
	t.Logf("as uid %d:\n%s", u.UID, out.String())
	if err != nil {
		t.Fatal(err)
	}
}

// provisioning runs the conformance suite that the official plugins run, unmodified, where this process was
// started to do so (asUser).
func provisioning(t *testing.T) bool {
	config := os.Getenv("FLEETINGD_TEST_PROVISIONING")
	if config == "" {
		return false
	}
	var pluginConfig map[string]any
	if err := json.Unmarshal([]byte(config), &pluginConfig); err != nil {
		t.Fatal(err)
	}
	integration.TestProvisioning(t, os.Getenv("FLEETINGD_TEST_PLUGIN"), integration.Config{
		PluginConfig:    pluginConfig,
		MaxInstances:    3,
		ConnectorConfig: provider.ConnectorConfig{Timeout: 5 * time.Minute},
	})
	jobOnWorker(t, config)
	return true
}

// jobOnWorker waits until a worker runs, and runs a job on it: upstream's suite goes on while its workers are being
// made, and runs its command only on those that are ready by then.
func jobOnWorker(t *testing.T, config string) {
	runner, err := fleeting.RunPlugin(os.Getenv("FLEETINGD_TEST_PLUGIN"), []byte(config))
	if err != nil {
		t.Fatal(err)
	}
	defer runner.Kill()
	prov, err := fleeting.Init(t.Context(), nil, runner.InstanceGroup(), fleeting.WithMaxSize(1),
		fleeting.WithUpdateIntervalWhenExpecting(500*time.Millisecond), fleeting.WithShutdownDeletionInterval(100*time.Millisecond),
		fleeting.WithShutdownDeletionRetries(100))
	if err != nil {
		t.Fatal(err)
	}
	defer prov.Shutdown(context.Background())
	prov.Request(1)
	var worker fleeting.Instance
	waitFor(t, 10*time.Minute, "running worker", func() bool {
		for _, i := range prov.Instances() {
			if i.State() == provider.StateRunning {
				worker = i
			}
		}
		return worker != nil
	})
	defer worker.Delete()
	info, err := worker.ConnectInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	err = connector.Run(t.Context(), info, connector.ConnectorOptions{
		RunOptions: connector.RunOptions{Command: "cat /etc/fleetingd-test && sudo -n id -un", Stdout: &out},
	})
	if err != nil || out.String() != "prebuilt\nroot\n" {
		t.Errorf("the job: %q, %v", &out, err)
	}
	if err := worker.Heartbeat(t.Context()); err != nil {
		t.Error(err)
	}
	jobWhilePluginDies(t, worker, info)
	if os.Getuid() != 0 { // the predecessor ran as root, and its keys still do
		noPrivileges(t)
	}
}

// jobWhilePluginDies kills the plugin's working half three times during a job: the job prints all its lines, and the plugin answers
// again within three seconds each time.
func jobWhilePluginDies(t *testing.T, worker fleeting.Instance, info provider.ConnectInfo) {
	const lines = 100
	var out syncBuffer
	job := make(chan error, 1)
	go func() {
		job <- connector.Run(t.Context(), info, connector.ConnectorOptions{RunOptions: connector.RunOptions{
			Command: fmt.Sprintf("for i in $(seq %d); do echo $i; sleep 0.1; done", lines), Stdout: &out,
		}})
	}()
	waitFor(t, time.Minute, "the job's first line", func() bool { return out.String() != "" })
	for range 3 {
		back := pluginBack(t)
		start := time.Now()
		if err := syscall.Kill(back, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := worker.Heartbeat(t.Context()); err != nil {
			t.Errorf("after the plugin's working half was killed: %v", err)
		}
		t.Logf("the plugin answers %v after its working half was killed", time.Since(start).Round(time.Millisecond))
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("it took %v", took)
		}
		if again := pluginBack(t); again == back {
			t.Error("the working half was not killed")
		}
	}
	want := ""
	for i := range lines {
		want += strconv.Itoa(i+1) + "\n"
	}
	if err := <-job; err != nil || out.String() != want {
		t.Errorf("the job: %v, %q", err, out.String())
	}
}

// pluginBack is the plugin's working half: the child of the child that we started.
func pluginBack(t *testing.T) int {
	t.Helper()
	parents := map[int][]int{}
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range stats {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
		if len(fields) < 2 || fields[0] == "Z" {
			continue
		}
		ppid, err1 := strconv.Atoi(fields[1])
		pid, err2 := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		parents[ppid] = append(parents[ppid], pid)
	}
	for _, front := range parents[os.Getpid()] {
		for _, back := range parents[front] {
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", back)); err == nil && strings.Contains(filepath.Base(exe), "fleetingd") {
				return back
			}
		}
	}
	t.Fatal("the plugin has no working half")
	return 0
}

// TestUpstreamProvisioning is upstream's suite with real VMs, as an ordinary user.
func TestUpstreamProvisioning(t *testing.T) {
	if provisioning(t) {
		return
	}
	l := newLab(t)
	r := l.hostUp(l.spec)
	config, err := json.Marshal(map[string]string{"plan": r.req.Plan, "pool": r.req.Pool})
	if err != nil {
		t.Fatal(err)
	}
	l.asUser(r.user, append(r.tunEnviron(), "FLEETINGD_TEST_PROVISIONING="+string(config), "FLEETINGD_TEST_PLUGIN="+l.plug)...)
}

// syncBuffer is a buffer that may be looked at while a process writes to it.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// runResult is what `fleetingd run` gave.
type runResult struct {
	code           int
	stdout, stderr string
	phases         map[string]Phase
}

// run is `fleetingd run --timings` in the lab's namespace.
func (l *lab) run(args ...string) runResult {
	l.t.Helper()
	cmd, res := l.start(args...)
	return res(cmd.Wait())
}

func (l *lab) start(args ...string) (*exec.Cmd, func(error) runResult) {
	l.t.Helper()
	cmd := exec.Command(l.bin, append([]string{"run", "--timings"}, args...)...)
	var stdout, stderr syncBuffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := l.within(cmd.Start); err != nil {
		l.t.Fatal(err)
	}
	return cmd, func(err error) runResult {
		l.t.Logf("fleetingd run %s: %v\nstdout: %s\nstderr: %s", strings.Join(args, " "), err, &stdout, &stderr)
		res := runResult{code: cmd.ProcessState.ExitCode(), stdout: stdout.String(), stderr: stderr.String(), phases: map[string]Phase{}}
		for line := range strings.Lines(res.stderr) {
			var tm timings
			if json.Unmarshal([]byte(line), &tm) == nil {
				for _, p := range tm.Phases {
					res.phases[p.Name] = p
				}
			}
		}
		return res
	}
}

// nothingLeft fails the test if a run left a process, a mount, an interface, a
// rule or a file behind, its caches aside.
func (l *lab) nothingLeft() {
	l.t.Helper()
	for _, look := range [][]string{
		{"pgrep", "-af", l.state},
		{"pgrep", "-f", "qemu-system.*fleetingd"},
		{"findmnt", "-rno", "TARGET", l.state + "/disks"},
		{"losetup", "-nO", "NAME", "-j", l.state + "/disks.xfs"},
		{"ls", "-A", "/run/fleetingd"},
		{"find", l.state + "/workers", "-type", "f"},
	} {
		// With a deadline: a mount namespace that another test made meanwhile holds a loop device until it ends.
		var out []byte
		for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
			out, _ = exec.Command(look[0], look[1:]...).Output() // most exit with 1 if there is nothing
			if len(bytes.TrimSpace(out)) == 0 || time.Now().After(end) {
				break
			}
		}
		if len(bytes.TrimSpace(out)) > 0 {
			l.t.Errorf("left behind: %s says %s", strings.Join(look, " "), out)
		}
	}
	var out []byte
	err := l.within(func() (err error) {
		out, err = exec.Command("sh", "-c", "nft list ruleset; ip -br link | grep -v -e ^lo -e ^eth0 -e ^peer0 || true; ip -4 -o addr show dev lo | grep -v 127.0.0.1 || true").CombinedOutput()
		return err
	})
	if err != nil || len(bytes.TrimSpace(out)) > 0 {
		l.t.Errorf("left behind in the network namespace: %s %v", out, err)
	}
}

// TestRun tells the story of a newcomer: a job, a job again, several at once, one that
// fails, one beside another, one that is interrupted.
func TestRun(t *testing.T) {
	l := newLab(t)
	// The package mirror is outside of the namespace: all but the base image is left to the first run.
	if err := l.within(l.imagesUp(l.spec).unwind); err != nil {
		t.Fatal(err)
	}

	first := l.run(l.spec, "--", "cat /etc/fleetingd-test; hostname; id -un; sudo -n id -u")
	if want := "prebuilt\n"; first.code != 0 || !strings.HasPrefix(first.stdout, want) || !strings.HasSuffix(first.stdout, "\n0\n") {
		t.Fatalf("the first job: exit code %d, output %q", first.code, first.stdout)
	}
	l.nothingLeft()

	again := l.run("-n", "2", l.spec, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
	if again.code != 7 {
		t.Errorf("the command's exit code is 7, the run's %d", again.code)
	}
	if !again.phases["image"].Cached || !again.phases["prebuild"].Cached {
		t.Errorf("the second run built again: %+v", again.phases)
	}
	if n := strings.Count(again.stdout, ": out\n"); n != 2 {
		t.Errorf("%d prefixed lines for two workers: %q", n, again.stdout)
	}
	l.nothingLeft()

	cmd, result := l.start(l.spec, "--", "echo started; sleep 600")
	waitFor(t, 5*time.Minute, "the job's first line", func() bool {
		return strings.Contains(fmt.Sprint(cmd.Stdout), "started")
	})
	if beside := l.run(l.spec, "--", "echo beside"); beside.code != 0 || beside.stdout != "beside\n" {
		t.Errorf("a run beside the first: exit code %d, output %q", beside.code, beside.stdout)
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if res := result(cmd.Wait()); res.code != 130 {
		t.Errorf("an interrupted run exits with 130, not %d", res.code)
	}
	l.nothingLeft()
}

// waitFor waits for a condition.
func waitFor(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(limit)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline:
			t.Fatalf("no %s within %s", what, limit)
		case <-tick.C:
		}
	}
}
