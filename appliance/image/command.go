package image

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/fleetingd/fleetingd/appliance/visible"
)

// lastLines is how many lines of a failed program's output the error shows.
const lastLines = 12

// command runs a program. Each line of its output is passed to line, which may be nil. If it fails, the error names the program and
// shows its last lines. When ctx ends, the program's process group is killed.
func command(ctx context.Context, line func(string), name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	return runCommand(ctx, cmd, strings.Join(cmd.Args, " "), line)
}

// runCommand is command for a prepared cmd. Errors call it name.
func runCommand(ctx context.Context, cmd *exec.Cmd, name string, line func(string)) error {
	out := &lines{emit: line}
	cmd.Stdout, cmd.Stderr = out, out
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	err := cmd.Run()
	out.flush()
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if len(out.last) == 0 {
		return fmt.Errorf("%s: %w", name, err)
	}
	return fmt.Errorf("%s: %w; its last lines:\n  %s", name, err, strings.Join(out.last, "\n  "))
}

// lines is a writer that passes on complete lines, escaped for a terminal, and keeps the last few. It truncates lines to 4 KiB.
type lines struct {
	emit func(string)
	buf  []byte
	last []string
}

func (l *lines) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		part, rest, whole := bytes.Cut(p, []byte{'\n'})
		if room := 4096 - len(l.buf); room > 0 {
			l.buf = append(l.buf, part[:min(len(part), room)]...)
		}
		if whole {
			l.flush()
		}
		p = rest
	}
	return n, nil
}

func (l *lines) flush() {
	text := strings.TrimRight(string(l.buf), "\r ")
	l.buf = l.buf[:0]
	if text == "" {
		return
	}
	text = visible.Text(text)
	if l.last = append(l.last, text); len(l.last) > lastLines {
		l.last = l.last[1:]
	}
	if l.emit != nil {
		l.emit(text)
	}
}
