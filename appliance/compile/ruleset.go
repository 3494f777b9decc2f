package compile

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/netrange"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// tableName names both tables: `inet fleetingd` filters IP, `arp fleetingd` ARP.
const tableName = "fleetingd"

// The hooks' priorities (netfilter_ipv4.h). Raw comes before connection tracking, so that forged packets leave
// no entry there.
const (
	priorityRaw     = -300
	priorityFilter  = 0
	prioritySrcNAT  = 100
	setTAPs         = "taps"
	setWorkers      = "workers"
	setWorkers6     = "workers6"
	setPrivate      = "private"
	setPrivate6     = "private6"
	setResolvers    = "resolvers"
	setResolvers6   = "resolvers6"
	setICMPErrors   = "icmp_errors"
	setICMPv6Errors = "icmpv6_errors"
	chainFromWorker = "from_worker"
	chainToHost     = "to_host"
)

// Ruleset returns the firewall of a host. It only concerns packets from and to the slots' TAPs. Another table may still drop a
// packet that it accepts: nftables asks every table.
//
// ARP senders are checked in a table of the arp family. A netdev chain on the TAPs would see the same frames a little earlier,
// but it is bound to devices, which must exist before the rules do, and a chain takes at most 256 of
// them (the kernel's NFT_NETDEVICE_MAX), so chains and rules would grow with the number of slots.
//
// limits are the distinct connection limits of the slots, sorted.
func Ruleset(egressInterface string, n plan.Network, limits ...int) plan.Ruleset {
	r := builder{egress: egressInterface, net: n, limits: limits, six: n.Subnet6 != nil}
	return plan.Ruleset{Tables: []plan.Table{r.inet(), r.arp()}}
}

// builder makes the tables of one network.
type builder struct {
	egress string
	net    plan.Network
	limits []int // on connections
	six    bool  // the workers have IPv6
}

func (r *builder) inet() plan.Table {
	forward, toHost, sets := r.egressRules()
	return plan.Table{
		Family: "inet", Name: tableName,
		Sets: slices.Concat(r.sets(), r.counts(), sets),
		Chains: []plan.Chain{
			{Name: chainFromWorker, Rules: r.fromWorker(forward)},
			{Name: chainToHost, Rules: r.toHost(toHost)},
			{Name: "prerouting", Type: "filter", Hook: "prerouting", Priority: priorityRaw, Rules: r.senders()},
			{Name: "input", Type: "filter", Hook: "input", Priority: priorityFilter, Rules: append(r.replies(),
				rule("from a worker to the host itself", jump(chainToHost), in(plan.IIFName, setTAPs)))},
			{Name: "forward", Type: "filter", Hook: "forward", Priority: priorityFilter, Rules: append(r.replies(),
				rule("from a worker to elsewhere", jump(chainFromWorker), in(plan.IIFName, setTAPs)),
				counted("from elsewhere to a worker: only answers", plan.Drop, in(plan.OIFName, setTAPs)))},
			{Name: "postrouting", Type: "nat", Hook: "postrouting", Priority: prioritySrcNAT, Rules: []plan.Rule{
				rule("workers leave with the host's address", verdict(plan.Masquerade), in(plan.IIFName, setTAPs)),
			}},
		},
	}
}

