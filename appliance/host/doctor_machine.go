package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/landlockabi"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// machine is all that Doctor sees of the host. Tests replace single functions by a fault.
type machine struct {
	arch     string // GOARCH
	root     bool
	lookPath func(name string) (string, error)
	output   func(ctx context.Context, name string, args ...string) (string, error)
	readFile func(path string) ([]byte, error)
	stat     func(path string) (fs.FileInfo, error)
	account  func(name string) (*account, error)
	openAs   func(a *account, path string) error
	readAs   func(a *account, path string) error
	space    func(dir string) (free int64, err error)
	network  func(*plan.Plan) (*have, error)
	ask      func(f flow, index int) (out int, err error)
	trial    func(plan.Ruleset, []plan.Slot) error
	// dropper says what stops a worker's packets of one family on their way through the host; nil is nothing.
	dropper  func(p *plan.Plan, six bool) (*blockade, error)
	landlock func() (abi int, err error)
	synced   func() (bool, error)
}

// account is a user as the kernel sees one.
type account struct {
	uid, gid int
	groups   []int
}

// passes reports whether the account gets through a folder, by its mode (path_resolution(7)).
func (a *account) passes(dir fs.FileInfo) bool {
	mode := dir.Mode().Perm()
	if st, ok := dir.Sys().(*syscall.Stat_t); ok {
		switch {
		case int(st.Uid) == a.uid:
			return mode&0o100 != 0
		case int(st.Gid) == a.gid || slices.Contains(a.groups, int(st.Gid)):
			return mode&0o010 != 0
		}
	}
	return mode&0o001 != 0
}

func realMachine() machine {
	return machine{
		arch:     runtime.GOARCH,
		root:     os.Geteuid() == 0,
		lookPath: exec.LookPath,
		output:   output,
		readFile: os.ReadFile,
		stat:     os.Stat,
		account:  findAccount,
		openAs:   openAs,
		readAs:   readAs,
		space:    freeSpace,
		network:  linksAndRoutes,
		ask:      ask,
		trial:    trialLoad,
		dropper:  tryPackets,
		landlock: landlockabi.Version,
		synced:   clockSynced,
	}
}

func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return string(out), nil
}

// findAccount returns nil if there is no such user.
func findAccount(name string) (*account, error) {
	u, err := user.Lookup(name)
	var unknown user.UnknownUserError
	if errors.As(err, &unknown) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	ids, err := u.GroupIds()
	if err != nil {
		return nil, err
	}
	a := &account{}
	a.uid, err = strconv.Atoi(u.Uid)
	if err != nil {
		return nil, err
	}
	if a.gid, err = strconv.Atoi(u.Gid); err != nil {
		return nil, err
	}
	for _, id := range ids {
		gid, err := strconv.Atoi(id)
		if err != nil {
			return nil, err
		}
		a.groups = append(a.groups, gid)
	}
	return a, nil
}

// openAs opens a device for reading and writing as somebody else would, by root alone: mode bits do not tell all, there
// are ACLs. A nil account is who we are.
func openAs(a *account, path string) error { return openWith(a, path, unix.O_RDWR) }

// readAs opens a file for reading as somebody else would.
func readAs(a *account, path string) error { return openWith(a, path, unix.O_RDONLY) }

func openWith(a *account, path string, flags int) error {
	result := make(chan error, 1)
	go func() {
		// The kernel's identities are a thread's (credentials(7)); Go's wrappers would change them for all. The thread is
		// never unlocked, so it ends here with what it became.
		runtime.LockOSThread()
		if a != nil {
			if err := become(a); err != nil {
				result <- err
				return
			}
		}
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			result <- &fs.PathError{Op: "open", Path: path, Err: err}
			return
		}
		result <- unix.Close(fd)
	}()
	return <-result
}

// become gives the calling thread another identity.
func become(a *account) error {
	groups := make([]uint32, max(len(a.groups), 1))
	for i, g := range a.groups {
		groups[i] = uint32(g)
	}
	for _, call := range []struct {
		name              string
		nr, one, two, six uintptr
	}{
		{"setgroups", unix.SYS_SETGROUPS, uintptr(len(a.groups)), uintptr(unsafe.Pointer(&groups[0])), 0},
		{"setresgid", unix.SYS_SETRESGID, uintptr(a.gid), uintptr(a.gid), uintptr(a.gid)},
		{"setresuid", unix.SYS_SETRESUID, uintptr(a.uid), uintptr(a.uid), uintptr(a.uid)},
	} {
		if _, _, errno := unix.RawSyscall(call.nr, call.one, call.two, call.six); errno != 0 {
			return fmt.Errorf("%s: %w", call.name, errno)
		}
	}
	runtime.KeepAlive(groups)
	return nil
}

// freeSpace is what an ordinary user may still write, in bytes.
func freeSpace(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// linksAndRoutes is as much of the network as nobody needs root for.
func linksAndRoutes(p *plan.Plan) (*have, error) {
	found := &have{links: map[string]netlink.Link{}, uid: uint32(os.Geteuid())}
	links, err := whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		found.links[l.Attrs().Name] = l
	}
	found.policies, found.routes, err = readRoutes(p)
	return found, err
}

// trialLoad loads the ruleset where it meets no packet: in a network namespace that ends with its thread.
func trialLoad(r plan.Ruleset, slots []plan.Slot) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread is in another namespace and must not be used again
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			result <- fmt.Errorf("make a network namespace to try it in: %w", err)
			return
		}
		result <- loadFirewall(r, slots)
	}()
	return <-result
}

// clockSynced asks the kernel, which every NTP client tells (adjtimex(2)).
func clockSynced() (bool, error) {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return false, fmt.Errorf("adjtimex: %w", err)
	}
	return state != unix.TIME_ERROR && t.Status&unix.STA_UNSYNC == 0, nil
}

// existing is the innermost folder of path that is there.
func (m machine) existing(path string) (string, error) {
	for {
		_, err := m.stat(path)
		if !errors.Is(err, fs.ErrNotExist) || path == "/" {
			return path, err
		}
		path = filepath.Dir(path)
	}
}
