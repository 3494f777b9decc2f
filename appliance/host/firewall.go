package host

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// ruleMark begins the comment of the first rule of each table's first hook: a table of our name without it is
// somebody else's.
const ruleMark = "fleetingd"

// metaIIFKind is NFT_META_IIFKIND of linux/netfilter/nf_tables.h, which neither x/sys nor google/nftables names.
const metaIIFKind = expr.MetaKey(26)

// connlimitOver is NFT_CONNLIMIT_F_INV: the expression matches above its count.
const connlimitOver = 1

const (
	// elementsAMessage keeps a set's elements below the 64 KiB that one netlink attribute holds.
	elementsAMessage = 500
	// batchBuffer takes a whole ruleset in one message to the kernel: 4,000 slots with IPv6 are 750 kB.
	batchBuffer = 8 << 20
)

// firewall is a Ruleset in the terms of google/nftables.
type firewall struct {
	tables []*fwTable
}

type fwTable struct {
	table  *nftables.Table
	sets   []*fwSet
	chains []*fwChain
}

type fwSet struct {
	set      *nftables.Set
	elements []nftables.SetElement
}

type fwChain struct {
	chain *nftables.Chain
	rules []*nftables.Rule
}

var families = map[string]nftables.TableFamily{
	"inet": nftables.TableFamilyINet,
	"arp":  nftables.TableFamilyARP,
}

// translate makes a ruleset ready to be sent, or says what in it is not understood.
func translate(r plan.Ruleset, slots []plan.Slot) (*firewall, error) {
	fw := &firewall{}
	for _, t := range r.Tables {
		family, ok := families[t.Family]
		if !ok {
			return nil, fmt.Errorf("ruleset: table %s has the unknown family %q", t.Name, t.Family)
		}
		ft := &fwTable{table: &nftables.Table{Family: family, Name: t.Name}}
		for _, s := range t.Sets {
			fs, err := translateSet(ft.table, s, slots)
			if err != nil {
				return nil, fmt.Errorf("ruleset: set %s: %w", s.Name, err)
			}
			ft.sets = append(ft.sets, fs)
		}
		for _, c := range t.Chains {
			fc, err := translateChain(ft.table, c)
			if err != nil {
				return nil, fmt.Errorf("ruleset: chain %s: %w", c.Name, err)
			}
			ft.chains = append(ft.chains, fc)
		}
		fw.tables = append(fw.tables, ft)
	}
	return fw, nil
}

var dataTypes = map[plan.DataType]nftables.SetDatatype{
	plan.TypeIFName: nftables.TypeIFName,
	plan.TypeIPv4:   nftables.TypeIPAddr,
	plan.TypeIPv6:   nftables.TypeIP6Addr,
	plan.TypePort:   nftables.TypeInetService,
	plan.TypeICMP:   nftables.TypeICMPType,
	plan.TypeICMPv6: nftables.TypeICMP6Type,
}

func translateSet(t *nftables.Table, s plan.Set, slots []plan.Slot) (*fwSet, error) {
	var types []nftables.SetDatatype
	for _, k := range s.Key {
		dt, ok := dataTypes[k]
		if !ok {
			return nil, fmt.Errorf("unknown type %q", k)
		}
		types = append(types, dt)
	}
	if len(types) == 0 || s.Interval && len(types) != 1 {
		return nil, errors.New("its key must have one type, or several where it has no intervals")
	}
	key, err := nftables.ConcatSetType(types...)
	if err != nil {
		return nil, err
	}
	fs := &fwSet{set: &nftables.Set{Table: t, Name: s.Name, KeyType: key, Interval: s.Interval}}
	if s.Dynamic {
		fs.set.Dynamic, fs.set.Size = true, plan.DynamicSize
	}
	if len(types) == 1 {
		fs.set.KeyType = types[0]
		// What nft declares: names are strings in the host's order, all else is big-endian.
		fs.set.KeyByteOrder = binaryutil.BigEndian
		if s.Key[0] == plan.TypeIFName {
			fs.set.KeyByteOrder = binaryutil.NativeEndian
		}
	}
	for _, value := range s.Values(slots) {
		if s.Interval {
			first, last, err := bounds(s.Key[0], value[0])
			if err != nil {
				return nil, err
			}
			fs.elements = append(fs.elements, interval(first, last)...)
			continue
		}
		var k []byte
		for i, part := range value {
			b, err := encode(s.Key[i], part)
			if err != nil {
				return nil, err
			}
			k = append(k, b...)
		}
		fs.elements = append(fs.elements, nftables.SetElement{Key: k})
	}
	if s.Interval && len(fs.elements) > 0 && !zero(fs.elements[0].Key) {
		// nft closes the interval before the first; without it `nft list` shows another set.
		fs.elements = append([]nftables.SetElement{{Key: make([]byte, fs.set.KeyType.Bytes), IntervalEnd: true}}, fs.elements...)
	}
	return fs, nil
}

