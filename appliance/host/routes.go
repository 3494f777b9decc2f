package host

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// policy is one rule of the kernel's routing policy (ip-rule(8)). The netlink library's own type lacks the action and l3mdev.
type policy struct {
	family         int
	priority       uint32
	action         uint8 // FR_ACT_*
	table          int
	src, dst       netip.Prefix // invalid: any
	in, out        string       // links; "": any
	mark, mask     uint32
	uids           *[2]uint32 // first and last
	target         uint32     // of a goto: a priority
	suppressPrefix int        // ignore routes with a prefix of this length or shorter; -1: none
	suppressGroup  int        // ignore routes out of links of this group; -1: none
	invert, l3mdev bool
	special        bool // asks for a TOS, protocol, port or tunnel, of which a flow has none
	protocol       uint8
}

// String writes the rule as `ip rule` does.
func (p policy) String() string {
	var b strings.Builder
	word := func(ok bool, format string, args ...any) {
		if ok {
			fmt.Fprintf(&b, " "+format, args...)
		}
	}
	fmt.Fprintf(&b, "%d:", p.priority)
	word(p.invert, "not")
	word(!p.src.IsValid(), "from all")
	word(p.src.IsValid(), "from %s", shortPrefix(p.src))
	word(p.dst.IsValid(), "to %s", shortPrefix(p.dst))
	word(p.mark != 0 || p.mask != 0, "fwmark %#x", p.mark)
	word(p.mask != 0 && p.mask != 1<<32-1, "mask %#x", p.mask)
	word(p.in != "", "iif %s", p.in)
	word(p.out != "", "oif %s", p.out)
	if p.uids != nil {
		word(true, "uidrange %d-%d", p.uids[0], p.uids[1])
	}
	switch {
	case p.action == nl.FR_ACT_GOTO:
		word(true, "goto %d", p.target)
	case p.action == nl.FR_ACT_NOP:
		word(true, "nop")
	case p.l3mdev:
		word(true, "lookup [l3mdev-table]")
	case p.action == nl.FR_ACT_TO_TBL:
		word(true, "lookup %s", tableName(p.table))
	default:
		word(true, "%s", refusals[p.refusal()])
	}
	word(p.suppressPrefix >= 0, "suppress_prefixlength %d", p.suppressPrefix)
	word(p.suppressGroup >= 0, "suppress_ifgroup %d", p.suppressGroup)
	return b.String()
}

// refusal is the type of route that the rule's action stands for.
func (p policy) refusal() int {
	return map[uint8]int{nl.FR_ACT_BLACKHOLE: unix.RTN_BLACKHOLE, nl.FR_ACT_UNREACHABLE: unix.RTN_UNREACHABLE,
		nl.FR_ACT_PROHIBIT: unix.RTN_PROHIBIT}[p.action]
}

// refusals are the types of route that lead nowhere, by ip-route(8)'s names. A throw only ends the search in its table.
var refusals = map[int]string{
	unix.RTN_BLACKHOLE: "blackhole", unix.RTN_UNREACHABLE: "unreachable", unix.RTN_PROHIBIT: "prohibit", unix.RTN_THROW: "throw",
}

func shortPrefix(p netip.Prefix) string {
	switch {
	case p.IsSingleIP():
		return p.Addr().String()
	case p.Bits() == 0:
		return "default"
	}
	return p.String()
}

func tableName(t int) string {
	switch t {
	case unix.RT_TABLE_MAIN:
		return "main"
	case unix.RT_TABLE_LOCAL:
		return "local"
	case unix.RT_TABLE_DEFAULT:
		return "default"
	}
	return strconv.Itoa(t)
}

// listPolicies lists the rules of both address families, each in the kernel's order. A kernel without policy routing has none.
func listPolicies() ([]policy, error) {
	var found []policy
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		req := nl.NewNetlinkRequest(unix.RTM_GETRULE, unix.NLM_F_DUMP)
		req.AddData(nl.NewIfInfomsg(family))
		messages, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWRULE)
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, m := range messages {
			p, err := parsePolicy(m)
			if err != nil {
				return nil, err
			}
			if p.family == family { // a kernel without the family may answer for all others
				found = append(found, p)
			}
		}
	}
	return found, nil
}

