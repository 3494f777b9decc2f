package host

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	nfnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// A packet trial finds out whether another firewall drops what the host forwards for its workers, by sending real packets through the
// kernel. They come in by a link of the trial's own and are dropped at the end of postrouting, so that none leaves the host; the kernel's
// trace tells which chain dropped one before that. All of it ends with the process: links with their descriptors, routes with their
// link, the table with its owner's socket.

// blockade is what stopped a packet.
type blockade struct {
	family, table string
	chain         string   // the one that dropped it
	handle        uint64   // of the rule that did; 0: the chain's policy
	base, hook    string   // the chain at a hook that led there, and its hook: "forward"
	chains        []string // all of the table's, by which its owner is known
	untraced      bool     // no chain of nftables dropped it
	routed        bool     // it got as far as the forward hook
	answer        bool     // it was an answer from the internet
	six           bool     // it was an IPv6 packet
	astray        string   // nothing stopped it, but it left by this link instead of the plan's
}

// trialPatience is how long a packet may be on its way. The kernel needs microseconds; a program behind a queue may need more.
const trialPatience = 500 * time.Millisecond

const (
	trialTable = "fleetingd-doctor"
	trialWAN   = "doctor-wan" // the link that answers come in by
	// The first and the last chain at a hook: before all others, and after all but the confirmation of a connection (INT_MAX).
	priorityFirst = -1 << 31
	priorityLast  = 1<<31 - 2
	nftOwner      = 0x2 // NFT_TABLE_F_OWNER: the table goes with the socket that made it (Linux 5.12)
	traceGroup    = 9   // NFNLGRP_NFTRACE
)

// trialInternet are the addresses that answers come from: they are for benchmarks (RFC 2544, RFC 5180), and so nobody's.
var trialInternet = map[bool]netip.Addr{false: netip.MustParseAddr("198.18.0.1"), true: netip.MustParseAddr("2001:2::1")}

// tryPackets sends a packet as if from a worker to the internet, and where that passes, an answer to another. It returns nil where
// nothing stops them. It works in the network namespace of the calling thread, and stays on that thread.
func tryPackets(p *plan.Plan, six bool) (*blockade, error) {
	worker, err := freeAddress(p, six)
	if err != nil {
		return nil, err
	}
	in, err := openTrialLink(trialLink(p), worker)
	if err != nil {
		return nil, err
	}
	defer in.remove()
	dst := internet4[0]
	if six {
		dst = internet6[0]
	}
	syn := segment{netip.AddrPortFrom(worker, 40000), netip.AddrPortFrom(dst, 443), tcpSYN}
	b, out, err := in.judge(syn)
	if b != nil || err != nil {
		return b, err
	}
	if l, err := netlink.LinkByIndex(out); err == nil && l.Attrs().Name != p.EgressInterface {
		return &blockade{astray: l.Attrs().Name, six: six}, nil
	}
	wan, err := openTrialLink(trialWAN, trialInternet[six])
	if err != nil {
		return nil, err
	}
	defer wan.remove()
	defer forgetTrial(worker)
	syn.to = netip.AddrPortFrom(trialInternet[six], 443)
	if _, err := in.Write(syn.packet()); err != nil {
		return nil, fmt.Errorf("send a packet into %s: %w", in.name, err)
	}
	seen, ok := wan.receive()
	if !ok {
		return nil, nil // what is at home on this host only lets packets out by the links that it knows
	}
	b, _, err = wan.judge(segment{syn.to, seen, tcpSYN | tcpACK})
	if b != nil {
		b.answer = true
	}
	return b, err
}

