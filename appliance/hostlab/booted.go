package hostlab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// booted is a folder of the cache with a host that was running: its memory, and its disks at that moment. Labs continue from
// there, since an emulated boot costs a minute of CPU.
type booted struct{ dir string }

func (b booted) memory() string    { return filepath.Join(b.dir, "memory") }
func (b booted) disk(i int) string { return (&Lab{Dir: b.dir}).disk(i) }

// bootOnce returns the booted host for the options from the cache, and boots it first if it is missing.
func bootOnce(ctx context.Context, cache string, base base, opts Options) (booted, error) {
	// A memory image only fits the same machine in the same QEMU.
	version, err := base.qemuVersion()
	if err != nil {
		return booted{}, err
	}
	h := sha256.New()
	fmt.Fprintln(h, version, base.dir, opts.Disks, (&Lab{opts: opts, base: base}).qemuArgs())
	b := booted{filepath.Join(cache, "booted-"+hex.EncodeToString(h.Sum(nil))[:16])}
	return b, makeOnce(ctx, cache, b.dir, func(tmp string) error {
		fmt.Fprintf(opts.Log, "hostlab: the first boot with %d CPUs, %d MiB and %d disks; later ones go on from its memory\n",
			opts.CPUs, opts.Memory>>20, len(opts.Disks))
		start := time.Now()
		if err := os.Chmod(tmp, 0o700); err != nil { // a guest's memory
			return fmt.Errorf("hostlab: %w", err)
		}
		if err := boot(ctx, booted{tmp}, base, opts); err != nil {
			return err
		}
		fmt.Fprintf(opts.Log, "hostlab: booted in %s\n", time.Since(start).Round(time.Second))
		return nil
	})
}

func boot(ctx context.Context, b booted, base base, opts Options) (err error) {
	l := &Lab{Dir: b.dir, opts: opts, base: base}
	defer func() { err = errors.Join(err, l.PowerCut()) }()
	if err := overlay(ctx, l.disk(0), base.disk(), "raw"); err != nil {
		return err
	}
	for i, size := range opts.Disks {
		if err := run(ctx, "qemu-img", "create", "-q", "-f", "qcow2", l.disk(i+1), fmt.Sprint(size)); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, bootDeadline)
	defer cancel()
	if err := l.boot(ctx, "-monitor", "stdio"); err != nil {
		return err
	}
	// Up means fully booted, and with an earlier session of sshd, so that its pages are in memory.
	r, err := l.Run(ctx, "systemctl", "is-system-running", "--wait")
	if err != nil {
		return err
	}
	if r.ExitCode != 0 {
		return fmt.Errorf("hostlab: the host is %q after its boot; its console ends with:\n%s", strings.TrimSpace(r.Stdout), l.Console(60))
	}
	l.disconnect()
	return l.saveMemory(ctx)
}

var migrated = regexp.MustCompile(`(?i)status:\s+completed`)

// saveMemory writes the running host's memory to a file and ends QEMU, which has flushed the host's disks
// by then.
func (l *Lab) saveMemory(ctx context.Context) error {
	// In the human monitor, "migrate" returns when it is done, and commands run one after another.
	if _, err := fmt.Fprint(l.monitor, "migrate file:memory\ninfo migrate\nquit\n"); err != nil {
		return fmt.Errorf("hostlab: QEMU's monitor: %w", err)
	}
	select {
	case <-l.qemu.done:
	case <-ctx.Done():
		return fmt.Errorf("hostlab: saving the host's memory: %w", ctx.Err())
	}
	log, err := os.ReadFile(l.qemuLog())
	if err != nil {
		return fmt.Errorf("hostlab: %w", err)
	}
	if !migrated.Match(log) {
		return fmt.Errorf("hostlab: the host's memory was not saved:\n%s", tail(string(log), 20))
	}
	return nil
}

// awake waits until QEMU has read the memory and the host is running. A connection made earlier would lose its first packet,
// which QEMU's network only repeats after six seconds.
func (l *Lab) awake(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		// If QEMU has ended, its pipe is closed; the check of done below notices.
		_, _ = fmt.Fprintln(l.monitor, "info status")
		select {
		case <-l.qemu.done:
			return l.died()
		case <-ctx.Done():
			return fmt.Errorf("hostlab: the host did not wake up: %w", ctx.Err())
		case <-tick.C:
		}
		if log, err := os.ReadFile(l.qemuLog()); err == nil && bytes.Contains(log, []byte("VM status: running")) {
			return nil
		}
	}
}
