package vm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// removeCgroup removes a cgroup that no process is in any more. The kernel takes a
// moment to see that: EBUSY is asked again for a second.
func removeCgroup(path string) error {
	if path == "" {
		return nil
	}
	var err error
	for range 100 {
		err = unix.Rmdir(path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("remove cgroup %s: %w", path, err)
}

// oomKilled reports whether the kernel ended something in the cgroup for want of memory.
func oomKilled(path string) bool {
	if path == "" {
		return false
	}
	data, err := os.ReadFile(filepath.Join(path, "memory.events"))
	if err != nil {
		return false // no memory controller there
	}
	for line := range strings.Lines(string(data)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strings.TrimSpace(n) != "0"
		}
	}
	return false
}
