package compile

import (
	"path"
	"regexp"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/unit"
	"github.com/hashicorp/hcl/v2"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/templates"
)

// The paths of the artifacts on the host.
const (
	configPath = plan.ConfigFolder + "/config.toml"
	nftPath    = "/etc/nftables.d/fleetingd.nft"
	unitDir    = "/etc/systemd/system"
	sysctlPath = "/etc/sysctl.d/60-fleetingd.conf"
	tmpfiles   = "/etc/tmpfiles.d/fleetingd.conf"
	sysusers   = "/etc/sysusers.d/fleetingd.conf"
)

// values are the templates' input.
type values struct {
	Host, User, Plan, Fleetingd  string
	Config, ConfigDir, RunnerDir string
	Account                      plan.Account
	Folders                      []plan.Folder
	Tmpfiles                     string
	LastTAP                      string
	Paths                        plan.Paths
	Sysctls                      []plan.Sysctl

	// The refresh timer. RootPart: an image is built from packages, which takes root.
	RootPart                    bool
	Every                       string
	EverySeconds, SpreadSeconds int64
	RefreshSeconds              int64 // the time limit of a refresh

	// The disks' file system.
	Disks               plan.Disks
	ImageDir, MountUnit string
}

// artifacts compiles the files and units of the host.
func (c *compiler) artifacts() {
	p := c.plan
	if c.opts.BinDir != "" && !plainPath.MatchString(c.opts.BinDir) {
		c.fail(c.host.Range, "Invalid folder for programs", "The folder of fleetingd, %q, is named in systemd units, so it must be "+
			"an absolute path of letters, digits and _ . / + @ : -.", c.opts.BinDir)
		return
	}
	p.Sysctls = c.sysctls()
	v := values{
		Host: p.Host, User: p.User, Plan: plan.Path, Fleetingd: c.opts.bin("fleetingd"),
		Config: configPath, ConfigDir: plan.ConfigFolder, RunnerDir: p.RunnerFolder(), Account: p.Account(), Folders: p.Folders(),
		Tmpfiles: tmpfiles, Paths: p.Paths, Sysctls: p.Sysctls,
	}
	if n := len(p.Slots); n > 0 {
		v.LastTAP = p.Slots[n-1].TAP
	}
	host := c.host.Range
	c.file(host, sysusers, "sysusers.conf", v)
	c.file(host, tmpfiles, "tmpfiles.conf", v)
	c.file(c.host.Network.Range, sysctlPath, "sysctl.conf", v)
	c.ruleset()
	c.file(c.host.Network.Range, "/etc/systemd/network/10-fleetingd.link", "tap.link", v)
	c.file(c.host.Network.Range, "/etc/systemd/network/10-fleetingd.network", "tap.network", v)

	c.unit(host, "fleetingd-recover.service", "recover.service", v, plan.Unit{Enable: true})
	c.unit(c.host.Network.Range, "fleetingd-network.service", "network.service", v, plan.Unit{Enable: true, Start: true})
	c.disks(v)
	c.refresh(v)
	if len(c.host.Runners) > 0 {
		c.file(host, unitDir+"/gitlab-runner.service.d/10-fleetingd.conf", "gitlab-runner.conf", v)
		c.config()
		p.Units = append(p.Units, plan.Unit{Name: "gitlab-runner.service", Enable: true, Start: true})
		c.from(host, plan.KindUnit, "gitlab-runner.service")
	}
}

// plainPath matches paths without a special meaning in a unit. hostspec checks state_dir.
var plainPath = regexp.MustCompile(`^/[A-Za-z0-9_./+@:-]*$`)

// file adds a root-owned, world-readable file from a template.
func (c *compiler) file(from hcl.Range, name, template string, v values) {
	text, err := templates.Render(template, v)
	if err != nil { // a bug in the template: the tests render all of them
		c.fail(from, "Cannot write "+name, "This is a bug in fleetingd: %s.", err)
		return
	}
	c.add(from, plan.File{Path: name, Mode: "0644", Owner: "root", Group: "root", Content: text})
}

