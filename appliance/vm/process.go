package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/appliance/visible"
)

// Files of every driver in Config.Dir.
const (
	recordFile = "vmm.json"
	logFile    = "vmm.log" // stdout and stderr of the VMM
)

// How long a VMM is given to end.
const (
	powerOffGrace = 30 * time.Second // after the power button, where the caller's context allows it
	termGrace     = 3 * time.Second  // after SIGTERM
	killGrace     = 10 * time.Second // after SIGKILL: only a process in uninterruptible sleep needs it
)

// What a VMM or its guest writes without end is cut to the last megabyte, once a second.
const (
	keepLog   = 1 << 20
	trimEvery = time.Second
)

// record is vmm.json: what Adopt needs to find the VMM again, and to be sure that it is the one.
type record struct {
	Version   int    `json:"version"`
	Driver    string `json:"driver"`
	ID        string `json:"id"`
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"` // field 22 of /proc/PID/stat, clock ticks since boot
	BootID    string `json:"boot_id"`    // without it a pid and start time may be met again after a reboot
	Binary    string `json:"binary"`
	Console   string `json:"console,omitempty"`
	Cgroup    string `json:"cgroup,omitempty"`
	// Running is false until Start has done its work: a VMM found so is removed, not adopted.
	Running bool `json:"running"`
}

const recordVersion = 1

func parseRecord(data []byte) (record, error) {
	var r record
	if err := json.Unmarshal(data, &r); err != nil {
		return record{}, err
	}
	switch {
	case r.Version != recordVersion:
		return record{}, fmt.Errorf("format version %d, this binary reads %d", r.Version, recordVersion)
	case r.PID <= 1:
		return record{}, fmt.Errorf("pid %d cannot be a VMM", r.PID)
	}
	return r, nil
}

// process is a VMM, our child or one that an earlier process of ours started.
type process struct {
	dir    string
	record record
	files  []string // names in dir that cleanUp removes
	// private is the folder of the VMM's sockets, below dir; "" where there is none.
	private string
	log     *slog.Logger
	pidfd   *os.File
	cmd     *exec.Cmd // nil when adopted
	done    chan struct{}

	reboots reboots

	mu     sync.Mutex
	reason error // what the driver knows of why the VMM ends; the first one said
	exit   error // set before done is closed
}

// launch is what start needs.
type launch struct {
	cfg    Config
	driver string
	binary string
	args   []string
	extra  []*os.File // fd 3 and on in the VMM; the caller closes its own
	files  []string   // names in cfg.Dir that go with the VM
	// private is the folder for the VMM's sockets, which goes with it, too.
	private string
	jailer  *jailer
	log     *slog.Logger
	groups  *cgroups // where its cgroup is made, when cfg names none
	memory  int64    // that this VMM needs above its guest's and vmmMemory, in bytes
}

// start runs the VMM detached from this process: a session of its own, none of
// our environment, its output in a file, confined before its first
// instruction. When it fails nothing is left. The caller MUST call watch next.
func start(l launch) (*process, error) {
	bootID, err := readBootID()
	if err != nil {
		return nil, err
	}
	if l.cfg.Cgroup == "" {
		if l.cfg.Cgroup, err = l.groups.make(l.cfg, l.memory); err != nil {
			return nil, err
		}
	}
	if l.cfg.Console != "" { // landlock's rules are of files that exist
		f, err := os.OpenFile(l.cfg.Console, os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("VM %s: console: %w", l.cfg.ID, err), removeCgroup(l.cfg.Cgroup))
		}
		if err := f.Close(); err != nil {
			return nil, errors.Join(err, removeCgroup(l.cfg.Cgroup))
		}
	}
	rules, err := l.jailer.lock(l.jail(), l.binary)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("VM %s: %w", l.cfg.ID, err), removeCgroup(l.cfg.Cgroup))
	}
	defer rules.close()
	cmd := exec.Command(l.binary, l.args...)
	out, err := os.OpenFile(filepath.Join(l.cfg.Dir, logFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, errors.Join(err, removeCgroup(l.cfg.Cgroup))
	}
	defer out.Close()
	cmd.Dir = l.cfg.Dir
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = out, out, l.extra
	// Not ours: it may hold secrets, and /proc/PID/environ of a long-lived VMM shows them.
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", folderVariable + "=" + l.cfg.Dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	p := &process{
		dir: l.cfg.Dir, files: l.files, private: l.private, log: l.log.With("vm", l.cfg.ID), cmd: cmd, done: make(chan struct{}),
		record: record{
			Version: recordVersion, Driver: l.driver, ID: l.cfg.ID, BootID: bootID, Binary: l.binary,
			Console: l.cfg.Console, Cgroup: l.cfg.Cgroup,
		},
	}
	if err := startConfined(cmd, rules); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", l.binary, err), p.cleanUp())
	}
	if err := p.started(); err != nil {
		_ = cmd.Process.Kill() // fails only where it has ended
		_ = cmd.Wait()
		if p.pidfd != nil {
			p.pidfd.Close()
		}
		return nil, errors.Join(fmt.Errorf("%s for VM %s: %w", l.binary, l.cfg.ID, err), p.cleanUp())
	}
	return p, nil
}

