package plan

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Ruleset is the firewall as data, from which both the nftables text and the
// netlink messages are made. The number of its rules does not grow with the
// number of slots: only its sets do.
type Ruleset struct {
	Tables []Table `json:"tables"`
}

// Table is one nftables table. Family is "inet" or "arp".
type Table struct {
	Family string  `json:"family"`
	Name   string  `json:"name"`
	Sets   []Set   `json:"sets"`
	Chains []Chain `json:"chains"`
}

// Set is a named set. Its elements are either Elements or, if Slots is true,
// one per slot.
type Set struct {
	Name     string     `json:"name"`
	Key      []DataType `json:"key"`                // several are a concatenation
	Interval bool       `json:"interval,omitempty"` // elements may be prefixes and ranges; they must not overlap
	Slots    bool       `json:"slots,omitempty"`
	// Connections, if above 0, restricts a set of slots to those with that limit.
	Connections int `json:"connections,omitempty"`
	// Dynamic means that rules add the elements, each with its own state (Match.Over).
	Dynamic  bool     `json:"dynamic,omitempty"`
	Elements []string `json:"elements,omitempty"` // in order: "10.0.0.0/8", "443", "9000-9001"
}

// DynamicSize is the capacity of a dynamic set: more than a host has slots.
const DynamicSize = 65536

// DataType is nft's name for the type of a set's key.
type DataType string

// The types that sets use.
const (
	TypeIFName DataType = "ifname"
	TypeIPv4   DataType = "ipv4_addr"
	TypeIPv6   DataType = "ipv6_addr"
	TypePort   DataType = "inet_service"
	TypeICMP   DataType = "icmp_type"
	TypeICMPv6 DataType = "icmpv6_type"
)

// Chain is a base chain with policy accept or, if Hook is empty, a chain that rules jump to.
type Chain struct {
	Name     string `json:"name"`
	Type     string `json:"type,omitempty"` // "filter" or "nat"
	Hook     string `json:"hook,omitempty"` // "prerouting", "input", "forward", "postrouting"
	Priority int    `json:"priority,omitempty"`
	Rules    []Rule `json:"rules"`
}

// Rule applies Verdict to packets that match all of Matches.
type Rule struct {
	Comment string  `json:"comment"` // at most 128 bytes of letters, digits and " ._:/,'()-": see Comment
	Matches []Match `json:"matches,omitempty"`
	Counter bool    `json:"counter,omitempty"` // counts what it matched
	Verdict Verdict `json:"verdict"`
}

// Verdict is what a rule does. Chain is the target of a goto.
type Verdict struct {
	Action Action `json:"action"`
	Chain  string `json:"chain,omitempty"`
}

// Action is nft's name for a verdict.
type Action string

// The actions that rules use. Reject answers "administratively prohibited", so
// that a job fails at once instead of waiting.
const (
	Accept     Action = "accept"
	Drop       Action = "drop"
	Reject     Action = "reject"
	Masquerade Action = "masquerade"
	Goto       Action = "goto"
)

// Match compares a field, or several concatenated ones, with a literal or a set.
// Exactly one of Set and Value is given.
type Match struct {
	Fields []Field `json:"fields"`
	Not    bool    `json:"not,omitempty"`
	Set    string  `json:"set,omitempty"`
	// Over, if above 0, matches once the element of the dynamic Set for these Fields has more than that many connections.
	Over  int    `json:"over,omitempty"`
	Value string `json:"value,omitempty"` // an interface, address, prefix, port, port range, state or type
}

// Field is nft's name for a part of a packet or of its metadata.
type Field string

// The fields that rules match.
const (
	IIFKind      Field = "meta iifkind"
	IIFName      Field = "iifname"
	OIFName      Field = "oifname"
	EtherSource  Field = "ether saddr"
	IPSource     Field = "ip saddr"
	IPDest       Field = "ip daddr"
	IP6Source    Field = "ip6 saddr"
	IP6Dest      Field = "ip6 daddr"
	CTState      Field = "ct state"
	ICMPKind     Field = "icmp type"
	ICMPv6Kind   Field = "icmpv6 type"
	TCPDest      Field = "tcp dport"
	UDPDest      Field = "udp dport"
	ARPOperation Field = "arp operation"
	ARPSourceMAC Field = "arp saddr ether"
	ARPSourceIP  Field = "arp saddr ip"
	ARPTargetIP  Field = "arp daddr ip"
)

// textHead begins the file that Text makes.
const textHead = `#!/usr/sbin/nft -f
# Written by fleetingd from its plan; changes made here are reported as drift.
# Each table is created, deleted and created again in one transaction, so no packet passes in between.
`

// commentSymbols are allowed in a comment besides letters and digits; maxComment is NFTNL_UDATA_COMMENT_MAXLEN.
const (
	commentSymbols = " ._:/,'()-"
	maxComment     = 128
)

