package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Tree is the file system that the doors for files, folders and accounts work on: this host's own, or one below a folder. On its way it
// follows no symbolic link, and it writes to no folder in which somebody else could swap names.
type Tree struct {
	root string // on this host
	// notes is the path within the tree where it remembers the folders that it made, and owners that it could not set.
	notes string
	// owns reports whether owners can be set. If not, they are recorded.
	owns bool
}

// NewTree returns the tree below root; "" and "/" are the host's own. notes is the absolute path, within the tree, of a file of its own.
func NewTree(root, notes string) *Tree {
	if root == "" {
		root = "/"
	}
	return &Tree{root: root, notes: notes, owns: os.Geteuid() == 0}
}

// live reports whether this is the running host's own file system.
func (t *Tree) live() bool { return t.root == "/" }

// onHost is where a path of the tree is on this host.
func (t *Tree) onHost(name string) string { return filepath.Join(t.root, name) }

// folder is an open folder of a tree. Names within it are looked up there, wherever its path leads by now.
type folder struct {
	*os.Root
	path string // in the tree
	tree *Tree
}

// trust is what open demands of the folders on its way.
type trust struct {
	write bool // nobody but root, the caller and owner may change names in them
	owner int  // a uid; root where nobody else is meant
	make  bool // make those that are missing
}

// open goes to a folder, one name at a time. The error is fs.ErrNotExist if it is missing.
func (t *Tree) open(name string, demand trust) (*folder, error) {
	if err := cleanPath(name); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(t.root)
	if err != nil {
		return nil, err
	}
	at := &folder{Root: root, path: "/", tree: t}
	for part := range strings.SplitSeq(strings.Trim(name, "/"), "/") {
		if part == "" {
			break // name is "/"
		}
		next, err := at.enter(part, demand)
		at.Close()
		if err != nil {
			return nil, err
		}
		at = next
	}
	return at, nil
}

// openAbove goes to the folder that holds name.
func (t *Tree) openAbove(name string, demand trust) (*folder, error) {
	if err := cleanPath(name); err != nil {
		return nil, err
	}
	return t.open(filepath.Dir(name), demand)
}

func cleanPath(name string) error {
	if !filepath.IsAbs(name) || filepath.Clean(name) != name {
		return fmt.Errorf("%q is not a clean absolute path", name)
	}
	return nil
}

func (at *folder) enter(part string, demand trust) (*folder, error) {
	where := filepath.Join(at.path, part)
	before, err := at.Lstat(part)
	if errors.Is(err, fs.ErrNotExist) && demand.make {
		if err := at.makeNoted(part); err != nil {
			return nil, err
		}
		before, err = at.Lstat(part)
	}
	if err != nil {
		return nil, err
	}
	if err := mustBeFolder(at, part, before); err != nil {
		return nil, err
	}
	root, err := at.OpenRoot(part)
	if err != nil {
		return nil, err
	}
	next := &folder{Root: root, path: where, tree: at.tree}
	after, err := next.Stat(".")
	switch {
	case err != nil:
	case !os.SameFile(before, after): // OpenRoot follows symbolic links
		err = fmt.Errorf("%s was replaced while it was being opened", where)
	case demand.write:
		err = next.trusted(after, demand.owner)
	}
	if err != nil {
		next.Close()
		return nil, err
	}
	return next, nil
}

func mustBeFolder(at *folder, part string, fi fs.FileInfo) error {
	where := filepath.Join(at.path, part)
	switch {
	case fi.Mode()&fs.ModeSymlink != 0:
		target, err := at.Readlink(part)
		return errors.Join(fmt.Errorf("%s is a symbolic link to %s, and fleetingd follows none on its way; replace it with a folder", where, target), err)
	case !fi.IsDir():
		return fmt.Errorf("%s is not a folder", where)
	}
	return nil
}

// trusted refuses a folder in which somebody else could put another file in the place of one that is being written.
func (at *folder) trusted(fi fs.FileInfo, owner int) error {
	st := stat(fi)
	uid := int(st.Uid)
	if uid != 0 && uid != os.Geteuid() && uid != owner {
		return fmt.Errorf("%s belongs to uid %d, who could swap files in it; chown root %s", at.path, uid, at.path)
	}
	const groupWrites, othersWrite, sticky = 0o020, 0o002, unix.S_ISVTX
	if open := st.Mode&groupWrites != 0 && st.Gid != 0 || st.Mode&othersWrite != 0; open && st.Mode&sticky == 0 {
		return fmt.Errorf("%s is writable by others (mode %04o), who could swap files in it; chmod go-w %s", at.path, st.Mode&0o7777, at.path)
	}
	return nil
}

