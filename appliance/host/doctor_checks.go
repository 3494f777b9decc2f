package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/landlockabi"
	"github.com/fleetingd/fleetingd/appliance/netrange"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

const firmwareCure = "enable VT-x or AMD-V (SVM) in the machine's firmware, " +
	"or nested virtualization in the hypervisor above it"

// cpuFlag finds Intel's or AMD's virtualization among the flags of /proc/cpuinfo.
var cpuFlag = regexp.MustCompile(`(?m)^flags\s*:.*\b(vmx|svm)\b`)

func (d *doctor) cpu() {
	const check = "cpu-virtualization"
	if d.machine.arch != "amd64" || !d.wantsKVM() {
		return // elsewhere no flag tells, and the kvm check does
	}
	info, err := d.machine.readFile("/proc/cpuinfo")
	if err != nil {
		d.warn(check, "mount -t proc proc /proc", "%v", err)
		return
	}
	if m := cpuFlag.FindSubmatch(info); m != nil {
		d.ok(check, "the CPU has %s", m[1])
		return
	}
	d.add(check, d.withoutKVM(), firmwareCure, "the CPU shows neither vmx nor svm")
}

func (d *doctor) kvm(ctx context.Context) {
	const check = "kvm"
	if !d.wantsKVM() {
		return
	}
	err := d.probes.KVM(ctx)
	if err == nil {
		d.ok(check, "/dev/kvm runs a guest")
		return
	}
	cure := firmwareCure
	if d.needsKVM() {
		cure += `; or use another machine, or hypervisor "qemu" in the spec`
	}
	switch err := d.machine.openAs(nil, "/dev/kvm"); {
	case errors.Is(err, fs.ErrPermission):
		cure = asRoot
	case err != nil: // missing; or made by udev for a module that is not loaded, ENODEV
		module := "kvm_intel"
		if info, _ := d.machine.readFile("/proc/cpuinfo"); strings.Contains(string(info), "AuthenticAMD") {
			module = "kvm_amd"
		}
		cure = "modprobe " + module
	}
	d.add(check, d.withoutKVM(), cure, "%v", err)
}

func (d *doctor) hypervisor(ctx context.Context) {
	binary, version, err := d.probes.Driver(ctx)
	if version != "" { // an error beside it is about KVM, which has a check of its own
		d.ok("hypervisor", "%s %s (%s)", d.plan.Hypervisor.Driver, version, binary)
		return
	}
	cure, name := d.install("qemu-system-x86", "qemu-kvm"), "qemu-system-x86"
	if d.plan.Hypervisor.Driver == "cloud-hypervisor" {
		asset := "cloud-hypervisor-static"
		if d.machine.arch == "arm64" {
			asset += "-aarch64"
		}
		const releases = "https://github.com/cloud-hypervisor/cloud-hypervisor/releases/latest/download/"
		name = "cloud-hypervisor"
		cure = "curl -fsSLo /usr/local/bin/cloud-hypervisor " + releases + asset + " && chmod 0755 /usr/local/bin/cloud-hypervisor"
	}
	d.fail("hypervisor", cure, "%v", err)
	_, missing := d.machine.lookPath(d.plan.Hypervisor.Binary)
	d.byApply(missing != nil && d.installs(name))
}

// minSystemd brought DelegateSubgroup=, without which the runner sits in the cgroup whose children get the limits.
const minSystemd = 254

var systemdVersion = regexp.MustCompile(`^systemd (\d+)`)

