package image

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fleetingd/fleetingd/appliance/guest"
	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
	"github.com/fleetingd/fleetingd/seed"
)

// From packages to a sealed image in a real VM, with the real guest part.
func TestDebianVM(t *testing.T) {
	need.VM(t)
	need.Tools(t, "mmdebstrap", "mke2fs", "ip", "go")
	dir := xfs(t, 8<<10)
	p := debianPlan(t, dir)
	img := &p.Images[0]
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	driver, err := vm.Open(p.Hypervisor, log)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	opts := Options{Log: log, Driver: driver, GuestBinary: guestBinary(t), Progress: func(e Progress) {
		if e.Phase == PhasePrebuild && e.Line != "" {
			lines = append(lines, e.Line)
		}
	}}
	s, err := Open(p, opts)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewBuilder(p, Options{Log: log}).Build(t.Context(), img, false); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	sealed, err := s.Ensure(t.Context(), img)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("sealed after %v", time.Since(began).Round(time.Second))
	if text := strings.Join(lines, "\n"); !strings.Contains(text, "run[0]: size: ") || sealed.Cached || !sealed.Guest {
		t.Errorf("%+v, output:\n%s", sealed, text)
	}
	if runtime.GOARCH == "amd64" {
		if kernel, err := os.ReadFile(sealed.Kernel); err != nil || checkPVH(kernel) != nil {
			t.Errorf("the sealed image's kernel is not unpacked: %v, %v", err, checkPVH(kernel))
		}
	}
	// The step saw the grown disk, and its file is in the image.
	out, err := exec.Command("debugfs", "-R", "cat /srv/size", sealed.Disk).Output()
	if err != nil || strings.TrimSpace(string(out)) != "4" {
		t.Errorf("/srv/size in the sealed disk is %q, %v; want 4 (GiB)", out, err)
	}
	if keys, err := exec.Command("debugfs", "-R", "ls -p /etc/ssh", sealed.Disk).Output(); err != nil || strings.Contains(string(keys), "ssh_host_") {
		t.Errorf("the sealed disk holds the prebuild VM's host keys: %s, %v", keys, err)
	}

	again, err := s.Ensure(t.Context(), img)
	if err != nil || !again.Cached || again.Digest != sealed.Digest {
		t.Errorf("the second time: %+v, %v", again, err)
	}
	wantOnly(t, p.Paths.Run)

	bootWorker(t, s, driver, sealed)

	img.Prebuild.Steps = []plan.Step{{Name: "run[0]: fail", Command: "echo on my way; exit 3"}}
	_, err = s.Ensure(t.Context(), img)
	step, ok := errors.AsType[*guest.StepError](err)
	if !ok || step.Code != 3 || !slices.Contains(step.Tail, "on my way") {
		t.Errorf("a step that fails gives %v", err)
	} else {
		t.Logf("the failed step's lines: %q", step.Tail)
	}
	wantOnly(t, p.Paths.Run)
	wantOnly(t, filepath.Join(p.Paths.Images, kindSealed), sealed.Digest)
}