func parsePolicy(m []byte) (policy, error) {
	if len(m) < unix.SizeofRtMsg {
		return policy{}, fmt.Errorf("a routing rule of %d bytes", len(m))
	}
	msg := nl.DeserializeRtMsg(m) // a fib_rule_hdr has the same layout; its action is where a route has its type
	attrs, err := nl.ParseRouteAttr(m[msg.Len():])
	if err != nil {
		return policy{}, fmt.Errorf("a routing rule: %w", err)
	}
	p := policy{family: int(msg.Family), action: msg.Type, table: int(msg.Table), suppressPrefix: -1, suppressGroup: -1,
		invert: msg.Flags&netlink.FibRuleInvert != 0, special: msg.Tos != 0}
	for _, a := range attrs {
		v := a.Value
		number := func() uint32 {
			if len(v) < 4 {
				return 0
			}
			return binary.NativeEndian.Uint32(v)
		}
		text := func() string { return strings.TrimRight(string(v), "\x00") }
		prefix := func(bits uint8) netip.Prefix {
			addr, _ := netip.AddrFromSlice(v)
			return netip.PrefixFrom(addr, int(bits))
		}
		switch a.Attr.Type {
		case nl.FRA_TABLE:
			p.table = int(number())
		case nl.FRA_PRIORITY:
			p.priority = number()
		case nl.FRA_SRC:
			p.src = prefix(msg.Src_len)
		case nl.FRA_DST:
			p.dst = prefix(msg.Dst_len)
		case nl.FRA_IIFNAME:
			p.in = text()
		case nl.FRA_OIFNAME:
			p.out = text()
		case nl.FRA_GOTO:
			p.target = number()
		case nl.FRA_FWMARK:
			p.mark = number()
		case nl.FRA_FWMASK:
			p.mask = number()
		case nl.FRA_SUPPRESS_PREFIXLEN:
			p.suppressPrefix = int(int32(number()))
		case nl.FRA_SUPPRESS_IFGROUP:
			p.suppressGroup = int(int32(number()))
		case nl.FRA_L3MDEV:
			p.l3mdev = len(v) > 0 && v[0] != 0
		case nl.FRA_UID_RANGE:
			if len(v) == 8 {
				p.uids = &[2]uint32{binary.NativeEndian.Uint32(v), binary.NativeEndian.Uint32(v[4:])}
			}
		case nl.FRA_PROTOCOL:
			if len(v) > 0 {
				p.protocol = v[0]
			}
		case nl.FRA_TUN_ID, nl.FRA_IP_PROTO, nl.FRA_SPORT_RANGE, nl.FRA_DPORT_RANGE:
			p.special = true
		}
	}
	return p, nil
}

// defaultPolicies are what a kernel without policy routing does.
func defaultPolicies() []policy {
	var all []policy
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		for i, table := range []int{unix.RT_TABLE_LOCAL, unix.RT_TABLE_MAIN} {
			all = append(all, policy{family: family, action: nl.FR_ACT_TO_TBL, priority: uint32(i), table: table,
				suppressPrefix: -1, suppressGroup: -1})
		}
	}
	return all
}

// flow is what the kernel's route lookup looks at. It has no mark, and neither protocol nor ports.
type flow struct {
	src, dst netip.Addr // src may be invalid: the host's own traffic, before it has an address
	in       string     // the link that it comes in by; lo for the host's own traffic
	uid      uint32     // the sender's, of the host's own traffic; 0 for what is forwarded
}

// path is where the kernel sends a flow: by which rule and route.
type path struct {
	rule  *policy        // nil: no rule decides
	route *netlink.Route // nil: the rule itself refuses, or there is no route
}

// lookup does what the kernel's fib_rules_lookup and its table lookups do (net/core/fib_rules.c, net/ipv4/fib_trie.c). It answers
// for links that do not exist yet; where they do, ask answers.
func (h *have) lookup(f flow) path {
	family := unix.AF_INET
	if f.dst.Is6() {
		family = unix.AF_INET6
	}
	rules := h.policies
	if len(rules) == 0 {
		rules = defaultPolicies()
	}
	skipTo := uint32(0)
	for i := range rules {
		p := &rules[i]
		if p.family != family || p.priority < skipTo || !h.matches(p, f) {
			continue
		}
		switch {
		case p.refusal() != 0:
			return path{rule: p}
		case p.action == nl.FR_ACT_GOTO:
			if slices.ContainsFunc(rules[i:], func(q policy) bool { return q.family == family && q.priority == p.target }) {
				skipTo = p.target
			}
			continue
		case p.action != nl.FR_ACT_TO_TBL:
			continue
		}
		r := h.inTable(h.tableOf(p, f), f.dst)
		if r == nil || r.Type == unix.RTN_THROW || h.suppressed(p, r) {
			continue
		}
		return path{p, r}
	}
	return path{}
}

