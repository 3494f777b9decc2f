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

	"github.com/fleetingd/fleetingd/appliance/guest"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/appliance/visible"
	"github.com/fleetingd/fleetingd/appliance/vm"
	"github.com/fleetingd/fleetingd/seed"
)

// guestName is the guest part's name on the prebuild's seed ISO.
const guestName = "fleetingd"

// poweroffTimeout is how long a sealed guest may take to power off. It has nothing left to do.
const poweroffTimeout = 2 * time.Minute

// sealedInputs are what the digest of a sealed image is computed from. They do not include the seed's network, which sealing removes. One
// more worker on a host, which changes the build slot's address, must not rebuild its images.
type sealedInputs struct {
	Format int         `json:"format"`
	Base   string      `json:"base"` // the base's digest; for a spec's digest, that of the source
	Steps  []plan.Step `json:"steps"`
	Seed   seed.Seed   `json:"seed"`
	Guest  string      `json:"guest"` // SHA-256 of the guest part
	User   string      `json:"user"`
	Size   int64       `json:"size"` // bytes of the disk; 0: the base's
}

func (s *Store) sealedInputs(ctx context.Context, img *plan.Image, base string) (sealedInputs, error) {
	digest, err := hashFile(ctx, s.opts.GuestBinary, s.plan.Paths.Cache, nil)
	if err != nil {
		return sealedInputs{}, fmt.Errorf("the guest part: %w", err)
	}
	in := sealedInputs{
		Format: formatVersion, Base: base, Steps: img.Prebuild.Steps, Seed: img.Prebuild.Seed,
		Guest: digest, User: img.User, Size: s.needs(img).disk,
	}
	in.Seed.Network = nil
	return in, nil
}

// sealedSpec returns the digest of an image as the spec describes it.
func (s *Store) sealedSpec(ctx context.Context, img *plan.Image) (string, error) {
	base, err := s.baseSpec(ctx, img)
	if err != nil {
		return "", err
	}
	in, err := s.sealedInputs(ctx, img, base)
	if err != nil {
		return "", err
	}
	digest, _, err := digestOf(in)
	return digest, err
}

// needs is what an image's pools need together.
type needs struct {
	cpus   int
	memory int64 // bytes
	disk   int64 // bytes; 0: no pool uses the image
}

// needs returns the largest number of CPUs, the largest memory and the smallest disk of the image's pools. A clone cannot be smaller than
// its image; a larger one grows at its first boot.
func (s *Store) needs(img *plan.Image) needs {
	n := needs{cpus: 1, memory: 1 << 30}
	for _, p := range s.plan.Pools {
		if p.Image != img.Name {
			continue
		}
		n.cpus, n.memory = max(n.cpus, p.CPUs), max(n.memory, p.Memory)
		if n.disk == 0 || p.Disk < n.disk {
			n.disk = p.Disk
		}
	}
	return n
}

// seal returns the sealed image of a base, and prebuilds it if there is none.
func (s *Store) seal(ctx context.Context, img *plan.Image, base *Base) (_ *manifest, cached bool, err error) {
	in, err := s.sealedInputs(ctx, img, base.Digest)
	if err != nil {
		return nil, false, err
	}
	digest, inputs, err := digestOf(in)
	if err != nil {
		return nil, false, err
	}
	return s.shelf.make(ctx, kindSealed, digest, func(d *draft) (*manifest, error) {
		if s.opts.Driver == nil {
			return nil, errors.New("it is not prebuilt yet, and this command starts no VMs")
		}
		b := &prebuild{Store: s, img: img, base: base, draft: d, size: max(in.Size, base.Size)}
		if in.Size != 0 && in.Size < base.Size {
			return nil, fmt.Errorf("its disk is %s, but one of its pools has a disk of only %s: make that larger",
				bytesText(base.Size), bytesText(in.Size))
		}
		if err := b.run(ctx); err != nil {
			if _, ok := errors.AsType[*guest.StepError](err); ok {
				return nil, err // the error says "prebuild step"
			}
			return nil, fmt.Errorf("prebuild: %w", err)
		}
		return &manifest{Image: img.Name, Cmdline: base.Cmdline, Guest: true, User: img.User, Inputs: inputs}, nil
	})
}

// prebuild is one run of an image's steps in a VM.
type prebuild struct {
	*Store
	img   *plan.Image
	base  *Base
	draft *draft
	size  int64 // bytes of the disk
	steps []guest.Step
	mask  *strings.Replacer // removes secrets from the guest's output
}