// interval is [first, last] as the kernel keeps it: a start and an excluded end, or no
// end where last is the highest value.
func interval(first, last []byte) []nftables.SetElement {
	elements := []nftables.SetElement{{Key: first}}
	if end, ok := next(last); ok {
		elements = append(elements, nftables.SetElement{Key: end, IntervalEnd: true})
	}
	return elements
}

// next is b plus one, big-endian; false where there is none.
func next(b []byte) ([]byte, bool) {
	b = slices.Clone(b)
	for i := len(b) - 1; i >= 0; i-- {
		if b[i]++; b[i] != 0 {
			return b, true
		}
	}
	return nil, false
}

func zero(b []byte) bool { return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) }

// bounds are the first and last value of "10.0.0.0/8", "9000-9001" or a single value.
func bounds(t plan.DataType, value string) (first, last []byte, err error) {
	if a, b, ok := strings.Cut(value, "-"); ok {
		if first, err = encode(t, a); err == nil {
			last, err = encode(t, b)
		}
		return first, last, err
	}
	if strings.Contains(value, "/") {
		p, err := netip.ParsePrefix(value)
		if err != nil || p.Masked() != p {
			return nil, nil, fmt.Errorf("%q is not a network", value)
		}
		last := p.Addr().AsSlice()
		for i := p.Bits(); i < len(last)*8; i++ {
			last[i/8] |= 0x80 >> (i % 8)
		}
		return p.Addr().AsSlice(), last, nil
	}
	first, err = encode(t, value)
	return first, first, err
}

// encode is a value as it lies in a register.
func encode(t plan.DataType, value string) ([]byte, error) {
	bad := func() ([]byte, error) { return nil, fmt.Errorf("%q is not of type %s", value, t) }
	switch t {
	case plan.TypeIFName:
		return name(value)
	case plan.TypeIPv4, plan.TypeIPv6:
		a, err := netip.ParseAddr(value)
		if err != nil || a.Is4() != (t == plan.TypeIPv4) || a.Zone() != "" {
			return bad()
		}
		return a.AsSlice(), nil
	case plan.TypePort:
		n, err := strconv.ParseUint(value, 10, 16)
		if err != nil {
			return bad()
		}
		return binary.BigEndian.AppendUint16(nil, uint16(n)), nil
	case plan.TypeICMP, plan.TypeICMPv6:
		n, err := strconv.ParseUint(value, 10, 8)
		if err != nil {
			return bad()
		}
		return []byte{byte(n)}, nil
	}
	return bad()
}

// name is an interface's name, or a link's kind, padded to IFNAMSIZ.
func name(s string) ([]byte, error) {
	if s == "" || len(s) >= unix.IFNAMSIZ {
		return nil, fmt.Errorf("%q is not the name of an interface", s)
	}
	return append([]byte(s), make([]byte, unix.IFNAMSIZ-len(s))...), nil
}

var hooks = map[string]*nftables.ChainHook{
	"inet prerouting":  nftables.ChainHookPrerouting,
	"inet input":       nftables.ChainHookInput,
	"inet forward":     nftables.ChainHookForward,
	"inet postrouting": nftables.ChainHookPostrouting,
	"arp input":        nftables.ChainHookRef(0), // NF_ARP_IN
}

