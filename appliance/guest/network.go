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

// applyNetwork gives the seed's interface its addresses and routes, over netlink: a daemon that does the same from a file
// is a second later. No DHCP, no waiting: the addresses are this worker's from the start.
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
		// No duplicate address detection: the host gives each address out once, and it would take a second.
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
		// The address is a /32: the gateway is on the link without a route to it.
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: any, Gw: g.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("set the default route via %s on %s: %w", g, name, err)
		}
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
			return nil, fmt.Errorf("no network interface with the seed's MAC %s in %v; there are %s", mac, linkPatience, strings.Join(have, ", "))
		}
	}
}

// ipv6Settings turns IPv6 off on a link that has no IPv6 address: it does not exist for such a worker, and a link-local
// address would. Where it has one, the link neither waits for duplicates of it nor listens to router advertisements.
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
			return fmt.Errorf("set the link's IPv6 up: %w", err)
		}
	}
	return nil
}
