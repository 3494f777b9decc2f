package host

import (
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// firewalls are what others have on a host, as nftables text.
var firewalls = []struct {
	name    string
	ruleset string
	before  string            // on the host
	tools   []string          // that it takes
	drops   map[string]string // by family: what doctor says; none: nothing is dropped
	cure    string            // a part of the cure
	run     bool              // the cure can be run here, and then nothing is dropped
	cannot  bool              // a worker cannot call out
}{
	{name: "none"},
	{name: "a router's", ruleset: `table inet filter {
		chain input { type filter hook input priority 0; policy drop; ct state established,related accept; }
		chain forward { type filter hook forward priority 0; policy drop; }
	}`, drops: both("packets to the internet: chain forward of table inet filter (hook forward) by its policy"),
		cure: `nft insert rule inet filter forward iifname "fleet*" accept`, run: true, cannot: true},
	{name: "a router's, before the network is up", before: "echo 0 > /proc/sys/net/ipv4/ip_forward", ruleset: `table ip filter4 {
		chain forward { type filter hook forward priority 10; policy drop; iifname "lan0" accept; }
	}`, drops: map[string]string{"IPv4": "chain forward of table ip filter4 (hook forward) by its policy"},
		cure: `nft insert rule ip filter4 forward oifname "fleet*" ct state established,related accept`, run: true, cannot: true},
	{name: "a rule in a chain of its own", ruleset: `table inet fw {
		chain lan { iifname != "lan0" ip saddr 172.16.0.0/12 reject; }
		chain ways { jump lan; }
		chain onward { type filter hook forward priority -5; jump ways; accept; }
	}`, drops: map[string]string{"IPv4": `chain lan of table inet fw (reached from chain onward, hook forward) by the rule: iifname != "lan0" ip saddr 172.16.0.0/12 reject`},
		cure: "nft insert rule inet fw onward iifname", run: true, cannot: true},
	{name: "the second of two", ruleset: `
		table inet one { chain forward { type filter hook forward priority -10; policy drop; iifname "fleet*" accept; ct state established accept; }; }
		table ip6 two { chain forward { type filter hook forward priority 10; policy drop; }; }`,
		drops: map[string]string{"IPv6": "chain forward of table ip6 two"}, cure: "nft insert rule ip6 two forward", run: true},
	{name: "in prerouting", ruleset: `table inet raw { chain pre { type filter hook prerouting priority raw; iifname "fleet*" ip saddr 172.16.0.0/12 drop; }; }`,
		drops: map[string]string{"IPv4": "chain pre of table inet raw (hook prerouting) by the rule"}, cure: "nft insert rule inet raw pre", run: true, cannot: true},
	{name: "in postrouting", ruleset: `table inet out { chain post { type filter hook postrouting priority 0; iifname "fleet*" oifname "eno1" ip saddr 172.16.0.0/12 drop; }; }`,
		drops: map[string]string{"IPv4": "chain post of table inet out (hook postrouting) by the rule"}, cure: "nft insert rule inet out post", run: true, cannot: true},
	{name: "answers", ruleset: `table inet filter { chain forward { type filter hook forward priority 0; policy drop; iifname "fleet*" accept; }; }`,
		drops: both("the internet's", "answers to workers: chain forward of table inet filter"), cure: `oifname "fleet*" ct state established,related accept`,
		run: true, cannot: true},
	{name: "a mark for another way", before: "ip route add default via 10.20.0.15 table 7; ip rule add fwmark 7 lookup 7", ruleset: `table inet ways {
		chain pre { type filter hook prerouting priority mangle; iifname "fleet*" meta mark set 7; }
	}`, drops: map[string]string{"IPv4": "packets to the internet leave by lan0, although by the routes they would not"},
		cure: `egress_interface = "lan0"`, cannot: true},
	{name: "Docker's", ruleset: `table ip filter {
		chain DOCKER-USER { return; }
		chain DOCKER-FORWARD { oifname "docker0" accept; }
		chain FORWARD { type filter hook forward priority filter; policy drop; jump DOCKER-USER; jump DOCKER-FORWARD; }
	}`, drops: map[string]string{"IPv4": "chain FORWARD of table ip filter (hook forward) by its policy"}, cannot: true,
		cure: "iptables -I DOCKER-USER -i fleet+ -j ACCEPT && iptables -I DOCKER-USER -o fleet+ -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"},
	{name: "ufw's", ruleset: `table ip filter {
		chain ufw-before-forward { ct state established accept; }
		chain ufw-reject-forward { reject; }
		chain FORWARD { type filter hook forward priority filter; policy drop; jump ufw-before-forward; jump ufw-reject-forward; }
	}
	table ip6 filter { chain ufw6-before-forward { ct state established accept; }; chain FORWARD { type filter hook forward priority filter; policy drop; jump ufw6-before-forward; }; }`,
		drops: map[string]string{"IPv4": "chain ufw-reject-forward of table ip filter (reached from chain FORWARD, hook forward) by the rule: reject",
			"IPv6": "chain FORWARD of table ip6 filter (hook forward) by its policy"}, cure: "ufw route allow in on fleet+", cannot: true},
	{name: "ip6tables'", ruleset: `table ip6 filter { chain FORWARD { type filter hook forward priority filter; policy drop; }; }`,
		drops: map[string]string{"IPv6": "chain FORWARD of table ip6 filter"}, cure: "ip6tables -I FORWARD -i fleet+ -j ACCEPT"},
	{name: "Docker's, by its own tool", before: `iptables-nft -P FORWARD DROP; iptables-nft -N DOCKER-USER; iptables-nft -A FORWARD -j DOCKER-USER
		iptables-nft -A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT`, tools: []string{"iptables-nft"}, run: true, cannot: true,
		drops: map[string]string{"IPv4": "chain FORWARD of table ip filter (hook forward) by its policy"}, cure: "iptables -I DOCKER-USER -i fleet+"},
	{name: "iptables' rule", before: "iptables-nft -N LAN; iptables-nft -A LAN -s 172.16.0.0/12 -j REJECT; iptables-nft -A FORWARD -j LAN", run: true,
		tools: []string{"iptables-nft"}, drops: map[string]string{"IPv4": "chain LAN of table ip filter (reached from chain FORWARD, hook forward) by the rule"},
		cure: "iptables -I FORWARD -i fleet+ -j ACCEPT && iptables -I FORWARD -o fleet+", cannot: true},
	{name: "iptables-legacy's", before: "iptables-legacy -P FORWARD DROP; ip6tables-legacy -A FORWARD -s fd00::/8 -j DROP", run: true,
		tools: []string{"iptables-legacy", "ip6tables-legacy"}, drops: both("another firewall drops the workers'", "packets to the internet: a chain of iptables-legacy"),
		cure: "ip6tables-legacy -I FORWARD -i fleet+", cannot: true},
	{name: "firewalld's", ruleset: `table inet firewalld { chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept; ct state established accept; reject with icmpx admin-prohibited; }; }`,
		drops: both("chain filter_FORWARD of table inet firewalld (hook forward) by the rule: reject with icmpx admin-prohibited"), cannot: true,
		cure: "firewall-cmd --permanent --zone=trusted --add-source=172.16.120.0/24 && firewall-cmd --reload"},

	// These drop much, and nothing of the workers'.
	{name: "the workers are let through by link", ruleset: `table inet filter { chain forward { type filter hook forward priority 0; policy drop; iifname "fleet*" oifname "eno1" accept; ct state established,related accept; }; }`},
	{name: "the workers are let through by address", ruleset: `table inet filter { chain forward { type filter hook forward priority 0; policy drop;
		ip saddr 172.16.120.0/24 accept; ip6 saddr fd7e:1ee7::/64 accept; ct state established accept; }; }`},
	{name: "other hooks", ruleset: `table inet filter {
		chain input { type filter hook input priority 0; policy drop; ip protocol icmp accept; ct state established accept; }
	}
	table bridge filter { chain forward { type filter hook forward priority 0; policy drop; }; }
	table netdev filter { chain in { type filter hook ingress device "lan0" priority 0; policy drop; }; }`},
	{name: "dormant", ruleset: `table inet filter { flags dormant; chain forward { type filter hook forward priority 0; policy drop; }; }`},
	{name: "a check of the sender", ruleset: `table inet raw { chain pre { type filter hook prerouting priority raw; fib saddr . iif oif missing drop; }; chain onward { type filter hook forward priority 0; ct state invalid drop; }; }`},
	{name: "a NAT for everybody", ruleset: `table inet nat { chain post { type nat hook postrouting priority srcnat; masquerade; }; }`},
}

func both(parts ...string) map[string]string {
	return map[string]string{"IPv4": strings.Join(parts, " IPv4 "), "IPv6": strings.Join(parts, " IPv6 ")}
}

func TestForeignFirewalls(t *testing.T) {
	for _, c := range firewalls {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			need.Tools(t, c.tools...)
			l := newLab(t)
			p := l.plan(2, true)
			l.sh(l.host, c.before+"\nnft -f - <<'N'\n"+c.ruleset+"\nN")
			before := l.state()
			found := l.judgeFirewall(p, c.drops, c.cure)
			if diff := cmp.Diff(before, l.state()); diff != "" {
				t.Errorf("doctor changed:\n%s", diff)
			}
			l.up(p)
			l.judgeFirewall(p, c.drops, c.cure)
			l.serve(l.internet, server, 80)
			w := l.worker(p, 0)
			if c.cannot {
				l.cut(w)
			} else {
				l.reaches(w.NsHandle, "tcp", server, 80, hostWAN)
			}
			if !c.run {
				return
			}
			for _, f := range found {
				l.sh(l.host, `iptables() { iptables-nft "$@"; }; ip6tables() { ip6tables-nft "$@"; }; `+f.Cure)
			}
			l.judgeFirewall(p, nil, "")
			l.reaches(w.NsHandle, "tcp", server, 80, hostWAN)
		})
	}
}

