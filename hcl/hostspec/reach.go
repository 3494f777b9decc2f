package hostspec

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/netrange"
)

// Destination is a server that a runner's workers connect to over TCP.
type Destination struct {
	Setting string // where the spec names it: "url", "settings.clone_url"
	What    string // "GitLab", "the cache"
	Host    string // a name or an address, without brackets
	Port    uint16
}

// Destinations are the servers that jobs of a runner need, as far as the spec names them.
func (r *Runner) Destinations() []Destination {
	var all []Destination
	addURL := func(setting, text string) {
		u, err := parseURL(text)
		if err != nil {
			return
		}
		port := u.Port()
		if port == "" {
			port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
		}
		n, _ := strconv.ParseUint(port, 10, 16) // parseURL has read it
		all = append(all, Destination{Setting: setting, What: "GitLab", Host: u.Hostname(), Port: uint16(n)})
	}
	addURL("url", r.URL)
	if text, ok := r.Settings["clone_url"].(string); ok {
		addURL("settings.clone_url", text)
	}
	cache, _ := r.Settings["cache"].(map[string]any)
	s3, _ := cache["s3"].(map[string]any)
	kind, _ := cache["Type"].(string)
	if address, _ := s3["ServerAddress"].(string); address != "" && strings.HasPrefix(kind, "s3") {
		d := Destination{Setting: "settings.cache.s3.ServerAddress", What: "the cache", Host: address, Port: 443}
		if insecure, _ := s3["Insecure"].(bool); insecure {
			d.Port = 80
		}
		if host, port, err := net.SplitHostPort(address); err == nil && isPort(port) {
			n, _ := strconv.ParseUint(port, 10, 16)
			d.Host, d.Port = host, uint16(n)
		}
		d.Host = strings.Trim(d.Host, "[]")
		all = append(all, d)
	}
	return all
}

// Denies says why a worker cannot connect to an address over TCP, or "" if it can. It is what compile's ruleset does.
func (n *Network) Denies(a netip.Addr, port uint16) string {
	a = a.Unmap().WithZone("")
	subnet := n.Subnet
	if a.Is6() {
		subnet = n.Subnet6
	}
	switch {
	case a.IsLoopback() || a.IsUnspecified():
		return "the address means the worker itself"
	case !subnet.IsValid():
		return "workers have no IPv6, because subnet6 is not set"
	case subnet.Contains(a) && a != subnet.Addr().Next():
		return "it is in the workers' own subnet, and workers do not reach one another"
	}
	for _, e := range n.Egress {
		if !e.matches(a, port, subnet) {
			continue
		}
		if e.Action == "allow" {
			return ""
		}
		return fmt.Sprintf("the egress block %q denies it", e.Name)
	}
	switch {
	case port == 53 && slices.Contains(n.DNS, a):
		return ""
	case subnet.Contains(a):
		return "it is the host itself, and no egress block allows it"
	case netrange.Private(a):
		return "it is private, and no egress block allows it"
	}
	return ""
}

// matches reports whether a block is about an address and a port of TCP. One that allows everything means
// what lies outside; the host's own address must be named by itself.
func (e *Egress) matches(a netip.Addr, port uint16, subnet netip.Prefix) bool {
	if len(e.Ports) > 0 && !slices.ContainsFunc(e.Ports, func(p PortRange) bool { return p.Protocol == "tcp" && p.First <= port && port <= p.Last }) {
		return false
	}
	host, allow := subnet.Contains(a), e.Action == "allow"
	var to []netip.Prefix
	for _, p := range e.To {
		if p.Addr().Is4() == a.Is4() && (!host || !allow || p.IsSingleIP()) {
			to = append(to, p)
		}
	}
	anywhere := len(e.To) == 0 || slices.ContainsFunc(to, func(p netip.Prefix) bool { return p.Bits() == 0 })
	if anywhere {
		return !allow || !host && !netrange.Private(a)
	}
	return slices.ContainsFunc(to, func(p netip.Prefix) bool { return p.Contains(a) })
}

// CureFor says what to write so that workers can connect to an address that Denies gives a reason for.
func (n *Network) CureFor(d Destination, a netip.Addr) string {
	a = a.Unmap().WithZone("")
	switch {
	case a.IsLoopback() || a.IsUnspecified():
		return "Write a name or an address of the server that is the same for workers."
	case a.Is6() && !n.Subnet6.IsValid():
		return `Write subnet6 in the network block, such as subnet6 = "fd7e:1ee7::/64", or give the server an IPv4 address.`
	case n.Subnet.Contains(a) && a != n.Subnet.Addr().Next() || n.Subnet6.Contains(a) && a != n.Subnet6.Addr().Next():
		return "Write the server's address, or another subnet."
	}
	base := map[string]string{"GitLab": "gitlab", "the cache": "cache"}[d.What]
	name := base
	for i := 2; slices.ContainsFunc(n.Egress, func(e *Egress) bool { return e.Name == name }); i++ {
		name = fmt.Sprintf("%s-%d", base, i)
	}
	return fmt.Sprintf("Write in the network block, before its other egress blocks:\n\n"+
		"egress %q {\n  action = \"allow\"\n  to     = [\"%s/%d\"]\n  ports  = [\"tcp/%d\"]\n}", name, a, a.BitLen(), d.Port)
}

// checkDestinations warns of servers that no job could reach, where the spec has their addresses. Names are doctor's to resolve.
func (l *loader) checkDestinations(h *Host, r *Runner) {
	for _, d := range r.Destinations() {
		setting, nested := strings.CutPrefix(d.Setting, "settings.")
		if nested && !l.ok(r, "settings") || !nested && !l.ok(r, setting) || !l.usable(&h.Network) {
			continue
		}
		a, err := netip.ParseAddr(d.Host)
		if strings.EqualFold(d.Host, "localhost") {
			a, err = netip.IPv6Loopback(), nil
		}
		if err != nil {
			continue
		}
		why := h.Network.Denies(a, d.Port)
		if why == "" {
			continue
		}
		at := l.at(r, setting)
		if nested {
			at = l.placeOf(r, append(settingPath{"settings"}, strings.Split(setting, ".")...))
		}
		l.warnf(at, "Out of the workers' reach", "Workers of host %q cannot connect to %s at %s: %s. %s", h.Name, d.What,
			net.JoinHostPort(d.Host, strconv.Itoa(int(d.Port))), why, h.Network.CureFor(d, a))
	}
}

// usable reports whether a network block is right as far as it decides what workers reach.
func (l *loader) usable(n *Network) bool {
	for _, name := range []string{"subnet", "subnet6"} {
		if l.given(n, name) && !l.ok(n, name) {
			return false
		}
	}
	for _, e := range n.Egress {
		for _, name := range []string{"to", "ports"} {
			if l.given(e, name) && !l.ok(e, name) {
				return false
			}
		}
		if e.Action != "allow" && e.Action != "deny" {
			return false
		}
	}
	return true
}
