package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	testneed "github.com/fleetingd/fleetingd/appliance/need" // the package has a need of its own
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// healthy is a doctor at a host that lacks nothing. A test breaks one thing of it.
func healthy() *doctor {
	files := fstest.MapFS{
		"proc/cpuinfo":                                  {Data: []byte("vendor_id\t: AuthenticAMD\nflags\t\t: fpu svm lm\n")},
		"proc/meminfo":                                  {Data: []byte("MemTotal:       33554432 kB\nMemFree:        1 kB\n")},
		"proc/sys/net/ipv4/ip_forward":                  {Data: []byte("1\n")},
		"proc/sys/net/ipv4/conf/all/arp_ignore":         {Data: []byte("0\n")},
		"sys/fs/cgroup/cgroup.controllers":              {Data: []byte("cpuset cpu io memory hugetlb pids\n")},
		"run/systemd/system":                            {Mode: fs.ModeDir | 0o755},
		"dev/kvm":                                       {},
		"var/lib/fleetingd":                             {Mode: fs.ModeDir | 0o755},
		"usr/lib/systemd/systemd-timesyncd":             {},
		"usr/share/keyrings/debian-archive-keyring.gpg": {},
	}
	for _, dir := range []string{".", "var", "var/lib"} {
		files[dir] = &fstest.MapFile{Mode: fs.ModeDir | 0o755}
	}
	return &doctor{
		plan: &plan.Plan{
			Host: "metal", EgressInterface: "eno1", User: "fleetingd",
			Paths:      plan.Paths{State: "/var/lib/fleetingd", Disks: "/var/lib/fleetingd/disks"},
			Disks:      plan.Disks{Backing: "auto"},
			Hypervisor: plan.Hypervisor{Driver: "cloud-hypervisor", Binary: "cloud-hypervisor", Sandbox: true},
			Network: plan.Network{Subnet: netip.MustParsePrefix("172.16.120.0/22"), Gateway: netip.MustParseAddr("172.16.120.1"),
				DNS: []netip.Addr{netip.MustParseAddr("1.1.1.3")}},
			Images: []plan.Image{
				{Name: "ubuntu", Source: plan.Source{Ubuntu: &plan.UbuntuSource{Release: "noble"}}},
				{Name: "debian", Source: plan.Source{Debian: &plan.DebianSource{Suite: "trixie"}}},
			},
			Pools:   []plan.Pool{{Name: "small", Memory: 4 << 30, Disk: 30 << 30, MaxInstances: 4}},
			Runners: []plan.Runner{{Name: "small"}},
		},
		probes: Probes{
			KVM:      func(context.Context) error { return nil },
			Driver:   func(context.Context) (string, string, error) { return "/usr/bin/cloud-hypervisor", "v53.0", nil },
			CanClone: func(string) error { return nil },
		},
		machine: machine{
			arch:     "amd64",
			root:     true,
			lookPath: func(name string) (string, error) { return "/usr/bin/" + name, nil },
			output: func(_ context.Context, name string, _ ...string) (string, error) {
				if name == "systemctl" {
					return "systemd 257 (257.13-1~deb13u1)\n+PAM\n", nil
				}
				return "Version:      19.3.0\nGit revision: x\n", nil
			},
			readFile: func(path string) ([]byte, error) { return files.ReadFile(strings.TrimPrefix(path, "/")) },
			stat: func(path string) (fs.FileInfo, error) {
				if path == "/" {
					path = "/."
				}
				return files.Stat(strings.TrimPrefix(path, "/"))
			},
			account:  func(string) (*account, error) { return &account{uid: 990, gid: 990, groups: []int{990, 105}}, nil },
			openAs:   func(*account, string) error { return nil },
			readAs:   func(*account, string) error { return nil },
			space:    func(string) (int64, error) { return 200 << 30, nil },
			network:  func(*plan.Plan) (*have, error) { return network1("10.0.2.0/24"), nil },
			ask:      func(flow, int) (int, error) { return 0, errors.New("no TAP is up") },
			trial:    func(plan.Ruleset, []plan.Slot) error { return nil },
			dropper:  func(*plan.Plan, bool) (*blockade, error) { return nil, nil },
			landlock: func() (int, error) { return 6, nil },
			synced:   func() (bool, error) { return true, nil },
		},
	}
}

