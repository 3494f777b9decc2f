package plan

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// maxFindings bounds what check reports: a plan full of errors does not need a line for each.
const maxFindings = 20

// MaxQueues is the most RX/TX pairs of a TAP that a Plan may ask for
// (MAX_TAP_QUEUES of the kernel's drivers/net/tun.c).
const MaxQueues = 256

var (
	// itemName is the name of a pool or an image, which becomes part of a path.
	itemName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}$`)
	// userName is a name that useradd(8) accepts.
	userName = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`)
	// ifName is a link name that both the kernel (dev_valid_name) and a shell accept; 15 is IFNAMSIZ-1.
	ifName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.@-]{0,14}$`)
)

// findings collects what is wrong, up to maxFindings.
type findings []error

func (f *findings) add(format string, args ...any) {
	if len(*f) < maxFindings {
		*f = append(*f, fmt.Errorf(format, args...))
	}
}

// unless adds the finding if ok is false.
func (f *findings) unless(ok bool, format string, args ...any) {
	if !ok {
		f.add(format, args...)
	}
}

// check finds contradictions in a Plan, so that executors need not re-check indexes and references.
func (p *Plan) check() error {
	var f findings
	f.unless(p.Host != "" && len(p.Host) <= 253, "host: %q is not a host name", p.Host)
	f.unless(ifName.MatchString(p.EgressInterface), "egress_interface: %q is not the name of an interface",
		p.EgressInterface)
	f.unless(userName.MatchString(p.User), "user: %q is not a user name", p.User)
	f.unless(p.Refresh >= 0, "refresh: must not be negative")
	p.checkPaths(&f)
	p.checkHypervisor(&f)
	p.checkNetwork(&f)
	p.checkSlots(&f)
	used := make([]string, len(p.Slots)) // by index: the item that uses the slot, or ""
	p.checkImages(&f, used)
	p.checkPools(&f, used)
	p.checkArtifacts(&f)
	p.checkInstall(&f)
	return errors.Join(f...)
}

func (p *Plan) checkPaths(f *findings) {
	for _, d := range []struct{ name, path, below string }{
		{"state", p.Paths.State, ""},
		{"disks", p.Paths.Disks, ""},
		{"images", p.Paths.Images, p.Paths.Disks},
		{"clones", p.Paths.Clones, p.Paths.Disks},
		{"workers", p.Paths.Workers, p.Paths.State},
		{"cache", p.Paths.Cache, p.Paths.State},
		{"run", p.Paths.Run, ""},
	} {
		f.unless(cleanPath(d.path) && d.path != "/", "paths.%s: %q is not a clean absolute path", d.name, d.path)
		f.unless(d.below == "" || strings.HasPrefix(d.path, d.below+"/"), "paths.%s: %q is not below %q",
			d.name, d.path, d.below)
	}
	// Socket paths below it are limited to 108 bytes (sun_path), most of which the worker's name takes.
	f.unless(len(p.Paths.Run) <= 40, "paths.run: %q is longer than 40 bytes", p.Paths.Run)
}

// cleanPath reports whether s is an absolute path without "..", doubled slashes, and bytes that end a line or a C string.
func cleanPath(s string) bool {
	return path.IsAbs(s) && path.Clean(s) == s && !strings.ContainsAny(s, "\x00\n")
}

func (p *Plan) checkHypervisor(f *findings) {
	f.unless(oneOf(p.Disks.Backing, "auto", "directory", "xfs-image", "tmpfs"), "disks.backing: unknown %q", p.Disks.Backing)
	f.unless(p.Disks.Size >= 0, "disks.size: must not be negative")
	p.checkDisks(f)
	f.unless(oneOf(p.Hypervisor.Driver, "cloud-hypervisor", "qemu"), "hypervisor.driver: unknown %q", p.Hypervisor.Driver)
	f.unless(p.Hypervisor.Binary != "" && !strings.HasPrefix(p.Hypervisor.Binary, "-"), "hypervisor.binary: %q is not a program",
		p.Hypervisor.Binary)
	f.unless(oneOf(p.Hypervisor.Accel, "", "auto", "kvm", "tcg"), "hypervisor.accel: unknown %q", p.Hypervisor.Accel)
}

// mountOptions matches options of mount(8) that neither a shell nor a unit file misreads.
var mountOptions = regexp.MustCompile(`^[a-z0-9=,]+$`)

func (p *Plan) checkDisks(f *findings) {
	d := p.Disks
	if d.Backing == "directory" {
		f.unless(d == Disks{Backing: d.Backing, Size: d.Size}, "disks: a directory has neither an image nor a tmpfs")
		return
	}
	below := p.Paths.State
	if d.Backing == "tmpfs" {
		f.unless(cleanPath(d.Memory) && strings.HasPrefix(d.Memory, below+"/"), "disks.memory: %q is not a clean path below %q", d.Memory, below)
		f.unless(mountOptions.MatchString(d.MemoryOptions), "disks.memory_options: %q are not mount options", d.MemoryOptions)
		below = d.Memory
	} else {
		f.unless(d.Memory == "" && d.MemoryOptions == "", "disks.memory: only backing \"tmpfs\" has one")
	}
	f.unless(cleanPath(d.Image) && strings.HasPrefix(d.Image, below+"/"), "disks.image: %q is not a clean path below %q", d.Image, below)
	f.unless(mountOptions.MatchString(d.MountOptions), "disks.mount_options: %q are not mount options", d.MountOptions)
}

func (p *Plan) checkNetwork(f *findings) {
	n := &p.Network
	f.unless(n.Subnet.IsValid() && n.Subnet.Addr().Is4() && n.Subnet == n.Subnet.Masked(),
		"network.subnet: %q is not an IPv4 network", n.Subnet)
	f.unless(n.Subnet.Contains(n.Gateway), "network.gateway: %s is not in %s", n.Gateway, n.Subnet)
	f.unless((n.Subnet6 == nil) == (n.Gateway6 == nil), "network: subnet6 and gateway6 must be set together")
	if n.Subnet6 != nil && n.Gateway6 != nil {
		f.unless(n.Subnet6.IsValid() && n.Subnet6.Addr().Is6() && !n.Subnet6.Addr().Is4In6() && *n.Subnet6 == n.Subnet6.Masked(),
			"network.subnet6: %q is not an IPv6 network", n.Subnet6)
		f.unless(n.Subnet6.Contains(*n.Gateway6), "network.gateway6: %s is not in %s", n.Gateway6, n.Subnet6)
	}
	// The minimum of RFC 791 and RFC 8200, and the maximum of a link.
	f.unless(n.MTU >= 576 && n.MTU <= 65535 && (n.Subnet6 == nil || n.MTU >= 1280), "network.mtu: %d is out of range", n.MTU)
	for _, a := range n.DNS {
		f.unless(a.IsValid() && a.Zone() == "", "network.dns: %q is not an address", a)
	}
	f.unless(unicastMAC(n.HostMAC), "network.host_mac: %q is not a unicast MAC address", n.HostMAC)
	f.unless(unicastMAC(n.GuestMAC), "network.worker_mac: %q is not a unicast MAC address", n.GuestMAC)
	f.unless(n.HostMAC != n.GuestMAC, "network: host_mac and worker_mac are the same")
	for i, e := range n.Egress {
		f.unless(oneOf(e.Action, "allow", "deny"), "network.egress[%d]: unknown action %q", i, e.Action)
		for _, to := range e.To {
			f.unless(to.IsValid() && to == to.Masked(), "network.egress[%d]: %q is not a network", i, to)
		}
		for _, r := range e.Ports {
			f.unless(oneOf(r.Protocol, "tcp", "udp") && r.First >= 1 && r.First <= r.Last,
				"network.egress[%d]: %s/%d-%d are not ports", i, r.Protocol, r.First, r.Last)
		}
	}
}

// unicastMAC reports whether s is a 48-bit address without the group bit (IEEE 802), in the notation of Go and the kernel.
func unicastMAC(s string) bool {
	m, err := net.ParseMAC(s)
	return err == nil && len(m) == 6 && m[0]&1 == 0 && m.String() == s
}

func (p *Plan) checkSlots(f *findings) {
	taps := make(map[string]bool, len(p.Slots))
	addrs := map[netip.Addr]bool{p.Network.Gateway: true}
	if p.Network.Gateway6 != nil {
		addrs[*p.Network.Gateway6] = true
	}
	indexes := make(map[int]bool, len(p.Slots))
	for i, s := range p.Slots {
		f.unless(s.Index >= 0 && !indexes[s.Index], "slots[%d]: the index %d is used twice, or negative", i, s.Index)
		indexes[s.Index] = true
		f.unless(ifName.MatchString(s.TAP), "slots[%d]: %q is not the name of an interface", i, s.TAP)
		f.unless(!taps[s.TAP] && s.TAP != p.EgressInterface, "slots[%d]: the interface %q is used twice", i, s.TAP)
		taps[s.TAP] = true
		f.unless(p.Network.Subnet.Contains(s.Address), "slots[%d]: %s is not in %s", i, s.Address, p.Network.Subnet)
		f.unless(!addrs[s.Address], "slots[%d]: the address %s is used twice", i, s.Address)
		addrs[s.Address] = true
		f.unless((s.Address6 == nil) == (p.Network.Subnet6 == nil), "slots[%d]: address6 and subnet6 must be set together", i)
		if s.Address6 != nil && p.Network.Subnet6 != nil {
			f.unless(p.Network.Subnet6.Contains(*s.Address6), "slots[%d]: %s is not in %s", i, s.Address6, p.Network.Subnet6)
			f.unless(!addrs[*s.Address6], "slots[%d]: the address %s is used twice", i, s.Address6)
			addrs[*s.Address6] = true
		}
		f.unless(s.Queues >= 1 && s.Queues <= MaxQueues, "slots[%d]: %d queues are out of range", i, s.Queues)
	}
}

// claim records which item uses a slot, and reports a slot that is out of range or used twice.
func claim(f *findings, used []string, slot int, item string) {
	if slot < 0 || slot >= len(used) {
		f.add("%s: there is no slot %d (the plan has %d)", item, slot, len(used))
		return
	}
	f.unless(used[slot] == "", "%s: slot %d belongs to %s", item, slot, used[slot])
	used[slot] = item
}

func (p *Plan) checkImages(f *findings, used []string) {
	seen := map[string]bool{}
	for i := range p.Images {
		im := &p.Images[i]
		item := "image." + im.Name
		f.unless(itemName.MatchString(im.Name) && !seen[im.Name], "images[%d]: %q is not a valid name, or is used twice", i, im.Name)
		seen[im.Name] = true
		f.unless(userName.MatchString(im.User), "%s: %q is not a user name", item, im.User)
		claim(f, used, im.BuildSlot, item)
		checkSource(f, item, im.Source)
		if im.Prebuild == nil {
			continue
		}
		f.unless(im.Prebuild.Timeout > 0, "%s: prebuild.timeout must be above 0", item)
		for n, s := range im.Prebuild.Steps {
			kinds := count(s.Command != "", len(s.Packages) > 0, s.File != nil)
			f.unless(s.Name != "" && kinds == 1, "%s: prebuild.steps[%d] needs a name and one of command, packages, file", item, n)
			if s.File != nil {
				f.unless(cleanPath(s.File.Path), "%s: prebuild.steps[%d]: %q is not a clean absolute path", item, n, s.File.Path)
				f.unless(s.File.Content == "" || len(s.File.Secret) == 0, "%s: prebuild.steps[%d]: it has both content and a secret", item, n)
				s.File.Secret.check(f, fmt.Sprintf("%s: prebuild.steps[%d]", item, n))
				f.unless(octal(s.File.Mode), "%s: prebuild.steps[%d]: the mode %q is not octal", item, n, s.File.Mode)
			}
		}
	}
}

func checkSource(f *findings, item string, s Source) {
	f.unless(count(s.File != nil, s.URL != nil, s.Ubuntu != nil, s.Debian != nil) == 1, "%s: it needs exactly one source", item)
	switch {
	case s.File != nil:
		f.unless(cleanPath(s.File.Disk) && cleanPath(s.File.Kernel) && (s.File.Initrd == "" || cleanPath(s.File.Initrd)),
			"%s: the files of its source are not clean absolute paths", item)
	case s.URL != nil:
		f.unless(s.URL.Disk != "" && s.URL.Kernel != "", "%s: its source needs a disk and a kernel", item)
	case s.Ubuntu != nil:
		f.unless(s.Ubuntu.Release != "" && s.Ubuntu.Mirror != "" && s.Ubuntu.Arch != "",
			"%s: its source needs a release, a mirror and an arch", item)
	case s.Debian != nil:
		f.unless(s.Debian.Suite != "" && s.Debian.Arch != "", "%s: its source needs a suite and an arch", item)
	}
}

func (p *Plan) checkPools(f *findings, used []string) {
	seen := map[string]bool{}
	for i := range p.Pools {
		pool := &p.Pools[i]
		item := "pool." + pool.Name
		f.unless(itemName.MatchString(pool.Name) && !seen[pool.Name], "pools[%d]: %q is not a valid name, or is used twice", i, pool.Name)
		seen[pool.Name] = true
		if _, err := p.Image(pool.Image); err != nil {
			f.add("%s: %w", item, err)
		}
		f.unless(pool.CPUs >= 1 && pool.Memory >= 1 && pool.Disk >= 1, "%s: cpus, memory and disk must be above 0", item)
		f.unless(oneOf(pool.Start, "warm", "cold"), `%s: start must be "warm" or "cold"; got %q`, item, pool.Start)
		f.unless(pool.StartTimeout > 0, "%s: start_timeout must be above 0", item)
		f.unless(pool.Limits.CPUQuotaPercent >= 0 && pool.Limits.DiskIOPS >= 0 && pool.Limits.NetworkMbps >= 0 && pool.Limits.Connections >= 0,
			"%s: limits must not be negative", item)
		// Subtracting instead of adding keeps this from overflowing.
		if pool.FirstSlot < 0 || pool.MaxInstances < 1 || pool.FirstSlot > len(used)-1 ||
			pool.MaxInstances > len(used)-pool.FirstSlot {
			f.add("%s: there are no slots %d to %d+%d (the plan has %d)", item, pool.FirstSlot, pool.FirstSlot,
				pool.MaxInstances, len(used))
			continue
		}
		for s := range pool.MaxInstances {
			claim(f, used, pool.FirstSlot+s, item)
		}
	}
	for i, r := range p.Runners {
		if _, err := p.Pool(r.Pool); err != nil {
			f.add("runners[%d]: %w", i, err)
		}
		r.Token.check(f, fmt.Sprintf("runners[%d].token", i))
	}
}

func (p *Plan) checkArtifacts(f *findings) {
	seen := map[string]bool{}
	for i, file := range p.Files {
		f.unless(cleanPath(file.Path) && file.Path != "/", "files[%d]: %q is not a clean absolute path", i, file.Path)
		f.unless(!seen[file.Path], "files[%d]: %q is written twice", i, file.Path)
		seen[file.Path] = true
		f.unless(octal(file.Mode), "%s: the mode %q is not octal", file.Path, file.Mode)
		f.unless(userName.MatchString(file.Owner) && userName.MatchString(file.Group), "%s: %s:%s is not an owner and a group",
			file.Path, file.Owner, file.Group)
		for _, s := range file.Secrets {
			f.unless(s.Placeholder != "" && strings.Contains(file.Content, s.Placeholder),
				"%s: the placeholder %q is not in it", file.Path, s.Placeholder)
			Text{s.Secret}.check(f, file.Path+": "+s.Placeholder)
		}
	}
	for i, u := range p.Units {
		f.unless(u.Name != "" && len(u.Name) <= 255 && !strings.ContainsAny(u.Name, "/ \n\x00"),
			"units[%d]: %q is not the name of a unit", i, u.Name)
	}
	for i, s := range p.Sysctls {
		f.unless(s.Key != "" && !strings.ContainsAny(s.Key, "= \t\n\x00") && !strings.Contains(s.Key, "..") &&
			!strings.ContainsAny(s.Value, "\n\x00"), "sysctls[%d]: %q = %q is not a setting", i, s.Key, s.Value)
	}
}

// octal reports whether s is a file mode in octal digits without a sign, such as "0644".
func octal(s string) bool {
	n, err := strconv.ParseUint(s, 8, 32)
	return err == nil && n <= 0o7777
}

func oneOf(s string, of ...string) bool { return slices.Contains(of, s) }

func count(set ...bool) int {
	n := 0
	for _, s := range set {
		if s {
			n++
		}
	}
	return n
}
