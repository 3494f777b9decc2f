package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/seed"
)

// linkPatience is how long the network card may take to appear.
const linkPatience = 30 * time.Second

// applyNetwork gives the seed's interface its addresses and routes over netlink: a daemon that does the same from a file
// takes a second longer. It needs no DHCP and does not wait: the addresses belong to this worker from the start.
func applyNetwork(ctx context.Context, n *seed.Network, sysctl string) error {
	if n == nil {
		return nil
	}
	link, err := waitLink(ctx, n.MAC)
	if err != nil {
		return err
	}
	name := link.Attrs().Name
	if err := ipv6Settings(sysctl, name, n.Addresses); err != nil {
		return err
	}
	if n.MTU > 0 {
		if err := netlink.LinkSetMTU(link, n.MTU); err != nil {
			return fmt.Errorf("set the MTU of %s to %d: %w", name, n.MTU, err)
		}
	}
	for _, a := range n.Addresses {
		// No duplicate address detection: the host assigns each address once, and detection takes a second.
		addr := &netlink.Addr{IPNet: host(a)}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("give %s the address %s: %w", name, a, err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	for _, g := range n.Gateways {
		any := &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
		if g.Is6() {
			any = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		}
		// The address is a /32, so the gateway has to be marked as on-link.
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: any, Gw: g.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("set the default route via %s on %s: %w", g, name, err)
		}
	}
	for _, g := range n.Gateways {
		for _, a := range n.Addresses {
			if a.Is4() != g.Is4() {
				continue
			}
			if err := keepGateway(link, a, g); err != nil {
				return fmt.Errorf("keep the route from %s to the gateway %s: %w", a, g, err)
			}
		}
	}
	return nil
}

// keepGateway keeps the worker's route back to its gateway, where its SSH sessions come from, whatever networks a job creates. It needs two
// things:
//
// A route to the gateway alone. It is more specific than that of a bridge whose network covers the gateway. Docker also sees
// it when it looks for a free network, and chooses another one.
//
// A rule for local addresses that excludes what the worker itself sends to the gateway ("iif lo"), instead of the kernel's
// "0: from all lookup local", for a bridge with the same address as the gateway: 172.17.0.1, say, Docker's default.
//
//	0: not from WORKER to GATEWAY iif lo lookup local
//
// The kernel validates the source of incoming packets by the same rules (fib_validate_source), so packets from the gateway are not
// martians either. Containers still reach the bridge's address. The rule replaces the kernel's, because the kernel inserts
// rules without a priority, such as those of wg-quick, before the second rule in the list (fib_default_rule_pref).
//
// Both have the protocol "kernel": systemd-networkd removes those of others (networkd.conf(5), ManageForeignRoutes=).
func keepGateway(link netlink.Link, worker, gateway netip.Addr) error {
	family, scope := netlink.FAMILY_V6, netlink.SCOPE_UNIVERSE
	if worker.Is4() {
		family, scope = netlink.FAMILY_V4, netlink.SCOPE_LINK
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: host(gateway), Scope: scope, Protocol: unix.RTPROT_KERNEL}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("route to %s on %s: %w", gateway, link.Attrs().Name, err)
	}
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Table, rule.Protocol = family, 0, unix.RT_TABLE_LOCAL, unix.RTPROT_KERNEL
	rule.Invert, rule.IifName, rule.Src, rule.Dst = true, "lo", host(worker), host(gateway)
	switch err := netlink.RuleAdd(rule); {
	case errors.Is(err, unix.EEXIST):
		return nil // this program was restarted
	case errors.Is(err, unix.EOPNOTSUPP):
		return nil // the kernel lacks CONFIG_IP_MULTIPLE_TABLES
	case err != nil:
		return fmt.Errorf("rule %s: %w", rule, err)
	}
	// The kernel's own rule. These fields match it first; the new rule, the second in the list, has them too.
	own := netlink.NewRule()
	own.Family, own.Priority, own.Table = family, 0, unix.RT_TABLE_LOCAL
	if err := netlink.RuleDel(own); err != nil {
		return fmt.Errorf("remove rule %s: %w", own, err)
	}
	return nil
}

func host(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// waitLink finds the interface with this MAC.
func waitLink(ctx context.Context, mac string) (netlink.Link, error) {
	ctx, cancel := context.WithTimeout(ctx, linkPatience)
	defer cancel()
	for {
		links, err := netlink.LinkList()
		if err != nil {
			return nil, fmt.Errorf("list the network interfaces: %w", err)
		}
		var have []string
		for _, l := range links {
			if strings.EqualFold(l.Attrs().HardwareAddr.String(), mac) {
				return l, nil
			}
			have = append(have, l.Attrs().Name)
		}
		if !pause(ctx, 5*time.Millisecond) {
			return nil, fmt.Errorf("no network interface with the seed's MAC %s appeared in %v; found %s", mac, linkPatience, strings.Join(have, ", "))
		}
	}
}

// ipv6Settings disables IPv6 on a link without an IPv6 address: such a worker must not even have a link-local
// address. Otherwise the link neither waits for duplicate address detection nor listens to router advertisements.
func ipv6Settings(sysctl, link string, addrs []netip.Addr) error {
	set := map[string]string{"disable_ipv6": "1"}
	for _, a := range addrs {
		if a.Is6() {
			set = map[string]string{"disable_ipv6": "0", "accept_ra": "0", "accept_dad": "0"}
		}
	}
	for k, v := range set {
		err := os.WriteFile(filepath.Join(sysctl, "net/ipv6/conf", link, k), []byte(v), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			return fmt.Errorf("set up the link's IPv6: %w", err)
		}
	}
	return nil
}
