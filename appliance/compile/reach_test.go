package compile_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// TestReachIsTheRuleset: hostspec's answer about a destination agrees with what the compiled ruleset does with a packet to it.
func TestReachIsTheRuleset(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	addrs := []string{"10.64.0.1", "10.64.0.9", "10.20.0.3", "10.20.0.200", "192.168.7.7", "169.254.169.254", "100.64.1.1", "8.8.8.8", "1.1.1.3", "10.0.0.53",
		"fd7e:1ee7::1", "fd7e:1ee7::9", "fd00::3", "2606:4700::1", "fe80::1", "2001:db8::1"}
	nets := []string{"10.20.0.3/32", "10.20.0.0/24", "10.0.0.0/8", "0.0.0.0/0", "8.8.8.0/24", "10.64.0.1/32", "fd00::/8", "fd00::3/128", "::/0", "2606:4700::/32", "fd7e:1ee7::1/128"}
	ports := []hostspec.PortRange{{Protocol: "tcp", First: 443, Last: 443}, {Protocol: "tcp", First: 1, Last: 1024}, {Protocol: "udp", First: 53, Last: 53},
		{Protocol: "udp", First: 443, Last: 443}, {Protocol: "tcp", First: 53, Last: 53}}
	verdicts := map[bool]int{}
	for range 400 {
		h := host(1)
		h.Network.Subnet6 = netip.MustParsePrefix("fd7e:1ee7::/64")
		h.Network.DNS = []netip.Addr{netip.MustParseAddr("1.1.1.3"), netip.MustParseAddr("10.0.0.53")}
		for i := range rnd.IntN(4) {
			e := &hostspec.Egress{Name: fmt.Sprint("e", i), Action: []string{"allow", "deny"}[rnd.IntN(2)]}
			for range rnd.IntN(3) {
				e.To = append(e.To, netip.MustParsePrefix(nets[rnd.IntN(len(nets))]))
			}
			for range rnd.IntN(3) {
				e.Ports = append(e.Ports, ports[rnd.IntN(len(ports))])
			}
			h.Network.Egress = append(h.Network.Egress, e)
		}
		p := compiled(t, h)
		for _, text := range addrs {
			for _, port := range []uint16{22, 53, 443, 8443} {
				a := netip.MustParseAddr(text)
				why := h.Network.Denies(a, port)
				accepted := accepts(t, p, a, port)
				if verdicts[accepted]++; (why == "") != accepted {
					t.Fatalf("%s tcp/%d: hostspec says %q, the ruleset accepts: %v\n%+v", a, port, why, accepted, p.Network.Egress)
				}
			}
		}
	}
	if verdicts[true] < 1000 || verdicts[false] < 1000 {
		t.Errorf("the cases are one-sided: %v", verdicts)
	}
}

// accepts applies the rules to the first packet of a TCP connection that a worker opens, through the egress interface.
func accepts(t *testing.T, p *plan.Plan, to netip.Addr, port uint16) bool {
	t.Helper()
	table := p.Network.Ruleset.Tables[0]
	chain := "from_worker"
	if to == p.Network.Gateway || to == *p.Network.Gateway6 {
		chain = "to_host"
	}
	is := func(f plan.Field, value string) bool {
		switch f {
		case plan.IPDest, plan.IP6Dest:
			if (f == plan.IPDest) != to.Is4() {
				return false
			}
			if prefix, err := netip.ParsePrefix(value); err == nil {
				return prefix.Contains(to)
			}
			return value == to.String()
		case plan.TCPDest:
			first, last, ranged := strings.Cut(value, "-")
			if !ranged {
				last = first
			}
			a, _ := strconv.Atoi(first)
			b, _ := strconv.Atoi(last)
			return a <= int(port) && int(port) <= b
		case plan.OIFName:
			return value == p.EgressInterface
		case plan.UDPDest, plan.CTState, plan.ICMPv6Kind:
			return false
		}
		t.Fatalf("the test knows no %s", f)
		return false
	}
	family := func(f plan.Field) bool { // a match on the other family's header never matches, negated or not
		return f != plan.IPDest && f != plan.IP6Dest || (f == plan.IPDest) == to.Is4()
	}
	matches := func(m plan.Match) bool {
		values := []string{m.Value}
		if m.Set != "" {
			i := slices.IndexFunc(table.Sets, func(s plan.Set) bool { return s.Name == m.Set })
			values = table.Sets[i].Elements
		}
		f := m.Fields[0]
		return family(f) && slices.ContainsFunc(values, func(v string) bool { return is(f, v) }) != m.Not
	}
	for _, c := range table.Chains {
		if c.Name != chain {
			continue
		}
		for _, r := range c.Rules {
			if !slices.ContainsFunc(r.Matches, func(m plan.Match) bool { return !matches(m) }) {
				return r.Verdict.Action == plan.Accept
			}
		}
	}
	t.Fatalf("chain %s judges nothing", chain)
	return false
}