func (d *doctor) systemd(ctx context.Context) {
	const check = "systemd"
	if _, err := d.machine.stat("/run/systemd/system"); err != nil {
		d.fail(check, "boot this host with systemd (a container or WSL may have none)", "systemd does not run this host")
		return
	}
	out, err := d.machine.output(ctx, "systemctl", "--version")
	m := systemdVersion.FindStringSubmatch(out)
	switch {
	case err != nil:
		d.fail(check, d.install("systemd", "systemd"), "cannot read the version of systemd: %v", err)
		return
	case m == nil:
		d.fail(check, d.install("systemd", "systemd"), "cannot read the version of systemd in %q", firstLine(out))
		return
	}
	if v, err := strconv.Atoi(m[1]); err != nil || v < minSystemd {
		d.warn(check, "upgrade to Debian 13, Ubuntu 24.04 or later (Debian 12: apt-get install -y -t bookworm-backports systemd)",
			"systemd %s is older than %d and has no DelegateSubgroup=: the limits of pools will not be enforced", m[1], minSystemd)
		return
	}
	d.ok(check, "systemd %s", m[1])
}

// cgroupControllers are those that the runner's unit delegates.
var cgroupControllers = []string{"cpu", "memory", "io", "pids"}

func (d *doctor) cgroup() {
	const check = "cgroup"
	// The file is there in the unified hierarchy alone (cgroups(7)).
	text, err := d.machine.readFile("/sys/fs/cgroup/cgroup.controllers")
	if err != nil {
		d.warn(check, "boot with systemd.unified_cgroup_hierarchy=1 on the kernel's command line",
			"cgroup v2 is not mounted on /sys/fs/cgroup: the limits of pools will not be enforced (%v)", err)
		return
	}
	have := strings.Fields(string(text))
	missing := slices.DeleteFunc(slices.Clone(cgroupControllers), func(c string) bool { return slices.Contains(have, c) })
	if len(missing) > 0 {
		d.warn(check, "boot without cgroup_disable= and with cgroup_enable=memory on the kernel's command line",
			"cgroup v2 lacks %s: those limits will not be enforced", strings.Join(missing, ", "))
		return
	}
	d.ok(check, "cgroup v2 with %s", strings.Join(cgroupControllers, ", "))
}

func (d *doctor) landlock() {
	const check = "landlock"
	if !d.plan.Hypervisor.Sandbox {
		d.warn(check, "omit sandbox in the hypervisor block", "sandbox = false: a VMM that was taken over reaches all that user %s may read", d.plan.User)
		return
	}
	abi, err := d.machine.landlock()
	switch {
	case err != nil:
		d.warn(check, "boot Linux 6.2 or later", "%v", err)
	case abi == 0:
		d.warn(check, "boot Linux 6.2 or later, with landlock in its lsm= list",
			"the kernel has no landlock: a VMM that was taken over reaches all that user %s may read", d.plan.User)
	case abi < landlockabi.Files:
		d.warn(check, "boot Linux 6.2 or later", "landlock has ABI %d: it cannot keep a VMM from truncating files, and Cloud Hypervisor needs %d for its own", abi, landlockabi.Files)
	case abi < landlockabi.Scopes:
		d.ok(check, "landlock ABI %d; from Linux 6.12 on it keeps VMMs from sending signals, too", abi)
	default:
		d.ok(check, "landlock ABI %d", abi)
	}
}

// groupWouldDo reports a device that its group may open, and an account that is not in that group yet.
func (d *doctor) groupWouldDo(a *account, device string) bool {
	fi, err := d.machine.stat(device)
	if err != nil {
		return false
	}
	st := stat(fi)
	const groupOpens = 0o060
	return st.Gid != 0 && st.Mode&groupOpens == groupOpens && !slices.Contains(a.groups, int(st.Gid))
}