// stat is what the kernel says of a file; Linux always gives it.
func stat(fi fs.FileInfo) *syscall.Stat_t {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st
	}
	return &syscall.Stat_t{Uid: ^uint32(0), Gid: ^uint32(0)}
}

// makeNoted makes a folder and notes that it is ours, before it exists.
func (at *folder) makeNoted(part string) error {
	where := filepath.Join(at.path, part)
	n, err := at.tree.readNotes()
	if err != nil {
		return err
	}
	if !slices.Contains(n.Made, where) {
		n.Made = append(n.Made, where)
		if err := at.tree.writeNotes(n); err != nil {
			return err
		}
	}
	// Under another name until it has its mode: the umask applies to mkdir, and not to chmod.
	tmp := partOf(part)
	if err := gone(at.Remove(tmp)); err != nil {
		return err
	}
	if err := at.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	made, err := at.OpenRoot(tmp)
	if err != nil {
		return err
	}
	err = errors.Join(made.Chmod(".", 0o755), made.Close())
	if err == nil {
		err = at.Rename(tmp, part)
	}
	return errors.Join(err, at.flush())
}

// flush makes names that were made or removed in the folder survive a power cut.
func (at *folder) flush() error {
	f, err := at.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// removeMade removes a folder and those above it, as far as this tree made them and they are empty.
func (t *Tree) removeMade(name string) error {
	n, err := t.readNotes()
	if err != nil {
		return err
	}
	for ; slices.Contains(n.Made, name); name = filepath.Dir(name) {
		above, err := t.openAbove(name, trust{})
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		} else if err == nil {
			err = above.removeFolder(filepath.Base(name))
			above.Close()
		}
		if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
			return nil // it goes with the last of what is in it
		}
		if err != nil {
			return err
		}
		n.Made = slices.DeleteFunc(n.Made, func(made string) bool { return made == name })
		if err := t.writeNotes(n); err != nil {
			return err
		}
	}
	return nil
}

// removeFolder removes an empty folder, and what a crash left of making it. A missing one is no error.
func (at *folder) removeFolder(part string) error {
	if err := gone(at.Remove(partOf(part))); err != nil {
		return err
	}
	fi, err := at.Lstat(part)
	if err == nil {
		err = mustBeFolder(at, part, fi)
	}
	if err == nil {
		err = errors.Join(at.Remove(part), at.flush())
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// attributes are the mode and the owner of a file or a folder.
type attributes struct {
	mode     uint32 // permission bits with setuid, setgid and sticky
	uid, gid int    // -1: there is no such user or group in a tree that is not live; the owner is recorded
	record   string // "owner:group" as the State has it
}

// parseAttributes reads the keys mode, owner and group of a State.
func (t *Tree) parseAttributes(s State) (attributes, error) {
	mode, err := strconv.ParseUint(s["mode"], 8, 12)
	if err != nil {
		return attributes{}, fmt.Errorf("mode %q is not octal, such as 0644", s["mode"])
	}
	names, err := t.readAccounts()
	if err != nil {
		return attributes{}, err
	}
	a := attributes{mode: uint32(mode), record: s["owner"] + ":" + s["group"]}
	var errUser, errGroup error
	a.uid, errUser = t.number("user", s["owner"], names.uids)
	a.gid, errGroup = t.number("group", s["group"], names.gids)
	return a, errors.Join(errUser, errGroup)
}

// number is the id behind a name, or behind its decimal digits.
func (t *Tree) number(what, name string, ids map[string]int) (int, error) {
	if id, ok := ids[name]; ok {
		return id, nil
	}
	if id, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(id), nil
	}
	if name != "" && !t.live() {
		return -1, nil // systemd-sysusers makes it when that tree boots
	}
	return 0, fmt.Errorf("there is no %s %q on this host", what, name)
}

// set gives an open file or folder its owner and mode. The mode comes last: a change of owner clears setuid.
func (t *Tree) set(f *os.File, name string, a attributes) error {
	known := a.uid >= 0 && a.gid >= 0
	if t.owns && known {
		if err := f.Chown(a.uid, a.gid); err != nil {
			return err
		}
	}
	record := a.record
	if t.owns && known {
		record = ""
	}
	if err := t.recordOwner(name, record); err != nil {
		return err
	}
	return unix.Fchmod(int(f.Fd()), a.mode)
}

// attributesOf is the State of a file or folder but for its content.
func (t *Tree) attributesOf(name string, fi fs.FileInfo, names *accounts, n *treeNotes) State {
	st := stat(fi)
	s := State{"mode": fmt.Sprintf("%04o", st.Mode&0o7777), "owner": names.user(int(st.Uid)), "group": names.group(int(st.Gid))}
	if owner, group, ok := strings.Cut(n.Owners[name], ":"); ok {
		s["owner"], s["group"] = owner, group
	}
	return s
}
