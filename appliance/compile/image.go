package compile

import (
	"fmt"
	"strings"
	"time"
	"unicode"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
	"github.com/fleetingd/fleetingd/seed"
)

// guestPath is the path of the guest part in an image.
const guestPath = "/usr/lib/fleetingd/fleetingd"

// prebuildTimeout applies to an image that is prebuilt without a prebuild block. It is the block's default.
const prebuildTimeout = 30 * time.Minute

// images compiles the image blocks. Image i has the i-th slot after those of the pools.
func (c *compiler) images() {
	first := len(c.plan.Slots) - len(c.host.Images)
	for i, s := range c.host.Images {
		im := plan.Image{Name: s.Name, Source: source(s), User: s.User, BuildSlot: first + i}
		// A distribution's image lacks the guest part and often even the user, so it is always prebuilt. A user's own disk
		// without a prebuild block is used unchanged.
		if s.Prebuild != nil || s.Ubuntu != nil || s.Debian != nil {
			im.Prebuild = c.prebuild(s, c.plan.Slots[im.BuildSlot])
		}
		c.plan.Images = append(c.plan.Images, im)
		c.from(s.Range, plan.KindImage, s.Name)
	}
}

func source(s *hostspec.Image) plan.Source {
	switch {
	case s.File != nil:
		return plan.Source{File: &plan.FileSource{
			Disk: s.File.Disk, Kernel: s.File.Kernel, Initrd: s.File.Initrd, Cmdline: s.File.Cmdline,
		}}
	case s.URL != nil:
		return plan.Source{URL: &plan.URLSource{
			Disk: s.URL.Disk, Kernel: s.URL.Kernel, Initrd: s.URL.Initrd,
			SHA256: s.URL.SHA256, SHA256Sums: s.URL.SHA256Sums, Cmdline: s.URL.Cmdline,
		}}
	case s.Ubuntu != nil:
		return plan.Source{Ubuntu: &plan.UbuntuSource{
			Release: s.Ubuntu.Release, Mirror: s.Ubuntu.Mirror, Arch: s.Ubuntu.Arch,
		}}
	case s.Debian != nil:
		return plan.Source{Debian: &plan.DebianSource{
			Suite: s.Debian.Suite, Mirror: s.Debian.Mirror, SecurityMirror: s.Debian.SecurityMirror, Arch: s.Debian.Arch,
			Packages: notNil(s.Debian.Packages),
		}}
	}
	return plan.Source{}
}

func (c *compiler) prebuild(s *hostspec.Image, slot plan.Slot) *plan.Prebuild {
	p := &plan.Prebuild{
		Steps:   []plan.Step{},
		Timeout: plan.Duration(prebuildTimeout),
		Seed:    prebuildSeed(s, c.plan.SlotNetwork(slot)),
	}
	if s.Prebuild == nil {
		return p
	}
	p.Timeout = plan.Duration(s.Prebuild.Timeout)
	for i, f := range s.Prebuild.Files {
		p.Steps = append(p.Steps, plan.Step{
			Name: fmt.Sprintf("file[%d]: %s", i, short(f.Path)),
			File: &plan.StepFile{Path: f.Path, Content: f.Content, Secret: planText(f.Secret), Mode: f.Mode},
		})
	}
	if len(s.Prebuild.Packages) > 0 {
		p.Steps = append(p.Steps, plan.Step{
			Name:     "packages: " + short(strings.Join(s.Prebuild.Packages, " ")),
			Packages: s.Prebuild.Packages,
		})
	}
	for i, run := range s.Prebuild.Run {
		p.Steps = append(p.Steps, plan.Step{Name: fmt.Sprintf("run[%d]: %s", i, short(body(run))), Command: run})
	}
	return p
}

// body returns a script without its "#!" line, unless there is nothing else.
func body(run string) string {
	if line, rest, _ := strings.Cut(run, "\n"); strings.HasPrefix(line, "#!") && strings.TrimSpace(rest) != "" {
		return rest
	}
	return run
}

// short returns a step's text as one line for a log: control characters become spaces, and it has at most 60 characters.
func short(s string) string {
	line := strings.Join(strings.FieldsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }), " ")
	if r := []rune(line); len(r) > 60 {
		return string(r[:59]) + "…"
	}
	return line
}

// prebuildSeed returns the seed that boots an image's prebuild VM. It creates the job user, copies the guest part from the
// seed's ISO and starts it; from then on the host is in control.
func prebuildSeed(s *hostspec.Image, n *seed.Network) seed.Seed {
	return seed.Seed{
		InstanceID: "prebuild-" + s.Name,
		Hostname:   "prebuild",
		Network:    n,
		Users:      []seed.User{{Name: s.User}},
		RunCmd: [][]string{
			{"mkdir", "-p", "/run/fleetingd-seed", "/usr/lib/fleetingd"},
			{"mount", "-o", "ro", "LABEL=" + seed.Label, "/run/fleetingd-seed"},
			{"install", "-m", "0755", "/run/fleetingd-seed/fleetingd", guestPath},
			{"umount", "/run/fleetingd-seed"},
			// It runs as a unit of its own: cloud-init can then finish, so that steps can wait for cloud-init. If the kernel kills a step
			// because memory ran out, systemd must not stop the guest part with it. systemd before 243 never does, and rejects OOMPolicy.
			{"sh", "-c", `systemd-run -p OOMPolicy=continue "$@" || systemd-run "$@"`, "sh",
				"--unit=fleetingd-prebuild", "--no-block", guestPath, "guest", "--prebuild"},
		},
	}
}

// notNil turns nil into an empty list, which JSON writes as [] instead of null.
func notNil[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}