// network1 is a host with one link, eno1, with a route to its own network and the default route.
func network1(own string) *have {
	_, dst, err := net.ParseCIDR(own)
	if err != nil {
		panic(err)
	}
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "eno1", Index: 2, Flags: net.FlagUp}}
	return &have{
		links:  map[string]netlink.Link{"lo": &netlink.Device{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: 1}}, "eno1": link},
		routes: []netlink.Route{{LinkIndex: 2, Gw: net.IPv4(10, 0, 2, 2)}, {LinkIndex: 2, Dst: dst, Protocol: unix.RTPROT_KERNEL}},
	}
}

// withFile puts a file's content, or an error where it is nil, in front of the machine's own.
func withFile(d *doctor, path string, content []byte) {
	next := d.machine.readFile
	d.machine.readFile = func(p string) ([]byte, error) {
		switch {
		case p != path:
			return next(p)
		case content == nil:
			return nil, &fs.PathError{Op: "open", Path: p, Err: fs.ErrNotExist}
		}
		return content, nil
	}
}

func without(d *doctor, path string) {
	next := d.machine.stat
	d.machine.stat = func(p string) (fs.FileInfo, error) {
		if p == path {
			return nil, &fs.PathError{Op: "stat", Path: p, Err: fs.ErrNotExist}
		}
		return next(p)
	}
}

func withoutProgram(d *doctor, names ...string) {
	next := d.machine.lookPath
	d.machine.lookPath = func(name string) (string, error) {
		if slices.Contains(names, name) {
			return "", fmt.Errorf("%s: not found", name)
		}
		return next(name)
	}
}

func answers(d *doctor, program, text string) {
	next := d.machine.output
	d.machine.output = func(ctx context.Context, name string, args ...string) (string, error) {
		if strings.HasSuffix(name, program) {
			return text, nil
		}
		return next(ctx, name, args...)
	}
}

func TestDoctorHealthy(t *testing.T) {
	want := []string{"cpu-virtualization", "kvm", "hypervisor", "systemd", "cgroup", "landlock", "user", "tun", "nftables",
		"egress-interface", "subnet", "dns", "foreign-firewall", "ip-forwarding", "arp-ignore", "state-dir", "disks", "disk-space", "memory", "qemu-img",
		"mmdebstrap", "mke2fs", "debian-archive-keyring", "clock", "gitlab-runner"}
	var got []string
	for _, f := range healthy().examine(t.Context()) {
		got = append(got, f.Check)
		if f.Status != StatusOK || f.Cure != "" || f.Detail == "" {
			t.Errorf("a host that lacks nothing has %+v", f)
		}
	}
	// Scripts read these names: see Finding.
	if !slices.Equal(got, want) {
		t.Errorf("checks are %q, want %q", got, want)
	}
}