func translateChain(t *nftables.Table, c plan.Chain) (*fwChain, error) {
	fc := &fwChain{chain: &nftables.Chain{Table: t, Name: c.Name}}
	if c.Hook != "" {
		family := "inet"
		if t.Family == nftables.TableFamilyARP {
			family = "arp"
		}
		hook, ok := hooks[family+" "+c.Hook]
		if !ok {
			return nil, fmt.Errorf("the family %s has no hook %q", family, c.Hook)
		}
		if c.Type != string(nftables.ChainTypeFilter) && c.Type != string(nftables.ChainTypeNAT) {
			return nil, fmt.Errorf("unknown type %q", c.Type)
		}
		accept := nftables.ChainPolicyAccept
		fc.chain.Type, fc.chain.Hooknum, fc.chain.Policy = nftables.ChainType(c.Type), hook, &accept
		fc.chain.Priority = nftables.ChainPriorityRef(nftables.ChainPriority(c.Priority))
	}
	for i, r := range c.Rules {
		exprs, err := translateRule(r)
		if err != nil {
			return nil, fmt.Errorf("rule %d (%s): %w", i+1, r.Comment, err)
		}
		fc.rules = append(fc.rules, &nftables.Rule{Table: t, Chain: fc.chain, Exprs: exprs,
			UserData: userdata.AppendString(nil, userdata.TypeComment, r.Comment)})
	}
	return fc, nil
}

// ruleBuilder makes the expressions of one rule. What a field takes for granted (that the packet is IPv4, that it
// is TCP) is asked once, as nft does.
type ruleBuilder struct {
	exprs []expr.Any
	asked map[expr.MetaKey]byte
}

func translateRule(r plan.Rule) ([]expr.Any, error) {
	b := ruleBuilder{asked: map[expr.MetaKey]byte{}}
	for _, m := range r.Matches {
		if err := b.match(m); err != nil {
			return nil, fmt.Errorf("%s: %w", m, err)
		}
	}
	if r.Counter {
		b.add(&expr.Counter{})
	}
	switch r.Verdict.Action {
	case plan.Accept:
		b.add(&expr.Verdict{Kind: expr.VerdictAccept})
	case plan.Drop:
		b.add(&expr.Verdict{Kind: expr.VerdictDrop})
	case plan.Goto:
		b.add(&expr.Verdict{Kind: expr.VerdictGoto, Chain: r.Verdict.Chain})
	case plan.Masquerade:
		b.add(&expr.Masq{})
	case plan.Reject:
		b.add(&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED})
	default:
		return nil, fmt.Errorf("unknown verdict %q", r.Verdict.Action)
	}
	return b.exprs, nil
}

func (b *ruleBuilder) add(e ...expr.Any) { b.exprs = append(b.exprs, e...) }

// field says how a part of a packet is loaded.
type field struct {
	meta   expr.MetaKey // where kind is loadMeta
	kind   loadKind
	base   expr.PayloadBase
	offset uint32
	length uint32
	needs  []question
	encode func(string) ([]byte, error)
}

type loadKind int

const (
	loadMeta loadKind = iota
	loadPayload
	loadCTState
)

// question is one about the packet without which a field's offset means nothing.
type question struct {
	key   expr.MetaKey
	value byte
}

var (
	needIPv4  = question{expr.MetaKeyNFPROTO, unix.NFPROTO_IPV4}
	needIPv6  = question{expr.MetaKeyNFPROTO, unix.NFPROTO_IPV6}
	needEther = question{expr.MetaKeyIIFTYPE, unix.ARPHRD_ETHER}
)

func l4(protocol byte) question { return question{expr.MetaKeyL4PROTO, protocol} }

func meta(k expr.MetaKey) field {
	return field{kind: loadMeta, meta: k, length: unix.IFNAMSIZ, encode: name}
}

func payload(base expr.PayloadBase, offset, length uint32, enc func(string) ([]byte, error), needs ...question) field {
	return field{kind: loadPayload, base: base, offset: offset, length: length, encode: enc, needs: needs}
}

func typed(t plan.DataType) func(string) ([]byte, error) {
	return func(v string) ([]byte, error) { return encode(t, v) }
}

