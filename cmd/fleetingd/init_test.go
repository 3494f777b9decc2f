package main

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

var updateInit = flag.Bool("update-init", false, "write the specs of TestInitSpec")

// metal is a machine that has everything.
func metal() host.Survey {
	return host.Survey{
		Name: "metal-01.example.com", Arch: "amd64", Distribution: "Debian GNU/Linux 13 (trixie)", Egress: "eno1", CPUs: 32, Memory: 128 << 30,
		Free: 900 << 30, Backing: "directory", CloudHypervisor: "/usr/bin/cloud-hypervisor",
	}
}

// TestInitSpec: what is written for machines of several kinds validates without a warning, compiles, and fits on them.
func TestInitSpec(t *testing.T) {
	answers := initAnswers{url: "https://gitlab.example.com", tokenFile: "/etc/fleetingd/gitlab-token", packages: []string{"build-essential"}, workers: 16}
	for name, change := range map[string]func(f *initFacts, a *initAnswers){
		"metal": func(*initFacts, *initAnswers) {},
		"small": func(f *initFacts, a *initAnswers) {
			f.CPUs, f.Memory, f.Free, f.Backing = 2, 6<<30, 60<<30, "xfs-image"
			f.Arch, f.Distribution, f.Name = "arm64", "", "Pi_4!"
			a.workers, a.packages = 2, nil
		},
		"no-kvm": func(f *initFacts, a *initAnswers) { f.NoKVM, f.Backing = "open /dev/kvm: no such file", "auto" },
		"qemu":   func(f *initFacts, a *initAnswers) { f.CloudHypervisor, f.QEMU = "", "/usr/bin/qemu-system-x86_64" },
		"private-gitlab": func(f *initFacts, a *initAnswers) {
			a.url, a.packages = "http://gitlab.corp.example:8080", []string{"docker.io", "git"}
			f.gitlab = []netip.Addr{netip.MustParseAddr("10.20.0.15"), netip.MustParseAddr("fd00::15"), netip.MustParseAddr("127.0.0.1")}
		},
		"alone": func(f *initFacts, a *initAnswers) { f.Egress, f.subnet = "", netip.Prefix{} },
		"many":  func(f *initFacts, a *initAnswers) { f.Memory, f.CPUs, a.workers = 2<<40, 256, 1200 },
		"odd": func(f *initFacts, a *initAnswers) {
			f.Distribution, f.Egress = "Evil \"Linux\"\n}\x1b[2J ${x}", "br-lan.7"
			a.tokenFile = "/root/${token}\"file"
		},
	} {
		t.Run(name, func(t *testing.T) {
			f, a := initFacts{Survey: metal()}, answers
			f.subnet = netip.MustParsePrefix("172.16.120.0/22")
			if change(&f, &a); f.subnet.IsValid() {
				f.subnet = netip.PrefixFrom(f.subnet.Addr(), initSubnetBits(a.workers)).Masked()
			}
			text, err := initSpec(f, a)
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata/init", name+".hcl")
			if *updateInit {
				if err := os.WriteFile(golden, text, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(text)); diff != "" {
				t.Errorf("another spec than before (-update-init writes it)\n%s", diff)
			}
			fits(t, f.Survey, a, text)
		})
	}
}

func fits(t *testing.T, s host.Survey, a initAnswers, text []byte) {
	t.Helper()
	res, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: text})
	if len(diags) > 0 {
		t.Fatalf("%v\n%s", diags, text)
	}
	if formatted, diags := hostspec.Format(text, "host.hcl"); diags.HasErrors() || string(formatted) != string(text) {
		t.Errorf("not formatted: %v\n%s", diags, text)
	}
	p, diags := compile.Compile(res.Host, compile.Options{})
	if len(diags) > 0 {
		t.Fatal(diags)
	}
	pool := p.Pools[0]
	switch need := pool.Memory * int64(pool.MaxInstances); {
	case pool.MaxInstances != a.workers:
		t.Errorf("%d workers, want %d", pool.MaxInstances, a.workers)
	case need >= s.Memory || pool.CPUs > s.CPUs || pool.Disk > s.Free:
		t.Errorf("%+v does not fit on %+v", pool, s)
	}
}

// TestInitRoom: a number of workers that fits is proposed and taken for any machine, and what does not fit is an error with the number that does.
func TestInitRoom(t *testing.T) {
	for _, memory := range []int64{512 << 20, 1 << 30, 2 << 30, 3 << 30, 4 << 30, 16 << 30, 1 << 40} {
		for _, cpus := range []int{1, 4, 128} {
			s := metal()
			s.Memory, s.CPUs = memory, cpus
			most := mostWorkers(s)
			if n := proposedWorkers(s); most > 0 && (n < 1 || n > most) {
				t.Errorf("%d GiB: %d proposed, and there is room for %d", memory>>30, n, most)
			}
			for _, n := range []int{1, proposedWorkers(s), most, most + 1} {
				if n < 1 {
					continue
				}
				size, err := sizeWorkers(s, n)
				if (n <= most) != (err == nil) {
					t.Errorf("%d GiB, room for %d: %d workers: %v", memory>>30, most, n, err)
				}
				if err == nil && (size.memory*int64(n) > memory || size.memory < leastMemory || size.cpus < 1 || size.cpus > cpus) {
					t.Errorf("%d GiB, %d workers: %+v", memory>>30, n, size)
				}
			}
		}
	}
	s := metal()
	s.Free = 15 << 30
	if _, err := sizeWorkers(s, 1); err == nil || !strings.Contains(err.Error(), "has 15.0 GiB free, and an image and a worker need 20 GiB") {
		t.Error(err)
	}
	s = metal()
	s.Memory = 4 << 30
	if _, err := sizeWorkers(s, 3); err == nil || !strings.Contains(err.Error(), "this machine has 4.0 GiB, enough for 2; write --workers 2 or less") {
		t.Error(err)
	}
}
