package host

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// lookup answers as the kernel does, whatever the rules and routes are.
func TestLookupIsTheKernels(t *testing.T) {
	l := newLab(t)
	p := l.plan(1, true)
	l.up(p)
	l.sh(l.host, "echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter; for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done")
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	pick := func(of ...string) string { return of[random.IntN(len(of))] }
	seen := map[string]int{}
	for _, family := range []string{"-4", "-6"} {
		dsts := []string{"default", "0.0.0.0/1", "128.0.0.0/1", "1.1.1.0/24", "172.16.0.0/12", "172.16.120.0/24", "172.16.120.2"}
		vias := []string{"via 198.51.100.1 dev eno1", "via 10.20.0.15 dev lan0", "dev br0", "nexthop via 198.51.100.1 nexthop via 10.20.0.15"}
		nets := []string{"all", "172.16.120.2", "172.16.0.0/12", "1.0.0.0/8"}
		to, from, me := internet4[0].String(), "172.16.120.2", "172.16.120.2"
		if family == "-6" {
			dsts = []string{"default", "2000::/4", "3000::/4", "2606::/16", "fd00::/8", "fd7e:1ee7::/64", "fd7e:1ee7::2"}
			vias = []string{"via 2001:db8:1::1 dev eno1", "dev lan0", "dev br0"}
			nets = []string{"all", "fd7e:1ee7::2", "fd00::/8", "2606::/16"}
			to, from, me = internet6[0].String(), "fd7e:1ee7::2", "fd7e:1ee7::2"
		}
		for range 60 {
			var script strings.Builder
			for range random.IntN(8) {
				if random.IntN(3) == 0 {
					fmt.Fprintf(&script, "ip %s route add %s %s table %s metric %d proto 99 2>/dev/null || true\n", family,
						pick("blackhole", "unreachable", "prohibit", "throw"), dsts[random.IntN(len(dsts))], pick("main", "7", "8"), random.IntN(3)*100)
					continue
				}
				fmt.Fprintf(&script, "ip %s route add %s %s table %s metric %d proto 99 2>/dev/null || true\n", family, dsts[random.IntN(len(dsts))],
					vias[random.IntN(len(vias))], pick("main", "7", "8"), random.IntN(3)*100)
			}
			for range random.IntN(6) {
				fmt.Fprintf(&script, "ip %s rule add %s priority %s from %s to %s %s %s %s protocol 99 2>/dev/null || true\n", family, pick("", "not"),
					pick("50", "60", "100", "110", "120"), nets[random.IntN(len(nets))], nets[random.IntN(len(nets))],
					pick("", "", "iif fleet0", "iif eno1", "iif lo", "fwmark 1", "fwmark 0/0x10", "uidrange 0-10", "uidrange 5-10", "ipproto tcp"),
					pick("lookup 7", "lookup 8", "lookup main", "lookup 9", "goto 110", "goto 300", "nop", "blackhole", "prohibit"),
					pick("", "", "suppress_prefixlength 0", "suppress_prefixlength 12"))
			}
			done := l.sh(l.host, script.String()+"true")
			l.compareLookups(p, seen, done, script.String(), []flow{
				{src: netip.MustParseAddr(from), dst: netip.MustParseAddr(to), in: "fleet0"},
				{dst: netip.MustParseAddr(me), in: loopback, uid: 7},
				{dst: netip.MustParseAddr(to), in: loopback},
				{src: netip.MustParseAddr(to), dst: netip.MustParseAddr(me), in: "eno1"},
			})
			l.sh(l.host, fmt.Sprintf("ip %[1]s route flush table all proto 99; ip %[1]s rule flush protocol 99", family))
		}
	}
	t.Log(seen)
	for _, way := range []string{"eno1", "lan0", "br0", "fleet0", ""} {
		if seen[way] < 5 {
			t.Errorf("%d packets of %v left by %q: the test says little", seen[way], seen, way)
		}
	}
}