func (d *doctor) user() {
	const check = "user"
	name := d.plan.User
	a, err := d.machine.account(name)
	switch {
	case err != nil:
		d.fail(check, "getent passwd "+name, "%v", err)
	case a == nil:
		d.warn(check, "useradd --system --user-group --groups kvm --home-dir "+d.plan.Paths.State+" --shell /usr/sbin/nologin "+name,
			"user %s does not exist yet; systemd-sysusers creates it from what fleetingd compile writes", name)
	case a.uid == 0:
		d.fail(check, "userdel "+name, "user %s is root; the plugin and the VMs must run as an ordinary user", name)
	case !d.wantsKVM():
		d.ok(check, "user %s, uid %d", name, a.uid)
	case !d.machine.root:
		d.warn(check, asRoot, "only root can check what user %s may open", name)
	default:
		err := d.machine.openAs(a, "/dev/kvm")
		switch {
		case errors.Is(err, fs.ErrPermission):
			d.add(check, d.withoutKVM(), "usermod -aG kvm "+name, "user %s may not open /dev/kvm", name)
			d.byApply(d.groupWouldDo(a, "/dev/kvm"))
		case err != nil: // the kvm check says so
			d.ok(check, "user %s, uid %d", name, a.uid)
		default:
			d.ok(check, "user %s, uid %d, may open /dev/kvm", name, a.uid)
		}
	}
}

// hiddenDirs are hidden from the plugin and the refresh by their units' ProtectHome= and PrivateTmp=.
var hiddenDirs = []string{"/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/"}

// secrets finds secrets that prebuilds need and that the plugin and the refresh cannot read.
func (d *doctor) secrets() {
	const check = "secrets"
	var places []string
	for _, im := range d.plan.Images {
		if im.Prebuild == nil {
			continue
		}
		for _, s := range im.Prebuild.Steps {
			if s.File == nil {
				continue
			}
			for from := range s.File.Secret.Places() {
				if !slices.Contains(places, from) {
					places = append(places, from)
				}
			}
		}
	}
	if len(places) == 0 {
		return // nothing to look at
	}
	user := d.plan.User
	a, err := d.machine.account(user)
	found := len(d.found)
	for _, from := range places {
		kind, place, _ := strings.Cut(from, ":")
		hidden := slices.ContainsFunc(hiddenDirs, func(dir string) bool { return strings.HasPrefix(place, dir) })
		switch {
		case kind != "file":
			name := place
			if kind == "var" {
				name = "FLEETINGD_VAR_" + place
			}
			d.warn(check, "systemctl edit gitlab-runner.service fleetingd-refresh.service # EnvironmentFile=… with "+name,
				"a prebuild needs %s and reads it from the environment of the services that build images; fleetingd run passes it on by itself", from)
		case hidden:
			d.fail(check, "move it to /etc/fleetingd or /run/secrets, and change the spec",
				"a prebuild needs %s, which the services that build images cannot see", place)
		case err != nil || a == nil:
			d.warn(check, "systemd-sysusers, then run doctor again", "a prebuild needs %s; user %s does not exist yet, so access cannot be checked", place, user)
		case !d.machine.root:
			d.warn(check, asRoot, "a prebuild needs %s; only root can check whether user %s can read it", place, user)
		default:
			d.secretFile(check, a, place)
		}
	}
	if len(d.found) == found {
		d.ok(check, "user %s can read all secrets of the prebuilds (%d)", user, len(places))
	}
}

func (d *doctor) secretFile(check string, a *account, file string) {
	user := d.plan.User
	err := d.machine.readAs(a, file)
	switch {
	case errors.Is(err, fs.ErrPermission):
		d.fail(check, fmt.Sprintf("chgrp %s %s && chmod g+r %s", user, file, file),
			"a prebuild needs %s, which user %s cannot read", file, user)
	case errors.Is(err, fs.ErrNotExist):
		d.fail(check, "put the secret there", "a prebuild needs %s, which does not exist", file)
	case err != nil:
		d.fail(check, "ls -l "+file, "a prebuild needs %s: %v", file, err)
	}
}

func (d *doctor) tun() {
	const check = "tun"
	var a *account
	who := "this user"
	if d.machine.root {
		// An error is the user check's.
		if found, err := d.machine.account(d.plan.User); err == nil && found != nil {
			a, who = found, d.plan.User
		}
	}
	err := d.machine.openAs(a, "/dev/net/tun")
	switch {
	case err == nil:
		d.ok(check, "/dev/net/tun opens for %s", who)
	case errors.Is(err, fs.ErrPermission):
		d.fail(check, "chmod 0666 /dev/net/tun", "%v (as %s): the kernel checks each TAP's owner itself", err, who)
	default:
		d.fail(check, "modprobe tun", "%v", err)
	}
}