// The other files of a prebuild VM, which do not become part of the image.
const (
	seedFile    = "seed.iso"
	exportFile  = "export.raw"
	consoleFile = "console.log"
)

// run boots the base, runs the steps, and leaves disk, kernel and initrd of the sealed image in the draft. When it returns, the VM has
// ended.
func (b *prebuild) run(ctx context.Context) (err error) {
	timeout := time.Duration(b.img.Prebuild.Timeout)
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("the prebuild exceeded its timeout of %v", timeout))
	defer cancel()
	slot := b.plan.BuildSlot(b.img)
	// A TAP serves one VM. Another spec's prebuild may have the same slot.
	lock, err := b.shelf.lock(ctx, "slot-"+slot.TAP)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Unlock()) }()
	// This comes first, so that a missing secret does not cost a boot.
	if b.steps, b.mask, err = b.guestSteps(); err != nil {
		return err
	}
	if err := b.prepare(); err != nil {
		return err
	}
	dir, err := b.runDir(ctx, slot)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	began := time.Now()
	b.log().Info("prebuild started", "image", b.img.Name, "steps", len(b.img.Prebuild.Steps))
	export, err := b.boot(ctx, b.config(dir, slot))
	if err != nil {
		return err
	}
	if err := b.takeExport(export); err != nil {
		return err
	}
	if err := b.unpackKernel(); err != nil {
		return err
	}
	b.log().Info("prebuild finished", "image", b.img.Name, "took", time.Since(began).Round(time.Millisecond))
	return nil
}

// prepare makes the VM's disks.
func (b *prebuild) prepare() error {
	if err := cloneDisk(b.base.Disk, b.draft.path(diskFile), b.size); err != nil {
		return err
	}
	binary, err := os.ReadFile(b.opts.GuestBinary)
	if err != nil {
		return fmt.Errorf("the guest part: %w", err)
	}
	s := b.img.Prebuild.Seed
	s.Extra = map[string][]byte{guestName: binary}
	if err := s.ISOFile(b.draft.path(seedFile), 0o600); err != nil {
		return err
	}
	out, err := os.OpenFile(b.draft.path(exportFile), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(out.Truncate(guest.ExportSize), out.Close())
}

// runDir makes the VM's private folder.
func (b *prebuild) runDir(ctx context.Context, slot plan.Slot) (string, error) {
	dir := b.vmDir(slot)
	if err := b.endCutOff(ctx, dir); err != nil {
		return "", err
	}
	if err := os.MkdirAll(b.plan.Paths.Run, 0o750); err != nil {
		return "", err
	}
	return dir, os.Mkdir(dir, 0o700)
}

func (s *Store) vmDir(slot plan.Slot) string {
	return filepath.Join(s.plan.Paths.Run, "prebuild-"+slot.TAP)
}

// endCutOff ends the VM of a prebuild whose fleetingd was killed. It still holds the TAP.
func (s *Store) endCutOff(ctx context.Context, dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	left, err := s.opts.Driver.Adopt(ctx, dir)
	if err == nil {
		s.log().Warn("ending the VM of an interrupted prebuild", "pid", left.PID())
		err = left.Kill()
	}
	if err != nil && !errors.Is(err, vm.ErrNotRunning) {
		return fmt.Errorf("end the VM of an interrupted prebuild: %w", err)
	}
	return os.RemoveAll(dir)
}

// EndPrebuilds cleans up after this Plan's prebuilds whose fleetingd was killed. The next prebuild would do so, but there may be none. It
// does not touch prebuilds in progress.
func (s *Store) EndPrebuilds(ctx context.Context) error {
	if err := s.own(); err != nil {
		return err
	}
	var errs []error
	for i := range s.plan.Images {
		if s.plan.Images[i].Prebuild == nil {
			continue
		}
		slot := s.plan.BuildSlot(&s.plan.Images[i])
		lock, err := state.TryLock(s.shelf.lockPath("slot-" + slot.TAP))
		if errors.Is(err, state.ErrLocked) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, s.endCutOff(ctx, s.vmDir(slot)), lock.Unlock())
	}
	return errors.Join(errs...)
}

func (b *prebuild) config(dir string, slot plan.Slot) vm.Config {
	n := b.needs(b.img)
	return vm.Config{
		ID: "prebuild-" + slot.TAP, Dir: dir,
		CPUs: max(n.cpus, slot.Queues), Memory: n.memory,
		Kernel: b.base.Kernel, Initrd: b.base.Initrd, Cmdline: b.base.Cmdline,
		Disks: []vm.Disk{
			{Path: b.draft.path(diskFile)},
			{Path: b.draft.path(seedFile), ReadOnly: true},
			{Path: b.draft.path(exportFile), Serial: guest.ExportSerial},
		},
		Net:     &vm.Net{TAP: slot.TAP, MAC: b.plan.Network.GuestMAC, Queues: slot.Queues},
		Console: b.draft.path(consoleFile),
	}
}

