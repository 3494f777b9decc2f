package compile

import (
	"math"
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
	if h.Network.Subnet6.IsValid() {
		gw6 := h.Network.Subnet6.Addr().Next()
		p.Network.Subnet6, p.Network.Gateway6 = &h.Network.Subnet6, &gw6
	}
	indexes := c.indexes(total)
	p.Slots = make([]plan.Slot, 0, total)
	add := func(queues, connections int) {
		i := indexes[len(p.Slots)]
		s := plan.Slot{Index: i, TAP: "fleet" + strconv.Itoa(i), Address: after(p.Network.Gateway, i), Queues: queues, Connections: connections}
		if p.Network.Gateway6 != nil {
			a := after(*p.Network.Gateway6, i)
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

// after returns the address of the slot with an index: the gateway's is the one before that of slot 0. A slot's two addresses have the same
// host number, so that one can be told from the other in a log.
func after(gateway netip.Addr, index int) netip.Addr {
	b := gateway.AsSlice()
	for carry, i := uint(index)+1, len(b)-1; carry > 0 && i >= 0; i-- {
		carry += uint(b[i])
		b[i], carry = byte(carry), carry>>8
	}
	a, _ := netip.AddrFromSlice(b) // it has the length of an address
	return a
}

// indexes returns the indexes of all slots, in the order of Plan.Slots. What the former plan has, too, keeps its indexes, the first ones if it
// needs fewer. What is new gets indexes that the former plan does not use, as long as there are any: a worker may still run on those that
// became free.
func (c *compiler) indexes(total int) []int {
	room := c.room()
	kept := make([]int, 0, total) // -1: a new slot
	used := map[int]bool{}
	keep := func(former []plan.Slot, n int) {
		for i := range n {
			if i < len(former) && former[i].Index < room {
				kept = append(kept, former[i].Index)
				used[former[i].Index] = true
			} else {
				kept = append(kept, -1)
			}
		}
	}
	former := c.opts.Former
	if former == nil {
		former = &plan.Plan{}
	}
	for _, spec := range c.host.Pools {
		var had []plan.Slot
		if pool, err := former.Pool(spec.Name); err == nil {
			had = former.PoolSlots(pool)
		}
		keep(had, spec.MaxInstances)
	}
	for _, spec := range c.host.Images {
		var had []plan.Slot
		if image, err := former.Image(spec.Name); err == nil {
			had = []plan.Slot{former.BuildSlot(image)}
		}
		keep(had, 1)
	}
	freed := map[int]bool{}
	for _, s := range former.Slots {
		freed[s.Index] = !used[s.Index]
	}
	next := 0
	for i := range kept {
		if kept[i] >= 0 {
			continue
		}
		for next < room && (used[next] || freed[next]) {
			next++
		}
		if next == room { // none is left that nobody used
			clear(freed)
			next = 0
			for used[next] {
				next++
			}
		}
		kept[i] = next
		used[next] = true
	}
	return kept
}

// fits reports whether the subnets hold the gateway and all slots.
func (c *compiler) fits(workers, total int) bool {
	for _, subnet := range c.subnets() {
		if room := slotsIn(subnet); total > room {
			c.fail(c.host.Network.Range, "Subnet too small",
				"%s has %d addresses for workers, but %d are needed: %d for the pools' max_instances and one for the "+
					"prebuild of each of %d images. Use a larger subnet, or fewer instances.",
				subnet, room, total, workers, len(c.host.Images))
			return false
		}
	}
	return true
}

func (c *compiler) subnets() []netip.Prefix {
	if !c.host.Network.Subnet6.IsValid() {
		return []netip.Prefix{c.host.Network.Subnet}
	}
	return []netip.Prefix{c.host.Network.Subnet, c.host.Network.Subnet6}
}

// room returns how many slots the subnets hold.
func (c *compiler) room() int {
	room := math.MaxInt
	for _, subnet := range c.subnets() {
		room = min(room, slotsIn(subnet))
	}
	return room
}

// slotsIn returns how many slots a subnet holds beside the gateway. Each address is a host route of its own, so the last one can be used:
// there is no broadcast. Only the network's own address is lost.
func slotsIn(subnet netip.Prefix) int {
	bits := subnet.Addr().BitLen() - subnet.Bits()
	if bits > 32 {
		return math.MaxInt
	}
	return max(0, 1<<bits-2)
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
