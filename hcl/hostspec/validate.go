package hostspec

import (
	"fmt"
	"net/netip"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"

	"github.com/fleetingd/fleetingd/appliance/netrange"
)

// validate finds what is wrong with values that are well-formed. It changes nothing,
// and says nothing about a value that decode has found wrong.
func (l *loader) validate(s *spec) {
	l.checkPresence(s)
	l.checkNames(s)
	for _, h := range s.hosts {
		l.validateHost(h)
	}
	for _, i := range s.images {
		l.validateImage(i)
	}
	for _, p := range s.pools {
		l.validatePool(p, s.images)
	}
	l.checkPlaces(s)
	l.validateRunners(s)
	for _, h := range s.hosts {
		for _, r := range s.runners {
			l.checkDestinations(h, r)
		}
	}
}

// maxPlaces is the most workers and images of a host. Each has a TAP, and each is named in the plan, which has a largest size.
const maxPlaces = 1 << 16

// checkPlaces finds where there are more: at the pool that is one too many.
func (l *loader) checkPlaces(s *spec) {
	n := len(s.images)
	for _, p := range s.pools {
		if !l.ok(p, "max_instances") || p.MaxInstances < 1 || p.MaxInstances > maxPlaces {
			continue
		}
		if n += p.MaxInstances; n > maxPlaces {
			l.errorf(l.at(p, "max_instances"), "Too many workers", "With this pool, the host has %d slots for workers and images; it can have %d. "+
				"Lower max_instances.", n, maxPlaces)
			return
		}
	}
}

func (l *loader) checkPresence(s *spec) {
	for _, need := range []struct {
		kind, example string
		n             int
	}{
		{"host", "host \"metal-01\" {\n  egress_interface = \"eno1\"\n}", len(s.hosts)},
		{"image", "image \"ubuntu\" {\n  ubuntu {\n    release = \"noble\"\n  }\n}", len(s.images)},
		{"pool", "pool \"small\" {\n  image         = image.ubuntu\n  cpus          = 4\n  memory        = \"8GiB\"\n" +
			"  disk          = \"30GiB\"\n  max_instances = 10\n}", len(s.pools)},
	} {
		if need.n == 0 {
			l.errorf(l.top(), "Missing block", "The spec has no %s block. Write, for example:\n\n%s", need.kind, need.example)
		}
	}
}

// top is the start of the spec.
func (l *loader) top() *hcl.Range {
	return &hcl.Range{Filename: l.opts.Path, Start: hcl.InitialPos, End: hcl.InitialPos}
}

var (
	// A name can be written after a dot, and is part of paths, unit names and host names.
	nameSyntax = regexp.MustCompile(`^[a-z]([a-z0-9-]*[a-z0-9])?$`)
	// A host's name may be a DNS name.
	hostSyntax = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)
	badInName  = regexp.MustCompile(`[^a-z0-9-]+`)
)

const (
	// maxName leaves room for a worker's id in a host name's 63 bytes (RFC 1035) and in a socket's path.
	maxName = 32
	maxHost = 64 // HOST_NAME_MAX
)

// checkNames checks labels, and that none of a kind comes twice.
func (l *loader) checkNames(s *spec) {
	seen := map[string]map[string]hcl.Range{}
	check := func(kind, name string, owner any, def hcl.Range, syntax *regexp.Regexp, longest int) {
		at := l.at(owner, "label")
		if !syntax.MatchString(name) {
			l.errorf(at, "Invalid name", "%s cannot be %s %s's name: use lower-case letters, digits and -, beginning with a letter%s.",
				quote(name), article(kind), kind, suggestName(name))
		} else if len(name) > longest {
			l.errorf(at, "Invalid name", "The name %s has %d characters; %s %s's name may have %d, because it becomes part of paths and host names.",
				quote(name), len(name), article(kind), kind, longest)
		}
		if seen[kind] == nil {
			seen[kind] = map[string]hcl.Range{}
		}
		if first, ok := seen[kind][name]; ok {
			l.errorf(at, "Duplicate name", "The %s %q is already defined at %s. Choose another name.", kind, name, first)
			return
		}
		seen[kind][name] = def
	}
	for _, h := range s.hosts {
		check("host", h.Name, h, h.Range, hostSyntax, maxHost)
	}
	for _, i := range s.images {
		check("image", i.Name, i, i.Range, nameSyntax, maxName)
	}
	for _, p := range s.pools {
		check("pool", p.Name, p, p.Range, nameSyntax, maxName)
	}
	for _, r := range s.runners {
		check("runner", r.Name, r, r.Range, nameSyntax, maxName)
	}
}

