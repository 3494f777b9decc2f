package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// baseSpec returns the digest of a source as the spec describes it. For files on this host it covers their content too, so that a
// replaced file is used at the next start.
func (s *Store) baseSpec(ctx context.Context, img *plan.Image) (string, error) {
	var inputs *filesInputs
	if src := img.Source.File; src != nil {
		f, err := s.resolveFile(ctx, img.Name, src)
		if err != nil {
			return "", err
		}
		files := f.inputs()
		inputs = &files
	}
	return sourceSpec(img.Source, inputs)
}

func sourceSpec(src plan.Source, inputs *filesInputs) (string, error) {
	digest, _, err := digestOf(struct {
		Format int
		Source plan.Source
		Files  *filesInputs
	}{formatVersion, src, inputs})
	return digest, err
}

// base returns the base of an image, and makes it if there is none. If fresh, it asks the source for a newer one.
func (s *Store) base(ctx context.Context, img *plan.Image, fresh bool) (_ *Base, err error) {
	spec, err := s.baseSpec(ctx, img)
	if err != nil {
		return nil, err
	}
	if !fresh {
		if m, err := s.find(kindBase, spec); m != nil || err != nil {
			return s.baseOf(img, s.shelf, m, true), err
		}
	}
	if err := s.own(); err != nil {
		return nil, err
	}
	lock, err := s.shelf.lock(ctx, spec)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, lock.Unlock()) }()
	m, cached, err := s.newestBase(ctx, img, spec)
	if fresh && isUnreachable(err) {
		if old, ferr := s.find(kindBase, spec); old != nil && ferr == nil {
			s.keepsBase(img, s.shelf, spec, err)
			return s.baseOf(img, s.shelf, old, true), nil
		}
	}
	return s.baseOf(img, s.shelf, m, cached), err
}

// maxAge is how long a refresh may use a base whose source does not answer.
const maxAge = 7 * 24 * time.Hour

// CheckAge returns an error if the base of an image has not been refreshed as it should have been: the source has not answered for
// a week, or for three refresh intervals if those are longer, or the last refresh of a `debian` source, which is root's part, failed. The
// base can be used all the same.
func (s *Store) CheckAge(ctx context.Context, img *plan.Image) error {
	spec, err := s.baseSpec(ctx, img)
	if err != nil {
		return named(img, err)
	}
	on := s.shelf
	if img.Source.Debian != nil {
		on = s.built
	}
	asked, err := on.asked(spec)
	if err != nil {
		return named(img, err)
	}
	since := asked.UTC().Format(time.DateTime) + " UTC"
	if on.unfinished(spec) {
		return named(img, fmt.Errorf("the last refresh of its `debian` source failed or was interrupted, so its base has no updates since %s. "+
			"The reason is in the output of `fleetingd refresh --root-part`: journalctl -u fleetingd-refresh.service", since))
	}
	if age := time.Since(asked); age > max(maxAge, 3*time.Duration(s.plan.Refresh)) {
		return named(img, fmt.Errorf("its source has not answered for %d days, so its base has no updates since %s. Check the source's URL, "+
			"and the network between this host and it", age/(24*time.Hour), since))
	}
	return nil
}

// newestBase makes a base from what the source has now, and points the spec at it.
func (s *Store) newestBase(ctx context.Context, img *plan.Image, spec string) (*manifest, bool, error) {
	f, err := s.resolve(ctx, img)
	if err != nil {
		return nil, false, err
	}
	digest, inputs, err := digestOf(f.inputs())
	if err != nil {
		return nil, false, err
	}
	m, cached, err := s.shelf.make(ctx, kindBase, digest, func(d *draft) (*manifest, error) {
		return s.makeBase(ctx, img, f, d, inputs)
	})
	if err != nil {
		return nil, false, err
	}
	return m, cached, s.shelf.point(spec, kindBase, digest)
}

// resolve determines the parts of a source and their digests.
func (s *Store) resolve(ctx context.Context, img *plan.Image) (*files, error) {
	switch src := img.Source; {
	case src.File != nil:
		return s.resolveFile(ctx, img.Name, src.File)
	case src.URL != nil:
		return s.resolveURL(ctx, img.Name, src.URL)
	case src.Ubuntu != nil:
		return s.resolveUbuntu(ctx, src.Ubuntu)
	case src.Debian != nil:
		return s.resolveDebian(img)
	}
	return nil, errors.New("it has no source: the plan is damaged")
}

func (s *Store) makeBase(ctx context.Context, img *plan.Image, f *files, d *draft, inputs json.RawMessage) (*manifest, error) {
	if err := s.collect(ctx, img.Name, f, d); err != nil {
		return nil, err
	}
	line := f.Cmdline
	if line == "" {
		disk, err := os.Open(d.path(diskFile))
		if err != nil {
			return nil, err
		}
		defer disk.Close()
		root, err := rootArg(disk)
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", redacted(f.Disk.at), err)
		}
		line = cmdline(root)
	}
	return &manifest{Image: img.Name, Cmdline: line, Inputs: inputs}, nil
}

// resolveDebian returns the parts of a base that a Builder made from packages. A Store cannot build one, since that takes root.
func (s *Store) resolveDebian(img *plan.Image) (*files, error) {
	spec, err := s.baseSpec(context.Background(), img)
	if err != nil {
		return nil, err
	}
	m, err := s.built.follow(kindBase, spec)
	if errors.Is(err, errMissing) {
		return nil, errors.New("its `debian` source is not built yet, and only root can build it (with mmdebstrap): run " +
			"`fleetingd run` or `fleetingd refresh --root-part` as root")
	}
	if err != nil {
		return nil, err
	}
	f := &files{Cmdline: m.Cmdline, Arch: img.Source.Debian.Arch}
	for _, p := range []struct {
		to   *part
		name string
	}{{&f.Disk, diskFile}, {&f.Kernel, kernelFile}, {&f.Initrd, initrdFile}} {
		// The build's digest stands for each of its files, since root sealed them.
		*p.to = part{at: s.built.file(m, p.name), digest: m.Digest, sealed: true}
	}
	return f, nil
}
