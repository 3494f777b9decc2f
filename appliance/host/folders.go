package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Folders returns the door to folders. A folder's State has its "mode", "owner" and "group", as a file's. A folder is only removed when it is
// empty. Missing folders above it are made and remembered, as for files.
func (t *Tree) Folders() Door { return folders{t} }

type folders struct{ *Tree }

func (d folders) Read(_ context.Context, names []string) (map[string]State, error) {
	return d.readAll(names, "folder", d.read)
}

func (d folders) read(name string, ids *accounts, notes *treeNotes) (State, error) {
	at, err := d.open(name, trust{})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer at.Close()
	fi, err := at.Stat(".")
	if err != nil {
		return nil, err
	}
	return d.attributesOf(name, fi, ids, notes), nil
}

func (d folders) Write(_ context.Context, name string, want State) error {
	do := d.make
	if want == nil {
		do = func(name string, _ State) error { return d.remove(name) }
	}
	if err := do(name, want); err != nil {
		return fmt.Errorf("folder %s: %w", name, err)
	}
	return nil
}

func (d folders) make(name string, want State) error {
	if err := onlyKeys(want, "mode", "owner", "group"); err != nil {
		return err
	}
	a, err := d.parseAttributes(want)
	if err != nil {
		return err
	}
	above, err := d.openAbove(name, trust{write: true, owner: max(a.uid, 0), make: true})
	if err != nil {
		return err
	}
	defer above.Close()
	// 0700 until it has its owner: a crash in between opens it to nobody.
	if err := above.Mkdir(filepath.Base(name), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	at, err := above.enter(filepath.Base(name), trust{})
	if err != nil {
		return err
	}
	defer at.Close()
	f, err := at.Open(".")
	if err != nil {
		return err
	}
	err = d.set(f, name, a)
	return errors.Join(err, f.Sync(), f.Close(), above.flush())
}

func (d folders) remove(name string) error {
	above, err := d.openAbove(name, trust{})
	if errors.Is(err, fs.ErrNotExist) {
		return d.removeMade(filepath.Dir(name))
	}
	if err != nil {
		return err
	}
	defer above.Close()
	err = above.removeFolder(filepath.Base(name))
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("it is not empty: it holds %s", above.some(filepath.Base(name)))
	}
	if err := errors.Join(err, d.recordOwner(name, "")); err != nil {
		return err
	}
	return d.removeMade(filepath.Dir(name))
}

// some names what a folder holds, for a message.
func (at *folder) some(part string) string {
	const few = 5
	f, err := at.Open(part)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	names, err := f.Readdirnames(few + 1)
	if err != nil {
		return err.Error()
	}
	if len(names) > few {
		names[few] = "…"
	}
	return strings.Join(names, ", ")
}
