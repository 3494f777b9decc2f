// Package hostlab makes throw-away Debian hosts: a virtual machine with systemd, nftables, cgroup v2, landlock and a
// KVM that really runs guests, emulated by QEMU so that it is the same on every machine. Tests and people do to it what
// must not be done to the machine they sit at: apply a host, reboot it, cut its power.
//
// It knows nothing of fleetingd, and no other package imports it outside of its tests. Only the standard library is
// used; SSH is OpenSSH's client, whose one shared connection makes a command cost milliseconds.
package hostlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Options say what the host is like; the zero value is a useful one.
type Options struct {
	Memory int64             // bytes; 0 is 4 GiB. It is taken from this machine as the lab uses it
	CPUs   int               // 0 is 2
	Disks  []int64           // sizes in bytes of blank disks: /dev/vdb, /dev/vdc, …
	Files  map[string]string // copied in once it is up: path in the lab → local file or folder
	Cache  string            // folder for the base image; "" is .cache beside the go.mod above the working folder
	Log    io.Writer         // progress of the first, slow build; nil is nowhere
}

// Lab is one host. Its methods may be called at the same time, but for PowerCut, Boot, Reboot and Close.
type Lab struct {
	// Dir is the lab's private folder on this machine; Close removes it.
	Dir string

	opts  Options
	base  base
	lock  *os.File
	qemu  *process
	port  int
	heard int64 // bytes of the ready file that belong to earlier boots

	mu     sync.Mutex
	master *process // the SSH connection that all commands share
}

// bootDeadline is for one boot on a machine that is busy; an idle one takes a tenth of it.
const bootDeadline = 3 * time.Minute

// Start makes a host and boots it; it returns when sshd answers. The first Start on a machine builds the base image
// from Debian's packages, which needs root, mmdebstrap and a Debian mirror, and takes two minutes. The caller ends the
// host with Close; if the process dies first, the kernel ends it.
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
	b, err := buildOnce(ctx, cache, opts.Log)
	if err != nil {
		return nil, err
	}
	l := &Lab{opts: opts, base: b}
	if l.Dir, l.lock, err = newRunDir(ctx, cache); err != nil {
		return nil, err
	}
	if err := l.prepare(ctx); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *Lab) prepare(ctx context.Context) error {
	// qcow2 and not a raw copy: it is there at once, and its tables are in QEMU's memory until the guest flushes, so that
	// a killed QEMU loses unflushed writes as a disk with a volatile cache does.
	if err := run(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", l.base.disk(), l.disk(0)); err != nil {
		return err
	}
	for i, size := range l.opts.Disks {
		if err := run(ctx, "qemu-img", "create", "-q", "-f", "qcow2", l.disk(i+1), fmt.Sprint(size)); err != nil {
			return err
		}
	}
	if err := l.Boot(ctx); err != nil {
		return err
	}
	for remote, local := range l.opts.Files {
		if err := l.Copy(ctx, local, remote); err != nil {
			return err
		}
	}
	return nil
}

func (l *Lab) disk(i int) string { return filepath.Join(l.Dir, fmt.Sprintf("disk%d.qcow2", i)) }

// ForTest is Start for a test: failures are fatal, the lab ends with the test, and its console is shown when the test
// failed. The caller asks need.VM first.
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

// Boot starts a host that is off, and returns when sshd answers.
func (l *Lab) Boot(ctx context.Context) error {
	if l.running() {
		return errors.New("hostlab: Boot: the host is already on")
	}
	ctx, cancel := context.WithTimeout(ctx, bootDeadline)
	defer cancel()
	// The port is chosen here and taken by QEMU a moment later: somebody else may have been faster.
	for try := 1; ; try++ {
		err := l.boot(ctx)
		if err == nil || try == 5 || !strings.Contains(err.Error(), "Could not set up host forwarding rule") {
			return err
		}
	}
}