// sets returns the sets that every host has; the egress blocks add their own.
func (r *builder) sets() []plan.Set {
	sets := []plan.Set{
		{Name: setTAPs, Key: []plan.DataType{plan.TypeIFName}, Slots: true},
		{Name: setWorkers, Key: []plan.DataType{plan.TypeIFName, plan.TypeIPv4}, Slots: true},
		{Name: setPrivate, Key: []plan.DataType{plan.TypeIPv4}, Interval: true, Elements: texts(netrange.Private4)},
		// Unreachable, time exceeded, parameter problem. Not redirect, which connection tracking calls related, too.
		{Name: setICMPErrors, Key: []plan.DataType{plan.TypeICMP}, Elements: []string{"3", "11", "12"}},
	}
	if res := r.resolvers(netip.Addr.Is4); len(res) > 0 {
		sets = append(sets, plan.Set{Name: setResolvers, Key: []plan.DataType{plan.TypeIPv4}, Elements: res})
	}
	if !r.six {
		return sets
	}
	sets = append(sets,
		plan.Set{Name: setWorkers6, Key: []plan.DataType{plan.TypeIFName, plan.TypeIPv6}, Slots: true},
		plan.Set{Name: setPrivate6, Key: []plan.DataType{plan.TypeIPv6}, Interval: true, Elements: texts(netrange.Private6)},
		// Unreachable, packet too big (path MTU), time exceeded, parameter problem.
		plan.Set{Name: setICMPv6Errors, Key: []plan.DataType{plan.TypeICMPv6}, Elements: []string{"1", "2", "3", "4"}})
	if res := r.resolvers(netip.Addr.Is6); len(res) > 0 {
		sets = append(sets, plan.Set{Name: setResolvers6, Key: []plan.DataType{plan.TypeIPv6}, Elements: res})
	}
	return sets
}

func texts(prefixes []netip.Prefix) []string {
	all := make([]string, len(prefixes))
	for i, p := range prefixes {
		all[i] = p.String()
	}
	return all
}

// resolvers returns the DNS servers of one family whose addresses are closed to workers by default.
func (r *builder) resolvers(family func(netip.Addr) bool) []string {
	var found []string
	for _, a := range r.net.DNS {
		if !family(a) {
			continue
		}
		own := r.net.Subnet.Contains(a) || r.six && r.net.Subnet6.Contains(a) // the host's own resolver, on the gateway's address
		if (own || netrange.Private(a)) && !slices.Contains(found, a.String()) {
			found = append(found, a.String())
		}
	}
	return found
}

// senders drops packets without the slot's own addresses. A correct packet costs one set look-up, and a packet from
// another interface only the comparison of that interface's kind.
func (r *builder) senders() []plan.Rule {
	tun := is(plan.IIFKind, "tun")
	mac := is(plan.EtherSource, r.net.GuestMAC)
	rules := []plan.Rule{
		rule("fleetingd: a worker's own MAC and IPv4", verdict(plan.Accept), tun, slot(plan.IPSource, setWorkers), mac),
	}
	if r.six {
		rules = append(rules,
			rule("a worker's own MAC and IPv6", verdict(plan.Accept), tun, slot(plan.IP6Source, setWorkers6), mac),
			rule("neighbour discovery from its link-local address", verdict(plan.Accept),
				tun, in(plan.IIFName, setTAPs), is(plan.IP6Source, linkLocal(r.net.GuestMAC)), neighbours, mac))
	}
	return append(rules,
		counted("a worker with an address that is not its own", plan.Drop, tun, in(plan.IIFName, setTAPs)))
}

// neighbours matches neighbour solicitations and advertisements (RFC 4861).
var neighbours = is(plan.ICMPv6Kind, "135-136")

// linkLocal returns the address that a kernel derives from its MAC (RFC 4291, appendix A).
func linkLocal(mac string) string {
	m, err := net.ParseMAC(mac)
	if err != nil || len(m) != 6 {
		return "fe80::" // not reached with a checked plan; and no guest has this address
	}
	return netip.AddrFrom16([16]byte{
		0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5],
	}).String()
}

// replies come first in their chains: most packets on the host are replies, and these rules need no look-up.
// Only ICMP errors are accepted as related: otherwise a helper on the host (FTP, SIP) could open a way in.
func (r *builder) replies() []plan.Rule {
	related := is(plan.CTState, "related")
	rules := []plan.Rule{
		rule("judged when the connection began", verdict(plan.Accept), is(plan.CTState, "established")),
		rule("path MTU and other errors", verdict(plan.Accept), related, in(plan.ICMPKind, setICMPErrors)),
	}
	if r.six {
		rules = append(rules,
			rule("path MTU and other errors", verdict(plan.Accept), related, in(plan.ICMPv6Kind, setICMPv6Errors)))
	}
	return rules
}

