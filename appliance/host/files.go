package host

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// KindFile and KindFolder are the kinds of the doors that Tree.Files and Tree.Folders return.
const (
	KindFile   Kind = "file"
	KindFolder Kind = "folder"
)

// maxFile bounds a file that is read, in bytes.
const maxFile = 64 << 20

// Files returns the door to regular files. A file's State has its "content" (or, if that is not UTF-8, "base64"), its "mode" ("0644"), and its
// "owner" and "group" by name, or by number where there is no name.
//
// A file is replaced whole, with its owner and mode, in one step. Missing folders on the way are made (0755), and go with the last file that
// they were made for. Anything but a regular file is refused in its place.
func (t *Tree) Files() Door { return files{t} }

type files struct{ *Tree }

func (d files) Read(_ context.Context, names []string) (map[string]State, error) {
	return d.readAll(names, "file", d.read)
}

// readAll reads each of the objects. Its errors name the object.
func (t *Tree) readAll(names []string, what string, read func(string, *accounts, *treeNotes) (State, error)) (map[string]State, error) {
	ids, err := t.readAccounts()
	notes, err1 := t.readNotes()
	if errors.Is(err1, fs.ErrPermission) {
		err1 = nil // root alone reads them, and who reads a host's state need not be root
	}
	if err := errors.Join(err, err1); err != nil {
		return nil, err
	}
	found := make(map[string]State, len(names))
	var errs []error
	for _, name := range names {
		s, err := read(name, ids, notes)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", what, name, err))
		}
		found[name] = s
	}
	return found, errors.Join(errs...)
}

// readOne reads one object.
func (t *Tree) readOne(name string, read func(string, *accounts, *treeNotes) (State, error)) (State, error) {
	ids, err := t.readAccounts()
	notes, err1 := t.readNotes()
	if err := errors.Join(err, err1); err != nil {
		return nil, err
	}
	return read(name, ids, notes)
}

func (d files) read(name string, ids *accounts, notes *treeNotes) (State, error) {
	data, fi, err := d.readFile(name)
	if err != nil || fi == nil {
		return nil, err
	}
	s := d.attributesOf(name, fi, ids, notes)
	setContent(s, data)
	return s, nil
}

// setContent puts a file's bytes into its State, which is text.
func setContent(s State, data []byte) {
	if utf8.Valid(data) {
		s["content"] = string(data)
		return
	}
	s["base64"] = base64.StdEncoding.EncodeToString(data)
}

// content is what setContent put into the State.
func content(s State) ([]byte, error) {
	text, isText := s["content"]
	encoded, isEncoded := s["base64"]
	if isText == isEncoded {
		return nil, errors.New("its state needs one of content and base64")
	}
	if isText {
		return []byte(text), nil
	}
	return base64.StdEncoding.DecodeString(encoded)
}

// readFile returns a regular file's bytes, and nil for a missing one.
func (t *Tree) readFile(name string) ([]byte, fs.FileInfo, error) {
	at, err := t.openAbove(name, trust{})
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer at.Close()
	before, err := at.regular(filepath.Base(name))
	if err != nil || before == nil {
		return nil, nil, err
	}
	f, err := at.OpenFile(filepath.Base(name), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	switch {
	case err != nil:
		return nil, nil, err
	case !os.SameFile(before, fi):
		return nil, nil, errors.New("it was replaced while it was being read; try again")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("it is larger than %d MiB, so fleetingd did not write it", maxFile>>20)
	}
	return data, fi, err
}

// regular returns what is known of a regular file, nil for a missing one, and an error for anything else.
func (at *folder) regular(base string) (fs.FileInfo, error) {
	fi, err := at.Lstat(base)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case fi.Mode()&fs.ModeSymlink != 0:
		target, err := at.Readlink(base)
		return nil, errors.Join(fmt.Errorf("it is a symbolic link to %s, which fleetingd neither follows nor replaces; remove it", target), err)
	case !fi.Mode().IsRegular():
		return nil, fmt.Errorf("there is something else than a regular file in its place (%s); remove it", fi.Mode().Type())
	}
	return fi, nil
}

func (d files) Write(_ context.Context, name string, want State) error {
	err := d.write(name, want)
	if err != nil {
		return fmt.Errorf("file %s: %w", name, err)
	}
	return nil
}

func (d files) write(name string, want State) error {
	if want == nil {
		return d.removeFile(name)
	}
	if err := onlyKeys(want, "content", "base64", "mode", "owner", "group"); err != nil {
		return err
	}
	data, err := content(want)
	if err != nil {
		return err
	}
	have, err := d.readOne(name, d.read)
	if err != nil {
		return err
	}
	return d.replace(name, data, want, maps.Equal(have, want))
}

// onlyKeys refuses what a door would overlook.
func onlyKeys(s State, known ...string) error {
	rest := maps.Clone(s)
	for _, k := range known {
		delete(rest, k)
	}
	for k := range rest {
		return fmt.Errorf("its state has the unknown key %q", k)
	}
	return nil
}

// partOf is the name under which a file is written. It begins with a dot and ends in nothing that systemd, sysctl or sysusers read.
func partOf(base string) string { return "." + base + ".fleetingd-new" }

// replace writes a file whole or not at all: under another name with the right owner and mode, flushed, and renamed. With same, the file is
// as it should be, and only what a crash left beside it is removed.
func (t *Tree) replace(name string, data []byte, want State, same bool) error {
	a, err := t.parseAttributes(want)
	if err != nil {
		return err
	}
	at, err := t.openAbove(name, trust{write: true, owner: max(a.uid, 0), make: true})
	if err != nil {
		return err
	}
	defer at.Close()
	base := filepath.Base(name)
	part := partOf(base)
	if err := at.Remove(part); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if same {
		return nil
	}
	if _, err := at.regular(base); err != nil {
		return err
	}
	if err := t.writePart(at, part, name, data, a); err != nil {
		return errors.Join(err, gone(at.Remove(part)))
	}
	if err := at.Rename(part, base); err != nil {
		return errors.Join(err, gone(at.Remove(part)))
	}
	return at.flush()
}

// gone is err, if it is not that there is nothing to remove.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (t *Tree) writePart(at *folder, part, name string, data []byte, a attributes) error {
	f, err := at.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = t.set(f, name, a)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// removeFile removes a regular file and the folders that were made for it. A missing one is no error.
func (t *Tree) removeFile(name string) error {
	at, err := t.openAbove(name, trust{})
	if errors.Is(err, fs.ErrNotExist) {
		return t.removeMade(filepath.Dir(name))
	}
	if err != nil {
		return err
	}
	defer at.Close()
	base := filepath.Base(name)
	fi, err := at.regular(base)
	if err != nil {
		return err
	}
	err = gone(at.Remove(partOf(base)))
	if fi != nil {
		err = errors.Join(err, gone(at.Remove(base)))
	}
	if err := errors.Join(err, at.flush(), t.recordOwner(name, "")); err != nil {
		return err
	}
	return t.removeMade(filepath.Dir(name))
}