// jail is what the VMM may reach.
func (l *launch) jail() jail {
	j := jail{private: l.private, read: []string{l.cfg.Kernel}}
	if l.cfg.Initrd != "" {
		j.read = append(j.read, l.cfg.Initrd)
	}
	for _, d := range l.cfg.Disks {
		if d.ReadOnly {
			j.read = append(j.read, d.Path)
		} else {
			j.write = append(j.write, d.Path)
		}
	}
	if l.cfg.Console != "" {
		j.write = append(j.write, l.cfg.Console)
	}
	return j
}

// startConfined is cmd.Start on a thread of its own that has shut itself in: the VMM inherits that, the plugin does not
// have it. The thread ends with the goroutine, since it stays locked.
func startConfined(cmd *exec.Cmd, rules *ruleset) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := rules.enter(); err != nil {
			result <- err
			return
		}
		result <- cmd.Start()
	}()
	return <-result
}

// started takes hold of a new child. Until it is waited for, its pid is no one else's.
func (p *process) started() error {
	pid := p.cmd.Process.Pid
	var err error
	if p.pidfd, err = openPidfd(pid); err != nil {
		return err
	}
	// Not by clone3 with CLONE_INTO_CGROUP: in a unit that is hardened by RestrictNamespaces= it does not exist, since that unit's
	// seccomp filter cannot see clone3's flags and says ENOSYS to all of it. The guest's memory is not touched before this.
	if group := p.record.Cgroup; group != "" {
		if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("move it into its cgroup: %w", err)
		}
	}
	p.record.PID = pid
	if p.record.StartTime, err = startTime(pid); err != nil {
		return err
	}
	// A core dump would hold the guest's memory, with the job's secrets.
	if err := unix.Prlimit(pid, unix.RLIMIT_CORE, &unix.Rlimit{}, nil); err != nil {
		return fmt.Errorf("forbid core dumps: %w", err)
	}
	// Where memory runs out the kernel is to take a worker first, and the plugin and the runner last: one lost job and not all.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(oomScoreAdj), 0); err != nil {
		return fmt.Errorf("tell the kernel to end it first when memory runs out: %w", err)
	}
	return p.save()
}

// oomScoreAdj is added to the share of memory that a process has, in thousandths, when the kernel looks for one to end (proc(5)).
const oomScoreAdj = "500"

// running marks the VM as one that may be adopted.
func (p *process) running() error {
	p.record.Running = true
	return p.save()
}

func (p *process) save() error {
	data, err := json.Marshal(p.record)
	if err != nil {
		return err
	}
	return state.WriteFile(filepath.Join(p.dir, recordFile), append(data, '\n'), 0o600)
}

// adopt finds the VMM that was started in dir and is running there. The caller MUST call
// watch next. When there is none it returns ErrNotRunning, what was left of it being removed;
// a VMM whose Start never came to its end is killed first.
func adopt(dir, driver string, files []string, log *slog.Logger) (*process, error) {
	p := &process{dir: dir, files: files, log: log, done: make(chan struct{})}
	var err error
	if p.private, err = findPrivate(dir); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(filepath.Join(dir, recordFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = p.adoptUnrecorded()
	case err != nil:
		return nil, err
	default:
		if p.record, err = parseRecord(data); err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(dir, recordFile), err)
		}
		if p.record.Driver != driver {
			return nil, fmt.Errorf("%s: a VM of driver %q, not %q", dir, p.record.Driver, driver)
		}
		p.log = log.With("vm", p.record.ID)
		err = p.adoptRecorded()
	}
	if errors.Is(err, ErrNotRunning) {
		return nil, errors.Join(fmt.Errorf("%s: %w", dir, err), p.cleanUp())
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	if !p.record.Running {
		p.log.Warn("removing a VMM whose start never ended", "pid", p.record.PID, "dir", dir)
		p.watch(nil)
		return nil, errors.Join(fmt.Errorf("%s: %w", dir, ErrNotRunning), p.kill())
	}
	return p, nil
}

