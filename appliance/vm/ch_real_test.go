package vm

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/landlockabi"
	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// realCH returns the driver with the real binary on a machine whose KVM may not run guests; it skips the KVM probe.
func realCH(t *testing.T, sandbox bool) *cloudHypervisor {
	t.Helper()
	binary := need.CloudHypervisor(t)
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		t.Skipf("skipped: cloud-hypervisor opens KVM when it starts: %v", err)
	} else {
		f.Close()
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	c := newCloudHypervisor(plan.Hypervisor{Driver: "cloud-hypervisor", Binary: binary, Sandbox: sandbox}, log)
	c.kvm = func() error { return nil }
	return c
}

// shortDir returns a folder whose name leaves room for sockets.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vmt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// Everything up to vm.boot, which needs a KVM that runs guests and is covered by the conformance test.
func TestCloudHypervisorRealAPI(t *testing.T) {
	c := realCH(t, true)
	info, err := c.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	abi, err := landlockabi.Version()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s %s, landlock ABI %d", info.Binary, info.Version, abi)
	dir := shortDir(t)
	disk := filepath.Join(dir, "disk.raw")
	if err := os.WriteFile(disk, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	work := filepath.Join(dir, "v")
	if err := os.Mkdir(work, 0o700); err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		ID: "real", Dir: work, CPUs: 2, Memory: 64 << 20, Kernel: disk, Cmdline: "quiet",
		Console: filepath.Join(work, "console.log"), Limits: Limits{DiskIOPS: 100, NetworkMbps: 10},
		Disks: []Disk{{Path: disk, Serial: "root"}, {Path: disk, ReadOnly: true, Serial: "seed"}},
	}
	binary, err := c.binary()
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	v, err := c.launch(binary, cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Kill()
	conn, err := v.dial(t.Context(), chSocket)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	var ping chPing
	if err := v.api.get(t.Context(), "vmm.ping", &ping); err != nil {
		t.Fatal(err)
	}
	t.Logf("answers after %v: %+v", time.Since(begin).Round(time.Millisecond), ping)
	if got, err := chVersion(ping.BuildVersion); err != nil || "v"+got != info.Version {
		t.Errorf("vmm.ping says %q, --version %s, %v", ping.BuildVersion, info.Version, err)
	}

	var failed *chError
	err = v.api.put(t.Context(), "vm.boot", nil)
	t.Log(err)
	if !errors.As(err, &failed) || failed.Status != 404 || len(failed.Chain) != 3 {
		t.Errorf("vm.boot before vm.create: %v", err)
	}
	if err := v.api.put(t.Context(), "vm.create", chVMConfig(cfg, v.private, abi >= landlockabi.Files)); err != nil {
		t.Fatal(err)
	}
	var info2 struct {
		State  string   `json:"state"`
		Config chConfig `json:"config"`
	}
	if err := v.api.get(t.Context(), "vm.info", &info2); err != nil {
		t.Fatal(err)
	}
	// An unknown field would be ignored: what the VMM returns is what it has understood.
	want, got := chVMConfig(cfg, v.private, abi >= landlockabi.Files), info2.Config
	if got.CPUs != want.CPUs || got.Memory != want.Memory || got.Vsock != want.Vsock || got.Balloon != want.Balloon ||
		got.Console != want.Console || got.Serial != want.Serial || got.Landlock != want.Landlock ||
		got.Payload != want.Payload || len(got.Disks) != 2 || got.Disks[0] != want.Disks[0] || got.Disks[1] != want.Disks[1] ||
		len(got.RateLimitGroups) != 1 || *got.RateLimitGroups[0].Limiter.Ops != *want.RateLimitGroups[0].Limiter.Ops {
		t.Errorf("vm.create understood\n%+v\nnot\n%+v", got, want)
	}
	if info2.State != "Created" {
		t.Errorf("state %s", info2.State)
	}
	status, err := os.ReadFile(filepath.Join("/proc", pidString(v), "status"))
	if err != nil || !strings.Contains(string(status), "NoNewPrivs:\t1") {
		t.Errorf("NoNewPrivs is not set: %v", err)
	}

	// A VM that was never booted has no power button, so SIGTERM ends it.
	if err := v.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	t.Log(v.Exit())
	onlyConsole(t, cfg)
}

func TestCloudHypervisorRealFaults(t *testing.T) {
	c := realCH(t, true)
	dir := shortDir(t)
	kernel := filepath.Join(dir, "kernel")
	if err := os.WriteFile(kernel, []byte("no kernel"), 0o600); err != nil {
		t.Fatal(err)
	}
	newConfig := func(name string) Config {
		work := filepath.Join(dir, name)
		if err := os.Mkdir(work, 0o700); err != nil {
			t.Fatal(err)
		}
		return Config{ID: name, Dir: work, CPUs: 1, Memory: 64 << 20, Kernel: kernel}
	}
	t.Run("no kernel", func(t *testing.T) {
		noLeaks(t, dir)
		cfg := newConfig("nokernel")
		_, err := c.Start(t.Context(), cfg)
		t.Log(err)
		if err == nil || !strings.Contains(err.Error(), "vm.boot: ") || !strings.Contains(err.Error(), "ernel") {
			t.Errorf("a VM whose kernel is none: %v", err)
		}
		onlyConsole(t, cfg)
	})
	t.Run("adopt half started", func(t *testing.T) {
		noLeaks(t, dir)
		cfg := newConfig("half")
		binary, err := c.binary()
		if err != nil {
			t.Fatal(err)
		}
		v, err := c.launch(binary, cfg)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := v.dial(t.Context(), chSocket)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if _, err := c.Adopt(t.Context(), cfg.Dir); !errors.Is(err, ErrNotRunning) {
			t.Errorf("Adopt of a VM whose Start did not end: %v", err)
		}
		wait(t, v)
		onlyConsole(t, cfg)
	})
	t.Run("adopt without a record", func(t *testing.T) {
		noLeaks(t, dir)
		cfg := newConfig("norecord")
		binary, err := c.binary()
		if err != nil {
			t.Fatal(err)
		}
		v, err := c.launch(binary, cfg)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := v.dial(t.Context(), chSocket)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if err := os.Remove(filepath.Join(cfg.Dir, recordFile)); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Adopt(t.Context(), cfg.Dir); !errors.Is(err, ErrNotRunning) {
			t.Errorf("Adopt of a VMM without a record: %v", err)
		}
		wait(t, v)
		onlyConsole(t, cfg)
	})
	t.Run("hung", func(t *testing.T) {
		need.Slow(t)
		noLeaks(t, dir)
		cfg := newConfig("hung")
		binary, err := c.binary()
		if err != nil {
			t.Fatal(err)
		}
		v, err := c.launch(binary, cfg)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := v.dial(t.Context(), chSocket)
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if err := unix.Kill(v.PID(), unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := v.Stop(t.Context()); err != nil {
			t.Error(err)
		}
		t.Logf("after %v: %v", time.Since(begin).Round(time.Millisecond), v.Exit())
		if took := time.Since(begin); took > controlDeadline+termGrace+2*time.Second {
			t.Errorf("Stop of a hung VMM took %v", took)
		}
		onlyConsole(t, cfg)
	})
	t.Run("cancelled", func(t *testing.T) {
		noLeaks(t, dir)
		for _, after := range []time.Duration{1, 5, 20, 40} {
			cfg := newConfig("cancelled" + after.String())
			ctx, cancel := context.WithTimeout(t.Context(), after*time.Millisecond)
			_, err := c.Start(ctx, cfg)
			cancel()
			if err == nil {
				t.Error("started without a kernel")
			}
			onlyConsole(t, cfg)
		}
	})
}

func pidString(v VM) string { return strconv.Itoa(v.PID()) }