func TestDoctorFaults(t *testing.T) {
	refused := &fs.PathError{Op: "open", Path: "/dev/kvm", Err: unix.EACCES}
	for _, c := range []struct {
		name   string
		fault  func(d *doctor)
		check  string
		status Status
		detail string
		cure   string
	}{
		{"no virtualization", func(d *doctor) { withFile(d, "/proc/cpuinfo", []byte("flags\t: fpu svm_lock\n")) },
			"cpu-virtualization", StatusFail, "neither vmx nor svm", "AMD-V"},
		{"no virtualization, and emulation will do", func(d *doctor) {
			d.plan.Hypervisor = plan.Hypervisor{Driver: "qemu", Accel: "auto"}
			withFile(d, "/proc/cpuinfo", []byte("flags\t: fpu\n"))
		}, "cpu-virtualization", StatusWarn, "neither vmx nor svm", "AMD-V"},
		{"KVM hangs", func(d *doctor) { d.probes.KVM = func(context.Context) error { return errors.New("did not finish") } },
			"kvm", StatusFail, "did not finish", "use another machine"},
		{"no KVM", func(d *doctor) {
			d.machine.openAs = func(*account, string) error { return unix.ENODEV }
			d.probes.KVM = func(context.Context) error { return errors.New("there is no /dev/kvm") }
		}, "kvm", StatusFail, "there is no /dev/kvm", "modprobe kvm_amd"},
		{"no KVM, and emulation will do", func(d *doctor) {
			d.plan.Hypervisor = plan.Hypervisor{Driver: "qemu", Accel: "auto"}
			d.probes.KVM = func(context.Context) error { return errors.New("no") }
		}, "kvm", StatusWarn, "no", "nested virtualization"},
		{"no hypervisor", func(d *doctor) {
			d.probes.Driver = func(context.Context) (string, string, error) { return "", "", errors.New("not on PATH") }
		}, "hypervisor", StatusFail, "not on PATH", "releases/latest/download/cloud-hypervisor-static && chmod"},
		{"no hypervisor on arm64", func(d *doctor) {
			d.machine.arch = "arm64"
			d.probes.Driver = func(context.Context) (string, string, error) { return "", "", errors.New("not on PATH") }
		}, "hypervisor", StatusFail, "not on PATH", "cloud-hypervisor-static-aarch64"},
		// What ails it is the kvm check's, with a cure that helps.
		{"a hypervisor without KVM", func(d *doctor) {
			d.probes.Driver = func(context.Context) (string, string, error) {
				return "/usr/bin/cloud-hypervisor", "v53.0", errors.New("needs KVM")
			}
		}, "hypervisor", StatusOK, "cloud-hypervisor v53.0 (/usr/bin/cloud-hypervisor)", ""},
		{"no systemd", func(d *doctor) { without(d, "/run/systemd/system") }, "systemd", StatusFail, "does not run", "boot"},
		{"old systemd", func(d *doctor) { answers(d, "systemctl", "systemd 252 (252.39-1~deb12u1)\n") },
			"systemd", StatusWarn, "252 is older than 254", "backports"},
		{"systemd of no version", func(d *doctor) { answers(d, "systemctl", "bash: no\x1b[2J such\nthing") },
			"systemd", StatusFail, `"bash: no\x1b[2J such"`, "systemd"},
		{"cgroup v1", func(d *doctor) { withFile(d, "/sys/fs/cgroup/cgroup.controllers", nil) },
			"cgroup", StatusWarn, "not mounted", "unified_cgroup_hierarchy"},
		{"a controller is off", func(d *doctor) { withFile(d, "/sys/fs/cgroup/cgroup.controllers", []byte("cpu pids\n")) },
			"cgroup", StatusWarn, "lacks memory, io", "cgroup_enable=memory"},
		{"no landlock", func(d *doctor) { d.machine.landlock = func() (int, error) { return 0, nil } },
			"landlock", StatusWarn, "no landlock", "lsm="},
		{"old landlock", func(d *doctor) { d.machine.landlock = func() (int, error) { return 2, nil } },
			"landlock", StatusWarn, "ABI 2", "6.2"},
		{"no user", func(d *doctor) { d.machine.account = func(string) (*account, error) { return nil, nil } },
			"user", StatusWarn, "does not exist", "useradd --system --user-group --groups kvm --home-dir /var/lib/fleetingd"},
		{"user is root", func(d *doctor) { d.machine.account = func(string) (*account, error) { return &account{}, nil } },
			"user", StatusFail, "is root", "userdel"},
		{"user not in group kvm", func(d *doctor) {
			d.machine.openAs = func(a *account, path string) error {
				if a != nil && path == "/dev/kvm" {
					return refused
				}
				return nil
			}
		}, "user", StatusFail, "may not open /dev/kvm", "usermod -aG kvm fleetingd"},
		{"no TUN", func(d *doctor) { d.machine.openAs = func(*account, string) error { return unix.ENODEV } },
			"tun", StatusFail, "no such device", "modprobe tun"},
		{"TUN is root's", func(d *doctor) { d.machine.openAs = func(*account, string) error { return refused } },
			"tun", StatusFail, "permission denied", "chmod 0666"},
		{"no nf_tables", func(d *doctor) {
			d.machine.trial = func(plan.Ruleset, []plan.Slot) error { return errors.New("refused") }
		}, "nftables", StatusFail, "refused", "modprobe nf_tables"},
		{"not root", func(d *doctor) { d.machine.root = false }, "nftables", StatusWarn, "only root", "sudo"},
		{"no such interface", func(d *doctor) { d.plan.EgressInterface = "eth9" },
			"egress-interface", StatusFail, "this host has: eno1", `egress_interface = "eno1"`},
		{"interface down", func(d *doctor) {
			h := network1("10.0.2.0/24")
			h.links["eno1"].Attrs().Flags = 0
			d.machine.network = func(*plan.Plan) (*have, error) { return h, nil }
		}, "egress-interface", StatusFail, "down", "ip link set eno1 up"},
		{"subnet in use", func(d *doctor) {
			d.machine.network = func(*plan.Plan) (*have, error) { return network1("172.16.0.0/16"), nil }
		},
			"subnet", StatusFail, "overlaps route 172.16.0.0/16 on eno1 in table main", `subnet = "10.2.0.0/22"`},
		{"Docker's subnet", func(d *doctor) { d.plan.Network.Subnet = netip.MustParsePrefix("172.17.8.0/22") },
			"subnet", StatusWarn, "Docker may take it by default", `subnet = "172.16.120.0/22"`},
		{"Docker's subnet, and the usual one is in use", func(d *doctor) {
			d.plan.Network.Subnet = netip.MustParsePrefix("192.168.16.0/20")
			d.machine.network = func(*plan.Plan) (*have, error) { return network1("172.16.112.0/20"), nil }
		}, "subnet", StatusWarn, "Docker may take it by default", `subnet = "172.16.0.0/20"`},
		{"only IPv6, and resolvers of IPv4 only", func(d *doctor) {
			h := network1("10.0.2.0/24")
			h.routes = []netlink.Route{{Family: unix.AF_INET6, LinkIndex: 2, Gw: net.ParseIP("2001:db8::1")}}
			d.machine.network = func(*plan.Plan) (*have, error) { return h, nil }
		}, "dns", StatusWarn, "resolvers are IPv4 only, and this host reaches the internet by IPv6 only (1.1.1.3: no route)", `subnet6 = "fd7e:1ee7::/64" and dns`},
		{"resolvers that nobody routes to", func(d *doctor) {
			h := network1("10.0.2.0/24")
			_, dst, _ := net.ParseCIDR("1.0.0.0/8")
			h.routes = append(h.routes, netlink.Route{Family: unix.AF_INET, Dst: dst, Type: unix.RTN_BLACKHOLE})
			d.machine.network = func(*plan.Plan) (*have, error) { return h, nil }
		}, "dns", StatusWarn, "1.1.1.3: blackhole 1.0.0.0/8 in table main", "dns"},
		{"no netlink", func(d *doctor) {
			d.machine.network = func(*plan.Plan) (*have, error) { return nil, errors.New("no netlink") }
		},
			"egress-interface", StatusFail, "no netlink", "ip link"},
		{"forwarding is off", func(d *doctor) { withFile(d, "/proc/sys/net/ipv4/ip_forward", []byte("0\n")) },
			"ip-forwarding", StatusWarn, "ip_forward is 0", "sysctl -w net.ipv4.ip_forward=1"},
		{"ARP is ignored", func(d *doctor) { withFile(d, "/proc/sys/net/ipv4/conf/all/arp_ignore", []byte("1\n")) },
			"arp-ignore", StatusFail, "would not answer", "sysctl -w net.ipv4.conf.all.arp_ignore=0"},
		{"state_dir cannot be reached", func(d *doctor) { d.plan.Paths.State = "/secret/x"; privateDir(d, "/secret") },
			"state-dir", StatusFail, "mode 0700", "chmod o+x /secret"},
		{"state_dir is a file", func(d *doctor) { d.plan.Paths.State = "/dev/kvm" },
			"state-dir", StatusFail, "not a directory", "another state_dir"},
		{"no clones, no XFS", func(d *doctor) {
			d.probes.CanClone = func(string) error { return errors.New("ext4 cannot") }
			withoutProgram(d, "mkfs.xfs")
		}, "disks", StatusFail, "mkfs.xfs is not installed", "apt-get install -y --no-install-recommends xfsprogs"},
		{"no clones, on Fedora", func(d *doctor) {
			d.probes.CanClone = func(string) error { return errors.New("ext4 cannot") }
			withoutProgram(d, "mkfs.xfs", "apt-get")
		}, "disks", StatusFail, "mkfs.xfs is not installed", "dnf install -y xfsprogs"},
		{"no clones in a directory", func(d *doctor) {
			d.plan.Disks.Backing = "directory"
			d.probes.CanClone = func(string) error { return errors.New("ext4 cannot") }
		}, "disks", StatusFail, "ext4 cannot", `backing = "auto"`},
		{"not root, state_dir is root's", func(d *doctor) { d.probes.CanClone = func(string) error { return refused } },
			"disks", StatusWarn, "only root", "sudo"},
		{"no space for one", func(d *doctor) { d.machine.space = func(string) (int64, error) { return 20 << 30, nil } },
			"disk-space", StatusFail, "20.0 GiB free", "lower disk"},
		{"no space for all", func(d *doctor) { d.machine.space = func(string) (int64, error) { return 100 << 30, nil } },
			"disk-space", StatusWarn, "120.0 GiB", "lower disk"},
		{"no space for the image", func(d *doctor) { d.plan.Disks = plan.Disks{Backing: "xfs-image", Size: 300 << 30} },
			"disk-space", StatusWarn, "300.0 GiB", "lower size"},
		{"no memory", func(d *doctor) { d.plan.Pools[0].MaxInstances = 9 },
			"memory", StatusFail, "32.0 GiB of memory, but all workers together may use 36.0", "max_instances"},
		{"no memory, and no wrapping around", func(d *doctor) { d.plan.Pools[0].Memory, d.plan.Pools[0].MaxInstances = 1<<62, 4 },
			"memory", StatusFail, "17179869184.0 GiB", "max_instances"},
		{"no memory for a tmpfs", func(d *doctor) { d.plan.Disks = plan.Disks{Backing: "tmpfs", Size: 20 << 30} },
			"memory", StatusFail, "36.0 GiB", "max_instances"},
		{"no qemu-img", func(d *doctor) { withoutProgram(d, "qemu-img") }, "qemu-img", StatusFail, "not on PATH", "qemu-utils"},
		{"no mmdebstrap", func(d *doctor) { withoutProgram(d, "mmdebstrap") }, "mmdebstrap", StatusFail, "not on PATH",
			"install-recommends mmdebstrap"},
		{"no keys", func(d *doctor) { without(d, "/usr/share/keyrings/debian-archive-keyring.gpg") },
			"debian-archive-keyring", StatusFail, "verifies", "debian-archive-keyring"},
		{"clock is free", func(d *doctor) { d.machine.synced = func() (bool, error) { return false, nil } },
			"clock", StatusWarn, "not synchronised", "timedatectl set-ntp true"},
		{"clock is free, no NTP", func(d *doctor) {
			d.machine.synced = func() (bool, error) { return false, nil }
			without(d, "/usr/lib/systemd/systemd-timesyncd")
			withoutProgram(d, "chronyd")
		}, "clock", StatusWarn, "not synchronised", "systemd-timesyncd"},
		{"a prebuild's secret", func(d *doctor) { needsSecret(d, "file:/run/secrets/key") }, "secrets", StatusOK, "can read all secrets", ""},
		{"a prebuild's secret that is root's alone", func(d *doctor) {
			needsSecret(d, "file:/run/secrets/key")
			d.machine.readAs = func(*account, string) error { return refused }
		}, "secrets", StatusFail, "which user fleetingd cannot read", "chgrp fleetingd /run/secrets/key && chmod g+r"},
		{"a prebuild's secret that does not exist", func(d *doctor) {
			needsSecret(d, "file:/run/secrets/key")
			d.machine.readAs = func(*account, string) error { return fs.ErrNotExist }
		}, "secrets", StatusFail, "does not exist", "put the secret there"},
		{"a prebuild's secret where services see nothing", func(d *doctor) { needsSecret(d, "file:/root/key") },
			"secrets", StatusFail, "cannot see", "/etc/fleetingd"},
		{"a prebuild's secret in the environment", func(d *doctor) { needsSecret(d, "env:KEY") }, "secrets", StatusWarn, "env:KEY", "EnvironmentFile=… with KEY"},
		{"a prebuild's secret in a variable", func(d *doctor) { needsSecret(d, "var:key") }, "secrets", StatusWarn, "var:key", "FLEETINGD_VAR_key"},
		{"a prebuild's secret, and no user", func(d *doctor) {
			needsSecret(d, "file:/run/secrets/key")
			d.machine.account = func(string) (*account, error) { return nil, nil }
		}, "secrets", StatusWarn, "does not exist yet", "systemd-sysusers"},
		{"a prebuild's secret, and not root", func(d *doctor) {
			needsSecret(d, "file:/run/secrets/key")
			d.machine.root = false
		}, "secrets", StatusWarn, "only root can check", asRoot},
		{"no runner", func(d *doctor) { withoutProgram(d, "gitlab-runner") }, "gitlab-runner", StatusFail, "not on PATH",
			"script.deb.sh | bash && apt-get install -y gitlab-runner"},
		{"no runner on Fedora", func(d *doctor) { withoutProgram(d, "gitlab-runner", "apt-get") },
			"gitlab-runner", StatusFail, "not on PATH", "script.rpm.sh"},
		{"old runner", func(d *doctor) { answers(d, "gitlab-runner", "Version:      17.4.2\n") },
			"gitlab-runner", StatusFail, "17.4 is older than 17.5", "apt-get"},
		{"a runner of no version", func(d *doctor) { answers(d, "gitlab-runner", "Version:      development version\n") },
			"gitlab-runner", StatusWarn, "no known version", "apt-get"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := healthy()
			c.fault(d)
			found := d.examine(t.Context())
			i := slices.IndexFunc(found, func(f Finding) bool { return f.Check == c.check })
			if i < 0 {
				t.Fatalf("no check %s in %+v", c.check, found)
			}
			f := found[i]
			if f.Status != c.status || !strings.Contains(f.Detail, c.detail) || !strings.Contains(f.Cure, c.cure) {
				t.Errorf("got %+v, want %s, %q, %q", f, c.status, c.detail, c.cure)
			}
			for _, f := range found {
				if f.Status != StatusOK && f.Cure == "" {
					t.Errorf("%+v has no cure", f)
				}
				if strings.Contains(f.Detail, "%!") || strings.ContainsAny(f.Detail, "\n\x1b") {
					t.Errorf("not fit to be shown: %q", f.Detail)
				}
			}
		})
	}
}