// adoptRecorded opens the pidfd first and looks at the start time then: when it is the
// recorded one, the pid was the VMM's when it was opened.
func (p *process) adoptRecorded() error {
	bootID, err := readBootID()
	if err != nil {
		return err
	}
	if p.record.BootID != bootID {
		p.record.Cgroup = "" // gone with the boot; what has its name now is not ours
		return ErrNotRunning
	}
	pidfd, err := openPidfd(p.record.PID)
	if errors.Is(err, unix.ESRCH) {
		return ErrNotRunning
	}
	if err != nil {
		return err
	}
	if at, err := startTime(p.record.PID); err != nil || at != p.record.StartTime || exited(pidfd) {
		pidfd.Close()
		return ErrNotRunning
	}
	p.pidfd = pidfd
	return nil
}

// adoptUnrecorded looks for a VMM whose record was never written.
func (p *process) adoptUnrecorded() error {
	pid, err := findByFolder(p.dir)
	if err != nil {
		return err
	}
	if pid == 0 {
		return ErrNotRunning
	}
	p.record.PID = pid
	if p.pidfd, err = openPidfd(pid); errors.Is(err, unix.ESRCH) {
		return ErrNotRunning
	}
	return err
}

// watch closes done when the VMM has ended. ended is called before, and gives the
// driver the time to hear the VMM's last events (see note); nil for nothing.
func (p *process) watch(ended func()) {
	go p.trim()
	go func() {
		p.wait()
		status := "its exit status went to the process that started it"
		if p.cmd != nil {
			// Returns at once: the process has ended. The error repeats what the state says.
			_ = p.cmd.Wait()
			status = p.cmd.ProcessState.String()
		}
		if ended != nil {
			ended()
		}
		p.mu.Lock()
		p.exit = p.explain(status)
		p.mu.Unlock()
		p.pidfd.Close()
		close(p.done)
	}()
}

// wait blocks until the VMM has ended, in the runtime's poller: no thread a VM.
func (p *process) wait() {
	conn, err := p.pidfd.SyscallConn()
	if err == nil {
		err = conn.Read(func(uintptr) bool { return exited(p.pidfd) })
	}
	if err != nil { // cannot be: the pidfd stays open until this returns
		p.log.Error("waiting for the VMM", "pid", p.record.PID, "error", err)
	}
}

// explain makes Exit's error.
func (p *process) explain(status string) error {
	text := new(strings.Builder)
	fmt.Fprintf(text, " (%s)", status)
	if oomKilled(p.record.Cgroup) {
		text.WriteString("; its cgroup ran out of memory (memory.max)")
	}
	if errors.Is(p.reason, ErrPoweredOff) {
		return fmt.Errorf("%w%s", p.reason, text)
	}
	if words := lastWords(filepath.Join(p.dir, logFile)); words != "" {
		fmt.Fprintf(text, "; its last words: %s", words)
	}
	if p.reason != nil {
		return fmt.Errorf("%w%s", p.reason, text)
	}
	return fmt.Errorf("the VMM ended%s", text)
}

// note says why the VMM is about to end. What is said first stays.
func (p *process) note(reason error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reason == nil {
		p.reason = reason
	}
}

// rebooted counts a reboot of the guest. It is called on the driver's one goroutine for events.
func (p *process) rebooted() {
	counted, err := p.reboots.add(time.Now())
	if counted {
		p.log.Info("the guest rebooted")
	}
	if err != nil {
		p.fail(err)
	}
}

// fail ends a VM that must not go on.
func (p *process) fail(reason error) {
	p.log.Error("the VM is ended", "reason", reason)
	p.note(reason)
	p.signal(unix.SIGKILL)
}

func (p *process) signal(sig unix.Signal) {
	// Through the pidfd no signal can meet a stranger. It fails only when the VMM has ended.
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return
	}
	_ = conn.Control(func(fd uintptr) { _ = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
}

// stop ends the VMM: ask (the power button) with what ctx leaves of powerOffGrace, SIGTERM, SIGKILL.
func (p *process) stop(ctx context.Context, ask func(context.Context) error) error {
	grace, cancel := context.WithTimeout(ctx, powerOffGrace)
	defer cancel()
	if !p.ended() && grace.Err() == nil {
		if err := ask(grace); err == nil {
			select {
			case <-p.done:
			case <-grace.Done():
			}
		} else if !p.ended() {
			p.log.Warn("the power button could not be pressed", "error", err)
		}
	}
	if !p.ended() {
		p.note(errStopped)
		p.signal(unix.SIGTERM)
		p.await(termGrace)
	}
	return p.kill()
}

var errStopped = errors.New("stopped by fleetingd")

// kill ends the VMM without asking, and removes its files.
func (p *process) kill() error {
	if !p.ended() {
		p.note(errStopped)
		p.signal(unix.SIGKILL)
		if !p.await(killGrace) {
			return fmt.Errorf("VMM %d of VM %s is still there %v after SIGKILL: it hangs in the kernel (see /proc/%d/stack)",
				p.record.PID, p.record.ID, killGrace, p.record.PID)
		}
	}
	return p.cleanUp()
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) await(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-p.done:
		return true
	case <-t.C:
		return false
	}
}

