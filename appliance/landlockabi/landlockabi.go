// Package landlockabi says how far the kernel can confine a process to its files (landlock(7)).
package landlockabi

import (
	"errors"
	"fmt"

	"github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// What landlock covers from which ABI version on (landlock(7), "Versions").
const (
	Files  = 3 // all that a process can do to a file, including truncation: Linux 6.2
	Scopes = 6 // signals and abstract sockets: Linux 6.12
)

// Version returns the kernel's landlock ABI version (landlock_create_ruleset(2)), or 0 if the kernel lacks landlock or has it disabled.
func Version() (int, error) {
	abi, err := syscall.LandlockGetABIVersion()
	switch {
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP):
		return 0, nil
	case err != nil:
		return 0, fmt.Errorf("landlock_create_ruleset: %w", err)
	}
	return abi, nil
}
