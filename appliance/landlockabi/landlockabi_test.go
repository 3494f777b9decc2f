package landlockabi

import (
	"errors"
	"testing"

	"github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// TestVersion asks the kernel for what each version is said to have brought.
func TestVersion(t *testing.T) {
	version, err := Version()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		attr syscall.RulesetAttr
		from int
	}{
		{"files", syscall.RulesetAttr{HandledAccessFS: syscall.AccessFSReadFile}, 1},
		{"truncation", syscall.RulesetAttr{HandledAccessFS: syscall.AccessFSTruncate}, Files},
		{"signals", syscall.RulesetAttr{Scoped: syscall.ScopeSignal}, Scopes},
		{"abstract sockets", syscall.RulesetAttr{Scoped: syscall.ScopeAbstractUnixSocket}, Scopes},
	} {
		fd, err := syscall.LandlockCreateRuleset(&c.attr, 0)
		if err == nil {
			unix.Close(fd)
		} else if version > 0 && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.E2BIG) {
			t.Errorf("%s: %v", c.name, err)
		}
		if can := err == nil; can != (version >= c.from) {
			t.Errorf("%s: ABI %d should support it: %v, but the kernel's answer is: %v", c.name, version, version >= c.from, err)
		}
	}
}
