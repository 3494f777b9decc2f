package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/state"
)

// formatVersion is part of every digest: changing it rebuilds all images.
const formatVersion = 2

// The two kinds of image, and the names of their folders.
const (
	kindBase   = "base"
	kindSealed = "sealed"
)

// The files of an image's folder.
const (
	diskFile     = "disk.raw"
	kernelFile   = "kernel"
	initrdFile   = "initrd"
	manifestFile = "manifest.json"
)

// building is the prefix of the folder of an incomplete image.
const building = ".building-"

// manifest says what an image is and what went into it, for fleetingd and for people.
type manifest struct {
	Format  int       `json:"format"`
	Kind    string    `json:"kind"`
	Digest  string    `json:"digest"`
	Image   string    `json:"image"` // its name in the spec that first asked for it
	Built   time.Time `json:"built"`
	Cmdline string    `json:"cmdline"`
	Size    int64     `json:"size"` // bytes of the disk
	Initrd  bool      `json:"initrd"`
	Guest   bool      `json:"guest"`
	User    string    `json:"user,omitempty"`
	// Inputs is what the digest is computed from.
	Inputs json.RawMessage `json:"inputs"`
}

// digestOf returns the digest of an image's inputs: of their JSON, in which the fields of structs have a fixed order.
func digestOf(inputs any) (digest string, canonical json.RawMessage, err error) {
	b, err := json.Marshal(inputs)
	if err != nil {
		return "", nil, err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), b, nil
}

// shelf is a folder of images, in the layout that the package comment describes.
type shelf struct {
	dir string
	log *slog.Logger
}

// notesFolder holds notes of refreshes that are in progress or have failed. Only a Builder writes them.
const notesFolder = "unfinished"

// open makes the shelf's folders.
func (s *shelf) open() error {
	for _, sub := range []string{kindBase, kindSealed, "refs", "locks"} {
		if err := os.MkdirAll(filepath.Join(s.dir, sub), 0o755); err != nil {
			return err
		}
	}
	return nil
}

func (s *shelf) folder(kind, digest string) string { return filepath.Join(s.dir, kind, digest) }
func (s *shelf) file(m *manifest, name string) string {
	return filepath.Join(s.folder(m.Kind, m.Digest), name)
}
func (s *shelf) refPath(spec string) string  { return filepath.Join(s.dir, "refs", spec) }
func (s *shelf) lockPath(name string) string { return filepath.Join(s.dir, "locks", name) }
func (s *shelf) notePath(spec string) string { return filepath.Join(s.dir, notesFolder, spec) }

// errMissing is an image that does not exist, or is damaged.
var errMissing = errors.New("no such image")

// read returns the manifest of an image that has all its files.
func (s *shelf) read(kind, digest string) (*manifest, error) {
	dir := s.folder(kind, digest)
	b, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errMissing
	}
	if err != nil {
		return nil, err
	}
	var m manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%w: %s is damaged: %w", errMissing, filepath.Join(dir, manifestFile), err)
	}
	if m.Format != formatVersion || m.Kind != kind || m.Digest != digest {
		return nil, fmt.Errorf("%w: %s belongs to another image or format", errMissing, filepath.Join(dir, manifestFile))
	}
	files := []string{diskFile, kernelFile}
	if m.Initrd {
		files = append(files, initrdFile)
	}
	for _, name := range files {
		fi, err := os.Lstat(filepath.Join(dir, name))
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("%w: %s has no %s", errMissing, dir, name)
		case err != nil:
			return nil, err
		case name == diskFile && fi.Size() != m.Size:
			return nil, fmt.Errorf("%w: %s has %d bytes, but had %d when it was sealed",
				errMissing, filepath.Join(dir, name), fi.Size(), m.Size)
		}
	}
	return &m, nil
}

// follow returns the image that a spec's reference points to.
func (s *shelf) follow(kind, spec string) (*manifest, error) {
	target, err := os.Readlink(s.refPath(spec))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errMissing
	}
	if err != nil {
		return nil, err
	}
	if filepath.Base(filepath.Dir(target)) != kind {
		return nil, fmt.Errorf("%w: %s is not a link to a %s image", errMissing, s.refPath(spec), kind)
	}
	return s.read(kind, filepath.Base(target))
}

// point makes a spec's reference point to an image, atomically. The reference's time tells when the source last answered.
func (s *shelf) point(spec, kind, digest string) error {
	target := filepath.Join("..", kind, digest)
	if have, err := os.Readlink(s.refPath(spec)); err == nil && have == target {
		now := unix.NsecToTimespec(time.Now().UnixNano())
		err := unix.UtimesNanoAt(unix.AT_FDCWD, s.refPath(spec), []unix.Timespec{now, now}, unix.AT_SYMLINK_NOFOLLOW)
		return os.NewSyscallError("utimensat", err)
	}
	tmp := s.refPath(building + spec)
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, s.refPath(spec)); err != nil {
		return err
	}
	return state.SyncFolder(filepath.Dir(s.refPath(spec)))
}

