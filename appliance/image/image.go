// Package image makes what workers are cloned from: fetch, verify, convert,
// prebuild, seal, clone, prune. It never starts a worker and never
// copies a disk where it was asked to clone one.
package image

// The package's face to fleet and to the CLI:
//
//	type Options struct {
//		Log         *slog.Logger
//		Driver      vm.Driver
//		GuestBinary string              // the static fleetingd that goes into the image (os.Executable)
//		Progress    func(Progress)      // may be nil: phases, bytes, step output
//	}
//	func Open(p *plan.Plan, o Options) (*Store, error)
//	func (s *Store) EnsureBase(ctx, *plan.Image) (*Base, error)     // fetched, verified, raw; what needs root for `debian`
//	func (s *Store) Ensure(ctx, *plan.Image, size Resources) (*Sealed, error) // base + prebuild + seal, once per host (flock)
//	func (s *Store) Refresh(ctx, *plan.Image) (*Sealed, error)      // beside the one in use, then swapped
//	func (s *Store) Clone(ctx, *Sealed, dst string, bytes int64) error // FICLONE, then grown
//	func (s *Store) Prune(ctx, inUse func(digest string) bool) error

// Sealed is an image that workers are cloned from.
type Sealed struct {
	Digest  string
	Disk    string // read-only raw file
	Kernel  string
	Initrd  string
	Cmdline string
	Guest   bool // the guest part is inside: readiness comes over the channel
	User    string
}