// suggestName is the nearest name that would do.
func suggestName(name string) string {
	s := strings.Trim(badInName.ReplaceAllString(strings.ToLower(name), "-"), "-")
	if s = strings.TrimLeft(s, "0123456789-"); nameSyntax.MatchString(s) && len(s) <= maxName {
		return fmt.Sprintf(" (such as %q)", s)
	}
	return ""
}

// oneOf checks an attribute that has a few possible values.
func (l *loader) oneOf(owner any, name, value string, values ...string) bool {
	if !l.ok(owner, name) || slices.Contains(values, value) {
		return true
	}
	choice := "one of " + quotedList(values)
	if len(values) == 2 {
		choice = fmt.Sprintf("%q or %q", values[0], values[1])
	}
	l.errorf(l.at(owner, name), "Invalid "+name, "%s must be %s; got %s%s.", name, choice, quote(value), l.didYouMean(value, values))
	return false
}

// inRange checks a number that was given.
func (l *loader) inRange(owner any, name string, value, least, most int, why string) {
	if l.ok(owner, name) && (value < least || value > most) {
		l.errorf(l.at(owner, name), "Invalid "+name, "%s must be between %d and %d; got %d.%s", name, least, most, value, why)
	}
}

func (l *loader) validateHost(h *Host) {
	l.checkInterface(h)
	l.checkStateDir(h)
	if l.ok(h, "refresh") && h.Refresh != 0 && h.Refresh < time.Minute {
		l.errorf(l.at(h, "refresh"), "Invalid refresh", "Images cannot be rebuilt every %s: building one takes minutes. "+
			"Write refresh = \"24h\", or \"0s\" for never.", h.Refresh)
	}
	l.validateDisks(&h.Disks)
	l.validateInstall(&h.Install)
	l.validateHypervisor(h)
	l.validateNetwork(&h.Network)
	l.checkCapacity(h)
	l.checkGlobalSettings(h)
}

var interfaceSyntax = regexp.MustCompile(`^[A-Za-z0-9_.@+-]+$`)

// checkInterface holds the name to the kernel's dev_valid_name and to what needs no
// quoting in a ruleset. Whether there is such an interface shows on the host.
func (l *loader) checkInterface(h *Host) {
	if !l.ok(h, "egress_interface") {
		return
	}
	name, at := h.EgressInterface, l.at(h, "egress_interface")
	const longest = 15 // IFNAMSIZ - 1
	switch {
	case name == "lo":
		l.errorf(at, "Invalid egress_interface", "Traffic cannot leave through lo. Write the interface of the default route (ip route show default).")
	case len(name) > longest:
		l.errorf(at, "Invalid egress_interface", "%s has %d characters; an interface's name has at most %d.", quote(name), len(name), longest)
	case !interfaceSyntax.MatchString(name) || name == "." || name == "..":
		l.errorf(at, "Invalid egress_interface", "%s is not an interface name. Write it as \"ip link\" shows it, such as \"eno1\".", quote(name))
	}
}

var (
	pathSyntax = regexp.MustCompile(`^/[A-Za-z0-9_./+-]*$`)
	systemDirs = []string{"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/media", "/mnt", "/opt", "/proc", "/root",
		"/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var", "/var/cache", "/var/lib", "/var/tmp"}
)

// maxStateDir keeps the paths below state_dir far from PATH_MAX and, for what
// listens there, within sun_path's 108 bytes.
const maxStateDir = 80