func (d *doctor) nftables() {
	const check = "nftables"
	if !d.machine.root {
		d.warn(check, asRoot, "only root can check the firewall")
		return
	}
	if err := d.machine.trial(d.plan.Network.Ruleset, d.plan.Slots); err != nil {
		d.fail(check, "modprobe nf_tables", "%v", err)
		return
	}
	d.ok(check, "the kernel accepts the plan's ruleset (tested in a separate network namespace)")
}

func (d *doctor) links(ctx context.Context) {
	h, err := d.machine.network(d.plan)
	if err != nil {
		d.fail("egress-interface", "ip link; ip rule; ip route show table all", "%v", err)
		return
	}
	n := &network{plan: d.plan}
	d.egressInterface(h, n)
	if d.plan.Network.Subnet6 != nil {
		o := n.egress(h, true)
		d.add("egress-ipv6", o.status, o.cure, "%s", o.detail)
	}
	d.subnet(h, n)
	d.workerRoutes(h, n)
	d.dns(h, n)
	d.foreignFirewall(ctx, h, n)
}

func (d *doctor) egressInterface(h *have, n *network) {
	const check = "egress-interface"
	name := d.plan.EgressInterface
	l, ok := h.links[name]
	if !ok {
		others := slices.DeleteFunc(h.linkNames(), func(n string) bool { return n == loopback })
		cure := "set egress_interface to one of them in the spec"
		src, tap := n.guest(false)
		if way := h.outLinks(h.lookup(flow{src: src, dst: internet4[0], in: tap}).route); len(way) > 0 {
			cure = fmt.Sprintf("write egress_interface = %q in the spec; the default route uses it", way[0])
		}
		d.fail(check, cure, "%s does not exist; this host has: %s", name, strings.Join(others, ", "))
		return
	}
	if l.Attrs().Flags&net.FlagUp == 0 {
		d.fail(check, "ip link set "+name+" up", "%s is down", name)
		return
	}
	o := n.egress(h, false)
	d.add(check, o.status, o.cure, "%s is up; %s", name, o.detail)
}

func (d *doctor) subnet(h *have, n *network) {
	const check = "subnet"
	errs := n.overlaps(h)
	if len(errs) == 0 {
		d.freeNow(check)
		return
	}
	cure := "write another subnet in the spec's network block"
	if free, ok := d.freeSubnet(); ok {
		cure = fmt.Sprintf("write subnet = %q in the spec's network block; it is free on this host", free)
	}
	d.fail(check, cure, "%v", errors.Join(errs...))
}

// freeNow reports a subnet that no route overlaps. It may be one that other software takes as soon as it is installed.
func (d *doctor) freeNow(check string) {
	subnet := d.plan.Network.Subnet
	takers := netrange.Takers(subnet)
	if len(takers) == 0 {
		d.ok(check, "no route overlaps %s", subnet)
		return
	}
	cure := "write another subnet in the spec's network block"
	if free, ok := d.freeSubnet(); ok {
		cure = fmt.Sprintf("write subnet = %q in the spec's network block; it is free on this host", free)
	}
	d.warn(check, cure, "no route overlaps %s, but %s may take it by default, on this host or in a worker", subnet, strings.Join(takers, ", "))
}

