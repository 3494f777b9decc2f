package host

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// door makes the changes. The real one is *kernel; tests have one that fails on demand.
type door interface {
	makeTAPs(context.Context, []tap) error
	repairTAPs([]repair) error
	deleteTAPs([]tap) error
	addAddress(netip.Addr) error
	deleteAddress(netip.Addr) error
	addRule(policy) error
	deleteRule(policy) error
	writeSysctl(setting) error
	load(plan.Ruleset, []plan.Slot) error
	unload([]tableID) error
	forget(netip.Prefix) error
}

var _ door = (*kernel)(nil)

// step is one change, the differences that it fixes, and how to undo it.
type step struct {
	name  string
	fixes []Difference
	do    func(context.Context) error
	undo  func(context.Context) error
}

// differs describes what the step mends.
func (s *step) differs() string {
	if len(s.fixes) == 0 {
		return s.name
	}
	return s.fixes[0].String()
}

// have is the host's network as it is.
type have struct {
	links     map[string]netlink.Link
	policies  []policy         // none: the kernel has no policy routing
	routes    []netlink.Route  // of all tables: see readRoutes
	uid       uint32           // of the process that calls the workers
	attached  map[int]attached // by the link's index
	addresses []netip.Addr     // on lo
	tables    map[tableID]tableState
}

func (n *network) survey() (*have, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("netlink: %w", err)
	}
	defer h.Close()
	found, err := linksAndRoutes(n.plan)
	if err != nil {
		return nil, err
	}
	found.attached = map[int]attached{}
	neighs, err := whole(func() ([]netlink.Neigh, error) { return h.NeighList(0, unix.AF_UNSPEC) })
	if err != nil {
		return nil, fmt.Errorf("list neighbours: %w", err)
	}
	proxies, err := whole(listProxies)
	if err != nil {
		return nil, fmt.Errorf("list neighbours that this host answers for: %w", err)
	}
	for _, r := range found.routes {
		if r.Table != unix.RT_TABLE_MAIN {
			continue
		}
		on := found.attached[r.LinkIndex]
		on.routes = append(on.routes, r)
		found.attached[r.LinkIndex] = on
	}
	for _, e := range append(neighs, proxies...) {
		on := found.attached[e.LinkIndex]
		on.neighs = append(on.neighs, e)
		found.attached[e.LinkIndex] = on
	}
	if found.addresses, err = loopbackAddresses(); err != nil {
		return nil, err
	}
	found.tables, err = inspectFirewall(n.plan.Network.Ruleset, n.plan.Slots)
	return found, err
}

// whole repeats a listing that changed while the kernel made it, which is common on a busy host.
func whole[T any](list func() ([]T, error)) ([]T, error) {
	for range 9 {
		if l, err := list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return l, err
		}
	}
	return list()
}

// listProxies asks as netlink.NeighProxyList does, which then drops every entry with a further flag ("router").
func listProxies() ([]netlink.Neigh, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, unix.NLM_F_DUMP)
	req.AddData(&netlink.Ndmsg{Family: unix.AF_INET6, Flags: unix.NTF_PROXY})
	messages, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if err != nil {
		return nil, err
	}
	var found []netlink.Neigh
	for _, m := range messages {
		n, err := netlink.NeighDeserialize(m)
		if err != nil {
			return nil, err
		}
		found = append(found, *n)
	}
	return found, nil
}

// loopbackAddresses are the single addresses (/32, /128) on lo.
func loopbackAddresses() ([]netip.Addr, error) {
	lo, err := netlink.LinkByName(loopback)
	if err != nil {
		return nil, fmt.Errorf("link %s: %w", loopback, err)
	}
	addrs, err := whole(func() ([]netlink.Addr, error) { return netlink.AddrList(lo, unix.AF_UNSPEC) })
	if err != nil {
		return nil, fmt.Errorf("list the addresses of %s: %w", loopback, err)
	}
	var found []netip.Addr
	for _, a := range addrs {
		if ones, bits := a.Mask.Size(); ones != bits {
			continue
		}
		if addr, ok := netip.AddrFromSlice(a.IP); ok {
			found = append(found, addr.Unmap())
		}
	}
	return found, nil
}

// mark is the alias of this plan's TAPs.
func (n *network) mark() string { return linkMark + n.plan.Paths.State }

