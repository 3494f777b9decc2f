package host

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// Addresses that stand for the internet when routes are looked up; nothing is sent to them. There is one in each half, since VPNs put
// two routes in front of the default route (OpenVPN's 0.0.0.0/1 and 128.0.0.0/1, 2000::/4 and 3000::/4).
var (
	internet4 = []netip.Addr{netip.MustParseAddr("1.1.1.1"), netip.MustParseAddr("193.0.14.129")}
	internet6 = []netip.Addr{netip.MustParseAddr("2606:4700:4700::1111"), netip.MustParseAddr("3000::1")}
)

// internet is what stands for the internet that the plan's workers see, by family.
func (n *network) internet(six bool) []netip.Addr {
	switch {
	case !six:
		return internet4
	case n.plan.Network.Subnet6 != nil:
		return internet6
	}
	return nil
}

// guest is a worker's address of one family, and its TAP. Where the plan has no slots it is what the first would have.
func (n *network) guest(six bool) (netip.Addr, string) {
	addr, tap := n.plan.Network.Gateway.Next(), "fleet0"
	if len(n.plan.Slots) > 0 {
		addr, tap = n.plan.Slots[0].Address, n.plan.Slots[0].TAP
	}
	if six {
		addr = n.plan.Network.Gateway6.Next()
		if len(n.plan.Slots) > 0 {
			addr = *n.plan.Slots[0].Address6
		}
	}
	return addr, tap
}

// outcome is how the workers' packets leave, against what the spec says.
type outcome struct {
	status       Status
	detail, cure string
}

// egress compares egress_interface with the links that the workers' packets leave by. The firewall rejects what leaves by another.
func (n *network) egress(h *have, six bool) outcome {
	named := n.plan.EgressInterface
	src, tap := n.guest(six)
	family := "IPv4"
	if six {
		family = "IPv6"
	}
	var right, partly, elsewhere, nowhere []string
	var links []string // those that packets leave by, named aside
	var captor path
	once := func(list []string, s string) []string {
		if slices.Contains(list, s) {
			return list
		}
		return append(list, s)
	}
	for _, dst := range n.internet(six) {
		p := h.lookup(flow{src: src, dst: dst, in: tap})
		out := h.outLinks(p.route)
		switch {
		case len(out) == 0:
			nowhere = once(nowhere, h.why(p))
		case len(out) == 1 && out[0] == named:
			right = once(right, h.why(p))
		case slices.Contains(out, named):
			partly, captor = once(partly, h.why(p)), p
		default:
			elsewhere, captor = once(elsewhere, h.why(p)), p
		}
		for _, l := range out {
			if l != named {
				links = once(links, l)
			}
		}
	}
	routes := func(list []string) string { return strings.Join(list, "; ") }
	cure := ""
	if len(links) > 0 {
		cure = fmt.Sprintf("write egress_interface = %q in the spec", links[0])
	}
	switch {
	case len(elsewhere) > 0:
		detail := fmt.Sprintf("the workers' %s packets leave by %s, not by %s, and the firewall rejects them: %s", family,
			strings.Join(links, " and "), named, routes(elsewhere))
		detail += h.explain(named, links[0])
		if keep := n.keepOut(h, captor, six); keep != "" {
			cure += "; to keep the workers out of that route instead: " + keep
		}
		return outcome{StatusFail, detail, cure}
	case len(partly) > 0:
		return outcome{StatusWarn, fmt.Sprintf("some of the workers' %s packets leave by %s, not by %s, and the firewall rejects those: %s",
			family, strings.Join(links, " and "), named, routes(partly)),
			fmt.Sprintf("give the workers one way out: ip route add default … dev %s table 70, ip rule add priority 71 iif 'TAP' lookup 70; "+
				"or take the other nexthops from the route", named)}
	case len(nowhere) > 0 && len(right) > 0:
		return outcome{StatusWarn, fmt.Sprintf("a part of the %s internet cannot be reached: %s", family, routes(nowhere)), "ip route"}
	case len(nowhere) > 0:
		rel := h.explain(named, "")
		flag := ""
		if six {
			flag = "-6 "
		}
		return outcome{StatusWarn, fmt.Sprintf("this host has no %s route to the internet (%s), so the workers have none either%s", family,
			routes(nowhere), rel), fmt.Sprintf("ip %sroute add default via ROUTER dev %s", flag, named)}
	}
	return outcome{status: StatusOK, detail: fmt.Sprintf("the workers' %s packets leave by %s: %s", family, named, routes(right))}
}

