package vm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm/vmtest"
)

// The conformance test of the Driver contract runs real VMs as an ordinary user:
// as root it makes a network namespace with TAPs that belong to that user, and runs
// itself again as nobody. On a host without Debian's packages or the source, give it
// FLEETINGD_VMTEST_KERNEL and FLEETINGD_VMTEST_INITRD (see vmtest.Guest):
//
//	FLEETINGD_TEST=full FLEETINGD_VMTEST_KERNEL=… FLEETINGD_VMTEST_INITRD=… ./vm.test -test.run Conformance -test.v
const conformanceDir = "FLEETINGD_VMTEST_DIR"

// conformanceCgroup names the cgroup that was delegated to nobody; unset if this machine has no unified hierarchy.
const conformanceCgroup = "FLEETINGD_VMTEST_CGROUP"

// The TAPs of the namespace, each with two queue pairs.
const (
	testTAP, testTAP2 = "vmtest0", "vmtest1"
	testMAC           = "02:fe:00:00:00:02"
)

func TestConformanceQEMU(t *testing.T) {
	if os.Getenv(conformanceDir) == "" {
		need.VM(t)
	}
	if !asNobody(t) {
		return
	}
	conformance(t, plan.Hypervisor{Driver: "qemu", Accel: "auto", Sandbox: true})
}

// Cloud Hypervisor needs a KVM that runs guests. TestConformanceInLab runs this test in a machine that has one.
func TestConformanceCloudHypervisor(t *testing.T) {
	binary := need.CloudHypervisor(t)
	if os.Getenv(conformanceDir) == "" {
		need.Slow(t)
		if err := ProbeKVM(t.Context()); err != nil {
			t.Skipf("skipped here, TestConformanceInLab runs it: %v", err)
		}
	}
	if !asNobody(t) {
		return
	}
	conformance(t, plan.Hypervisor{Driver: "cloud-hypervisor", Binary: binary, Sandbox: true})
}

// asNobody reports whether this process runs as nobody. If not, it runs the test in a process that does, and
// fails if that fails.
func asNobody(t *testing.T) bool {
	t.Helper()
	if os.Getenv(conformanceDir) != "" {
		return true
	}
	need.Root(t)
	kernel, initrd := vmtest.Guest(t)
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(nobody.Uid)
	gid, _ := strconv.Atoi(nobody.Gid)
	dir, err := os.MkdirTemp("", "vmt") // not t.TempDir: its name is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, from := range map[string]string{"kernel": kernel, "initrd": initrd, "vm.test": self} {
		copyFile(t, from, filepath.Join(dir, name))
	}
	if err := errors.Join(os.Chown(dir, uid, gid), os.Chmod(dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread() // and never unlocked: the thread stays in the namespace
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		t.Fatal(err)
	}
	openTUN(t, dir)
	makeTAPs(t, uid, gid)
	cmd := exec.Command(filepath.Join(dir, "vm.test"), "-test.run", "^"+t.Name()+"$", "-test.v", "-test.timeout", "15m")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), conformanceDir+"="+dir, "FLEETINGD_VMTEST_KERNEL="+filepath.Join(dir, "kernel"),
		"FLEETINGD_VMTEST_INITRD="+filepath.Join(dir, "initrd"), "TMPDIR="+dir, "HOME="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{
		Uid: uint32(uid), Gid: uint32(gid), Groups: kvmGroup(),
	}}
	if group := delegate(t, uid); group != nil {
		defer group.Close()
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(group.Fd())
		cmd.Env = append(cmd.Env, conformanceCgroup+"="+filepath.Dir(group.Name()))
	}
	out, err := cmd.CombinedOutput()
	t.Logf("as nobody:\n%s", out)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(out), "\nPASS\n") || strings.Contains(string(out), "--- SKIP") {
		t.Fatal("the test run as nobody did not pass")
	}
	return false
}

// makeTAPs makes persistent TAPs in this thread's network namespace.
func makeTAPs(t *testing.T, uid, gid int) {
	t.Helper()
	for _, name := range []string{testTAP, testTAP2} {
		tap := &netlink.Tuntap{
			LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP, Queues: 2,
			Owner: uint32(uid), Group: uint32(gid), // this library always sets a group, and then both must match
			Flags: netlink.TUNTAP_MULTI_QUEUE_DEFAULTS | netlink.TUNTAP_VNET_HDR,
		}
		if err := netlink.LinkAdd(tap); err != nil {
			t.Fatal(err)
		}
		for _, f := range tap.Fds {
			f.Close() // persistent: it stays
		}
		if err := netlink.LinkSetUp(tap); err != nil {
			t.Fatal(err)
		}
	}
}