// matches is fib_rule_match and the families' own part of it.
func (h *have) matches(p *policy, f flow) bool {
	ok := (p.in == "" || p.in == f.in) && p.out == "" && p.mark&p.mask == 0 && !p.special &&
		(!p.l3mdev || h.vrfTable(f.in) != 0) &&
		(p.uids == nil || p.uids[0] <= f.uid && f.uid <= p.uids[1]) &&
		(!p.src.IsValid() || p.src.Contains(f.src)) && (!p.dst.IsValid() || p.dst.Contains(f.dst))
	return ok != p.invert
}

func (h *have) tableOf(p *policy, f flow) int {
	if p.l3mdev {
		return h.vrfTable(f.in)
	}
	return p.table
}

// vrfTable is the table of the VRF that a link is in, or 0.
func (h *have) vrfTable(name string) int {
	l := h.links[name]
	if l == nil {
		return 0
	}
	for _, m := range h.links {
		if vrf, ok := m.(*netlink.Vrf); ok && (m.Attrs().Index == l.Attrs().MasterIndex || m.Attrs().Name == name) {
			return int(vrf.Table)
		}
	}
	return 0
}

// inTable is the route that a table has for an address: of those with the longest prefix the one with the lowest metric.
func (h *have) inTable(table int, dst netip.Addr) *netlink.Route {
	var best *netlink.Route
	for i := range h.routes {
		r := &h.routes[i]
		if tableID := cmp.Or(r.Table, unix.RT_TABLE_MAIN); tableID != table || r.Tos != 0 || r.Flags&unix.RTNH_F_DEAD != 0 {
			continue
		}
		if to := routeDst(r); !to.IsValid() || !to.Contains(dst) {
			continue
		}
		if best == nil || cmp.Or(cmp.Compare(routeDst(r).Bits(), routeDst(best).Bits()), cmp.Compare(best.Priority, r.Priority)) > 0 {
			best = r
		}
	}
	return best
}

func (h *have) suppressed(p *policy, r *netlink.Route) bool {
	if refusals[r.Type] != "" {
		return false // the kernel suppresses only what is no error (fib_rules_lookup)
	}
	if p.suppressPrefix >= 0 && routeDst(r).Bits() <= p.suppressPrefix {
		return true
	}
	l := h.link(r.LinkIndex)
	return p.suppressGroup >= 0 && l != nil && int(l.Attrs().Group) == p.suppressGroup
}