// needsSecret has the debian image's prebuild write a file with a secret.
func needsSecret(d *doctor, from string) {
	d.plan.Images[1].Prebuild = &plan.Prebuild{Steps: []plan.Step{
		{Name: "run[0]", Command: "true"},
		{Name: "file[0]", File: &plan.StepFile{Path: "/etc/key", Mode: "0600", Secret: plan.Text{
			{Literal: "key="}, {Op: "trimspace", Of: plan.Text{{From: from}}}, {From: from},
		}}},
	}}
}

// privateDir adds a folder that only its owner gets through.
func privateDir(d *doctor, path string) {
	next := d.machine.stat
	d.machine.stat = func(p string) (fs.FileInfo, error) {
		if p == path {
			return fstest.MapFS{"x": {Mode: fs.ModeDir | 0o700}}.Stat("x")
		}
		return next(p)
	}
}

// TestDoctorAsksOnlyWhatMatters: a host is not told to install what its spec does not use.
func TestDoctorAsksOnlyWhatMatters(t *testing.T) {
	d := healthy()
	d.plan.Hypervisor = plan.Hypervisor{Driver: "qemu", Accel: "tcg"}
	d.plan.Images = d.plan.Images[1:]
	d.plan.Runners = nil
	d.probes.KVM = func(context.Context) error { t.Error("a host without KVM is probed"); return nil }
	got := map[string]bool{}
	for _, f := range d.examine(t.Context()) {
		got[f.Check] = true
	}
	for _, check := range []string{"cpu-virtualization", "kvm", "qemu-img", "gitlab-runner"} {
		if got[check] {
			t.Errorf("check %s has no place here; there are %q", check, slices.Sorted(maps.Keys(got)))
		}
	}
}

