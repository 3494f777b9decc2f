package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// linkMark begins the alias of each of our TAPs; the rest is the state folder of the plan that made it. A link
// without it is not ours, whatever its name.
const linkMark = "fleetingd:"

// routeProtocol marks our routes ("ip route show proto 70"): 70 is an F, and nobody's in rt_protos.
const routeProtocol = 70

// queueLength is how many packets to a guest wait in its TAP: the kernel's own default (DEFAULT_TX_QUEUE_LEN).
const queueLength = 1000

// tap is all that a slot's TAP is to be.
type tap struct {
	plan.Slot
	net      *plan.Network
	uid, gid int
	mark     string
	trial    bool // see Options.Trial
}

// flags are those that the TAP is created with; whoever opens it must give the same.
func (t *tap) flags() netlink.TuntapFlag {
	f := netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR
	if t.Queues > 1 {
		f |= netlink.TUNTAP_MULTI_QUEUE
	}
	return f
}

// linkLocal is the TAP's IPv6 link-local address. Neighbour discovery between link-local addresses needs one at this
// end too. They differ: the kernel would search 4,000 equal ones one after the other.
func (t *tap) linkLocal() netip.Addr {
	n := t.Index + 1
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 12: byte(n >> 24), 13: byte(n >> 16), 14: byte(n >> 8), 15: byte(n)})
}

// settings are the TAP's sysctls, as paths below /proc/sys. Without IPv6 for workers the TAP has none at all.
func (t *tap) settings() []setting {
	conf := func(name, value string) setting { return setting{"net/ipv6/conf/" + t.TAP + "/" + name, value} }
	var forward4 []setting
	if t.trial {
		forward4 = []setting{{forwarding4.conf + "/" + t.TAP + "/forwarding", "1"}}
	}
	if t.Address6 == nil {
		return append(forward4, conf("disable_ipv6", "1"))
	}
	return append(forward4,
		conf("disable_ipv6", "0"),
		conf("accept_ra", "0"),
		conf("forwarding", "1"),
		// The gateway's address is on lo, and NDP answers only for the link's own, or as a proxy: at once, because
		// the delay is for when several proxies might answer (RFC 4861, 7.2.8).
		conf("proxy_ndp", "1"),
		setting{"net/ipv6/neigh/" + t.TAP + "/proxy_delay", "0"},
	)
}

func (t *tap) routes(index int) []netlink.Route {
	r := netlink.Route{LinkIndex: index, Dst: single(t.Address), Src: t.net.Gateway.AsSlice(), Scope: netlink.SCOPE_LINK,
		Protocol: routeProtocol, Table: unix.RT_TABLE_MAIN}
	routes := []netlink.Route{r}
	if t.Address6 != nil {
		routes = append(routes, netlink.Route{LinkIndex: index, Dst: single(*t.Address6), Src: t.net.Gateway6.AsSlice(),
			Protocol: routeProtocol, Table: unix.RT_TABLE_MAIN})
	}
	return routes
}

// neighbours are permanent: the host never asks a guest who it is, and no answer can change what it knows.
func (t *tap) neighbours(index int) []netlink.Neigh {
	guest, _ := net.ParseMAC(t.net.GuestMAC) // the plan is checked
	n := netlink.Neigh{LinkIndex: index, Family: unix.AF_INET, State: unix.NUD_PERMANENT,
		IP: t.Address.AsSlice(), HardwareAddr: guest}
	neighs := []netlink.Neigh{n}
	if t.Address6 != nil {
		n.Family, n.IP = unix.AF_INET6, t.Address6.AsSlice()
		// A proxy entry that is not permanent goes whenever a VM closes the TAP (neigh_carrier_down).
		neighs = append(neighs, n, netlink.Neigh{LinkIndex: index, Family: unix.AF_INET6, State: unix.NUD_PERMANENT,
			Flags: unix.NTF_PROXY | unix.NTF_ROUTER, IP: t.net.Gateway6.AsSlice()})
	}
	return neighs
}