// asked returns when a spec's source last answered.
func (s *shelf) asked(spec string) (time.Time, error) {
	fi, err := os.Lstat(s.refPath(spec))
	if err != nil {
		return time.Time{}, err
	}
	return fi.ModTime(), nil
}

// begin notes that a refresh is in progress; end removes the note. It stays if the refresh fails or its process is killed.
func (s *shelf) begin(spec string) (end func() error, err error) {
	note := s.notePath(spec)
	if err := state.WriteFile(note, nil, 0o644); err != nil {
		return nil, fmt.Errorf("note that a refresh begins: %w", err)
	}
	return func() error { return os.Remove(note) }, nil
}

// unfinished reports whether the last refresh is in progress or has failed.
func (s *shelf) unfinished(spec string) bool {
	_, err := os.Stat(s.notePath(spec))
	return err == nil
}

// lock lets only one process on this host build what name stands for.
func (s *shelf) lock(ctx context.Context, name string) (*state.Lock, error) {
	l, err := state.TryLock(s.lockPath(name))
	if errors.Is(err, state.ErrLocked) {
		s.log.Info("another process is building this image; waiting for it", "lock", name)
		l, err = state.WaitLock(ctx, s.lockPath(name))
	}
	return l, err
}

// make returns the image with this digest: the existing one, or a new one that fill puts into a draft. The digest has its own lock, since
// two specs may lead to the same one.
func (s *shelf) make(
	ctx context.Context, kind, digest string, fill func(*draft) (*manifest, error),
) (_ *manifest, cached bool, err error) {
	lock, err := s.lock(ctx, kind+"-"+digest)
	if err != nil {
		return nil, false, err
	}
	defer func() { err = errors.Join(err, lock.Unlock()) }()
	if m, err := s.read(kind, digest); err == nil || !errors.Is(err, errMissing) {
		return m, true, err
	}
	d, err := s.draft(kind, digest)
	if err != nil {
		return nil, false, err
	}
	defer func() { err = errors.Join(err, d.discard()) }()
	m, err := fill(d)
	if err != nil {
		return nil, false, err
	}
	m.Kind, m.Digest = kind, digest
	return m, false, s.finish(d, m)
}

// draft is an image that is being built, in a folder beside its final one.
type draft struct {
	dir  string
	done bool
}

func (d *draft) path(name string) string { return filepath.Join(d.dir, name) }

// discard removes a draft that was not finished.
func (d *draft) discard() error {
	if d.done {
		return nil
	}
	return os.RemoveAll(d.dir)
}

// draft makes the folder in which an image is built. The caller has the digest's lock, so an existing folder was left by a process that
// was killed.
func (s *shelf) draft(kind, digest string) (*draft, error) {
	dir := filepath.Join(s.dir, kind, building+digest)
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	return &draft{dir: dir}, nil
}

// finish completes a draft: it flushes the files and makes them read-only, removes everything else in the folder, writes the manifest
// and gives the folder its name.
func (s *shelf) finish(d *draft, m *manifest) error {
	keep := map[string]bool{diskFile: true, kernelFile: true, initrdFile: true}
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !keep[e.Name()] {
			err = os.RemoveAll(d.path(e.Name()))
		} else {
			err = seal(d.path(e.Name()))
		}
		if err != nil {
			return err
		}
	}
	m.Format, m.Built = formatVersion, time.Now().UTC().Truncate(time.Second)
	m.Size, m.Initrd = fileSize(d.path(diskFile)), fileSize(d.path(initrdFile)) > 0
	b, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := state.WriteFile(d.path(manifestFile), append(b, '\n'), 0o444); err != nil {
		return err
	}
	if err := errors.Join(os.Chmod(d.dir, 0o755), state.SyncFolder(d.dir)); err != nil {
		return err
	}
	return s.place(d, s.folder(m.Kind, m.Digest))
}

// place gives a draft its final name. An existing image of that name is damaged, since read refused it.
func (s *shelf) place(d *draft, dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.Rename(d.dir, dir); err != nil {
		return err
	}
	d.done = true
	return state.SyncFolder(filepath.Dir(dir))
}

// seal flushes a file and makes it read-only.
func seal(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Chmod(0o444), f.Sync(), f.Close())
}

func isDigest(name string) bool {
	_, err := checkSHA256(name)
	return err == nil && name == strings.ToLower(name)
}