func (l *lab) compareLookups(p *plan.Plan, seen map[string]int, done, script string, flows []flow) {
	l.Helper()
	err := l.in(l.host, func() error {
		h, err := linksAndRoutes(p)
		if err != nil {
			return err
		}
		for _, f := range flows {
			index := 0
			if link := h.links[f.in]; link != nil {
				index = link.Attrs().Index
			}
			out, err := ask(f, index)
			if !refused(err) {
				return err
			}
			seen[h.linkName(out)]++
			got := h.lookup(f)
			links := h.outLinks(got.route)
			if err != nil && len(links) > 0 || err == nil && !slices.Contains(links, h.linkName(out)) {
				l.Errorf("%+v leaves by %q (%v) and lookup says %q: %s\n%s%s%s", f, h.linkName(out), err, links, h.why(got), script, done,
					l.sh(l.host, "ip rule; ip route show table all | grep -v 'table local'; ip -6 rule; ip -6 route show table all"))
			}
		}
		return nil
	})
	if err != nil {
		l.Fatalf("%v\n%s", err, script)
	}
}

// topologies are hosts that work, and hosts that do not, with what each look at them has to say.
var topologies = []struct {
	name   string
	stage  string // on the host of a lab, before up
	change func(*plan.Plan)
	later  bool     // stage only once the network is up
	doctor string   // the status of egress-interface (IPv4)
	says   []string // parts of its detail and cure
	six    string   // the status of egress-ipv6; "" is ok
	says6  []string // parts of its detail and cure
	refuse []string // parts of what up refuses with
	lost   []string // parts of the trouble of a worker that is not reached
	warns  []string // parts of the other troubles
}{
	{name: "plain", doctor: "ok", says: []string{"leave by eno1: default via 198.51.100.1 dev eno1 in table main"}},
	{name: "port of a bridge", stage: `
		ip link add br1 type bridge; ip addr flush dev eno1 scope global; ip link set eno1 master br1; ip link set br1 up
		ip addr add 198.51.100.2/24 dev br1; ip route add default via 198.51.100.1`,
		doctor: "fail", says: []string{"leave by br1, not by eno1", "default via 198.51.100.1 dev br1 in table main", "eno1 is a port of the bridge br1",
			`egress_interface = "br1"`}, warns: []string{"link eno1", "br1", "table main"}},
	{name: "below a macvlan", stage: `
		ip addr flush dev eno1 scope global; ip link add mv0 link eno1 type macvlan; ip link set mv0 up
		ip addr add 198.51.100.2/24 dev mv0; ip route add default via 198.51.100.1`,
		doctor: "fail", says: []string{"leave by mv0, not by eno1", "mv0 is a macvlan on eno1", `egress_interface = "mv0"`}, warns: []string{"mv0"}},
	{name: "bridge over a macvlan", stage: `
		ip addr flush dev eno1 scope global; ip link add mv0 link eno1 type macvlan; ip link add br1 type bridge; ip link set mv0 up; ip link set br1 up
		ip link set mv0 master br1; ip addr add 198.51.100.2/24 dev br1; ip route add default via 198.51.100.1`,
		doctor: "fail", says: []string{"mv0 is a macvlan on eno1, mv0 is a port of the bridge br1", `egress_interface = "br1"`}, warns: []string{"br1"}},
	{name: "several default routes", stage: "ip route add default via 10.20.0.15 metric 50; ip route change default via 198.51.100.1 metric 10 || ip route add default via 198.51.100.1 metric 10",
		doctor: "ok"},
	{name: "a better default route elsewhere", stage: "ip route del default; ip route add default via 198.51.100.1 metric 100; ip route add default via 10.20.0.15 metric 50",
		doctor: "fail", says: []string{"leave by lan0", "default via 10.20.0.15 dev lan0 in table main"}, warns: []string{"lan0"}},
	{name: "multipath", stage: "ip route replace default nexthop via 198.51.100.1 nexthop via 10.20.0.15",
		doctor: "warn", says: []string{"some of the workers' IPv4 packets leave by lan0", "nexthop via 198.51.100.1 dev eno1 nexthop via 10.20.0.15 dev lan0 in table main"}},
	{name: "OpenVPN", stage: "ip tuntap add tun0 mode tun; ip link set tun0 up; ip addr add 10.8.0.2/24 dev tun0; ip route add 0.0.0.0/1 via 10.8.0.1; ip route add 128.0.0.0/1 via 10.8.0.1",
		doctor: "fail", says: []string{"leave by tun0", "0.0.0.0/1 via 10.8.0.1 dev tun0 in table main; 128.0.0.0/1 via 10.8.0.1 dev tun0 in table main"}, warns: []string{"tun0"}},
	{name: "wg-quick", stage: wgQuick, doctor: "fail",
		says: []string{"leave by wg0", "default dev wg0 in table 51820, by rule 32765: not from all fwmark 0xca6c lookup 51820", `egress_interface = "wg0"`,
			"ip rule add priority 71 from 172.16.120.0/24 lookup main"}, warns: []string{"wg0", "table 51820"}},
	{name: "wg-quick, later", stage: wgQuick, later: true, doctor: "fail", says: []string{"wg0"}, warns: []string{"wg0", "table 51820"}},
	{name: "wg-quick, and the workers kept out", stage: wgQuick + "; ip rule add priority 71 from 172.16.120.0/24 lookup main", doctor: "ok"},
	{name: "tailscale", stage: `
		ip tuntap add tailscale0 mode tun; ip link set tailscale0 up; ip addr add 100.100.1.1/32 dev tailscale0
		ip route add 100.64.0.0/10 dev tailscale0 table 52; ip route add 10.0.0.0/8 dev tailscale0 table 52
		ip rule add priority 5210 fwmark 0x80000/0xff0000 lookup main; ip rule add priority 5230 fwmark 0x80000/0xff0000 lookup default
		ip rule add priority 5250 fwmark 0x80000/0xff0000 unreachable; ip rule add priority 5270 lookup 52`, doctor: "ok"},
	{name: "tailscale's exit node, later", later: true, stage: `
		ip tuntap add tailscale0 mode tun; ip link set tailscale0 up; ip addr add 100.100.1.1/32 dev tailscale0
		ip route add default dev tailscale0 table 52; ip route add throw 127.0.0.0/8 table 52; ip rule add priority 5270 lookup 52`,
		doctor: "fail", says: []string{"tailscale0", "table 52", "rule 5270"}, warns: []string{"tailscale0", "table 52"}},
	{name: "strongSwan", later: true, stage: "ip rule add priority 220 lookup 220; ip route add 172.16.0.0/12 via 10.20.0.15 table 220; ip route add blackhole 10.0.0.0/8", doctor: "ok"},
	{name: "refusals around the subnet", stage: `
		ip route add blackhole 10.0.0.0/8; ip route add unreachable 172.16.0.0/12; ip route add prohibit 192.168.0.0/16; ip route add throw 172.16.120.0/22
		ip -6 route add unreachable fd00::/8; ip route add blackhole 172.16.120.0/24 metric 5`, doctor: "ok"},
	{name: "a refusal in the subnet", stage: "ip route add blackhole 172.16.120.64/26; ip route add unreachable default metric 4278198272", doctor: "ok"},
	{name: "a refusal of a worker", stage: "ip route add blackhole 172.16.120.3", doctor: "ok",
		refuse: []string{"network.subnet 172.16.120.0/24 overlaps route blackhole 172.16.120.3 in table main"}},
	{name: "a wide device route of a VPN", stage: "ip link add wg0 type veth peer name wg1; ip link set wg0 up; ip addr add 10.9.0.2/32 dev wg0; ip route add 172.16.0.0/12 dev wg0", doctor: "ok"},
	{name: "a wide network of a point-to-point link", stage: "ip tuntap add tun0 mode tun; ip link set tun0 up; ip addr add 172.16.0.1/12 dev tun0", doctor: "ok"},
	{name: "a VPN to the subnet itself", stage: "ip tuntap add wg0 mode tun; ip link set wg0 up; ip route add 172.16.120.0/24 dev wg0 table 51820; ip rule add lookup 51820", doctor: "ok",
		refuse: []string{"overlaps route 172.16.120.0/24 on wg0 in table 51820; choose another subnet"}},
	{name: "a table that no rule names", stage: "ip route add 172.16.120.0/25 via 10.20.0.15 table 99", doctor: "ok"},
	{name: "the host's own address", stage: "ip addr add 172.16.120.3/32 dev lan0", doctor: "ok", refuse: []string{"overlaps route 172.16.120.3 on lan0 in table local"}},
	{name: "the host's own address, of no worker", stage: "ip addr add 172.16.120.77/32 dev lan0", doctor: "ok"},
	{name: "all of the subnet is local", stage: "ip route add local 172.16.0.0/12 dev lo", doctor: "ok", refuse: []string{"overlaps route 172.16.0.0/12 on lo in table local"}},
	{name: "a LAN around the subnet", stage: "ip addr add 172.16.0.9/16 dev lan0", doctor: "ok", refuse: []string{"overlaps route 172.16.0.0/16 on lan0 in table main"}},
	{name: "a rule before ours", later: true, stage: "ip rule add priority 5 lookup 99; ip route add default via 10.20.0.15 table 99", doctor: "fail", says: []string{"lan0", "table 99", "rule 5"},
		lost: []string{"TAP fleet0 is not reached", "172.16.120.2", "but to lan0", "default via 10.20.0.15 dev lan0 in table 99, by rule 5: from all lookup 99", "2 other TAPs"}, warns: []string{"lan0"}},
	{name: "our rule is gone", later: true, stage: "ip rule del priority 70; ip route add default via 10.20.0.15 table 99; ip rule add priority 100 lookup 99",
		doctor: "fail", says: []string{"lan0"}, lost: []string{"fleet0", "but to lan0", "table 99", "network up"}, warns: []string{"lan0"}},
	{name: "our rule is gone, and wg-quick spares main", later: true, stage: wgQuick + "; ip rule del priority 70", doctor: "fail", says: []string{"wg0"},
		warns: []string{"wg0"}},
	{name: "a worker's address is taken later", later: true, stage: "ip addr add 172.16.120.2/32 dev lan0", doctor: "ok", lost: []string{"fleet0", "172.16.120.2", "lan0", "table local"}},
	{name: "strict rp_filter on a host with two ways out", later: true, doctor: "ok", stage: `
		ip route replace default via 10.20.0.15; ip route add default via 198.51.100.1 table 5; for i in 0 1 2; do ip rule add iif fleet$i lookup 5; done
		for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 1 > $f; done`},
	{name: "answers go another way", later: true, doctor: "ok",
		stage: "ip route add default via 10.20.0.15 table 99; ip rule add priority 5 iif eno1 lookup 99",
		warns: []string{"link eno1 does not forward the internet's answers to fleet0", "default via 10.20.0.15 dev lan0 in table 99, by rule 5: from all iif eno1 lookup 99"}},
	{name: "answers go another way, and rp_filter is strict", later: true, doctor: "ok",
		stage: "ip route add default via 10.20.0.15 table 99; ip rule add priority 5 iif eno1 lookup 99; echo 1 > /proc/sys/net/ipv4/conf/fleet0/rp_filter",
		warns: []string{"link fleet0 drops the workers' packets: rp_filter is strict", "way back to 172.16.120.2", "rule 5", "fleet0.rp_filter=2"}},
	{name: "a link that does not forward", later: true, stage: "echo 0 > /proc/sys/net/ipv4/conf/eno1/forwarding", doctor: "ok", warns: []string{"link eno1 does not forward the internet's answers", "eno1.forwarding=1"}},
	{name: "routes of idle links are passed over", later: true, stage: "for f in /proc/sys/net/ipv?/conf/*/ignore_routes_with_linkdown; do echo 1 > $f; done", doctor: "ok"},
	{name: "nexthop objects", stage: `
		ip nexthop add id 1 via 198.51.100.1 dev eno1; ip nexthop add id 2 via 10.20.0.15 dev lan0; ip nexthop add id 10 group 1/2
		ip route replace default nhid 1; ip route add 172.16.0.0/12 nhid 10`, doctor: "ok", says: []string{"default via 198.51.100.1 dev eno1"}},
	{name: "a group of nexthops", stage: `
		ip nexthop add id 1 via 198.51.100.1 dev eno1; ip nexthop add id 2 via 10.20.0.15 dev lan0; ip nexthop add id 10 group 1/2; ip route replace default nhid 10`,
		doctor: "warn", says: []string{"some of the workers' IPv4 packets leave by lan0"}},
	{name: "a worker's address is routed elsewhere later", later: true, stage: "ip route prepend 172.16.120.2 dev lan0", doctor: "ok",
		lost: []string{"TAP fleet0", "but to lan0", "172.16.120.2 dev lan0 in table main"}},
	{name: "a worker's address is refused later", later: true, stage: "ip route prepend prohibit 172.16.120.3", doctor: "ok",
		lost: []string{"TAP fleet1", "172.16.120.3", "prohibit 172.16.120.3 in table main"}},
	{name: "no default route", stage: "ip route del default", doctor: "warn", says: []string{"no IPv4 route to the internet (no route)"}},
	{name: "the default route refuses", stage: "ip route replace unreachable default", doctor: "warn", says: []string{"unreachable default in table main"}},
	{name: "source routing of the workers", stage: "ip route add default via 198.51.100.1 table 7; ip route replace default via 10.20.0.15; ip rule add from 172.16.0.0/12 lookup 7", doctor: "ok"},
	{name: "IPv6 leaves elsewhere", stage: "ip -6 route replace default dev lan0", doctor: "ok", six: "fail",
		says6: []string{"the workers' IPv6 packets leave by lan0, not by eno1", "default dev lan0 in table main"}, warns: []string{"IPv6", "lan0"}},
	{name: "no IPv6", stage: "ip -6 route del default", doctor: "ok", six: "warn", says6: []string{"no IPv6 route to the internet", "ip -6 route add default via ROUTER dev eno1"}},
	{name: "an IPv6 VPN", later: true, stage: "ip tuntap add wg0 mode tun; ip link set wg0 up; ip -6 route add default dev wg0 table 51820; ip -6 rule add priority 100 lookup 51820",
		doctor: "ok", six: "fail", says6: []string{"wg0", "table 51820, by rule 100: from all lookup 51820", "ip -6 rule add priority 71 from fd7e:1ee7::/64 lookup main"}, warns: []string{"wg0"}},
	{name: "an IPv6 VPN without our rule", later: true, stage: "ip -6 rule del priority 70; ip -6 route add default dev lan0 table 51820; ip -6 rule add priority 100 lookup 51820",
		doctor: "ok", six: "fail", lost: []string{"TAP fleet0", "fd7e:1ee7::2", "but to lan0", "table 51820", "network up"}, warns: []string{"lan0"}},
	{name: "a wide IPv6 network", stage: "ip -6 route add fd00::/8 dev lan0; ip -6 route add blackhole fd7e:1ee7::/64", doctor: "ok"},
	{name: "an IPv6 LAN", stage: "ip -6 addr add fd7e:1ee7::99/48 dev lan0 nodad", doctor: "ok", refuse: []string{"network.subnet6 fd7e:1ee7::/64 overlaps route fd7e:1ee7::/48 on lan0 in table main"}},
	{name: "another egress interface", change: func(p *plan.Plan) { p.EgressInterface = "br0" }, doctor: "fail", six: "fail", says: []string{"leave by eno1, not by br0"}, warns: []string{"eno1"}},
}