// dial connects to a socket of the VMM, which may not be there yet.
func (p *process) dial(ctx context.Context, name string) (net.Conn, error) {
	path := filepath.Join(p.private, name)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
		if err == nil {
			return conn, nil
		}
		select {
		case <-p.done:
			return nil, p.exitError()
		case <-ctx.Done():
			return nil, fmt.Errorf("no connection to the VMM at %s: %w", path, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// abandon ends a VMM whose start failed with err, and makes Start's error.
func (p *process) abandon(ctx context.Context, err error) error {
	// A socket breaks a moment before its process has ended; what the VMM itself said is the better reason. Where it
	// still answers, its answer is.
	if answer := (*chError)(nil); ctx.Err() == nil && !errors.As(err, &answer) && p.await(250*time.Millisecond) {
		err = p.exitError()
	}
	return errors.Join(fmt.Errorf("start VM %s: %w", p.record.ID, err), p.kill())
}

// exitError is Exit: nil while the VMM runs.
func (p *process) exitError() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit
}

// cleanUp removes what an ended VM leaves, the record last: until it is gone Adopt comes back here.
func (p *process) cleanUp() error {
	var errs []error
	if err := removeCgroup(p.record.Cgroup); err != nil {
		errs = append(errs, err)
	}
	if p.private != "" {
		errs = append(errs, os.RemoveAll(p.private))
	}
	errs = append(errs, removeFiles(p.dir, p.files), removeFiles(p.dir, []string{logFile, recordFile}))
	return errors.Join(errs...)
}

// removeFiles removes what is there of a VM's files.
func removeFiles(dir string, names []string) error {
	var errs []error
	for _, name := range names {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// trim bounds the log and the console while the VMM runs, by punching holes where they
// begin: it works whether the writer appends or keeps a position of its own.
func (p *process) trim() {
	tick := time.NewTicker(trimEvery)
	defer tick.Stop()
	paths := []string{filepath.Join(p.dir, logFile)}
	if p.record.Console != "" {
		paths = append(paths, p.record.Console)
	}
	for {
		select {
		case <-p.done:
			return
		case <-tick.C:
		}
		for _, path := range paths {
			if err := trimFile(path, keepLog); err != nil && !p.ended() {
				p.log.Warn("a log cannot be kept short", "error", err)
				return
			}
		}
	}
}

func trimFile(path string, keep int64) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	used := st.Sys().(*syscall.Stat_t).Blocks * 512
	if used <= 2*keep {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// Whole blocks, or the kernel writes zeros into the rest of one.
	end := (st.Size() - keep) &^ 4095
	err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, end)
	if err != nil {
		return fmt.Errorf("punch a hole into %s: %w", path, err)
	}
	return nil
}

// lastWords is the end of a VMM's output, on one line and safe to print.
func lastWords(path string) string {
	tail, err := state.Tail(path, 2048)
	if err != nil {
		return ""
	}
	return strings.Join(visible.LastLines(string(tail), 5), " | ")
}

func openPidfd(pid int) (*os.File, error) {
	// Non-blocking, so that os.NewFile gives it to the poller.
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("pidfd_open %d: %w", pid, err)
	}
	return os.NewFile(uintptr(fd), "pidfd:"+strconv.Itoa(pid)), nil
}

// exited reports whether the process behind a pidfd has ended.
func exited(pidfd *os.File) bool {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return true
	}
	gone := false
	_ = conn.Control(func(fd uintptr) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		gone = err == nil && n > 0
	})
	return gone
}

// startTime is field 22 of /proc/PID/stat. The second field, the program's name in
// parentheses, may hold anything: the fields are counted from its end.
func startTime(pid int) (uint64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStartTime(data)
}

func parseStartTime(stat []byte) (uint64, error) {
	i := bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[i+1:]))
	if i < 0 || len(fields) < 20 {
		return 0, errors.New("/proc/PID/stat has too few fields")
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

func readBootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data)), err
}
