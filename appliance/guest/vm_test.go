package guest_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/fleetingd/fleetingd/appliance/guest"
	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
	"github.com/fleetingd/fleetingd/seed"
)

// With real VMs: Debian is prebuilt, sealed, and booted as two workers. The test runs itself again in
// its own network namespace, which has the VMs' TAP.
const vmTestDir = "FLEETINGD_GUEST_TEST_DIR"

const (
	tapName   = "guest0"
	workerMAC = "02:fe:00:00:00:02"
)

var (
	gateway4, address4 = netip.MustParseAddr("172.16.66.1"), netip.MustParseAddr("172.16.66.2")
	gateway6, address6 = netip.MustParseAddr("fd7e:1ee7::1"), netip.MustParseAddr("fd7e:1ee7::2")
)

func TestRealWorker(t *testing.T) {
	if dir := os.Getenv(vmTestDir); dir != "" {
		realWorker(t, dir)
		return
	}
	need.VM(t)
	need.Tools(t, "ip", "mmdebstrap", "mke2fs")
	dir, err := os.MkdirTemp("", "gst") // not t.TempDir: its name is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	build := exec.Command("go", "build", "-ldflags", "-s -w", "-o", filepath.Join(dir, "fleetingd"), "../../cmd/fleetingd-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the guest part: %v\n%s", err, out)
	}
	base := debianBase(t)
	for name, from := range map[string]string{"base.raw": base.Disk, "kernel": base.Kernel, "initrd": base.Initrd} {
		copySparse(t, from, filepath.Join(dir, name))
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "-test.run", "^TestRealWorker$", "-test.v", "-test.timeout", "45m")
	cmd.Env = append(os.Environ(), vmTestDir+"="+dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig means the thread
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	t.Logf("in the namespace:\n%s", out)
	if err != nil || !bytes.Contains(out, []byte("\nPASS\n")) {
		t.Fatalf("in the namespace: %v", err)
	}
}

func debianBase(t *testing.T) *image.Base {
	t.Helper()
	cache := need.Cache(t)
	state := filepath.Join(cache, "guest")
	p := &plan.Plan{
		Version: plan.Version, Host: "test",
		// The base built from packages is the same for all tests.
		Paths: plan.Paths{State: filepath.Join(cache, "state"), Disks: state, Images: filepath.Join(state, "images"), Cache: filepath.Join(state, "cache"),
			Clones: filepath.Join(state, "clones"), Run: filepath.Join(state, "run"), Workers: filepath.Join(state, "workers")},
		Images: []plan.Image{{Name: "debian", User: "debian",
			Source: plan.Source{Debian: &plan.DebianSource{Suite: "trixie", Arch: runtime.GOARCH, Packages: []string{}}}}},
	}
	base, err := image.NewBuilder(p, image.Options{}).Build(t.Context(), &p.Images[0], false)
	if err != nil {
		t.Fatal(err)
	}
	return base
}