// keepOut is the command that makes the workers use table main, where that leads out by the right link and another table does not.
func (n *network) keepOut(h *have, p path, six bool) string {
	if p.rule == nil || p.rule.table == unix.RT_TABLE_MAIN || p.rule.priority <= rulePriority+1 {
		return ""
	}
	subnet, flag := n.plan.Network.Subnet, ""
	if six {
		subnet, flag = *n.plan.Network.Subnet6, "-6 "
	}
	for _, dst := range n.internet(six) {
		if out := h.outLinks(h.inTable(unix.RT_TABLE_MAIN, dst)); len(out) != 1 || out[0] != n.plan.EgressInterface {
			return ""
		}
	}
	return fmt.Sprintf("ip %srule add priority %d from %s lookup main", flag, rulePriority+1, subnet)
}

// stacked are the kinds of link that lie on another one, their parent.
var stacked = map[string]string{"vlan": "a VLAN", "macvlan": "a macvlan", "macvtap": "a macvtap", "ipvlan": "an ipvlan", "ipvtap": "an ipvtap",
	"macsec": "a MACsec link"}

// relation says how one link leads to another: "eno1 is a member of the bond bond0, bond0 is a port of the bridge br0". Where it
// does not, it says of which link the first is a part, or nothing.
func (h *have) relation(from, to string) (how string, leads bool) {
	type place struct {
		name string
		how  []string
	}
	queue, seen := []place{{name: from}}, map[string]bool{from: true}
	first := ""
	for len(queue) > 0 {
		at := queue[0]
		queue = queue[1:]
		if at.name == to && len(at.how) > 0 {
			return strings.Join(at.how, ", "), true
		}
		l := h.links[at.name]
		if l == nil {
			continue
		}
		visit := func(next, how string) {
			if !seen[next] {
				seen[next] = true
				queue = append(queue, place{next, append(slices.Clone(at.how), how)})
			}
		}
		if m := h.link(l.Attrs().MasterIndex); m != nil {
			part := map[string]string{"bridge": "a port of the bridge", "bond": "a member of the bond", "team": "a member of the team",
				"vrf": "in the VRF"}[m.Type()]
			if part == "" {
				part = "a part of the " + m.Type()
			}
			how := fmt.Sprintf("%s is %s %s", at.name, part, m.Attrs().Name)
			if at.name == from {
				first = how
			}
			visit(m.Attrs().Name, how)
		}
		for _, name := range h.linkNames() {
			up := h.links[name]
			if kind := stacked[up.Type()]; kind != "" && up.Attrs().ParentIndex == l.Attrs().Index {
				visit(name, fmt.Sprintf("%s is %s on %s", name, kind, at.name))
			}
		}
	}
	return first, false
}

// explain is what relates the link that the spec names to the one that packets leave by, as a clause, or "".
func (h *have) explain(named, out string) string {
	rel, leads := h.relation(named, out)
	if back, returns := h.relation(out, named); returns && !leads {
		rel = back
	}
	if rel == "" {
		return ""
	}
	if table := h.vrfTable(named); table != 0 {
		rel += ", whose routes are in table " + tableName(table)
	}
	return "; " + rel
}

