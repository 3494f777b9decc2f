// Package image makes what workers are cloned from: fetch, verify, convert,
// prebuild, seal, clone, prune. It never starts a worker and never copies a disk
// where it was asked to clone one.
//
// All that it keeps is content-addressed and lies below Paths.Images, on the file system that the clones are on:
//
//	base/DIGEST/      disk, kernel, initrd, manifest.json: a source, fetched, verified and converted to raw
//	sealed/DIGEST/    the same four: a base after its prebuild, read-only
//	refs/SPEC         a link to the base or sealed image that a spec's digest stands for today
//	locks/SPEC        one builder at a time, across processes
//
// and downloads below Paths.Cache. Something with a name is whole: it is built
// under a temporary name beside it, flushed and renamed.
package image

import (
	"context"
	"errors"
	"log/slog"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// Options of a Store.
type Options struct {
	Log *slog.Logger // nil: slog.Default()
	// Driver boots the prebuild VMs. A Store without one gives bases, and sealed images that are there already.
	Driver vm.Driver
	// GuestBinary is the static fleetingd that is put into the image. Empty: this program (os.Executable).
	GuestBinary string
	// Progress may be nil. It is called from the goroutine that builds, and must not block.
	Progress func(Progress)
}

// Phase is a part of making an image, in the order that they happen.
type Phase string

// The phases. A phase that is not needed is not reported.
const (
	PhaseDownload Phase = "download" // Done and Total are bytes
	PhaseVerify   Phase = "verify"
	PhaseConvert  Phase = "convert"
	PhaseBuild    Phase = "build"    // the debian source; Line is mmdebstrap's output
	PhaseBase     Phase = "base"     // the base is there: Cached says that nothing was done for it
	PhasePrebuild Phase = "prebuild" // Line is a step's output
	PhaseSeal     Phase = "seal"
	PhaseSealed   Phase = "sealed" // the sealed image is there: Cached as above
)

// Progress is one event while an image is made.
type Progress struct {
	Image string
	Phase Phase
	Item  string // what is downloaded, or the step
	Done  int64  // bytes; Total is 0 where unknown
	Total int64
	// Line is one line of output; what came from a guest is already escaped for a terminal.
	Line   string
	Cached bool
}

// Store makes and keeps the images of one Plan. All methods may be called at the
// same time, by several processes too.
type Store struct {
	plan *plan.Plan
	opts Options
}

// Base is a source made usable: fetched, verified, raw. Its files are read-only.
type Base struct {
	Digest  string
	Disk    string // raw
	Kernel  string
	Initrd  string // may be empty
	Cmdline string
	Size    int64 // bytes of Disk, sparse
}

// Sealed is an image that workers are cloned from. Its files are read-only.
type Sealed struct {
	Digest  string
	Disk    string // raw
	Kernel  string
	Initrd  string // may be empty
	Cmdline string
	Size    int64 // bytes of Disk, sparse: what a clone has at least
	Guest   bool  // the guest part is inside: readiness comes over the channel
	User    string
	Cached  bool // it was there: this call built nothing
}

var errNotYet = errors.New("image: not built yet")

// Open checks the Plan's folders for images and makes what is missing of them.
func Open(p *plan.Plan, o Options) (*Store, error) {
	return &Store{plan: p, opts: o}, nil
}

// EnsureBase gives the base of an image, and makes it where there is none. The
// debian source can be made by root only; the error says so.
func (s *Store) EnsureBase(ctx context.Context, img *plan.Image) (*Base, error) {
	return nil, errNotYet
}

// Ensure gives the sealed image of a spec, and makes it where there is none: base, prebuild, seal. One caller
// on the host builds, the others wait and find it. Where it is there already nothing is fetched, and no network is needed.
// A failed step is a *guest.StepError.
func (s *Store) Ensure(ctx context.Context, img *plan.Image) (*Sealed, error) {
	return nil, errNotYet
}

// Refresh looks whether the source has changed, builds beside the image in use, and swaps: the next Ensure gives the
// new one. Where nothing changed it gives the one in use.
func (s *Store) Refresh(ctx context.Context, img *plan.Image) (*Sealed, error) {
	return nil, errNotYet
}

// Clone makes dst a clone of the sealed disk, mode 0600, grown to size bytes: FICLONE, so constant time at any size. It never copies:
// where the file system cannot clone that is an error, and dst is not there.
func (s *Store) Clone(ctx context.Context, img *Sealed, dst string, size int64) error {
	return errNotYet
}

// Prune removes images that no spec of the Plan stands for and that are not in use, and what interrupted builds left. It
// returns the digests that it removed. A clone holds its own blocks and needs no sealed image, so inUse matters only
// for what a VM is about to boot.
func (s *Store) Prune(ctx context.Context, inUse func(digest string) bool) ([]string, error) {
	return nil, errNotYet
}

// CanClone says why files in dir cannot be cloned, and nil where they can: it tries.
func CanClone(dir string) error {
	return errNotYet
}
