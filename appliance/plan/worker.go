package plan

import (
	"cmp"
	"net/netip"
	"strings"

	"github.com/fleetingd/fleetingd/seed"
)

// WorkerSeed returns the seed of a new worker: its name, its slot's addresses,
// and the one key (a line of authorized_keys) that the job user accepts.
// The pool and the slot must be p's own; ids must not be reused.
func (p *Plan) WorkerSeed(pool *Pool, slot Slot, id, authorizedKey string) seed.Seed {
	s := seed.Seed{
		InstanceID: id,
		Hostname:   Label(id, 63),
		Network:    p.SlotNetwork(slot),
	}
	if im, err := p.Image(pool.Image); err == nil { // always, since check() passed
		s.Users = []seed.User{{Name: im.User, AuthorizedKeys: []string{authorizedKey}}}
	}
	return s
}

// SlotNetwork returns the network configuration of a guest in the slot.
func (p *Plan) SlotNetwork(slot Slot) *seed.Network {
	n := &seed.Network{
		MAC:       p.Network.GuestMAC,
		Addresses: []netip.Addr{slot.Address},
		Gateways:  []netip.Addr{p.Network.Gateway},
		DNS:       p.Network.DNS,
		MTU:       p.Network.MTU,
	}
	if slot.Address6 != nil && p.Network.Gateway6 != nil {
		n.Addresses = append(n.Addresses, *slot.Address6)
		n.Gateways = append(n.Gateways, *p.Network.Gateway6)
	}
	return n
}

// Label turns a name into a DNS label (RFC 1123: letters, digits and inner dashes) of at most the given number of bytes, or "worker" if
// nothing is left of it.
func Label(name string, most int) string {
	label := strings.Map(func(r rune) rune {
		switch {
		case 'a' <= r && r <= 'z', '0' <= r && r <= '9':
			return r
		case 'A' <= r && r <= 'Z':
			return r - 'A' + 'a'
		}
		return '-'
	}, name)
	return cmp.Or(strings.Trim(label[:min(len(label), most)], "-"), "worker")
}
