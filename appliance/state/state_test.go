package state_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/state"
)

// TestWriteFileIsFlushed looks at the system calls: what a power cut would take, no test can.
func TestWriteFileIsFlushed(t *testing.T) {
	const asked = "FLEETINGD_TEST_WRITE_FILE"
	if path := os.Getenv(asked); path != "" {
		if err := state.WriteFile(path, []byte("new"), 0o640); err != nil {
			t.Fatal(err)
		}
		return
	}
	need.Tools(t, "strace")
	dir := t.TempDir()
	path, trace := filepath.Join(dir, "file"), filepath.Join(dir, "trace")
	if err := os.WriteFile(path, []byte("old, and longer"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("strace", "-f", "-y", "-e", "trace=fsync,rename,renameat,renameat2", "-o", trace,
		os.Args[0], "-test.run=^TestWriteFileIsFlushed$")
	cmd.Env = append(os.Environ(), asked+"="+path)
	if out, err := cmd.CombinedOutput(); err != nil {
		if need.Full() {
			t.Fatalf("FLEETINGD_TEST=full, but strace cannot trace here: %v: %s", err, out)
		}
		t.Skipf("skipped: strace cannot trace here: %v: %s", err, out)
	}
	text, err := os.ReadFile(path)
	st, serr := os.Stat(path)
	if err != nil || serr != nil || string(text) != "new" || st.Mode().Perm() != 0o640 {
		t.Errorf("the file has %q, %v, %v", text, err, serr)
	}
	calls, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	at := regexp.QuoteMeta(dir)
	order := regexp.MustCompile(`(?s)fsync\(\d+<` + at + `/\.file[^>]+>.*rename[^\n]*.*fsync\(\d+<` + at + `>\)`)
	if !order.Match(calls) {
		t.Errorf("not the file's fsync, the rename, the folder's fsync:\n%s", calls)
	}
}