// linkNames are the host's links in order, without our TAPs.
func (h *have) linkNames() []string {
	var names []string
	for name, l := range h.links {
		if !strings.HasPrefix(l.Attrs().Alias, linkMark) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// overlaps finds routes of others that the workers' addresses would take packets from, and those that would take the workers' own. It
// looks at every table that a rule names. Our rule lets a worker's own route win over all tables but local (see wantRules), so a wider
// route matters only where it is a link's own network, in which others have addresses. A blackhole or the like takes
// nothing from anybody, and a wide route into a VPN or through a router loses nothing that it needs.
func (n *network) overlaps(h *have) []error {
	var errs []error
	for _, subnet := range []*netip.Prefix{&n.plan.Network.Subnet, n.plan.Network.Subnet6} {
		if subnet == nil {
			continue
		}
		key := "network.subnet"
		if subnet.Addr().Is6() {
			key = "network.subnet6"
		}
		for i := range h.routes {
			r := &h.routes[i]
			if dst := routeDst(r); !dst.IsValid() || dst.Bits() == 0 || !dst.Overlaps(*subnet) || !h.reached(r) || n.ours(r) {
				continue
			}
			conflict := h.takesNetwork(r, *subnet)
			if r.Table == unix.RT_TABLE_LOCAL || refusals[r.Type] != "" {
				conflict = n.takesWorker(r)
			}
			if conflict {
				errs = append(errs, fmt.Errorf("%s %s overlaps route %s; choose another subnet", key, subnet, h.onLink(r)))
			}
		}
	}
	return errs
}

// onLink is a route as messages of overlaps have it: "172.16.0.0/16 on lan in table main".
func (h *have) onLink(r *netlink.Route) string {
	return strings.Replace(h.describe(r), " dev ", " on ", 1)
}

// ours reports a route that NetworkUp or Doctor made.
func (n *network) ours(r *netlink.Route) bool {
	if r.Table == unix.RT_TABLE_LOCAL { // the kernel makes one for each address
		return routeDst(r).IsSingleIP() && slices.Contains(append(n.gateways(), n.notedAddresses()...), routeDst(r).Addr())
	}
	return r.Protocol == routeProtocol // another plan's TAPs are refused by name, and a doctor's are gone in a moment
}

func (n *network) notedAddresses() []netip.Addr {
	if n.notes == nil {
		return nil
	}
	return n.notes.Addresses
}

// reached reports whether any rule leads to the route's table.
func (h *have) reached(r *netlink.Route) bool {
	table := r.Table
	if table == unix.RT_TABLE_UNSPEC || table == unix.RT_TABLE_MAIN || table == unix.RT_TABLE_LOCAL {
		return true
	}
	return slices.ContainsFunc(h.policies, func(p policy) bool {
		if !p.l3mdev {
			return p.table == table
		}
		for _, l := range h.links {
			if vrf, ok := l.(*netlink.Vrf); ok && int(vrf.Table) == table {
				return true
			}
		}
		return false
	})
}

// takesNetwork reports a route to a network inside the subnet, or to a link's own network around it.
func (h *have) takesNetwork(r *netlink.Route, subnet netip.Prefix) bool {
	if h.linkName(r.LinkIndex) == loopback {
		return false
	}
	if routeDst(r).Bits() >= subnet.Bits() {
		return true
	}
	l := h.link(r.LinkIndex)
	pointToPoint := l != nil && l.Attrs().RawFlags&(unix.IFF_POINTOPOINT|unix.IFF_NOARP) != 0
	src, _ := netip.AddrFromSlice(r.Src)
	connected := r.Protocol == unix.RTPROT_KERNEL || routeDst(r).Contains(src.Unmap())
	return len(r.Gw) == 0 && r.Via == nil && len(r.MultiPath) == 0 && connected && !pointToPoint
}

// takesWorker reports a route that takes a worker's address, whatever our rule says: in table local, or of the same length in main.
func (n *network) takesWorker(r *netlink.Route) bool {
	if r.Table != unix.RT_TABLE_LOCAL && (!routeDst(r).IsSingleIP() || r.Table != unix.RT_TABLE_MAIN && r.Table != 0) {
		return false
	}
	to := routeDst(r)
	return slices.ContainsFunc(n.gateways(), to.Contains) && (r.Table != unix.RT_TABLE_LOCAL || r.Type != unix.RTN_LOCAL) ||
		slices.ContainsFunc(n.plan.Slots, func(s plan.Slot) bool {
			return to.Contains(s.Address) || s.Address6 != nil && to.Contains(*s.Address6)
		})
}

// Trouble is something on the host that keeps packets from their worker or from the internet, and that NetworkUp does not change.
type Trouble struct {
	Difference
	Lost bool // the host itself does not reach the worker
}

// Troubles asks the kernel how packets go between these slots, the host and the internet while the network is up. It needs no
// privilege.
func Troubles(p *plan.Plan, slots []plan.Slot) ([]Trouble, error) {
	n := &network{plan: p}
	h, err := linksAndRoutes(p)
	if err != nil {
		return nil, fmt.Errorf("network: %w", err)
	}
	sockets, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("network: netlink: %w", err)
	}
	defer sockets.Close()
	return n.troubles(h, slots, func(f flow, index int) (int, error) { return askBy(sockets, f, index) })
}

// troubles explains what ask, the kernel, answers by what have says.
func (n *network) troubles(h *have, slots []plan.Slot, ask func(flow, int) (int, error)) ([]Trouble, error) {
	var found []Trouble
	for _, six := range []bool{false, true} {
		internet := n.internet(six)
		if internet == nil {
			continue
		}
		o := n.egress(h, six)
		if o.status == StatusFail {
			found = append(found, Trouble{Difference{"link " + n.plan.EgressInterface, "is not the way out: " + o.detail, o.cure}, false})
		}
		lost, err := n.lost(h, slots, six, ask)
		if err != nil {
			return nil, err
		}
		found = append(found, lost...)
		t, err := n.filtered(h, slots, six, o.status == StatusOK && lost == nil, ask)
		if err != nil {
			return nil, err
		}
		found = append(found, t...)
	}
	return found, nil
}

// lost are the slots whose TAP the host's own packets do not go to. Only the first is explained: it is the same for most.
func (n *network) lost(h *have, slots []plan.Slot, six bool, ask func(flow, int) (int, error)) ([]Trouble, error) {
	var first *Trouble
	count := 0
	for _, s := range slots {
		addr := s.Address
		if six {
			addr = *s.Address6
		}
		l, ok := h.links[s.TAP]
		if !ok || l.Attrs().RawFlags&unix.IFF_UP == 0 {
			continue // the check of TAPs reports it
		}
		if !inUse(l) && skipsIdle(s.TAP, six) {
			continue // its route counts once a VM opens it
		}
		f := flow{dst: addr, in: loopback, uid: h.uid}
		to, err := ask(f, 0)
		if err == nil && to == l.Attrs().Index {
			continue
		}
		if !refused(err) {
			return nil, fmt.Errorf("look up the route to %s: %w", addr, err)
		}
		count++
		if first != nil {
			continue
		}
		where := ""
		if err == nil {
			where = fmt.Sprintf(" but to %s", h.linkName(to))
		}
		first = &Trouble{Difference{"TAP " + s.TAP, fmt.Sprintf("is not reached: packets to its worker %s do not go there%s: %s", addr,
			where, h.why(h.lookup(f))), h.lostCure(six)}, true}
	}
	if first == nil {
		return nil, nil
	}
	if count > 1 {
		first.Problem += fmt.Sprintf("; %d other TAPs are not reached either", count-1)
	}
	return []Trouble{*first}, nil
}

func (h *have) lostCure(six bool) string {
	family := unix.AF_INET
	if six {
		family = unix.AF_INET6
	}
	if !slices.ContainsFunc(h.policies, func(p policy) bool { return p.isOurs() && p.family == family }) {
		return "`fleetingd network up` adds its rule again, which lets the workers' routes win"
	}
	return "delete that rule or route, or give the rule a number above " + fmt.Sprint(rulePriority)
}

// refused reports an error that is the answer to a route lookup: the packet has no way. Nil is one too.
func refused(err error) bool {
	if err == nil {
		return true
	}
	return slices.ContainsFunc([]unix.Errno{unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL, unix.EXDEV, unix.EAGAIN, unix.ESRCH},
		func(e unix.Errno) bool { return errors.Is(err, e) })
}

// filtered finds packets that do not go through the host although the way out is right: the workers', or the answers to them. It asks
// for the first worker whose TAP is up: what it finds concerns all.
func (n *network) filtered(h *have, slots []plan.Slot, six, leaves bool, ask func(flow, int) (int, error)) ([]Trouble, error) {
	i := slices.IndexFunc(slots, func(s plan.Slot) bool {
		l := h.links[s.TAP]
		return l != nil && l.Attrs().RawFlags&unix.IFF_UP != 0 && (inUse(l) || !skipsIdle(s.TAP, six))
	})
	if i < 0 || !leaves || six {
		return nil, nil // IPv6 has neither: rp_filter is a firewall's there, and forwarding is one switch, which up turns on
	}
	worker := slots[i]
	egress := h.links[n.plan.EgressInterface]
	if egress == nil {
		return nil, nil
	}
	var found []Trouble
	add := func(link, problem, cure string) {
		found = append(found, Trouble{Difference{"link " + link, problem, cure}, false})
	}
	out := direction{h.links[worker.TAP], egress, worker.Address, internet4[0], "the workers' packets"}
	for _, d := range []direction{out, {egress, out.in, out.dst, out.src, "the internet's answers"}} {
		in := d.in.Attrs().Name
		to, err := ask(d.flow(), d.in.Attrs().Index)
		if err == nil && to == d.out.Attrs().Index {
			continue
		}
		if !refused(err) {
			return nil, fmt.Errorf("look up the route to %s: %w", d.dst, err)
		}
		back := h.lookup(flow{src: d.dst, dst: d.src, in: d.out.Attrs().Name}) // what fib_validate_source looks up
		switch {
		case !forwards(in):
			add(in, "does not forward "+d.packets, "sysctl -w net.ipv4.conf."+in+".forwarding=1")
		case err != nil && strict(in) && !slices.Contains(h.outLinks(back.route), in):
			add(in, fmt.Sprintf("drops %s: rp_filter is strict, and the way back to %s is another: %s", d.packets, d.src, h.why(back)),
				"sysctl -w net.ipv4.conf."+in+".rp_filter=2")
		default:
			add(in, fmt.Sprintf("does not forward %s to %s: %s", d.packets, d.out.Attrs().Name, h.why(h.lookup(d.flow()))), h.lostCure(six))
		}
	}
	return found, nil
}

// direction is one of the two that packets between a worker and the internet have.
type direction struct {
	in, out  netlink.Link
	src, dst netip.Addr
	packets  string
}

func (d direction) flow() flow { return flow{src: d.src, dst: d.dst, in: d.in.Attrs().Name} }

// skipsIdle reports whether lookups pass over routes by the link while it has no carrier, as a TAP that no VM has open.
func skipsIdle(link string, six bool) bool {
	family := "ipv4"
	if six {
		family = "ipv6"
	}
	for _, conf := range []string{"all", link} {
		if v, err := readSysctl("net/" + family + "/conf/" + conf + "/ignore_routes_with_linkdown"); err == nil && v != "0" {
			return true
		}
	}
	return false
}

func forwards(link string) bool {
	v, err := readSysctl("net/ipv4/conf/" + link + "/forwarding")
	return err != nil || v != "0"
}

// strict reports a link that drops packets whose way back is by another link. The kernel takes the larger of the link's own value and
// that of all, and 2 is loose (rp_filter in the kernel's ip-sysctl.rst).
func strict(link string) bool {
	own, err := readSysctl("net/ipv4/conf/" + link + "/rp_filter")
	all, err1 := readSysctl("net/ipv4/conf/all/rp_filter")
	return err == nil && err1 == nil && max(own, all) == "1"
}
