package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// lockPatience is how long to wait for another package manager, such as an image's own first-boot update.
const lockPatience = 10 * time.Minute

// aptOptions limit what apt waits for: a mirror that drops packets costs it this timeout for each address and try.
var aptOptions = []string{
	"-y", "-q",
	"-o", "DPkg::Lock::Timeout=600", // lockPatience, for dpkg's lock
	"-o", "Acquire::Retries=2",
	"-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20",
	// A file that the spec wrote earlier is kept if a package brings its own; nobody can answer dpkg's question.
	"-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold",
	"-o", "Dpkg::Use-Pty=0",
}

// installPackages uses the distribution's package manager as a person would: recommended packages are installed
// if that is the distribution's default, since a package's documentation assumes them. An image that wants less
// sets that in its own apt configuration.
func installPackages(ctx context.Context, names []string, say func(string)) result {
	switch {
	case onPath("apt-get"):
		return aptInstall(ctx, "apt-get", aptPatience, names, say)
	case onPath("dnf"):
		args := append([]string{"-y", "--setopt=timeout=20", "--setopt=retries=3", "install", "--"}, names...)
		return runCommand(ctx, say, "dnf", args...)
	case onPath("apk"):
		return runCommand(ctx, say, "apk", append([]string{"add", "--update-cache", "--"}, names...)...)
	}
	return result{code: 1, err: errors.New("the image has none of apt-get, dnf and apk; install packages in a run step")}
}

// aptPatience is how long `apt-get update` may run without any success. If a name does not resolve, it waits for the resolver for
// every file of every mirror, again and again.
const aptPatience = time.Minute

// lookupTimeout is how long a name may take to resolve.
const lookupTimeout = 10 * time.Second

// aptDownload matches the lines in which apt reports on a download.
var aptDownload = regexp.MustCompile(`^(Get|Hit|Ign|Err):[0-9]+ (\S+)`)

// errNothingFetched ends an update.
var errNothingFetched = errors.New("could not connect to any mirror")

// aptUpdate is one run of `apt-get update`.
type aptUpdate struct {
	mu      sync.Mutex
	fetched bool   // whether anything was fetched
	failed  string // URL of the last failed download, or ""
	locked  bool   // by another process: unlike for dpkg's lock, apt does not wait for this one
}

func (u *aptUpdate) hear(line string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if m := aptDownload.FindStringSubmatch(line); m != nil {
		if m[1] == "Get" || m[1] == "Hit" {
			u.fetched = true
		} else {
			u.failed = m[2]
		}
	}
	u.locked = u.locked || strings.Contains(line, "Could not get lock")
}

// unreached returns the URL of a mirror if none was reached, or "".
func (u *aptUpdate) unreached() string {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.fetched {
		return ""
	}
	return u.failed
}

func (u *aptUpdate) run(ctx context.Context, apt string, patience time.Duration, say func(string)) result {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		for wait := patience; pause(ctx, wait); wait = patience / 10 {
			if u.unreached() != "" {
				cancel(errNothingFetched)
			}
		}
	}()
	r := runCommand(ctx, func(l string) { say(l); u.hear(l) }, apt, slices.Concat(aptOptions, []string{"update"})...)
	if errors.Is(context.Cause(ctx), errNothingFetched) {
		say(fmt.Sprintf("apt-get update was stopped after %v: %v", patience, explain(u.unreached())))
		return result{}
	}
	return r
}

// explain returns why a mirror was not reached, if apt has not found out yet.
func explain(mirror string) error {
	at, err := url.Parse(mirror)
	if err != nil || at.Hostname() == "" {
		return errNothingFetched
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	if _, err := net.DefaultResolver.LookupHost(ctx, at.Hostname()); err != nil {
		return fmt.Errorf("could not resolve %s (%w)", at.Hostname(), err)
	}
	return fmt.Errorf("could not connect to %s", at.Host)
}

func aptInstall(ctx context.Context, apt string, patience time.Duration, names []string, say func(string)) result {
	u := &aptUpdate{}
	r := u.run(ctx, apt, patience, say)
	for start := time.Now(); r.code > 0 && u.locked && time.Since(start) < lockPatience; r = u.run(ctx, apt, patience, say) {
		say("waiting for the package manager that holds the lock")
		if !pause(ctx, 5*time.Second) {
			break
		}
		u = &aptUpdate{}
	}
	if r.code != 0 || r.err != nil {
		return r
	}
	args := slices.Concat(aptOptions, []string{"install"})
	if u.unreached() != "" {
		// apt-get considers that a success, and the packages may indeed be there already.
		args = append(args, "--no-download")
	}
	return runCommand(ctx, say, apt, append(append(args, "--"), names...)...)
}