func (n *network) gateways() []netip.Addr {
	g := []netip.Addr{n.plan.Network.Gateway}
	if n.plan.Network.Gateway6 != nil {
		g = append(g, *n.plan.Network.Gateway6)
	}
	return g
}

// routing are the switches that let the whole host route. A trial turns on IPv4 link by link (see closedLinks, and tap.settings); IPv6
// has no such choice.
func (n *network) routing() []forwarding {
	var all []forwarding
	if !n.opts.Trial {
		all = append(all, forwarding4)
	}
	if n.plan.Network.Subnet6 != nil {
		all = append(all, forwarding6)
	}
	return all
}

// steps make the host's network equal to the plan. In their order no TAP is open to its owner without firewall rules: TAPs are removed
// before rules that no longer know them are loaded, and created after.
func (n *network) steps(context.Context) ([]step, error) {
	h, err := n.survey()
	if err != nil {
		return nil, err
	}
	uid, gid, err := n.owner()
	if err := errors.Join(n.refuse(h), err); err != nil {
		return nil, err
	}
	taps := make([]tap, len(n.plan.Slots))
	for i, s := range n.plan.Slots {
		taps[i] = tap{Slot: s, net: &n.plan.Network, uid: uid, gid: gid, mark: n.mark(), trial: n.opts.Trial}
	}
	work, err := n.sort(h, taps)
	if err != nil {
		return nil, err
	}
	var steps []step
	if len(work.remove) > 0 {
		steps = append(steps, n.removeStep(work))
	}
	steps = append(steps, n.firewallStep(h)...)
	routing, err := n.routingSteps()
	if err != nil {
		return nil, err
	}
	steps = append(steps, routing...)
	steps = append(steps, n.addressSteps(h)...)
	steps = append(steps, n.ruleSteps(h)...)
	if len(work.repair) > 0 {
		steps = append(steps, n.repairStep(work.repair))
	}
	if len(work.create) > 0 {
		steps = append(steps, n.createStep(work))
	}
	return append(steps, n.formerSteps(h)...), nil
}

// refuse finds what must not be touched and what cannot work, before anything changes.
func (n *network) refuse(h *have) error {
	var errs []error
	if _, ok := h.links[n.plan.EgressInterface]; !ok {
		errs = append(errs, fmt.Errorf("egress_interface %q does not exist; this host has: %s", n.plan.EgressInterface,
			strings.Join(h.linkNames(), ", ")))
	}
	others := n.networksUp(h)
	delete(others, n.plan.Paths.State)
	if len(others) > 0 {
		errs = append(errs, fmt.Errorf("the network of another plan is up (%s", describeUp(others)))
	}
	if lo := h.links[loopback]; lo == nil || lo.Attrs().Flags&net.FlagUp == 0 {
		errs = append(errs, errors.New("link lo is down, and the gateway's address lives on it: ip link set lo up"))
	}
	for id, t := range h.tables {
		if t.exists && !t.ours {
			errs = append(errs, fmt.Errorf("%s exists but was not made by fleetingd (its first rule lacks our marker); "+
				"rename it, or delete it: nft delete %s", id, id))
		}
	}
	errs = append(errs, n.overlaps(h)...)
	return errors.Join(append(errs, n.unanswered())...)
}

func prefixOf(n *net.IPNet) netip.Prefix {
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}
	}
	if bits == 32 {
		addr = addr.Unmap()
	}
	return netip.PrefixFrom(addr, ones)
}

// unanswered finds settings under which the kernel would not answer for the gateway.
func (n *network) unanswered() error {
	// The kernel takes the larger of this and the TAP's own.
	if v, err := readSysctl("net/ipv4/conf/all/arp_ignore"); err == nil && v != "0" {
		return fmt.Errorf("sysctl net.ipv4.conf.all.arp_ignore is %s: the host would not answer its workers' ARP for the gateway %s, "+
			"which is on lo; set it to 0, and set it only on the interfaces that need it", v, n.plan.Network.Gateway)
	}
	if n.plan.Network.Subnet6 == nil {
		return nil
	}
	if v, err := readSysctl("net/ipv6/conf/" + loopback + "/disable_ipv6"); err != nil || v != "0" {
		return errors.New("network.subnet6 is set, but this host has no IPv6 (sysctl net.ipv6.conf.lo.disable_ipv6); " +
			"enable IPv6, or omit subnet6")
	}
	return nil
}

