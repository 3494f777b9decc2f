// Package need states what a test needs of the machine. If it is missing, the
// test is skipped with the reason; with FLEETINGD_TEST=full (make test, CI) it fails
// instead, so that nothing is skipped unnoticed where it should run. Only tests
// import it.
package need

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/fleetingd/fleetingd/appliance/state"
)

// Full reports whether a missing need is a failure.
func Full() bool { return os.Getenv("FLEETINGD_TEST") == "full" }

func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if Full() {
		t.Fatalf("FLEETINGD_TEST=full, but "+format, args...)
	}
	t.Skipf("skipped: "+format+" (make test runs it)", args...)
}

// Root needs uid 0.
func Root(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		missing(t, "this test needs root")
	}
}

// Tools needs each of the programs on PATH.
func Tools(t testing.TB, names ...string) {
	t.Helper()
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			missing(t, "this test needs %s on PATH", n)
		}
	}
}

// Slow needs FLEETINGD_TEST=full: the test takes long, or much of the machine.
func Slow(t testing.TB) {
	t.Helper()
	if !Full() {
		t.Skip("skipped: slow (FLEETINGD_TEST=full runs it, as make test does)")
	}
}

// VM needs root, QEMU and FLEETINGD_TEST=full, and waits until no other test on this
// machine boots VMs: two emulated ones at once only take turns.
func VM(t testing.TB) {
	t.Helper()
	Slow(t)
	Root(t)
	Tools(t, "qemu-system-x86_64", "qemu-img")
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	l, err := state.WaitLock(ctx, filepath.Join(os.TempDir(), "fleetingd-test-vm.lock"))
	if err != nil {
		t.Fatalf("waiting for the other tests that boot VMs: %v", err)
	}
	t.Cleanup(func() { l.Unlock() })
}

// CloudHypervisor needs the real binary, named by CLOUD_HYPERVISOR or on PATH, and
// returns its path. If there is none it always skips, because no package registry has it.
func CloudHypervisor(t testing.TB) string {
	t.Helper()
	if p := os.Getenv("CLOUD_HYPERVISOR"); p != "" {
		return p
	}
	p, err := exec.LookPath("cloud-hypervisor")
	if err != nil {
		t.Skip("skipped: no cloud-hypervisor on PATH and CLOUD_HYPERVISOR is not set; no package registry carries it")
	}
	return p
}

// Cache returns a folder for results that later test runs may reuse, named by their content. It is
// git-ignored and may be emptied at any time.
func Cache(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		up := filepath.Dir(dir)
		if up == dir {
			t.Fatal("no go.mod above the test")
		}
		dir = up
	}
	dir = filepath.Join(dir, ".cache")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}
