package apply

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fleetingd/fleetingd/appliance/state"
)

// Recovery says what Recover found.
type Recovery int

const (
	// Clean means that the last apply ended.
	Clean Recovery = iota
	// Undone means that an apply was cut off, or not confirmed in time, and was taken back.
	Undone
	// Finished means that an apply was cut off after its last step, and that what was left to do was done.
	Finished
	// Pending means that a generation waits for its confirmation. Nothing was done.
	Pending
)

// ErrPending is the answer to an apply while a generation waits for its confirmation.
var ErrPending = errors.New("the last apply waits for its confirmation: `fleetingd confirm` keeps it, `fleetingd rollback` takes it back")

// Recover ends what an earlier apply left: it finishes one that was committed, and takes back one that was cut off, or whose time for a
// confirmation is over. The caller holds the lock.
func (e *Engine) Recover(ctx context.Context) (Recovery, error) {
	j, err := e.Dir.Resume()
	if err != nil || j == nil {
		return Clean, err
	}
	boot, err := state.BootID()
	if err != nil {
		return Clean, err
	}
	switch {
	case j.Committed:
		return Finished, e.commit(j)
	case inTime(j.Waiting, boot, time.Now()):
		return Pending, j.Close()
	}
	if err := e.undo(ctx, j); err != nil {
		return Undone, fmt.Errorf("an earlier apply was cut off, and not all of it could be undone: %w", errors.Join(err, j.Close()))
	}
	return Undone, nil
}

// inTime reports whether a generation may still be confirmed.
func inTime(w *state.Waiting, boot string, now time.Time) bool {
	return w != nil && w.Boot == boot && now.Before(w.Deadline)
}

// Confirm makes the generation that waits for it final.
func (e *Engine) Confirm() (int, error) {
	j, err := e.Dir.Resume()
	switch {
	case err != nil:
		return 0, err
	case j == nil:
		return 0, errors.New("nothing waits for a confirmation")
	case j.Committed:
		return j.Head.Generation, e.commit(j)
	}
	boot, err := state.BootID()
	if err != nil {
		return 0, err
	}
	if !inTime(j.Waiting, boot, time.Now()) {
		return 0, errors.Join(errors.New("the time for a confirmation is over; `fleetingd rollback --unconfirmed` takes the apply back, if that has not been done"), j.Close())
	}
	if err := j.Commit(); err != nil {
		return 0, errors.Join(err, j.Close())
	}
	return j.Head.Generation, e.commit(j)
}

// Revert takes back a generation that waits for its confirmation, without waiting for the deadline.
func (e *Engine) Revert(ctx context.Context) error {
	j, err := e.Dir.Resume()
	if err != nil || j == nil {
		return err
	}
	if j.Committed {
		return e.commit(j)
	}
	if err := e.undo(ctx, j); err != nil {
		return errors.Join(err, j.Close())
	}
	return nil
}