func single(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// setting is a sysctl as its path below /proc/sys.
type setting struct{ path, value string }

// kernel is the real network of the namespace of the calling thread. All of its methods must
// be called from one thread, when that thread is not in the process's own namespace.
type kernel struct {
	handle *netlink.Handle
}

func openKernel() (*kernel, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	return &kernel{h}, nil
}

func (k *kernel) close() { k.handle.Close() }

// makeTAPs makes all or none: the links, then, when udev has seen them, all that hangs on them.
func (k *kernel) makeTAPs(ctx context.Context, taps []tap) error {
	indexes := make([]int, len(taps))
	for i := range taps {
		err := ctx.Err()
		if err == nil {
			indexes[i], err = k.makeLink(&taps[i])
		}
		if err != nil {
			return errors.Join(fmt.Errorf("TAP %s: %w", taps[i].TAP, err), k.deleteTAPs(taps[:i]))
		}
	}
	if err := waitUdev(ctx, indexes); err != nil {
		return errors.Join(err, k.deleteTAPs(taps))
	}
	for i := range taps {
		err := ctx.Err()
		if err == nil {
			err = k.finishTAP(&taps[i], indexes[i])
		}
		if err != nil {
			return errors.Join(fmt.Errorf("TAP %s: %w", taps[i].TAP, err), k.deleteTAPs(taps))
		}
	}
	return nil
}

// finishTAP takes back what udev did to the link, and gives it all that hangs on it.
func (k *kernel) finishTAP(t *tap, index int) error {
	link, err := k.handle.LinkByIndex(index)
	if err != nil {
		return fmt.Errorf("find it again: %w", err)
	}
	if t.linkLacks(link.Attrs()) != "" {
		if err := t.setLink(index); err != nil {
			return err
		}
	}
	return k.configure(t, index)
}

// makeLink makes the bare, persistent link. It is given our mark before it is made persistent: should the process die
// before, the link goes with its descriptor, and after, it is known as ours.
//
// The descriptor is closed before the link is brought up. Closing takes the carrier away, and from a link that is up the kernel
// takes it in the background, holding the lock that all of netlink waits for: a minute for 1,000 links.
func (k *kernel) makeLink(t *tap) (index int, err error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open /dev/net/tun (modprobe tun): %w", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(t.TAP)
	if err != nil {
		return 0, fmt.Errorf("name: %w", err)
	}
	// EXCL: never open a link that somebody made since we looked.
	req.SetUint16(uint16(t.flags()) | unix.IFF_TAP | unix.IFF_TUN_EXCL)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return 0, fmt.Errorf("TUNSETIFF: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, t.uid); err != nil {
		return 0, fmt.Errorf("TUNSETOWNER %d: %w", t.uid, err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETGROUP, t.gid); err != nil {
		return 0, fmt.Errorf("TUNSETGROUP %d: %w", t.gid, err)
	}
	link, err := k.handle.LinkByName(t.TAP)
	if err != nil {
		return 0, fmt.Errorf("find it again: %w", err)
	}
	if err := k.noQueue(link.Attrs().Index); err != nil {
		return 0, fmt.Errorf("qdisc noqueue: %w", err)
	}
	if err := t.setLink(link.Attrs().Index); err != nil {
		return 0, err
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return 0, fmt.Errorf("TUNSETPERSIST: %w", err)
	}
	return link.Attrs().Index, nil
}

// repairTAPs adds to our existing TAPs what they lack, and removes what they should not have: from all of them first, because one TAP
// may get what another loses.
func (k *kernel) repairTAPs(repairs []repair) error {
	indexes := make([]int, len(repairs))
	for i, r := range repairs {
		link, err := k.handle.LinkByName(r.tap.TAP)
		if err != nil {
			return fmt.Errorf("TAP %s: %w", r.tap.TAP, err)
		}
		indexes[i] = link.Attrs().Index
		if err := k.clear(&r.tap, indexes[i], r.there); err != nil {
			return fmt.Errorf("TAP %s: %w", r.tap.TAP, err)
		}
	}
	for i, r := range repairs {
		if err := r.tap.setLink(indexes[i]); err != nil {
			return fmt.Errorf("TAP %s: %w", r.tap.TAP, err)
		}
		if err := k.configure(&r.tap, indexes[i]); err != nil {
			return fmt.Errorf("TAP %s: %w", r.tap.TAP, err)
		}
	}
	return nil
}

// attached are the routes and neighbours of one link.
type attached struct {
	routes []netlink.Route
	neighs []netlink.Neigh
}

// clear removes our routes and the permanent neighbours that the TAP is not to have.
func (k *kernel) clear(t *tap, index int, there attached) error {
	want := t.routes(index)
	for _, r := range there.routes {
		if r.Protocol != routeProtocol || slices.ContainsFunc(want, func(w netlink.Route) bool { return sameRoute(w, r) }) {
			continue
		}
		if err := k.handle.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("delete the route to %s: %w", r.Dst, err)
		}
	}
	wantNeighs := t.neighbours(index)
	for _, e := range there.neighs {
		ours := e.State&unix.NUD_PERMANENT != 0 || e.Flags&unix.NTF_PROXY != 0
		if e.IP.IsMulticast() || !ours || slices.ContainsFunc(wantNeighs, func(w netlink.Neigh) bool { return sameNeigh(w, e) }) {
			continue
		}
		if err := k.handle.NeighDel(&e); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete the neighbour %s: %w", e.IP, err)
		}
	}
	return nil
}

