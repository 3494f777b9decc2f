package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// foreignFirewall tries whether another firewall drops what workers send or get. A packet must pass every table of the host, not only ours.
func (d *doctor) foreignFirewall(ctx context.Context, h *have, n *network) {
	const check = "foreign-firewall"
	if !d.machine.root {
		d.warn(check, asRoot, "only root can check whether another firewall drops the workers' packets")
		return
	}
	var passed []string
	for _, six := range []bool{false, true} {
		if n.internet(six) == nil || n.egress(h, six).status != StatusOK {
			continue // nothing would leave anyway, which is another check's
		}
		family := "IPv4"
		if six {
			family = "IPv6"
		}
		b, err := d.machine.dropper(d.plan, six)
		switch {
		case errors.Is(err, errNotForwarding):
			d.warn(check, "fleetingd network up --plan FILE, then doctor again", "whether another firewall drops the workers' %s packets could not be tried: %v",
				family, err)
		case err != nil:
			d.warn(check, "nft list ruleset", "whether another firewall drops the workers' %s packets could not be tried: %v", family, err)
		case b != nil:
			subnet := d.plan.Network.Subnet
			if six {
				subnet = *d.plan.Network.Subnet6
			}
			d.fail(check, b.cure(subnet, trialPrefix(d.plan)), "%s", b.describe(family, d.ruleText(ctx, b), d.legacy(six)))
		default:
			passed = append(passed, family)
		}
	}
	if len(passed) > 0 && !slices.ContainsFunc(d.found, func(f Finding) bool { return f.Check == check && f.Status == StatusFail }) {
		d.ok(check, "no other firewall drops the workers' %s packets (tried with packets that never leave this host)", strings.Join(passed, " and "))
	}
}

// legacy reports whether ip_tables (or ip6_tables) has chains of its own, which nftables does not show. Only root can read that.
func (d *doctor) legacy(six bool) bool {
	path := "/proc/thread-self/net/ip_tables_names"
	if six {
		path = "/proc/thread-self/net/ip6_tables_names"
	}
	b, err := d.machine.readFile(path)
	return err == nil && len(strings.TrimSpace(string(b))) > 0
}

// ruleText is the rule as nft writes it, or "" where nft cannot be asked.
func (d *doctor) ruleText(ctx context.Context, b *blockade) string {
	if b.handle == 0 {
		return ""
	}
	out, err := d.machine.output(ctx, "nft", "-a", "list", "chain", b.family, b.table, b.chain)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(out) {
		if text, ok := strings.CutSuffix(strings.TrimSpace(line), fmt.Sprintf(" # handle %d", b.handle)); ok {
			return text
		}
	}
	return ""
}

// describe says what was dropped, and by whom.
func (b *blockade) describe(family, rule string, legacy bool) string {
	what := fmt.Sprintf("the workers' %s packets to the internet", family)
	if b.answer {
		what = fmt.Sprintf("the internet's %s answers to workers", family)
	}
	switch {
	case b.astray != "":
		return fmt.Sprintf("%s leave by %s, although by the routes they would not: another firewall marks them for a rule of `ip rule`, and ours "+
			"rejects them", what, b.astray)
	case b.untraced && !b.routed:
		return what + " never get as far as being forwarded: the kernel drops them before, by a route, rp_filter, or a program on the link"
	case b.untraced && legacy:
		return "another firewall drops " + what + ": a chain of iptables-legacy, which nftables does not show"
	case b.untraced:
		return what + " are dropped when they are forwarded, by no chain of nftables (a program such as eBPF may do it)"
	}
	by := fmt.Sprintf("chain %s of table %s %s", b.chain, b.family, b.table)
	if b.base != "" && b.base != b.chain {
		by += fmt.Sprintf(" (reached from chain %s, hook %s)", b.base, b.hook)
	} else if b.hook != "" {
		by += fmt.Sprintf(" (hook %s)", b.hook)
	}
	switch {
	case b.handle == 0:
		by += " by its policy"
	case rule != "":
		by += " by the rule: " + rule
	default:
		by += fmt.Sprintf(" by its rule with handle %d", b.handle)
	}
	return "another firewall drops " + what + ": " + by
}

// cure is the command that makes the firewall's owner accept the workers' packets in both directions.
func (b *blockade) cure(subnet netip.Prefix, tap string) string {
	has := func(prefix string) bool {
		return slices.ContainsFunc(b.chains, func(c string) bool { return strings.HasPrefix(c, prefix) })
	}
	// An iptables chain takes packets from the workers and answers to them.
	iptables := func(program, chain string) string {
		return fmt.Sprintf("%[1]s -I %[2]s -i %[3]s+ -j ACCEPT && %[1]s -I %[2]s -o %[3]s+ -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
			program, chain, tap)
	}
	program := "iptables"
	if b.six {
		program = "ip6tables"
	}
	xtables := (b.family == "ip" || b.family == "ip6") && b.table == "filter" && b.base == "FORWARD"
	switch {
	case b.astray != "":
		return fmt.Sprintf(`except iifname "%s*" from the rule that sets the mark (nft list ruleset | grep mark), or write egress_interface = %q in the spec`,
			tap, b.astray)
	case b.untraced && !b.routed:
		return "ip route; sysctl -a -r 'rp_filter'"
	case b.untraced:
		return iptables(program+"-legacy", "FORWARD")
	case xtables && has("ufw"):
		if b.answer {
			return fmt.Sprintf("ufw route allow out on %s+", tap)
		}
		return fmt.Sprintf("ufw route allow in on %s+", tap)
	case b.table == "firewalld":
		return fmt.Sprintf("firewall-cmd --permanent --zone=trusted --add-source=%s && firewall-cmd --reload", subnet)
	case xtables && slices.Contains(b.chains, "DOCKER-USER"):
		return iptables(program, "DOCKER-USER")
	case xtables:
		return iptables(program, "FORWARD")
	}
	at := fmt.Sprintf("nft insert rule %s %s %s", b.family, b.table, cmp.Or(b.base, b.chain))
	return fmt.Sprintf(`%[1]s iifname "%[2]s*" accept && %[1]s oifname "%[2]s*" ct state established,related accept # and the same in its configuration`, at, tap)
}
