package host

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// everything is a plan whose ruleset has every kind of match, set and verdict.
func everything(l *lab) *plan.Plan {
	p := l.plan(3, true)
	p.Network.Subnet = netip.MustParsePrefix("172.16.120.0/22") // ends within a byte
	p.Network.DNS = append(p.Network.DNS, netip.MustParseAddr("10.0.0.53"), netip.MustParseAddr("fd00::53"))
	nets := func(s ...string) (out []netip.Prefix) {
		for _, n := range s {
			out = append(out, netip.MustParsePrefix(n))
		}
		return out
	}
	tcp, udp := "tcp", "udp"
	p.Network.Egress = []plan.Egress{
		{Name: "one", Action: "allow", To: nets("10.20.0.15/32"), Ports: []plan.PortRange{{Protocol: tcp, First: 443, Last: 443}}},
		{Name: "many", Action: "allow", To: nets("10.30.0.0/16", "10.30.1.0/24", "10.31.0.0/16", "10.64.0.0/10", "fd01::/48", "fd01:1::/33"),
			Ports: []plan.PortRange{{Protocol: tcp, First: 80, Last: 80}, {Protocol: tcp, First: 9000, Last: 9001},
				{Protocol: udp, First: 53, Last: 60}}},
		{Name: "host", Action: "allow", To: nets("10.20.0.1/32", "10.20.0.2/32", "fd01::1/128")},
		{Name: "odd", Action: "deny", To: nets("10.65.0.0/17"), Ports: []plan.PortRange{{Protocol: udp, First: 1, Last: 65535}}},
		{Name: "any", Action: "allow", Ports: []plan.PortRange{{Protocol: tcp, First: 443, Last: 443}}},
		{Name: "all of IPv4", Action: "deny", To: nets("0.0.0.0/0"), Ports: []plan.PortRange{{Protocol: tcp, First: 26, Last: 26}}},
		{Name: "all of IPv6", Action: "deny", To: nets("::/0"), Ports: []plan.PortRange{{Protocol: tcp, First: 26, Last: 26}}},
		{Name: "ends", Action: "deny", To: nets("0.0.0.0/1", "128.0.0.0/1")},
		{Name: `quote " and $(x) ` + strings.Repeat("long ", 40), Action: "deny"},
	}
	rules(p)
	return p
}