// wgQuick does to routes and rules what `wg-quick up` does for AllowedIPs = 0.0.0.0/0. Sent to it, packets go nowhere here.
const wgQuick = `ip tuntap add wg0 mode tun; ip link set wg0 up; ip addr add 10.66.0.2/32 dev wg0
	ip route add default dev wg0 table 51820; ip rule add priority 32765 not fwmark 51820 table 51820
	ip rule add priority 32764 table main suppress_prefixlength 0`

// Kinds of link that this kernel may not have, as netlink shows them.
func TestRelations(t *testing.T) {
	attrs := func(name string, index, master, parent int) netlink.LinkAttrs {
		return netlink.LinkAttrs{Name: name, Index: index, MasterIndex: master, ParentIndex: parent, Flags: net.FlagUp, RawFlags: unix.IFF_UP}
	}
	h := &have{links: map[string]netlink.Link{}}
	for _, l := range []netlink.Link{
		&netlink.Device{LinkAttrs: attrs("eno1", 1, 10, 0)},
		&netlink.Device{LinkAttrs: attrs("eno2", 2, 10, 0)},
		&netlink.Bond{LinkAttrs: attrs("bond0", 10, 0, 0)},
		&netlink.Vlan{LinkAttrs: attrs("bond0.5", 11, 12, 10), VlanId: 5},
		&netlink.Bridge{LinkAttrs: attrs("br5", 12, 0, 0)},
		&netlink.Device{LinkAttrs: attrs("eno3", 3, 20, 0)},
		&netlink.GenericLink{LinkAttrs: attrs("team0", 20, 0, 0), LinkType: "team"},
		&netlink.Device{LinkAttrs: attrs("eno4", 4, 30, 0)},
		&netlink.Vrf{LinkAttrs: attrs("blue", 30, 0, 0), Table: 10},
		&netlink.Veth{LinkAttrs: attrs("veth0", 5, 0, 1)}, // its parent's number is its peer's, in another namespace
		&netlink.Device{LinkAttrs: attrs("eno6", 6, 40, 0)},
		&netlink.GenericLink{LinkAttrs: attrs("ovs-system", 40, 0, 0), LinkType: "openvswitch"},
	} {
		h.links[l.Attrs().Name] = l
	}
	index := func(name string) int { return h.links[name].Attrs().Index }
	for _, c := range []struct {
		named, out string
		vrf        bool // the default route is in the VRF's table
		status     Status
		says       []string
	}{
		{named: "eno1", out: "eno1", status: StatusOK},
		{named: "eno1", out: "bond0", status: StatusFail, says: []string{"; eno1 is a member of the bond bond0", `egress_interface = "bond0"`}},
		{named: "eno2", out: "bond0.5", status: StatusFail, says: []string{"; eno2 is a member of the bond bond0, bond0.5 is a VLAN on bond0"}},
		{named: "eno1", out: "br5", status: StatusFail,
			says: []string{"; eno1 is a member of the bond bond0, bond0.5 is a VLAN on bond0, bond0.5 is a port of the bridge br5"}},
		{named: "bond0.5", out: "bond0", status: StatusFail, says: []string{"; bond0.5 is a VLAN on bond0"}},
		{named: "br5", out: "bond0", status: StatusFail, says: []string{"; bond0.5 is a VLAN on bond0, bond0.5 is a port of the bridge br5"}},
		{named: "eno3", out: "team0", status: StatusFail, says: []string{"; eno3 is a member of the team team0"}},
		{named: "eno4", out: "eno3", status: StatusFail, says: []string{"; eno4 is in the VRF blue, whose routes are in table 10"}},
		{named: "blue", out: "eno4", status: StatusFail, says: []string{"; eno4 is in the VRF blue", `egress_interface = "eno4"`}},
		{named: "eno4", vrf: true, out: "eno4", status: StatusWarn, says: []string{"no IPv4 route to the internet", "; eno4 is in the VRF blue, whose routes are in table 10"}},
		{named: "eno6", out: "ovs-system", status: StatusFail, says: []string{"eno6 is a part of the openvswitch ovs-system"}},
		{named: "eno1", out: "veth0", status: StatusFail, says: []string{"leave by veth0", "; eno1 is a member of the bond bond0"}},
	} {
		r := netlink.Route{Family: unix.AF_INET, LinkIndex: index(c.out), Gw: net.IPv4(192, 0, 2, 1), Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST}
		if c.vrf {
			r.Table = 10
		}
		h.routes = []netlink.Route{r}
		h.policies = append([]policy{{family: unix.AF_INET, priority: 1000, action: nl.FR_ACT_TO_TBL, l3mdev: true, suppressPrefix: -1, suppressGroup: -1}},
			defaultPolicies()...)
		n := &network{plan: &plan.Plan{EgressInterface: c.named, Network: plan.Network{Gateway: netip.MustParseAddr("172.16.120.1")}}}
		o := n.egress(h, false)
		text := o.detail + " | " + o.cure
		if o.status != c.status {
			t.Errorf("%s, out by %s: %s, want %s: %s", c.named, c.out, o.status, c.status, text)
		}
		for _, part := range c.says {
			if !strings.Contains(text, part) {
				t.Errorf("%s, out by %s: %q is not said: %s", c.named, c.out, part, text)
			}
		}
	}
}

