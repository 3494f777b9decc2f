package fleet

import (
	"context"
	"crypto/ed25519"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
	"golang.org/x/crypto/ssh"

	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// create makes a worker, whose record exists, and returns once it is running. It does not clean up after a failure; the caller does (see
// end).
func (g *Group) create(w *worker) error {
	patience := time.Duration(g.pool.StartTimeout)
	var err error
	if w.first, err = g.pace.wait(w.ctx); err != nil {
		return err
	}
	sealed, err := g.sealedFor(w, patience)
	if err != nil {
		return err
	}
	select {
	case g.turn <- struct{}{}:
	default:
		select {
		case g.turn <- struct{}{}:
		case <-w.ctx.Done():
			return context.Cause(w.ctx)
		}
		// It may have waited for minutes, in which a refresh may have replaced and removed this image.
		if sealed, err = g.sealedFor(w, patience); err != nil {
			<-g.turn
			return err
		}
	}
	defer func() { <-g.turn }()
	// Time spent waiting for a turn does not count against start_timeout.
	begin := time.Now()
	ctx, cancel := context.WithTimeoutCause(w.ctx, patience, errStartTimeout)
	defer cancel()
	b := &boot{g: g, w: w, sealed: sealed, took: map[string]int64{}}
	steps := []struct {
		phase, name string
		do          func(context.Context) error
	}{
		{"clone", "make its folders and key", b.folders},
		{"clone", "clone the image", b.clone},
		{"clone", "write its seed", b.seed},
		{"boot", "start its VM", b.start},
		{"ready", "wait for its guest", b.ready},
	}
	for _, s := range steps {
		start := time.Now()
		err := s.do(ctx)
		b.took[s.phase] += time.Since(start).Microseconds()
		if cause := context.Cause(ctx); cause != nil {
			// The cause says more than a step's error about a context that has ended.
			if errors.Is(cause, errStartTimeout) {
				return &startError{s.name, fmt.Errorf("%w: start_timeout = %s ran out%s", cause, patience, detail(ctx, err))}
			}
			return cause
		}
		if err != nil {
			return &startError{s.name, err}
		}
	}
	// From here on the record marks it as running, and Shutdown keeps it.
	if err := g.writeRecord(w, sealed); err != nil {
		return &startError{"write its record", err}
	}
	if !g.setRunning(w) {
		return context.Cause(w.ctx)
	}
	g.log.Info("worker ready", "worker", w.id, "phase", "worker", "ms", ms(w.created),
		"wait_ms", begin.Sub(w.created).Milliseconds(), "clone_ms", b.took["clone"]/1000,
		"boot_ms", b.took["boot"]/1000, "ready_ms", b.took["ready"]/1000,
		"tap", w.slot.TAP, "address", w.slot.Address.String(), "image", sealed.Digest)
	return nil
}

// sealedFor waits for the image that the worker is cloned from.
func (g *Group) sealedFor(w *worker, patience time.Duration) (*image.Sealed, error) {
	sealed, err := g.sealed.get(w.ctx, patience)
	if cause := context.Cause(w.ctx); err != nil && cause != nil {
		return nil, cause
	}
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	w.image = sealed.Digest
	g.mu.Unlock()
	return sealed, nil
}

// detail returns what a timed-out step reported besides the timeout.
func detail(ctx context.Context, err error) string {
	if err == nil || err.Error() == ctx.Err().Error() {
		return ""
	}
	return ": " + err.Error()
}

// setRunning marks the worker as running, unless it was deleted meanwhile.
func (g *Group) setRunning(w *worker) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if w.state != provider.StateCreating {
		return false
	}
	w.state = provider.StateRunning
	return true
}

// boot is the start of one worker's VM.
type boot struct {
	g      *Group
	w      *worker
	sealed *image.Sealed
	public string // authorized_keys line
	took   map[string]int64
}