// workerRoutes looks at the routes of a network that is up.
func (d *doctor) workerRoutes(h *have, n *network) {
	const check = "worker-routes"
	up := slices.DeleteFunc(slices.Clone(d.plan.Slots), func(s plan.Slot) bool {
		l := h.links[s.TAP]
		return l == nil || l.Attrs().Alias != n.mark()
	})
	if len(up) == 0 {
		return
	}
	var troubles []Trouble
	for _, six := range []bool{false, true} {
		if six && d.plan.Network.Subnet6 == nil {
			continue
		}
		lost, err := n.lost(h, up, six, d.machine.ask)
		filtered, err1 := n.filtered(h, up, six, n.egress(h, six).status == StatusOK && lost == nil, d.machine.ask)
		if err := errors.Join(err, err1); err != nil {
			d.fail(check, "ip route get "+up[0].Address.String(), "%v", err)
			return
		}
		troubles = append(append(troubles, lost...), filtered...)
	}
	for _, t := range troubles {
		d.fail(check, t.Cure, "%s %s", t.Object, t.Problem)
	}
	if len(troubles) == 0 {
		d.ok(check, "the kernel routes packets to and from all %d TAPs", len(up))
	}
}

// dns warns where no worker can reach any of its resolvers, since they are of a family that this host has no route for.
func (d *doctor) dns(h *have, n *network) {
	const check = "dns"
	resolvers := d.plan.Network.DNS
	if len(resolvers) == 0 {
		return
	}
	var without []string
	for _, a := range resolvers {
		if a.Is6() && d.plan.Network.Subnet6 == nil || a == d.plan.Network.Gateway ||
			d.plan.Network.Gateway6 != nil && a == *d.plan.Network.Gateway6 {
			continue // the first is the compiler's to refuse; the others are on this host
		}
		src, tap := n.guest(a.Is6())
		if p := h.lookup(flow{src: src, dst: a, in: tap}); len(h.outLinks(p.route)) == 0 {
			without = append(without, fmt.Sprintf("%s: %s", a, h.why(p)))
		}
	}
	switch {
	case len(without) == 0:
		d.ok(check, "this host has routes to the workers' resolvers")
	case len(without) < len(resolvers):
		d.warn(check, "leave them out of dns in the spec's network block", "some of the workers' resolvers cannot be reached (%s)",
			strings.Join(without, "; "))
	case d.onlyIPv6(h):
		cure := `write dns = ["2606:4700:4700::1113", "2606:4700:4700::1003"] in the spec's network block`
		if d.plan.Network.Subnet6 == nil {
			cure = `write subnet6 = "fd7e:1ee7::/64" and dns = ["2606:4700:4700::1113", "2606:4700:4700::1003"] in the spec's network block`
		}
		d.warn(check, cure, "no name will resolve in a worker: its resolvers are IPv4 only, and this host reaches the internet by IPv6 only (%s)",
			strings.Join(without, "; "))
	default:
		d.warn(check, "write resolvers that this host reaches as dns in the spec's network block",
			"no name will resolve in a worker: its resolvers cannot be reached (%s)", strings.Join(without, "; "))
	}
}

// onlyIPv6 reports a host that has a route to the internet in IPv6 alone, and resolvers of IPv4 alone.
func (d *doctor) onlyIPv6(h *have) bool {
	if slices.ContainsFunc(d.plan.Network.DNS, netip.Addr.Is6) {
		return false
	}
	reaches := func(a netip.Addr) bool {
		return len(h.outLinks(h.lookup(flow{dst: a, in: loopback}).route)) > 0
	}
	return !slices.ContainsFunc(internet4, reaches) && slices.ContainsFunc(internet6, reaches)
}

// freeSubnet is a network of the plan's size that nobody takes by default and no route overlaps.
func (d *doctor) freeSubnet() (netip.Prefix, bool) {
	return d.machine.freeSubnet(*d.plan, d.plan.Network.Subnet.Bits())
}