// boot runs the VM from its start to its end.
func (b *prebuild) boot(ctx context.Context, cfg vm.Config) (_ guest.Export, err error) {
	machine, err := b.opts.Driver.Start(ctx, cfg)
	if err != nil {
		return guest.Export{}, err
	}
	defer func() {
		if err == nil {
			err = machine.Stop(ctx) // it has powered off; this cleans up after it
		} else {
			err = errors.Join(err, machine.Kill())
		}
	}()
	session := guest.NewSession(machine.Channel, guest.Options{Log: b.log()})
	defer session.Close()
	out := &lines{emit: func(text string) {
		b.report(Progress{Image: b.img.Name, Phase: PhasePrebuild, Line: b.mask.Replace(text)})
	}}
	b.report(Progress{Image: b.img.Name, Phase: PhasePrebuild})
	if err := session.Prebuild(ctx, b.steps, out); err != nil {
		return guest.Export{}, b.explain(ctx, machine, err)
	}
	b.report(Progress{Image: b.img.Name, Phase: PhaseSeal})
	export, err := session.Seal(ctx)
	if err != nil {
		return guest.Export{}, b.explain(ctx, machine, err)
	}
	select {
	case <-machine.Done():
		if !errors.Is(machine.Exit(), vm.ErrPoweredOff) {
			return guest.Export{}, b.explain(ctx, machine, errors.New("the sealed guest did not power off by itself"))
		}
		return export, nil
	case <-ctx.Done():
		return guest.Export{}, b.explain(ctx, machine, context.Cause(ctx))
	case <-time.After(poweroffTimeout):
		err := fmt.Errorf("the sealed guest did not power off within %v", poweroffTimeout)
		return guest.Export{}, b.explain(ctx, machine, err)
	}
}

// explain adds details to an error: the VM's exit, and the console's last lines. For a failed step, its own last lines say more than the
// console does.
func (b *prebuild) explain(ctx context.Context, machine vm.VM, err error) error {
	if step, ok := errors.AsType[*guest.StepError](err); ok {
		step.Reason = b.mask.Replace(step.Reason)
		for i := range step.Tail {
			step.Tail[i] = b.mask.Replace(step.Tail[i])
		}
		return err
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w: %w", cause, err)
	}
	select {
	case <-machine.Done():
		err = fmt.Errorf("%w; the VM ended: %w", err, machine.Exit())
	default:
	}
	// A missing console adds nothing.
	console, _ := state.Tail(b.draft.path(consoleFile), 8<<10)
	if last := visible.LastLines(string(console), lastLines); len(last) > 0 {
		err = fmt.Errorf("%w; the guest's console ends with:\n  %s", err, b.mask.Replace(strings.Join(last, "\n  ")))
	}
	return err
}

// takeExport puts kernel and initrd of the sealed guest into the draft: those that it exported, or else the base's.
func (b *prebuild) takeExport(e guest.Export) error {
	if e.Bytes == 0 {
		b.log().Warn("the guest exported no kernel; keeping the base's", "image", b.img.Name, "reason", e.Reason)
		return b.keepKernel()
	}
	f, err := os.Open(b.draft.path(exportFile))
	if err != nil {
		return err
	}
	defer f.Close()
	dir := b.draft.path("export")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := guest.ReadExport(f, dir, e); err != nil {
		return err
	}
	return errors.Join(
		os.Rename(filepath.Join(dir, guest.ExportKernel), b.draft.path(kernelFile)),
		os.Rename(filepath.Join(dir, guest.ExportInitrd), b.draft.path(initrdFile)))
}

func (b *prebuild) keepKernel() error {
	if err := copyFile(b.base.Kernel, b.draft.path(kernelFile)); err != nil || b.base.Initrd == "" {
		return err
	}
	return copyFile(b.base.Initrd, b.draft.path(initrdFile))
}

// unpackKernel unpacks the kernel once, instead of at every boot.
func (b *prebuild) unpackKernel() error {
	path := b.draft.path(kernelFile)
	packed, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	kernel, err := vmlinux(packed)
	if err != nil {
		b.log().Debug("the kernel is left as it is", "image", b.img.Name, "reason", err)
		return nil
	}
	return os.WriteFile(path, kernel, 0o644)
}
