package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/state"
)

// treeNotes are what a Tree must remember: which folders to remove with the last file in them, which groups with the last member, and who
// is to own what once that can be set.
type treeNotes struct {
	Made   []string          `json:"made,omitempty"`   // folders, in the order they were made
	Owners map[string]string `json:"owners,omitempty"` // "owner:group" by path
	Groups []string          `json:"groups,omitempty"` // made for a member
}

func (t *Tree) readNotes() (*treeNotes, error) {
	n := &treeNotes{}
	return n, readJSON(t.onHost(t.notes), n)
}

func (t *Tree) writeNotes(n *treeNotes) error {
	return writeJSON(t.onHost(t.notes), n, len(n.Made) == 0 && len(n.Owners) == 0 && len(n.Groups) == 0)
}

// readJSON reads the notes of a door. Where there are none, it leaves v as it is.
func readJSON(file string, v any) error {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s is damaged (remove it; what only it knew of will stay on this host): %w", file, err)
	}
	return nil
}

// writeJSON keeps the notes of a door, or removes the file if there is nothing to remember.
func writeJSON(file string, v any, empty bool) error {
	if empty {
		return gone(os.Remove(file))
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return state.WriteFile(file, b, 0o600)
}

// recordOwner remembers the owner of a file; "" forgets it.
func (t *Tree) recordOwner(name, owner string) error {
	n, err := t.readNotes()
	if err != nil || n.Owners[name] == owner {
		return err
	}
	if n.Owners == nil {
		n.Owners = map[string]string{}
	}
	n.Owners[name] = owner
	if owner == "" {
		delete(n.Owners, name)
	}
	return t.writeNotes(n)
}

// accounts are the users and groups of a tree.
type accounts struct {
	uids, gids map[string]int
	userNames  map[int]string
	groupNames map[int]string
}

// user is the name of a uid, or its digits.
func (a *accounts) user(uid int) string { return nameOf(uid, a.userNames) }

// group is the name of a gid, or its digits.
func (a *accounts) group(gid int) string { return nameOf(gid, a.groupNames) }

func nameOf(id int, names map[int]string) string {
	if name, ok := names[id]; ok {
		return name
	}
	return strconv.Itoa(id)
}

// readAccounts reads passwd(5) and group(5) of the tree, and no directory service: what fleetingd owns belongs to users of the system.
func (t *Tree) readAccounts() (*accounts, error) {
	a := &accounts{}
	var err, err1 error
	a.uids, a.userNames, err = readIDs(t.onHost("/etc/passwd"))
	a.gids, a.groupNames, err1 = readIDs(t.onHost("/etc/group"))
	return a, errors.Join(err, err1)
}

// maxAccounts bounds passwd and group, in bytes.
const maxAccounts = 16 << 20

// readIDs reads name and id of each line. Root is always 0, also in a tree that has no such file yet. Where several names have an id, the
// first is its name.
func readIDs(file string) (ids map[string]int, names map[int]string, err error) {
	ids, names = map[string]int{"root": 0}, map[int]string{0: "root"}
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return ids, names, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxAccounts))
	if err != nil {
		return nil, nil, fmt.Errorf("read %s: %w", file, err)
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Split(strings.TrimSuffix(line, "\n"), ":")
		if len(fields) < 3 {
			continue
		}
		id, err := strconv.Atoi(fields[2])
		if err != nil {
			continue
		}
		if _, ok := ids[fields[0]]; !ok {
			ids[fields[0]] = id
		}
		if _, ok := names[id]; !ok {
			names[id] = fields[0]
		}
	}
	return ids, names, nil
}
