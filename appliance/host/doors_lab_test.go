package host

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/hostlab"
	needs "github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// inLab is set in the lab: there a test may do to the host what it must not do to the machine it is developed on.
const inLab = "FLEETINGD_TEST_IN_LAB"

func needsLab(t *testing.T) {
	t.Helper()
	if os.Getenv(inLab) == "" {
		t.Skip("skipped: TestDoorsInLab runs it, in a throw-away host")
	}
}

// TestDoorsInLab runs the tests that need a whole host, which are named TestLab…, in one.
func TestDoorsInLab(t *testing.T) {
	needs.VM(t)
	needs.Tools(t, "go", "mmdebstrap", "mke2fs", "ssh", "tar")
	binary := filepath.Join(t.TempDir(), "host.test")
	build := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	lab := hostlab.ForTest(t, hostlab.Options{Files: map[string]string{"/root/host.test": binary}})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	out, err := lab.Sh(ctx, "cd /root && "+inLab+"=1 FLEETINGD_TEST=full ./host.test -test.v -test.run '^TestLab' 2>&1")
	t.Log(out)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out, "--- PASS: TestLab"); n < 6 {
		t.Errorf("only %d tests ran", n)
	}
}

func labUnits(t *testing.T, files map[string]string) *Units {
	t.Helper()
	needsLab(t)
	for name, text := range files {
		writeOne(t, NewTree("/", "/root/notes.json").Files(), "/etc/systemd/system/"+name,
			State{"content": text, "mode": "0644", "owner": "root", "group": "root"})
	}
	u, err := OpenUnits(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for name := range files {
			if err := u.Write(context.Background(), name, nil); err != nil {
				t.Error(err)
			}
			if err := NewTree("/", "/root/notes.json").Files().Write(context.Background(), "/etc/systemd/system/"+name, nil); err != nil {
				t.Error(err)
			}
		}
		if err := u.Reload(context.Background()); err != nil {
			t.Error(err)
		}
		u.Close()
	})
	if err := u.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	return u
}

const installed = "\n[Install]\nWantedBy=multi-user.target\n"

func TestLabUnits(t *testing.T) {
	u := labUnits(t, map[string]string{
		"lab-sleeps.service":     "[Service]\nExecStart=/bin/sleep infinity\n" + installed,
		"lab-once.service":       "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n" + installed,
		`lab-odd\x2dname.timer`:  "[Timer]\nOnCalendar=daily\nUnit=lab-once.service\n" + installed,
		"lab-static.service":     "[Service]\nExecStart=/bin/sleep infinity\n",
		"lab-fails.service":      "[Service]\nExecStart=/bin/sh -c 'echo no such thing; exit 7'\n" + installed,
		"lab-loops.service":      "[Service]\nExecStart=/bin/false\nRestart=always\nRestartSec=50ms\n" + installed,
		"lab-oncefails.service":  "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo \"\\033[31mred\"; exit 8'\n" + installed,
		"lab-needs.service":      "[Unit]\nRequires=lab-oncefails.service\nAfter=lab-oncefails.service\n[Service]\nExecStart=/bin/sleep infinity\n" + installed,
		"lab-condition.service":  "[Unit]\nConditionPathExists=/nonexistent\n[Service]\nExecStart=/bin/sleep infinity\n" + installed,
		"lab-assertion.service":  "[Unit]\nAssertPathExists=/nonexistent\n[Service]\nExecStart=/bin/sleep infinity\n" + installed,
		"lab-slow.service":       "[Service]\nType=notify\nTimeoutStartSec=1\nExecStart=/bin/sleep infinity\n" + installed,
		"lab-noinstall.service":  "[Service]\nExecStart=/bin/sleep infinity\n",
		"lab-unparsable.service": "[Service]\n" + installed,
	})
	up := State{"enablement": "enabled", "active": "active"}
	for _, name := range []string{"lab-sleeps.service", "lab-once.service", `lab-odd\x2dname.timer`} {
		if s := readOne(t, u, name); s["enablement"] != "disabled" || s["active"] != "inactive" {
			t.Errorf("%s is %v before", name, s)
		}
		for range 2 {
			writeOne(t, u, name, up)
		}
	}
	writeOne(t, u, "lab-sleeps.service", State{"enablement": "disabled", "active": "inactive"})
	writeOne(t, u, "lab-sleeps.service", State{"enablement": "enabled", "active": "inactive"})
	writeOne(t, u, "lab-static.service", State{"enablement": "static", "active": "active"})
	writeOne(t, u, "lab-static.service", State{"enablement": "static", "active": "inactive"})
	if s := readOne(t, u, "lab-nosuch.service"); s != nil {
		t.Errorf("a unit without a file is %v", s)
	}
	for name, want := range map[string]string{
		"lab-nosuch.service":     "systemd knows no such unit",
		"lab-fails.service":      "no such thing",
		"lab-loops.service":      "it started and ended at once",
		"lab-oncefails.service":  `start: failed (exit-code, status 8); its log ends with:`,
		"lab-needs.service":      "a unit that it needs failed: lab-oncefails.service",
		"lab-condition.service":  "a condition in its file does not hold",
		"lab-assertion.service":  "an assertion in its file does not hold",
		"lab-slow.service":       "start: failed (timeout",
		"lab-noinstall.service":  "cannot be made enabled",
		"lab-unparsable.service": "start:",
	} {
		err := u.Write(t.Context(), name, up)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\x1b") {
			t.Errorf("%s: %v; want %q", name, err, want)
		}
		t.Log(err)
	}
	// A failed one is started again once its cause is gone.
	if err := os.WriteFile("/etc/systemd/system/lab-oncefails.service",
		[]byte("[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n"+installed), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := u.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	writeOne(t, u, "lab-oncefails.service", up)
	writeOne(t, u, "lab-needs.service", up)
}

