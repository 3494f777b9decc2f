package plan

import "fmt"

// CanStart says why this fleetingd cannot start the workers of a pool of the Plan, and nil where it
// can. The language is ahead of it: what has no effect yet is compiled, and refused here.
func (p *Plan) CanStart(pool *Pool) error {
	if pool.Start == "warm" {
		return fmt.Errorf(`pool %q: start = "warm" needs sealed memory, which this fleetingd does not make yet: `+
			`write start = "cold" in the pool`, pool.Name)
	}
	if pool.Limits.NetworkMbps > 0 && p.Hypervisor.Driver == "qemu" {
		return fmt.Errorf(`pool %q: network_mbps is not enforced with hypervisor "qemu" yet, which has no limiter for a TAP that it is `+
			`handed: take network_mbps out of the pool's limits, or write hypervisor "cloud-hypervisor"`, pool.Name)
	}
	return nil
}