func (c *compiler) add(from hcl.Range, f plan.File) {
	c.plan.Files = append(c.plan.Files, f)
	c.from(from, plan.KindFile, f.Path)
}

// unit adds a unit and its file; how says what apply does with the unit.
func (c *compiler) unit(from hcl.Range, name, template string, v values, how plan.Unit) {
	c.file(from, path.Join(unitDir, name), template, v)
	how.Name = name
	c.plan.Units = append(c.plan.Units, how)
	c.from(from, plan.KindUnit, name)
}

// ruleset adds the firewall, and its text for people to read: "network up" sends the rules over netlink.
func (c *compiler) ruleset() {
	n := &c.plan.Network
	n.Ruleset = Ruleset(c.plan.EgressInterface, *n, connectionLimits(c.plan.Slots)...)
	c.add(c.host.Network.Range, plan.File{
		Path: nftPath, Mode: "0644", Owner: "root", Group: "root", Content: n.Ruleset.Text(c.plan.Slots),
	})
}

// connectionLimits returns the distinct limits of the slots, sorted.
func connectionLimits(slots []plan.Slot) []int {
	var limits []int
	for _, s := range slots {
		limits = append(limits, s.Connections)
	}
	slices.Sort(limits)
	return slices.Compact(limits)
}

// disks adds the units that mount the clones' file system. "directory" needs none, and "auto" is resolved on the host,
// depending on whether the file system of state_dir can clone.
func (c *compiler) disks(v values) {
	d := c.plan.Disks
	if d.Backing != "xfs-image" && d.Backing != "tmpfs" {
		return
	}
	from := c.host.Disks.Range
	v.Disks, v.ImageDir = d, path.Dir(d.Image)
	// systemd.mount(5) requires that a mount unit is named after its path.
	v.MountUnit = unit.UnitNamePathEscape(v.Paths.Disks) + ".mount"
	if d.Backing == "tmpfs" {
		c.unit(from, unit.UnitNamePathEscape(d.Memory)+".mount", "ram.mount", v, plan.Unit{})
	}
	c.unit(from, "fleetingd-disks.service", "disks.service", v, plan.Unit{})
	c.unit(from, v.MountUnit, "disks.mount", v, plan.Unit{Enable: true, Start: true})
}

func (c *compiler) refresh(v values) {
	every := time.Duration(c.plan.Refresh)
	if every <= 0 || len(c.plan.Images) == 0 {
		return
	}
	v.Every, v.EverySeconds, v.SpreadSeconds = every.String(), int64(every.Seconds()), int64(every.Seconds()/10)
	v.RefreshSeconds = int64(refreshLimit(c.plan.Images).Seconds())
	v.RootPart = slices.ContainsFunc(c.plan.Images, func(im plan.Image) bool { return im.Source.Debian != nil })
	c.unit(c.host.Range, "fleetingd-refresh.service", "refresh.service", v, plan.Unit{})
	c.unit(c.host.Range, "fleetingd-refresh.timer", "refresh.timer", v, plan.Unit{Enable: true, Start: true})
}

// refreshLimit returns the time limit for refreshing all images: the time limits of their prebuilds plus two hours each for the
// sources, which is plenty even on a slow line.
func refreshLimit(images []plan.Image) time.Duration {
	var limit time.Duration
	for _, im := range images {
		limit += 2 * time.Hour
		if im.Prebuild != nil {
			limit += time.Duration(im.Prebuild.Timeout)
		}
	}
	return limit
}

// sysctls returns the kernel settings of the host. Settings of the TAPs are made on the TAPs themselves, and IPv6 forwarding is enabled
// by "network up": the switch for all interfaces disables router advertisements on each, and a line in
// sysctl.d cannot restore them for the other interfaces.
func (c *compiler) sysctls() []plan.Sysctl {
	const forward = "net.ipv4.ip_forward"
	c.from(c.host.Network.Range, plan.KindSysctl, forward)
	return []plan.Sysctl{{Key: forward, Value: "1"}}
}