func (l *loader) checkStateDir(h *Host) {
	if !l.ok(h, "state_dir") {
		return
	}
	dir, at := h.StateDir, l.at(h, "state_dir")
	bad := func(format string, args ...any) { l.errorf(at, "Invalid state_dir", format, args...) }
	switch {
	case !strings.HasPrefix(dir, "/"):
		bad("%s is a relative path. Write an absolute one, such as \"/var/lib/fleetingd\".", quote(dir))
	case !pathSyntax.MatchString(dir):
		bad("%s has characters that systemd units would have to quote. Use only letters, digits and - _ . +", quote(dir))
	case path.Clean(dir) != dir:
		bad("Write %s as %q.", quote(dir), path.Clean(dir))
	case len(dir) > maxStateDir:
		bad("The path has %d characters; it may have %d, because sockets below it may have 107.", len(dir), maxStateDir)
	case slices.Contains(systemDirs, dir):
		own := "/var/lib/fleetingd"
		if slices.Contains([]string{"/media", "/mnt", "/opt", "/srv"}, dir) {
			own = path.Join(dir, "fleetingd")
		}
		bad("%s belongs to the system. Choose another folder, such as %q.", dir, own)
	case under(dir, "/proc") || under(dir, "/sys") || under(dir, "/dev"):
		bad("%s cannot hold files: its contents are the kernel's. Write \"/var/lib/fleetingd\", for example.", dir)
	case len(h.Runners) == 0: // `fleetingd run` alone uses it
	case under(dir, "/home") || under(dir, "/root") || under(dir, "/run/user"):
		bad("The runner cannot see %s: its unit hides home folders (ProtectHome=). Write \"/var/lib/fleetingd\" or \"/srv/fleetingd\", for example.", dir)
	case under(dir, "/tmp") || under(dir, "/var/tmp"):
		l.warnf(at, "Folder is not kept", "The runner cannot see %s: its unit has its own /tmp (PrivateTmp=), and the system cleans that folder up. "+
			"Write \"/var/lib/fleetingd\" or \"/srv/fleetingd\", for example.", dir)
	}
}

func under(p, dir string) bool { return strings.HasPrefix(p, dir+"/") }

func (l *loader) validateDisks(d *Disks) {
	if !l.oneOf(d, "backing", d.Backing, "auto", "directory", "xfs-image", "tmpfs") {
		return
	}
	// mkfs.xfs makes nothing below 300 MiB, and an image alone needs more.
	const least = 1 << 30
	switch {
	case d.Backing == "directory" && l.ok(d, "size"):
		l.errorf(l.at(d, "size"), "Invalid size", "backing = \"directory\" uses the folder's file system as it is. "+
			"Omit size, or write backing = \"xfs-image\".")
	case (d.Backing == "xfs-image" || d.Backing == "tmpfs") && !l.given(d, "size"):
		l.errorf(&d.Range, "Missing attribute", "With backing = %q, disks needs a size, the most that they may take. Write, for example: size = \"200GiB\"", d.Backing)
	case l.ok(d, "size") && d.Size < least:
		l.errorf(l.at(d, "size"), "Invalid size", "%s is too small for an image and a worker. Write \"%s\" or more.", formatSize(d.Size), formatSize(least))
	}
}

// given reports whether an attribute was written, rightly or wrongly.
func (l *loader) given(owner any, name string) bool {
	_, ok := l.attrs[attrKey{owner, name}]
	return ok
}

var binarySyntax = regexp.MustCompile(`^[A-Za-z0-9_./+-]+$`)

func (l *loader) validateHypervisor(h *Host) {
	v := &h.Hypervisor
	drivers := []string{"cloud-hypervisor", "qemu"}
	if !slices.Contains(drivers, v.Driver) {
		l.errorf(l.at(v, "label"), "Unknown hypervisor", "%s is not a hypervisor%s. Write hypervisor %q or hypervisor %q.",
			quote(v.Driver), l.didYouMean(v.Driver, drivers), drivers[0], drivers[1])
	}
	if l.ok(v, "binary") {
		switch b := v.Binary; {
		case !binarySyntax.MatchString(b) || strings.HasPrefix(b, "-"):
			l.errorf(l.at(v, "binary"), "Invalid binary", "%s is not the name of a program. Write a name found on PATH, or an absolute path.", quote(b))
		case strings.Contains(b, "/") && (!path.IsAbs(b) || path.Clean(b) != b):
			l.errorf(l.at(v, "binary"), "Invalid binary", "%s is not an absolute, clean path. Write one, or a name found on PATH.", quote(b))
		}
	}
	if l.given(v, "accel") && v.Driver == "cloud-hypervisor" {
		l.errorf(l.at(v, "accel"), "Invalid accel", "%s always runs on KVM. Omit accel, or write hypervisor \"qemu\".", v.Driver)
	} else {
		l.oneOf(v, "accel", v.Accel, "auto", "kvm", "tcg")
	}
	l.checkArch(h)
}

