package fleet

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// record tells a plugin about a worker that an earlier one started. It holds no secret.
type record struct {
	Version int        `json:"version"`
	ID      string     `json:"id"`
	Pool    string     `json:"pool"`
	Slot    int        `json:"slot"`
	TAP     string     `json:"tap"`
	Address netip.Addr `json:"address"`
	User    string     `json:"user"`
	Driver  string     `json:"driver"`
	Image   string     `json:"image,omitempty"` // the sealed image's digest
	Created time.Time  `json:"created"`
	Ready   bool       `json:"ready"` // the worker accepts jobs
}

const (
	recordVersion = 1
	maxRecord     = 64 << 10 // bytes
)

// writeRecord writes a worker's record; sealed is nil until the worker is ready. The first record must not exist yet; the
// second replaces it atomically, so that a crash leaves one or the other. Records are not flushed to
// disk: see the package's comment.
func (g *Group) writeRecord(w *worker, sealed *image.Sealed) error {
	r := record{
		Version: recordVersion, ID: w.id, Pool: g.pool.Name,
		Slot: w.slot.Index, TAP: w.slot.TAP, Address: w.slot.Address,
		User: g.image.User, Driver: w.driver.Name(), Created: w.created.UTC(),
	}
	path := g.recordPath(w.id)
	name := path
	if sealed != nil {
		r.Image, r.Ready = sealed.Digest, true
		name = path + ".new"
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(append(data, '\n'))
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if name == path {
		return nil
	}
	if err := os.Rename(name, path); err != nil {
		return err
	}
	return nil
}

// removeRecord removes a record, and the temporary file of an interrupted writeRecord.
func (g *Group) removeRecord(id string) error {
	for _, path := range []string{g.recordPath(id) + ".new", g.recordPath(id)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

func readRecord(path string) (record, error) {
	var r record
	f, err := os.Open(path)
	if err != nil {
		return r, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(data, &r); err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	if r.Version != recordVersion {
		return r, fmt.Errorf("%s: it has version %d, but this fleetingd writes version %d", path, r.Version, recordVersion)
	}
	return r, nil
}

// slotOf returns the slot that a worker holds by its record. If the pool no longer has that slot, its index is -1; if the slot was given
// another TAP or address, the worker keeps its own, and the slot is free once it ends.
func (g *Group) slotOf(r record) plan.Slot {
	held := plan.Slot{Index: -1, TAP: r.TAP, Address: r.Address}
	for _, s := range g.plan.PoolSlots(g.pool) {
		switch {
		case s.Index != r.Slot && s.TAP != r.TAP:
			continue
		case s.Index == r.Slot && s.TAP == r.TAP && s.Address == r.Address:
			return s
		}
		held.Index = s.Index
	}
	return held
}

// Count returns how many workers of a pool accept jobs, and how many are being made, as their records say.
func Count(p *plan.Plan, pool string) (running, starting int, err error) {
	entries, err := os.ReadDir(filepath.Join(p.Paths.Workers, pool))
	if errors.Is(err, os.ErrNotExist) {
		return 0, 0, nil // it never had one
	}
	if err != nil {
		return 0, 0, err
	}
	for _, e := range entries {
		// The folder belongs to the plan's user, so what is in it may lead anywhere.
		if !strings.HasSuffix(e.Name(), ".json") || !e.Type().IsRegular() {
			continue
		}
		r, err := readRecord(filepath.Join(p.Paths.Workers, pool, e.Name()))
		switch {
		case errors.Is(err, os.ErrNotExist): // it ended meanwhile
		case err != nil:
			return 0, 0, err
		case r.Ready:
			running++
		default:
			starting++
		}
	}
	return running, starting, nil
}