// fields are all that a Match may look at. Offsets are those of RFC 791, 8200, 826 and of Ethernet.
var fields = map[plan.Field]field{
	plan.IIFKind:     meta(metaIIFKind),
	plan.IIFName:     meta(expr.MetaKeyIIFNAME),
	plan.OIFName:     meta(expr.MetaKeyOIFNAME),
	plan.CTState:     {kind: loadCTState, length: 4, encode: ctState},
	plan.EtherSource: payload(expr.PayloadBaseLLHeader, 6, 6, mac, needEther),
	plan.IPSource:    payload(expr.PayloadBaseNetworkHeader, 12, 4, typed(plan.TypeIPv4), needIPv4),
	plan.IPDest:      payload(expr.PayloadBaseNetworkHeader, 16, 4, typed(plan.TypeIPv4), needIPv4),
	plan.IP6Source:   payload(expr.PayloadBaseNetworkHeader, 8, 16, typed(plan.TypeIPv6), needIPv6),
	plan.IP6Dest:     payload(expr.PayloadBaseNetworkHeader, 24, 16, typed(plan.TypeIPv6), needIPv6),
	plan.ICMPKind:    payload(expr.PayloadBaseTransportHeader, 0, 1, typed(plan.TypeICMP), needIPv4, l4(unix.IPPROTO_ICMP)),
	plan.ICMPv6Kind:  payload(expr.PayloadBaseTransportHeader, 0, 1, typed(plan.TypeICMPv6), needIPv6, l4(unix.IPPROTO_ICMPV6)),
	plan.TCPDest:     payload(expr.PayloadBaseTransportHeader, 2, 2, typed(plan.TypePort), l4(unix.IPPROTO_TCP)),
	plan.UDPDest:     payload(expr.PayloadBaseTransportHeader, 2, 2, typed(plan.TypePort), l4(unix.IPPROTO_UDP)),

	plan.ARPOperation: payload(expr.PayloadBaseNetworkHeader, 6, 2, arpOperation),
	plan.ARPSourceMAC: payload(expr.PayloadBaseNetworkHeader, 8, 6, mac),
	plan.ARPSourceIP:  payload(expr.PayloadBaseNetworkHeader, 14, 4, typed(plan.TypeIPv4)),
	plan.ARPTargetIP:  payload(expr.PayloadBaseNetworkHeader, 24, 4, typed(plan.TypeIPv4)),
}

func mac(s string) ([]byte, error) {
	m, err := net.ParseMAC(s)
	if err != nil || len(m) != 6 {
		return nil, fmt.Errorf("%q is not a MAC address", s)
	}
	return m, nil
}

func arpOperation(s string) ([]byte, error) {
	if s != "request" {
		return nil, fmt.Errorf("unknown ARP operation %q", s)
	}
	return []byte{0, 1}, nil // RFC 826's ares_op$REQUEST
}

func ctState(s string) ([]byte, error) {
	bits := map[string]uint32{
		"invalid": expr.CtStateBitINVALID, "established": expr.CtStateBitESTABLISHED, "related": expr.CtStateBitRELATED,
	}
	bit, ok := bits[s]
	if !ok {
		return nil, fmt.Errorf("unknown connection state %q", s)
	}
	return binaryutil.NativeEndian.PutUint32(bit), nil
}

func (b *ruleBuilder) match(m plan.Match) error {
	if len(m.Fields) == 0 || (m.Set == "") == (m.Value == "") || m.Set == "" && len(m.Fields) != 1 {
		return errors.New("a match needs fields and a set, or one field and a value")
	}
	var loads []field
	for _, f := range m.Fields {
		fd, ok := fields[f]
		if !ok {
			return fmt.Errorf("unknown field %q", f)
		}
		for _, n := range fd.needs {
			b.ask(n)
		}
		loads = append(loads, fd)
	}
	if m.Set != "" {
		return b.lookup(m, loads)
	}
	return b.compare(loads[0], m.Value, m.Not)
}

func (b *ruleBuilder) ask(n question) {
	if b.asked[n.key] == n.value {
		return
	}
	b.asked[n.key] = n.value
	value := []byte{n.value}
	if n.key == expr.MetaKeyIIFTYPE {
		value = binaryutil.NativeEndian.PutUint16(uint16(n.value))
	}
	b.add(&expr.Meta{Key: n.key, Register: unix.NFT_REG_1}, &expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: value})
}

// load puts the first bytes of a field into a register: all where length is 0.
func (b *ruleBuilder) load(f field, register, length uint32) {
	switch f.kind {
	case loadMeta:
		b.add(&expr.Meta{Key: f.meta, Register: register})
	case loadCTState:
		b.add(&expr.Ct{Key: expr.CtKeySTATE, Register: register})
	default:
		b.add(&expr.Payload{DestRegister: register, Base: f.base, Offset: f.offset, Len: cmp.Or(length, f.length)})
	}
}

