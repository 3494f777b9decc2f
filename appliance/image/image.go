// Package image makes what workers are cloned from: fetch, verify, convert,
// prebuild, seal, clone, prune. It never starts a worker and never copies a disk
// where it was asked to clone one.
//
// All that it keeps is content-addressed and lies below Paths.Images, on the file system that the clones are on:
//
//	base/DIGEST/      disk.raw, kernel, initrd, manifest.json: a source, fetched, verified and made raw
//	sealed/DIGEST/    the same four: a base after its prebuild, the kernel of an x86 one unpacked
//	refs/SPEC         a link to the base or sealed image that a spec's digest stands for today
//	locks/NAME        one builder at a time, across processes
//
// What has a name there is whole and read-only: it is built under another name beside it, flushed and
// renamed. Downloads lie below Paths.Cache until they have become a base. What only root can build (the debian source) is a Builder's,
// and lies in the same layout below Paths.State/debian, where the runtime user cannot write.
package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// Options of a Store.
type Options struct {
	Log *slog.Logger // nil: slog.Default()
	// Driver boots the prebuild VMs. A Store without one gives bases, and sealed images that are there already.
	Driver vm.Driver
	// GuestBinary is the static program that is put into the image, and run there as `fleetingd guest`. Empty: GuestName
	// beside this program, or where there is none (or this user may not read it) this program itself.
	GuestBinary string
	// Secrets gives the value of a secret of a prebuild's file, by its place (plan.Piece.From). It is asked only when an image is prebuilt.
	Secrets func(from string) (string, error)
	// Progress may be nil. It is called from the goroutine that builds, and must not block.
	Progress func(Progress)
}

// Phase is a part of making an image, in the order that they happen.
type Phase string

// The phases. A phase that is not needed is not reported.
const (
	PhaseBuild    Phase = "build"    // the debian source; Line is mmdebstrap's output
	PhaseDownload Phase = "download" // Done and Total are bytes
	PhaseVerify   Phase = "verify"   // the same
	PhaseConvert  Phase = "convert"
	PhaseBase     Phase = "base"     // the base is there: Cached says that nothing was done for it
	PhasePrebuild Phase = "prebuild" // Line is a step's output
	PhaseSeal     Phase = "seal"
	PhaseSealed   Phase = "sealed" // the sealed image is there: Cached as above
)

// Progress is one event while an image is made.
type Progress struct {
	Image string
	Phase Phase
	Item  string // what is downloaded or converted
	Done  int64  // bytes; Total is 0 where unknown
	Total int64
	// Line is one line of output, escaped for a terminal.
	Line   string
	Cached bool
}

// Store makes and keeps the images of one Plan, for the Plan's user. All methods may be called at the
// same time, by several processes too.
type Store struct {
	kit
	shelf *shelf // below Paths.Images
	built *shelf // below Paths.State: a Builder's, and only read

	ubuntuKeys []byte
}

// Base is a source made usable: fetched, verified, raw. Its files are read-only.
type Base struct {
	Digest  string
	Disk    string // raw
	Kernel  string
	Initrd  string // may be empty
	Cmdline string
	Size    int64 // bytes of Disk, sparse
	Cached  bool  // it was there: this call built nothing
}

// Sealed is an image that workers are cloned from. Its files are read-only.
type Sealed struct {
	Digest  string
	Disk    string // raw
	Kernel  string
	Initrd  string // may be empty
	Cmdline string
	Size    int64 // bytes of Disk, sparse: a clone has at least that
	Guest   bool  // the guest part is inside: readiness comes over the channel
	User    string
	Cached  bool // it was there: this call built nothing
}

// GuestName is the guest part as a program of its own, with nothing else in it.
const GuestName = "fleetingd-guest"

func thisGuest() string {
	if self, err := os.Executable(); err == nil {
		small := filepath.Join(filepath.Dir(self), GuestName)
		if unix.Access(small, unix.R_OK) == nil {
			return small
		}
	}
	return "/proc/self/exe" // also where its path is in a folder that this user may not enter
}

// Open opens the images of a Plan. It changes nothing yet.
func Open(p *plan.Plan, o Options) (*Store, error) {
	if o.GuestBinary == "" {
		o.GuestBinary = thisGuest()
	}
	k := newKit(p, o)
	return &Store{kit: k, ubuntuKeys: ubuntuKeys, shelf: &shelf{dir: p.Paths.Images, log: k.opts.Log}, built: builtShelf(p, k.opts.Log)}, nil
}

// OwnerError is a folder for images that belongs to another user than the one who wants to write there. Whoever it is could put a
// link into that user's way, or have one put into their own.
type OwnerError struct{ Dir, User string }