// TestTextIsWhatIsSent loads one ruleset as text and another over netlink: to nft both are the same.
func TestTextIsWhatIsSent(t *testing.T) {
	l := newLab(t)
	p := everything(l)
	text := filepath.Join(t.TempDir(), "fleetingd.nft")
	if err := os.WriteFile(text, []byte(p.Network.Ruleset.Text(p.Slots)), 0o644); err != nil {
		t.Fatal(err)
	}
	byText, byNetlink := l.namespace(), l.namespace()
	for range 2 { // replacing it changes nothing
		l.sh(byText, "nft -f "+text)
		if err := l.in(byNetlink, func() error { return loadFirewall(p.Network.Ruleset, p.Slots) }); err != nil {
			t.Fatal(err)
		}
	}
	if diff := gocmp.Diff(l.ruleset(byText), l.ruleset(byNetlink)); diff != "" {
		t.Errorf("loaded from the text (-) and over netlink (+):\n%s", diff)
	}
	// What is read back is the same for both, so that a table that nftables.service loaded is not drift.
	for name, ns := range map[string]netns.NsHandle{"text": byText, "netlink": byNetlink} {
		err := l.in(ns, func() error {
			tables, err := inspectFirewall(p.Network.Ruleset, p.Slots)
			for id, s := range tables {
				if !s.exists || !s.ours || len(s.diff) > 0 {
					t.Errorf("loaded from %s, %s is read back as %+v", name, id, s)
				}
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}
}

// ruleset is what `nft -j list ruleset` prints, without the numbers that the kernel gives and with the elements in order.
func (l *lab) ruleset(ns netns.NsHandle) []string {
	l.Helper()
	var list struct{ Nftables []map[string]map[string]any }
	if err := json.Unmarshal([]byte(l.sh(ns, "nft -j list ruleset")), &list); err != nil {
		l.Fatal(err)
	}
	var out []string
	for _, o := range list.Nftables {
		for kind, v := range o {
			if kind == "metainfo" {
				continue
			}
			delete(v, "handle")
			if e, ok := v["elem"].([]any); ok {
				slices.SortFunc(e, func(a, b any) int { return cmp.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
			}
			b, err := json.Marshal(v)
			if err != nil {
				l.Fatal(err)
			}
			out = append(out, kind+" "+string(b))
		}
	}
	return out
}

// Every change that somebody makes by hand is seen.
func TestDriftIsSeen(t *testing.T) {
	l := newLab(t)
	p := everything(l)
	for _, c := range []struct{ change, seen string }{
		{"nft add rule inet fleetingd forward accept", "chain forward: 6 rules instead of 5"},
		{"nft insert rule inet fleetingd forward accept; nft delete rule inet fleetingd forward handle " +
			"$(nft -a list chain inet fleetingd forward | sed -n 's/.*oifname.*handle //p')", "chain forward: rule 1"},
		{"nft add element inet fleetingd private '{ 8.0.0.0/8 }'", "set private: 0 elements missing, 2 unexpected"},
		{"nft delete element inet fleetingd workers '{ \"fleet1\" . 172.16.120.3 }'", "set workers: 1 elements missing"},
		{"nft add chain inet fleetingd mine", "chain mine is not in the plan"},
		{"nft add set inet fleetingd mine '{ type ipv4_addr; }'", "set mine is not in the plan"},
		{"nft flush chain arp fleetingd input; nft delete chain arp fleetingd input", "chain input is missing"},
		{"nft add chain inet fleetingd input '{ policy drop; }'", "chain input has another hook"},
	} {
		if err := l.in(l.host, func() error { return loadFirewall(p.Network.Ruleset, p.Slots) }); err != nil {
			t.Fatal(err)
		}
		l.sh(l.host, c.change)
		var seen []string
		err := l.in(l.host, func() error {
			tables, err := inspectFirewall(p.Network.Ruleset, p.Slots)
			for _, s := range tables {
				seen = append(seen, s.diff...)
			}
			return err
		})
		if err != nil || len(seen) != 1 || !strings.HasPrefix(seen[0], c.seen) {
			t.Errorf("%s\nis seen as %q (%v), want %q", c.change, seen, err, c.seen)
		}
	}
}

func TestRulesetsThatAreNone(t *testing.T) {
	table := func(c plan.Chain, sets ...plan.Set) plan.Ruleset {
		return plan.Ruleset{Tables: []plan.Table{{Family: "inet", Name: "t", Sets: sets, Chains: []plan.Chain{c}}}}
	}
	one := func(v plan.Verdict, m ...plan.Match) plan.Ruleset {
		return table(plan.Chain{Name: "c", Rules: []plan.Rule{{Comment: "r", Matches: m, Verdict: v}}})
	}
	match := func(f plan.Field, value string) plan.Ruleset {
		return one(plan.Verdict{Action: plan.Accept}, plan.Match{Fields: []plan.Field{f}, Value: value})
	}
	for want, r := range map[string]plan.Ruleset{
		"unknown family":           {Tables: []plan.Table{{Family: "bridge", Name: "t"}}},
		"unknown verdict":          one(plan.Verdict{Action: "queue"}),
		"unknown field":            match("tcp sport", "1"),
		"not the name of an":       match(plan.IIFName, "much-too-long-a-name"),
		"is not of type ipv4_addr": match(plan.IPSource, "::1"),
		"is not a network of this": match(plan.IPSource, "::/64"),
		"unknown connection state": match(plan.CTState, "new"),
		"is not a MAC address":     match(plan.EtherSource, "02:00"),
		"unknown ARP operation":    match(plan.ARPOperation, "reply"),
		"is not of type inet_serv": match(plan.TCPDest, "65536"),
		"a match needs fields":     match(plan.TCPDest, ""),
		"has no hook":              table(plan.Chain{Name: "c", Hook: "ingress"}),
		"unknown type \"route\"":   table(plan.Chain{Name: "c", Hook: "input", Type: "route"}),
		"unknown type \"mark\"":    table(plan.Chain{Name: "c"}, plan.Set{Name: "s", Key: []plan.DataType{"mark"}}),
		"must have one type":       table(plan.Chain{Name: "c"}, plan.Set{Name: "s"}),
		"\"10.0.0.1/8\" is not a n": table(plan.Chain{Name: "c"},
			plan.Set{Name: "s", Key: []plan.DataType{plan.TypeIPv4}, Interval: true, Elements: []string{"10.0.0.1/8"}}),
	} {
		_, err := translate(r, nil)
		wantError(t, err, want)
	}
}

// FuzzTranslate feeds it the rulesets of edited plans: it says what is wrong, and never panics.
func FuzzTranslate(f *testing.F) {
	n := plan.Network{Subnet: netip.MustParsePrefix("172.16.120.0/24"), Gateway: netip.MustParseAddr("172.16.120.1"),
		HostMAC: compile.HostMAC, GuestMAC: compile.GuestMAC}
	seed, err := json.Marshal(compile.Ruleset("eno1", n))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add(bytes.ReplaceAll(seed, []byte("ip saddr"), []byte("ip6 saddr")))
	f.Add(bytes.ReplaceAll(seed, []byte(`"value"`), []byte(`"set"`)))
	slots := []plan.Slot{{TAP: "fleet0", Address: netip.MustParseAddr("172.16.120.2"), Queues: 1}}
	f.Fuzz(func(t *testing.T, data []byte) {
		var r plan.Ruleset
		if json.Unmarshal(data, &r) != nil {
			return
		}
		_ = r.Text(slots)
		_, _ = translate(r, slots)
	})
}
