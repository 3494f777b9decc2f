package plan

import "fmt"

// CanStart says why this fleetingd cannot start the pool's workers, and nil where it
// can. The language is ahead of it: a warm start is compiled, and refused here.
func (p *Pool) CanStart() error {
	if p.Start == "warm" {
		return fmt.Errorf(`pool %q: start = "warm" needs sealed memory, which this fleetingd does not make yet: `+
			`write start = "cold" in the pool`, p.Name)
	}
	return nil
}