// folders creates the worker's private folders and its key. The key is next to the record, never in it: in a
// folder that only this user may enter, on a file system that does not survive a power cut.
func (b *boot) folders(context.Context) error {
	public, private, err := newKey(b.w.id)
	if err != nil {
		return err
	}
	b.public, b.w.key = public, private
	// Mkdir, not MkdirAll: an existing directory belongs to another worker.
	if err := os.Mkdir(b.g.runDir(b.w.id), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(b.g.keyPath(b.w.id), private, 0o600); err != nil {
		return err
	}
	if err := os.Mkdir(b.g.vmDir(b.w.id), 0o700); err != nil {
		return err
	}
	return os.Mkdir(b.g.cloneDir(b.w.id), 0o700)
}

func (b *boot) disk() string    { return filepath.Join(b.g.cloneDir(b.w.id), "disk.raw") }
func (b *boot) seedISO() string { return filepath.Join(b.g.cloneDir(b.w.id), "seed.iso") }

// clone makes the disk. If the pool's disk size is smaller than the image, the disk has the image's size.
func (b *boot) clone(ctx context.Context) error {
	return b.g.images.Clone(ctx, b.sealed, b.disk(), max(b.g.pool.Disk, b.sealed.Size))
}

// seed writes the seed's ISO. Like the clone next to it, it need not survive the machine, so there is no fsync.
func (b *boot) seed(context.Context) (err error) {
	s := b.g.plan.WorkerSeed(b.g.pool, b.w.slot, b.w.id, b.public)
	f, err := os.OpenFile(b.seedISO(), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return s.WriteISO(f)
}

// start boots the VM.
func (b *boot) start(ctx context.Context) error {
	p, pool := b.g.plan, b.g.pool
	cfg := vm.Config{
		ID:      b.w.id,
		Dir:     b.g.vmDir(b.w.id),
		CPUs:    pool.CPUs,
		Memory:  pool.Memory,
		Kernel:  b.sealed.Kernel,
		Initrd:  b.sealed.Initrd,
		Cmdline: b.sealed.Cmdline,
		Disks: []vm.Disk{
			{Path: b.disk(), Serial: "root"},
			{Path: b.seedISO(), ReadOnly: true, Serial: "seed"},
		},
		Net:    &vm.Net{TAP: b.w.slot.TAP, MAC: p.Network.GuestMAC, Queues: b.w.slot.Queues},
		Limits: vm.Limits(pool.Limits),
	}
	if pool.Console {
		cfg.Console = b.g.consolePath(b.w.id)
	}
	v, err := b.w.driver.Start(ctx, cfg)
	if err != nil {
		return err
	}
	b.g.mu.Lock()
	b.w.vm = v
	b.g.mu.Unlock()
	return nil
}

// ready waits until the worker accepts jobs or its VM has ended.
func (b *boot) ready(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-b.w.vm.Done():
			cancel(exited(b.w.vm))
		case <-ctx.Done():
		}
	}()
	err := b.g.waitReady(ctx, b.g, b.w, b.sealed)
	cause := context.Cause(ctx)
	cancel(nil)
	<-watched
	select {
	case <-b.w.vm.Done():
		return exited(b.w.vm)
	default:
	}
	if err != nil && cause != nil && !errors.Is(err, cause) {
		return fmt.Errorf("%w (%w)", err, cause)
	}
	return err
}

// newKey returns a key pair for one worker: the public half as a line of authorized_keys, the private one in OpenSSH's PEM format.
func newKey(id string) (public string, private []byte, err error) {
	pub, priv, err := ed25519.GenerateKey(nil)
	if err != nil {
		return "", nil, err
	}
	sshPub, err := ssh.NewPublicKey(pub)
	if err != nil {
		return "", nil, err
	}
	block, err := ssh.MarshalPrivateKey(priv, id)
	if err != nil {
		return "", nil, err
	}
	line := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(sshPub))) + " " + id
	return line, pem.EncodeToMemory(block), nil
}
