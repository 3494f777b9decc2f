package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

func TestFreeSlots(t *testing.T) {
	pool := &plan.Pool{FirstSlot: 4, MaxInstances: 4}
	for _, c := range []struct {
		name  string
		n     int
		used  []int
		first int // -1: none
	}{
		{"all are free", 2, nil, 4},
		{"the first is taken", 2, []int{4}, 5},
		{"a gap that is too small", 2, []int{5}, 6},
		{"slots of other pools do not count", 4, []int{3, 8}, 4},
		{"no gap is large enough", 2, []int{5, 7}, -1},
		{"all are taken", 1, []int{4, 5, 6, 7}, -1},
	} {
		used := map[int]bool{}
		for _, s := range c.used {
			used[s] = true
		}
		first, ok := freeSlots(pool, c.n, used)
		if !ok {
			first = -1
		}
		if first != c.first {
			t.Errorf("%s: %d, want %d", c.name, first, c.first)
		}
	}
}

func TestOwnPool(t *testing.T) {
	p := &plan.Plan{Pools: []plan.Pool{{Name: "small"}, {Name: "small-run1"}}}
	for number, want := range []string{"small-run0", "small-run1x", "small-run2"} {
		if got := ownPool(p, "small", number); got != want {
			t.Errorf("run %d: %q, want %q", number, got, want)
		}
	}
	if got := ownPool(p, strings.Repeat("x", 32), 10); len(got) != 32 || !strings.HasSuffix(got, "-run10") {
		t.Errorf("a long name: %q", got)
	}
}

// guestSpec is a spec whose VMs never answer, so that workers are being made for as long as a test likes.
var guestSpec = strings.Replace(strings.Replace(strings.Replace(testSpec, "%q", `"/srv/state"`, 1),
	`hypervisor "qemu" {`, `hypervisor "qemu" {`+"\n    binary = \"/srv/qemu\"\n    sandbox = false", 1),
	`  debian {
    suite = "trixie"
  }
  prebuild {
    run = ["echo prebuilt > /etc/fleetingd-test"]
  }`, `  file {
    disk    = "/srv/disk.raw"
    kernel  = "/srv/kernel"
    cmdline = "root=/dev/vda"
  }`, 1) + `
pool "other" {
  image         = image.debian
  cpus          = 1
  memory        = "1GiB"
  disk          = "4GiB"
  start         = "cold"
  max_instances = 1
}
`

// guestStage is a host in namespaces whose /dev/net/tun is closed to everybody, with what guestSpec needs and shell functions for its
// stories. A program that says how it was called, and sleeps, stands in for QEMU.
const guestStage = `
		mount -t tmpfs -o mode=0755 tmpfs /run
		mount -t tmpfs -o mode=0755 tmpfs /srv
		mount -t tmpfs -o mode=0755 tmpfs /dev/net
		mknod -m 0600 /dev/net/tun c 10 200
		ip link set lo up
		ip link add eth0 type veth peer name peer0
		ip link set eth0 up
		truncate -s 16M /srv/disk.raw
		echo kernel >/srv/kernel
		printf '#!/bin/sh\ncase "$*" in *version*) echo QEMU emulator version 10.0.2; exit;; esac\necho "$*" >>/srv/said\nexec sleep 1000\n' >/srv/qemu
		chmod 0755 /srv/qemu
		: >/srv/said
		chmod 0666 /srv/said
		look() {
			stat -c '%n %a %u' /dev/net/tun
			cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/eth0/forwarding
			nft list ruleset
			ip -br link | awk '{ print $1, $3 }' | grep -v -e ^lo -e eth0 -e peer0
			ls -A /dev/net /run/fleetingd 2>&1
			grep /srv/state /proc/mounts
			find /srv/state/workers /srv/state/disks/clones -mindepth 1 2>/dev/null
			! ls /run/fleetingd-run 2>/dev/null | grep json
		}
		# until_ TRIES CONDITION…
		until_() { n=$1; shift; while ! "$@"; do n=$((n-1)); [ $n -gt 0 ] || { echo "gave up: $*"; cat *.err; exit 1; }; sleep 0.1; done; }
		vms() { [ "$(grep -c fleet /srv/said)" -ge $1 ]; }
`