// checkArch finds images of two architectures: one hypervisor runs only one.
func (l *loader) checkArch(h *Host) {
	var first *Image
	for _, i := range h.Images {
		switch {
		case i.arch() == "":
		case first == nil:
			first = i
		case i.arch() != first.arch():
			l.errorf(&i.Range, "Images of two architectures", "The image %q is %s and %q is %s, but host %q can run only one architecture. "+
				"Write the same arch in both.", i.Name, i.arch(), first.Name, first.arch(), h.Name)
		}
	}
}

// notUnicast are ranges that no worker can have an address in.
var notUnicast = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"), netip.MustParsePrefix("::/8"), netip.MustParsePrefix("fe80::/10"), netip.MustParsePrefix("ff00::/8"),
}

// private are the ranges that the internet does not use: RFC 1918, RFC 6598 and RFC 4193.
var private = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"),
	netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("198.18.0.0/15"),
}

func overlapsAny(p netip.Prefix, with []netip.Prefix) (netip.Prefix, bool) {
	i := slices.IndexFunc(with, p.Overlaps)
	if i < 0 {
		return netip.Prefix{}, false
	}
	return with[i], true
}

func (l *loader) validateNetwork(n *Network) {
	l.checkSubnet(n)
	l.checkSubnet6(n)
	least, why := 576, ""
	if n.Subnet6.IsValid() {
		least, why = 1280, " IPv6 needs at least 1280 (RFC 8200)."
	}
	l.inRange(n, "mtu", n.MTU, least, 9216, why)
	l.checkDNS(n)

	names := map[string]hcl.Range{}
	for _, e := range n.Egress {
		if first, ok := names[e.Name]; ok {
			l.errorf(l.at(e, "label"), "Duplicate name", "The egress block %q is already defined at %s. Choose another name.", e.Name, first)
		}
		names[e.Name] = e.Range
		l.validateEgress(e, n)
	}
}

func (l *loader) checkSubnet(n *Network) {
	if !l.ok(n, "subnet") {
		return
	}
	at := l.at(n, "subnet")
	if !n.Subnet.Addr().Is4() {
		l.errorf(at, "Invalid subnet", "%s is IPv6. Workers always have IPv4, from subnet; write this as subnet6.", n.Subnet)
		return
	}
	if bad, ok := overlapsAny(n.Subnet, notUnicast); ok {
		l.errorf(at, "Invalid subnet", "%s overlaps %s, where no host can have an address. Write a private one, such as \"172.16.120.0/22\".", n.Subnet, bad)
		return
	}
	if n.Subnet.Bits() < 12 {
		l.errorf(at, "Invalid subnet", "%s has more than a million addresses. Write a /12 or a smaller network.", n.Subnet)
		return
	}
	if !slices.ContainsFunc(private, func(p netip.Prefix) bool { return p.Contains(n.Subnet.Addr()) && p.Bits() <= n.Subnet.Bits() }) {
		l.warnf(at, "Public subnet", "%s is public: this host could no longer reach the internet hosts with these addresses. "+
			"Write, for example, subnet = %q.", n.Subnet, netrange.Workers)
		return
	}
	if by := netrange.Takers(n.Subnet); by != nil {
		l.warnf(at, "Subnet in common use", "%s overlaps the default networks of %s. If one of those comes up on the host, workers lose their network; in a worker, its jobs lose what they try to reach there. %s",
			n.Subnet, and(by), l.freeSubnet(n))
	}
}

// freeSubnet is the cure for a subnet that others take.
func (l *loader) freeSubnet(n *Network) string {
	p, ok := netrange.Free(n.Subnet.Bits(), func(p netip.Prefix) bool {
		return slices.ContainsFunc(n.DNS, p.Contains) || slices.ContainsFunc(n.Egress, func(e *Egress) bool {
			_, overlaps := overlapsAny(p, e.To)
			return overlaps
		})
	})
	if !ok {
		return "Write a smaller subnet outside them."
	}
	return fmt.Sprintf("Write subnet = %q, for example, which nothing uses by default.", p)
}

