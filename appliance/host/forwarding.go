package host

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forwarding is the switch that lets the host route, of one family. The kernel copies what is written to it to every
// interface, so the interfaces' own values are kept and put back.
type forwarding struct{ all, conf string }

var (
	forwarding4 = forwarding{"net/ipv4/ip_forward", "net/ipv4/conf"}
	forwarding6 = forwarding{"net/ipv6/conf/all/forwarding", "net/ipv6/conf"}
)

// before is what must be written, in this order, to have the present state again.
func (f forwarding) before() ([]setting, error) {
	value, err := readSysctl(f.all)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", f.all, err)
	}
	interfaces, err := f.interfaces()
	if err != nil {
		return nil, err
	}
	settings := []setting{{f.all, value}}
	for _, s := range interfaces {
		if s.value != value {
			settings = append(settings, s)
		}
	}
	return settings, nil
}

// interfaces are each interface's own value, and that of interfaces to come.
func (f forwarding) interfaces() ([]setting, error) {
	paths, err := filepath.Glob(filepath.Join("/proc/sys", f.conf, "*", "forwarding"))
	if err != nil {
		return nil, err
	}
	var settings []setting
	for _, p := range paths {
		p = strings.TrimPrefix(p, "/proc/sys/")
		own, err := readSysctl(p)
		if errors.Is(err, fs.ErrNotExist) || p == f.conf+"/all/forwarding" {
			continue // the interface went meanwhile, or it is none
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", p, err)
		}
		settings = append(settings, setting{p, own})
	}
	return settings, nil
}

// on reports whether the host routes.
func (f forwarding) on() (bool, error) {
	value, err := readSysctl(f.all)
	if err != nil {
		return false, fmt.Errorf("read %s: %w", f.all, err)
	}
	return value != "0", nil
}

// enable turns routing on. For IPv6 an interface that forwards takes no router advertisements, and the host would lose
// the default route that it has from one: but only the "all" switch decides what is forwarded, so each
// interface gets its own value back, and takes advertisements (accept_ra=2) while it changes.
func (f forwarding) enable(k door) error {
	if f == forwarding4 {
		return k.writeSysctl(setting{f.all, "1"})
	}
	restore := f.advertised()
	for _, s := range restore {
		if err := k.writeSysctl(setting{s.path, "2"}); err != nil {
			return err
		}
	}
	own, err := f.interfaces()
	if err != nil {
		return err
	}
	return errors.Join(k.writeSysctl(setting{f.all, "1"}), restoreSysctls(k, append(own, restore...)))
}

// advertised are the interfaces that take router advertisements as long as they do not forward (accept_ra=1).
func (f forwarding) advertised() []setting {
	var found []setting
	if f == forwarding4 {
		return nil
	}
	paths, _ := filepath.Glob(filepath.Join("/proc/sys", f.conf, "*", "accept_ra")) // the pattern is well-formed
	for _, p := range paths {
		p = strings.TrimPrefix(p, "/proc/sys/")
		if v, err := readSysctl(p); err == nil && v == "1" && p != f.conf+"/all/accept_ra" {
			found = append(found, setting{p, v})
		}
	}
	return found
}

// closedLinks are the IPv4 forwarding of the links, as it is, that a trial has to turn on: the kernel forwards what comes in by a link
// whose own switch is on (IN_DEV_FORWARD), and "ip_forward" only sets all of them. Answers to workers come in by the egress link, and by
// those that lead to what egress blocks allow and to resolvers.
func (n *network) closedLinks() ([]setting, error) {
	if !n.opts.Trial {
		return nil, nil
	}
	links, err := whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var targets []netip.Prefix
	for _, a := range n.plan.Network.DNS {
		targets = append(targets, netip.PrefixFrom(a, a.BitLen()))
	}
	for _, e := range n.plan.Network.Egress {
		if e.Action == "allow" {
			targets = append(targets, e.To...)
		}
	}
	leads, err := linksTo(targets)
	if err != nil {
		return nil, err
	}
	var closed []setting
	for _, l := range links {
		a := l.Attrs()
		name := a.Name
		if name == loopback || strings.HasPrefix(a.Alias, linkMark) || name != n.plan.EgressInterface && !slices.Contains(leads, a.Index) {
			continue
		}
		s := setting{path: forwarding4.conf + "/" + name + "/forwarding"}
		if s.value, err = readSysctl(s.path); err != nil {
			return nil, fmt.Errorf("read %s: %w", s.path, err)
		}
		if s.value == "0" {
			closed = append(closed, s)
		}
	}
	slices.SortFunc(closed, func(a, b setting) int { return strings.Compare(a.path, b.path) })
	return closed, nil
}

// linksTo are the indexes of the links that routes to parts of the targets lead to, the default routes aside.
func linksTo(targets []netip.Prefix) ([]int, error) {
	leads, err := whole(func() ([]int, error) {
		var found []int
		every := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
		err := netlink.RouteListFilteredIter(unix.AF_INET, every, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
			dst := routeDst(&r)
			if r.Type != unix.RTN_UNICAST || dst.Bits() == 0 || !slices.ContainsFunc(targets, dst.Overlaps) {
				return true
			}
			found = append(found, r.LinkIndex)
			for _, hop := range r.MultiPath {
				found = append(found, hop.LinkIndex)
			}
			return true
		})
		return found, err
	})
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	return leads, nil
}

// restoreSysctls writes earlier values back. An interface that went took its settings along.
func restoreSysctls(k door, settings []setting) error {
	var errs []error
	for _, s := range settings {
		if err := k.writeSysctl(s); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