// freeSubnet is a network of a size for the workers of a plan.
func (m machine) freeSubnet(try plan.Plan, bits int) (netip.Prefix, bool) {
	try.Network.Subnet6 = nil
	// One look at the host is enough for each private range (RFC 1918): which routes it returns depends on the subnet.
	seen := map[netip.Prefix]*have{}
	return netrange.Free(bits, func(p netip.Prefix) bool {
		wide := netip.PrefixFrom(p.Addr(), 8).Masked()
		h := seen[wide]
		if h == nil {
			try.Network.Subnet = wide
			var err error
			if h, err = m.network(&try); err != nil {
				return true
			}
			seen[wide] = h
		}
		try.Network.Subnet, try.Network.Gateway = p, p.Addr().Next()
		return len((&network{plan: &try}).overlaps(h)) > 0
	})
}

func (d *doctor) sysctls() {
	d.sysctl("ip-forwarding", "net/ipv4/ip_forward", "1", StatusWarn,
		"it is off until fleetingd network up turns it on")
	if d.plan.Network.Subnet6 != nil {
		d.sysctl("ip6-forwarding", "net/ipv6/conf/all/forwarding", "1", StatusWarn,
			"it is off until fleetingd network up turns it on")
	}
	d.sysctl("arp-ignore", "net/ipv4/conf/all/arp_ignore", "0", StatusFail,
		"the host would not answer its workers' ARP for the gateway, which is on lo")
}

func (d *doctor) sysctl(check, path, want string, otherwise Status, why string) {
	name := strings.ReplaceAll(path, "/", ".")
	b, err := d.machine.readFile("/proc/sys/" + path)
	got := strings.TrimSpace(string(b))
	switch {
	case err != nil:
		d.fail(check, "mount -t proc proc /proc", "%v", err)
	case got != want:
		d.add(check, otherwise, "sysctl -w "+name+"="+want, "%s is %s: %s", name, got, why)
	default:
		d.ok(check, "%s is %s", name, want)
	}
}

func (d *doctor) stateDir() {
	const check = "state-dir"
	dir := d.plan.Paths.State
	there, err := d.machine.existing(dir)
	if err != nil {
		d.fail(check, "ls -ld "+dir, "%v", err)
		return
	}
	a, err := d.machine.account(d.plan.User)
	if err != nil || a == nil {
		a = &account{uid: -1, gid: -1} // it will be somebody without rights of its own
	}
	for at := there; ; at = filepath.Dir(at) {
		st, err := d.machine.stat(at)
		switch {
		case err != nil:
			d.fail(check, "ls -ld "+at, "%v", err)
			return
		case !st.IsDir():
			d.fail(check, "write another state_dir in the spec", "%s is not a directory", at)
			return
		case !a.passes(st):
			d.fail(check, "chmod o+x "+at, "user %s cannot traverse %s (mode %04o)", d.plan.User, at,
				st.Mode().Perm())
			return
		}
		if at == "/" {
			break
		}
	}
	if there == dir {
		d.ok(check, "%s exists and is reachable", dir)
		return
	}
	d.ok(check, "%s will be created in %s", dir, there)
}

func (d *doctor) disks() {
	const check = "disks"
	backing := d.plan.Disks.Backing
	there, err := d.machine.existing(d.plan.Paths.Disks)
	if err != nil {
		d.fail(check, "ls -ld "+there, "%v", err)
		return
	}
	if backing == "xfs-image" || backing == "tmpfs" {
		if d.haveXFS(check) {
			d.ok(check, "backing = %q: an XFS image will be mounted on %s", backing, d.plan.Paths.Disks)
		}
		return
	}
	err = d.probes.CanClone(there)
	switch {
	case err == nil:
		d.ok(check, "the file system of %s can clone files", there)
	case errors.Is(err, fs.ErrPermission):
		d.warn(check, asRoot, "only root can check whether files in %s can be cloned", there)
	case backing == "directory":
		d.fail(check, `write disks { backing = "auto" } in the spec`, "%v", err)
	default:
		if d.haveXFS(check) {
			d.ok(check, "the file system of %s cannot clone files; an XFS image will be mounted on %s", there, d.plan.Paths.Disks)
		}
	}
}

