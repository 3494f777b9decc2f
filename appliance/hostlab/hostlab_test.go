package hostlab_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fleetingd/fleetingd/appliance/hostlab"
	"github.com/fleetingd/fleetingd/appliance/need"
)

// TestLab boots one host and does everything to it, in this order: a boot is what costs here.
func TestLab(t *testing.T) {
	need.VM(t)
	need.Tools(t, "mmdebstrap", "mke2fs", "ssh", "tar")
	big := filepath.Join(t.TempDir(), "big")
	writeBig(t, big)
	start := time.Now()
	lab := hostlab.ForTest(t, hostlab.Options{Disks: []int64{2 << 30}})
	t.Logf("up in %s", time.Since(start).Round(100*time.Millisecond))

	t.Run("host", func(t *testing.T) { testHost(t, lab) })
	t.Run("commands", func(t *testing.T) { testCommands(t, lab) })
	t.Run("files", func(t *testing.T) { testFiles(t, lab, big) })
	t.Run("disks", func(t *testing.T) { testDisks(t, lab) })
	t.Run("nested guest", func(t *testing.T) { testNestedGuest(t, lab) })
	t.Run("reboot", func(t *testing.T) { testReboot(t, lab) })
	t.Run("power cut", func(t *testing.T) { testPowerCut(t, lab) })
}

// TestMain is also a process that owns a lab and does nothing, to be killed.
func TestMain(m *testing.M) {
	if os.Getenv("HOSTLAB_TEST_OWNER") == "" {
		os.Exit(m.Run())
	}
	lab, err := hostlab.Start(context.Background(), hostlab.Options{Disks: []int64{2 << 30}})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(lab.Dir)
	select {}
}

// TestOwnerKilled: a lab ends with the process that has it, and what that left behind goes with the next.
func TestOwnerKilled(t *testing.T) {
	need.VM(t)
	owner := exec.CommandContext(t.Context(), os.Args[0])
	owner.Env = append(os.Environ(), "HOSTLAB_TEST_OWNER=1")
	owner.Stderr = t.Output()
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	defer owner.Wait()
	defer owner.Process.Kill()
	dir, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the owner did not start a lab: %v", err)
	}
	dir = strings.TrimSpace(dir)
	if users := usersOf(t, dir); len(users) < 2 {
		t.Fatalf("QEMU and ssh should run in %s; there are %q", dir, users)
	}
	owner.Process.Kill()
	deadline, tick := time.After(10*time.Second), time.NewTicker(20*time.Millisecond)
	defer tick.Stop()
	for len(usersOf(t, dir)) > 0 {
		select {
		case <-deadline:
			t.Fatalf("10 s after its owner was killed these still run in %s: %q", dir, usersOf(t, dir))
		case <-tick.C:
		}
	}
	if _, err := os.Stat(dir); err != nil {
		t.Fatalf("the folder of a killed owner: %v", err)
	}
	hostlab.ForTest(t, hostlab.Options{Disks: []int64{2 << 30}})
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the next Start left %s there (%v)", dir, err)
	}
}

// usersOf are the processes that work in a folder.
func usersOf(t *testing.T, dir string) []string {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cwd")
	if err != nil {
		t.Fatal(err)
	}
	var users []string
	for _, link := range all {
		// A process that has just ended has no link, and a zombie none that leads anywhere.
		if cwd, err := os.Readlink(link); err == nil && cwd == dir {
			cmd, _ := os.ReadFile(filepath.Join(filepath.Dir(link), "comm"))
			users = append(users, strings.TrimSpace(string(cmd)))
		}
	}
	return users
}