// tell plays a story on the stage, and returns what it says and its folder, where it runs.
func tell(t *testing.T, story string) (said, dir string) {
	t.Helper()
	need.Root(t)
	need.Tools(t, "unshare", "mkfs.xfs", "nft", "ip", "qemu-img")
	t.Parallel()
	dir = t.TempDir()
	buildFor(t, dir)
	if err := os.WriteFile(filepath.Join(dir, "host.hcl"), []byte(guestSpec), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--net", "--mount", "sh", "-c", guestStage+story)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return string(out), dir
}

func readFile(t *testing.T, path ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestRunIsAGuest has two runs at once: neither changes /dev/net/tun or the host's forwarding, nor gets into the other's way, and when both
// have ended the host is as it was.
func TestRunIsAGuest(t *testing.T) {
	said, dir := tell(t, `
		look >before
		./fleetingd run --pool small host.hcl -- true 2>a.err &
		a=$!
		until_ 600 vms 1
		./fleetingd run --pool small host.hcl -- true 2>b.err &
		b=$!
		until_ 600 vms 2
		stat -c '%a %u' /dev/net/tun
		cat /proc/sys/net/ipv4/ip_forward
		ls /dev/net | sed 's/-[0-9]*$/-PID/'
		kill -INT $a
		wait $a
		echo "the first ended with $?"
		ip link show fleet1 >/dev/null && kill -0 $b && echo "the second goes on"
		kill -INT $b
		wait $b
		echo "the second ended with $?"
		look >after
		ls /run/fleetingd-run`)
	want := `600 0
0
tun
tun-fleetingd-run0-PID
tun-fleetingd-run1-PID
the first ended with 130
the second goes on
the second ended with 130
0.lock
1.lock
session.lock
setup.lock
`
	if diff := cmp.Diff(want, said); diff != "" {
		t.Errorf("the story went another way (-want +got):\n%s\nthe first run:\n%s\nthe second:\n%s", diff, readFile(t, dir, "a.err"),
			readFile(t, dir, "b.err"))
	}
	if diff := cmp.Diff(readFile(t, dir, "before"), readFile(t, dir, "after")); diff != "" {
		t.Errorf("left behind:\n%s", diff)
	}
}

// TestRunIsKilled: the run after one that was killed, with all its processes, removes what that left. What is left of a run that was
// killed beside another goes with the next, too.
func TestRunIsKilled(t *testing.T) {
	said, dir := tell(t, `
		look >before
		setsid ./fleetingd run --pool small host.hcl -- true 2>a.err &
		a=$!
		until_ 600 vms 1
		pkill -KILL -s $a
		wait $a 2>/dev/null
		ls /run/fleetingd-run | grep json
		./fleetingd run --pool other host.hcl -- true 2>b.err &
		b=$!
		until_ 600 vms 2
		ls /run/fleetingd-run | grep json
		kill -INT $b
		wait $b
		echo "ended with $?"
		look >after`)
	want := `0.json
0.plan.json
session.json
session.plan.json
0.json
0.plan.json
session.json
session.plan.json
ended with 130
`
	if diff := cmp.Diff(want, said); diff != "" {
		t.Errorf("the story went another way (-want +got):\n%s\nthe first run:\n%s\nthe second:\n%s", diff, readFile(t, dir, "a.err"),
			readFile(t, dir, "b.err"))
	}
	if diff := cmp.Diff(readFile(t, dir, "before"), readFile(t, dir, "after")); diff != "" {
		t.Errorf("left behind:\n%s", diff)
	}
}

// TestRunBesideAPlugin: on a host whose network is up for good and whose plugin serves a pool, a run takes no slot of that pool, uses
// another one, and leaves network and lock as they were.
func TestRunBesideAPlugin(t *testing.T) {
	said, dir := tell(t, `
		(cat /etc/passwd; echo fleetingd:x:61999:61999::/:/bin/false) >passwd
		(cat /etc/group; echo fleetingd:x:61999:) >group
		mount --bind passwd /etc/passwd
		mount --bind group /etc/group
		./fleetingd compile -o - host.hcl >plan.json
		./fleetingd network up --plan plan.json 2>/dev/null
		install -d -o 61999 -g 61999 /run/fleetingd
		touch /run/fleetingd/small.lock /run/fleetingd/other.lock
		chown 61999 /run/fleetingd/*.lock
		(flock 9; exec sleep 1000) 9</run/fleetingd/small.lock &
		plugin=$!
		until_ 100 sh -c '! flock --nonblock /run/fleetingd/small.lock true'
		look >before
		./fleetingd run --pool small host.hcl -- true
		echo "pool small: $?"
		./fleetingd run --pool other host.hcl -- true 2>b.err &
		b=$!
		until_ 600 vms 1
		kill -INT $b
		wait $b
		echo "pool other: $?"
		./fleetingd network check --plan plan.json 2>/dev/null | grep -v route && echo "the network differs"
		look >after
		kill $plugin`)
	want := `fleetingd: pool "small" is served by GitLab Runner on this host: ` + "`fleetingd run`" + ` does not take its slots; choose another pool (--pool)
pool small: 1
pool other: 130
`
	if diff := cmp.Diff(want, said); diff != "" {
		t.Errorf("the story went another way (-want +got):\n%s\nthe run:\n%s", diff, readFile(t, dir, "b.err"))
	}
	if diff := cmp.Diff(readFile(t, dir, "before"), readFile(t, dir, "after")); diff != "" {
		t.Errorf("the host is not as it was:\n%s", diff)
	}
}
