package plan

import (
	"cmp"
	"net/netip"
	"strings"

	"github.com/fleetingd/fleetingd/seed"
)

// WorkerSeed is what a new worker of a pool is given: its name, its slot's
// addresses, and the one key (a line of authorized_keys) that the job user takes.
// The pool and the slot must be p's own; id is never used twice.
func (p *Plan) WorkerSeed(pool *Pool, slot Slot, id, authorizedKey string) seed.Seed {
	s := seed.Seed{
		InstanceID: id,
		Hostname:   Label(id, 63),
		Network:    p.SlotNetwork(slot),
	}
	if im, err := p.Image(pool.Image); err == nil { // check() refuses a Plan where it is not
		s.Users = []seed.User{{Name: im.User, AuthorizedKeys: []string{authorizedKey}}}
	}
	return s
}

// SlotNetwork is the network of a guest in the slot.
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

// Label makes a DNS label (RFC 1123: letters, digits and inner dashes) of a name, most bytes long at most. Names of other characters
// alone become "worker".
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
