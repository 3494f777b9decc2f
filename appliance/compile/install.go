package compile

import (
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// qemuPackages are the Debian packages of QEMU's emulators.
var qemuPackages = map[string]string{
	"qemu-system-x86_64": "qemu-system-x86", "qemu-system-aarch64": "qemu-system-arm", "qemu-system-riscv64": "qemu-system-misc",
}

// install adds the distribution packages that the host needs, and the packages of the install block.
func (c *compiler) install() {
	if c.host.Install.Off {
		return
	}
	in := &plan.Install{Packages: []string{}}
	c.plan.Install = in
	add := func(from hcl.Range, name string) {
		if !slices.Contains(in.Packages, name) {
			in.Packages = append(in.Packages, name)
			c.from(from, plan.KindPackage, name)
		}
	}
	for _, p := range c.host.Install.Packages { // first: their lines are the origin
		digest := strings.ToLower(p.SHA256)
		switch {
		case p.File == "":
			add(p.Range, p.Name)
			in.Sources = append(in.Sources, plan.AptSource{
				Package: p.Name, URL: p.Apt.URL, Suite: p.Apt.Suite, Components: p.Apt.Components, Fingerprint: p.Key, KeyURL: p.KeyURL,
			})
		case strings.HasSuffix(p.File, ".deb"):
			add(p.Range, p.Name)
			in.Debs = append(in.Debs, plan.Download{Package: p.Name, URL: p.File, SHA256: digest})
		default:
			in.Programs = append(in.Programs, plan.Download{Package: p.Name, URL: p.File, SHA256: digest})
			c.from(p.Range, plan.KindPackage, p.Name)
		}
	}
	for _, im := range c.host.Images {
		if im.Debian == nil {
			add(im.Range, "qemu-utils") // qemu-img converts images
			continue
		}
		for _, name := range []string{"mmdebstrap", "e2fsprogs", "debian-archive-keyring"} {
			add(im.Range, name)
		}
	}
	if c.plan.Disks.Backing != "directory" {
		add(c.host.Disks.Range, "xfsprogs")
	}
	if name, ok := qemuPackages[c.plan.Hypervisor.Binary]; ok {
		add(c.host.Hypervisor.Range, name)
	}
	slices.Sort(in.Packages)
}
