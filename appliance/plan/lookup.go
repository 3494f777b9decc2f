package plan

import (
	"fmt"
	"strings"
)

// The kinds of items that have an origin. An item's address is kind.name:
// "pool.small", "file./etc/gitlab-runner/config.toml".
const (
	KindImage   = "image"
	KindPool    = "pool"
	KindRunner  = "runner"
	KindEgress  = "egress"
	KindFile    = "file"
	KindUnit    = "unit"
	KindSysctl  = "sysctl"
	KindPackage = "package"
)

// Address returns the key of an item in Plan.Origins.
func Address(kind, name string) string { return kind + "." + name }

// Origin returns the spec line that an item came from, "host.hcl:12", or "" if
// the Plan does not know it.
func (p *Plan) Origin(kind, name string) string { return p.Origins[Address(kind, name)] }

// Pool returns the pool with that name, or an error that lists the names of all pools.
func (p *Plan) Pool(name string) (*Pool, error) {
	names := make([]string, len(p.Pools))
	for i := range p.Pools {
		if p.Pools[i].Name == name {
			return &p.Pools[i], nil
		}
		names[i] = p.Pools[i].Name
	}
	return nil, unknown("pool", name, p.Host, names)
}

// Image returns the image with that name, or an error that lists the names of all images.
func (p *Plan) Image(name string) (*Image, error) {
	names := make([]string, len(p.Images))
	for i := range p.Images {
		if p.Images[i].Name == name {
			return &p.Images[i], nil
		}
		names[i] = p.Images[i].Name
	}
	return nil, unknown("image", name, p.Host, names)
}

func unknown(kind, name, host string, names []string) error {
	if len(names) == 0 {
		return fmt.Errorf("host %q has no %s %q: it has none", host, kind, name)
	}
	return fmt.Errorf("host %q has no %s %q: it has %s", host, kind, name, strings.Join(names, ", "))
}

// PoolSlots returns the slots of a pool's workers. The pool must be one of p's own.
func (p *Plan) PoolSlots(pool *Pool) []Slot {
	return p.Slots[pool.FirstSlot : pool.FirstSlot+pool.MaxInstances]
}

// BuildSlot returns the slot of an image's prebuild VM. The image must be one of p's own.
func (p *Plan) BuildSlot(im *Image) Slot { return p.Slots[im.BuildSlot] }
