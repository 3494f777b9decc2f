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

// Files of all drivers in Config.Dir.
const (
	recordFile = "vmm.json"
	logFile    = "vmm.log" // stdout and stderr of the VMM
)

// How long a VMM may take to end.
const (
	powerOffGrace = 30 * time.Second // after the power button, if the caller's context allows it
	termGrace     = 3 * time.Second  // after SIGTERM
	killGrace     = 10 * time.Second // after SIGKILL, which only uninterruptible sleep delays
)

// The output of a VMM and its guest has no limit, so it is cut to the last megabyte once a second.
const (
	keepLog   = 1 << 20
	trimEvery = time.Second
)

// record is vmm.json: what Adopt needs to find the VMM and to recognize it with certainty.
type record struct {
	Version   int    `json:"version"`
	Driver    string `json:"driver"`
	ID        string `json:"id"`
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"` // field 22 of /proc/PID/stat, clock ticks since boot
	BootID    string `json:"boot_id"`    // pid and start time may recur after a reboot
	Binary    string `json:"binary"`
	Console   string `json:"console,omitempty"`
	Cgroup    string `json:"cgroup,omitempty"`
	// Running is false until Start has succeeded: Adopt removes such a VMM.
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

// process is a VMM: a child of this process or of an earlier one.
type process struct {
	dir    string
	record record
	files  []string // names in dir that cleanUp removes
	// private is the folder of the VMM's sockets, below dir, or "".
	private string
	log     *slog.Logger
	pidfd   *os.File
	cmd     *exec.Cmd // nil if adopted
	done    chan struct{}

	reboots reboots

	mu     sync.Mutex
	reason error // why the VMM ends, if the driver knows; the first reason counts
	exit   error // set before done is closed
}

// launch holds the arguments of start.
type launch struct {
	cfg    Config
	driver string
	binary string
	args   []string
	extra  []*os.File // fd 3 and up in the VMM; the caller closes its own copies
	files  []string   // names in cfg.Dir that are removed with the VM
	// private is the folder for the VMM's sockets, which is also removed with the VM.
	private string
	jailer  *jailer
	log     *slog.Logger
	groups  *cgroups // creates its cgroup unless cfg names one
	memory  int64    // bytes that this VMM needs in addition to its guest's memory and vmmMemory
}

// start runs the VMM detached from this process: in its own session, with a clean
// environment, with its output in a file, and confined before its first
// instruction. If it fails, it leaves nothing behind. The caller MUST call watch next.
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
	if l.cfg.Console != "" { // landlock rules need existing files
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
	// Not this process's environment, which may hold secrets: /proc/PID/environ of a long-lived VMM would show them.
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
		_ = cmd.Process.Kill() // fails only if it has ended
		_ = cmd.Wait()
		if p.pidfd != nil {
			p.pidfd.Close()
		}
		return nil, errors.Join(fmt.Errorf("%s for VM %s: %w", l.binary, l.cfg.ID, err), p.cleanUp())
	}
	return p, nil
}

// jail returns what the VMM may access.
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

// startConfined calls cmd.Start on a thread that has confined itself, which the VMM inherits and the rest of this process does
// not. The thread stays locked, so it ends with the goroutine.
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

// started sets up a new child. Its pid cannot be reused before it is waited for.
func (p *process) started() error {
	pid := p.cmd.Process.Pid
	var err error
	if p.pidfd, err = openPidfd(pid); err != nil {
		return err
	}
	// Not clone3 with CLONE_INTO_CGROUP: in a unit with RestrictNamespaces=, it fails with ENOSYS, because the unit's
	// seccomp filter cannot inspect clone3's flags. The guest's memory is not touched before this.
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
	// If memory runs out, the kernel must kill a worker first, and the plugin and the runner last: that costs one job instead of all.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte(oomScoreAdj), 0); err != nil {
		return fmt.Errorf("make the kernel kill it first when memory runs out: %w", err)
	}
	return p.save()
}

// oomScoreAdj is added, in thousandths, to a process's share of memory when the kernel chooses a process to kill (proc(5)).
const oomScoreAdj = "500"

// running marks the VM as adoptable.
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

// adopt finds the VMM that was started in dir and is still running. The caller MUST call
// watch next. If there is none, it removes what is left and returns ErrNotRunning;
// a VMM whose Start did not complete is killed first.
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
			return nil, fmt.Errorf("%s holds a VM of driver %q, not %q", dir, p.record.Driver, driver)
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
		p.log.Warn("removing a VMM whose start did not complete", "pid", p.record.PID, "dir", dir)
		p.watch(nil)
		return nil, errors.Join(fmt.Errorf("%s: %w", dir, ErrNotRunning), p.kill())
	}
	return p, nil
}

