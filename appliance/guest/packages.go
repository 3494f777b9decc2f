package guest

import (
	"context"
	"errors"
	"regexp"
	"strings"
	"time"
)

// lockPatience is how long another package manager is waited for: an image's own first-boot update, say.
const lockPatience = 10 * time.Minute

// aptOptions bound what apt waits for: a mirror that swallows packets costs it this timeout for each address and try.
var aptOptions = []string{
	"-y", "-q",
	"-o", "DPkg::Lock::Timeout=600", // lockPatience, for dpkg's lock
	"-o", "Acquire::Retries=2",
	"-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20",
	// A file that the spec wrote before is kept if a package brings its own; nobody can answer dpkg's question.
	"-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold",
	"-o", "Dpkg::Use-Pty=0",
}

// installPackages uses the distribution's package manager as a person would: recommended packages come with
// the named ones if that is the distribution's default, since a package's documentation assumes them.
// An image that wants less says so in its own apt configuration.
func installPackages(ctx context.Context, names []string, say func(string)) result {
	switch {
	case onPath("apt-get"):
		return aptInstall(ctx, "apt-get", names, say)
	case onPath("dnf"):
		args := append([]string{"-y", "--setopt=timeout=20", "--setopt=retries=3", "install", "--"}, names...)
		return runCommand(ctx, say, "dnf", args...)
	case onPath("apk"):
		return runCommand(ctx, say, "apk", append([]string{"add", "--update-cache", "--"}, names...)...)
	}
	return result{code: 1, err: errors.New("the image has none of apt-get, dnf and apk; install packages in a run step")}
}

// aptLine are the lines in which apt says how a download went.
var aptLine = regexp.MustCompile(`^(Get|Hit|Ign|Err):[0-9]+ `)

func aptInstall(ctx context.Context, apt string, names []string, say func(string)) result {
	options := aptOptions[:len(aptOptions):len(aptOptions)]
	var r result
	fetched, failed := false, false
	for start := time.Now(); ; {
		locked := false
		r = runCommand(ctx, func(l string) {
			say(l)
			if m := aptLine.FindStringSubmatch(l); m != nil {
				fetched = fetched || m[1] == "Get" || m[1] == "Hit"
				failed = failed || m[1] == "Err"
			}
			// Unlike dpkg's lock, apt does not wait for this one.
			locked = locked || strings.Contains(l, "Could not get lock")
		}, apt, append(options, "update")...)
		if r.code <= 0 || !locked || time.Since(start) > lockPatience {
			break
		}
		say("waiting for the package manager that holds the lock")
		if !pause(ctx, 5*time.Second) {
			break
		}
	}
	if r.code != 0 || r.err != nil {
		return r
	}
	if failed && !fetched {
		// apt-get calls that a success, and the packages may be installed already. But there is nothing to wait for.
		options = append(options, "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=5", "-o", "Acquire::https::Timeout=5")
	}
	return runCommand(ctx, say, apt, append(append(options, "install", "--"), names...)...)
}