// judgeFirewall wants doctor to find what is dropped, by family, and nothing else. It returns the failures.
func (l *lab) judgeFirewall(p *plan.Plan, drops map[string]string, cure string) []Finding {
	l.Helper()
	var failed []Finding
	start := time.Now()
	for _, f := range l.doctor(p) {
		if f.Check != "foreign-firewall" {
			continue
		}
		if f.Status == StatusOK && len(drops) == 0 && strings.Contains(f.Detail, "IPv4 and IPv6") {
			return nil
		}
		if f.Status == StatusFail {
			failed = append(failed, f)
		}
	}
	if spent := time.Since(start); spent > 20*time.Second {
		l.Errorf("doctor took %v", spent)
	}
	if len(failed) != len(drops) {
		l.Errorf("doctor finds %d drops, want %d: %+v", len(failed), len(drops), failed)
	}
	for family, text := range drops {
		if !slices.ContainsFunc(failed, func(f Finding) bool { return strings.Contains(f.Detail, family) && strings.Contains(f.Detail, text) }) {
			l.Errorf("doctor does not say %q: %+v", text, failed)
		}
	}
	if cure != "" && !slices.ContainsFunc(failed, func(f Finding) bool { return strings.Contains(f.Cure, cure) }) {
		l.Errorf("no cure says %q: %+v", cure, failed)
	}
	return failed
}

// cut wants a worker that reaches nothing.
func (l *lab) cut(w worker) {
	l.Helper()
	err := l.in(w.NsHandle, func() error {
		c, err := net.DialTimeout("tcp", net.JoinHostPort(server, "80"), 300*time.Millisecond)
		if err == nil {
			c.Close()
		}
		return err
	})
	if err == nil {
		l.Error("the worker reaches the internet")
	}
}
