package host

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// Status is how a check of Doctor ended.
type Status string

// StatusFail means that the host cannot do what the plan says, StatusWarn that it can do so less well, or that something else will
// fix it.
const (
	StatusOK   Status = "ok"
	StatusWarn Status = "warn"
	StatusFail Status = "fail"
)

// Finding is what one check found. Its JSON is stable: names of checks are not reused, and fields are only added.
type Finding struct {
	Check  string `json:"check"`
	Status Status `json:"status"`
	Detail string `json:"detail"`         // what is, in one line
	Cure   string `json:"cure,omitempty"` // a command where there is one, else what to do; "" when ok
	// ByApply: apply cures it, by what the plan installs or writes. It is no reason not to begin.
	ByApply bool `json:"by_apply,omitempty"`
}

// Probes answer what Doctor cannot find out itself, since this package knows neither hypervisors nor images nor the spec.
type Probes struct {
	KVM      func(context.Context) error                             // runs a guest
	Driver   func(context.Context) (binary, version string, _ error) // the plan's hypervisor; an error beside a version is KVM's
	CanClone func(dir string) error                                  // why files in dir cannot be cloned

	Destinations []Destination // servers that jobs need
	Resolve      func(ctx context.Context, name string) ([]netip.Addr, error)
}

// Doctor checks this host against the plan and suggests fixes. It changes nothing that lasts: it loads the ruleset in a separate
// network namespace, sends packets that never leave the host, creates and removes a file, and runs a guest of a few instructions. Checks
// that need root become warnings for other users.
func Doctor(ctx context.Context, p *plan.Plan, probes Probes) []Finding {
	return (&doctor{plan: p, probes: probes, machine: realMachine()}).examine(ctx)
}

// doctor examines one machine for one plan.
type doctor struct {
	plan    *plan.Plan
	probes  Probes
	machine machine
	found   []Finding
}

func (d *doctor) examine(ctx context.Context) []Finding {
	d.cpu()
	d.kvm(ctx)
	d.hypervisor(ctx)
	d.systemd(ctx)
	d.cgroup()
	d.landlock()
	d.user()
	d.secrets()
	d.tun()
	d.nftables()
	d.links(ctx)
	d.destinations(ctx)
	d.sysctls()
	d.stateDir()
	d.disks()
	d.space()
	d.memory()
	d.tools()
	d.clock()
	d.runner(ctx)
	return d.found
}

func (d *doctor) add(check string, s Status, cure, format string, args ...any) {
	// A program's answer may have lines; a table's row is one.
	detail := strings.Join(strings.Fields(fmt.Sprintf(format, args...)), " ")
	d.found = append(d.found, Finding{Check: check, Status: s, Detail: detail, Cure: cure})
}

func (d *doctor) ok(check, format string, args ...any) { d.add(check, StatusOK, "", format, args...) }

func (d *doctor) warn(check, cure, format string, args ...any) {
	d.add(check, StatusWarn, cure, format, args...)
}

func (d *doctor) fail(check, cure, format string, args ...any) {
	d.add(check, StatusFail, cure, format, args...)
}

// byApply notes that apply cures the last finding, where that is so.
func (d *doctor) byApply(cures bool) { d.found[len(d.found)-1].ByApply = cures }

// installs reports whether apply installs a package, given its Debian name.
func (d *doctor) installs(name string) bool {
	in := d.plan.Install
	if in == nil {
		return false
	}
	if slices.ContainsFunc(in.Programs, func(p plan.Download) bool { return p.Package == name }) {
		return true
	}
	_, err := d.machine.lookPath("apt-get")
	return err == nil && slices.Contains(in.Packages, name)
}

// asRoot is the cure where a check is root's.
const asRoot = "sudo fleetingd doctor HOST"

// install returns the command that installs a package, given its Debian and its Fedora name.
func (d *doctor) install(deb, rpm string) string {
	if _, err := d.machine.lookPath("apt-get"); err == nil {
		return "apt-get install -y --no-install-recommends " + deb
	}
	if _, err := d.machine.lookPath("dnf"); err == nil {
		return "dnf install -y " + rpm
	}
	return "install " + deb + " with this system's package manager"
}

// needsKVM reports whether workers run on KVM alone; wantsKVM, whether they use it if it works.
func (d *doctor) needsKVM() bool {
	return d.plan.Hypervisor.Driver == "cloud-hypervisor" || d.plan.Hypervisor.Accel == "kvm"
}

func (d *doctor) wantsKVM() bool { return d.needsKVM() || d.plan.Hypervisor.Accel != "tcg" }

// withoutKVM is fail if workers need KVM, and warn if they are only slow without it.
func (d *doctor) withoutKVM() Status {
	if d.needsKVM() {
		return StatusFail
	}
	return StatusWarn
}