// routeDst is a route's destination; a default route's is 0.0.0.0/0 or ::/0.
func routeDst(r *netlink.Route) netip.Prefix {
	if r.Dst != nil {
		return prefixOf(r.Dst)
	}
	if r.Family == unix.AF_INET6 || r.Gw != nil && r.Gw.To4() == nil {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

func (h *have) link(index int) netlink.Link {
	for _, l := range h.links {
		if l.Attrs().Index == index {
			return l
		}
	}
	return nil
}

func (h *have) linkName(index int) string {
	if l := h.link(index); l != nil {
		return l.Attrs().Name
	}
	return ""
}

// outLinks are the links that a route leads out by: several of a multipath route.
func (h *have) outLinks(r *netlink.Route) []string {
	if r == nil || refusals[r.Type] != "" {
		return nil
	}
	var names []string
	add := func(index int) {
		if name := h.linkName(index); name != "" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	add(r.LinkIndex)
	for _, hop := range r.MultiPath {
		if hop.Flags&unix.RTNH_F_DEAD == 0 {
			add(hop.LinkIndex)
		}
	}
	return names
}

// describe names a route's destination, link and table: "default via 192.0.2.1 dev br0 in table main".
func (h *have) describe(r *netlink.Route) string {
	var b strings.Builder
	if name := refusals[r.Type]; name != "" {
		b.WriteString(name + " ")
	}
	b.WriteString(shortPrefix(routeDst(r)))
	hop := func(gw net.IP, index int) {
		if len(gw) != 0 {
			fmt.Fprintf(&b, " via %s", gw)
		}
		if name := h.linkName(index); name != "" && refusals[r.Type] == "" {
			fmt.Fprintf(&b, " dev %s", name)
		}
	}
	hop(r.Gw, r.LinkIndex)
	for _, n := range r.MultiPath {
		b.WriteString(" nexthop")
		hop(n.Gw, n.LinkIndex)
	}
	fmt.Fprintf(&b, " in table %s", tableName(cmp.Or(r.Table, unix.RT_TABLE_MAIN)))
	return b.String()
}

// why describes a path: its route and, unless it is the usual one, the rule that leads to it.
func (h *have) why(p path) string {
	switch {
	case p.rule == nil:
		return "no route"
	case p.route == nil:
		return "rule " + p.rule.String()
	case p.rule.table == unix.RT_TABLE_MAIN || p.rule.table == unix.RT_TABLE_LOCAL:
		return h.describe(p.route)
	}
	return h.describe(p.route) + ", by rule " + p.rule.String()
}

// ask is the kernel's own lookup of a flow: the link that it leaves by, or the error that the packet would meet (before Linux 6.14 an
// error of its own for rp_filter). index is that of f.in, unless it is lo. It needs no privilege.
func ask(f flow, index int) (out int, err error) { return askBy(&netlink.Handle{}, f, index) }

// askBy asks by sockets that are open already, which is quicker for thousands of flows.
func askBy(h *netlink.Handle, f flow, index int) (out int, err error) {
	o := &netlink.RouteGetOptions{UID: &f.uid}
	if f.in != loopback {
		o.IifIndex = index
		o.SrcAddr = f.src.AsSlice()
	}
	routes, err := h.RouteGetWithOptions(f.dst.AsSlice(), o)
	if err != nil {
		return 0, err
	}
	if len(routes) != 1 {
		return 0, fmt.Errorf("the kernel gave %d routes", len(routes))
	}
	return routes[0].LinkIndex, nil
}

// readRoutes lists the rules, and of every table the routes that matter here: ours, and those that hold a part of a subnet of ours or stand
// for the internet. A router may have a million others.
func readRoutes(p *plan.Plan) ([]policy, []netlink.Route, error) {
	policies, err := whole(listPolicies)
	if err != nil {
		return nil, nil, fmt.Errorf("list routing rules: %w", err)
	}
	subnets := []netip.Prefix{p.Network.Subnet}
	if p.Network.Subnet6 != nil {
		subnets = append(subnets, *p.Network.Subnet6)
	}
	routes, err := whole(func() ([]netlink.Route, error) {
		var found []netlink.Route
		every := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
		err := netlink.RouteListFilteredIter(unix.AF_UNSPEC, every, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
			dst := routeDst(&r)
			if r.Protocol == routeProtocol || slices.ContainsFunc(subnets, dst.Overlaps) || slices.ContainsFunc(internet4, dst.Contains) ||
				slices.ContainsFunc(internet6, dst.Contains) {
				found = append(found, r)
			}
			return true
		})
		return found, err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("list routes: %w", err)
	}
	return policies, routes, nil
}

// rulePriority is the number of our rule among the host's (`ip rule`), and rules with a lower one come before it. A VPN's come after:
// strongSwan's 220, tailscale's 5210 to 5270, wg-quick's below 32766, and a VRF's 1000.
const rulePriority = 70

// isOurs reports a rule that NetworkUp made.
func (p policy) isOurs() bool { return p.protocol == routeProtocol && p.priority == rulePriority }

// same reports a rule that does the same at the same place.
func (p policy) same(q policy) bool {
	return p.isOurs() == q.isOurs() && p.family == q.family && p.String() == q.String()
}

// wantRules are the rules that let a worker's own route, a single address in table main, win over whatever else a rule leads to: a VPN
// takes all addresses that its table has a default route for, now or when it comes up. Routes to more than one address are as if the
// rule were not there (suppress_prefixlength), so it changes nothing for anybody else.
func (n *network) wantRules() []policy {
	subnets := []netip.Prefix{n.plan.Network.Subnet}
	if n.plan.Network.Subnet6 != nil {
		subnets = append(subnets, *n.plan.Network.Subnet6)
	}
	var rules []policy
	for _, s := range subnets {
		family := unix.AF_INET
		if s.Addr().Is6() {
			family = unix.AF_INET6
		}
		rules = append(rules, policy{family: family, priority: rulePriority, action: nl.FR_ACT_TO_TBL, table: unix.RT_TABLE_MAIN, dst: s,
			suppressPrefix: s.Addr().BitLen() - 1, suppressGroup: -1, protocol: routeProtocol})
	}
	return rules
}

// kernelRule is the rule in the library's terms, to add or delete it.
func (p policy) kernelRule() *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Priority, r.Table, r.Protocol = p.family, int(p.priority), p.table, p.protocol
	r.Dst = &net.IPNet{IP: p.dst.Addr().AsSlice(), Mask: net.CIDRMask(p.dst.Bits(), p.dst.Addr().BitLen())}
	r.SuppressPrefixlen = p.suppressPrefix
	return r
}