// adoptRecorded opens the pidfd first and then compares the start time: if it is the
// recorded one, the pid belonged to the VMM when it was opened.
func (p *process) adoptRecorded() error {
	bootID, err := readBootID()
	if err != nil {
		return err
	}
	if p.record.BootID != bootID {
		p.record.Cgroup = "" // it ended with the boot; a cgroup of that name now belongs to another VM
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

// adoptUnrecorded finds a VMM whose record was never written.
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

// watch closes done once the VMM has ended. Before that it calls ended, if not nil, so that
// the driver can read the VMM's last events (see note).
func (p *process) watch(ended func()) {
	go p.trim()
	go func() {
		p.wait()
		status := "exit status unknown: it was reported to the process that started it"
		if p.cmd != nil {
			// Returns at once, because the process has ended. The error only repeats the state.
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

// wait blocks until the VMM has ended. It uses the runtime's poller, and so no thread per VM.
func (p *process) wait() {
	conn, err := p.pidfd.SyscallConn()
	if err == nil {
		err = conn.Read(func(uintptr) bool { return exited(p.pidfd) })
	}
	if err != nil { // impossible: the pidfd stays open until this returns
		p.log.Error("waiting for the VMM", "pid", p.record.PID, "error", err)
	}
}

// explain returns the error for Exit.
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
		fmt.Fprintf(text, "; its last output: %s", words)
	}
	if p.reason != nil {
		return fmt.Errorf("%w%s", p.reason, text)
	}
	return fmt.Errorf("the VMM ended%s", text)
}

// note records why the VMM is about to end. The first reason is kept.
func (p *process) note(reason error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.reason == nil {
		p.reason = reason
	}
}

// rebooted counts a reboot of the guest. Only the driver's goroutine for events calls it.
func (p *process) rebooted() {
	counted, err := p.reboots.add(time.Now())
	if counted {
		p.log.Info("the guest rebooted")
	}
	if err != nil {
		p.fail(err)
	}
}

// fail kills a VM that must not continue.
func (p *process) fail(reason error) {
	p.log.Error("killing the VM", "reason", reason)
	p.note(reason)
	p.signal(unix.SIGKILL)
}

func (p *process) signal(sig unix.Signal) {
	// A pidfd never signals another process with a reused pid. This fails only if the VMM has ended.
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return
	}
	_ = conn.Control(func(fd uintptr) { _ = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
}

// stop ends the VMM in three stages: ask (the power button), within powerOffGrace and ctx, then SIGTERM, then SIGKILL.
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
			p.log.Warn("cannot press the power button", "error", err)
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

// kill ends the VMM without asking the guest, and removes its files.
func (p *process) kill() error {
	if !p.ended() {
		p.note(errStopped)
		p.signal(unix.SIGKILL)
		if !p.await(killGrace) {
			return fmt.Errorf("VMM %d of VM %s is still running %v after SIGKILL: it hangs in the kernel (see /proc/%d/stack)",
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

// dial connects to a socket of the VMM, which may not exist yet.
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
			return nil, fmt.Errorf("connect to the VMM at %s: %w", path, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// abandon kills a VMM whose start failed with err, and returns the error for Start.
func (p *process) abandon(ctx context.Context, err error) error {
	// A socket breaks a moment before its process has ended, and the VMM's own error is better than that. An error
	// that the VMM has answered is good enough.
	if answer := (*chError)(nil); ctx.Err() == nil && !errors.As(err, &answer) && p.await(250*time.Millisecond) {
		err = p.exitError()
	}
	return errors.Join(fmt.Errorf("start VM %s: %w", p.record.ID, err), p.kill())
}

// exitError returns nil while the VMM runs, and then the reason for its end.
func (p *process) exitError() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit
}

// cleanUp removes what an ended VM leaves, the record last: as long as that exists, Adopt cleans up again.
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

// removeFiles removes a VM's files, of which any may be missing.
func removeFiles(dir string, names []string) error {
	var errs []error
	for _, name := range names {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// trim limits the size of the log and the console while the VMM runs, by punching a hole at the
// beginning: that works whether the writer appends or keeps its own position.
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
				p.log.Warn("cannot limit the size of a log", "error", err)
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

// lastWords returns the end of a VMM's output, on one line and safe to print.
func lastWords(path string) string {
	tail, err := state.Tail(path, 2048)
	if err != nil {
		return ""
	}
	return strings.Join(visible.LastLines(string(tail), 5), " | ")
}

func openPidfd(pid int) (*os.File, error) {
	// Non-blocking, so that os.NewFile registers it with the poller.
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

// startTime returns field 22 of /proc/PID/stat. The second field, the program's name in
// parentheses, may contain anything, so fields are counted from its end.
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