func sh(t *testing.T, lab *hostlab.Lab, script string) string {
	t.Helper()
	out, err := lab.Sh(t.Context(), script)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// testHost: all that a real host has and that fleetingd uses works here.
func testHost(t *testing.T, lab *hostlab.Lab) {
	for _, c := range []struct{ name, script, want string }{
		{"systemd is up and nothing failed", "systemctl is-system-running --wait || systemctl --failed --no-legend", "running"},
		{"nftables looks addresses up in sets and maps", `
			nft -f - <<-EOF
				table inet lab {
					set macs { type ifname . ether_addr; elements = { "eth0" . 02:00:00:00:00:01 }; }
					map verdicts { type ipv4_addr : verdict; flags interval; elements = { 192.0.2.0/24 : drop }; }
					chain in { type filter hook input priority 0; iifname . ether saddr @macs counter; ip saddr vmap @verdicts; }
				}
				table netdev lab { chain in { type filter hook ingress device "eth0" priority 0; }; }
			EOF
			nft -j list tables | jq -r '.nftables[].table.family // empty' | sort | xargs
			nft flush ruleset`, "inet netdev"},
		{"cgroup v2 with all that limits need", `stat -fc %T /sys/fs/cgroup
			xargs -n1 < /sys/fs/cgroup/cgroup.controllers | grep -xE 'cpu|memory|io|pids' | sort | xargs`, "cgroup2fs\ncpu io memory pids"},
		{"the user may open /dev/kvm and /dev/net/tun", `
			runuser -u fleetingd -- sh -c 'exec 3<>/dev/kvm 4<>/dev/net/tun; id -nG'`, "fleetingd kvm"},
		{"landlock is on", "grep -o landlock /sys/kernel/security/lsm", "landlock"},
		{"eth0 leads out", "ip -o route show default | cut -d' ' -f1-5", "default via 10.0.2.2 dev eth0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := sh(t, lab, c.script); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func testCommands(t *testing.T, lab *hostlab.Lab) {
	for _, c := range []struct {
		name string
		argv []string
		want hostlab.Result
	}{
		{"arguments arrive as they are", []string{"printf", `[%s]`, "a b", `'"$HOME`, "", "*", "x\ny"},
			hostlab.Result{Stdout: "[a b]['\"$HOME][][*][x\ny]"}},
		{"exit code and both outputs", []string{"sh", "-c", "echo out; echo err >&2; exit 7"},
			hostlab.Result{Stdout: "out\n", Stderr: "err\n", ExitCode: 7}},
		{"255 is a program's exit code, too", []string{"sh", "-c", "exit 255"}, hostlab.Result{ExitCode: 255}},
	} {
		got, err := lab.Run(t.Context(), c.argv...)
		if err != nil || got != c.want {
			t.Errorf("%s: got %+v, %v; want %+v", c.name, got, err, c.want)
		}
	}
	_, err := lab.Sh(t.Context(), "echo before; false; echo after")
	if err == nil || !strings.Contains(err.Error(), "exit code 1") || strings.Contains(err.Error(), "\nafter") {
		t.Errorf("Sh of a failing script: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := lab.Run(ctx, "sleep", "60"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a command that outlives its context: %v", err)
	}
	cmd := lab.Cmd("tr", "a-z", "A-Z")
	cmd.Stdin = strings.NewReader("through stdin")
	if out, err := cmd.Output(); err != nil || string(out) != "THROUGH STDIN" {
		t.Errorf("Cmd with an input: %q, %v", out, err)
	}
}

func writeBig(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	rnd, err := os.Open("/dev/urandom")
	if err != nil {
		t.Fatal(err)
	}
	defer rnd.Close()
	if _, err := io.CopyN(f, rnd, 100<<20); err != nil {
		t.Fatal(err)
	}
	// A hole at the end: a disk image's is not to be sent.
	if err := errors.Join(f.Truncate(10<<30), f.Chmod(0o750), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func testFiles(t *testing.T, lab *hostlab.Lab, big string) {
	start := time.Now()
	if err := lab.Copy(t.Context(), big, "/srv/new/big copy"); err != nil {
		t.Fatal(err)
	}
	took := time.Since(start)
	t.Logf("100 MiB of a sparse 10 GiB file copied in %s", took.Round(100*time.Millisecond))
	if took > time.Minute {
		t.Errorf("copying 100 MiB took %s", took)
	}
	got, want := sh(t, lab, `stat -c '%s %a %U' '/srv/new/big copy'; ls -A /srv/new`), "10737418240 750 root\nbig copy"
	if got != want {
		t.Errorf("the copy is %q, want %q", got, want)
	}
	if kib := sh(t, lab, `du -k '/srv/new/big copy' | cut -f1`); len(kib) > 6 {
		t.Errorf("the copy takes %s KiB: its hole was filled", kib)
	}
	got, want = sh(t, lab, `head -c 104857600 '/srv/new/big copy' | sha256sum | cut -d' ' -f1`), digestOf(t, big)
	if got != want {
		t.Errorf("the copy's digest is %s, want %s", got, want)
	}

	tree := t.TempDir()
	os.MkdirAll(filepath.Join(tree, "sub"), 0o755)
	os.WriteFile(filepath.Join(tree, "sub", "run"), []byte("#!/bin/sh\necho ran\n"), 0o755)
	sh(t, lab, "mkdir -m 0711 /srv/tree; touch /srv/tree/kept")
	if err := lab.Copy(t.Context(), tree, "/srv/tree"); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, lab, "/srv/tree/sub/run; ls /srv/tree; stat -c %a /srv/tree"); got != "ran\nkept\nsub\n711" {
		t.Errorf("a folder copied into one that exists gave %q", got)
	}
	back := filepath.Join(t.TempDir(), "back")
	if err := lab.Fetch(t.Context(), "/srv/tree", back); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(back, "sub", "run")); err != nil || !bytes.HasSuffix(b, []byte("echo ran\n")) {
		t.Errorf("fetched %q, %v", b, err)
	}
	err := lab.Fetch(t.Context(), "/srv/none", filepath.Join(t.TempDir(), "x"))
	if err == nil || !strings.Contains(err.Error(), "No such file") {
		t.Errorf("fetching what is not there: %v", err)
	}
	if err := lab.Copy(t.Context(), big, "/proc/nowhere/x"); err == nil {
		t.Error("copying to where nothing can be written is no error")
	}
}

func digestOf(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.CopyN(h, f, 100<<20); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func testDisks(t *testing.T, lab *hostlab.Lab) {
	got := sh(t, lab, `
		mkfs.xfs -q /dev/disk/by-id/virtio-disk1 && mkdir -p /mnt/xfs && mount /dev/vdb /mnt/xfs
		head -c 1048576 /dev/urandom > /mnt/xfs/a && cp --reflink=always /mnt/xfs/a /mnt/xfs/b && cmp /mnt/xfs/a /mnt/xfs/b
		blockdev --getsize64 /dev/vdb; umount /mnt/xfs`)
	if got != "2147483648" {
		t.Errorf("got %q", got)
	}
}

func testReboot(t *testing.T, lab *hostlab.Lab) {
	sh(t, lab, "echo kept > /root/kept; echo gone > /run/gone")
	before := sh(t, lab, "cat /proc/sys/kernel/random/boot_id")
	start := time.Now()
	if err := lab.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("rebooted in %s", time.Since(start).Round(100*time.Millisecond))
	if after := sh(t, lab, "cat /proc/sys/kernel/random/boot_id"); after == before {
		t.Error("the boot id is the same: nothing was rebooted")
	}
	if got := sh(t, lab, "cat /root/kept; test ! -e /run/gone; systemctl is-system-running --wait"); got != "kept\nrunning" {
		t.Errorf("after the reboot: %q", got)
	}
}

func testPowerCut(t *testing.T, lab *hostlab.Lab) {
	sh(t, lab, "echo synced > /root/synced; sync /root/synced /root; echo unsynced > /root/unsynced")
	if err := lab.PowerCut(); err != nil {
		t.Fatal(err)
	}
	if _, err := lab.Run(t.Context(), "true"); !errors.Is(err, hostlab.ErrConnection) {
		t.Errorf("a command on a host that is off: %v", err)
	}
	if err := lab.PowerCut(); err != nil {
		t.Errorf("a second power cut: %v", err)
	}
	if err := lab.Boot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := sh(t, lab, "cat /root/synced; cat /root/unsynced 2>/dev/null || echo lost"); got != "synced\nlost" {
		t.Errorf("after the power cut: %q; an unsynced file younger than the journal's 5 s commit is lost", got)
	}
	if err := lab.Boot(t.Context()); err == nil {
		t.Error("booting a host that is on is no error")
	}
}

// testNestedGuest: KVM is not only there, it runs a kernel, for a user without privilege, under the real hypervisor.
func testNestedGuest(t *testing.T, lab *hostlab.Lab) {
	if err := lab.Copy(t.Context(), need.CloudHypervisor(t), "/usr/local/bin/cloud-hypervisor"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	start := time.Now()
	out, err := lab.Sh(ctx, `
		mkdir -p /srv/guest/bin && cd /srv/guest && cp /bin/busybox bin/
		printf '#!/bin/busybox sh\nbusybox echo init reached, $(busybox id -u)\nbusybox poweroff -f\n' > init && chmod +x init
		find . | cpio --quiet -o -H newc > /srv/guest.cpio
		cp /boot/vmlinuz-* /srv/guest.vmlinuz && chmod a+r /srv/guest.*
		cloud-hypervisor --version
		runuser -u fleetingd -- cloud-hypervisor --kernel /srv/guest.vmlinuz --initramfs /srv/guest.cpio \
			--cmdline 'console=ttyS0 mitigations=off loglevel=4' --memory size=256M --cpus boot=1 \
			--console off --serial tty < /dev/null`)
	if err != nil {
		t.Fatal(err)
	}
	version, said, _ := strings.Cut(out, "\n")
	if !strings.Contains(said, "init reached, 0") {
		t.Fatalf("the guest of %s did not reach its init; it said:\n%s", version, said)
	}
	t.Logf("%s: a nested kernel reached its init and powered off in %s", version, time.Since(start).Round(100*time.Millisecond))
}
