package vm

import (
	"fmt"
	"time"
)

// A guest may reboot; one that does little else is broken. Four times in ten
// minutes is past what any job or update does, and still caught soon under
// emulation, where a boot takes half a minute.
const (
	rebootLimit  = 4
	rebootWindow = 10 * time.Minute
	// rebootOnce is one reboot seen twice: SeaBIOS, started warm, resets the machine again.
	rebootOnce = time.Second
)

// reboots counts a guest's reboots. It is used by one goroutine.
type reboots struct{ at []time.Time }

// add counts one, and returns an error when there were too many. It reports false for what is still the last one.
func (r *reboots) add(now time.Time) (bool, error) {
	if len(r.at) > 0 && now.Sub(r.at[len(r.at)-1]) < rebootOnce {
		return false, nil
	}
	r.at = append(r.at, now)
	for now.Sub(r.at[0]) > rebootWindow {
		r.at = r.at[1:]
	}
	if len(r.at) < rebootLimit {
		return true, nil
	}
	return true, fmt.Errorf("the guest reboots in a loop: %d times within %v (set console = true on the pool to see why)",
		len(r.at), now.Sub(r.at[0]).Round(time.Second))
}
