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

// replaceTree writes a tree to dir, whole or not at all: it creates the tree next to dir, and exchanges the two in one step. If
// dir holds anything but an earlier tree, it is an error and stays unchanged.
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
	defer os.RemoveAll(tmp) // after the exchange, the former tree
	if err := writeTree(tmp, tree); err != nil {
		return err
	}
	if !exists {
		return os.Rename(tmp, dir)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("replace %s with the new tree: %w", dir, err)
	}
	return nil
}

// writeTree writes the files below an empty dir. The modes of files and folders are not subject to the umask: copying the tree to
// a host copies the modes as well, and with an umask of 077 only root could read that host's /etc.
func writeTree(dir string, tree []plan.TreeFile) error {
	for _, f := range tree {
		path := filepath.Join(dir, f.Path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		// 0600 first: nobody may read a secret before the mode is right.
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

// replaceable reports whether dir exists. It returns an error if something in dir is not part of
// an earlier tree, which it knows from the plan in that tree.
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
		return true, fmt.Errorf("%s is not empty and was not written by compile: choose another folder, or remove it", dir)
	}
	if err != nil {
		return true, fmt.Errorf("%s is not empty, and its plan does not tell what an earlier compile wrote: choose another "+
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
			err = fmt.Errorf("%s was not written by compile, which would remove it with the rest of %s: move it away, "+
				"or choose another folder", path, dir)
		}
		return err
	})
}
