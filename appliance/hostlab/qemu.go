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

// disks is how many there are: the root disk and those of the options.
func (l *Lab) disks() int { return 1 + len(l.opts.Disks) }

// overlay makes a disk that is another one until it is written to. qcow2 and not a raw copy: it is there at once, and its
// tables are in QEMU's memory until the guest flushes, so that a killed QEMU loses unflushed writes as a disk with a
// volatile cache does.
func overlay(ctx context.Context, disk, backing, format string) error {
	return run(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", format, "-b", backing, disk)
}

func (l *Lab) consoleFile() string { return filepath.Join(l.Dir, "console.log") }
func (l *Lab) readyFile() string   { return filepath.Join(l.Dir, "ready") }

// qemuArgs is the machine. SVM is on so that kvm_amd loads; what a PC has and a lab does not use is off, since each
// device costs its driver's probing at every boot.
func (l *Lab) qemuArgs() []string {
	args := []string{
		"-name", "hostlab", "-nodefaults", "-no-user-config", "-display", "none",
		"-machine", "q35,sata=off,smbus=off,i8042=off,vmport=off,graphics=off",
		"-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt",
		"-smp", fmt.Sprint(l.opts.CPUs), "-m", fmt.Sprintf("%dM", l.opts.Memory>>20),
		"-kernel", l.base.kernel(), "-initrd", l.base.initrd(),
		// The mitigations protect nobody here, and under emulation they are dear. On a busy machine the kernel distrusts
		// the TSC, which is the machine's own and good, and falls back to clocks that need an exit each.
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

// escape is for a file name in a QEMU option.
func escape(path string) string { return strings.ReplaceAll(path, ",", ",,") }

// on starts QEMU, with further arguments. With "-monitor", "stdio" its monitor is l.monitor.
func (l *Lab) on(ctx context.Context, args ...string) error {
	// The port is chosen here and taken by QEMU a moment later: somebody else may have been faster.
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

// listening waits until QEMU has the port: then all its options were good.
func (l *Lab) listening(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-l.qemu.done:
			return l.died()
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("hostlab: QEMU does not start: %w", ctx.Err()), l.PowerCut())
		case <-tick.C:
		}
		if listens(l.port) {
			return nil
		}
	}
}

// listens looks for a listener without connecting: slirp would hand a connection on to the guest.
func listens(port int) bool {
	b, err := os.ReadFile("/proc/net/tcp")
	// local_address rem_address st: 0A is TCP_LISTEN (proc_net(5)).
	return err == nil && strings.Contains(string(b), fmt.Sprintf(" 0100007F:%04X 00000000:0000 0A ", port))
}

func (l *Lab) qemuLog() string { return filepath.Join(l.Dir, "qemu.log") }

// died says how QEMU ended, and nil while it runs.
func (l *Lab) died() error {
	if l.running() {
		return nil
	}
	log, err := os.ReadFile(l.qemuLog())
	return errors.Join(fmt.Errorf("hostlab: QEMU ended: %w\n%s", l.qemu.err, tail(string(log), 10)), err)
}

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
