package plan

import "fmt"

// CanStart returns why this version cannot start workers of a pool, or nil if it can. The spec language is ahead of
// the implementation: settings without an effect yet can be compiled, but not started.
func (p *Plan) CanStart(pool *Pool) error {
	if pool.Start == "warm" {
		return fmt.Errorf(`pool %q: start = "warm" needs sealed memory, which this version does not support yet: `+
			`write start = "cold" in the pool`, pool.Name)
	}
	if pool.Limits.NetworkMbps > 0 && p.Hypervisor.Driver == "qemu" {
		return fmt.Errorf(`pool %q: network_mbps is not enforced with hypervisor "qemu" yet, which cannot limit a TAP that it is `+
			`handed: remove network_mbps from the pool's limits, or use hypervisor "cloud-hypervisor"`, pool.Name)
	}
	return nil
}