// counts returns the sets that count each worker's connections and, if pools have different limits, the sets of their TAPs.
func (r *builder) counts() []plan.Set {
	var sets []plan.Set
	for _, limit := range r.limits {
		if len(r.limits) > 1 {
			sets = append(sets, plan.Set{Name: limitedSet(limit), Key: []plan.DataType{plan.TypeIFName}, Slots: true, Connections: limit})
		}
		sets = append(sets, plan.Set{Name: countSet(limit), Key: []plan.DataType{plan.TypeIFName}, Dynamic: true})
	}
	return sets
}

func limitedSet(limit int) string { return "limited_" + strconv.Itoa(limit) }
func countSet(limit int) string   { return "connections_" + strconv.Itoa(limit) }

// tooMany rejects a worker's connections beyond its limit: workers share the host's connection table, so a job that fills it
// would cut off all others. The number of rules grows with the number of distinct limits.
func (r *builder) tooMany() []plan.Rule {
	var rules []plan.Rule
	for _, limit := range r.limits {
		over := plan.Match{Fields: []plan.Field{plan.IIFName}, Set: countSet(limit), Over: limit}
		matches := []plan.Match{over}
		if len(r.limits) > 1 {
			matches = []plan.Match{in(plan.IIFName, limitedSet(limit)), over}
		}
		rules = append(rules, counted("more connections than its pool allows", plan.Reject, matches...))
	}
	return rules
}

// fromWorker handles a connection that a worker opens through the host.
func (r *builder) fromWorker(egress []plan.Rule) []plan.Rule {
	rules := []plan.Rule{
		counted("not part of a connection", plan.Drop, is(plan.CTState, "invalid")),
	}
	rules = append(append(rules, r.tooMany()...), counted("another worker", plan.Reject, is(plan.IPDest, r.net.Subnet.String())))
	if r.six {
		rules = append(rules, counted("another worker", plan.Reject, is(plan.IP6Dest, r.net.Subnet6.String())))
	}
	rules = append(append(rules, egress...), r.dns()...)
	rules = append(rules, counted("private, link-local, metadata, multicast", plan.Reject, in(plan.IPDest, setPrivate)))
	if r.six {
		rules = append(rules, counted("all but global unicast", plan.Reject, in(plan.IP6Dest, setPrivate6)))
	}
	return append(rules,
		counted("through another interface", plan.Reject, isNot(plan.OIFName, r.egress)),
		rule("the internet", verdict(plan.Accept)))
}

// toHost handles a connection that a worker opens to the host itself.
func (r *builder) toHost(egress []plan.Rule) []plan.Rule {
	var rules []plan.Rule
	if r.six {
		rules = append(rules, rule("neighbour discovery", verdict(plan.Accept), neighbours))
	}
	rules = append(append(append(rules, r.tooMany()...), egress...), r.dns()...)
	return append(rules, counted("the host itself", plan.Reject))
}

// dns opens the spec's resolvers to workers if they are at private addresses.
func (r *builder) dns() []plan.Rule {
	var rules []plan.Rule
	add := func(dest plan.Field, set string) {
		for _, port := range []plan.Field{plan.UDPDest, plan.TCPDest} {
			rules = append(rules, rule("the resolvers of the spec", verdict(plan.Accept), in(dest, set), is(port, "53")))
		}
	}
	if len(r.resolvers(netip.Addr.Is4)) > 0 {
		add(plan.IPDest, setResolvers)
	}
	if r.six && len(r.resolvers(netip.Addr.Is6)) > 0 {
		add(plan.IP6Dest, setResolvers6)
	}
	return rules
}

// egressRules returns the egress blocks in order, as rules for forwarded packets and for packets to the host itself, and
// the sets that both use. A block without a destination (or with a /0) means public addresses: an "allow https"
// does not open the LAN or the metadata service. The host itself is opened only by its exact address (a /32 or /128):
// allowing a LAN does not open the host's own address in it.
func (r *builder) egressRules() (forward, toHost []plan.Rule, sets []plan.Set) {
	for i, e := range r.net.Egress {
		b := block{builder: r, Egress: e, prefix: "egress" + strconv.Itoa(i)}
		forward = append(forward, b.rules(false)...)
		toHost = append(toHost, b.rules(true)...)
		sets = append(sets, b.sets...)
	}
	slices.SortFunc(sets, func(a, b plan.Set) int { return cmp.Compare(a.Name, b.Name) })
	return forward, toHost, slices.CompactFunc(sets, func(a, b plan.Set) bool { return a.Name == b.Name })
}

