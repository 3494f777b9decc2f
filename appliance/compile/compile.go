// Package compile turns a Host into a Plan: every file, unit and setting of the
// host, and every worker's place, decided in advance. It is pure: it reads no
// file, no clock and no machine, and the same Host always gives the same Plan.
package compile

import (
	"fmt"
	"path"
	"path/filepath"
	"time"

	"github.com/hashicorp/hcl/v2"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// User is the account that runs the runner, the plugin and the VMMs. It has no capabilities.
const User = "fleetingd"

// The host's ends of all TAPs share one MAC, and all workers another; both are locally
// administered (the 02 bit of IEEE 802). The TAP is a worker's identity, and with the same
// MACs everywhere the neighbour cache of a restored clone stays valid.
const (
	HostMAC  = "02:fd:00:00:00:01"
	GuestMAC = "02:fd:00:00:00:02"
)

// startTimeout is how long a worker may take from Increase to ready. A cold boot under
// software emulation on a busy machine takes some minutes; after ten it will never succeed.
const startTimeout = 10 * time.Minute

// Options are the options of Compile; the zero value matches the distribution packages.
type Options struct {
	// BinDir is where fleetingd and fleeting-plugin-fleetingd are installed on the
	// host; /usr/bin if empty.
	BinDir string
	// Former is the plan that the host has now, if any. Pools and images that it has, too, keep their slots, so that a change of the spec
	// does not move workers that run. It must be of the same host.
	Former *plan.Plan
}

func (o Options) bin(name string) string {
	if o.BinDir == "" {
		return "/usr/bin/" + name
	}
	return path.Join(o.BinDir, name)
}

// Compile returns the Plan of a host that hostspec has validated. Its diagnostics are those that only
// the compiled whole shows; if there is an error among them, the Plan is nil.
func Compile(h *hostspec.Host, o Options) (*plan.Plan, hcl.Diagnostics) {
	p := &plan.Plan{
		Version:         plan.Version,
		Host:            h.Name,
		EgressInterface: h.EgressInterface,
		User:            User,
		Paths:           paths(h.StateDir),
		Refresh:         plan.Duration(h.Refresh),
		Disks:           plan.NewDisks(h.StateDir, h.Disks.Backing, h.Disks.Size),
		Hypervisor: plan.Hypervisor{
			Driver: h.Hypervisor.Driver, Binary: h.Hypervisor.Binary, Sandbox: h.Hypervisor.Sandbox, Accel: h.Hypervisor.Accel,
		},
		Pools:   []plan.Pool{},
		Images:  []plan.Image{},
		Runners: []plan.Runner{},
		Files:   []plan.File{},
		Units:   []plan.Unit{},
	}
	c := &compiler{host: h, opts: o, plan: p, origins: map[string]string{}}
	if c.slots(); c.diags.HasErrors() {
		return nil, c.diags
	}
	c.images()
	c.install()
	if c.artifacts(); c.diags.HasErrors() {
		return nil, c.diags
	}
	p.Origins = c.origins
	return p, c.diags
}

// compiler is one run of Compile.
type compiler struct {
	host    *hostspec.Host
	opts    Options
	plan    *plan.Plan
	origins map[string]string
	diags   hcl.Diagnostics
}

// from records the spec line that an item came from, without the file's folder: the same
// spec must give the same plan.json wherever it lies.
func (c *compiler) from(r hcl.Range, kind, name string) {
	if r.Filename != "" {
		c.origins[plan.Address(kind, name)] = fmt.Sprintf("%s:%d", filepath.Base(r.Filename), r.Start.Line)
	}
}

// fail reports an error at a place in the spec.
func (c *compiler) fail(r hcl.Range, summary, detail string, args ...any) {
	c.diags = append(c.diags, &hcl.Diagnostic{
		Severity: hcl.DiagError, Summary: summary, Detail: fmt.Sprintf(detail, args...), Subject: r.Ptr(),
	})
}

func paths(state string) plan.Paths {
	disks := path.Join(state, "disks")
	return plan.Paths{
		State:   state,
		Disks:   disks,
		Images:  path.Join(disks, "images"),
		Clones:  path.Join(disks, "clones"),
		Workers: path.Join(state, "workers"),
		Cache:   path.Join(state, "cache"),
		Run:     plan.RunDir,
	}
}