func (k *kernel) configure(t *tap, index int) error {
	for _, s := range t.settings() {
		if err := k.writeSysctl(s); err != nil && !(t.Address6 == nil && errors.Is(err, fs.ErrNotExist)) {
			return err // but a kernel without IPv6 has none to turn off
		}
	}
	link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index, Name: t.TAP}}
	if err := k.handle.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring it up: %w", err)
	}
	if t.Address6 != nil {
		addr := &netlink.Addr{IPNet: single(t.linkLocal()), Scope: unix.RT_SCOPE_LINK, Flags: unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE}
		if err := k.handle.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("address %s: %w", addr.IPNet, err)
		}
	}
	for _, r := range t.routes(index) {
		if err := k.addRoute(r); err != nil {
			return err
		}
	}
	for _, n := range t.neighbours(index) {
		if err := k.handle.NeighSet(&n); err != nil {
			return fmt.Errorf("neighbour %s: %w", n.IP, err)
		}
	}
	return nil
}

// noQueue gives a link, before it is up, no queueing discipline. A multi-queue TAP has 256 transmit queues, however many are opened
// (MAX_TAP_QUEUES), and the default discipline of each has buffers of its own: 6 MB a TAP with pfifo_fast,
// more with fq_codel. They would never be used: a TAP takes every packet, into the ring of the queue
// that its reader opened, or drops it there.
func (k *kernel) noQueue(index int) error {
	return k.handle.QdiscReplace(&netlink.GenericQdisc{QdiscType: "noqueue",
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Parent: netlink.HANDLE_ROOT}})
}

// addrGenNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const addrGenNone = 1

// setLink sets a link's attributes, in one message. On a link that is up, each such message makes IPv6 walk through all of the
// host's routes: so a new link is down then.
func (t *tap) setLink(index int) error {
	host, err := net.ParseMAC(t.net.HostMAC)
	if err != nil {
		return err
	}
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_ADDRESS, host))
	req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(t.net.MTU))))
	req.AddData(nl.NewRtAttr(unix.IFLA_TXQLEN, nl.Uint32Attr(queueLength)))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(linkGroup)))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFALIAS, []byte(t.mark)))
	if t.Address6 != nil {
		// The kernel would give all TAPs the same link-local address, made of their MAC.
		spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
		spec.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{addrGenNone})
		req.AddData(spec)
	}
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("set MAC %s, MTU %d and alias: %w", t.net.HostMAC, t.net.MTU, err)
	}
	return nil
}

// addRoute never replaces a route: a route to the same address on another link belongs to someone else.
func (k *kernel) addRoute(r netlink.Route) error {
	err := k.handle.RouteAdd(&r)
	if !errors.Is(err, unix.EEXIST) {
		if err != nil {
			return fmt.Errorf("route to %s: %w", r.Dst, err)
		}
		return nil
	}
	have, listErr := whole(func() ([]netlink.Route, error) {
		return k.handle.RouteListFiltered(unix.AF_UNSPEC, &netlink.Route{Dst: r.Dst, Table: unix.RT_TABLE_MAIN},
			netlink.RT_FILTER_DST|netlink.RT_FILTER_TABLE)
	})
	if listErr != nil {
		return fmt.Errorf("route to %s: %w", r.Dst, errors.Join(err, listErr))
	}
	if slices.ContainsFunc(have, func(h netlink.Route) bool { return sameRoute(r, h) }) {
		return nil
	}
	return fmt.Errorf("route to %s: another route to this address exists: %w", r.Dst, err)
}

func sameRoute(a, b netlink.Route) bool {
	return a.LinkIndex == b.LinkIndex && a.Protocol == b.Protocol && a.Src.Equal(b.Src) && a.Dst != nil && b.Dst != nil &&
		a.Dst.String() == b.Dst.String()
}

// linkGroup is the group of our TAPs ("flee" as a number), which makes deleting them all quick. It does not mark them as ours: anyone
// may put a link into any group.
const linkGroup = 0x666c6565