// bootWorker boots a clone on a larger disk. The worker becomes ready, and its file system has grown.
func bootWorker(t *testing.T, s *Store, driver vm.Driver, sealed *Sealed) {
	t.Helper()
	p := s.plan
	dir := filepath.Join(p.Paths.Run, "worker")
	disk, iso := filepath.Join(p.Paths.Disks, "worker.raw"), filepath.Join(p.Paths.Disks, "worker.iso")
	prebuild := p.Images[0].Prebuild.Seed
	worker := seed.Seed{InstanceID: "worker-1", Hostname: "worker-1", Users: prebuild.Users, Network: prebuild.Network}
	if err := errors.Join(os.Mkdir(dir, 0o700), s.Clone(t.Context(), sealed, disk, 6<<30), worker.ISOFile(iso, 0o600)); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	v, err := driver.Start(t.Context(), vm.Config{
		ID: "worker", Dir: dir, CPUs: 2, Memory: 1 << 30,
		Kernel: sealed.Kernel, Initrd: sealed.Initrd, Cmdline: sealed.Cmdline,
		Disks: []vm.Disk{{Path: disk}, {Path: iso, ReadOnly: true}},
		Net:   &vm.Net{TAP: p.Slots[0].TAP, MAC: p.Network.GuestMAC, Queues: 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	session := guest.NewSession(v.Channel, guest.Options{})
	ready, err := session.WaitReady(t.Context())
	session.Close()
	took := time.Since(began)
	if err := errors.Join(err, v.Stop(t.Context()), os.RemoveAll(dir)); err != nil {
		t.Fatal(err)
	}
	t.Logf("a worker was ready after %v: %+v; stopped after %v", took.Round(time.Second), ready, time.Since(began)-took)
	f, err := os.Open(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sb := make([]byte, 8) // s_blocks_count_lo of the superblock at 1024
	if _, err := f.ReadAt(sb, 1024); err != nil {
		t.Fatal(err)
	}
	if blocks := binary.LittleEndian.Uint32(sb[4:]); blocks != 6<<30/4096 {
		t.Errorf("the worker's file system has %d blocks on a disk of %d", blocks, 6<<30/4096)
	}
}

// debianPlan is a host with one image from packages. The base is kept in the tests' cache.
func debianPlan(t *testing.T, dir string) *plan.Plan {
	t.Helper()
	run, err := os.MkdirTemp("", "img")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	address, gateway := netip.MustParseAddr("172.31.255.2"), netip.MustParseAddr("172.31.255.1")
	const mac = "02:fd:00:00:00:02"
	return &plan.Plan{
		Hypervisor: plan.Hypervisor{Driver: "qemu", Binary: "qemu-system-x86_64", Accel: "tcg"},
		Paths: plan.Paths{State: filepath.Join(need.Cache(t), "state"), Disks: dir, Images: filepath.Join(dir, "images"),
			Cache: filepath.Join(dir, "cache"), Run: run},
		Network: plan.Network{GuestMAC: mac},
		Slots:   []plan.Slot{{TAP: newTAP(t), Queues: 1}},
		Pools:   []plan.Pool{{Name: "p", Image: "debian", CPUs: 2, Memory: 1 << 30, Disk: 4 << 30}},
		Images: []plan.Image{{
			Name: "debian", User: "ci",
			Source: plan.Source{Debian: &plan.DebianSource{Suite: "trixie", Arch: runtime.GOARCH, Packages: []string{}}},
			Prebuild: &plan.Prebuild{
				Timeout: plan.Duration(10 * time.Minute),
				Steps:   []plan.Step{{Name: "run[0]: size", Command: "df --output=size -BG / | tail -1 | tr -dc 0-9 >/srv/size; cat /srv/size"}},
				Seed: seed.Seed{
					InstanceID: "prebuild-debian", Hostname: "prebuild", Users: []seed.User{{Name: "ci"}},
					Network: &seed.Network{MAC: mac, Addresses: []netip.Addr{address}, Gateways: []netip.Addr{gateway}, MTU: 1500},
					RunCmd: [][]string{ // as the compiler writes it
						{"mkdir", "-p", "/run/fleetingd-seed", "/usr/lib/fleetingd"},
						{"mount", "-o", "ro", "LABEL=" + seed.Label, "/run/fleetingd-seed"},
						{"install", "-m", "0755", "/run/fleetingd-seed/fleetingd", "/usr/lib/fleetingd/fleetingd"},
						{"umount", "/run/fleetingd-seed"},
						{"systemd-run", "--unit=fleetingd-prebuild", "--no-block", "/usr/lib/fleetingd/fleetingd", "guest", "--prebuild"},
					},
				},
			},
		}},
	}
}

func newTAP(t *testing.T) string {
	t.Helper()
	const name = "fdimgtest0"
	if out, err := exec.Command("ip", "tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr").CombinedOutput(); err != nil {
		t.Fatalf("make a TAP: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("ip", "link", "del", name).CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	return name
}

// guestBinary builds a static fleetingd from this tree.
func guestBinary(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fleetingd")
	cmd := exec.Command("go", "build", "-o", path, "github.com/fleetingd/fleetingd/cmd/fleetingd")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return path
}
