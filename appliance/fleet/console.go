package fleet

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/appliance/visible"
)

// maxConsole bytes of each worker's console are kept, and maxConsoles consoles of each pool.
const (
	maxConsole  = 1 << 20
	maxConsoles = 50
	tailBytes   = 2 << 10 // shown in the log when a worker fails
)

func (g *Group) consolePath(id string) string { return filepath.Join(g.cloneDir(id), "console.log") }

// keepConsole saves the end of a worker's console as Paths.Workers/POOL/console/ID.log before the clone is removed.
func (g *Group) keepConsole(id string) error {
	if !g.pool.Console {
		return nil
	}
	tail, err := state.Tail(g.consolePath(id), maxConsole)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	dir := filepath.Join(filepath.Dir(g.recordPath(id)), "console")
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, id+".log"), tail, 0o640); err != nil {
		return err
	}
	entries, err := os.ReadDir(dir) // sorted by name, which is by age
	if err != nil {
		return err
	}
	for _, e := range entries[:max(0, len(entries)-maxConsoles)] {
		// Another worker's teardown may have removed it.
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// consoleTail returns the end of a worker's console for the log, escaped because the guest wrote it, or nil if there
// is none.
func (g *Group) consoleTail(id string) []string {
	if !g.pool.Console {
		return nil
	}
	b, err := state.Tail(g.consolePath(id), tailBytes)
	if err != nil {
		return nil
	}
	return visible.LastLines(string(b), 10)
}
