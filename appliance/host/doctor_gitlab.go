package host

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Destination is a server that jobs need, by its name. The spec's own check has judged addresses that are written out.
type Destination struct {
	What   string // "GitLab"
	Name   string
	Port   uint16
	Denies func(netip.Addr) string // why workers cannot connect to an address, or ""
	Cure   func(netip.Addr) string // what to write then
}

// resolveTimeout is for one name.
const resolveTimeout = 5 * time.Second

// destinations resolves the names of the servers that jobs need. They may lie where workers do not go by default. It
// is this host's resolver that answers; workers ask the spec's.
func (d *doctor) destinations(ctx context.Context) {
	const check = "reach"
	for _, dest := range d.probes.Destinations {
		ctx, cancel := context.WithTimeout(ctx, resolveTimeout)
		addrs, err := d.probes.Resolve(ctx, dest.Name)
		cancel()
		switch {
		case err != nil:
			d.warn(check, "getent ahosts "+dest.Name, "%s at %s: %v", dest.What, dest.Name, err)
			continue
		case d.plan.Network.Subnet6 == nil:
			if four := slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return !a.Unmap().Is4() }); len(four) > 0 {
				addrs = four // workers do not ask for others
			}
		}
		i := slices.IndexFunc(addrs, func(a netip.Addr) bool { return dest.Denies(a) != "" })
		if i < 0 {
			d.ok(check, "workers may connect to %s at %s", dest.What, dest.Name)
			continue
		}
		cure := strings.Join(strings.Fields(dest.Cure(addrs[i])), " ")
		d.warn(check, cure, "workers cannot connect to %s at %s:%d (%s): %s", dest.What, dest.Name, dest.Port, addrs[i].Unmap(), dest.Denies(addrs[i]))
	}
}