func copySparse(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.Command("cp", "--sparse=always", "--reflink=auto", from, to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func realWorker(t *testing.T, dir string) {
	upLink(t)
	driver, err := vm.Open(plan.Hypervisor{Driver: "qemu", Binary: "qemu-system-x86_64", Accel: "tcg"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	r := rig{t, dir, driver}
	kernel, initrd := r.prebuild()

	type worker struct{ keys, machine string }
	var seen []worker
	for i, name := range []string{"worker-one", "worker-two"} {
		disk := filepath.Join(dir, name+".raw")
		copySparse(t, filepath.Join(dir, "sealed.raw"), disk)
		out := r.worker(name, disk, kernel, initrd, i == 0)
		keys, rest, _ := strings.Cut(out, "\n")
		machine, _, _ := strings.Cut(rest, "\n")
		seen = append(seen, worker{keys, machine})
	}
	if seen[0].keys == seen[1].keys || seen[0].machine == seen[1].machine || seen[0].machine == "" {
		t.Errorf("two workers are one machine: %+v", seen)
	}
}

// upLink does what the network unit does on a host, for one slot.
func upLink(t *testing.T) {
	t.Helper()
	for _, c := range []string{
		"link set lo up",
		fmt.Sprintf("addr add %s/32 dev lo", gateway4), fmt.Sprintf("addr add %s/128 dev lo nodad", gateway6),
		"tuntap add dev " + tapName + " mode tap vnet_hdr", "link set " + tapName + " up",
		fmt.Sprintf("route add %s/32 dev %s src %s", address4, tapName, gateway4),
		fmt.Sprintf("route add %s/128 dev %s src %s", address6, tapName, gateway6),
		fmt.Sprintf("neigh add %s lladdr %s dev %s nud permanent", address4, workerMAC, tapName),
		fmt.Sprintf("neigh add %s lladdr %s dev %s nud permanent", address6, workerMAC, tapName),
		// The gateway is on lo, and the TAP has to answer for it.
		fmt.Sprintf("neigh add proxy %s dev %s nud permanent", gateway6, tapName),
	} {
		if out, err := exec.Command("ip", strings.Fields(c)...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", c, err, out)
		}
	}
	for name, value := range map[string]string{
		"conf/" + tapName + "/forwarding": "1", "conf/" + tapName + "/proxy_ndp": "1", "neigh/" + tapName + "/proxy_delay": "0",
	} {
		if err := os.WriteFile("/proc/sys/net/ipv6/"+name, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
}

type rig struct {
	t      *testing.T
	dir    string
	driver vm.Driver
}

func (r rig) network() *seed.Network {
	return &seed.Network{
		MAC: workerMAC, MTU: 1400, Addresses: []netip.Addr{address4, address6},
		Gateways: []netip.Addr{gateway4, gateway6}, DNS: []netip.Addr{gateway4},
	}
}

// start boots a VM; it is killed at the end of the test, and then its console is logged if the test failed.
func (r rig) start(ctx context.Context, name, kernel, initrd string, s seed.Seed, disks ...vm.Disk) vm.VM {
	r.t.Helper()
	iso := filepath.Join(r.dir, name+".iso")
	if err := s.ISOFile(iso, 0o600); err != nil {
		r.t.Fatal(err)
	}
	run := filepath.Join(r.dir, name)
	if err := os.Mkdir(run, 0o700); err != nil {
		r.t.Fatal(err)
	}
	console := filepath.Join(r.dir, name+".console")
	v, err := r.driver.Start(ctx, vm.Config{
		ID: name, Dir: run, CPUs: 2, Memory: 1 << 30, Kernel: kernel, Initrd: initrd, Console: console,
		Cmdline: "root=/dev/vda rw quiet systemd.show_status=1",
		Disks:   append([]vm.Disk{disks[0], {Path: iso, ReadOnly: true}}, disks[1:]...),
		Net:     &vm.Net{TAP: tapName, MAC: workerMAC, Queues: 1},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		v.Kill()
		if r.t.Failed() {
			log, _ := os.ReadFile(console)
			r.t.Logf("%s's console:\n%s", name, log[max(0, len(log)-6000):])
		}
	})
	return v
}

func (r rig) prebuild() (kernel, initrd string) {
	t, dir := r.t, r.dir
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	binary, err := os.ReadFile(filepath.Join(dir, "fleetingd"))
	if err != nil {
		t.Fatal(err)
	}
	disk, export := filepath.Join(dir, "sealed.raw"), filepath.Join(dir, "export.raw")
	copySparse(t, filepath.Join(dir, "base.raw"), disk)
	if err := errors.Join(os.WriteFile(export, nil, 0o600), os.Truncate(export, guest.ExportSize)); err != nil {
		t.Fatal(err)
	}
	s := seed.Seed{
		InstanceID: "prebuild", Hostname: "prebuild", Network: r.network(), Users: []seed.User{{Name: "debian"}},
		Extra: map[string][]byte{"fleetingd": binary},
		RunCmd: [][]string{
			{"mkdir", "-p", "/run/seed", "/usr/lib/fleetingd"}, {"mount", "-o", "ro", "LABEL=cidata", "/run/seed"},
			{"install", "-m", "0755", "/run/seed/fleetingd", "/usr/lib/fleetingd/fleetingd"}, {"umount", "/run/seed"},
			{"systemd-run", "-p", "OOMPolicy=continue", "--unit=fleetingd-prebuild", "--no-block", "/usr/lib/fleetingd/fleetingd", "guest", "--prebuild"},
		},
	}
	v := r.start(ctx, "prebuild", filepath.Join(dir, "kernel"), filepath.Join(dir, "initrd"), s,
		vm.Disk{Path: disk}, vm.Disk{Path: export, Serial: guest.ExportSerial})
	session := guest.NewSession(v.Channel, guest.Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	defer session.Close()
	var out bytes.Buffer
	err = session.Prebuild(ctx, []guest.Step{
		{Name: "file", File: &guest.File{Path: "/opt/made/by/prebuild", Content: strings.Repeat("prebuilt\n", 50000), Mode: "0640"}},
		{Name: "big output", Command: "seq 1 20000; head -c 3000000 /dev/zero | tr '\\0' x; echo"},
		// Here cloud-init has set up the network, and systemd-networkd removes routes of others unless their protocol is the kernel's.
		{Name: "network", Command: fmt.Sprintf("systemctl restart systemd-networkd; networkctl reload; networkctl reconfigure $(ip -o route show default | sed 's/.* dev //; s/ .*//'); sleep 5\n"+
			"ip rule; ip -6 rule; ip route\nip rule | grep -q 'not from %s to %s iif lo lookup local'\n"+
			"ip -6 rule | grep -q 'not from %s to %s iif lo lookup local'\nip route | grep -q '^%s dev .* proto kernel'\n[ $(ip rule | grep -c 'lookup local') = 1 ]",
			address4, gateway4, address6, gateway6, gateway4)},
		{Name: "boot", Command: "systemd-analyze; systemd-analyze blame | head -25; systemd-analyze critical-chain ssh.service | cat"},
	}, &out)
	if err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	_, boot, _ := strings.Cut(out.String(), "boot: ")
	t.Logf("a plain boot with cloud-init and its own initrd:\n%s", boot)
	if n := strings.Count(out.String(), "\n"); n < 20000 || !strings.Contains(out.String(), "big output: 20000\n") {
		t.Errorf("%d lines of output came through, and not the last", n)
	}
	var failed *guest.StepError
	err = session.Prebuild(ctx, []guest.Step{{Name: "bad", Command: "echo no such luck; exit 7"}}, io.Discard)
	if !errors.As(err, &failed) || failed.Code != 7 || len(failed.Tail) != 1 || failed.Tail[0] != "no such luck" {
		t.Errorf("a step that fails gave %#v", err)
	}
	for _, c := range []struct {
		step guest.Step
		want guest.StepError // with words of its Reason and Hint, and its last line
	}{
		{guest.Step{Command: "no-such-curl -fsSL https://get.invalid | sh"}, guest.StepError{Code: 127, Tail: []string{"no-such-curl: command not found"}}},
		{guest.Step{Command: "echo one\nfalse\necho never"}, guest.StepError{Code: 1, Tail: []string{"one"}}},
		{guest.Step{Command: "#!/usr/bin/env python3\nraise SystemExit(9)"}, guest.StepError{Code: 9}},
		{guest.Step{Command: "yes | head -n 1"}, guest.StepError{Code: 141, Reason: "SIGPIPE", Tail: []string{"y"}}},
		{guest.Step{Command: "tail /dev/zero"}, guest.StepError{Code: 137, Reason: "memory ran out"}},
		{guest.Step{Packages: []string{"no-such-package"}}, guest.StepError{Code: 100, Hint: "names do not resolve",
			Tail: []string{"Unable to locate package no-such-package"}}},
	} {
		c.step.Name = "bad"
		err := session.Prebuild(ctx, []guest.Step{c.step}, io.Discard)
		var failed *guest.StepError
		if !errors.As(err, &failed) || failed.Code != c.want.Code || !strings.Contains(failed.Reason, c.want.Reason) ||
			!strings.Contains(failed.Hint, c.want.Hint) || len(c.want.Tail) > 0 && !strings.HasSuffix(strings.Join(failed.Tail, "\n"), c.want.Tail[0]) {
			t.Errorf("%+v gave %#v, want %+v", c.step, err, c.want)
		}
	}
	e, err := session.Seal(ctx)
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-v.Done():
	case <-ctx.Done():
		t.Fatal("the sealed guest did not power off")
	}
	f, err := os.Open(export)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := guest.ReadExport(f, dir+"/", e); err == nil {
		t.Fatal("an export was written over files that were there")
	}
	to := filepath.Join(dir, "export")
	if err := os.Mkdir(to, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if err := guest.ReadExport(f, to, e); err != nil {
		t.Fatalf("%+v: %v", e, err)
	}
	t.Logf("exported: %+v", e)
	return filepath.Join(to, guest.ExportKernel), filepath.Join(to, guest.ExportInitrd)
}

// worker boots a sealed disk and returns the output of the first SSH command.
func (r rig) worker(name, disk, kernel, initrd string, details bool) string {
	t := r.t
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	key, signer := newKey(t)
	began := time.Now()
	v := r.start(ctx, name, kernel, initrd, seed.Seed{
		InstanceID: name + "-1", Hostname: name, Network: r.network(),
		Users: []seed.User{{Name: "debian", AuthorizedKeys: []string{key}}, {Name: "somebody", AuthorizedKeys: []string{key}}},
	}, vm.Disk{Path: disk})
	defer v.Kill() // the next one has the same TAP
	session := guest.NewSession(v.Channel, guest.Options{})
	defer session.Close()
	ready, err := session.WaitReady(ctx)
	if err != nil {
		t.Fatal(err)
	}
	said := time.Since(began)
	if ready.Hostname != name {
		t.Errorf("%s calls itself %q", name, ready.Hostname)
	}
	run := func(user, command string) string {
		t.Helper()
		addr := address4
		if user == "somebody" {
			addr = address6
		}
		client, err := ssh.Dial("tcp", net.JoinHostPort(addr.String(), "22"), &ssh.ClientConfig{
			User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.InsecureIgnoreHostKey(), Timeout: time.Minute,
		})
		if err != nil {
			t.Fatalf("%s said that it is ready, but: %v", name, err)
		}
		defer client.Close()
		s, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		out, err := s.CombinedOutput(command)
		if err != nil {
			t.Errorf("%s: %q: %v: %s", name, command, err, out)
		}
		return string(out)
	}
	who := run("debian", "cut -d' ' -f2 /etc/ssh/ssh_host_*_key.pub; cat /etc/machine-id")
	t.Logf("%s: ready after %v (guest's clock: %v), first SSH command done after %v", name, said, ready.Took, time.Since(began))
	if !details {
		return who
	}
	for command, want := range map[string]string{
		"hostname; getent hosts " + name:                   name + "\n127.0.1.1 ",
		"sudo -n head -n1 /opt/made/by/prebuild":           "prebuilt\n",
		"sudo -n stat -c %a-%U /opt/made/by/prebuild":      "640-root\n",
		"cat /sys/class/net/eth0/mtu":                      "1400\n",
		"ls /etc/ssh/ssh_host_*":                           "/etc/ssh/ssh_host_ed25519_key\n/etc/ssh/ssh_host_ed25519_key.pub\n",
		"resolvectl dns | grep Global":                     gateway4.String(),
		"ip -6 addr show dev eth0":                         address6.String() + "/128",
		"stat -c '%a %U' ~/.ssh/authorized_keys":           "600 debian\n",
		"sudo -n systemctl is-system-running --wait; true": "running\n",
		"systemctl --failed --no-legend":                   "",
		"findmnt -rno FSTYPE,OPTIONS /dev/hugepages":       "hugetlbfs rw,nosuid,nodev,relatime",
		"findmnt -rno FSTYPE,OPTIONS /dev/mqueue":          "mqueue rw,nosuid,nodev,noexec",
		"findmnt -rno FSTYPE,OPTIONS /sys/kernel/debug":    "debugfs rw,nosuid,nodev,noexec",
		"findmnt -rno FSTYPE,OPTIONS /sys/kernel/tracing":  "tracefs rw,nosuid,nodev,noexec",
		"systemctl is-active dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount dev-hugepages.mount | uniq": "active\n",
		"ss -Htlnp | grep -v ':22 ' | grep -v 127.0.0.5 ; true":                                                           "",
		"sudo -n test ! -e /root/.bash_history; echo $?":                                                                  "0\n",
		"apt-get --version >/dev/null; cloud-init --version; true":                                                        "cloud-init",
	} {
		if got := run("debian", command); !strings.Contains(got, want) || want == "" && strings.TrimSpace(got) != "" {
			t.Errorf("%s: %q says %q, want %q", name, command, got, want)
		}
	}
	if got := run("somebody", "id -un; sudo -n id -un"); got != "somebody\nroot\n" {
		t.Errorf("a user that only the seed knows, over IPv6: %q", got)
	}
	for _, command := range []string{"cloud-init status --wait", "/usr/bin/cloud-init status --wait"} {
		asked := time.Now()
		if got := run("debian", command); strings.TrimSpace(got) != "status: disabled" {
			t.Errorf("%s: %q", command, got)
		}
		t.Logf("%s: %v", command, time.Since(asked))
	}
	// The worst network that a job can create, during a session: its bridge has the gateway's own address.
	for _, g := range []string{gateway4.String() + "/16", gateway6.String() + "/64 nodad"} {
		if got := run("debian", "sudo -n sh -ec 'ip link show docker0 >/dev/null 2>&1 || ip link add docker0 type bridge; ip link set docker0 up; "+
			"ip addr add "+g+" dev docker0'; sleep 1; echo alive"); got != "alive\n" {
			t.Errorf("after a bridge has %s: %q", g, got)
		}
	}
	for _, user := range []string{"debian", "somebody"} { // by IPv4 and IPv6
		if got := run(user, "echo a new session"); got != "a new session\n" {
			t.Errorf("%s: %q", user, got)
		}
	}
	t.Logf("our boot:\n%s", run("debian", "systemd-analyze; systemd-analyze blame | head -25; systemd-analyze critical-chain ssh.service | cat; "+
		"systemd-analyze critical-chain fleetingd-guest.service | cat; sudo journalctl -b -u fleetingd-guest -o short-monotonic --no-pager; "+
		"systemd-analyze --no-pager time; ps -o rss,args -C fleetingd"))
	return who
}

func newKey(t *testing.T) (authorized string, s ssh.Signer) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "key")
	if b, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", out).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	pem, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if s, err = ssh.ParsePrivateKey(pem); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(s.PublicKey()))), s
}
