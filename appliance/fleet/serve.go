package fleet

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"time"

	"gitlab.com/gitlab-org/fleeting/fleeting/plugin"
	"golang.org/x/sys/unix"
)

// endTimeout is how long a plugin may clean up after it was told to end, or has lost its parent.
const endTimeout = time.Minute

// Serve is the main function of both halves of the plugin (see front.go). It serves the process that started this one, or
// answers `version` and `bootstrap`. It returns when that process is done with it. At SIGTERM, or when that process dies,
// it shuts the plugin down first: see Shutdown. go-plugin itself ignores SIGINT.
func Serve(g *Group, v plugin.VersionInfo) {
	if os.Getenv(backVariable) != "" {
		os.Exit(serveBack(g))
	}
	l, err := newLauncher()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fleetingd:", err)
		os.Exit(1)
	}
	hidden, err := hideSocket()
	if err != nil {
		fmt.Fprintln(os.Stderr, "fleetingd:", err)
		os.Exit(1)
	}
	defer os.RemoveAll(hidden)
	f := newFront(g.UnmarshalJSON, l.launch)
	// Caught, not ignored, since children inherit ignored signals. SIGPIPE: a write to the log of a
	// parent that is gone must not end the cleanup. SIGQUIT: a service manager may send it to all processes of the
	// runner, which lets its jobs end at that signal. SIGHUP makes the runner read its configuration
	// again.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, unix.SIGPIPE, unix.SIGQUIT, unix.SIGHUP)
	go func() {
		for range caught {
			continue
		}
	}()
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	orphaned := parentGone()
	go func() {
		reason := "SIGTERM"
		select {
		case <-term:
		case <-orphaned:
			reason = "the process that started the plugin has ended"
		}
		code := f.endOnce(reason)
		os.RemoveAll(hidden)
		os.Exit(code)
	}()
	plugin.Main(f, v)
	f.endOnce("done")
}

// hideSocket makes go-plugin put the runner's socket into a folder with a random name: whoever connects to it can ask for workers
// and their keys, and a VMM that was taken over runs as the same user. The name that go-plugin chooses could be guessed within
// an hour.
func hideSocket() (dir string, err error) {
	if dir, err = os.MkdirTemp("", "fleetingd-"+rand.Text()+"-"); err != nil {
		return "", err
	}
	return dir, os.Setenv("TMPDIR", dir)
}

// endOnce shuts the Group down and returns the exit code.
func (g *Group) endOnce(reason string) int {
	ctx, cancel := context.WithTimeout(context.Background(), endTimeout)
	defer cancel()
	if err := g.Shutdown(ctx); err != nil {
		g.log.Error("plugin shutting down", "reason", reason, "error", err)
		return 1
	}
	return 0
}

// parentGone returns a channel that is closed when the parent process has ended. If its shutdown_timeout runs out, GitLab Runner
// orphans its plugins without calling Shutdown. Two things show that: the parent's pidfd and the pipe from which the parent reads
// standard output, which also shows a parent that ended before the pidfd was opened.
func parentGone() <-chan struct{} {
	gone := make(chan struct{})
	fds := []unix.PollFd{{Fd: 1}} // POLLERR and POLLHUP are always reported
	parent := os.Getppid()
	if fd, err := unix.PidfdOpen(parent, 0); err == nil && os.Getppid() == parent {
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	go func() {
		for {
			if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
				return
			}
			for i := range fds {
				switch r := fds[i].Revents; {
				case r&(unix.POLLERR|unix.POLLIN) != 0:
					close(gone)
					return
				case r != 0:
					// Not open, or a terminal that hung up: it tells nothing about the parent, and poll would
					// report it again and again.
					fds[i].Fd = -1
				}
			}
		}
	}()
	return gone
}
