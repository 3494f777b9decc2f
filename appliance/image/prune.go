package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fleetingd/fleetingd/appliance/state"
)

// Item is an image on the disk.
type Item struct {
	Digest string    `json:"digest"`
	Kind   string    `json:"kind"`  // "base" or "sealed"
	Image  string    `json:"image"` // its name in the spec that first asked for it
	Built  time.Time `json:"built"`
	Used   int64     `json:"used"` // bytes on the disk, including blocks shared with clones
	// Current means that a spec of the Plan uses it, or the base of a sealed image that it uses.
	Current bool `json:"current"`
}

// List returns all images, sealed ones first.
func (s *Store) List(ctx context.Context) ([]Item, error) {
	specs, err := s.specs(ctx)
	if err != nil {
		return nil, err
	}
	current := s.current(specs)
	var items []Item
	for _, kind := range []string{kindSealed, kindBase} {
		digests, err := s.shelf.digests(kind)
		if err != nil {
			return nil, err
		}
		for _, digest := range digests {
			m, err := s.shelf.read(kind, digest)
			if err != nil {
				s.log().Warn("an image is damaged", "kind", kind, "digest", digest, "reason", err)
				continue
			}
			items = append(items, Item{Digest: digest, Kind: kind, Image: m.Image, Built: m.Built,
				Used: blocks(s.shelf.file(m, diskFile)), Current: current[digest]})
		}
	}
	return items, nil
}

// Prune removes images that no spec of the Plan uses and that are not in use, and the remains of interrupted builds and downloads. It
// returns the digests of the images that it removed. A clone does not need its sealed image any more, so inUse only matters for images that
// a VM is about to boot from. While an image of the Plan is being built, Prune removes nothing: the result of a build is not known to be
// current before the build is done.
func (s *Store) Prune(ctx context.Context, inUse func(digest string) bool) (removed []string, err error) {
	if err := s.own(); err != nil {
		return nil, err
	}
	specs, err := s.specs(ctx)
	if err != nil {
		return nil, err
	}
	removed, err = s.shelf.pruneAll(specs, func() func(string) bool {
		current := s.current(specs)
		return func(digest string) bool { return current[digest] || inUse != nil && inUse(digest) }
	})
	return removed, errors.Join(err, s.pruneDownloads(specs))
}

// maxDownloadAge is how long an unfinished download is kept to be resumed.
const maxDownloadAge = 7 * 24 * time.Hour

// pruneDownloads removes downloads that nobody has resumed, such as those of a source that the Plan no longer has.
func (s *Store) pruneDownloads(specs map[string]string) (err error) {
	unlock, err := s.shelf.quiet(specs)
	if errors.Is(err, state.ErrLocked) {
		return nil // pruneAll has logged it
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	entries, err := os.ReadDir(s.plan.Paths.Cache)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil || !strings.HasPrefix(e.Name(), downloadPrefix) || time.Since(fi.ModTime()) < maxDownloadAge {
			continue
		}
		name, _, _ := strings.Cut(e.Name(), ".") // of the download that .part and .part.validator belong to
		errs = append(errs, s.shelf.unlessLocked(name, filepath.Join(s.plan.Paths.Cache, e.Name())))
	}
	return errors.Join(errs...)
}

// pruneAll removes the images that keep does not accept. It calls keep only once no builder of these specs is at work; if one is, it
// removes nothing.
func (s *shelf) pruneAll(specs map[string]string, keep func() func(digest string) bool) (removed []string, err error) {
	unlock, err := s.quiet(specs)
	if errors.Is(err, state.ErrLocked) {
		s.log.Info("an image is being built; old ones will be removed next time", "images", s.dir)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	removed, err = s.prune(keep())
	return removed, errors.Join(err, unlock())
}

// specs returns the digests of the Plan's specs, each with its kind.
func (s *Store) specs(ctx context.Context) (map[string]string, error) {
	specs := map[string]string{}
	for i := range s.plan.Images {
		img := &s.plan.Images[i]
		spec, err := s.baseSpec(ctx, img)
		if err != nil {
			// A file source cannot be read. Keeping too much is better than removing its image.
			return nil, named(img, err)
		}
		specs[spec] = kindBase
		if img.Prebuild == nil {
			continue
		}
		if spec, err = s.sealedSpec(ctx, img); err != nil {
			return nil, named(img, err)
		}
		specs[spec] = kindSealed
	}
	return specs, nil
}

// current returns the digests of the images that specs use, of the Store and of the Builder, and the digests of the specs themselves.
func (s *Store) current(specs map[string]string) map[string]bool {
	current := map[string]bool{}
	for _, on := range []*shelf{s.shelf, s.built} {
		on.current(specs, current)
	}
	return current
}

// current adds the digests of the images that specs use, and the digests of the specs themselves.
func (s *shelf) current(specs map[string]string, to map[string]bool) {
	for spec, kind := range specs {
		to[spec] = true
		if m, err := s.follow(kind, spec); err == nil {
			to[m.Digest] = true
		}
	}
}

// quiet keeps all builders of these specs out until unlock is called: an image that is finished but not referenced yet looks unused. If a
// builder is at work, the error is state.ErrLocked.
func (s *shelf) quiet(specs map[string]string) (unlock func() error, err error) {
	var locks []*state.Lock
	unlock = func() error {
		var errs []error
		for _, l := range locks {
			errs = append(errs, l.Unlock())
		}
		return errors.Join(errs...)
	}
	if _, err := os.Stat(s.lockPath("")); errors.Is(err, fs.ErrNotExist) {
		return unlock, nil // nothing has been built here
	}
	for spec := range specs {
		l, err := state.TryLock(s.lockPath(spec))
		if err != nil {
			return nil, errors.Join(err, unlock())
		}
		locks = append(locks, l)
	}
	return unlock, nil
}

// digests returns the names in a kind's folder, without drafts.
func (s *shelf) digests(kind string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.dir, kind))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var out []string
	for _, e := range entries {
		if isDigest(e.Name()) {
			out = append(out, e.Name())
		}
	}
	return out, err
}

// prune removes images, references and notes that keep does not accept, and drafts that no process works on.
func (s *shelf) prune(keep func(digest string) bool) (removed []string, err error) {
	var errs []error
	for _, folder := range []string{"refs", notesFolder} {
		entries, err := os.ReadDir(filepath.Join(s.dir, folder))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, e := range entries {
			if !keep(e.Name()) {
				errs = append(errs, s.unlessLocked(e.Name(), filepath.Join(s.dir, folder, e.Name())))
			}
		}
	}
	for _, kind := range []string{kindSealed, kindBase} {
		entries, err := os.ReadDir(filepath.Join(s.dir, kind))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, e := range entries {
			digest := strings.TrimPrefix(e.Name(), building)
			if !isDigest(digest) || (digest == e.Name() && keep(digest)) {
				continue
			}
			path := filepath.Join(s.dir, kind, e.Name())
			if err := s.unlessLocked(kind+"-"+digest, path); err != nil {
				errs = append(errs, err)
			} else if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) && digest == e.Name() {
				removed = append(removed, digest)
			}
		}
	}
	return removed, errors.Join(errs...)
}

// unlessLocked removes a path, unless its builder is at work.
func (s *shelf) unlessLocked(lock, path string) (err error) {
	l, err := state.TryLock(s.lockPath(lock))
	if errors.Is(err, state.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Unlock()) }()
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("remove an unused image: %w", err)
	}
	return nil
}

// blocks returns the bytes that a sparse file occupies on its disk.
func blocks(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return allocated(fi)
}
