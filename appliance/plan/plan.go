// Package plan holds the Plan: everything a host is to become, decided in
// advance. It is data with a canonical JSON form and a digest. It never looks
// at a machine, and it never holds a secret.
package plan

import (
	"fmt"
	"net/netip"
	"path"

	"github.com/fleetingd/fleetingd/seed"
)

// Version is the format of plan.json. A reader refuses any other.
const Version = 2

// Plan is one compiled host. The same spec always gives the same bytes.
type Plan struct {
	Version         int      `json:"version"`
	Host            string   `json:"host"`
	EgressInterface string   `json:"egress_interface"`
	User            string   `json:"user"` // runs the runner, the plugin and the VMMs
	Paths           Paths    `json:"paths"`
	Refresh         Duration `json:"refresh"` // 0: images are not rebuilt on a schedule

	Disks      Disks      `json:"disks"`
	Hypervisor Hypervisor `json:"hypervisor"`
	Network    Network    `json:"network"`
	Images     []Image    `json:"images"`
	Pools      []Pool     `json:"pools"`
	Slots      []Slot     `json:"slots"`
	Runners    []Runner   `json:"runners"`

	Install *Install `json:"install,omitempty"` // nil: apply installs nothing
	Files   []File   `json:"files"`
	Units   []Unit   `json:"units"`
	Sysctls []Sysctl `json:"sysctls"`

	// Origins maps an item's address ("pool.small", "file./etc/…": see Address) to its
	// spec line, "host.hcl:12". It is outside the digest: adding a comment to the spec
	// must not restart anything.
	Origins map[string]string `json:"origins,omitempty"`
}

// Paths are the absolute paths below which fleetingd keeps its files.
type Paths struct {
	State   string `json:"state"`   // state_dir
	Disks   string `json:"disks"`   // sealed images and clones, on one file system that can clone
	Images  string `json:"images"`  // below Disks: base and sealed images
	Clones  string `json:"clones"`  // below Disks: one folder per worker
	Workers string `json:"workers"` // below State: worker records, one folder per pool
	Cache   string `json:"cache"`   // below State: downloads
	Run     string `json:"run"`     // sockets and process state, gone at reboot; short, for sun_path's 108 bytes
}

// RunDir is Paths.Run of every plan. It is short because sockets lie below it, whose paths are limited to 108 bytes.
const RunDir = "/run/fleetingd"

// Disks says where clones live. Backing is "auto", "directory", "xfs-image" or
// "tmpfs"; Size is in bytes, 0 if the backing takes none.
type Disks struct {
	Backing string `json:"backing"`
	Size    int64  `json:"size"`
	// Image is the XFS image that is mounted on Paths.Disks with MountOptions (mount(8)). Backing "auto" uses it if that folder's own
	// file system cannot clone; "directory" has none.
	Image        string `json:"image,omitempty"`
	MountOptions string `json:"mount_options,omitempty"`
	// Memory is the mount point of a tmpfs with MemoryOptions, which holds the image of backing "tmpfs".
	Memory        string `json:"memory,omitempty"`
	MemoryOptions string `json:"memory_options,omitempty"`
}

// NewDisks returns the Disks below a state folder; size is in bytes.
func NewDisks(state, backing string, size int64) Disks {
	d := Disks{Backing: backing, Size: size}
	if backing == "directory" {
		return d
	}
	dir := state
	if backing == "tmpfs" {
		d.Memory = path.Join(state, "ram")
		d.MemoryOptions = fmt.Sprintf("size=%d,mode=0700,nodev,nosuid,noexec", size)
		dir = d.Memory
	}
	d.Image = path.Join(dir, "disks.xfs")
	// discard: the space of a deleted clone returns to the underlying file system.
	d.MountOptions = "loop,discard,noatime,nodev,nosuid,noexec"
	return d
}

// Hypervisor is the VMM of every worker on the host.
type Hypervisor struct {
	Driver  string `json:"driver"` // "cloud-hypervisor" or "qemu"
	Binary  string `json:"binary"` // a name on PATH or an absolute path
	Sandbox bool   `json:"sandbox"`
	Accel   string `json:"accel,omitempty"` // qemu: "auto", "kvm" or "tcg"
}