// deleteTAPs deletes links together, as a group: one by one, each would wait until no CPU can still hold a packet
// of it, some 10 ms.
func (k *kernel) deleteTAPs(taps []tap) error {
	links, err := whole(k.handle.LinkList)
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	marks := make(map[string]string, len(taps))
	for _, t := range taps {
		marks[t.TAP] = t.mark
	}
	var doomed []netlink.Link
	members := map[uint32]int{0: 1} // the default group is never deleted
	for _, l := range links {
		a := l.Attrs()
		members[a.Group]++
		if m, ok := marks[a.Name]; ok && a.Alias == m { // else gone already, or not ours
			doomed = append(doomed, l)
		}
	}
	if len(doomed) == 0 {
		return nil
	}
	group := uint32(linkGroup)
	if slices.ContainsFunc(doomed, func(l netlink.Link) bool { return l.Attrs().Group != linkGroup }) || members[group] != len(doomed) {
		group = 1
		for members[group] > 0 {
			group++
		}
		for _, l := range doomed {
			if err := k.handle.LinkSetGroup(l, int(group)); err != nil {
				return fmt.Errorf("TAP %s: put it into group %d: %w", l.Attrs().Name, group, err)
			}
		}
	}
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("delete %d TAPs: %w", len(doomed), err)
	}
	return nil
}

// loopback carries the gateway's addresses.
const loopback = "lo"

func (k *kernel) addAddress(a netip.Addr) error {
	lo, err := k.handle.LinkByName(loopback)
	if err != nil {
		return fmt.Errorf("link %s: %w", loopback, err)
	}
	addr := &netlink.Addr{IPNet: single(a)}
	if a.Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := k.handle.AddrAdd(lo, addr); err != nil {
		return fmt.Errorf("address %s on %s: %w", a, loopback, err)
	}
	return nil
}

func (k *kernel) deleteAddress(a netip.Addr) error {
	lo, err := k.handle.LinkByName(loopback)
	if err != nil {
		return fmt.Errorf("link %s: %w", loopback, err)
	}
	if err := k.handle.AddrDel(lo, &netlink.Addr{IPNet: single(a)}); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("delete the address %s on %s: %w", a, loopback, err)
	}
	return nil
}

func (k *kernel) addRule(p policy) error {
	if err := k.handle.RuleAdd(p.kernelRule()); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("rule %s: %w", p, err)
	}
	return nil
}

func (k *kernel) deleteRule(p policy) error {
	if err := k.handle.RuleDel(p.kernelRule()); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete the rule %s: %w", p, err)
	}
	return nil
}

func (k *kernel) writeSysctl(s setting) error {
	f, err := os.OpenFile(filepath.Join("/proc/sys", s.path), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set %s to %s: %w", s.path, s.value, err)
	}
	_, err = f.WriteString(s.value)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("set %s to %s: %w", s.path, s.value, err)
	}
	return nil
}

func readSysctl(path string) (string, error) {
	b, err := os.ReadFile(filepath.Join("/proc/sys", path))
	return strings.TrimSpace(string(b)), err
}

func (k *kernel) load(r plan.Ruleset, slots []plan.Slot) error { return loadFirewall(r, slots) }

func (k *kernel) unload(tables []tableID) error { return unloadFirewall(tables) }

// forget deletes what connection tracking knows of a network's addresses: a later worker with the same address begins anew.
func (k *kernel) forget(subnet netip.Prefix) error {
	family := netlink.InetFamily(unix.AF_INET)
	if subnet.Addr().Is6() {
		family = unix.AF_INET6
	}
	ipnet := net.IPNet{IP: subnet.Addr().AsSlice(), Mask: net.CIDRMask(subnet.Bits(), subnet.Addr().BitLen())}
	var filters []netlink.CustomConntrackFilter
	for _, end := range []netlink.ConntrackFilterType{netlink.ConntrackOrigSrcIP, netlink.ConntrackOrigDstIP} {
		f := &netlink.ConntrackFilter{}
		if err := f.AddIPNet(end, &ipnet); err != nil {
			return fmt.Errorf("connection tracking: %w", err)
		}
		filters = append(filters, f)
	}
	if _, err := k.handle.ConntrackDeleteFilters(netlink.ConntrackTable, family, filters...); err != nil {
		return fmt.Errorf("connection tracking: delete the entries of %s: %w", subnet, err)
	}
	return nil
}