// freeAddress is an address of the workers' subnet that is no slot's and not the gateway's.
func freeAddress(p *plan.Plan, six bool) (netip.Addr, error) {
	subnet := p.Network.Subnet
	if six {
		subnet = *p.Network.Subnet6
	}
	b := subnet.Addr().AsSlice()
	for i := subnet.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	gateways := (&network{plan: p}).gateways()
	for _, a := range []netip.Addr{last.Prev(), last, subnet.Addr()} {
		taken := slices.Contains(gateways, a) || slices.ContainsFunc(p.Slots, func(s plan.Slot) bool {
			return s.Address == a || s.Address6 != nil && *s.Address6 == a
		})
		if !taken {
			return a, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("every address of %s is taken", subnet)
}

// trialLink is named like the TAPs, so that another firewall's rules for those (iifname "fleet*") match it.
func trialLink(p *plan.Plan) string {
	prefix := trialPrefix(p)
	return prefix[:min(len(prefix), unix.IFNAMSIZ-1-len("doctor"))] + "doctor"
}

// trialPrefix is what the names of all TAPs begin with.
func trialPrefix(p *plan.Plan) string {
	if len(p.Slots) == 0 {
		return "fleet"
	}
	return strings.TrimRight(p.Slots[0].TAP, "0123456789")
}

// trialTUN is a link that takes bare IP packets from its file, and lives as long as that.
type trialTUN struct {
	*os.File
	name  string
	index int
}

// errNotForwarding is that the trial would have to turn routing on for the whole host.
var errNotForwarding = errors.New("this host does not forward IPv6 yet")

// openTrialLink makes a link that forwards, whatever the rest of the host does, with a route to one address.
func openTrialLink(name string, addr netip.Addr) (t *trialTUN, err error) {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_TUN_EXCL)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		for end := time.Now().Add(4 * trialPatience); errors.Is(err, unix.EBUSY) && time.Now().Before(end); {
			time.Sleep(20 * time.Millisecond) // another doctor is at work
			req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_TUN_EXCL)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make the link %s: %w", name, err), unix.Close(fd))
	}
	t = &trialTUN{File: os.NewFile(uintptr(fd), name), name: name} // after TUNSETIFF: before, the file cannot be polled
	defer func() {
		if err != nil {
			t.remove()
		}
	}()
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("link %s: %w", name, err)
	}
	t.index = link.Attrs().Index
	if err := t.forward(addr.Is6()); err != nil {
		return nil, err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("bring %s up: %w", name, err)
	}
	r := &netlink.Route{LinkIndex: t.index, Dst: single(addr), Protocol: routeProtocol, Table: unix.RT_TABLE_MAIN}
	if addr.Is4() {
		r.Scope = netlink.SCOPE_LINK
	}
	if err := netlink.RouteAdd(r); err != nil {
		return nil, fmt.Errorf("route to %s by %s: %w", addr, name, err)
	}
	return t, nil
}

// remove deletes the link at once. Its file alone would do, but a program that this process starts just now may have it for a moment too.
func (t *trialTUN) remove() {
	if t.index != 0 {
		_ = netlink.LinkDel(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: t.index, Name: t.name}})
	}
	_ = t.Close()
}

func (t *trialTUN) forward(six bool) error {
	k := &kernel{}
	conf := func(family, key, value string) error {
		return k.writeSysctl(setting{"net/" + family + "/conf/" + t.name + "/" + key, value})
	}
	if !six {
		// Loose: what rp_filter does to the real links is for the route lookup to say.
		err := errors.Join(conf("ipv4", "forwarding", "1"), conf("ipv4", "rp_filter", "2"))
		if six := conf("ipv6", "disable_ipv6", "1"); !errors.Is(six, fs.ErrNotExist) {
			err = errors.Join(err, six)
		}
		return err
	}
	on, err := forwarding6.on()
	if err == nil && !on {
		err = conf("ipv6", "force_forwarding", "1") // Linux 6.17
		if errors.Is(err, fs.ErrNotExist) {
			return errNotForwarding
		}
	}
	return errors.Join(err, conf("ipv6", "accept_ra", "0"))
}

// receive is who the first TCP segment that leaves by the link seems to come from.
func (t *trialTUN) receive() (netip.AddrPort, bool) {
	if err := t.SetReadDeadline(time.Now().Add(trialPatience)); err != nil {
		return netip.AddrPort{}, false
	}
	b := make([]byte, 2048)
	for {
		n, err := t.Read(b)
		if err != nil {
			return netip.AddrPort{}, false
		}
		if s, ok := parseSegment(b[:n]); ok {
			return s.from, true
		}
	}
}

// judge sends a packet into the kernel by the link, and says what stopped it on its way through, or by which link it was to leave (0: not
// known).
func (t *trialTUN) judge(s segment) (b *blockade, out int, err error) {
	w, err := watch(t.name, s.to.Addr().Is6())
	if err != nil {
		return nil, 0, err
	}
	defer w.close()
	if _, err := t.Write(s.packet()); err != nil {
		return nil, 0, fmt.Errorf("send a packet into %s: %w", t.name, err)
	}
	var steps []traced
	for end := time.Now().Add(trialPatience); ; {
		passed, err := w.counted(w.last)
		if err != nil {
			return nil, 0, err
		}
		more, err := w.read(trialPatience / 10)
		if err != nil {
			return nil, 0, err
		}
		steps = append(steps, more...)
		last := slices.IndexFunc(steps, func(s traced) bool { return s.table == trialTable && s.chain == w.last.Name && s.out != 0 })
		if last >= 0 {
			return nil, int(steps[last].out), nil
		}
		over := time.Now().After(end)
		if over && more == nil && passed {
			return nil, 0, nil
		}
		if !slices.ContainsFunc(steps, traced.dropped) && (!over || more != nil || passed) {
			continue
		}
		routed, err := w.counted(w.first)
		if err != nil {
			return nil, 0, err
		}
		b, err := w.blame(steps, routed)
		return b, 0, err
	}
}