// Network is what all slots have in common.
type Network struct {
	Subnet   netip.Prefix  `json:"subnet"`
	Subnet6  *netip.Prefix `json:"subnet6,omitempty"` // nil: workers have no IPv6
	Gateway  netip.Addr    `json:"gateway"`           // on the host's loopback, as /32
	Gateway6 *netip.Addr   `json:"gateway6,omitempty"`
	DNS      []netip.Addr  `json:"dns"`
	MTU      int           `json:"mtu"`
	HostMAC  string        `json:"host_mac"`   // of every TAP's host end
	GuestMAC string        `json:"worker_mac"` // of every worker
	Egress   []Egress      `json:"egress"`
	Ruleset  Ruleset       `json:"ruleset"`
}

// Egress is one rule of the spec's egress list; the first match wins. An empty To
// or Ports matches any.
type Egress struct {
	Name   string         `json:"name"`
	Action string         `json:"action"` // "allow" or "deny"
	To     []netip.Prefix `json:"to"`
	Ports  []PortRange    `json:"ports"`
}

// PortRange is a range such as tcp/9000-9001; Protocol is "tcp" or "udp", First and Last are inclusive.
type PortRange struct {
	Protocol string `json:"protocol"`
	First    uint16 `json:"first"`
	Last     uint16 `json:"last"`
}

// Slot is a worker's place on the host. It exists before the worker and outlives it.
type Slot struct {
	Index    int         `json:"index"` // unique on the host; not the slot's place in Plan.Slots, where there are no gaps
	TAP      string      `json:"tap"`   // interface name, at most 15 bytes (IFNAMSIZ)
	Address  netip.Addr  `json:"address"`
	Address6 *netip.Addr `json:"address6,omitempty"`
	// Queues is the number of RX/TX pairs of the TAP. Above 1, the TAP is created with
	// IFF_MULTI_QUEUE, and must be opened with the same flag.
	Queues int `json:"queues"`
	// Connections is the number of conntrack entries that its worker may have.
	Connections int `json:"connections"`
}

// Image is what the workers of a pool are cloned from.
type Image struct {
	Name     string    `json:"name"`
	Source   Source    `json:"source"`
	Prebuild *Prebuild `json:"prebuild,omitempty"` // nil: the source is used unchanged, and is ready once SSH answers
	User     string    `json:"user"`               // the account that jobs run as
	// BuildSlot is the place in Plan.Slots of the slot that prebuilds of this image use, so that
	// a refresh does not take a worker's slot.
	BuildSlot int `json:"build_slot"`
}

// Source says where an image's disk, kernel and initrd come from. Exactly one
// field is set.
type Source struct {
	File   *FileSource   `json:"file,omitempty"`
	URL    *URLSource    `json:"url,omitempty"`
	Ubuntu *UbuntuSource `json:"ubuntu,omitempty"`
	Debian *DebianSource `json:"debian,omitempty"`
}

// FileSource is a disk on this host, raw or qcow2.
type FileSource struct {
	Disk    string `json:"disk"`
	Kernel  string `json:"kernel"`
	Initrd  string `json:"initrd,omitempty"`
	Cmdline string `json:"cmdline,omitempty"` // replaces the default kernel command line
}

// URLSource is fetched over HTTP(S). SHA256 is the disk's digest in hex, or
// empty if a SHA256SUMS file lists all of the files.
type URLSource struct {
	Disk       string `json:"disk"`
	Kernel     string `json:"kernel"`
	Initrd     string `json:"initrd,omitempty"`
	SHA256     string `json:"sha256,omitempty"`
	SHA256Sums string `json:"sha256sums,omitempty"` // URL of a SHA256SUMS file
	Cmdline    string `json:"cmdline,omitempty"`
}

// UbuntuSource is one of Canonical's cloud images, whose SHA256SUMS is signed.
type UbuntuSource struct {
	Release string `json:"release"`
	Mirror  string `json:"mirror"` // https://cloud-images.ubuntu.com
	Arch    string `json:"arch"`   // amd64, arm64, riscv64
}