func TestLabUnitsMasked(t *testing.T) {
	u := labUnits(t, nil)
	if out, err := exec.Command("systemctl", "mask", "lab-masked.service").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	defer exec.Command("systemctl", "unmask", "lab-masked.service").Run()
	err := u.Write(t.Context(), "lab-masked.service", State{"enablement": "enabled", "active": "active"})
	if err == nil || !strings.Contains(err.Error(), "systemctl unmask lab-masked.service") {
		t.Error(err)
	}
}

// A service like GitLab Runner's ends when its job has, and only then.
func TestLabUnitsRestart(t *testing.T) {
	const runner = `[Service]
ExecStart=/bin/sh -c 'trap "while [ -e /run/lab-job ]; do sleep 0.1; done; exit 0" QUIT; while :; do sleep 0.1; done'
KillSignal=SIGQUIT
KillMode=process
Restart=always
RestartSec=1
TimeoutStopSec=30
`
	u := labUnits(t, map[string]string{"lab-runner.service": runner + installed, "lab-sleeps.service": "[Service]\nExecStart=/bin/sleep infinity\n" + installed})
	up := State{"enablement": "enabled", "active": "active"}
	writeOne(t, u, "lab-runner.service", up)
	writeOne(t, u, "lab-sleeps.service", up)
	if err := os.WriteFile("/run/lab-job", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	defer os.Remove("/run/lab-job")
	ended := make(chan time.Time, 1)
	time.AfterFunc(2*time.Second, func() {
		ended <- time.Now()
		os.Remove("/run/lab-job")
	})
	if err := u.Restart(t.Context(), "lab-runner.service"); err != nil {
		t.Fatal(err)
	}
	select {
	case at := <-ended:
		t.Logf("up again %s after the job's end", time.Since(at).Round(10*time.Millisecond))
	default:
		t.Error("it was restarted before its job had ended")
	}
	if s := readOne(t, u, "lab-runner.service"); s["active"] != "active" {
		t.Errorf("%v", s)
	}
	before, err := u.properties(t.Context(), "lab-sleeps.service")
	if err == nil {
		err = u.Restart(t.Context(), "lab-sleeps.service")
	}
	after, err1 := u.properties(t.Context(), "lab-sleeps.service")
	if err != nil || err1 != nil || before["MainPID"] == after["MainPID"] {
		t.Errorf("an ordinary service: %v, %v, main process %v", err, err1, after["MainPID"])
	}
}

// Accounts of the running host, not only of a tree.
func TestLabAccounts(t *testing.T) {
	needsLab(t)
	tr := NewTree("/", "/root/notes.json")
	before := accountFiles(t, "/")
	writeOne(t, tr.Users(), "labuser", State{"comment": "lab", "home": "/var/lib/lab", "shell": "/usr/sbin/nologin"})
	writeOne(t, tr.Members(), "labuser/kvm", State{"member": "yes"})
	run := exec.Command("setpriv", "--reuid", "labuser", "--regid", "labuser", "--init-groups", "id", "-nG")
	if out, err := run.CombinedOutput(); err != nil || strings.TrimSpace(string(out)) != "labuser kvm" {
		t.Errorf("%v: %s", err, out)
	}
	busy := exec.Command("setpriv", "--reuid", "labuser", "--regid", "labuser", "--init-groups", "sleep", "infinity")
	if err := busy.Start(); err != nil {
		t.Fatal(err)
	}
	err := tr.Users().Write(t.Context(), "labuser", nil)
	if err == nil || !strings.Contains(err.Error(), "currently used by process") {
		t.Errorf("a user with a process: %v", err)
	}
	_ = busy.Process.Kill()
	_ = busy.Wait()
	writeOne(t, tr.Members(), "labuser/kvm", nil)
	writeOne(t, tr.Users(), "labuser", nil)
	for name, text := range accountFiles(t, "/") {
		if text != before[name] {
			t.Errorf("%s changed:\n%s", name, text)
		}
	}
}

// Packages of Debian's own mirror, on the host that runs.
func TestLabPackages(t *testing.T) {
	needsLab(t)
	if !HasApt() {
		t.Fatal("a Debian host has no apt")
	}
	list := func() string {
		out, err := exec.Command("dpkg-query", "--show", "--showformat", `${Package} ${Version} ${db:Status-Status}\n`).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	before := list()
	d := NewPackages("/root/packages", nil, nil)
	if s := readOne(t, d, "tmux"); s != nil {
		t.Fatal("the lab has tmux by now; name another package here")
	}
	writeOne(t, d, "tmux", State{"installed": "yes"})
	if out, err := exec.Command("tmux", "-V").CombinedOutput(); err != nil || !strings.HasPrefix(string(out), "tmux ") {
		t.Errorf("%v: %s", err, out)
	}
	with := len(strings.Split(list(), "\n")) - len(strings.Split(before, "\n"))
	writeOne(t, d, "tmux", nil)
	if after := list(); after != before {
		t.Errorf("dpkg's list changed:\n%s", after)
	}
	t.Logf("tmux came with %d packages and went with them", with)
}

// TestLabDisks: what the compiler writes of the disks, made by the doors in the order in which apply calls them.
func TestLabDisks(t *testing.T) {
	needsLab(t)
	res, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: []byte(labHost)})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	h := res.Host
	var err error
	h.Disks.Backing, h.Disks.Size, err = SettleDisks(h.StateDir, h.Disks.Backing, 1<<30, clones)
	if err != nil || h.Disks.Backing != "xfs-image" { // the lab is ext4
		t.Fatalf("%s, %v", h.Disks.Backing, err)
	}
	p, diags := compile.Compile(h, compile.Options{})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	ctx := t.Context()
	tr := NewTree("/", "/root/notes.json")
	u, err := OpenUnits(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	mount := p.Units[slices.IndexFunc(p.Units, func(u plan.Unit) bool { return strings.HasSuffix(u.Name, ".mount") })].Name
	account := p.Account()
	if account.Name != "fleetingd" || readOne(t, tr.Users(), account.Name) == nil {
		writeOne(t, tr.Users(), account.Name, State{"comment": account.Comment, "home": account.Home, "shell": account.Shell})
	}
	folder := func(f plan.Folder) {
		writeOne(t, tr.Folders(), f.Path, State{"mode": f.Mode, "owner": f.Owner, "group": f.Group})
	}
	for _, f := range p.Folders() {
		if !f.Mounted {
			folder(f)
		}
	}
	for _, f := range p.Files {
		if strings.Contains(f.Path, "disks") {
			writeOne(t, tr.Files(), f.Path, State{"content": f.Content, "mode": f.Mode, "owner": f.Owner, "group": f.Group})
		}
	}
	writeOne(t, tr.DiskImages(), p.Disks.Image, sized(p.Disks.Size))
	if err := u.Reload(ctx); err != nil {
		t.Fatal(err)
	}
	up := State{"enablement": "enabled", "active": "active"}
	writeOne(t, u, mount, up)
	for _, f := range p.Folders() {
		if f.Mounted {
			folder(f)
		}
	}
	if err := clones(p.Paths.Clones); err != nil {
		t.Error(err)
	}
	writeOne(t, tr.DiskImages(), p.Disks.Image, sized(2<<30))
	var st unix.Statfs_t
	if err := unix.Statfs(p.Paths.Disks, &st); err != nil || int64(st.Blocks)*st.Bsize < 1<<30 {
		t.Errorf("grown to %d MiB, %v", int64(st.Blocks)*st.Bsize>>20, err)
	}
	// And back. The units' files go last: systemd needs them to stop what they started.
	if err := u.Write(ctx, mount, nil); err != nil {
		t.Fatal(err)
	}
	writeOne(t, tr.DiskImages(), p.Disks.Image, nil)
	for _, f := range p.Files {
		if strings.Contains(f.Path, "disks") {
			writeOne(t, tr.Files(), f.Path, nil)
		}
	}
	if err := u.Reload(ctx); err != nil {
		t.Fatal(err)
	}
	if s := readOne(t, u, mount); s != nil {
		t.Errorf("the mount is %v in the end", s)
	}
}

const labHost = `
host "lab" {
  egress_interface = "eth0"
  state_dir        = "/srv/labstate"
}
image "golden" {
  file {
    disk   = "/srv/golden.qcow2"
    kernel = "/srv/vmlinuz"
  }
}
pool "small" {
  image         = image.golden
  cpus          = 1
  memory        = "1GiB"
  disk          = "1GiB"
  start         = "cold"
  max_instances = 2
}
`