// tapWork is what is to be done to TAPs.
type tapWork struct {
	remove, create []tap
	repair         []repair
	why            map[string]string // of those to be removed or created, by name
}

// repair is one of our TAPs that differs from the plan, and what is attached to it.
type repair struct {
	tap     tap
	problem string
	there   attached
}

// sort decides for each TAP whether it stays, is repaired or is recreated.
func (n *network) sort(h *have, want []tap) (*tapWork, error) {
	w := &tapWork{why: map[string]string{}}
	var errs []error
	wanted := make(map[string]bool, len(want))
	for i := range want {
		t := &want[i]
		wanted[t.TAP] = true
		l, ok := h.links[t.TAP]
		if !ok {
			w.create, w.why[t.TAP] = append(w.create, *t), "is missing"
			continue
		}
		if l.Attrs().Alias != t.mark {
			errs = append(errs, fmt.Errorf("TAP %s: a %s link of this name exists and is not ours; rename or delete it", t.TAP, l.Type()))
			continue
		}
		if why := t.mustBeNew(l); why != "" {
			if inUse(l) {
				errs = append(errs, fmt.Errorf("TAP %s %s, but a running VM has it open; end that worker first", t.TAP, why))
				continue
			}
			w.remove, w.create, w.why[t.TAP] = append(w.remove, *t), append(w.create, *t), why
			continue
		}
		there := h.attached[l.Attrs().Index]
		if why := t.lacks(l.Attrs(), there); why != "" {
			w.repair = append(w.repair, repair{*t, why, there})
		}
	}
	for name, l := range h.links {
		if wanted[name] || l.Attrs().Alias != n.mark() {
			continue
		}
		if inUse(l) {
			errs = append(errs, fmt.Errorf("TAP %s is no longer in the plan, but a running VM has it open; end that worker first", name))
			continue
		}
		w.remove = append(w.remove, tap{Slot: plan.Slot{TAP: name}, mark: n.mark()})
		w.why[name] = "is not in the plan"
	}
	slices.SortFunc(w.remove, func(a, b tap) int { return strings.Compare(a.TAP, b.TAP) })
	return w, errors.Join(errs...)
}

// inUse reports whether a process has the TAP open: only then it has a carrier.
func inUse(l netlink.Link) bool {
	if t, ok := l.(*netlink.Tuntap); ok && t.Queues > 0 {
		return true
	}
	return l.Attrs().RawFlags&unix.IFF_LOWER_UP != 0
}

// mustBeNew says how our link differs in what cannot be changed in place.
func (t *tap) mustBeNew(l netlink.Link) string {
	tun, ok := l.(*netlink.Tuntap)
	const known = netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR | netlink.TUNTAP_MULTI_QUEUE
	switch {
	case !ok || tun.Mode != netlink.TUNTAP_MODE_TAP || tun.NonPersist:
		return "is not a persistent TAP"
	case tun.Flags&known != t.flags():
		return fmt.Sprintf("has another number of queues than %d", t.Queues)
	case int(tun.Owner) != t.uid || int(tun.Group) != t.gid:
		return fmt.Sprintf("belongs to %d:%d instead of %d:%d", tun.Owner, tun.Group, t.uid, t.gid)
	}
	return ""
}

// lacks says how our TAP differs in what can be fixed in place.
func (t *tap) lacks(a *netlink.LinkAttrs, there attached) string {
	if a.Flags&net.FlagUp == 0 {
		return "is down"
	}
	if why := t.linkLacks(a); why != "" {
		return why
	}
	want := t.routes(a.Index)
	for _, r := range want {
		if !slices.ContainsFunc(there.routes, func(h netlink.Route) bool { return sameRoute(r, h) }) {
			return fmt.Sprintf("lacks the route to %s", r.Dst)
		}
	}
	for _, r := range there.routes {
		if r.Protocol == routeProtocol && !slices.ContainsFunc(want, func(w netlink.Route) bool { return sameRoute(w, r) }) {
			return fmt.Sprintf("has a route to %s", r.Dst)
		}
	}
	for _, e := range t.neighbours(a.Index) {
		if !slices.ContainsFunc(there.neighs, func(h netlink.Neigh) bool { return sameNeigh(e, h) }) {
			return fmt.Sprintf("lacks the neighbour %s", e.IP)
		}
	}
	for _, s := range t.settings() {
		v, err := readSysctl(s.path)
		if err == nil && v != s.value || err != nil && t.Address6 != nil {
			return fmt.Sprintf("has %s = %q instead of %q", s.path, v, s.value)
		}
	}
	return ""
}