func TestTopologies(t *testing.T) {
	for _, c := range topologies {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			p := l.plan(3, true)
			if c.change != nil {
				c.change(p)
				rules(p)
			}
			if !c.later {
				l.sh(l.host, c.stage)
			}
			d := l.doctor(p)
			if !c.later {
				l.judge(d, c.doctor, c.six, c.says, c.says6, c.refuse)
			}
			err := l.in(l.host, func() error { return NetworkUp(t.Context(), p, owner) })
			if c.refuse != nil {
				wantError(t, err, c.refuse...)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if c.later {
				l.sh(l.host, c.stage)
				found := slices.DeleteFunc(l.doctor(p), func(f Finding) bool { return f.Check == "subnet" })
				l.judge(found, c.doctor, c.six, c.says, c.says6, nil)
			}
			var lost, other []string
			err = l.in(l.host, func() error {
				found, err := Troubles(p, p.Slots)
				for _, t := range found {
					if t.Lost {
						lost = append(lost, t.String())
					} else {
						other = append(other, t.String())
					}
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			l.contains("lost", lost, c.lost)
			l.contains("troubles", other, c.warns)
			l.serve(l.internet, server, 80)
			w := l.worker(p, 1)
			l.serve(w.NsHandle, w.slot.Address.String(), 22)
			if c.lost == nil { // whatever else is wrong, the host reaches its workers
				l.reaches(l.host, "tcp", w.slot.Address.String(), 22, "172.16.120.1")
			}
			if c.doctor == "ok" && c.warns == nil && c.lost == nil {
				l.reaches(w.NsHandle, "tcp", server, 80, hostWAN)
			}
			l.down(p)
			if out := l.sh(l.host, "ip rule; ip -6 rule; ip route show table all"); strings.Contains(out, "proto 70") {
				t.Errorf("down left:\n%s", out)
			}
		})
	}
}

// doctor is what the network checks of a doctor on the lab's host find.
func (l *lab) doctor(p *plan.Plan) []Finding {
	l.Helper()
	d := &doctor{plan: p, machine: realMachine()}
	if err := l.in(l.host, func() error { d.links(l.Context()); return nil }); err != nil {
		l.Fatal(err)
	}
	return d.found
}

func (l *lab) judge(found []Finding, egress, egress6 string, says, says6, refuse []string) {
	l.Helper()
	for _, f := range found {
		text := f.Detail + " | " + f.Cure
		switch f.Check {
		case "egress-interface":
			if string(f.Status) != egress {
				l.Errorf("egress-interface is %s, want %s: %s", f.Status, egress, text)
			}
			l.contains("egress-interface", []string{text}, append(slices.Clone(says), ""))
		case "egress-ipv6":
			if string(f.Status) != cmp.Or(egress6, "ok") {
				l.Errorf("egress-ipv6 is %s, want %s: %s", f.Status, cmp.Or(egress6, "ok"), text)
			}
			l.contains("egress-ipv6", []string{text}, append(slices.Clone(says6), ""))
		case "subnet":
			if (f.Status == StatusFail) != (refuse != nil) {
				l.Errorf("subnet is %s: %s", f.Status, text)
			}
			l.contains("subnet", []string{text}, append(slices.Clone(refuse), ""))
		}
	}
}

// contains wants all parts in the texts, and no text where there are no parts.
func (l *lab) contains(what string, texts, parts []string) {
	l.Helper()
	all := strings.Join(texts, "\n")
	if len(parts) == 0 && len(texts) > 0 {
		l.Errorf("%s: nothing was to be said, and there is: %s", what, all)
	}
	for _, p := range parts {
		if !strings.Contains(all, p) {
			l.Errorf("%s: %q is not said: %s", what, p, all)
		}
	}
}
