package hostlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

func (l *Lab) disk(i int) string { return filepath.Join(l.Dir, fmt.Sprintf("disk%d.qcow2", i)) }

// disks returns the number of disks: the root disk and those of the options.
func (l *Lab) disks() int { return 1 + len(l.opts.Disks) }

// overlay creates a disk that reads like another one until it is written to. It is qcow2, not a raw copy, because it is created at once,
// and because its tables are in QEMU's memory until the guest flushes, so that a killed QEMU loses unflushed writes like a disk with a
// volatile cache.
func overlay(ctx context.Context, disk, backing, format string) error {
	return run(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", format, "-b", backing, disk)
}

func (l *Lab) consoleFile() string { return filepath.Join(l.Dir, "console.log") }
func (l *Lab) readyFile() string   { return filepath.Join(l.Dir, "ready") }

// qemuArgs returns the options of the machine. SVM is on so that kvm_amd loads; devices that a lab does not use are off, since
// probing them costs time at every boot.
func (l *Lab) qemuArgs() []string {
	args := []string{
		"-name", "hostlab", "-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35,sata=off,smbus=off,i8042=off,vmport=off,graphics=off",
		"-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt",
		"-smp", fmt.Sprint(l.opts.CPUs), "-m", fmt.Sprintf("%dM", l.opts.Memory>>20),
		"-kernel", l.base.kernel(), "-initrd", l.base.initrd(),
		// Mitigations protect nobody here, and are expensive under emulation. On a busy machine the kernel distrusts
		// the TSC, which is reliable here, and falls back to clocks that need an exit for every read.
		"-append", "console=ttyS0 loglevel=5 net.ifnames=0 mitigations=off tsc=reliable",
		"-chardev", "file,append=on,id=console,path=" + escape(l.consoleFile()), "-serial", "chardev:console",
		"-chardev", "file,append=on,id=ready,path=" + escape(l.readyFile()), "-serial", "chardev:ready",
		"-netdev", fmt.Sprintf("user,id=net,hostfwd=tcp:127.0.0.1:%d-:22", l.port),
		"-device", "virtio-net-pci,netdev=net,romfile=",
		"-device", "virtio-rng-pci",
	}
	for i := range l.disks() {
		args = append(args,
			"-drive", fmt.Sprintf("if=none,id=disk%d,format=qcow2,cache=writeback,discard=unmap,file=%s", i, escape(l.disk(i))),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=disk%d,serial=disk%d", i, i))
	}
	return args
}

// escape escapes a file name for a QEMU option.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// on starts QEMU with additional arguments. With "-monitor", "stdio" its monitor is l.monitor.
func (l *Lab) on(ctx context.Context, args ...string) error {
	// Another process may take the port between its choice here and its use by QEMU.
	for try := 1; ; try++ {
		err := l.startQEMU(ctx, args)
		if err == nil || try == 5 || !strings.Contains(err.Error(), "Could not set up host forwarding rule") {
			return err
		}
	}
}

func (l *Lab) startQEMU(ctx context.Context, args []string) error {
	var err error
	if l.port, err = freePort(); err != nil {
		return err
	}
	log, err := os.Create(l.qemuLog())
	if err != nil {
		return fmt.Errorf("hostlab: %w", err)
	}
	defer log.Close()
	cmd := l.base.qemu(append(l.qemuArgs(), args...)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = l.Dir, log, log
	if slices.Contains(args, "-monitor") {
		if l.monitor, err = cmd.StdinPipe(); err != nil {
			return fmt.Errorf("hostlab: %w", err)
		}
	}
	if l.qemu, err = spawn(cmd); err != nil {
		return fmt.Errorf("hostlab: start QEMU: %w", err)
	}
	return l.listening(ctx)
}

// listening waits until QEMU listens on the port, which means that it has accepted all its options.
func (l *Lab) listening(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-l.qemu.done:
			return l.died()
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("hostlab: QEMU did not start: %w", ctx.Err()), l.PowerCut())
		case <-tick.C:
		}
		if listens(l.port) {
			return nil
		}
	}
}

// listens looks for a listener without connecting, because slirp would pass a connection on to the guest.
func listens(port int) bool {
	b, err := os.ReadFile("/proc/net/tcp")
	// local_address rem_address st: 0A is TCP_LISTEN (proc_net(5)).
	return err == nil && strings.Contains(string(b), fmt.Sprintf(" 0100007F:%04X 00000000:0000 0A ", port))
}

func (l *Lab) qemuLog() string { return filepath.Join(l.Dir, "qemu.log") }

// died returns how QEMU ended, or nil while it runs.
func (l *Lab) died() error {
	if l.running() {
		return nil
	}
	log, err := os.ReadFile(l.qemuLog())
	return errors.Join(fmt.Errorf("hostlab: QEMU ended: %w\n%s", l.qemu.err, tail(string(log), 10)), err)
}

// process is a child that dies with this process.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; set before done is closed
}

// spawn starts cmd. PR_SET_PDEATHSIG reports the death of the thread that forked, not of the process, so one
// thread is kept for as long as the child lives.
func spawn(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		defer close(p.done)
		runtime.LockOSThread()
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

// run runs a program to its end; its error includes the end of the output.
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

// tail returns the last n lines of s; 0 returns all.
func tail(s string, n int) string {
	s = strings.TrimRight(s, "\r\n")
	lines := slices.Collect(strings.Lines(s))
	if n > 0 && len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "")
}
