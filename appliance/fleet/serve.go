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

// endTimeout is how long a plugin that was told to end, or lost its parent, may clean up.
const endTimeout = time.Minute

// Serve is the plugin's main function, of both of its halves (see front.go). It serves to the process that started this one, or
// answers `version` and `bootstrap`. It returns when that process is done with it. When that process dies without a
// word, and at SIGTERM, it ends this one in order: see Shutdown. go-plugin itself ignores SIGINT.
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
	// Caught and not ignored, since an ignored signal stays so in what is started. A write to the log
	// of a parent that is gone must not end the cleaning up (SIGPIPE); a service manager may send the runner's
	// SIGQUIT, which lets its jobs end, to all of its processes; and SIGHUP has the runner read its config
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
			reason = "the process that started the plugin is gone"
		}
		code := f.endOnce(reason)
		os.RemoveAll(hidden)
		os.Exit(code)
	}()
	plugin.Main(f, v)
	f.endOnce("done")
}

// hideSocket has go-plugin put the socket that the runner calls us by where nobody can find it: whoever connects to it may ask for
// workers and for their keys, and a VMM that was taken over runs as the same user. go-plugin's own name for it could be guessed within
// the hour.
func hideSocket() (dir string, err error) {
	if dir, err = os.MkdirTemp("", "fleetingd-"+rand.Text()+"-"); err != nil {
		return "", err
	}
	return dir, os.Setenv("TMPDIR", dir)
}

// endOnce shuts the Group down and gives the exit code.
func (g *Group) endOnce(reason string) int {
	ctx, cancel := context.WithTimeout(context.Background(), endTimeout)
	defer cancel()
	if err := g.Shutdown(ctx); err != nil {
		g.log.Error("plugin shutting down", "reason", reason, "error", err)
		return 1
	}
	return 0
}

// parentGone is closed when the parent process has ended. GitLab Runner leaves its plugins orphaned, with no Shutdown
// call, where its shutdown_timeout runs out. Two things tell it: the parent's pidfd, and
// the pipe that the parent reads standard output from, which also shows a parent that was gone before the first look.
func parentGone() <-chan struct{} {
	gone := make(chan struct{})
	fds := []unix.PollFd{{Fd: 1}} // POLLERR and POLLHUP need not be asked for
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
					// Not open, or a terminal that hung up: it says nothing of the parent, and would be said
					// again at once.
					fds[i].Fd = -1
				}
			}
		}
	}()
	return gone
}