// linkLacks says how the bare link differs in what setLink sets.
func (t *tap) linkLacks(a *netlink.LinkAttrs) string {
	switch {
	case a.HardwareAddr.String() != t.net.HostMAC:
		return fmt.Sprintf("has the MAC address %s instead of %s", a.HardwareAddr, t.net.HostMAC)
	case a.MTU != t.net.MTU:
		return fmt.Sprintf("has an MTU of %d instead of %d", a.MTU, t.net.MTU)
	case a.TxQLen != queueLength:
		return fmt.Sprintf("has a queue of %d packets instead of %d", a.TxQLen, queueLength)
	}
	return ""
}

func sameNeigh(want, have netlink.Neigh) bool {
	if !want.IP.Equal(have.IP) || want.Flags&unix.NTF_PROXY != have.Flags&unix.NTF_PROXY {
		return false
	}
	return want.Flags&unix.NTF_PROXY != 0 || have.State&unix.NUD_PERMANENT != 0 && want.HardwareAddr.String() == have.HardwareAddr.String()
}

// earlier are the TAPs of those names as the last plan that came up had them.
func (n *network) earlier(of []tap) []tap {
	if n.notes.Applied == nil {
		return nil
	}
	uid, gid, err := n.owner()
	if err != nil {
		return nil
	}
	var taps []tap
	for _, s := range n.notes.Applied.Slots {
		if slices.ContainsFunc(of, func(t tap) bool { return t.TAP == s.TAP }) {
			taps = append(taps, tap{Slot: s, net: &n.notes.Applied.Network, uid: uid, gid: gid, mark: n.mark()})
		}
	}
	return taps
}

func (n *network) removeStep(w *tapWork) step {
	s := step{name: fmt.Sprintf("delete %d TAPs", len(w.remove))}
	for _, t := range w.remove {
		s.fixes = append(s.fixes, Difference{Object: "TAP " + t.TAP, Problem: w.why[t.TAP]})
	}
	before := n.earlier(w.remove)
	s.do = func(context.Context) error { return n.door.deleteTAPs(w.remove) }
	s.undo = func(ctx context.Context) error { return n.door.makeTAPs(ctx, before) }
	return s
}

func (n *network) createStep(w *tapWork) step {
	s := step{name: fmt.Sprintf("make %d TAPs", len(w.create))}
	for _, t := range w.create {
		if !slices.ContainsFunc(w.remove, func(r tap) bool { return r.TAP == t.TAP }) {
			s.fixes = append(s.fixes, Difference{Object: "TAP " + t.TAP, Problem: w.why[t.TAP]})
		}
	}
	s.do = func(ctx context.Context) error { return n.door.makeTAPs(ctx, w.create) }
	s.undo = func(context.Context) error { return n.door.deleteTAPs(w.create) }
	return s
}

func (n *network) repairStep(repairs []repair) step {
	s := step{name: fmt.Sprintf("mend %d TAPs", len(repairs))}
	taps := make([]tap, len(repairs))
	for i, r := range repairs {
		taps[i] = r.tap
		s.fixes = append(s.fixes, Difference{Object: "TAP " + r.tap.TAP, Problem: r.problem})
	}
	s.undo = func(context.Context) error {
		back := n.earlier(taps) // without an earlier plan, what is fixed stays fixed
		undo := make([]repair, len(back))
		for i, t := range back {
			l, err := netlink.LinkByName(t.TAP)
			if err != nil {
				return fmt.Errorf("TAP %s: %w", t.TAP, err)
			}
			index := l.Attrs().Index
			now := taps[slices.IndexFunc(taps, func(n tap) bool { return n.TAP == t.TAP })]
			undo[i] = repair{tap: t, there: attached{now.routes(index), now.neighbours(index)}}
		}
		return n.door.repairTAPs(undo)
	}
	s.do = func(ctx context.Context) error {
		err := n.door.repairTAPs(repairs)
		if err != nil { // it may be half done
			return errors.Join(err, s.undo(ctx))
		}
		return nil
	}
	return s
}

