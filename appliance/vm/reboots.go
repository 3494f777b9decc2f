package vm

import (
	"fmt"
	"time"
)

// A guest may reboot, but one that keeps rebooting is broken. Four reboots in ten
// minutes are more than any job or update needs, and few enough to notice soon under
// emulation, where a boot takes half a minute.
const (
	rebootLimit  = 4
	rebootWindow = 10 * time.Minute
	// rebootOnce merges what is one reboot: SeaBIOS resets the machine again after a warm start.
	rebootOnce = time.Second
)

// reboots counts a guest's reboots. It is used by one goroutine.
type reboots struct{ at []time.Time }

// add counts a reboot, and returns an error if there were too many. It returns false if the reboot is a part of the previous one.
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
