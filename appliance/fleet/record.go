package fleet

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"

	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// record is what a plugin has to know of a worker that an earlier one started. It holds no secret.
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
	Ready   bool       `json:"ready"` // jobs may come
}

const (
	recordVersion = 1
	maxRecord     = 64 << 10 // bytes
)

// writeRecord writes a worker's record; sealed is nil until it is ready. The first one must not be there yet, a
// later one replaces it in one step, so that a process that dies here leaves one or the other. It is not
// flushed to the disk: see the package's comment.
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

// removeRecord removes a record, and what a writeRecord that was cut short left of one.
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
		return r, fmt.Errorf("%s: it has version %d, and this fleetingd writes %d", path, r.Version, recordVersion)
	}
	return r, nil
}

// slotOf is the slot of the pool that a record speaks of. Another Plan may have given it away.
func (g *Group) slotOf(r record) (plan.Slot, error) {
	for _, s := range g.plan.PoolSlots(g.pool) {
		if s.Index != r.Slot {
			continue
		}
		if s.TAP != r.TAP || s.Address != r.Address {
			return s, fmt.Errorf("the plan has changed: slot %d was %s (%s) and is %s (%s) now",
				s.Index, r.TAP, r.Address, s.TAP, s.Address)
		}
		return s, nil
	}
	return plan.Slot{Index: -1, TAP: r.TAP, Address: r.Address},
		fmt.Errorf("the plan has changed: slot %d is not one of pool %q any more", r.Slot, g.pool.Name)
}