// haveXFS reports whether an XFS image can be made, and where it cannot says so.
func (d *doctor) haveXFS(check string) bool {
	if _, err := d.machine.lookPath("mkfs.xfs"); err != nil {
		d.fail(check, d.install("xfsprogs", "xfsprogs"), "the disks need an XFS image, but mkfs.xfs is not installed")
		d.byApply(d.installs("xfsprogs"))
		return false
	}
	return true
}

const gib = 1 << 30

// space compares what the workers' disks may grow to with what is free. They are sparse: too little is a warning, unless
// not even one fits.
func (d *doctor) space() {
	const check = "disk-space"
	if d.plan.Disks.Backing == "tmpfs" {
		return // it is memory
	}
	there, err := d.machine.existing(d.plan.Paths.State)
	if d.plan.Disks.Backing != "xfs-image" && err == nil {
		there, err = d.machine.existing(d.plan.Paths.Disks)
	}
	free := int64(0)
	if err == nil {
		free, err = d.machine.space(there)
	}
	if err != nil {
		d.fail(check, "df -h", "%v", err)
		return
	}
	// Floats: no sum of a plan's may wrap around.
	need, largest := 0.0, 0.0
	for _, p := range d.plan.Pools {
		need += float64(p.Disk) * float64(p.MaxInstances)
		largest = max(largest, float64(p.Disk))
	}
	cure := "free space on " + there + ", or lower disk or max_instances in the spec's pools"
	if size := float64(d.plan.Disks.Size); d.plan.Disks.Backing == "xfs-image" && size > float64(free) {
		d.warn(check, "free space on "+there+", or lower size in the spec's disks block",
			"%s has %.1f GiB free, but the XFS image may grow to %.1f GiB", there, float64(free)/gib, size/gib)
		return
	}
	switch have := float64(free); {
	case have < largest:
		d.fail(check, cure, "%s has %.1f GiB free, but one worker's disk may grow to %.1f GiB", there, have/gib, largest/gib)
	case have < need:
		d.warn(check, cure, "%s has %.1f GiB free; the disks of all workers are sparse and may grow to %.1f GiB", there,
			have/gib, need/gib)
	default:
		d.ok(check, "%s has %.1f GiB free; the disks of all workers may grow to %.1f GiB", there, have/gib, need/gib)
	}
}

// memTotal is a line of /proc/meminfo, in KiB (proc_meminfo(5)).
var memTotal = regexp.MustCompile(`(?m)^MemTotal:\s+(\d+) kB$`)

// memory is the machine's, in bytes.
func (m machine) memory() (int64, error) {
	b, err := m.readFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	found := memTotal.FindSubmatch(b)
	if found == nil {
		return 0, errors.New("/proc/meminfo has no line MemTotal")
	}
	kib, err := strconv.ParseInt(string(found[1]), 10, 53)
	return kib << 10, err
}

func (d *doctor) memory() {
	const check = "memory"
	total, err := d.machine.memory()
	if err != nil {
		d.fail(check, "mount -t proc proc /proc", "%v", err)
		return
	}
	have, need := float64(total), 0.0
	for _, p := range d.plan.Pools {
		need += float64(p.Memory) * float64(p.MaxInstances)
	}
	if d.plan.Disks.Backing == "tmpfs" {
		need += float64(d.plan.Disks.Size)
	}
	if need > have {
		d.fail(check, "lower memory or max_instances in the spec's pools",
			"this host has %.1f GiB of memory, but all workers together may use %.1f GiB", have/gib, need/gib)
		return
	}
	d.ok(check, "this host has %.1f GiB of memory; all workers together may use %.1f GiB", have/gib, need/gib)
}