// TestDoctorMachine asks the real machine: each door answers, and the answer can be told from a constant.
func TestDoctorMachine(t *testing.T) {
	m := realMachine()
	h, err := m.network(&plan.Plan{})
	if err != nil || h.links["lo"] == nil {
		t.Errorf("links: %v, %v", h, err)
	}
	if _, err := m.synced(); err != nil {
		t.Error(err)
	}
	if _, err := m.landlock(); err != nil {
		t.Error(err)
	}
	if free, err := m.space(t.TempDir()); err != nil || free <= 0 {
		t.Errorf("space: %d, %v", free, err)
	}
	if _, err := m.space("/nowhere"); err == nil {
		t.Error("the space of no folder is no error")
	}
	if a, err := m.account("root"); err != nil || a == nil || a.uid != 0 {
		t.Errorf("root: %+v, %v", a, err)
	}
	if a, err := m.account("nobody-of-this-name"); err != nil || a != nil {
		t.Errorf("nobody: %+v, %v", a, err)
	}
	if got, err := m.existing(t.TempDir() + "/a/b"); err != nil || strings.HasSuffix(got, "a") {
		t.Errorf("existing: %s, %v", got, err)
	}
}

func TestAccountPasses(t *testing.T) {
	a := &account{uid: 1, gid: 2, groups: []int{2, 3}}
	for _, c := range []struct {
		uid, gid uint32
		mode     fs.FileMode
		want     bool
	}{
		{9, 9, 0o701, true},
		{9, 9, 0o770, false},
		{1, 9, 0o700, true},
		{1, 9, 0o077, false}, // the owner has the owner's bits alone
		{9, 3, 0o710, true},
		{9, 2, 0o701, false},
	} {
		st, err := fstest.MapFS{"x": {Mode: fs.ModeDir | c.mode, Sys: &syscall.Stat_t{Uid: c.uid, Gid: c.gid}}}.Stat("x")
		if err != nil {
			t.Fatal(err)
		}
		if got := a.passes(st); got != c.want {
			t.Errorf("%d:%d %o: got %t", c.uid, c.gid, c.mode, got)
		}
	}
}