func (b *ruleBuilder) lookup(m plan.Match, loads []field) error {
	register := uint32(unix.NFT_REG_1)
	for i, f := range loads {
		if i > 0 && loads[i-1].length != unix.IFNAMSIZ {
			return errors.New("only what fills a register of 16 bytes can come before another field")
		}
		b.load(f, register, 0)
		register++
	}
	if m.Over > 0 {
		b.add(&expr.Dynset{SrcRegKey: unix.NFT_REG_1, SetName: m.Set, Operation: unix.NFT_DYNSET_OP_ADD,
			Exprs: []expr.Any{&expr.Connlimit{Count: uint32(m.Over), Flags: connlimitOver}}})
		return nil
	}
	b.add(&expr.Lookup{SourceRegister: unix.NFT_REG_1, SetName: m.Set, Invert: m.Not})
	return nil
}

func (b *ruleBuilder) compare(f field, value string, not bool) error {
	op := expr.CmpOpEq
	if not {
		op = expr.CmpOpNeq
	}
	if p, err := netip.ParsePrefix(value); err == nil && f.kind == loadPayload {
		return b.comparePrefix(f, p, op)
	}
	if f.kind == loadPayload && f.length <= 2 {
		if first, last, ok := strings.Cut(value, "-"); ok && !not {
			return b.compareRange(f, first, last)
		}
	}
	data, err := f.encode(value)
	if err != nil {
		return err
	}
	b.load(f, unix.NFT_REG_1, 0)
	if f.kind != loadCTState {
		b.add(&expr.Cmp{Op: op, Register: unix.NFT_REG_1, Data: data})
		return nil
	}
	if not {
		return errors.New("a connection state cannot be negated here")
	}
	b.mask(data)
	b.add(&expr.Cmp{Op: expr.CmpOpNeq, Register: unix.NFT_REG_1, Data: make([]byte, 4)})
	return nil
}

func (b *ruleBuilder) mask(mask []byte) {
	b.add(&expr.Bitwise{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, Len: uint32(len(mask)),
		Mask: mask, Xor: make([]byte, len(mask))})
}

// comparePrefix loads only the bytes that count where the prefix ends on one: nft prints such a rule as a prefix.
func (b *ruleBuilder) comparePrefix(f field, p netip.Prefix, op expr.CmpOp) error {
	addr := p.Masked().Addr().AsSlice()
	if uint32(len(addr)) != f.length || p.Bits() == 0 {
		return fmt.Errorf("%s is not a network of this family", p)
	}
	if p.Bits()%8 == 0 {
		b.load(f, unix.NFT_REG_1, uint32(p.Bits()/8))
		b.add(&expr.Cmp{Op: op, Register: unix.NFT_REG_1, Data: addr[:p.Bits()/8]})
		return nil
	}
	b.load(f, unix.NFT_REG_1, 0)
	b.mask(net.CIDRMask(p.Bits(), len(addr)*8))
	b.add(&expr.Cmp{Op: op, Register: unix.NFT_REG_1, Data: addr})
	return nil
}

func (b *ruleBuilder) compareRange(f field, first, last string) error {
	from, err := f.encode(first)
	if err != nil {
		return err
	}
	to, err := f.encode(last)
	if err != nil {
		return err
	}
	b.load(f, unix.NFT_REG_1, 0)
	b.add(&expr.Cmp{Op: expr.CmpOpGte, Register: unix.NFT_REG_1, Data: from},
		&expr.Cmp{Op: expr.CmpOpLte, Register: unix.NFT_REG_1, Data: to})
	return nil
}

// nft opens nftables in the namespace of the calling thread.
func nft() (*nftables.Conn, error) {
	return nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(batchBuffer), c.SetReadBuffer(batchBuffer))
	}))
}

// numbering guards a counter of google/nftables' (allocSetID), which AddSet changes for the whole process.
var numbering sync.Mutex

