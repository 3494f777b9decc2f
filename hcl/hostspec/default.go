package hostspec

import (
	"net/netip"
	"path"
	"time"

	"github.com/fleetingd/fleetingd/appliance/netrange"
)

// setDefaults fills in what was not given, and also what was given wrongly: a
// finding about that is enough, and needs no others in its wake.
func (l *loader) setDefaults(s *spec) {
	for _, h := range s.hosts {
		l.defaultHost(h)
	}
	for _, i := range s.images {
		l.defaultImage(i)
	}
	for _, p := range s.pools {
		deflt(l, p, "start", &p.Start, "warm")
		deflt(l, &p.Limits, "connections", &p.Limits.Connections, DefaultConnections)
	}
	for _, r := range s.runners {
		l.defaultRunner(r)
	}
}

func deflt[T any](l *loader, owner any, name string, to *T, value T) {
	if !l.ok(owner, name) {
		*to = value
	}
}

func (l *loader) defaultHost(h *Host) {
	deflt(l, h, "state_dir", &h.StateDir, "/var/lib/fleetingd")
	deflt(l, h, "refresh", &h.Refresh, 24*time.Hour)

	deflt(l, &h.Disks, "backing", &h.Disks.Backing, "auto")

	n := &h.Network
	deflt(l, n, "subnet", &n.Subnet, netrange.Workers)
	// Cloudflare's resolvers that refuse known malware and adult content.
	deflt(l, n, "dns", &n.DNS, []netip.Addr{netip.MustParseAddr("1.1.1.3"), netip.MustParseAddr("1.0.0.3")})
	deflt(l, n, "mtu", &n.MTU, 1500)

	v := &h.Hypervisor
	if v.Driver == "" && !l.ok(v, "label") {
		v.Driver = "cloud-hypervisor"
	}
	if v.Driver == "qemu" {
		deflt(l, v, "binary", &v.Binary, qemuBinary(h.Images))
		deflt(l, v, "accel", &v.Accel, "auto")
	} else {
		deflt(l, v, "binary", &v.Binary, "cloud-hypervisor")
	}
	deflt(l, v, "sandbox", &v.Sandbox, true)
}

// qemuBinary is QEMU's name for the architecture of the images that say theirs. It is
// not this machine's: the same spec gives the same plan everywhere.
func qemuBinary(images []*Image) string {
	names := map[string]string{"arm64": "qemu-system-aarch64", "riscv64": "qemu-system-riscv64"}
	for _, i := range images {
		if name, ok := names[i.arch()]; ok {
			return name
		}
	}
	return "qemu-system-x86_64"
}

// arch is the architecture that an image's source names, or "".
func (i *Image) arch() string {
	switch {
	case i.Ubuntu != nil:
		return i.Ubuntu.Arch
	case i.Debian != nil:
		return i.Debian.Arch
	}
	return ""
}

func (l *loader) defaultImage(i *Image) {
	user := "ci"
	if u := i.Ubuntu; u != nil {
		user = "ubuntu" // the account of Canonical's cloud images
		deflt(l, u, "mirror", &u.Mirror, "https://cloud-images.ubuntu.com")
		deflt(l, u, "arch", &u.Arch, "amd64")
	}
	deflt(l, i, "user", &i.User, user)
	if d := i.Debian; d != nil {
		deflt(l, d, "arch", &d.Arch, "amd64")
	}
	if u := i.URL; u != nil && u.SHA256 == "" {
		// Without a digest in the spec, the SHA256SUMS beside the disk has them.
		deflt(l, u, "sha256sums", &u.SHA256Sums, siblingURL(u.Disk, "SHA256SUMS"))
	}
	if p := i.Prebuild; p != nil {
		deflt(l, p, "timeout", &p.Timeout, 30*time.Minute)
		for _, f := range p.Files {
			deflt(l, f, "mode", &f.Mode, "0644")
		}
	}
}

// siblingURL is the URL of another file in the folder of a URL.
func siblingURL(disk, name string) string {
	u, err := parseURL(disk)
	if err != nil {
		return ""
	}
	u.Path, u.RawPath = path.Join(path.Dir(u.Path), name), ""
	return u.String()
}

func (l *loader) defaultRunner(r *Runner) {
	deflt(l, r, "executor", &r.Executor, "instance")
	deflt(l, r, "capacity_per_instance", &r.CapacityPerInstance, 1)
	deflt(l, r, "max_use_count", &r.MaxUseCount, 1)
}
