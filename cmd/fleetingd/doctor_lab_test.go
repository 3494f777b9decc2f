package main

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/hostlab"
	"github.com/fleetingd/fleetingd/appliance/need"
)

const labSpec = `
host "hostlab" {
  egress_interface = "eth0"
  state_dir        = "/srv/private/fleetingd"
  hypervisor "qemu" {
    accel = "kvm"
  }
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
  disk          = "5GiB"
  start         = "cold"
  max_instances = 2
}
`

// TestDoctorCures: on a real host that lacks much, doctor finds all of it, and after running its cures
// unchanged nothing fails.
func TestDoctorCures(t *testing.T) {
	lab := specLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	defer cancel()
	if _, err := lab.Sh(ctx, `
		apt-get update -q
		apt-get purge -y -q qemu-utils xfsprogs
		gpasswd --delete fleetingd kvm
		modprobe -r kvm_amd
		mkdir -m 0700 /srv/private
		sysctl -w net.ipv4.conf.all.arp_ignore=1
	`); err != nil {
		t.Fatal(err)
	}

	report := labDoctor(t, ctx, lab)
	if report.OK {
		t.Error("doctor finds nothing that fails")
	}
	var failed []string
	for _, f := range report.Checks {
		if f.Status == host.StatusFail {
			failed = append(failed, f.Check)
		}
	}
	// The user's right to /dev/kvm is only checked once the device exists.
	want := []string{"kvm", "hypervisor", "arp-ignore", "state-dir", "disks", "qemu-img"}
	if !slices.Equal(failed, want) {
		t.Errorf("what fails is %q, want %q", failed, want)
	}

	for range 2 {
		for _, f := range report.Checks {
			if f.Cure == "" || f.Check == "clock" { // a lab has no time server
				continue
			}
			start := time.Now()
			if _, err := lab.Sh(ctx, f.Cure); err != nil {
				t.Fatalf("the cure of %+v: %v", f, err)
			}
			t.Logf("%s: %s: cured in %s: %s", f.Check, f.Detail, time.Since(start).Round(100*time.Millisecond), f.Cure)
		}
		report = labDoctor(t, ctx, lab)
	}
	if !report.OK {
		t.Error("after its own cures doctor is still not content")
	}
	for _, f := range report.Checks {
		if f.Status != host.StatusOK && f.Check != "clock" {
			t.Errorf("after the cures: %+v", f)
		}
	}
	out, err := lab.Sh(ctx, "fleetingd doctor /root/host.hcl")
	if err != nil {
		t.Error(err)
	}
	t.Logf("doctor in the end:\n%s", out)
}

// specLab is a throw-away host with fleetingd and the labSpec.
func specLab(t *testing.T) *hostlab.Lab {
	t.Helper()
	need.VM(t)
	need.Tools(t, "go", "mmdebstrap", "mke2fs", "ssh", "tar")
	dir := t.TempDir()
	binary, spec := filepath.Join(dir, "fleetingd"), filepath.Join(dir, "host.hcl")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.WriteFile(spec, []byte(labSpec), 0o644); err != nil {
		t.Fatal(err)
	}
	return hostlab.ForTest(t, hostlab.Options{
		Files: map[string]string{"/usr/local/bin/fleetingd": binary, "/root/host.hcl": spec},
	})
}

func labDoctor(t *testing.T, ctx context.Context, lab *hostlab.Lab) doctorReport {
	t.Helper()
	r, err := lab.Run(ctx, "fleetingd", "doctor", "--json", "/root/host.hcl")
	if err != nil {
		t.Fatal(err)
	}
	var report doctorReport
	if err := json.Unmarshal([]byte(r.Stdout), &report); err != nil {
		t.Fatalf("%v\n%s%s", err, r.Stdout, r.Stderr)
	}
	if want := map[bool]int{true: 0, false: 1}[report.OK]; r.ExitCode != want {
		t.Errorf("exit code %d with ok = %t", r.ExitCode, report.OK)
	}
	return report
}
