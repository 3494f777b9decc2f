package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/need"
)

// buildFor builds the program into a folder that every user may read.
func buildFor(t *testing.T, dir string) {
	t.Helper()
	for _, d := range []string{dir, filepath.Dir(dir)} { // the testing package makes them for root alone
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "fleetingd"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// TestSweepIsNotRoots: what is left of the workers of a killed run is removed, and not by root, who would start whatever
// program the runtime user has written into its copy of the plan. A program that says who started it stands in for QEMU.
func TestSweepIsNotRoots(t *testing.T) {
	need.Root(t)
	need.Tools(t, "unshare", "mkfs.xfs", "nft", "ip")
	dir := t.TempDir()
	buildFor(t, dir)
	spec := strings.Replace(strings.Replace(strings.Replace(testSpec, "%q", `"/srv/state"`, 1),
		`hypervisor "qemu" {`, `hypervisor "qemu" {`+"\n    binary = \"/srv/qemu\"", 1),
		`  debian {
    suite = "trixie"
  }`, `  file {
    disk   = "/srv/absent.raw"
    kernel = "/srv/absent"
  }`, 1)
	const story = `
		mount -t tmpfs -o mode=0755 tmpfs /run
		mount -t tmpfs -o mode=0755 tmpfs /srv
		ip link set lo up
		ip link add eth0 type veth peer name peer0
		ip link set eth0 up
		mkdir -p -m 0777 /srv/said
		printf '#!/bin/sh\nid -u >>/srv/said/by\nchmod 0666 /srv/said/by\necho QEMU emulator version 10.0.2\n' >/srv/qemu
		chmod 0755 /srv/qemu
		# What run 0 leaves when it is killed.
		mkdir -p /run/fleetingd-run
		./fleetingd compile -o - host.hcl | sed 's/"name": "small"/"name": "small-run0"/' >/run/fleetingd-run/0.plan.json
		echo '{"number":0,"pool":"small","own":"small-run0","first":0,"slots":1}' >/run/fleetingd-run/0.json
		record=/srv/state/workers/small-run0/small-run0-0123456789abcdef.json
		mkdir -p ${record%/*}
		echo broken >$record
		mkdir -p /run/fleetingd/prebuild-fleet3 /srv/state/disks /srv/state/cache
		chown -R 61234:61234 /run/fleetingd /srv/state/disks /srv/state/cache /srv/state/workers # the uid that run takes for /srv/state
		./fleetingd run host.hcl -- true
		ls -d $record /run/fleetingd/prebuild-fleet3
		cat /srv/said/by`
	if err := os.WriteFile(filepath.Join(dir, "host.hcl"), []byte(spec), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--net", "--mount", "sh", "-c", story)
	cmd.Dir = dir
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || !strings.Contains(stderr.String(), "absent.raw") {
		t.Fatalf("%v: %s", err, &stderr)
	}
	if strings.Contains(string(out), "0123456789abcdef.json") || strings.Contains(string(out), "prebuild") {
		t.Errorf("still there: %s%s", out, &stderr)
	}
	for uid := range strings.Lines(string(out)) {
		if strings.TrimSpace(uid) == "0" {
			t.Errorf("root started the plan's program: %q", out)
		}
	}
}