func (n *network) firewallStep(h *have) []step {
	s := step{name: "load the firewall"}
	var added []tableID
	for _, t := range n.plan.Network.Ruleset.Tables {
		id := tableID{t.Family, t.Name}
		state := h.tables[id]
		if !state.exists {
			added = append(added, id)
			s.fixes = append(s.fixes, Difference{Object: id.String(), Problem: "is missing"})
		}
		for _, d := range state.diff {
			s.fixes = append(s.fixes, Difference{Object: id.String(), Problem: "differs: " + d})
		}
	}
	if len(s.fixes) == 0 {
		return nil
	}
	s.do = func(context.Context) error { return n.door.load(n.plan.Network.Ruleset, n.plan.Slots) }
	s.undo = func(context.Context) error {
		if last := n.notes.Applied; last != nil {
			return n.door.load(last.Network.Ruleset, last.Slots)
		}
		return n.door.unload(added)
	}
	return []step{s}
}

func (n *network) routingSteps() ([]step, error) {
	var steps []step
	closed, err := n.closedLinks()
	if err != nil {
		return nil, err
	}
	for _, link := range closed {
		steps = append(steps, step{
			name:  "set " + link.path,
			fixes: []Difference{{Object: "sysctl " + strings.ReplaceAll(link.path, "/", "."), Problem: "is off"}},
			do:    func(context.Context) error { return n.door.writeSysctl(setting{link.path, "1"}) },
			undo:  func(context.Context) error { return restoreSysctls(n.door, []setting{link}) },
		})
	}
	for _, f := range n.routing() {
		on, err := f.on()
		if err != nil {
			return nil, err
		}
		if on {
			continue
		}
		before, err := f.before()
		if err != nil {
			return nil, err
		}
		before = append(before, f.advertised()...)
		steps = append(steps, step{
			name:  "set " + f.all,
			fixes: []Difference{{Object: "sysctl " + strings.ReplaceAll(f.all, "/", "."), Problem: "is off"}},
			do: func(context.Context) error {
				if err := f.enable(n.door); err != nil {
					return errors.Join(err, restoreSysctls(n.door, before))
				}
				return nil
			},
			undo: func(context.Context) error { return restoreSysctls(n.door, before) },
		})
	}
	return steps, nil
}

func (n *network) addressSteps(h *have) []step {
	var steps []step
	for _, a := range n.gateways() {
		if slices.Contains(h.addresses, a) {
			continue
		}
		steps = append(steps, step{
			name:  fmt.Sprintf("add %s to %s", a, loopback),
			fixes: []Difference{{Object: "link " + loopback, Problem: "lacks the gateway's address " + a.String()}},
			do:    func(context.Context) error { return n.door.addAddress(a) },
			undo:  func(context.Context) error { return n.door.deleteAddress(a) },
		})
	}
	return steps
}

// ruleSteps add our rules, and delete those of an earlier plan.
func (n *network) ruleSteps(h *have) []step {
	if h.policies == nil {
		return nil
	}
	var steps []step
	want := n.wantRules()
	for _, w := range want {
		if slices.ContainsFunc(h.policies, w.same) {
			continue
		}
		steps = append(steps, step{
			name:  "add the rule " + w.String(),
			fixes: []Difference{{Object: "rule " + w.String(), Problem: "is missing"}},
			do:    func(context.Context) error { return n.door.addRule(w) },
			undo:  func(context.Context) error { return n.door.deleteRule(w) },
		})
	}
	for _, r := range h.policies {
		if !r.isOurs() || slices.ContainsFunc(want, r.same) {
			continue
		}
		steps = append(steps, step{
			name:  "delete the rule " + r.String(),
			fixes: []Difference{{Object: "rule " + r.String(), Problem: "is not in the plan"}},
			do:    func(context.Context) error { return n.door.deleteRule(r) },
			undo:  func(context.Context) error { return n.door.addRule(r) },
		})
	}
	return steps
}

// formerSteps delete the gateway's addresses of an earlier plan: last, because with an address the kernel also deletes the routes that
// have it as their source.
func (n *network) formerSteps(h *have) []step {
	var steps []step
	for _, a := range n.notes.Addresses {
		if slices.Contains(n.gateways(), a) || !slices.Contains(h.addresses, a) {
			continue
		}
		steps = append(steps, step{
			name:  fmt.Sprintf("delete %s from %s", a, loopback),
			fixes: []Difference{{Object: "link " + loopback, Problem: "has the former gateway's address " + a.String()}},
			do:    func(context.Context) error { return n.door.deleteAddress(a) },
			undo:  func(context.Context) error { return n.door.addAddress(a) },
		})
	}
	return steps
}