// DebianSource is built from a package mirror with mmdebstrap.
type DebianSource struct {
	Suite  string `json:"suite"`
	Mirror string `json:"mirror,omitempty"` // empty: apt's own configuration on this host
	// SecurityMirror has the security updates. If empty, it is Mirror with "-security" appended or, if Mirror is empty too, apt's own
	// configuration on this host.
	SecurityMirror string   `json:"security_mirror,omitempty"`
	Packages       []string `json:"packages"`
	Arch           string   `json:"arch"`
}

// NoSecurityMirror is the SecurityMirror of a DebianSource without security updates.
const NoSecurityMirror = "none"

// Prebuild runs once in the base image; the result is sealed.
type Prebuild struct {
	Steps   []Step   `json:"steps"` // files, then packages, then commands: the order in which they run
	Timeout Duration `json:"timeout"`
	// Seed is the NoCloud seed of the prebuild VM. The guest binary is added when its ISO
	// is made, and is not part of a Plan.
	Seed seed.Seed `json:"seed"`
}

// Step is one prebuild step. Exactly one of Command, Packages and File is set.
type Step struct {
	Name     string    `json:"name"`              // as the user sees it: `run[0]: curl …`
	Command  string    `json:"command,omitempty"` // for /bin/sh -c
	Packages []string  `json:"packages,omitempty"`
	File     *StepFile `json:"file,omitempty"`
}

// StepFile is a file that the prebuild writes into the image. If its content holds secrets, Content is empty and Secret stands for it:
// it is read when the step runs, and sent to the guest over the channel.
type StepFile struct {
	Path    string `json:"path"`
	Content string `json:"content"`
	Secret  Text   `json:"secret,omitempty"`
	Mode    string `json:"mode"` // octal, "0644"
}

// Pool is a number of identical workers. Its slots are Plan.Slots from FirstSlot to FirstSlot+MaxInstances-1.
type Pool struct {
	Name         string   `json:"name"`
	Image        string   `json:"image"`
	CPUs         int      `json:"cpus"`
	Memory       int64    `json:"memory"` // bytes
	Disk         int64    `json:"disk"`   // bytes, sparse
	Start        string   `json:"start"`  // "warm" or "cold"
	Console      bool     `json:"console"`
	FirstSlot    int      `json:"first_slot"`
	MaxInstances int      `json:"max_instances"`
	Limits       Limits   `json:"limits"`
	StartTimeout Duration `json:"start_timeout"` // from clone to ready; also limits the wait for an image whose build fails
}

// Limits apply to each worker; 0 means no limit.
type Limits struct {
	CPUQuotaPercent int `json:"cpu_quota_percent,omitempty"` // 400 is four CPUs
	DiskIOPS        int `json:"disk_iops,omitempty"`
	NetworkMbps     int `json:"network_mbps,omitempty"` // 10^6 bit/s, each direction
	Connections     int `json:"connections,omitempty"`  // conntrack entries, enforced by the firewall
}

// Runner is one [[runners]] section, the text of which is in the File
// etc/gitlab-runner/config.toml.
type Runner struct {
	Name  string `json:"name"`
	Pool  string `json:"pool"`
	Token Text   `json:"token"`
}

// File is a file of the host. Content may hold the Placeholder of each of its
// Secrets, which are replaced by their values when the file is written.
type File struct {
	Path    string       `json:"path"` // absolute
	Mode    string       `json:"mode"` // octal, "0644"
	Owner   string       `json:"owner"`
	Group   string       `json:"group"`
	Content string       `json:"content"`
	Secrets []FileSecret `json:"secrets,omitempty"`
}

// FileSecret is a secret in a File.
type FileSecret struct {
	Placeholder string `json:"placeholder"`
	Secret      Piece  `json:"secret"`
}

// Unit is a systemd unit, whose text is one of the Files or comes with the
// distribution; Enable and Start say what apply does with it.
type Unit struct {
	Name   string `json:"name"`
	Enable bool   `json:"enable"`
	Start  bool   `json:"start"`
}

// Sysctl is one kernel setting, such as "net.ipv4.ip_forward" = "1".
type Sysctl struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}