func (l *Lab) boot(ctx context.Context) error {
	var err error
	if l.port, err = freePort(); err != nil {
		return err
	}
	l.heard = size(l.readyFile())
	cmd := exec.Command("qemu-system-x86_64", l.qemuArgs()...)
	log, err := os.Create(filepath.Join(l.Dir, "qemu.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	if l.qemu, err = spawn(cmd); err != nil {
		return fmt.Errorf("hostlab: start QEMU (packaging/deps.sh installs it): %w", err)
	}
	if err := l.waitReady(ctx); err != nil {
		return errors.Join(err, l.PowerCut())
	}
	return nil
}

// qemuArgs is the machine. SVM is on so that kvm_amd loads; what a PC has and a lab does not use is off, since each
// device costs its driver's probing at every boot.
func (l *Lab) qemuArgs() []string {
	args := []string{
		"-name", "hostlab", "-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35,sata=off,smbus=off,i8042=off,vmport=off,hpet=off,graphics=off",
		"-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt",
		"-smp", fmt.Sprint(l.opts.CPUs), "-m", fmt.Sprintf("%dM", l.opts.Memory>>20),
		"-kernel", l.base.kernel(), "-initrd", l.base.initrd(),
		// The mitigations protect nobody here, and under emulation they are dear.
		"-append", "console=ttyS0 loglevel=5 net.ifnames=0 mitigations=off",
		"-chardev", "file,append=on,id=console,path=" + l.consoleFile(), "-serial", "chardev:console",
		"-chardev", "file,append=on,id=ready,path=" + l.readyFile(), "-serial", "chardev:ready",
		"-netdev", fmt.Sprintf("user,id=net,hostfwd=tcp:127.0.0.1:%d-:22", l.port),
		"-device", "virtio-net-pci,netdev=net,romfile=",
		"-device", "virtio-rng-pci",
	}
	for i := range len(l.opts.Disks) + 1 {
		args = append(args,
			"-drive", fmt.Sprintf("if=none,id=disk%d,format=qcow2,cache=writeback,discard=unmap,file=%s", i, l.disk(i)),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d,serial=disk%d", i, i))
	}
	return args
}

func (l *Lab) consoleFile() string { return filepath.Join(l.Dir, "console.log") }
func (l *Lab) readyFile() string   { return filepath.Join(l.Dir, "ready") }

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
			log, _ := os.ReadFile(filepath.Join(l.Dir, "qemu.log"))
			return fmt.Errorf("hostlab: QEMU ended while the host booted: %w\n%s", l.qemu.err, tail(string(log), 10))
		case <-ctx.Done():
			return fmt.Errorf("hostlab: the host is not up: %w; its console ends with:\n%s", ctx.Err(), l.Console(60))
		case <-tick.C:
		}
	}
}

// Reboot restarts the host in order, as `systemctl reboot` does, and returns when sshd answers again.
func (l *Lab) Reboot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootDeadline)
	defer cancel()
	// No look at the result: the connection may go before the answer comes.
	if _, err := l.Run(ctx, "systemctl", "reboot"); err != nil && !errors.Is(err, ErrConnection) {
		return err
	}
	return l.waitReady(ctx)
}

// PowerCut ends the host as a power cut does: nothing is written back, nobody is asked. What the guest had flushed
// (fsync) is on its disks; the rest may or may not be. Boot starts the host again with the same disks. It is a success
// where the host is off.
func (l *Lab) PowerCut() error {
	l.disconnect()
	if l.qemu == nil {
		return nil
	}
	l.qemu.kill()
	return nil
}

// Close ends the host and removes all of it but the cached base image.
func (l *Lab) Close() error {
	err := errors.Join(l.PowerCut(), os.RemoveAll(l.Dir))
	l.lock.Close()
	return err
}

// Console is the last lines of what the host wrote to its serial console, over all boots; 0 is all of it.
func (l *Lab) Console(lines int) string {
	b, err := os.ReadFile(l.consoleFile())
	if err != nil {
		return err.Error()
	}
	return tail(string(b), lines)
}

func (l *Lab) running() bool { return l.qemu != nil && l.qemu.running() }

// process is a child that dies with us.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; set before done is closed
}

// spawn starts cmd. PR_SET_PDEATHSIG tells of the death of the thread that forked, not of the process: so one
// thread is kept for as long as the child lives.
func spawn(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		defer close(p.done)
		lockThread()
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		if p.err = cmd.Wait(); p.err == nil {
			p.err = errors.New("exit status 0")
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.done
}

func freePort() (int, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("hostlab: no free port on loopback: %w", err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port, nil
}

// run runs a program to its end; its error holds what it said.
func run(ctx context.Context, argv ...string) error {
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("hostlab: %s: %w\n%s", strings.Join(argv, " "), err, tail(string(out), 20))
	}
	return nil
}

func size(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

// tail is the last n lines of s; 0 is all.
func tail(s string, n int) string {
	s = strings.TrimRight(s, "\r\n")
	lines := slices.Collect(strings.Lines(s))
	if n > 0 && len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "")
}