// Comment returns text as it can stand in a rule's comment: nft strings have no escapes.
func Comment(text string) string {
	text = strings.Map(func(r rune) rune {
		letter := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9'
		if letter || strings.ContainsRune(commentSymbols, r) {
			return r
		}
		return '_'
	}, text)
	return text[:min(len(text), maxComment)]
}

// Values returns the set's elements, each with one value per type of its key.
func (s Set) Values(slots []Slot) [][]string {
	if len(s.Key) == 0 {
		return nil
	}
	if !s.Slots {
		values := make([][]string, len(s.Elements))
		for i, e := range s.Elements {
			values[i] = []string{e}
		}
		return values
	}
	values := make([][]string, 0, len(slots))
	for _, slot := range slots {
		if s.Connections > 0 && slot.Connections != s.Connections {
			continue
		}
		element := make([]string, len(s.Key))
		for i, t := range s.Key {
			switch t {
			case TypeIFName:
				element[i] = slot.TAP
			case TypeIPv4:
				element[i] = slot.Address.String()
			case TypeIPv6:
				if slot.Address6 != nil {
					element[i] = slot.Address6.String()
				}
			}
		}
		values = append(values, element)
	}
	return values
}

// Text returns the ruleset in the syntax of `nft -f`. Loading it replaces an earlier one in one transaction
// and touches no other table.
func (r Ruleset) Text(slots []Slot) string {
	var b strings.Builder
	b.WriteString(textHead)
	for _, t := range r.Tables {
		// Deleting a missing table is an error, but adding an existing one is not.
		fmt.Fprintf(&b, "\ntable %s %s\ndelete table %s %s\n", t.Family, t.Name, t.Family, t.Name)
		t.text(&b, slots)
	}
	return b.String()
}

func (t Table) text(b *strings.Builder, slots []Slot) {
	fmt.Fprintf(b, "table %s %s {\n", t.Family, t.Name)
	for _, s := range t.Sets {
		s.text(b, slots)
	}
	for _, c := range t.Chains {
		c.text(b)
	}
	b.WriteString("}\n")
}

func (s Set) text(b *strings.Builder, slots []Slot) {
	key := make([]string, len(s.Key))
	for i, t := range s.Key {
		key[i] = string(t)
	}
	fmt.Fprintf(b, "\tset %s {\n\t\ttype %s\n", s.Name, strings.Join(key, " . "))
	if s.Interval {
		b.WriteString("\t\tflags interval\n")
	}
	if s.Dynamic {
		fmt.Fprintf(b, "\t\tsize %d\n\t\tflags dynamic\n", DynamicSize)
	}
	values := s.Values(slots)
	if len(values) > 0 {
		b.WriteString("\t\telements = {")
		for i, v := range values {
			if i%4 == 0 {
				b.WriteString("\n\t\t\t")
			} else {
				b.WriteByte(' ')
			}
			for n, part := range v {
				if n > 0 {
					b.WriteString(" . ")
				}
				b.WriteString(literal(s.Key[n], part))
			}
			b.WriteByte(',')
		}
		b.WriteString("\n\t\t}\n")
	}
	b.WriteString("\t}\n")
}

func literal(t DataType, value string) string {
	if t == TypeIFName {
		return strconv.Quote(value)
	}
	return value
}

func (c Chain) text(b *strings.Builder) {
	fmt.Fprintf(b, "\n\tchain %s {\n", c.Name)
	if c.Hook != "" {
		fmt.Fprintf(b, "\t\ttype %s hook %s priority %d; policy accept;\n", c.Type, c.Hook, c.Priority)
	}
	for _, r := range c.Rules {
		fmt.Fprintf(b, "\t\t%s\n", r)
	}
	b.WriteString("\t}\n")
}

// String returns the rule as nft text.
func (r Rule) String() string {
	var words []string
	for _, m := range r.Matches {
		words = append(words, m.String())
	}
	if r.Counter {
		words = append(words, "counter")
	}
	return strings.Join(append(words, r.Verdict.String(), "comment "+strconv.Quote(r.Comment)), " ")
}

// String returns the verdict as nft text.
func (v Verdict) String() string {
	switch v.Action {
	case Goto:
		return "goto " + v.Chain
	case Reject:
		return "reject with icmpx type admin-prohibited"
	default:
		return string(v.Action)
	}
}

// String returns the match as nft text.
func (m Match) String() string {
	fields := make([]string, len(m.Fields))
	for i, f := range m.Fields {
		fields[i] = string(f)
	}
	if m.Over > 0 {
		return fmt.Sprintf("add @%s { %s ct count over %d }", m.Set, strings.Join(fields, " . "), m.Over)
	}
	words := []string{strings.Join(fields, " . ")}
	if m.Not {
		words = append(words, "!=")
	}
	switch {
	case m.Set != "":
		words = append(words, "@"+m.Set)
	case slices.ContainsFunc(m.Fields, func(f Field) bool { return f == IIFName || f == OIFName || f == IIFKind }):
		words = append(words, literal(TypeIFName, m.Value))
	default:
		words = append(words, m.Value)
	}
	return strings.Join(words, " ")
}