// openTUN gives /dev/net/tun the mode that udev sets, only in this mount namespace. If udev has done so, it does
// nothing, since dir may be on a file system that does not allow devices.
func openTUN(t *testing.T, dir string) {
	t.Helper()
	if st, err := os.Stat("/dev/net/tun"); err == nil && st.Mode().Perm() == 0o666 {
		return
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(dir, "tun")
	if err := unix.Mknod(node, unix.S_IFCHR, int(unix.Mkdev(10, 200))); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(node, 0o666), unix.Mount(node, "/dev/net/tun", "", unix.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
}

// delegate does what systemd does for a unit with Delegate= and DelegateSubgroup=, and returns the subgroup, or nil if
// the controllers are not all on cgroup v2.
func delegate(t *testing.T, uid int) *os.File {
	t.Helper()
	have, err := os.ReadFile(filepath.Join(cgroupMount, "cgroup.controllers"))
	if err != nil {
		return nil
	}
	for _, name := range controllers {
		if !slices.Contains(strings.Fields(string(have)), name) {
			return nil
		}
	}
	root := filepath.Join(cgroupMount, "vmtest")
	sub := filepath.Join(root, "runner")
	if err := errors.Join(
		setCgroup(cgroupMount, "cgroup.subtree_control", "+"+strings.Join(controllers, " +")),
		os.Mkdir(root, 0o755), os.Mkdir(sub, 0o755), unix.Setxattr(root, "user.delegate", []byte("1"), 0),
	); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(removeCgroup(sub), removeCgroup(root)); err != nil {
			t.Error(err)
		}
	})
	for _, dir := range []string{root, sub} {
		for _, name := range []string{"", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"} {
			if err := os.Chown(filepath.Join(dir, name), uid, -1); err != nil {
				t.Fatal(err)
			}
		}
	}
	f, err := os.Open(sub)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// kvmGroup returns the group of /dev/kvm; none if that is root.
func kvmGroup() []uint32 {
	var st unix.Stat_t
	if unix.Stat("/dev/kvm", &st) != nil || st.Gid == 0 {
		return nil
	}
	return []uint32{st.Gid}
}

// bench is one driver under test.
type bench struct {
	dir    string
	driver Driver
	open   func() Driver
	shared string // a read-only disk
	count  int
}

func conformance(t *testing.T, h plan.Hypervisor) {
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	b := &bench{dir: os.Getenv(conformanceDir), open: func() Driver {
		d, err := Open(h, log)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}}
	b.driver = b.open()
	info, err := b.driver.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("uid %d: %s %s, %s, %s", os.Getuid(), b.driver.Name(), info.Version, info.Binary, info.Accel)
	b.shared = b.disk(t, "shared", "read by all")
	if err := os.Chmod(b.shared, 0o444); err != nil {
		t.Fatal(err)
	}
	for _, sub := range []struct {
		name string
		run  func(*testing.T, *bench)
	}{
		{"devices and power button", testDevices},
		{"guest powers off", testGuestPowersOff},
		{"killed", testKilled},
		{"adopt, and a guest that ignores the button", testAdopt},
		{"hung VMM", testHung},
		{"reboot", testReboot},
		{"reboot loop", testRebootLoop},
		{"cancelled start", testCancelledStart},
		{"impossible", testImpossible},
	} {
		t.Run(sub.name, func(t *testing.T) {
			noLeaks(t, b.dir)
			sub.run(t, b)
		})
	}
}

// disk creates a 1 MiB disk that begins with text.
func (b *bench) disk(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(b.dir, name+".raw")
	if err := os.WriteFile(path, append([]byte(text), make([]byte, 1<<20-len(text))...), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// config returns a VM with one CPU and no network, for the test to change.
func (b *bench) config(t *testing.T) Config {
	t.Helper()
	b.count++
	dir := filepath.Join(b.dir, fmt.Sprintf("v%d", b.count))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	kernel, initrd := vmtest.Guest(t)
	return Config{
		ID: fmt.Sprintf("test-%d", b.count), Dir: dir, CPUs: 1, Memory: 256 << 20, Kernel: kernel, Initrd: initrd,
		Cmdline: "loglevel=4", Console: filepath.Join(dir, "console.log"),
	}
}

func (b *bench) start(t *testing.T, cfg Config) VM {
	t.Helper()
	begin := time.Now()
	v, err := b.driver.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: pid %d after %v", cfg.ID, v.PID(), time.Since(begin).Round(time.Millisecond))
	t.Cleanup(func() {
		if t.Failed() {
			console, _ := os.ReadFile(cfg.Console)
			t.Logf("console of %s:\n%s", cfg.ID, console)
		}
		if err := v.Kill(); err != nil {
			t.Errorf("Kill at the end: %v", err)
		}
	})
	return v
}

func testDevices(t *testing.T, b *bench) {
	cfg := b.config(t)
	root := b.disk(t, "root, with a comma", "the root disk")
	cfg.CPUs = 2
	cfg.Disks = []Disk{{Path: root, Serial: "root"}, {Path: b.shared, ReadOnly: true, Serial: "shared"}}
	cfg.Net = &Net{TAP: testTAP, MAC: testMAC, Queues: 2}
	cfg.Limits = Limits{DiskIOPS: 5000, CPUQuotaPercent: 150}
	v := b.start(t, cfg)
	cgroup := limited(t, cfg, v.PID())
	other := b.config(t)
	other.Disks = []Disk{{Path: b.shared, ReadOnly: true, Serial: "shared"}}
	other.Net = &Net{TAP: testTAP2, MAC: testMAC, Queues: 1}
	// The TAP has two queues: asking for one must fail with the kernel's EINVAL and an explanation.
	if _, err := b.driver.Start(t.Context(), other); err == nil || !strings.Contains(err.Error(), "other flags") {
		t.Errorf("a TAP with other flags: %v", err)
	}
	other.Net = nil
	second := b.start(t, other)
	taken := b.config(t)
	taken.Disks = []Disk{{Path: root, Serial: "root"}}
	refused := func(what, want string) {
		t.Helper()
		v, err := b.driver.Start(t.Context(), taken)
		if err == nil {
			v.Kill()
		}
		if err == nil || !strings.Contains(strings.ToLower(err.Error()), want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	refused("a disk that another VM writes", "lock")
	taken.Disks = nil
	taken.Net = &Net{TAP: testTAP, MAC: testMAC, Queues: 2}
	taken.CPUs = 2
	refused("a TAP that another VM has", "has it open")

	want := func(question, answer string) {
		t.Helper()
		if got := ask(t, v, question); !strings.Contains(got, answer) {
			t.Errorf("%s: the guest says %q, not %q", question, got, answer)
		}
	}
	want("echo hello, guest", "hello, guest")
	want("cpus", "2")
	want("net", "mac="+testMAC+" queues=2")
	want("disks", "vda ro=0 serial=root sectors=2048 queues=2 text=the root disk;"+
		"vdb ro=1 serial=shared sectors=2048")
	want("disks", "text=read by all")
	want("write vda changed", "ok")
	want("disks", "text=changed;")
	if got := ask(t, v, "write vdb changed"); got == "ok" {
		t.Error("the guest wrote to the read-only disk")
	}
	if got := ask(t, second, "disks"); !strings.Contains(got, "text=read by all") {
		t.Errorf("the second VM's disks: %s", got)
	}
	privileges(t, v.PID())

	for _, v := range []VM{v, second} {
		begin := time.Now()
		if err := v.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Logf("Stop took %v: %v", time.Since(begin).Round(time.Millisecond), v.Exit())
		if !errors.Is(v.Exit(), ErrPoweredOff) {
			t.Errorf("after the power button: %v", v.Exit())
		}
		if err := v.Stop(t.Context()); err != nil {
			t.Errorf("a second Stop: %v", err)
		}
	}
	if data, err := os.ReadFile(root); err != nil || !strings.HasPrefix(string(data), "changed") {
		t.Errorf("the disk begins with %.10q, %v", data, err)
	}
	onlyConsole(t, cfg)
	if _, err := os.Stat(cgroup); cgroup != "" && err == nil {
		t.Errorf("the cgroup %s is left", cgroup)
	}
}

// limited checks and returns the VMM's cgroup; "" if none was delegated.
func limited(t *testing.T, cfg Config, pid int) string {
	t.Helper()
	root := os.Getenv(conformanceCgroup)
	if root == "" {
		t.Log("no cgroup is delegated here: its limits are not tested")
		return ""
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	path, err := parseCgroup(string(data))
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cgroupMount, path)
	if dir != filepath.Join(root, "vm-"+cfg.ID) {
		t.Errorf("the VMM is in cgroup %s", dir)
	}
	for name, want := range map[string]string{
		"cpu.max": "150000 100000", "pids.max": strconv.Itoa(vmmThreads), "memory.max": fmt.Sprint(cfg.Memory),
		"io.max": "riops=5000 wiops=5000",
	} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		t.Logf("%s: %s", name, strings.TrimSpace(string(got)))
		switch name {
		case "memory.max":
			n, _ := strconv.ParseInt(strings.TrimSpace(string(got)), 10, 64)
			if n < cfg.Memory+vmmMemory || n > 2*cfg.Memory+vmmMemory {
				t.Errorf("memory.max is %d for a guest of %d, %v", n, cfg.Memory, err)
			}
		case "io.max":
			if device, err := blockDevice(cfg.Disks[0].Path); err != nil || device != "" && !strings.Contains(string(got), want) {
				t.Errorf("io.max on %q: %q, %v", device, got, err)
			}
		default:
			if strings.TrimSpace(string(got)) != want {
				t.Errorf("%s is %q, not %s: %v", name, got, want, err)
			}
		}
	}
	return dir
}

// privileges checks that the VMM has none, because a guest that breaks out would have them.
func privileges(t *testing.T, pid int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"CapEff:\t0000000000000000", "NoNewPrivs:\t1"} {
		if !strings.Contains(string(status), line) {
			t.Errorf("VMM %d is not %q", pid, line)
		}
	}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	filtered := 0
	for _, path := range tasks {
		if data, _ := os.ReadFile(path); strings.Contains(string(data), "Seccomp:\t2") {
			filtered++
		}
	}
	t.Logf("VMM %d: CapEff 0, NoNewPrivs 1, seccomp filters on %d of %d threads", pid, filtered, len(tasks))
	if filtered < len(tasks)-1 { // Cloud Hypervisor's main thread has none
		t.Errorf("seccomp filters on %d of %d threads", filtered, len(tasks))
	}
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil || strings.Contains(string(environ), conformanceDir) {
		t.Errorf("the VMM has our environment: %q, %v", environ, err)
	}
}

func testGuestPowersOff(t *testing.T, b *bench) {
	cfg := b.config(t)
	cfg.Console = "" // and it must still boot
	v := b.start(t, cfg)
	if v.Exit() != nil {
		t.Errorf("Exit of a running VM: %v", v.Exit())
	}
	ask(t, v, "echo up")
	tell(t, v, "poweroff")
	wait(t, v)
	if !errors.Is(v.Exit(), ErrPoweredOff) {
		t.Errorf("Exit: %v", v.Exit())
	}
	if _, err := v.Channel(t.Context()); err == nil {
		t.Error("a channel to an ended VM")
	}
	if err := v.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	onlyConsole(t, cfg)
}

func testKilled(t *testing.T, b *bench) {
	cfg := b.config(t)
	v := b.start(t, cfg)
	conn, err := v.Channel(t.Context())
	if err == nil {
		defer conn.Close()
	}
	if err := unix.Kill(v.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	wait(t, v)
	t.Logf("noticed after %v: %v", time.Since(begin), v.Exit())
	if !strings.Contains(v.Exit().Error(), "signal: killed") || errors.Is(v.Exit(), ErrPoweredOff) {
		t.Errorf("Exit: %v", v.Exit())
	}
	if conn != nil {
		conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the channel of a killed VM: %v", err)
		}
	}
	if _, err := b.open().Adopt(t.Context(), cfg.Dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Adopt of a killed VM: %v", err)
	}
	if err := v.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	onlyConsole(t, cfg)
}

func testAdopt(t *testing.T, b *bench) {
	cfg := b.config(t)
	cfg.Cmdline += " vmtest.deaf"
	first := b.start(t, cfg)
	ask(t, first, "echo before")
	// A killed plugin leaves its VMM running, and a new driver knows only the folder.
	// The old VM's connections are useless: QEMU serves one client at a time.
	forget(first)
	v, err := b.open().Adopt(t.Context(), cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	if v.PID() != first.PID() {
		t.Fatalf("adopted pid %d, not %d", v.PID(), first.PID())
	}
	if got := ask(t, v, "echo after"); got != "after" {
		t.Errorf("the adopted guest says %q", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	begin := time.Now()
	if err := v.Stop(ctx); err != nil {
		t.Error(err)
	}
	took := time.Since(begin)
	t.Logf("Stop of a deaf guest took %v: %v", took, v.Exit())
	if took < time.Second || took > 10*time.Second {
		t.Errorf("Stop with two seconds for the guest took %v", took)
	}
	if v.Exit() == nil || errors.Is(v.Exit(), ErrPoweredOff) {
		t.Errorf("Exit: %v", v.Exit())
	}
	onlyConsole(t, cfg)
	if _, err := b.driver.Adopt(t.Context(), cfg.Dir); !errors.Is(err, ErrNotRunning) {
		t.Errorf("Adopt where nothing is: %v", err)
	}
}

// forget closes what a dead process would have closed.
func forget(v VM) {
	if v, ok := v.(*qemuVM); ok {
		v.qmp.close()
		v.channel.Close()
	}
}

func testHung(t *testing.T, b *bench) {
	cfg := b.config(t)
	v := b.start(t, cfg)
	if err := unix.Kill(v.PID(), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := v.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	took := time.Since(begin)
	t.Logf("Stop of a hung VMM took %v: %v", took, v.Exit())
	if took > controlDeadline+termGrace+5*time.Second {
		t.Errorf("Stop of a hung VMM took %v", took)
	}
	onlyConsole(t, cfg)
}

func testReboot(t *testing.T, b *bench) {
	cfg := b.config(t)
	v := b.start(t, cfg)
	first := ask(t, v, "boot")
	tell(t, v, "reboot")
	until(t, "another boot id", func() bool { return ask(t, v, "boot") != first })
	if v.Exit() != nil {
		t.Errorf("after one reboot: %v", v.Exit())
	}
}

func testRebootLoop(t *testing.T, b *bench) {
	cfg := b.config(t)
	cfg.Cmdline += " vmtest.reboot"
	v := b.start(t, cfg)
	begin := time.Now()
	select {
	case <-v.Done():
	case <-time.After(3 * time.Minute):
		t.Fatal("the loop was not noticed")
	}
	t.Logf("after %v: %v", time.Since(begin).Round(time.Second), v.Exit())
	if !strings.Contains(v.Exit().Error(), "reboots in a loop") {
		t.Errorf("Exit: %v", v.Exit())
	}
	if err := v.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	onlyConsole(t, cfg)
}

// A Start that is cancelled at any time either returns a VM or leaves nothing behind.
func testCancelledStart(t *testing.T, b *bench) {
	for _, after := range []time.Duration{0, 5, 20, 50, 100, 200} {
		cfg := b.config(t)
		ctx, cancel := context.WithTimeout(t.Context(), after*time.Millisecond)
		v, err := b.driver.Start(ctx, cfg)
		cancel()
		t.Logf("cancelled after %d ms: %v", after, err)
		if err == nil {
			if err := v.Kill(); err != nil {
				t.Error(err)
			}
		}
		onlyConsole(t, cfg)
	}
}

// What cannot work returns the reason and leaves nothing behind.
func testImpossible(t *testing.T, b *bench) {
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"no such kernel":   {func(c *Config) { c.Kernel = "/no/such/kernel" }, "/no/such/kernel"},
		"no such disk":     {func(c *Config) { c.Disks = []Disk{{Path: "/no/such/disk"}} }, "/no/such/disk"},
		"no such TAP":      {func(c *Config) { c.Net = &Net{TAP: "nosuch0", MAC: testMAC, Queues: 1} }, "network up"},
		"a relative path":  {func(c *Config) { c.Initrd = "initrd" }, "not absolute"},
		"no CPU":           {func(c *Config) { c.CPUs = 0 }, "at least 1 CPU; got 0"},
		"a long folder":    {func(c *Config) { c.Dir += strings.Repeat("/x", 50) }, "80 bytes"},
		"a long serial":    {func(c *Config) { c.Disks = []Disk{{Path: b.shared, Serial: strings.Repeat("x", 21)}} }, "20 bytes"},
		"no such cgroup":   {func(c *Config) { c.Cgroup = "/sys/fs/cgroup/no/such" }, "/sys/fs/cgroup/no/such"},
		"more memory than": {func(c *Config) { c.Memory = 1 << 50 }, "emor"},
	} {
		cfg := b.config(t)
		dir := cfg.Dir
		c.change(&cfg)
		v, err := b.driver.Start(t.Context(), cfg)
		if err == nil {
			t.Errorf("%s: started", name)
			v.Kill()
			continue
		}
		t.Logf("%s: %v", name, err)
		if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: the error does not say %q: %v", name, c.want, err)
		}
		cfg.Dir = dir
		onlyConsole(t, cfg)
	}
}

// ask sends a question to the guest and returns its answer; it reconnects and asks again until there is one.
func ask(t *testing.T, v VM, question string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	var last error
	for ctx.Err() == nil {
		var answer string
		if answer, last = askOnce(ctx, v, question); last == nil {
			return answer
		}
		select {
		case <-v.Done():
			t.Fatalf("%q: the VM ended: %v", question, v.Exit())
		default:
		}
	}
	t.Fatalf("%q: no answer: %v", question, last)
	return ""
}

func askOnce(ctx context.Context, v VM, question string) (string, error) {
	conn, err := v.Channel(ctx)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	// A mark, because the guest's answer to an earlier question may still arrive.
	mark := fmt.Sprint("mark-", time.Now().UnixNano())
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := fmt.Fprintf(conn, "echo %s\n%s\n", mark, question); err != nil {
		return "", err
	}
	lines := bufio.NewScanner(conn)
	for marked := false; lines.Scan(); {
		if marked {
			return lines.Text(), nil
		}
		marked = lines.Text() == mark
	}
	if err := lines.Err(); err != nil {
		return "", err
	}
	return "", io.ErrUnexpectedEOF
}

// tell sends a command without an answer.
func tell(t *testing.T, v VM, command string) {
	t.Helper()
	conn, err := v.Channel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := fmt.Fprintln(conn, command); err != nil {
		t.Fatal(err)
	}
}

func wait(t *testing.T, v VM) {
	t.Helper()
	select {
	case <-v.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("the VM did not end")
	}
}

// until waits for a condition, checked every few milliseconds.
func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	deadline := time.After(60 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-deadline:
			t.Fatalf("still no %s", what)
		case <-tick.C:
		}
	}
}

// onlyConsole checks that only the console log is left of a VM.
func onlyConsole(t *testing.T, cfg Config) {
	t.Helper()
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if path := filepath.Join(cfg.Dir, e.Name()); path != cfg.Console {
			t.Errorf("%s is left", path)
		}
	}
}

// noLeaks checks at the end of the test that no process and no descriptor is left.
func noLeaks(t *testing.T, dir string) {
	t.Helper()
	before := descriptors(t)
	t.Cleanup(func() { // before the test's own: registered first, run last
		until(t, "end of all VMMs", func() bool { return len(processes(t, dir)) == 0 })
		var now []string
		until(t, "descriptors closed", func() bool {
			now = descriptors(t)
			return len(now) <= len(before)
		})
	})
}

func descriptors(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		target, err := os.Readlink("/proc/self/fd/" + e.Name())
		// The poller opens its own descriptors at its first use.
		if err == nil && !strings.Contains(target, "anon_inode:[event") {
			all = append(all, target)
		}
	}
	return all
}

// processes returns the other processes whose command line names the folder.
func processes(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	paths, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range paths {
		data, _ := os.ReadFile(path)
		args := strings.Split(string(data), "\x00")
		if pid := filepath.Base(filepath.Dir(path)); pid == strconv.Itoa(os.Getpid()) {
			continue
		}
		if slices.ContainsFunc(args, func(arg string) bool { return strings.Contains(arg, dir+"/v") && !strings.HasSuffix(arg, "vm.test") }) {
			all = append(all, strings.Join(args, " "))
		}
	}
	return all
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(out, in)
	if err := errors.Join(err, out.Close()); err != nil {
		t.Fatal(err)
	}
}
