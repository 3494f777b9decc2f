package compile

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

var update = flag.Bool("update-ruleset", false, "write the golden nft texts anew")

func prefixOf(s string) *netip.Prefix { p := netip.MustParsePrefix(s); return &p }
func addrOf(s string) *netip.Addr     { a := netip.MustParseAddr(s); return &a }

// network returns a small network with one of everything.
func network(six bool) plan.Network {
	n := plan.Network{
		Subnet: netip.MustParsePrefix("172.16.120.0/22"), Gateway: netip.MustParseAddr("172.16.120.1"),
		DNS: []netip.Addr{netip.MustParseAddr("1.1.1.3"), netip.MustParseAddr("10.0.0.53")},
		MTU: 1500, HostMAC: HostMAC, GuestMAC: GuestMAC,
		Egress: []plan.Egress{
			{Name: "artifact-store", Action: "allow", To: []netip.Prefix{netip.MustParsePrefix("10.20.0.15/32")},
				Ports: []plan.PortRange{{Protocol: "tcp", First: 443, Last: 443}, {Protocol: "tcp", First: 9000, Last: 9001}}},
			{Name: `no "smtp"`, Action: "deny", Ports: []plan.PortRange{{Protocol: "tcp", First: 25, Last: 25}}},
		},
	}
	if six {
		n.Subnet6, n.Gateway6 = prefixOf("fd7e:1ee7::/64"), addrOf("fd7e:1ee7::1")
		n.DNS = append(n.DNS, netip.MustParseAddr("fd00::53"))
		n.Egress = append(n.Egress, plan.Egress{Name: "two-families", Action: "allow",
			To: []netip.Prefix{*prefixOf("10.30.0.0/16"), *prefixOf("10.30.1.0/24"), *prefixOf("10.40.0.0/16"), *prefixOf("fd01::/48")},
			Ports: []plan.PortRange{{Protocol: "udp", First: 53, Last: 53}, {Protocol: "tcp", First: 53, Last: 53},
				{Protocol: "tcp", First: 54, Last: 60}}})
	}
	return n
}

func slotsOf(n plan.Network, count int) []plan.Slot {
	slots := make([]plan.Slot, count)
	a := n.Gateway
	for i := range slots {
		a = a.Next()
		slots[i] = plan.Slot{Index: i, TAP: fmt.Sprintf("fleet%d", i), Address: a, Queues: 1}
		if n.Subnet6 != nil {
			b := n.Subnet6.Addr().As16()
			b[14], b[15] = byte((i+2)>>8), byte(i+2)
			a6 := netip.AddrFrom16(b)
			slots[i].Address6 = &a6
		}
	}
	return slots
}

func TestRulesetText(t *testing.T) {
	for name, six := range map[string]bool{"ipv4": false, "ipv6": true} {
		t.Run(name, func(t *testing.T) {
			n := network(six)
			got := Ruleset("eno1", n).Text(slotsOf(n, 3))
			golden := filepath.Join("testdata", "ruleset", name+".nft")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("the ruleset is not %s (go test ./appliance/compile -update-ruleset writes it):\n%s", golden, diff)
			}
		})
	}
}

// Slots are looked up in sets: one rule per slot would slow down every packet of every worker.
func TestRulesDoNotGrowWithSlots(t *testing.T) {
	n := network(true)
	n.Subnet = netip.MustParsePrefix("172.16.0.0/16")
	n.Gateway = netip.MustParseAddr("172.16.0.1")
	count := func(slots int) (rules, lines int) {
		r := Ruleset("eno1", n)
		for _, table := range r.Tables {
			for _, c := range table.Chains {
				rules += len(c.Rules)
			}
		}
		return rules, strings.Count(r.Text(slotsOf(n, slots)), " comment ")
	}
	r10, l10 := count(10)
	r4000, l4000 := count(4000)
	if r10 != r4000 || l10 != l4000 || r10 != l10 {
		t.Errorf("10 slots: %d rules, %d in the text; 4,000 slots: %d and %d", r10, l10, r4000, l4000)
	}
	t.Logf("%d rules at 10 and at 4,000 slots", r10)
}

// An interval set accepts no overlaps: the user's ranges become a list of what they cover.
func TestIntervals(t *testing.T) {
	var nets []netip.Prefix
	for _, s := range []string{"10.1.0.0/16", "10.0.0.0/8", "192.0.2.7/32", "10.0.0.0/8", "192.0.2.0/30", "192.0.2.1/32"} {
		nets = append(nets, netip.MustParsePrefix(s))
	}
	if diff := cmp.Diff([]string{"10.0.0.0/8", "192.0.2.0/30", "192.0.2.7"}, prefixes(nets)); diff != "" {
		t.Error(diff)
	}
	ports := []plan.PortRange{{Protocol: "tcp", First: 90, Last: 99}, {Protocol: "udp", First: 1, Last: 2}, {Protocol: "tcp", First: 80, Last: 89},
		{Protocol: "tcp", First: 95, Last: 96}, {Protocol: "tcp", First: 22, Last: 22}, {Protocol: "tcp", First: 65535, Last: 65535}}
	if diff := cmp.Diff([]string{"22", "80-99", "65535"}, ranges(ports, "tcp")); diff != "" {
		t.Error(diff)
	}
}

// An allow without destinations, or with all of them, means the internet: neither the LAN nor the host itself.
func TestAllowAnyStaysOutside(t *testing.T) {
	for _, to := range [][]netip.Prefix{nil, {*prefixOf("0.0.0.0/0"), *prefixOf("10.0.0.0/8"), *prefixOf("::/0")}} {
		n := network(true)
		n.Egress = []plan.Egress{{Name: "https", Action: "allow", To: to,
			Ports: []plan.PortRange{{Protocol: "tcp", First: 443, Last: 443}}}}
		text := Ruleset("eno1", n).Text(nil)
		for _, want := range []string{
			`oifname "eno1" ip daddr != @private tcp dport 443 accept comment "egress https"`,
			`oifname "eno1" ip6 daddr != @private6 tcp dport 443 accept comment "egress https"`,
		} {
			if strings.Count(text, want) != 1 {
				t.Errorf("to %v: not once in the ruleset: %s", to, want)
			}
		}
		if n := strings.Count(text, "egress https"); n != 2 {
			t.Errorf("to %v: %d rules of the block, want 2", to, n)
		}
	}
}
