package vm

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strconv"
)

// folderVariable is in the environment of every VMM and holds its Config.Dir. A VMM whose starter was killed before it could write the
// record is found by it: no other moment is early enough to leave a trace.
const folderVariable = "FLEETINGD_VM_DIR"

// findByFolder returns the pid of the VMM that was started in dir, or 0 if none runs. It sees only processes whose environment it may
// read (proc_pid_environ(5)): those of its own user, or all as root.
func findByFolder(dir string) (int, error) {
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return 0, err
	}
	mark := []byte(folderVariable + "=" + dir)
	for _, path := range environs {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // ended meanwhile, or another user's
		}
		if !slices.ContainsFunc(bytes.Split(data, []byte{0}), func(v []byte) bool { return bytes.Equal(v, mark) }) {
			continue
		}
		return strconv.Atoi(filepath.Base(filepath.Dir(path)))
	}
	return 0, nil
}
