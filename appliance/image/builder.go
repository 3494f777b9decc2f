package image

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// kit holds what a Store and a Builder have in common.
type kit struct {
	plan *plan.Plan
	opts Options
	net  *fetcher
	arch string
}

func newKit(p *plan.Plan, o Options) kit {
	if o.Log == nil {
		o.Log = slog.Default()
	}
	return kit{plan: p, opts: o, net: newFetcher(), arch: runtime.GOARCH}
}

func (k *kit) log() *slog.Logger { return k.opts.Log }

func (k *kit) report(p Progress) {
	if k.opts.Progress != nil {
		k.opts.Progress(p)
	}
}

// keepsBase warns that the source of an image does not answer and the base on a shelf is used. A mirror that is down for an hour is no
// reason for a refresh to fail: the prebuild, or whatever else has changed, is made on that base. CheckAge has the limit.
func (k *kit) keepsBase(img *plan.Image, on *shelf, spec string, why error) {
	asked, err := on.asked(spec)
	if err != nil {
		why = errors.Join(why, err)
	}
	k.log().Warn("the image's source does not answer; using the existing base", "image", img.Name,
		"last_answer", asked.UTC().Format(time.DateTime), "error", why)
}

// baseOf returns the base that a manifest describes, and reports it. m may be nil.
func (k *kit) baseOf(img *plan.Image, on *shelf, m *manifest, cached bool) *Base {
	if m == nil {
		return nil
	}
	k.report(Progress{Image: img.Name, Phase: PhaseBase, Cached: cached})
	b := &Base{Digest: m.Digest, Cmdline: m.Cmdline, Size: m.Size, Cached: cached,
		Disk: on.file(m, diskFile), Kernel: on.file(m, kernelFile)}
	if m.Initrd {
		b.Initrd = on.file(m, initrdFile)
	}
	return b
}

// builtShelf is where a Builder keeps its bases.
func builtShelf(p *plan.Plan, log *slog.Logger) *shelf {
	return &shelf{dir: filepath.Join(p.Paths.State, "debian"), log: log}
}

// Builder makes what only root can make: the bases of `debian` sources. It keeps them below Paths.State, which a Store's user can only
// read. A Builder starts no VMs and does not touch the Store's files.
type Builder struct {
	kit
	shelf *shelf
	limit time.Duration // of a bootstrap
}

// NewBuilder returns a Builder. It changes nothing yet.
func NewBuilder(p *plan.Plan, o Options) *Builder {
	k := newKit(p, o)
	return &Builder{kit: k, shelf: builtShelf(p, k.opts.Log), limit: bootstrapLimit}
}

// Build makes the base of an image with a `debian` source, and returns nil for any other. It returns an existing base, unless fresh is
// set and the mirror has newer packages.
func (b *Builder) Build(ctx context.Context, img *plan.Image, fresh bool) (*Base, error) {
	if img.Source.Debian == nil {
		return nil, nil
	}
	m, cached, err := b.build(ctx, img, fresh)
	return b.baseOf(img, b.shelf, m, cached), named(img, err)
}

func (b *Builder) build(ctx context.Context, img *plan.Image, fresh bool) (_ *manifest, cached bool, err error) {
	spec, err := sourceSpec(img.Source, nil)
	if err != nil {
		return nil, false, err
	}
	if !fresh {
		if m, err := b.shelf.follow(kindBase, spec); !errors.Is(err, errMissing) {
			return m, true, err
		}
	}
	if err := b.open(); err != nil {
		return nil, false, err
	}
	lock, err := b.shelf.lock(ctx, spec)
	if err != nil {
		return nil, false, err
	}
	defer func() { err = errors.Join(err, lock.Unlock()) }()
	if fresh { // Store.CheckAge reads the note
		end, err := b.shelf.begin(spec)
		if err != nil {
			return nil, false, err
		}
		m, cached, err := b.newest(ctx, img, spec, true)
		if err != nil {
			return nil, false, err
		}
		return m, cached, end()
	}
	return b.newest(ctx, img, spec, false)
}

// newest makes a base from what the mirror has now, and points the spec at it.
func (b *Builder) newest(ctx context.Context, img *plan.Image, spec string, fresh bool) (*manifest, bool, error) {
	src := img.Source.Debian
	if err := checkDebian(src, b.arch); err != nil {
		return nil, false, err
	}
	proxy := aptProxy(ctx)
	in, err := resolveDebian(ctx, b.net.withProxy(proxy), src)
	if fresh && isUnreachable(err) {
		if m, ferr := b.shelf.follow(kindBase, spec); ferr == nil {
			b.keepsBase(img, b.shelf, spec, err)
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
	m, cached, err := b.shelf.make(ctx, kindBase, digest, func(d *draft) (*manifest, error) {
		b.log().Info("building from packages", "image", img.Name, "suite", src.Suite, "mirror", in.Repos[0].URI)
		line := func(text string) { b.report(Progress{Image: img.Name, Phase: PhaseBuild, Line: text}) }
		args, err := (&debianBuilder{inputs: in, digest: digest, proxy: proxy, line: line, limit: b.limit}).build(ctx, d)
		return &manifest{Image: img.Name, Cmdline: args, Inputs: inputs}, err
	})
	if err != nil {
		return nil, false, err
	}
	return m, cached, b.shelf.point(spec, kindBase, digest)
}

// open makes the Builder's folders. A Store's user must be able to read them, whatever the umask.
func (b *Builder) open() error {
	err := errors.Join(b.shelf.open(), os.MkdirAll(b.shelf.notePath(""), 0o755))
	for _, dir := range []string{"", kindBase, "refs", notesFolder} {
		err = errors.Join(err, os.Chmod(filepath.Join(b.shelf.dir, dir), 0o755))
	}
	return err
}

// Prune removes bases that no `debian` source of the Plan uses, and returns their digests.
func (b *Builder) Prune(context.Context) ([]string, error) {
	specs := map[string]string{}
	for i := range b.plan.Images {
		if img := &b.plan.Images[i]; img.Source.Debian != nil {
			spec, err := sourceSpec(img.Source, nil)
			if err != nil {
				return nil, named(img, err)
			}
			specs[spec] = kindBase
		}
	}
	return b.shelf.pruneAll(specs, func() func(string) bool {
		current := map[string]bool{}
		b.shelf.current(specs, current)
		return func(digest string) bool { return current[digest] }
	})
}
