package compile

import (
	"math/big"
	"net/netip"
	"strconv"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// maxQueues caps a TAP's RX/TX pairs. One pair per vCPU lets a guest use all of them, but each costs the host
// an open descriptor and a kernel ring, and past eight, CI traffic gets no faster.
const maxQueues = 8

// slots lays out the network: the gateway at the subnet's first address, then one slot per worker in
// the order of the pools, then one per image for its prebuild.
func (c *compiler) slots() {
	h, p := c.host, c.plan
	p.Network = plan.Network{
		Subnet: h.Network.Subnet, Gateway: h.Network.Subnet.Addr().Next(),
		DNS: h.Network.DNS, MTU: h.Network.MTU,
		HostMAC: HostMAC, GuestMAC: GuestMAC,
		Egress: c.egress(),
	}
	if p.Network.DNS == nil {
		p.Network.DNS = []netip.Addr{}
	}
	workers := 0
	for _, pool := range h.Pools {
		workers += pool.MaxInstances
	}
	total := workers + len(h.Images)
	if !c.fits(workers, total) {
		return
	}
	var addr6 netip.Addr
	if h.Network.Subnet6.IsValid() {
		gw6 := h.Network.Subnet6.Addr().Next()
		p.Network.Subnet6, p.Network.Gateway6 = &h.Network.Subnet6, &gw6
		addr6 = gw6
	}
	// A slot's two addresses have the same host number, so that one can be told from the other in a log.
	addr := p.Network.Gateway
	p.Slots = make([]plan.Slot, 0, total)
	add := func(queues, connections int) {
		i := len(p.Slots)
		addr = addr.Next()
		s := plan.Slot{Index: i, TAP: "fleet" + strconv.Itoa(i), Address: addr, Queues: queues, Connections: connections}
		if addr6.IsValid() {
			addr6 = addr6.Next()
			a := addr6
			s.Address6 = &a
		}
		p.Slots = append(p.Slots, s)
	}
	for _, spec := range h.Pools {
		p.Pools = append(p.Pools, pool(spec, len(p.Slots)))
		c.from(spec.Range, plan.KindPool, spec.Name)
		for range spec.MaxInstances {
			add(min(spec.CPUs, maxQueues), spec.Limits.Connections)
		}
	}
	for range h.Images {
		add(1, hostspec.DefaultConnections) // one queue is enough: a prebuild VM mostly downloads and waits
	}
}

// fits reports whether the subnets hold the gateway and all slots. Each address is a host route of its own, so the last
// one can be used: there is no broadcast. Only the network's own address is lost.
func (c *compiler) fits(workers, total int) bool {
	for _, subnet := range []netip.Prefix{c.host.Network.Subnet, c.host.Network.Subnet6} {
		if !subnet.IsValid() {
			continue
		}
		room := new(big.Int).Lsh(big.NewInt(1), uint(subnet.Addr().BitLen()-subnet.Bits()))
		room.Sub(room, big.NewInt(2)) // the network's own address and the gateway
		if room.Cmp(big.NewInt(int64(total))) < 0 {
			c.fail(c.host.Network.Range, "Subnet too small",
				"%s has %s addresses for workers, but %d are needed: %d for the pools' max_instances and one for the "+
					"prebuild of each of %d images. Use a larger subnet, or fewer instances.",
				subnet, room, total, workers, len(c.host.Images))
			return false
		}
	}
	return true
}

func pool(s *hostspec.Pool, first int) plan.Pool {
	return plan.Pool{
		Name: s.Name, Image: s.Image, CPUs: s.CPUs, Memory: s.Memory, Disk: s.Disk,
		Start: s.Start, Console: s.Console, FirstSlot: first, MaxInstances: s.MaxInstances,
		Limits:       plan.Limits(s.Limits),
		StartTimeout: plan.Duration(startTimeout),
	}
}

func (c *compiler) egress() []plan.Egress {
	rules := []plan.Egress{}
	for _, s := range c.host.Network.Egress {
		e := plan.Egress{Name: s.Name, Action: s.Action, To: s.To, Ports: []plan.PortRange{}}
		if e.To == nil {
			e.To = []netip.Prefix{}
		}
		for _, r := range s.Ports {
			e.Ports = append(e.Ports, plan.PortRange(r))
		}
		rules = append(rules, e)
		c.from(s.Range, plan.KindEgress, s.Name)
	}
	return rules
}