// loadFirewall replaces our tables by those of the ruleset, in one transaction.
func loadFirewall(r plan.Ruleset, slots []plan.Slot) error {
	fw, err := translate(r, slots)
	if err != nil {
		return err
	}
	c, err := nft()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	numbering.Lock()
	defer numbering.Unlock()
	for _, t := range fw.tables {
		// Deleting a table that is not there is an error; making one that is there is not.
		c.AddTable(t.table)
		c.DelTable(t.table)
		c.AddTable(t.table)
		for _, s := range t.sets {
			if err := c.AddSet(s.set, nil); err != nil {
				return fmt.Errorf("nftables: set %s: %w", s.set.Name, err)
			}
			for some := range slices.Chunk(s.elements, elementsAMessage) {
				if err := c.SetAddElements(s.set, some); err != nil {
					return fmt.Errorf("nftables: set %s: %w", s.set.Name, err)
				}
			}
		}
		for _, ch := range t.chains { // before any rule that goes to one
			c.AddChain(ch.chain)
		}
		for _, ch := range t.chains {
			for _, rule := range ch.rules {
				c.AddRule(rule)
			}
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nftables: the kernel refused the ruleset (is it built with nf_tables for inet and arp?): %w", err)
	}
	return nil
}

// unloadFirewall deletes our tables, in one transaction.
func unloadFirewall(names []tableID) error {
	c, err := nft()
	if err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	for _, n := range names {
		c.DelTable(&nftables.Table{Family: families[n.family], Name: n.name})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nftables: delete the tables %v: %w", names, err)
	}
	return nil
}

// tableID names a table.
type tableID struct{ family, name string }

func (t tableID) String() string { return "table " + t.family + " " + t.name }

// tableState is what the kernel has of a table of ours.
type tableState struct {
	exists bool
	ours   bool
	diff   []string // how it is not as the ruleset says, with the set's or chain's name
}

// inspectFirewall compares the kernel's tables with the ruleset's, rule by rule and element by element.
func inspectFirewall(r plan.Ruleset, slots []plan.Slot) (map[tableID]tableState, error) {
	fw, err := translate(r, slots)
	if err != nil {
		return nil, err
	}
	c, err := nft()
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("nftables: list chains: %w", err)
	}
	tables, err := c.ListTables()
	if err != nil {
		return nil, fmt.Errorf("nftables: list tables: %w", err)
	}
	states := map[tableID]tableState{}
	for i, t := range fw.tables {
		id := tableID{r.Tables[i].Family, r.Tables[i].Name}
		if !slices.ContainsFunc(tables, func(k *nftables.Table) bool { return sameTable(k, t.table) }) {
			states[id] = tableState{}
			continue
		}
		state, err := inspectTable(c, t, chains)
		if err != nil {
			return nil, fmt.Errorf("nftables: %s: %w", id, err)
		}
		states[id] = state
	}
	return states, nil
}

// ourTableName is what compile calls both of our tables.
const ourTableName = "fleetingd"

// ourTables are the tables that NetworkUp made, whatever the plan was.
func ourTables() ([]tableID, error) {
	c, err := nft()
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	var found []tableID
	for family, number := range families {
		chains, err := c.ListChainsOfTableFamily(number)
		if err != nil {
			return nil, fmt.Errorf("nftables: list chains: %w", err)
		}
		ours := false
		for _, ch := range chains {
			if ch.Table.Name != ourTableName || ours {
				continue
			}
			rules, err := c.GetRules(ch.Table, ch)
			if err != nil {
				return nil, fmt.Errorf("nftables: chain %s: %w", ch.Name, err)
			}
			ours = marked(rules)
		}
		if ours {
			found = append(found, tableID{family, ourTableName})
		}
	}
	return found, nil
}

func sameTable(a, b *nftables.Table) bool { return a.Family == b.Family && a.Name == b.Name }

func inspectTable(c *nftables.Conn, want *fwTable, chains []*nftables.Chain) (tableState, error) {
	state := tableState{exists: true}
	have := map[string]*nftables.Chain{}
	for _, ch := range chains {
		if sameTable(ch.Table, want.table) {
			have[ch.Name] = ch
		}
	}
	for _, w := range want.chains {
		h, ok := have[w.chain.Name]
		delete(have, w.chain.Name)
		if !ok {
			state.diff = append(state.diff, "chain "+w.chain.Name+" is missing")
			continue
		}
		rules, err := c.GetRules(want.table, w.chain)
		if err != nil {
			return state, fmt.Errorf("chain %s: %w", w.chain.Name, err)
		}
		state.ours = state.ours || marked(rules)
		if !sameHook(w.chain, h) {
			state.diff = append(state.diff, "chain "+w.chain.Name+" has another hook")
		}
		if why := diffRules(want.table, w.rules, rules); why != "" {
			state.diff = append(state.diff, "chain "+w.chain.Name+": "+why)
		}
	}
	for name := range have {
		state.diff = append(state.diff, "chain "+name+" is not in the plan")
	}
	sets, err := diffSets(c, want)
	slices.Sort(state.diff)
	state.diff = append(state.diff, sets...)
	return state, err
}

