package main

import (
	"fmt"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/zclconf/go-cty/cty"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/netrange"
	"github.com/fleetingd/fleetingd/appliance/visible"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// initStateDir is where fleetingd keeps images and clones unless a spec says otherwise.
const initStateDir = "/var/lib/fleetingd"

// initAnswers are what no look at a machine can tell.
type initAnswers struct {
	url       string // of GitLab
	tokenFile string // absolute path
	packages  []string
	workers   int
}

// initFacts are what is known of the machine and its surroundings.
type initFacts struct {
	host.Survey
	subnet netip.Prefix // free here; the zero value if none is
	// gitlab are GitLab's addresses, as far as they are known.
	gitlab []netip.Addr
}

const (
	mib = 1 << 20
	gib = 1 << 30
	// A worker with less memory or disk cannot do much with an Ubuntu image.
	leastMemory = 1 * gib
	leastDisk   = 8 * gib
	// mostMemory, mostCPUs and mostDisk are what one worker is given at most; whoever needs more writes more.
	mostMemory = 16 * gib
	mostCPUs   = 8
	mostDisk   = 40 * gib
	// imageSpace is for the base image, its prebuild, and the next one that is built beside it.
	imageSpace = 12 * gib
)

// workerMemory is the memory that may go to workers. The rest is the host's: the runner, the VMMs, and the page cache, without which
// clones are slow.
func workerMemory(s host.Survey) int64 { return s.Memory - min(s.Memory/2, max(2*gib, s.Memory/10)) }

// mostWorkers is how many workers the memory has room for.
func mostWorkers(s host.Survey) int {
	const most = 1 << 14
	return int(min(workerMemory(s)/leastMemory, most))
}

// proposedWorkers is a number of workers with 4 GiB each, one for each CPU at most.
func proposedWorkers(s host.Survey) int {
	return max(1, min(int(workerMemory(s)/(4*gib)), s.CPUs, mostWorkers(s)))
}

// initSubnetBits is the prefix length of a network for so many workers and an image.
func initSubnetBits(workers int) int {
	bits := netrange.Workers.Bits()
	for 1<<(32-bits)-2 < workers+1 {
		bits--
	}
	return bits
}

// workerSize is what each worker is given, so that all fit. Sizes are in bytes.
type workerSize struct {
	cpus         int
	memory, disk int64
	image        int64 // of the XFS image, if there is one
}

func sizeWorkers(s host.Survey, workers int) (workerSize, error) {
	if most := mostWorkers(s); workers > most {
		return workerSize{}, fmt.Errorf("%s need at least 1 GiB of memory each, and this machine has %.1f GiB, enough for %d; write --workers %d or less",
			count(workers, "worker"), float64(s.Memory)/gib, most, max(most, 1))
	}
	if s.Free < imageSpace+leastDisk {
		return workerSize{}, fmt.Errorf("%s has %.1f GiB free, and an image and a worker need %d GiB; free some space, or mount a larger file system there",
			initStateDir, float64(s.Free)/gib, (imageSpace+leastDisk)/gib)
	}
	memory := min(workerMemory(s)/int64(workers), mostMemory)
	step := int64(256 * mib)
	if memory >= 4*gib {
		step = gib
	}
	disk := (s.Free - imageSpace) / int64(workers)
	return workerSize{
		// Two virtual CPUs for each real one: most jobs wait half of their time.
		cpus:   max(1, min(2*s.CPUs/workers, s.CPUs, mostCPUs)),
		memory: memory - memory%step,
		disk:   min(max(disk-disk%gib, leastDisk), mostDisk),
		image:  s.Free / 5 * 4 / gib * gib,
	}, nil
}

// initSpec is a host spec for a machine, with a comment on whatever was decided. It is not checked.
func initSpec(f initFacts, a initAnswers) ([]byte, error) {
	size, err := sizeWorkers(f.Survey, a.workers)
	if err != nil {
		return nil, err
	}
	var b specText
	b.line("# A host for GitLab CI, written by fleetingd init on %s.", plainLine(describe(f.Survey)))
	b.line("# It had %s. Change what you like, then:", resources(f.Survey))
	b.line("#   fleetingd validate host.hcl # is it right?")
	b.line("#   fleetingd doctor host.hcl # does this machine have what it needs?")
	b.line("")
	b.line("host %s {", hclText(hostspec.HostLabel(f.Name)))
	if f.Egress != "" {
		b.line("egress_interface = %s # the interface of this machine's default route", hclText(f.Egress))
	} else {
		b.line("egress_interface = %s # this machine has no default route: write the interface for the workers' traffic", hclText("eno1"))
	}
	b.disks(f.Survey, size)
	b.network(f, a)
	b.hypervisor(f.Survey)
	b.line("}")
	b.image(f.Survey, a.packages)
	b.line("")
	b.line("pool \"default\" {")
	b.line("image = image.ubuntu")
	b.line("cpus = %d # of %d; two virtual CPUs for each real one", size.cpus, f.CPUs)
	b.line("memory = %s # all workers fit in %.1f GiB, with room for the host", hclText(sizeText(size.memory)), float64(f.Memory)/gib)
	b.line("disk = %s # sparse: it takes what jobs write", hclText(sizeText(size.disk)))
	b.line("start = \"cold\"")
	b.line("")
	b.line("max_instances = %d", a.workers)
	b.line("}")
	b.line("")
	b.line("runner \"default\" {")
	b.line("pool = pool.default")
	b.line("url = %s", hclText(a.url))
	b.line("token = file(%s) # read when config.toml is written; never in the spec, a plan or a log", hclText(a.tokenFile))
	b.line("executor = \"instance\" # jobs run in the VM's shell; \"docker-autoscaler\" runs each in a container there")
	b.line("")
	b.line("max_use_count = 1 # a fresh VM for each job")
	b.line("policy {")
	b.line("idle_count = %d # ready for the next jobs", max(1, min(a.workers/4, 4)))
	b.line("idle_time = \"10m\"")
	b.line("}")
	b.line("}")
	return hclwrite.Format([]byte(b.String())), nil
}

// specText is a spec's text while it is written.
type specText struct{ strings.Builder }

func (b *specText) line(format string, args ...any) { fmt.Fprintf(b, format+"\n", args...) }

func (b *specText) disks(s host.Survey, size workerSize) {
	b.line("")
	b.line("disks {")
	switch s.Backing {
	case "directory":
		b.line("backing = \"directory\" # the file system of %s can clone files", initStateDir)
	case "xfs-image":
		b.line("# The file system of %s cannot clone files, so clones live in an XFS image there.", initStateDir)
		b.line("backing = \"xfs-image\"")
		b.line("size = %s # of %.1f GiB free; sparse", hclText(sizeText(size.image)), float64(s.Free)/gib)
	default:
		b.line("backing = \"auto\" # only root can tell whether the file system of %s can clone files", initStateDir)
	}
	b.line("}")
}

func (b *specText) network(f initFacts, a initAnswers) {
	b.line("")
	b.line("network {")
	if f.subnet.IsValid() {
		b.line("subnet = %s # one address per worker; unused on this machine", hclText(f.subnet.String()))
	} else {
		b.line("# No private network of the size is free on this machine. doctor says what is in the way.")
		b.line("subnet = %s", hclText(netip.PrefixFrom(netrange.Workers.Addr(), initSubnetBits(a.workers)).Masked().String()))
	}
	private := slices.DeleteFunc(slices.Clone(f.gitlab), func(a netip.Addr) bool { return !netrange.Private(a) || a.IsLoopback() || a.Is6() })
	if len(private) > 0 {
		to := make([]string, len(private))
		for i, addr := range private {
			to[i] = netip.PrefixFrom(addr, addr.BitLen()).String()
		}
		b.line("")
		b.line("# Workers reach the internet and nothing private, unless it is allowed here. GitLab is.")
		b.line("egress \"gitlab\" {")
		b.line("action = \"allow\"")
		b.line("to = %s", hclTexts(to))
		b.line("ports = %s", hclTexts([]string{"tcp/" + urlPort(a.url)}))
		b.line("}")
	}
	b.line("}")
}

// urlPort is the port that a URL's server listens on.
func urlPort(text string) string {
	u, err := url.Parse(text)
	switch {
	case err == nil && u.Port() != "":
		return u.Port()
	case err == nil && u.Scheme == "http":
		return "80"
	}
	return "443"
}

func (b *specText) hypervisor(s host.Survey) {
	switch {
	case s.NoKVM != "":
		b.line("")
		b.line("# KVM runs no guest on this machine (fleetingd doctor says why), so workers are emulated and many times slower.")
		b.line("hypervisor \"qemu\" {")
		b.line("accel = \"tcg\"")
		b.line("}")
	case s.CloudHypervisor == "" && s.QEMU != "":
		b.line("")
		b.line("hypervisor \"qemu\" { # installed here; \"cloud-hypervisor\" starts workers faster")
		b.line("accel = \"kvm\"")
		b.line("}")
	}
}

func (b *specText) image(s host.Survey, packages []string) {
	b.line("")
	b.line("image \"ubuntu\" {")
	b.line("ubuntu { # Canonical's cloud image; its checksum is verified against Canonical's key")
	b.line("release = \"noble\"")
	if s.Arch != "amd64" {
		b.line("arch = %s", hclText(s.Arch))
	}
	b.line("}")
	b.line("")
	b.line("prebuild { # what every worker starts with")
	all := slices.Clone(packages)
	for _, p := range []string{"ca-certificates", "curl", "git"} {
		if !slices.Contains(all, p) {
			all = append(all, p)
		}
	}
	b.line("packages = %s", hclTexts(all))
	run := slices.Clone(hostspec.UbuntuCommands)
	if slices.Contains(all, "docker.io") {
		run = append(run, "usermod -aG docker ubuntu")
	}
	b.line("# Jobs need gitlab-runner in the VM for caches and artifacts.")
	b.line("run = [")
	for _, cmd := range run {
		b.line("%s,", hclText(cmd))
	}
	b.line("]")
	b.line("}")
	b.line("}")
}

// describe is the machine in a few words.
func describe(s host.Survey) string {
	if s.Distribution == "" {
		return s.Name
	}
	return s.Name + ", " + s.Distribution
}

func resources(s host.Survey) string {
	return fmt.Sprintf("%s, %.1f GiB of memory, and %.1f GiB free for %s", count(s.CPUs, "CPU"), float64(s.Memory)/gib, float64(s.Free)/gib, initStateDir)
}

// plainLine is text from elsewhere for a comment.
func plainLine(s string) string { return visible.Text(strings.Join(strings.Fields(s), " ")) }

// sizeText is a number of bytes as a spec has it.
func sizeText(n int64) string {
	if n%gib == 0 {
		return strconv.FormatInt(n/gib, 10) + "GiB"
	}
	return strconv.FormatInt(n/mib, 10) + "MiB"
}

// hclText is a string in HCL, its template marks escaped.
func hclText(s string) string { return string(hclwrite.TokensForValue(cty.StringVal(s)).Bytes()) }

func hclTexts(texts []string) string {
	quoted := make([]string, len(texts))
	for i, s := range texts {
		quoted[i] = hclText(s)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}
