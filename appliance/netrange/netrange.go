// Package netrange knows address ranges: those that common software uses by default, a range for workers
// that collides with none of them, and those that workers cannot reach unless a spec allows it.
package netrange

import (
	"net/netip"
	"slices"
)

// Default is a range that some software uses by default.
type Default struct {
	Prefix netip.Prefix
	By     string // the name of the software
}

// Defaults are ranges that a job in a worker, or a service on the host, may use
// without asking. dockerd and others first look for routes that overlap, but a
// worker has only a default route and the route to its gateway, so they find none.
//
// 172.16.0.0/16 is not included: Docker's pools start at 172.17. Neither are LXD, Incus and Multipass, which pick a random
// /24 of 10.0.0.0/8, so that no part of it is more likely to collide than another.
var Defaults = []Default{
	// docker0 and the networks that Compose creates:
	// https://docs.docker.com/engine/network/#subnet-allocation. (172.17 to 172.31, and 192.168 in /20 steps.)
	{netip.MustParsePrefix("172.17.0.0/16"), "Docker"},
	{netip.MustParsePrefix("172.18.0.0/15"), "Docker"},
	{netip.MustParsePrefix("172.20.0.0/14"), "Docker"},
	{netip.MustParsePrefix("172.24.0.0/13"), "Docker"},
	{netip.MustParsePrefix("192.168.0.0/16"), "Docker"},
	// Overlay networks, /24 each from the bottom of 10.0.0.0/8; the first is "ingress".
	{netip.MustParsePrefix("10.0.0.0/16"), "Docker Swarm"},
	// podman-network(1), and default_subnet_pools in containers.conf(5): the first pool of /24 networks.
	{netip.MustParsePrefix("10.88.0.0/16"), "Podman"},
	{netip.MustParsePrefix("10.89.0.0/16"), "Podman"},
	// libvirt's network "default".
	{netip.MustParsePrefix("192.168.122.0/24"), "libvirt"},
	// https://docs.k3s.io/cli/server#networking, cluster-cidr and service-cidr.
	{netip.MustParsePrefix("10.42.0.0/15"), "k3s"},
	// kubeadm's service-cidr, and the pod network of Flannel and kind.
	{netip.MustParsePrefix("10.96.0.0/12"), "Kubernetes (kubeadm)"},
	{netip.MustParsePrefix("10.244.0.0/16"), "Kubernetes (Flannel, kind)"},
	// https://microk8s.io/docs/change-cidr
	{netip.MustParsePrefix("10.1.0.0/16"), "MicroK8s"},
	{netip.MustParsePrefix("10.152.183.0/24"), "MicroK8s"},
	// Tailscale's addresses, and those that carriers share (RFC 6598).
	{netip.MustParsePrefix("100.64.0.0/10"), "Tailscale"},
}

// Takers returns the names of the software that uses a part of a range by default, without duplicates, in the order of Defaults;
// nil if there is none.
func Takers(p netip.Prefix) []string {
	var by []string
	for _, d := range Defaults {
		if d.Prefix.Overlaps(p) && !slices.Contains(by, d.By) {
			by = append(by, d.By)
		}
	}
	return by
}

// Workers is the default range of the workers.
var Workers = netip.MustParsePrefix("172.16.120.0/22")

// candidates are the ranges that Free searches, in order: RFC 1918 without Docker's.
var candidates = []netip.Prefix{netip.MustParsePrefix("172.16.0.0/16"), netip.MustParsePrefix("10.0.0.0/8")}

// Free returns an IPv4 range with a prefix length of 8 to 32 bits that no software uses by
// default and for which used returns false. It tries Workers first, and some 300 others.
func Free(bits int, used func(netip.Prefix) bool) (netip.Prefix, bool) {
	free := func(p netip.Prefix) bool { return len(Takers(p)) == 0 && !used(p) }
	if first := netip.PrefixFrom(Workers.Addr(), bits).Masked(); bits >= 16 && free(first) {
		return first, true
	}
	for _, c := range candidates {
		if bits < c.Bits() {
			continue
		}
		// Ranges inside a taken /20 (of 172.16.0.0/16) or /16 (of 10.0.0.0/8) are not worth trying.
		step := min(bits, c.Bits()+4)
		if c.Bits() == 8 {
			step = min(bits, 16)
		}
		for i := range 1 << (step - c.Bits()) {
			a := c.Addr().As4()
			n := uint32(a[0])<<24 | uint32(a[1])<<16 | uint32(i)<<(32-step)
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}), bits)
			if free(p) {
				return p, true
			}
		}
	}
	return netip.Prefix{}, false
}

// Private4 is what workers cannot reach by default: everything that is not globally reachable according to IANA's IPv4
// Special-Purpose Address Registry, and multicast. 169.254.0.0/16 has metadata services, 100.64.0.0/10 carriers' NAT.
var Private4 = prefixes("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
	"192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/3")

// Private6 is everything except global unicast (2000::/3), plus those parts of it that embed or replace other addresses: Teredo and
// the rest of 2001::/23, documentation, and 6to4, in which 10.0.0.1 is 2002:a00:1::. The first prefix includes
// 64:ff9b::/96 (NAT64), because a translator would lead to private IPv4.
var Private6 = prefixes("::/3", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "4000::/2", "8000::/1")

func prefixes(texts ...string) []netip.Prefix {
	all := make([]netip.Prefix, len(texts))
	for i, text := range texts {
		all[i] = netip.MustParsePrefix(text)
	}
	return all
}

// Private reports whether an address is in Private4 or Private6.
func Private(a netip.Addr) bool {
	private := Private6
	if a.Is4() {
		private = Private4
	}
	return slices.ContainsFunc(private, func(p netip.Prefix) bool { return p.Contains(a) })
}
