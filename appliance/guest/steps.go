package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// stepEnv is a step's environment, like that of a root shell in the image. Nobody can answer
// questions during a prebuild, so debconf must not ask any.
var stepEnv = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	"HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/sh", "LANG=C.UTF-8", "TERM=dumb",
	"DEBIAN_FRONTEND=noninteractive",
}

// killGrace is the time between SIGTERM and SIGKILL, and how long to wait for the output of a finished program if
// a process that it left running still holds the pipe.
const killGrace = 5 * time.Second

// runStep runs one prebuild step on this machine.
func runStep(ctx context.Context, s Step, say func(string)) result {
	switch {
	case s.File != nil:
		if err := writeStepFile(*s.File); err != nil {
			return result{code: 1, err: err}
		}
		return result{}
	case len(s.Packages) > 0:
		return installPackages(ctx, s.Packages, say)
	case s.Command != "":
		return runScript(ctx, s.Command, say)
	}
	return result{code: -1, err: errors.New("this guest part does not know this kind of step")}
}

func writeStepFile(f File) error {
	if !filepath.IsAbs(f.Path) {
		return fmt.Errorf("file %q: the path is not absolute", f.Path)
	}
	mode, err := strconv.ParseUint(f.Mode, 8, 32)
	if err != nil || mode > 0o7777 {
		return fmt.Errorf("file %s: mode %q is not octal", f.Path, f.Mode)
	}
	if err := os.MkdirAll(filepath.Dir(f.Path), 0o755); err != nil {
		return err
	}
	return writeFile(f.Path, []byte(f.Content), unixMode(mode))
}

// unixMode converts chmod's bits to Go's.
func unixMode(mode uint64) os.FileMode {
	m := os.FileMode(mode & 0o777)
	for bit, flag := range map[uint64]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky} {
		if mode&bit != 0 {
			m |= flag
		}
	}
	return m
}

// writeFile writes a file with exactly this mode, whatever its mode was and whatever the umask is.
func writeFile(path string, data []byte, mode os.FileMode) error {
	if err := os.WriteFile(path, data, mode.Perm()); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

func onPath(name string) bool {
	_, err := exec.LookPath(name)
	return err == nil
}

// runCommand runs a program to its end, or to ctx's, in a process group of its own.
func runCommand(ctx context.Context, say func(string), name string, args ...string) result {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env, cmd.Dir = stepEnv, "/root"
	if _, err := os.Stat(cmd.Dir); err != nil {
		cmd.Dir = "/"
	}
	read, write, err := os.Pipe()
	if err != nil {
		return result{code: -1, err: err}
	}
	// No stdin: /dev/null. Both outputs go into one pipe, in the order they were written.
	cmd.Stdout, cmd.Stderr = write, write
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 2 * killGrace // of the program itself, should the signals to its group not have ended it
	cmd.Cancel = func() error {
		time.AfterFunc(killGrace, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }) // may have ended
		return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
	}
	killed := oomKills()
	err = cmd.Start()
	write.Close()
	if err != nil {
		read.Close()
		return result{code: -1, err: err}
	}
	out := &splitter{say: say}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		defer read.Close()
		// To the end of the pipe, even if that comes much later: SIGPIPE must not end what the program left running.
		_, _ = io.Copy(out, read)
	}()
	err = cmd.Wait()
	select {
	case <-drained:
	case <-time.After(killGrace):
	}
	out.end()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return result{code: -1, err: fmt.Errorf("stopped: %w", context.Cause(ctx))}
	case err == nil:
		return result{}
	case !errors.As(err, &exit):
		return result{code: -1, err: err}
	case exit.Exited():
		return result{code: exit.ExitCode(), err: exitNote(exit.ExitCode(), oomKills()-killed)}
	default: // "signal: killed"
		return result{code: -1, err: errors.Join(err, exitNote(-1, oomKills()-killed))}
	}
}

// exitNote returns an explanation of an exit code, or nil. oom is the number of processes that the kernel
// killed meanwhile because memory ran out.
func exitNote(code, oom int) error {
	switch sig := syscall.Signal(code - 128); {
	case oom > 0:
		return fmt.Errorf("memory ran out and the kernel killed a process (%d in all); raise the memory of the image's pools", oom)
	case sig == syscall.SIGPIPE:
		return errors.New("SIGPIPE: in a pipeline, a command wrote to one that had already ended, as in `yes | head`; " +
			"put `set +o pipefail` before it if that is expected")
	case sig > 0 && sig < 65:
		return fmt.Errorf("a command was ended by signal %d (%v)", int(sig), sig)
	}
	return nil
}

// oomKills returns how many processes the kernel has killed since boot because memory ran out.
func oomKills() int {
	stat, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return 0
	}
	for l := range strings.Lines(string(stat)) {
		if n, ok := strings.CutPrefix(l, "oom_kill "); ok {
			kills, _ := strconv.Atoi(strings.TrimSpace(n))
			return kills
		}
	}
	return 0
}

// splitter passes on what is written to it, line by line. A progress bar's carriage return ends a line,
// too; the resulting empty lines are dropped.
type splitter struct {
	say  func(string)
	mu   sync.Mutex
	buf  []byte
	over bool
}

func (s *splitter) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over {
		return len(p), nil
	}
	for _, b := range p {
		switch {
		case b == '\n':
			s.sayLine()
		case b == '\r':
			if len(s.buf) > 0 {
				s.sayLine()
			}
		default:
			// In JSON one byte can become six: a line must fit a message of the channel.
			if s.buf = append(s.buf, b); len(s.buf) == maxText {
				s.sayLine()
			}
		}
	}
	return len(p), nil
}

func (s *splitter) sayLine() {
	s.say(cut(string(s.buf), maxText))
	s.buf = s.buf[:0]
}

// end passes on a last line without a newline. What is written afterwards is dropped.
func (s *splitter) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.buf) > 0 {
		s.sayLine()
	}
	s.over = true
}

// cloudInitPatience is the time after which waitCloudInit reports that it is waiting.
const cloudInitPatience = 10 * time.Second

// waitCloudInit waits until cloud-init has finished, because steps must not run at the same time. It passes on cloud-init's complaints
// but ignores failures: many images have modules that fail in a VM without a cloud.
func waitCloudInit(ctx context.Context, say func(string)) {
	if !onPath("cloud-init") {
		return
	}
	waiting := time.AfterFunc(cloudInitPatience, func() { say("waiting for the guest's cloud-init to finish") })
	defer waiting.Stop()
	var out []string
	r := runCommand(ctx, func(l string) { out = append(out, l) }, "cloud-init", "status", "--wait", "--long")
	if (r.code != 0 || r.err != nil) && ctx.Err() == nil {
		say(fmt.Sprintf("cloud-init status: exit code %d: %s", r.code, strings.Join(out, "; ")))
	}
}
