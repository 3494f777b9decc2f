package plan

import (
	"fmt"
	"strings"
)

// The kinds of item that have an origin. An item's address is kind.name:
// "pool.small", "file./etc/gitlab-runner/config.toml".
const (
	KindImage  = "image"
	KindPool   = "pool"
	KindRunner = "runner"
	KindEgress = "egress"
	KindFile   = "file"
	KindUnit   = "unit"
	KindSysctl = "sysctl"
)

// Address is the key of an item in Plan.Origins.
func Address(kind, name string) string { return kind + "." + name }

// Origin is the spec line that an item came from, "host.hcl:12", or "" where the
// Plan does not know.
func (p *Plan) Origin(kind, name string) string { return p.Origins[Address(kind, name)] }

// Pool is the pool of that name.
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

// Image is the image of that name.
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
		return fmt.Errorf("host %q has no %s %q: it has none at all", host, kind, name)
	}
	return fmt.Errorf("host %q has no %s %q: it has %s", host, kind, name, strings.Join(names, ", "))
}

// PoolSlots are the places of a pool's workers. The pool must be one of p's own.
func (p *Plan) PoolSlots(pool *Pool) []Slot {
	return p.Slots[pool.FirstSlot : pool.FirstSlot+pool.MaxInstances]
}

// BuildSlot is the place of an image's prebuild VM. The image must be one of p's own.
func (p *Plan) BuildSlot(im *Image) Slot { return p.Slots[im.BuildSlot] }