// watcher is the trial's table and the kernel's traces of what comes in by one link.
type watcher struct {
	six         bool
	nft         *nftables.Conn
	table       *nftables.Table
	owned       bool
	first, last *nftables.Chain // count what gets to the forward hook, and what gets through, which ends there
	trace       *nfnetlink.Conn
}

func watch(link string, six bool) (_ *watcher, err error) {
	w := &watcher{six: six, table: &nftables.Table{Family: nftables.TableFamilyINet, Name: trialTable}}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	var socket *nfnetlink.Conn
	w.nft, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *nfnetlink.Conn) error { socket = c; return nil }))
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	if w.owned = ownTable(socket, trialTable) == nil; !w.owned {
		w.nft.AddTable(w.table)
		w.nft.DelTable(w.table)
		w.nft.AddTable(w.table)
	}
	ifname, err := name(link)
	if err != nil {
		return nil, err
	}
	chain := func(name string, hook *nftables.ChainHook, priority nftables.ChainPriority, then ...expr.Any) *nftables.Chain {
		c := w.nft.AddChain(&nftables.Chain{Table: w.table, Name: name, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: &priority})
		w.nft.AddRule(&nftables.Rule{Table: w.table, Chain: c, Exprs: append([]expr.Any{
			&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: unix.NFT_REG_1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: ifname},
		}, then...)})
		return c
	}
	chain("trace", nftables.ChainHookPrerouting, priorityFirst, &expr.Immediate{Register: unix.NFT_REG_1, Data: []byte{1}},
		&expr.Meta{Key: expr.MetaKeyNFTRACE, SourceRegister: true, Register: unix.NFT_REG_1})
	w.first = chain("first", nftables.ChainHookForward, priorityFirst, &expr.Counter{})
	w.last = chain("last", nftables.ChainHookPostrouting, priorityLast, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop})
	if err := w.nft.Flush(); err != nil {
		return nil, fmt.Errorf("nftables: make the table inet %s: %w", trialTable, err)
	}
	if w.trace, err = nfnetlink.Dial(unix.NETLINK_NETFILTER, nil); err == nil {
		err = w.trace.JoinGroup(traceGroup)
	}
	if err != nil {
		return nil, fmt.Errorf("listen to the kernel's packet traces: %w", err)
	}
	return w, nil
}

// ownTable makes an inet table that the kernel deletes when the socket closes.
func ownTable(c *nfnetlink.Conn, name string) error {
	header := func(family byte, resource uint16) []byte {
		return binary.BigEndian.AppendUint16([]byte{family, unix.NFNETLINK_V0}, resource)
	}
	attrs, err := nfnetlink.MarshalAttributes([]nfnetlink.Attribute{
		{Type: unix.NFTA_TABLE_NAME, Data: append([]byte(name), 0)},
		{Type: unix.NFTA_TABLE_FLAGS, Data: binary.BigEndian.AppendUint32(nil, nftOwner)},
	})
	if err != nil {
		return err
	}
	const newTable = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWTABLE
	sent, err := c.SendMessages([]nfnetlink.Message{
		{Header: nfnetlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: nfnetlink.Request}, Data: header(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)},
		{Header: nfnetlink.Header{Type: newTable, Flags: nfnetlink.Request | nfnetlink.Acknowledge | nfnetlink.Create | nfnetlink.Excl},
			Data: append(header(unix.NFPROTO_INET, 0), attrs...)},
		{Header: nfnetlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: nfnetlink.Request}, Data: header(unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES)},
	})
	if err != nil {
		return err
	}
	answers, err := c.Receive() // one: the acknowledgement, or the error
	if err == nil && (len(answers) != 1 || len(sent) != 3) {
		err = fmt.Errorf("%d answers", len(answers))
	}
	return err
}

func (w *watcher) close() {
	if w.nft != nil {
		if !w.owned {
			w.nft.DelTable(w.table)
			_ = w.nft.Flush() // it is not there where making it failed
		}
		_ = w.nft.CloseLasting()
	}
	if w.trace != nil {
		_ = w.trace.Close()
	}
}

// counted reports whether a chain of the trial's has seen the packet.
func (w *watcher) counted(c *nftables.Chain) (bool, error) {
	rules, err := w.nft.GetRules(w.table, c)
	if err != nil {
		return false, fmt.Errorf("nftables: table inet %s: %w", trialTable, err)
	}
	for _, r := range rules {
		for _, e := range r.Exprs {
			if counter, ok := e.(*expr.Counter); ok && counter.Packets > 0 {
				return true, nil
			}
		}
	}
	return false, nil
}