// block is one egress block while its rules are built.
type block struct {
	*builder
	plan.Egress
	prefix string // of its sets' names
	sets   []plan.Set
}

// rules returns the block's rules: one for each family and protocol that it names.
func (b *block) rules(toHost bool) []plan.Rule {
	var rules []plan.Rule
	for _, dest := range b.destinations(toHost) {
		for _, port := range b.ports() {
			rules = append(rules, b.rule(slices.Concat(dest, port)))
		}
	}
	return rules
}

func (b *block) rule(matches []plan.Match) plan.Rule {
	comment := "egress " + b.Name
	if b.Action == "allow" {
		return rule(comment, verdict(plan.Accept), matches...)
	}
	return counted(comment, plan.Reject, matches...)
}

// destinations returns the alternatives that the block's `to` stands for, each as the matches that it takes.
func (b *block) destinations(toHost bool) [][]plan.Match {
	if len(b.To) == 0 && b.Action == "deny" {
		return [][]plan.Match{nil}
	}
	dests := b.family(toHost, netip.Addr.Is4, plan.IPDest, plan.TypeIPv4, setPrivate, "")
	if b.six {
		dests = append(dests, b.family(toHost, netip.Addr.Is6, plan.IP6Dest, plan.TypeIPv6, setPrivate6, "6")...)
	}
	return dests
}

// family returns the destinations of one address family.
func (b *block) family(toHost bool, of func(netip.Addr) bool, dest plan.Field, t plan.DataType, private, suffix string) [][]plan.Match {
	allow := b.Action == "allow"
	var to []netip.Prefix
	for _, p := range b.To {
		if of(p.Addr()) && (!toHost || !allow || p.IsSingleIP()) {
			to = append(to, p)
		}
	}
	anywhere := len(b.To) == 0 || slices.ContainsFunc(to, func(p netip.Prefix) bool { return p.Bits() == 0 })
	switch {
	case anywhere && allow && toHost, !anywhere && len(to) == 0:
		return nil
	case anywhere && allow:
		return [][]plan.Match{{is(plan.OIFName, b.egress), notIn(dest, private)}}
	case toHost:
		return [][]plan.Match{{b.oneOf(dest, t, "_host"+suffix, prefixes(to))}}
	default:
		return [][]plan.Match{{b.oneOf(dest, t, "_to"+suffix, prefixes(to))}}
	}
}

// ports returns the alternatives that the block's `ports` stands for.
func (b *block) ports() [][]plan.Match {
	if len(b.Ports) == 0 {
		return [][]plan.Match{nil}
	}
	var alternatives [][]plan.Match
	for _, p := range []struct {
		name  string
		field plan.Field
	}{{"tcp", plan.TCPDest}, {"udp", plan.UDPDest}} {
		if r := ranges(b.Ports, p.name); len(r) > 0 {
			alternatives = append(alternatives, []plan.Match{b.oneOf(p.field, plan.TypePort, "_"+p.name, r)})
		}
	}
	return alternatives
}

// oneOf matches any of the values: with a literal for one, and with a set for several or for "all addresses", which has no literal in nft.
func (b *block) oneOf(f plan.Field, t plan.DataType, suffix string, values []string) plan.Match {
	if len(values) == 1 && !strings.HasSuffix(values[0], "/0") {
		return is(f, values[0])
	}
	name := b.prefix + suffix
	b.sets = append(b.sets, plan.Set{Name: name, Key: []plan.DataType{t}, Interval: true, Elements: values})
	return in(f, name)
}