func (l *loader) checkSubnet6(n *Network) {
	if !l.ok(n, "subnet6") {
		return
	}
	at := l.at(n, "subnet6")
	if !n.Subnet6.Addr().Is6() {
		l.errorf(at, "Invalid subnet6", "%s is IPv4. Write an IPv6 network, such as \"fd7e:1ee7::/64\".", n.Subnet6)
	} else if bad, ok := overlapsAny(n.Subnet6, notUnicast); ok {
		l.errorf(at, "Invalid subnet6", "%s overlaps %s, where no worker can have an address. Write, for example, \"fd7e:1ee7::/64\".", n.Subnet6, bad)
	}
}

func (l *loader) checkDNS(n *Network) {
	if !l.ok(n, "dns") {
		return
	}
	if len(n.DNS) == 0 {
		l.errorf(l.at(n, "dns"), "Invalid dns", "The list is empty, so workers could not resolve names. Omit dns to use the default.")
	}
	const most = 3 // MAXNS of the C library's resolver
	if len(n.DNS) > most {
		l.errorf(l.at(n, "dns"), "Invalid dns", "The list has %d servers; resolvers ask at most %d.", len(n.DNS), most)
	}
	for i, a := range n.DNS {
		at := l.atElem(n, "dns", i)
		_, special := overlapsAny(netip.PrefixFrom(a, a.BitLen()), notUnicast)
		switch {
		case slices.Contains(n.DNS[:i], a):
			l.errorf(at, "Invalid dns", "%s is in the list twice.", a)
		case special:
			l.errorf(at, "Invalid dns", "Workers cannot reach a name server at %s: this address means the worker itself, its link or a group. "+
				"Write the address of a name server.", a)
		case n.Subnet.Contains(a) || n.Subnet6.IsValid() && n.Subnet6.Contains(a):
			l.errorf(at, "Invalid dns", "%s is in the workers' own subnet, where no name server runs. Write an address outside it.", a)
		case a.Is6() && !n.Subnet6.IsValid():
			l.errorf(at, "Invalid dns", "%s is IPv6, which workers do not have. Write subnet6 too, or an IPv4 address.", a)
		}
	}
}

func (l *loader) validateEgress(e *Egress, n *Network) {
	if !egressSyntax.MatchString(e.Name) || len(e.Name) > maxHost {
		l.errorf(l.at(e, "label"), "Invalid name", "%s cannot be an egress block's name: use at most %d letters, digits, - _ and dots.", quote(e.Name), maxHost)
	}
	// What other firewalls call it.
	synonym := map[string]string{"accept": "allow", "pass": "allow", "permit": "allow", "block": "deny", "drop": "deny", "reject": "deny"}[strings.ToLower(e.Action)]
	if l.ok(e, "action") && synonym != "" {
		l.errorf(l.at(e, "action"), "Invalid action", "action must be \"allow\" or \"deny\"; got %s. Write action = %q.", quote(e.Action), synonym)
	} else {
		l.oneOf(e, "action", e.Action, "allow", "deny")
	}
	for _, name := range []string{"to", "ports"} {
		if l.ok(e, name) && (name == "to" && len(e.To) == 0 || name == "ports" && len(e.Ports) == 0) {
			l.errorf(l.at(e, name), "Invalid "+name, "An empty list matches nothing. Omit %s to match everything.", name)
		}
	}
	for i, to := range e.To {
		at := l.atElem(e, "to", i)
		switch {
		case e.Action == "allow" && (inside(to, n.Subnet) || n.Subnet6.IsValid() && inside(to, n.Subnet6)):
			l.errorf(at, "Invalid to", "%s is in the workers' own subnet, and workers never reach one another. Write addresses outside it.", to)
		case to.Addr().Is6() && !n.Subnet6.IsValid():
			l.warnf(at, "Rule without effect", "%s is IPv6, which workers do not have, because subnet6 is not set.", to)
		}
	}
}

