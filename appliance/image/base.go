package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// baseSpec is the digest of a source as the spec has it. For files of this host it is
// of their content as well: whoever replaces one wants the new one at the next start.
func (s *Store) baseSpec(ctx context.Context, img *plan.Image) (string, error) {
	in := struct {
		Format int
		Source plan.Source
		Files  *filesInputs
	}{Format: formatVersion, Source: img.Source}
	if src := img.Source.File; src != nil {
		f, err := s.resolveFile(ctx, img.Name, src)
		if err != nil {
			return "", err
		}
		files := f.inputs()
		in.Files = &files
	}
	digest, _, err := digestOf(in)
	return digest, err
}

// base gives the base of an image. Where fresh, it asks the source whether there is a newer one.
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
	if err := s.mine(); err != nil {
		return nil, err
	}
	lock, err := s.shelf.lock(ctx, spec)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, lock.Unlock()) }()
	m, cached, err := s.newestBase(ctx, img, spec, fresh)
	if fresh && isUnreachable(err) {
		if old, ferr := s.find(kindBase, spec); old != nil && ferr == nil {
			s.keepsBase(img, err)
			return s.baseOf(img, s.shelf, old, true), nil
		}
	}
	return s.baseOf(img, s.shelf, m, cached), err
}

// newestBase makes the base of what the source has now, and lets the spec stand for it.
func (s *Store) newestBase(ctx context.Context, img *plan.Image, spec string, fresh bool) (*manifest, bool, error) {
	f, err := s.resolve(ctx, img, fresh)
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

// keepsBase says that the source of an image could not be asked for a newer one. A mirror that is down for an hour is no reason for
// a refresh to fail: the prebuild, or what else has changed, is made on the base that is there.
func (s *Store) keepsBase(img *plan.Image, why error) {
	s.log().Warn("the image's source does not answer; the base that is there is used", "image", img.Name, "error", why)
}

// resolve finds the parts of a source and their digests.
func (s *Store) resolve(ctx context.Context, img *plan.Image, fresh bool) (*files, error) {
	switch src := img.Source; {
	case src.File != nil:
		return s.resolveFile(ctx, img.Name, src.File)
	case src.URL != nil:
		return s.resolveURL(ctx, img.Name, src.URL)
	case src.Ubuntu != nil:
		return s.resolveUbuntu(ctx, src.Ubuntu)
	case src.Debian != nil:
		return s.resolveDebian(ctx, img, fresh)
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

// Prepare does the part of an image that only root can do: it builds a debian source from packages. For the
// other sources there is none. Where it was built before nothing is done, unless fresh asks the mirror for
// newer packages.
func (s *Store) Prepare(ctx context.Context, img *plan.Image, fresh bool) error {
	if img.Source.Debian == nil {
		return nil
	}
	m, cached, err := s.buildDebian(ctx, img, fresh)
	s.baseOf(img, s.roots, m, cached)
	return named(img, err)
}

// resolveDebian gives the parts of what root built.
func (s *Store) resolveDebian(ctx context.Context, img *plan.Image, fresh bool) (*files, error) {
	var m *manifest
	spec, err := s.baseSpec(ctx, img)
	if err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 {
		m, _, err = s.buildDebian(ctx, img, fresh)
	} else if m, err = s.roots.follow(kindBase, spec); errors.Is(err, errMissing) {
		err = checkDebian(img.Source.Debian, s.arch)
	}
	if err != nil {
		return nil, err
	}
	f := &files{Cmdline: m.Cmdline, Arch: img.Source.Debian.Arch}
	for _, p := range []struct {
		to   *part
		name string
	}{{&f.Disk, diskFile}, {&f.Kernel, kernelFile}, {&f.Initrd, initrdFile}} {
		// The build's digest stands for each of its files: root sealed them.
		*p.to = part{at: s.roots.file(m, p.name), digest: m.Digest, sealed: true}
	}
	return f, nil
}

// buildDebian makes the disk of a debian source. Root only.
func (s *Store) buildDebian(ctx context.Context, img *plan.Image, fresh bool) (_ *manifest, cached bool, err error) {
	spec, err := s.baseSpec(ctx, img)
	if err != nil {
		return nil, false, err
	}
	if !fresh {
		if m, err := s.roots.follow(kindBase, spec); !errors.Is(err, errMissing) {
			return m, true, err
		}
	}
	src := img.Source.Debian
	if err := checkDebian(src, s.arch); err != nil {
		return nil, false, err
	}
	if err := s.roots.open(); err != nil {
		return nil, false, err
	}
	lock, err := s.roots.lock(ctx, spec)
	if err != nil {
		return nil, false, err
	}
	defer func() { err = errors.Join(err, lock.Unlock()) }()
	line := func(text string) { s.report(Progress{Image: img.Name, Phase: PhaseBuild, Line: text}) }
	proxy := aptProxy(ctx)
	in, err := resolveDebian(ctx, s.net.withProxy(proxy), src)
	if fresh && isUnreachable(err) {
		if m, ferr := s.roots.follow(kindBase, spec); ferr == nil {
			s.keepsBase(img, err)
			return m, true, nil
		}
	}
	if err != nil {
		return nil, false, err
	}
	digest, inputs, err := digestOf(in)
	if err != nil {
		return nil, false, err
	}
	m, cached, err := s.roots.make(ctx, kindBase, digest, func(d *draft) (*manifest, error) {
		s.log().Info("building from packages", "image", img.Name, "suite", src.Suite, "mirror", in.Repos[0].URI)
		b := &debianBuilder{inputs: in, digest: digest, proxy: proxy, line: line}
		args, err := b.build(ctx, d)
		return &manifest{Image: img.Name, Cmdline: args, Inputs: inputs}, err
	})
	if err != nil {
		return nil, false, err
	}
	return m, cached, s.roots.point(spec, kindBase, digest)
}
