package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// stepEnv is what a step finds in its environment, as a root shell of the image would have it. Nobody can answer a
// question during a prebuild, so debconf asks none.
var stepEnv = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	"HOME=/root", "USER=root", "LOGNAME=root", "SHELL=/bin/sh", "LANG=C.UTF-8", "TERM=dumb",
	"DEBIAN_FRONTEND=noninteractive",
}

// killGrace is between SIGTERM and SIGKILL; afterwards output of what a step left running is not waited for.
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
		return runCommand(ctx, say, "/bin/sh", "-c", s.Command)
	}
	return result{code: -1, err: errors.New("it is of a kind that this guest part does not know")}
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

// unixMode turns chmod's bits into Go's.
func unixMode(mode uint64) os.FileMode {
	m := os.FileMode(mode & 0o777)
	for bit, flag := range map[uint64]os.FileMode{0o4000: os.ModeSetuid, 0o2000: os.ModeSetgid, 0o1000: os.ModeSticky} {
		if mode&bit != 0 {
			m |= flag
		}
	}
	return m
}

// writeFile writes a file with exactly this mode, whatever it was and whatever the umask is.
func writeFile(path string, data []byte, mode os.FileMode) error {
	if err := os.WriteFile(path, data, mode.Perm()); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

// installPackages uses the distribution's package manager as a person would: recommended packages come with
// the named ones where that is the distribution's default, since a package's documentation takes them for granted.
// An image that wants less says so in its own apt configuration.
func installPackages(ctx context.Context, names []string, say func(string)) result {
	var commands [][]string
	switch {
	case onPath("apt-get"):
		apt := []string{
			"apt-get", "-y", "-q",
			"-o", "DPkg::Lock::Timeout=600", // the image's own first-boot update may hold it
			"-o", "Acquire::Retries=3",
			// A file that the spec wrote before is kept where a package brings its own; nobody can answer dpkg's question.
			"-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold",
			"-o", "Dpkg::Use-Pty=0",
		}
		commands = [][]string{append(apt[:len(apt):len(apt)], "update"), append(append(apt, "install", "--"), names...)}
	case onPath("dnf"):
		commands = [][]string{append([]string{"dnf", "-y", "install", "--"}, names...)}
	case onPath("apk"):
		commands = [][]string{append([]string{"apk", "add", "--update-cache", "--"}, names...)}
	default:
		return result{code: 1, err: errors.New("the image has none of apt-get, dnf and apk: install packages with a run step")}
	}
	for _, c := range commands {
		if r := runCommand(ctx, say, c[0], c[1:]...); r.code != 0 || r.err != nil {
			return r
		}
	}
	return result{}
}

func onPath(name string) bool {
	_, err := exec.LookPath(name)
	return err == nil
}

// runCommand runs a program to its end, in a process group of its own that ends with ctx.
func runCommand(ctx context.Context, say func(string), name string, args ...string) result {
	out := &splitter{say: say}
	defer out.flush()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env, cmd.Dir = stepEnv, "/root"
	if _, err := os.Stat(cmd.Dir); err != nil {
		cmd.Dir = "/"
	}
	// No stdin: /dev/null. Both outputs in one, in the order they were written.
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = killGrace
	cmd.Cancel = func() error {
		time.AfterFunc(killGrace, func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
		return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
	}
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return result{code: -1, err: fmt.Errorf("it was ended: %w", context.Cause(ctx))}
	case err == nil, errors.Is(err, exec.ErrWaitDelay): // a daemon that it started still holds its output
		return result{}
	case errors.As(err, &exit) && exit.Exited():
		return result{code: exit.ExitCode()}
	default:
		return result{code: -1, err: err} // not found, or "signal: killed"
	}
}

// splitter says what is written to it line by line. A progress bar's carriage return ends a line
// too; empty ones that come of that are left out.
type splitter struct {
	say func(string)
	mu  sync.Mutex
	buf []byte
}

func (s *splitter) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, b := range p {
		switch {
		case b == '\n':
			s.sayLine()
		case b == '\r':
			if len(s.buf) > 0 {
				s.sayLine()
			}
		default:
			// As JSON a byte can be six: what is said has to fit a line of the channel.
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

func (s *splitter) flush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.buf) > 0 {
		s.sayLine()
	}
}

// waitCloudInit waits until cloud-init has done its own part: a step must not run beside it. What it complains of is said, and
// ends nothing: images often have modules that fail in a VM without a cloud.
func waitCloudInit(ctx context.Context, say func(string)) {
	if !onPath("cloud-init") {
		return
	}
	var out []string
	r := runCommand(ctx, func(l string) { out = append(out, l) }, "cloud-init", "status", "--wait", "--long")
	if (r.code != 0 || r.err != nil) && ctx.Err() == nil {
		say(fmt.Sprintf("cloud-init status: exit code %d: %s", r.code, strings.Join(out, "; ")))
	}
}