// prefixes returns the networks sorted, as nft prints them, without those inside another: an interval set refuses overlaps.
func prefixes(nets []netip.Prefix) []string {
	sorted := slices.Clone(nets)
	slices.SortFunc(sorted, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	var out []string
	var last netip.Prefix
	for _, p := range sorted {
		if last.IsValid() && last.Contains(p.Addr()) {
			continue
		}
		last = p
		if p.IsSingleIP() {
			out = append(out, p.Addr().String())
		} else {
			out = append(out, p.String())
		}
	}
	return out
}

// ranges returns the ports of a protocol sorted; ranges that overlap or touch are merged.
func ranges(ports []plan.PortRange, protocol string) []string {
	var own []plan.PortRange
	for _, p := range ports {
		if p.Protocol == protocol {
			own = append(own, p)
		}
	}
	slices.SortFunc(own, func(a, b plan.PortRange) int { return cmp.Compare(a.First, b.First) })
	var merged []plan.PortRange
	for _, p := range own {
		if n := len(merged); n > 0 && int(p.First) <= int(merged[n-1].Last)+1 {
			merged[n-1].Last = max(merged[n-1].Last, p.Last)
			continue
		}
		merged = append(merged, p)
	}
	out := make([]string, len(merged))
	for i, p := range merged {
		if out[i] = strconv.Itoa(int(p.First)); p.First != p.Last {
			out[i] = fmt.Sprintf("%d-%d", p.First, p.Last)
		}
	}
	return out
}

// arp lets a worker ask for the gateway's MAC with its own addresses, and nothing else: it cannot send forged
// answers or ask for the host's other addresses.
func (r *builder) arp() plan.Table {
	return plan.Table{
		Family: "arp", Name: tableName,
		Sets: []plan.Set{
			{Name: setTAPs, Key: []plan.DataType{plan.TypeIFName}, Slots: true},
			{Name: setWorkers, Key: []plan.DataType{plan.TypeIFName, plan.TypeIPv4}, Slots: true},
		},
		Chains: []plan.Chain{{Name: "input", Type: "filter", Hook: "input", Priority: priorityFilter, Rules: []plan.Rule{
			counted("fleetingd: workers may ask, not answer", plan.Drop,
				in(plan.IIFName, setTAPs), isNot(plan.ARPOperation, "request")),
			rule("a worker asks for the gateway", verdict(plan.Accept),
				slot(plan.ARPSourceIP, setWorkers), is(plan.ARPSourceMAC, r.net.GuestMAC), is(plan.ARPTargetIP, r.net.Gateway.String())),
			counted("any other ARP from a worker", plan.Drop, in(plan.IIFName, setTAPs)),
		}}},
	}
}

// rule makes a rule. No two of its matches may compare adjacent bytes for equality: nft merges such matches, so the rule
// loaded from text would differ from the one sent over netlink.
func rule(comment string, v plan.Verdict, m ...plan.Match) plan.Rule {
	return plan.Rule{Comment: plan.Comment(comment), Matches: m, Verdict: v}
}

// counted returns a rule with a counter, which tells an operator what was refused.
func counted(comment string, a plan.Action, m ...plan.Match) plan.Rule {
	return plan.Rule{Comment: plan.Comment(comment), Matches: m, Counter: true, Verdict: verdict(a)}
}

func verdict(a plan.Action) plan.Verdict { return plan.Verdict{Action: a} }
func jump(chain string) plan.Verdict     { return plan.Verdict{Action: plan.Goto, Chain: chain} }

func is(f plan.Field, value string) plan.Match {
	return plan.Match{Fields: []plan.Field{f}, Value: value}
}

func isNot(f plan.Field, value string) plan.Match {
	return plan.Match{Fields: []plan.Field{f}, Not: true, Value: value}
}

func in(f plan.Field, set string) plan.Match {
	return plan.Match{Fields: []plan.Field{f}, Set: set}
}

func notIn(f plan.Field, set string) plan.Match {
	return plan.Match{Fields: []plan.Field{f}, Not: true, Set: set}
}

// slot matches the pair of TAP and address.
func slot(f plan.Field, set string) plan.Match {
	return plan.Match{Fields: []plan.Field{plan.IIFName, f}, Set: set}
}