func (e *OwnerError) Error() string {
	return fmt.Sprintf("%s belongs to another user, and only that one builds there: start this as user %q", e.Dir, e.User)
}

// own makes what is missing of the folders for images, and refuses one that is not this process's own.
func (s *Store) own() error {
	if _, err := os.Stat(s.plan.Paths.Images); err == nil && !ownFolder(s.plan.Paths.Images) {
		return &OwnerError{s.plan.Paths.Images, s.plan.User}
	}
	if err := errors.Join(s.shelf.open(), os.MkdirAll(s.plan.Paths.Cache, 0o750)); err != nil {
		return fmt.Errorf("make the folders for images: %w", err)
	}
	return nil
}

// bytesOf reports a phase's bytes, ten times a second at most.
func (s *Store) bytesOf(image string, phase Phase, item string) func(done, total int64) {
	if s.opts.Progress == nil {
		return nil
	}
	var last time.Time
	return func(done, total int64) {
		if now := time.Now(); done == total || now.Sub(last) > 100*time.Millisecond {
			last = now
			s.report(Progress{Image: image, Phase: phase, Item: item, Done: done, Total: total})
		}
	}
}

// Ensure gives the sealed image of a spec, and makes it where there is none: base, prebuild, seal. One caller
// on the host builds, the others wait and find it. Where it is there already nothing is fetched, and no
// network is needed. A failed step is a *guest.StepError.
func (s *Store) Ensure(ctx context.Context, img *plan.Image) (*Sealed, error) {
	return s.sealed(ctx, img, false)
}

// Refresh looks whether the source has changed, builds beside the image in use, and swaps: the next Ensure
// gives the new one. Where nothing changed it gives the one in use, Cached.
func (s *Store) Refresh(ctx context.Context, img *plan.Image) (*Sealed, error) {
	return s.sealed(ctx, img, true)
}

// named says which image an error is about.
func named(img *plan.Image, err error) error {
	if err != nil {
		return fmt.Errorf("image %q: %w", img.Name, err)
	}
	return nil
}

func (s *Store) sealed(ctx context.Context, img *plan.Image, fresh bool) (_ *Sealed, err error) {
	defer func() { err = named(img, err) }()
	if img.Prebuild == nil {
		return s.unbuilt(ctx, img, fresh)
	}
	spec, err := s.sealedSpec(ctx, img)
	if err != nil {
		return nil, err
	}
	if !fresh {
		if m, err := s.find(kindSealed, spec); m != nil || err != nil {
			return s.sealedOf(img, m, true), err
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
	if !fresh { // the one that had the lock may have built it
		if m, err := s.find(kindSealed, spec); m != nil || err != nil {
			return s.sealedOf(img, m, true), err
		}
	}
	base, err := s.base(ctx, img, fresh)
	if err != nil {
		return nil, err
	}
	m, cached, err := s.seal(ctx, img, base)
	if err != nil {
		return nil, err
	}
	return s.sealedOf(img, m, cached), s.shelf.point(spec, kindSealed, m.Digest)
}

// unbuilt is an image without a prebuild: its base is what workers are cloned from.
func (s *Store) unbuilt(ctx context.Context, img *plan.Image, fresh bool) (*Sealed, error) {
	b, err := s.base(ctx, img, fresh)
	if err != nil {
		return nil, err
	}
	s.report(Progress{Image: img.Name, Phase: PhaseSealed, Cached: b.Cached})
	return &Sealed{Digest: b.Digest, Disk: b.Disk, Kernel: b.Kernel, Initrd: b.Initrd, Cmdline: b.Cmdline,
		Size: b.Size, User: img.User, Cached: b.Cached}, nil
}

// find gives the image that a spec stands for, and nil where it has to be made. What is damaged is made anew.
func (s *Store) find(kind, spec string) (*manifest, error) {
	m, err := s.shelf.follow(kind, spec)
	if errors.Is(err, errMissing) {
		if err != errMissing { //nolint:errorlint // wrapped, it says what is damaged
			s.log().Warn("a kept image is not usable and is made anew", "reason", err)
		}
		return nil, nil
	}
	return m, err
}

func (s *Store) sealedOf(img *plan.Image, m *manifest, cached bool) *Sealed {
	if m == nil {
		return nil
	}
	s.report(Progress{Image: img.Name, Phase: PhaseSealed, Cached: cached})
	out := &Sealed{Digest: m.Digest, Cmdline: m.Cmdline, Size: m.Size, Guest: m.Guest, User: m.User, Cached: cached,
		Disk: s.shelf.file(m, diskFile), Kernel: s.shelf.file(m, kernelFile)}
	if m.Initrd {
		out.Initrd = s.shelf.file(m, initrdFile)
	}
	return out
}