// tools are the programs that images are made with.
func (d *doctor) tools() {
	uses := func(is func(plan.Source) bool) bool {
		return slices.ContainsFunc(d.plan.Images, func(im plan.Image) bool { return is(im.Source) })
	}
	if uses(func(s plan.Source) bool { return s.Debian == nil }) {
		d.tool("qemu-img", "qemu-utils", "qemu-img", "it converts images")
	}
	if !uses(func(s plan.Source) bool { return s.Debian != nil }) {
		return
	}
	d.tool("mmdebstrap", "mmdebstrap", "mmdebstrap", "it builds images of the debian source")
	d.tool("mke2fs", "e2fsprogs", "e2fsprogs", "it builds images of the debian source")
	const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	if _, err := d.machine.stat(keyring); err != nil {
		d.fail("debian-archive-keyring", d.install("debian-archive-keyring", "debian-keyring"),
			"it verifies Debian's packages: %v", err)
		d.byApply(d.installs("debian-archive-keyring"))
		return
	}
	d.ok("debian-archive-keyring", "%s", keyring)
}

func (d *doctor) tool(name, deb, rpm, why string) {
	path, err := d.machine.lookPath(name)
	if err != nil {
		d.fail(name, d.install(deb, rpm), "%s is not on PATH: %s", name, why)
		d.byApply(d.installs(deb))
		return
	}
	d.ok(name, "%s", path)
}

// clock is a warning: jobs notice first, by certificates that are not valid yet.
func (d *doctor) clock() {
	const (
		check = "clock"
		free  = "the clock is not synchronised, and workers set theirs from it"
	)
	synced, err := d.machine.synced()
	switch {
	case err != nil:
		d.warn(check, "timedatectl status", "%v", err)
	case synced:
		d.ok(check, "the clock is synchronised")
	case d.hasTimeClient():
		d.warn(check, "timedatectl set-ntp true", free)
	default:
		d.warn(check, d.install("systemd-timesyncd", "chrony"), free)
	}
}

func (d *doctor) hasTimeClient() bool {
	if _, err := d.machine.stat("/usr/lib/systemd/systemd-timesyncd"); err == nil {
		return true
	}
	_, err := d.machine.lookPath("chronyd")
	return err == nil
}

// The first GitLab Runner with all settings that the compiled config.toml has: state_storage came with 17.5.0,
// update_interval and instance_ready_command with 16.11
// (https://docs.gitlab.com/runner/configuration/advanced-configuration/#the-runnersautoscaler-section).
const (
	minRunnerMajor = 17
	minRunnerMinor = 5
)

var runnerVersion = regexp.MustCompile(`(?m)^Version:\s+v?(\d{1,4})\.(\d{1,4})(\S*)`)

func (d *doctor) runner(ctx context.Context) {
	const (
		check = "gitlab-runner"
		repo  = "curl -fsSL https://packages.gitlab.com/install/repositories/runner/gitlab-runner/script."
	)
	if len(d.plan.Runners) == 0 {
		return
	}
	cure := repo + "deb.sh | bash && apt-get install -y gitlab-runner"
	if d.install("apt", "dnf") == "dnf install -y dnf" {
		cure = repo + "rpm.sh | bash && dnf install -y gitlab-runner"
	}
	path, err := d.machine.lookPath("gitlab-runner")
	if err != nil {
		d.fail(check, cure, "gitlab-runner is not on PATH")
		d.byApply(d.installs("gitlab-runner"))
		return
	}
	out, err := d.machine.output(ctx, path, "--version")
	if err != nil {
		d.fail(check, cure, "%v", err)
		return
	}
	m := runnerVersion.FindStringSubmatch(out)
	if m == nil {
		d.warn(check, cure, "%s reports no known version: %.80q", path, firstLine(out))
		return
	}
	major, _ := strconv.Atoi(m[1]) // at most four digits
	minor, _ := strconv.Atoi(m[2])
	if major < minRunnerMajor || major == minRunnerMajor && minor < minRunnerMinor {
		d.fail(check, cure, "gitlab-runner %s.%s is older than %d.%d, the first with state_storage", m[1], m[2],
			minRunnerMajor, minRunnerMinor)
		return
	}
	d.ok(check, "gitlab-runner %s.%s%s (%s)", m[1], m[2], m[3], path)
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
