// Package image makes the images that workers are cloned from: it fetches, verifies, converts, prebuilds, seals, clones and prunes. It
// never starts a worker, and never copies a disk that it was asked to clone.
//
// Images are content-addressed and lie below Paths.Images, on the same file system as the clones:
//
//	base/DIGEST/      disk.raw, kernel, initrd, manifest.json: a source after it was fetched, verified and made raw
//	sealed/DIGEST/    the same four files: a base after its prebuild; an x86 kernel is unpacked
//	refs/SPEC         a link to the base or sealed image of a spec, by the spec's digest
//	locks/NAME        one builder at a time, across processes
//
// Everything with such a name is complete and read-only: it is built under another name in the same folder, flushed and renamed. Downloads
// stay below Paths.Cache until they have become a base. Bases that only root can build, from the debian source, are made by a Builder. They
// have the same layout below Paths.State/debian, where the runtime user cannot write.
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
	// Driver boots the prebuild VMs. Without one a Store has only bases and existing sealed images.
	Driver vm.Driver
	// GuestBinary is the static program that is put into images and runs there as `fleetingd guest`. If it is empty, that is GuestName in
	// this program's folder, or this program itself if GuestName is missing or not readable for this user.
	GuestBinary string
	// Secrets returns the value of a secret in a prebuild's file, by its place (plan.Piece.From). It is only called to prebuild an image.
	Secrets func(from string) (string, error)
	// Progress may be nil. It is called from the goroutine that builds, and must not block.
	Progress func(Progress)
}

// Phase is a phase of making an image.
type Phase string

// The phases, in their order. A phase that is not needed is not reported.
const (
	PhaseBuild    Phase = "build"    // of a debian source; Line is mmdebstrap's output
	PhaseDownload Phase = "download" // Done and Total are bytes
	PhaseVerify   Phase = "verify"   // likewise
	PhaseConvert  Phase = "convert"
	PhaseBase     Phase = "base"     // the base is ready; Cached: it existed
	PhasePrebuild Phase = "prebuild" // Line is a step's output
	PhaseSeal     Phase = "seal"
	PhaseSealed   Phase = "sealed" // the sealed image is ready; Cached: it existed
)

// Progress is one event while an image is made.
type Progress struct {
	Image string
	Phase Phase
	Item  string // what is downloaded or converted
	Done  int64  // bytes; Total is 0 if unknown
	Total int64
	// Line is one line of output, escaped for a terminal.
	Line   string
	Cached bool
}

// Store makes and keeps the images of one Plan, for the Plan's user. Its methods may be called concurrently, also by several processes.
type Store struct {
	kit
	shelf *shelf // below Paths.Images
	built *shelf // a Builder's, below Paths.State; read-only

	ubuntuKeys []byte
}

// Base is a source that was fetched, verified and made raw. Its files are read-only.
type Base struct {
	Digest  string
	Disk    string // raw
	Kernel  string
	Initrd  string // may be empty
	Cmdline string
	Size    int64 // bytes of Disk, sparse
	Cached  bool  // it existed before this call
}

// Sealed is an image that workers are cloned from. Its files are read-only.
type Sealed struct {
	Digest  string
	Disk    string // raw
	Kernel  string
	Initrd  string // may be empty
	Cmdline string
	Size    int64 // bytes of Disk, sparse; a clone has at least as many
	Guest   bool  // it has the guest part, which reports readiness over the channel
	User    string
	Cached  bool // it existed before this call
}

// GuestName is the name of the guest part as a separate, smaller program.
const GuestName = "fleetingd-guest"

func thisGuest() string {
	if self, err := os.Executable(); err == nil {
		small := filepath.Join(filepath.Dir(self), GuestName)
		if unix.Access(small, unix.R_OK) == nil {
			return small
		}
	}
	return "/proc/self/exe" // works even if this user may not enter the program's folder
}

// Open returns the Store of a Plan. It changes nothing yet.
func Open(p *plan.Plan, o Options) (*Store, error) {
	if o.GuestBinary == "" {
		o.GuestBinary = thisGuest()
	}
	k := newKit(p, o)
	return &Store{kit: k, ubuntuKeys: ubuntuKeys, shelf: &shelf{dir: p.Paths.Images, log: k.opts.Log}, built: builtShelf(p, k.opts.Log)}, nil
}

// OwnerError means that the folder for images belongs to another user. Writing there is refused, because its owner could plant a link.
type OwnerError struct{ Dir, User string }

func (e *OwnerError) Error() string {
	return fmt.Sprintf("%s belongs to another user, and only its owner may build there: run this as user %q", e.Dir, e.User)
}

// own makes the folders for images if they are missing, and refuses one that belongs to another user.
func (s *Store) own() error {
	if _, err := os.Stat(s.plan.Paths.Images); err == nil && !ownFolder(s.plan.Paths.Images) {
		return &OwnerError{s.plan.Paths.Images, s.plan.User}
	}
	if err := errors.Join(s.shelf.open(), os.MkdirAll(s.plan.Paths.Cache, 0o750)); err != nil {
		return fmt.Errorf("make the folders for images: %w", err)
	}
	return nil
}

// bytesOf returns a function that reports a phase's bytes, at most ten times a second.
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

// Ensure returns the sealed image of a spec. If there is none it makes one: base, prebuild, seal. One caller on the host builds, and the
// others wait for the result. If the image exists, nothing is fetched and no network is needed. A failed step is a *guest.StepError.
func (s *Store) Ensure(ctx context.Context, img *plan.Image) (*Sealed, error) {
	return s.sealed(ctx, img, false)
}

// Refresh asks the source for changes, builds a new image beside the one in use, and swaps them: the next Ensure returns the new one. If
// nothing has changed it returns the image in use, with Cached set. CheckAge tells whether the source has answered.
func (s *Store) Refresh(ctx context.Context, img *plan.Image) (*Sealed, error) {
	return s.sealed(ctx, img, true)
}

// named adds the image's name to an error.
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
	if !fresh { // another process may have built it while this one waited for the lock
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

// unbuilt returns an image without a prebuild: workers are cloned from its base.
func (s *Store) unbuilt(ctx context.Context, img *plan.Image, fresh bool) (*Sealed, error) {
	b, err := s.base(ctx, img, fresh)
	if err != nil {
		return nil, err
	}
	s.report(Progress{Image: img.Name, Phase: PhaseSealed, Cached: b.Cached})
	return &Sealed{Digest: b.Digest, Disk: b.Disk, Kernel: b.Kernel, Initrd: b.Initrd, Cmdline: b.Cmdline,
		Size: b.Size, User: img.User, Cached: b.Cached}, nil
}

// find returns the image of a spec, or nil if it has to be made, because it is missing or damaged.
func (s *Store) find(kind, spec string) (*manifest, error) {
	m, err := s.shelf.follow(kind, spec)
	if errors.Is(err, errMissing) {
		if err != errMissing { //nolint:errorlint // wrapped, it says what is damaged
			s.log().Warn("an existing image is damaged; rebuilding it", "reason", err)
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