// TestDoctorOpensAsSomebodyElse: the thread that became somebody else is not used again.
func TestDoctorOpensAsSomebodyElse(t *testing.T) {
	testneed.Root(t)
	file := t.TempDir() + "/secret"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(file, 0, 4711); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o660); err != nil {
		t.Fatal(err)
	}
	open := &account{uid: 60001, gid: 60001, groups: []int{60001, 4711}}
	closed := &account{uid: 60001, gid: 60001, groups: []int{60001}}
	dir := t.TempDir()
	for p := dir; p != "/" && strings.HasPrefix(p, os.TempDir()+"/"); p = p[:strings.LastIndexByte(p, '/')] {
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	shared := dir + "/f"
	if err := os.Rename(file, shared); err != nil {
		t.Fatal(err)
	}
	if err := openAs(open, shared); err != nil {
		t.Errorf("a member of the group: %v", err)
	}
	if err := openAs(closed, shared); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("not a member of the group: %v", err)
	}
	for range 20 {
		if err := openAs(nil, shared); err != nil {
			t.Fatalf("we ourselves: %v", err)
		}
	}
	if os.Geteuid() != 0 {
		t.Error("the process is not root any more")
	}
}

// TestDoctorTrialLeavesNothing: the ruleset is loaded elsewhere, and a bad one is refused there.
func TestDoctorTrialLeavesNothing(t *testing.T) {
	testneed.Root(t)
	r := plan.Ruleset{Tables: []plan.Table{{
		Family: "inet", Name: "fleetingd-doctor-test",
		Sets: []plan.Set{{Name: "nets", Key: []plan.DataType{plan.TypeIPv4}, Interval: true, Elements: []string{"10.0.0.0/8"}}},
		Chains: []plan.Chain{{Name: "in", Type: "filter", Hook: "input", Rules: []plan.Rule{{
			Comment: "x", Matches: []plan.Match{{Fields: []plan.Field{plan.IPSource}, Set: "nets"}},
			Verdict: plan.Verdict{Action: plan.Drop},
		}}}},
	}}}
	if err := trialLoad(r, nil); err != nil {
		t.Fatal(err)
	}
	c, err := nft()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := c.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		if table.Name == "fleetingd-doctor-test" {
			t.Error("the ruleset was loaded on the host itself")
		}
	}
	r.Tables[0].Chains[0].Hook = "" // a type and no hook would be a chain to jump to; its name is longer than the kernel takes
	r.Tables[0].Chains[0].Name = strings.Repeat("x", 300)
	if err := trialLoad(r, nil); err == nil {
		t.Error("what the kernel refuses is no error")
	}
}
