package main

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// runtimeUser is who the plugin and the VMMs run as.
type runtimeUser struct {
	UID, GID int
	Groups   []uint32
}

// Where the Plan's user does not exist, run takes a number of the range that
// systemd gives to DynamicUser= (systemd.exec(5)): nobody else's by convention.
const (
	dynamicUIDMin = 61184
	dynamicUIDMax = 65519
)

func findRuntimeUser(p *plan.Plan) (runtimeUser, error) {
	u, err := user.Lookup(p.User)
	var unknown user.UnknownUserError
	if errors.As(err, &unknown) {
		// The same host always gets the same number, so that it finds its caches its own.
		id := dynamicUIDMin + int(crc32.ChecksumIEEE([]byte(p.Paths.State)))%(dynamicUIDMax-dynamicUIDMin+1)
		return runtimeUser{UID: id, GID: id, Groups: kvmGroup()}, nil
	}
	if err != nil {
		return runtimeUser{}, fmt.Errorf("look up user %q: %w", p.User, err)
	}
	uid, err1 := strconv.Atoi(u.Uid)
	gid, err2 := strconv.Atoi(u.Gid)
	if err := errors.Join(err1, err2); err != nil {
		return runtimeUser{}, fmt.Errorf("user %q: %w", p.User, err)
	}
	if uid == 0 {
		return runtimeUser{}, fmt.Errorf("user %q is root: the plugin and the VMs run as an ordinary user", p.User)
	}
	return runtimeUser{UID: uid, GID: gid, Groups: kvmGroup()}, nil
}

// kvmGroup is the group that may open /dev/kvm, where that is one that may be given away.
func kvmGroup() []uint32 {
	st, err := os.Stat("/dev/kvm")
	if err != nil || st.Mode().Perm()&0o060 != 0o060 {
		return nil
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok || sys.Gid == 0 {
		return nil
	}
	return []uint32{sys.Gid}
}

func (u runtimeUser) credential() *syscall.Credential {
	return &syscall.Credential{Uid: uint32(u.UID), Gid: uint32(u.GID), Groups: u.Groups}
}

func (u runtimeUser) options() host.Options { return host.Options{UID: u.UID, GID: u.GID, Trial: true} }

// mkdirs makes a folder and those above it, mode 0755, and returns which it
// made, the outermost first. The innermost, if it was made, belongs to uid and gid.
func mkdirs(dir string, uid, gid int) ([]string, error) {
	var missing []string
	for d := dir; ; d = filepath.Dir(d) {
		_, err := os.Stat(d)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		missing = append([]string{d}, missing...)
	}
	for i, d := range missing {
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return missing[:i], err
		}
		// The umask may have taken the x that the runtime user needs to come through.
		if err := os.Chmod(d, 0o755); err != nil {
			return missing[:i+1], err
		}
	}
	if len(missing) == 0 {
		return nil, nil
	}
	return missing, os.Lchown(dir, uid, gid)
}

// removeEmpty removes folders, the innermost first, as far as they are empty.
func removeEmpty(dirs []string) error {
	for i := len(dirs) - 1; i >= 0; i-- {
		err := os.Remove(dirs[i])
		if errors.Is(err, syscall.ENOTEMPTY) {
			return nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// reachable says which folder on the way to dir keeps the runtime user out.
func reachable(dir string) error {
	for d := dir; ; d = filepath.Dir(d) {
		st, err := os.Stat(d)
		if err != nil {
			return err
		}
		if st.Mode().Perm()&0o001 == 0 {
			return fmt.Errorf("state_dir %s cannot be reached by the unprivileged user that the VMs run as: %s has mode %04o. Try: chmod o+x %s, or another state_dir",
				dir, d, st.Mode().Perm(), d)
		}
		if d == "/" {
			return nil
		}
	}
}

// chownTree gives all below dir, and dir, to the user, to whom most of it belongs already: a folder there may become a link
// at any time. os.Root goes by descriptors, so that nothing outside is given away.
func chownTree(dir string, u runtimeUser) error {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), ".", func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			err = root.Lchown(path, u.UID, u.GID)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
}
