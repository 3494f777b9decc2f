package apply

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// The disk of the state folder is full from some step on, between two records of the journal or within one: the host is as it was, and with
// space again, the apply converges. A limit on the size of files stands for the disk, since it counts in bytes and needs no root.
func TestDiskFull(t *testing.T) {
	if os.Getenv("FLEETINGD_TEST_DISK_FULL") == "" {
		// The limit holds for a whole process, and go test writes files in this one.
		cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestDiskFull$")
		cmd.Env = append(os.Environ(), "FLEETINGD_TEST_DISK_FULL=yes")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	signal.Ignore(unix.SIGXFSZ) // a write fails with EFBIG instead
	m := matrix{before: []*plan.Plan{compiled(t, testSpec)}, plan: compiled(t, changedSpec())}
	h, dir := m.ready(t)
	steps := len(m.look(t, h, dir).Steps)
	for at := range steps {
		for _, room := range []uint64{0, 1, 30, 300} {
			h, dir := m.ready(t)
			before := h.snapshot()
			err := withFullDisk(t, m, h.engine(t, dir), m.look(t, h, dir), at, room)
			if err == nil && at == steps-1 {
				continue // the last records fit
			}
			if !errors.Is(err, unix.EFBIG) {
				t.Fatalf("full in step %d and %d bytes: %v", at, room, err)
			}
			if got, err := h.engine(t, dir).Recover(t.Context()); err != nil || got != Clean {
				t.Fatalf("full in step %d and %d bytes: recover: %v, %v", at, room, got, err)
			}
			if diff := cmp.Diff(before, h.snapshot()); diff != "" {
				t.Fatalf("full in step %d and %d bytes: the host is not as it was (-before +after)\n%s", at, room, diff)
			}
			if err := m.converges(t, h, dir); err != nil {
				t.Fatalf("full in step %d and %d bytes: %v", at, room, err)
			}
		}
	}
}

// withFullDisk does a change. From step at on, the journal can grow by room bytes.
func withFullDisk(t *testing.T, m matrix, e *Engine, c *Change, at int, room uint64) error {
	t.Helper()
	var former unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &former); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &former); err != nil {
			t.Fatal(err)
		}
	}()
	e.Progress = func(_ Step, i, _ int) {
		if i != at {
			return
		}
		fi, err := os.Stat(e.Dir.Path("journal"))
		if err == nil {
			err = unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: uint64(fi.Size()) + room, Max: former.Max}) //nolint:gosec // a size is positive
		}
		if err != nil {
			t.Error(err)
		}
	}
	return m.do(t.Context(), e, c)
}