// down deletes TAPs before rules, so that no worker is ever without them.
func (n *network) down(context.Context) error {
	h, err := n.survey()
	if err != nil {
		return err
	}
	up := n.networksUp(h)
	own := up[n.plan.Paths.State]
	delete(up, n.plan.Paths.State)
	if len(up) > 0 {
		// The tables, and the addresses and settings in the notes, are the other's: all plans of a host share one Paths.Run.
		err := n.door.deleteTAPs(n.marked(n.plan.Paths.State, own))
		if len(own) == 0 {
			err = fmt.Errorf("%w (%s", ErrOtherPlan, describeUp(up))
		}
		return err
	}
	var tables []tableID
	for id, t := range h.tables {
		if t.exists && t.ours {
			tables = append(tables, id)
		}
	}
	return n.takeDown(h, n.marked(n.plan.Paths.State, own), tables)
}

// downAll deletes the networks of all plans, found by what the kernel holds and by the notes.
func (n *network) downAll(context.Context) (map[string][]string, error) {
	h, err := n.survey()
	if err != nil {
		return nil, err
	}
	up := n.networksUp(h)
	var taps []tap
	for state, names := range up {
		taps = append(taps, n.marked(state, names)...)
	}
	tables, err := ourTables()
	if err != nil {
		return nil, err
	}
	return up, n.takeDown(h, taps, tables)
}

// networksUp are the names of the TAPs that are up, in order, by the state folder of the plan that made them.
func (n *network) networksUp(h *have) map[string][]string {
	up := map[string][]string{}
	for name, l := range h.links {
		if state, ok := strings.CutPrefix(l.Attrs().Alias, linkMark); ok {
			up[state] = append(up[state], name)
		}
	}
	for _, names := range up {
		slices.Sort(names)
	}
	return up
}

// describeUp names the networks of other plans and how to take them down.
func describeUp(up map[string][]string) string {
	var parts []string
	for _, state := range slices.Sorted(maps.Keys(up)) {
		parts = append(parts, fmt.Sprintf("state_dir %s: TAP %s and %d more", state, up[state][0], len(up[state])-1))
	}
	return strings.Join(parts, "; ") + "); `fleetingd network down --all` takes it down"
}

func (n *network) marked(state string, names []string) []tap {
	taps := make([]tap, len(names))
	for i, name := range names {
		taps[i] = tap{Slot: plan.Slot{TAP: name}, mark: linkMark + state}
	}
	return taps
}

// takeDown deletes the last network of fleetingd's on this host, and all that hangs on it. The order is down's.
func (n *network) takeDown(h *have, taps []tap, tables []tableID) error {
	addresses := slices.Clone(n.notes.Addresses)
	for _, r := range h.routes { // should the notes be lost: the gateway is the source of its workers' routes
		src, _ := netip.AddrFromSlice(r.Src)
		src = src.Unmap()
		if r.Protocol == routeProtocol && slices.Contains(h.addresses, src) && !slices.Contains(addresses, src) {
			addresses = append(addresses, src)
		}
	}
	if err := n.door.deleteTAPs(taps); err != nil {
		return err // the rules stay with the TAPs
	}
	var errs []error
	for _, r := range h.policies {
		if !r.isOurs() {
			continue
		}
		errs = append(errs, n.door.deleteRule(r))
		if len(taps) > 0 {
			errs = append(errs, n.door.forget(r.dst))
		}
	}
	if len(tables) > 0 {
		errs = append(errs, n.door.unload(tables))
	}
	for _, a := range addresses {
		errs = append(errs, n.door.deleteAddress(a))
	}
	var before []setting
	routes4, err := forwarding4.on()
	errs = append(errs, err)
	for _, s := range n.notes.Sysctls {
		// A trial turned on single links' IPv4 forwarding. If the host routes now, somebody else has turned on all of them.
		if n.notes.Trial && routes4 && strings.HasPrefix(s.Path, forwarding4.conf) {
			continue
		}
		before = append(before, setting{s.Path, s.Value})
	}
	errs = append(errs, restoreSysctls(n.door, before))
	if err := errors.Join(errs...); err != nil {
		return err // the notes stay for the next try
	}
	return writeNotes(n.plan, &notes{})
}