var egressSyntax = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$`)

func inside(p, outer netip.Prefix) bool { return outer.Contains(p.Addr()) && p.Bits() >= outer.Bits() }

// checkCapacity compares the places that the host needs with what its subnets have.
// Workers get all addresses but the network's own and the gateway, which is the
// first: routes are /32, so there is no broadcast address to leave out.
func (l *loader) checkCapacity(h *Host) {
	need := len(h.Images) // each image has a place to be built in
	for _, p := range h.Pools {
		if l.ok(p, "max_instances") && p.MaxInstances > 0 {
			need += p.MaxInstances
		}
	}
	check := func(name string, p netip.Prefix) {
		free := p.Addr().BitLen() - p.Bits()
		if !p.IsValid() || l.given(&h.Network, name) && !l.ok(&h.Network, name) || free > 30 {
			return
		}
		have := max(0, 1<<free-2)
		if need <= have {
			return
		}
		for free < p.Addr().BitLen() && 1<<free-2 < need {
			free++
		}
		fits := netip.PrefixFrom(p.Addr(), p.Addr().BitLen()-free).Masked()
		l.errorf(l.at(&h.Network, name), "Subnet too small", "Host %q needs %d addresses (the pools' max_instances, and one for building each image), "+
			"but %s has only %d. Write %s = %q, or lower max_instances.", h.Name, need, p, have, name, fits.String())
	}
	check("subnet", h.Network.Subnet)
	if h.Network.Subnet6.IsValid() {
		check("subnet6", h.Network.Subnet6)
	}
}

func (l *loader) validatePool(p *Pool, images []*Image) {
	if l.ok(p, "image") {
		names := make([]string, len(images))
		for i, image := range images {
			names[i] = image.Name
		}
		if !slices.Contains(names, p.Image) {
			l.unknownReference(l.at(p, "image"), "image", p.Image, names)
		}
	}
	l.inRange(p, "cpus", p.CPUs, 1, 254, "")
	l.inRange(p, "max_instances", p.MaxInstances, 1, maxPlaces, "")
	l.oneOf(p, "start", p.Start, "warm", "cold")
	l.checkBytes(p, "memory", p.Memory, 128<<20, 16<<40)
	l.checkBytes(p, "disk", p.Disk, 256<<20, 64<<40)
	l.inRange(&p.Limits, "cpu_quota", p.Limits.CPUQuotaPercent, 1, 25400, " It is a percentage of one CPU. Omit it for no limit.")
	l.inRange(&p.Limits, "disk_iops", p.Limits.DiskIOPS, 1, 1e9, " Omit it for no limit.")
	l.inRange(&p.Limits, "network_mbps", p.Limits.NetworkMbps, 1, 1e6, " Omit it for no limit.")
	l.inRange(&p.Limits, "connections", p.Limits.Connections, 64, 1<<24, "")
}

// checkBytes checks a size that a virtual machine is given.
func (l *loader) checkBytes(owner any, name string, n, least, most int64) {
	const mib = 1 << 20
	switch {
	case !l.ok(owner, name):
	case n < least || n > most:
		l.errorf(l.at(owner, name), "Invalid "+name, "%s must be between %s and %s; got %s.", name, formatSize(least), formatSize(most), formatSize(n))
	case n%mib != 0:
		l.errorf(l.at(owner, name), "Invalid "+name, "%s must be a whole number of MiB; got %s. Write \"%dMiB\".", name, formatSize(n), n/mib+1)
	}
}

func (l *loader) unknownReference(at *hcl.Range, kind, name string, known []string) {
	if len(known) == 0 {
		l.errorf(at, "Unknown "+kind, "There is no %s %q; the spec has none.", kind, name)
		return
	}
	cure := fmt.Sprintf("Write %s.%s", kind, known[0])
	if len(known) > 1 {
		cure = "There are " + quotedList(known)
	}
	if s := l.nearest(name, known); s != "" {
		cure = fmt.Sprintf("Did you mean %s.%s?", kind, s)
	}
	l.errorf(at, "Unknown "+kind, "There is no %s %q. %s", kind, name, strings.TrimSuffix(cure, ".")+endOf(cure))
}

func endOf(sentence string) string {
	if strings.HasSuffix(sentence, "?") {
		return ""
	}
	return "."
}
