// Package hostlab makes throw-away Debian hosts: virtual machines with systemd, nftables, cgroup v2, landlock and a
// KVM that really runs guests, emulated by QEMU so that they are the same on every machine. Tests and people can do to them what
// they must not do to their own machine: apply a host, reboot it, cut its power.
//
// It does not depend on fleetingd, and other packages import it only in tests. It only uses the standard library;
// for SSH it uses OpenSSH's client, with one shared connection, so that a command costs milliseconds.
package hostlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// Options describe the host; the zero value is useful.
type Options struct {
	Memory int64             // bytes; 0 is 4 GiB. It is allocated as the lab uses it
	CPUs   int               // 0 is 2
	Disks  []int64           // sizes in bytes of blank disks: /dev/vdb, /dev/vdc, …
	Files  map[string]string // copied into the lab once it is up: path in the lab → local file or folder
	Cache  string            // folder for the base image; "" is .cache next to the go.mod above the working folder
	Log    io.Writer         // gets the progress of the first, slow build; may be nil
}

// Lab is one host. Its methods may be called concurrently, except PowerCut, Boot, Reboot and Close.
type Lab struct {
	// Dir is the lab's private folder on this machine; Close removes it.
	Dir string

	opts    Options
	base    base
	lock    *os.File
	qemu    *process
	monitor io.WriteCloser // QEMU's monitor, if it uses its standard input
	port    int
	heard   int64 // bytes of the ready file that belong to earlier boots

	mu     sync.Mutex
	master *process // the SSH connection that all commands share
}

// bootDeadline limits one boot, on a busy machine; an idle one needs a tenth of it.
const bootDeadline = 5 * time.Minute

// Start returns a running host. The first Start on a machine builds the base image from Debian's packages, which needs
// root, mmdebstrap and a Debian mirror, and takes two minutes; the first with these Options boots it. Every other takes
// seconds: it continues from the memory that the first had saved. The caller ends the host with Close; if the
// process dies first, the kernel ends it.
func Start(ctx context.Context, opts Options) (*Lab, error) {
	if opts.Memory == 0 {
		opts.Memory = 4 << 30
	}
	if opts.CPUs == 0 {
		opts.CPUs = 2
	}
	if opts.Log == nil {
		opts.Log = io.Discard
	}
	if opts.Cache == "" {
		var err error
		if opts.Cache, err = defaultCache(); err != nil {
			return nil, err
		}
	}
	cache, err := filepath.Abs(opts.Cache)
	if err != nil {
		return nil, err
	}
	cache = filepath.Join(cache, "hostlab")
	base, err := buildOnce(ctx, cache, opts.Log)
	if err != nil {
		return nil, err
	}
	booted, err := bootOnce(ctx, cache, base, opts)
	if err != nil {
		return nil, err
	}
	l := &Lab{opts: opts, base: base}
	if l.Dir, l.lock, err = newRunDir(ctx, cache); err != nil {
		return nil, err
	}
	if err := l.wake(ctx, booted); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *Lab) wake(ctx context.Context, b booted) error {
	for i := range l.disks() {
		if err := overlay(ctx, l.disk(i), b.disk(i), "qcow2"); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, bootDeadline)
	defer cancel()
	if err := l.on(ctx, "-monitor", "stdio", "-incoming", "file:"+b.memory()); err != nil {
		return err
	}
	if err := l.awake(ctx); err != nil {
		return err
	}
	if err := l.connect(ctx); err != nil {
		return errors.Join(err, l.died())
	}
	// Its clock stopped when it was cached.
	if _, err := l.Sh(ctx, fmt.Sprintf("date --set=@%d >/dev/null", time.Now().Unix())); err != nil {
		return err
	}
	for remote, local := range l.opts.Files {
		if err := l.Copy(ctx, local, remote); err != nil {
			return err
		}
	}
	return nil
}

// ForTest is Start for a test: failures are fatal, the lab ends with the test, and its console is logged if the test
// fails. The caller has to call need.VM first.
func ForTest(t testing.TB, opts Options) *Lab {
	t.Helper()
	if opts.Log == nil {
		opts.Log = t.Output()
	}
	l, err := Start(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the lab's console ends with:\n%s", l.Console(80))
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

// Boot starts a host that is off, and returns once sshd answers.
func (l *Lab) Boot(ctx context.Context) error {
	if l.running() {
		return errors.New("hostlab: Boot: the host is already on")
	}
	ctx, cancel := context.WithTimeout(ctx, bootDeadline)
	defer cancel()
	return l.boot(ctx)
}

func (l *Lab) boot(ctx context.Context, args ...string) error {
	l.heard = size(l.readyFile())
	err := l.on(ctx, args...)
	if err == nil {
		err = l.waitReady(ctx)
	}
	if err != nil {
		return errors.Join(err, l.PowerCut())
	}
	return nil
}

// waitReady waits for the line that hostlab-ready.service writes at each boot, then connects.
func (l *Lab) waitReady(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if b, err := os.ReadFile(l.readyFile()); err == nil && int64(len(b)) > l.heard &&
			bytes.Contains(b[l.heard:], []byte("ready ")) && bytes.HasSuffix(b, []byte("\n")) {
			l.heard = int64(len(b))
			return l.connect(ctx)
		}
		select {
		case <-l.qemu.done:
			return l.died()
		case <-ctx.Done():
			return fmt.Errorf("hostlab: the host is not up: %w; its console ends with:\n%s", ctx.Err(), l.Console(60))
		case <-tick.C:
		}
	}
}

// Reboot restarts the host gracefully, like `systemctl reboot`, and returns once sshd answers again.
func (l *Lab) Reboot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootDeadline)
	defer cancel()
	// The result does not matter: the connection may close before the answer comes.
	if _, err := l.Run(ctx, "systemctl", "reboot"); err != nil && !errors.Is(err, ErrConnection) {
		return err
	}
	return l.waitReady(ctx)
}

// PowerCut stops the host as a power cut does: nothing is written back. What the guest has flushed (fsync) is on its
// disks; the rest may or may not be. Boot starts the host again with the same disks. If the host is already off,
// PowerCut succeeds.
func (l *Lab) PowerCut() error {
	l.disconnect()
	if l.qemu == nil {
		return nil
	}
	l.qemu.kill()
	return nil
}

// Close stops the host and removes everything except the cached base image.
func (l *Lab) Close() error {
	err := errors.Join(l.PowerCut(), os.RemoveAll(l.Dir))
	l.lock.Close()
	return err
}

// Console returns the last lines that the host wrote to its serial console, over all boots; 0 returns all of them.
func (l *Lab) Console(lines int) string {
	b, err := os.ReadFile(l.consoleFile())
	if err != nil {
		return err.Error()
	}
	return tail(string(b), lines)
}

func (l *Lab) running() bool { return l.qemu != nil && l.qemu.running() }
