package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
)

// replaceTree writes a tree below dir, whole or not at all: it is made beside dir, and takes dir's place in one step. A
// dir that holds anything but an earlier tree is left alone, with an error.
func replaceTree(dir string, tree []plan.TreeFile) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	exists, err := replaceable(dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "."+filepath.Base(dir)+".new-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp) // after the exchange: what was there before
	if err := writeTree(tmp, tree); err != nil {
		return err
	}
	if !exists {
		return os.Rename(tmp, dir)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("put the new tree in the place of %s: %w", dir, err)
	}
	return nil
}

// writeTree writes the files below an empty dir. Modes are not subject to the umask, nor are those of folders: who copies
// the tree onto a host copies them too, and after an umask of 077 that host's /etc would be root's alone.
func writeTree(dir string, tree []plan.TreeFile) error {
	for _, f := range tree {
		path := filepath.Join(dir, f.Path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		// 0600 first: nobody reads a secret before the mode is right.
		if err := os.WriteFile(path, f.Data, 0o600); err != nil {
			return err
		}
		if err := os.Chmod(path, f.Mode); err != nil {
			return err
		}
	}
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		return os.Chmod(path, 0o755)
	})
}

// replaceable reports whether dir is there, and an error where something in it is not of
// an earlier tree: that tree's own plan says what it wrote.
func replaceable(dir string) (exists bool, err error) {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, err
	case len(entries) == 0:
		return true, nil
	}
	p, err := state.ReadPlan(filepath.Join(dir, plan.Path))
	if errors.Is(err, fs.ErrNotExist) {
		return true, fmt.Errorf("%s is not empty, and holds no tree of an earlier compile: name another folder, or remove it", dir)
	}
	if err != nil {
		return true, fmt.Errorf("%s is not empty, and its plan does not tell what an earlier compile wrote: name another "+
			"folder, or remove it: %w", dir, err)
	}
	files, err := p.Tree(nil)
	if err != nil {
		return true, err
	}
	known := make(map[string]bool, len(files))
	for _, f := range files {
		known[filepath.Join(dir, f.Path)] = true
	}
	return true, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !known[path] {
			err = fmt.Errorf("%s is in the way: no earlier compile wrote it, and %s is replaced whole. Move it away, "+
				"or name another folder", path, dir)
		}
		return err
	})
}
