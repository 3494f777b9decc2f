// Package hostspec reads host.hcl: text in, a typed, defaulted and validated
// Host out. Every finding is an hcl.Diagnostic with its source line, and all are
// returned at once. It never looks at the machine, but for the files that the
// spec itself names.
package hostspec

import (
	"net/netip"
	"time"

	"github.com/hashicorp/hcl/v2"
)

// Host is one host block and all that it uses.
type Host struct {
	Name            string
	EgressInterface string
	StateDir        string
	Disks           Disks
	Network         Network
	Hypervisor      Hypervisor
	Refresh         time.Duration // 0: never
	Install         Install
	// GitLabRunner is the gitlab_runner block: the global settings of GitLab Runner's config.toml, as Runner.Settings are a section's.
	GitLabRunner map[string]any
	Images       []*Image // in the order of the source
	Pools        []*Pool
	Runners      []*Runner
	Range        hcl.Range
}

// Disks is the disks block. Size is bytes, 0 where not given.
type Disks struct {
	Backing string // auto, directory, xfs-image, tmpfs
	Size    int64
	Range   hcl.Range
}

// Network is the network block.
type Network struct {
	Subnet  netip.Prefix
	Subnet6 netip.Prefix // zero: no IPv6
	DNS     []netip.Addr
	MTU     int
	Egress  []*Egress
	Range   hcl.Range
}

// Egress is one egress block. Empty To and Ports mean any.
type Egress struct {
	Name   string
	Action string // allow, deny
	To     []netip.Prefix
	Ports  []PortRange
	Range  hcl.Range
}

// PortRange is "tcp/443" or "tcp/9000-9001".
type PortRange struct {
	Protocol    string // tcp, udp
	First, Last uint16
}

// Hypervisor is the hypervisor block.
type Hypervisor struct {
	Driver  string // cloud-hypervisor, qemu
	Binary  string
	Sandbox bool
	Accel   string // qemu only: auto, kvm, tcg
	Range   hcl.Range
}

// Install is the install block: what apply may install on Debian and Ubuntu.
type Install struct {
	Off      bool // install = false
	Packages []*Package
	Range    hcl.Range
}

// Package is a package block of install. It comes from an apt repository, or it is a file: a .deb, or a program.
type Package struct {
	Name   string
	Apt    AptRepository
	Key    string // the fingerprint of the repository's signing key, in upper-case hex
	KeyURL string
	File   string // a URL
	SHA256 string
	Range  hcl.Range
}

// AptRepository is "URL SUITE COMPONENT…", as a line of sources.list(5) has it.
type AptRepository struct {
	URL, Suite string
	Components []string // none for a suite that is a path, which ends in "/"
}

// Image is one image block. Exactly one of the sources is set.
type Image struct {
	Name     string
	File     *FileSource
	URL      *URLSource
	Ubuntu   *UbuntuSource
	Debian   *DebianSource
	Prebuild *Prebuild // nil: no prebuild block
	// User is the account that jobs run as: by default "ubuntu" in an image with the
	// ubuntu source, whose maker has made that account, and "ci" in any other.
	User  string
	Range hcl.Range
}

// FileSource is `file { disk kernel initrd cmdline }`.
type FileSource struct{ Disk, Kernel, Initrd, Cmdline string }

// URLSource is `url { disk kernel initrd sha256 sha256sums cmdline }`.
type URLSource struct{ Disk, Kernel, Initrd, SHA256, SHA256Sums, Cmdline string }

// UbuntuSource is `ubuntu { release mirror arch }`.
type UbuntuSource struct{ Release, Mirror, Arch string }

// DebianSource is `debian { suite mirror security_mirror packages arch }`. SecurityMirror may be "none".
type DebianSource struct {
	Suite, Mirror, SecurityMirror, Arch string
	Packages                            []string
}

// Prebuild is the prebuild block; its order is files, packages, run.
type Prebuild struct {
	Packages []string
	Run      []string
	Files    []*PrebuildFile
	Timeout  time.Duration
	Range    hcl.Range
}

// PrebuildFile is a file block of a prebuild. Where its content holds secrets, Secret is that content and Content is empty.
type PrebuildFile struct {
	Path, Content, Mode string
	Secret              Text
}

// Pool is one pool block.
type Pool struct {
	Name         string
	Image        string // the image's name
	CPUs         int
	Memory       int64 // bytes
	Disk         int64 // bytes
	Start        string
	Console      bool
	MaxInstances int
	Limits       Limits
	Range        hcl.Range
}

// DefaultConnections is how many conntrack entries a worker may have where its pool does not say.
const DefaultConnections = 16384

// Limits is a pool's limits block; 0 is no limit.
type Limits struct {
	CPUQuotaPercent int
	DiskIOPS        int
	NetworkMbps     int
	Connections     int // conntrack entries; always limited
}

// Runner is one runner block.
type Runner struct {
	Name                string
	Pool                string
	URL                 string
	Token               Text
	Executor            string
	CapacityPerInstance int
	MaxUseCount         int
	Policies            []*Policy
	// Settings is `settings = {…}`: GitLab Runner's own keys, as plain Go values
	// (string, bool, int64, float64, []any, map[string]any), and a Text for a string that holds secrets.
	Settings map[string]any
	Range    hcl.Range
}

// Policy is one policy block of a runner.
type Policy struct {
	Periods          []string
	Timezone         string
	IdleCount        int
	IdleTime         time.Duration
	ScaleFactor      float64
	ScaleFactorLimit int
	PreemptiveMode   *bool // nil: not said
	Range            hcl.Range
}
