// Package compile makes a Plan of a Host: every file, unit and setting of the
// host, and every worker's place, decided in advance. It is pure: it reads no
// file, no clock and no machine, and the same Host gives the same Plan.
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

// User runs the runner, the plugin and the VMMs. It has no capabilities.
const User = "fleetingd"

// The host's end of every TAP has one MAC and every worker another, both locally
// administered (the 02 bit of IEEE 802). The TAP is a worker's identity; with equal
// MACs a restored clone's neighbour cache is as true as in the VM it was sealed in.
const (
	HostMAC  = "02:fd:00:00:00:01"
	GuestMAC = "02:fd:00:00:00:02"
)

// startTimeout is how long a worker may take from Increase to ready. A cold boot under
// software emulation on a busy machine takes some minutes; one that has taken ten never comes.
const startTimeout = 10 * time.Minute

// Options of Compile; the zero value is what the packages install.
type Options struct {
	// BinDir is where fleetingd and fleeting-plugin-fleetingd are installed on the
	// host: /usr/bin where it is empty.
	BinDir string
}

func (o Options) bin(name string) string {
	if o.BinDir == "" {
		return "/usr/bin/" + name
	}
	return path.Join(o.BinDir, name)
}

// Compile makes the Plan of a host that hostspec has validated. Its diagnostics are what only
// the compiled whole shows; with an error among them there is no Plan.
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

// from notes the spec line that an item came from. The file's folder is left out: the
// same spec gives the same plan.json wherever it lies.
func (c *compiler) from(r hcl.Range, kind, name string) {
	if r.Filename != "" {
		c.origins[plan.Address(kind, name)] = fmt.Sprintf("%s:%d", filepath.Base(r.Filename), r.Start.Line)
	}
}

// fail reports an error at a place of the spec.
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