// traced is a step of the packet through nftables, as the kernel's trace has it (linux/netfilter/nf_tables.h, NFTA_TRACE_*).
type traced struct {
	family       nftables.TableFamily
	table, chain string
	handle       uint64
	kind         uint32 // NFT_TRACETYPE_*: policy 1, return 2, rule 3
	verdict      uint32
	policy       uint32
	out          uint32 // the link that it is to leave by, in the first step of each chain at a hook
}

const (
	tracePolicy  = 1
	verdictDrop  = 0 // NF_DROP
	verdictUnset = 1 << 30
)

func (s traced) dropped() bool {
	v := s.verdict
	if s.kind == tracePolicy {
		v = s.policy
	}
	return v == verdictDrop && s.table != trialTable
}

// read waits so long for traces.
func (w *watcher) read(patience time.Duration) ([]traced, error) {
	if err := w.trace.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return nil, fmt.Errorf("packet traces: %w", err)
	}
	messages, err := w.trace.Receive()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("packet traces: %w", err)
	}
	var steps []traced
	for _, m := range messages {
		if len(m.Data) < 4 {
			continue
		}
		s, err := parseTrace(m.Data)
		if err != nil {
			return nil, fmt.Errorf("packet traces: %w", err)
		}
		steps = append(steps, s)
	}
	return steps, nil
}

func parseTrace(b []byte) (traced, error) {
	s := traced{family: nftables.TableFamily(b[0]), verdict: verdictUnset, policy: verdictUnset}
	ad, err := nfnetlink.NewAttributeDecoder(b[4:])
	if err != nil {
		return s, err
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_TRACE_TABLE:
			s.table = ad.String()
		case unix.NFTA_TRACE_CHAIN:
			s.chain = ad.String()
		case unix.NFTA_TRACE_RULE_HANDLE:
			s.handle = ad.Uint64()
		case unix.NFTA_TRACE_TYPE:
			s.kind = ad.Uint32()
		case unix.NFTA_TRACE_OIF:
			s.out = ad.Uint32()
		case unix.NFTA_TRACE_POLICY:
			s.policy = ad.Uint32()
		case unix.NFTA_TRACE_VERDICT:
			ad.Nested(func(v *nfnetlink.AttributeDecoder) error {
				for v.Next() {
					if v.Type() == unix.NFTA_VERDICT_CODE {
						s.verdict = v.Uint32()
					}
				}
				return nil
			})
		}
	}
	return s, ad.Err()
}

// blame finds what dropped the packet in the steps that it took.
func (w *watcher) blame(steps []traced, routed bool) (*blockade, error) {
	b := &blockade{untraced: true, routed: routed, six: w.six}
	i := slices.IndexFunc(steps, traced.dropped)
	if i < 0 {
		return b, nil
	}
	at := steps[i]
	b.untraced, b.family, b.table, b.chain, b.handle = false, familyName(at.family), at.table, at.chain, at.handle
	if at.kind == tracePolicy {
		b.handle = 0
	}
	chains, err := w.nft.ListChainsOfTableFamily(at.family)
	if err != nil {
		return nil, fmt.Errorf("nftables: list chains: %w", err)
	}
	hooks := map[string]string{}
	for _, c := range chains {
		if c.Table.Name != at.table {
			continue
		}
		b.chains = append(b.chains, c.Name)
		if c.Hooknum != nil {
			hooks[c.Name] = hookName(*c.Hooknum)
		}
	}
	// Jumps are steps too: the last base chain of that table before the drop is the one that led there.
	for _, s := range steps[:i+1] {
		if hook, ok := hooks[s.chain]; ok && s.table == at.table && s.family == at.family {
			b.base, b.hook = s.chain, hook
		}
	}
	return b, nil
}

func familyName(f nftables.TableFamily) string {
	names := map[nftables.TableFamily]string{nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip",
		nftables.TableFamilyIPv6: "ip6", nftables.TableFamilyNetdev: "netdev", nftables.TableFamilyBridge: "bridge"}
	return names[f]
}

func hookName(h nftables.ChainHook) string {
	names := []string{"prerouting", "input", "forward", "output", "postrouting", "ingress"} // NF_INET_*
	if int(h) < len(names) {
		return names[h]
	}
	return "hook " + fmt.Sprint(h)
}

// forgetTrial deletes the connection that the trial began. What cannot be deleted ends by itself within a minute or two.
func forgetTrial(worker netip.Addr) {
	k, err := openKernel()
	if err != nil {
		return
	}
	defer k.close()
	_ = k.forget(netip.PrefixFrom(worker, worker.BitLen()))
}
