package vm

import "golang.org/x/sys/unix"

// landlockABI is the kernel's version of landlock (landlock_create_ruleset(2)); 0 where it is not there or is turned off.
func landlockABI() int {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0
	}
	return int(abi)
}