func marked(rules []*nftables.Rule) bool {
	if len(rules) == 0 {
		return false
	}
	comment, _ := userdata.GetString(rules[0].UserData, userdata.TypeComment)
	return strings.HasPrefix(comment, ruleMark+":")
}

func sameHook(a, b *nftables.Chain) bool {
	if a.Hooknum == nil || b.Hooknum == nil {
		return a.Hooknum == b.Hooknum
	}
	return a.Type == b.Type && *a.Hooknum == *b.Hooknum && *a.Priority == *b.Priority &&
		(b.Policy == nil || *a.Policy == *b.Policy)
}

func diffRules(t *nftables.Table, want, have []*nftables.Rule) string {
	if len(want) != len(have) {
		return fmt.Sprintf("%d rules instead of %d", len(have), len(want))
	}
	for i := range want {
		if !slices.EqualFunc(want[i].Exprs, have[i].Exprs, func(a, b expr.Any) bool { return sameExpr(t, a, b) }) ||
			!bytes.Equal(want[i].UserData, have[i].UserData) {
			comment, _ := userdata.GetString(want[i].UserData, userdata.TypeComment)
			return fmt.Sprintf("rule %d (%s) is not in the plan", i+1, comment)
		}
	}
	return ""
}

// sameExpr compares what an expression does: not what a counter has counted, nor the number of a set in its batch.
func sameExpr(t *nftables.Table, a, b expr.Any) bool {
	if reflect.TypeOf(a) != reflect.TypeOf(b) {
		return false
	}
	switch a := a.(type) {
	case *expr.Counter:
		return true
	case *expr.Lookup:
		b := b.(*expr.Lookup)
		return a.SetName == b.SetName && a.SourceRegister == b.SourceRegister && a.Invert == b.Invert
	}
	if a, ok := a.(*expr.Dynset); ok {
		b := b.(*expr.Dynset)
		return a.SetName == b.SetName && a.SrcRegKey == b.SrcRegKey && a.Operation == b.Operation &&
			slices.EqualFunc(a.Exprs, b.Exprs, func(x, y expr.Any) bool { return sameExpr(t, x, y) })
	}
	x, errX := expr.Marshal(byte(t.Family), a)
	y, errY := expr.Marshal(byte(t.Family), b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

func diffSets(c *nftables.Conn, want *fwTable) ([]string, error) {
	sets, err := c.GetSets(want.table)
	if err != nil {
		return nil, fmt.Errorf("list sets: %w", err)
	}
	have := map[string]*nftables.Set{}
	for _, s := range sets {
		have[s.Name] = s
	}
	var diff []string
	for _, w := range want.sets {
		h, ok := have[w.set.Name]
		delete(have, w.set.Name)
		switch {
		case !ok:
			diff = append(diff, "set "+w.set.Name+" is missing")
			continue
		case h.KeyType.Bytes != w.set.KeyType.Bytes || h.Interval != w.set.Interval || h.Dynamic != w.set.Dynamic:
			diff = append(diff, "set "+w.set.Name+" has another type")
			continue
		case w.set.Dynamic: // its elements come and go with packets
			continue
		}
		elements, err := c.GetSetElements(h)
		if err != nil {
			return nil, fmt.Errorf("set %s: %w", w.set.Name, err)
		}
		missing, extra := diffElements(w.elements, elements)
		if missing+extra > 0 {
			diff = append(diff, fmt.Sprintf("set %s: %d elements missing, %d unexpected", w.set.Name, missing, extra))
		}
	}
	for name := range have {
		diff = append(diff, "set "+name+" is not in the plan")
	}
	slices.Sort(diff)
	return diff, nil
}

func diffElements(want, have []nftables.SetElement) (missing, extra int) {
	type element struct {
		key string
		end bool
	}
	seen := make(map[element]bool, len(have))
	for _, e := range have {
		seen[element{string(e.Key), e.IntervalEnd}] = true
	}
	for _, e := range want {
		k := element{string(e.Key), e.IntervalEnd}
		if !seen[k] {
			missing++
		}
		delete(seen, k)
	}
	return missing, len(seen)
}
