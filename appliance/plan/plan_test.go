package plan

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/seed"
)

// small returns a plan with one of everything: two workers and a build slot.
func small() *Plan {
	gw6, subnet6 := netip.MustParseAddr("fd00::1"), netip.MustParsePrefix("fd00::/64")
	p := &Plan{
		Version: Version, Host: "h", EgressInterface: "eno1", User: "fleetingd",
		Paths: Paths{
			State: "/s", Disks: "/s/disks", Images: "/s/disks/images", Clones: "/s/disks/clones", Workers: "/s/workers",
			Cache: "/s/cache", Run: "/run/f",
		},
		Disks:      NewDisks("/s", "auto", 0),
		Hypervisor: Hypervisor{Driver: "qemu", Binary: "qemu-system-x86_64", Accel: "tcg"},
		Network: Network{
			Subnet: netip.MustParsePrefix("10.0.0.0/24"), Gateway: netip.MustParseAddr("10.0.0.1"),
			Subnet6: &subnet6, Gateway6: &gw6, DNS: []netip.Addr{netip.MustParseAddr("1.1.1.3")}, MTU: 1500,
			HostMAC: "02:fd:00:00:00:01", GuestMAC: "02:fd:00:00:00:02",
			Egress: []Egress{{Name: "e", Action: "deny", To: []netip.Prefix{}, Ports: []PortRange{{"tcp", 25, 25}}}},
		},
		Images: []Image{{
			Name: "i", User: "ci", BuildSlot: 2, Source: Source{Debian: &DebianSource{Suite: "trixie", Arch: "amd64", Packages: []string{}}},
			Prebuild: &Prebuild{
				Timeout: Duration(time.Minute), Seed: seed.Seed{InstanceID: "prebuild-i", Hostname: "prebuild"},
				Steps: []Step{{Name: "run[0]: true <&>", Command: "true <&>"}},
			},
		}},
		Pools: []Pool{{
			Name: "p", Image: "i", CPUs: 1, Memory: 1, Disk: 1, Start: "cold", MaxInstances: 2, StartTimeout: Duration(time.Minute),
		}},
		Runners: []Runner{{Name: "r", Pool: "p", Token: Text{{From: "env:T"}}}},
		Files: []File{{
			Path: "/etc/c", Mode: "0644", Owner: "root", Group: "root", Content: "a @T@ b @T@ @U@",
			Secrets: []FileSecret{{"@T@", Piece{From: "env:T"}}, {"@U@", Piece{From: "env:U"}}},
		}},
		Units:   []Unit{{Name: "x.service", Enable: true}},
		Sysctls: []Sysctl{{"net.ipv4.ip_forward", "1"}},
		Origins: map[string]string{"pool.p": "host.hcl:3", "image.i": "host.hcl:1"},
	}
	for i := range 3 {
		a6 := netip.MustParseAddr(fmt.Sprintf("fd00::%d", i+2))
		p.Slots = append(p.Slots, Slot{
			Index: i, TAP: fmt.Sprintf("fleet%d", i), Address: netip.MustParseAddr(fmt.Sprintf("10.0.0.%d", i+2)), Address6: &a6, Queues: 1,
		})
	}
	return p
}

func text(t testing.TB, p *Plan) []byte {
	t.Helper()
	b, err := p.JSON()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestJSONIsCanonical(t *testing.T) {
	b := text(t, small())
	if !bytes.Contains(b, []byte("true <&>")) {
		t.Error("HTML is escaped")
	}
	if !bytes.HasSuffix(b, []byte("}\n")) {
		t.Error("it does not end with a newline")
	}
	p, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(b), string(text(t, p))); d != "" {
		t.Errorf("it changes when it is read and written:\n%s", d)
	}
}

// TestTooLargeToRead: what Parse refuses is not written.
func TestTooLargeToRead(t *testing.T) {
	p := small()
	p.Images[0].Prebuild.Steps = []Step{{Name: "file[0]: /f", File: &StepFile{Path: "/f", Content: strings.Repeat("x", MaxSize), Mode: "0644"}}}
	if _, err := p.JSON(); err == nil || !strings.Contains(err.Error(), "use smaller files in its prebuilds") {
		t.Errorf("got %v", err)
	}
}

func TestDigestIsOfAllButTheOrigins(t *testing.T) {
	digest := func(p *Plan) string {
		d, err := p.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	want := digest(small())
	p := small()
	p.Origins = map[string]string{"pool.p": "other.hcl:99"}
	if digest(p) != want {
		t.Error("the origins are in it")
	}
	if p.Origins == nil {
		t.Error("taking it removes the origins")
	}
	p.Sysctls[0].Value = "0"
	if digest(p) == want {
		t.Error("a sysctl is not in it")
	}
}

// TestEditedByHand has edits that would each make a reader index out of range, overwrite, or run something else.
func TestEditedByHand(t *testing.T) {
	same6 := netip.MustParseAddr("fd00::2")
	for _, c := range []struct {
		want string
		edit func(*Plan)
	}{
		{`pool.p: there are no slots 0 to 0+4 (the plan has 3)`, func(p *Plan) { p.Pools[0].MaxInstances = 4 }},
		{`pool.p: there are no slots`, func(p *Plan) { p.Pools[0].MaxInstances = 1<<63 - 1 }},
		{`pool.p: there are no slots`, func(p *Plan) { p.Pools[0].FirstSlot = -1 }},
		{`pool.p: there are no slots`, func(p *Plan) { p.Pools[0].FirstSlot = 1<<63 - 1 }},
		{`pool.p: there are no slots`, func(p *Plan) { p.Pools[0].MaxInstances = 0 }},
		{`pool.p: slot 1 belongs to image.i`, func(p *Plan) { p.Images[0].BuildSlot = 1 }},
		{`image.i: there is no slot 3`, func(p *Plan) { p.Images[0].BuildSlot = 3 }},
		{`image.i: there is no slot -1`, func(p *Plan) { p.Images[0].BuildSlot = -1 }},
		{`slots[1]: the index 0 is used twice`, func(p *Plan) { p.Slots[1].Index = 0 }},
		{`slots[1]: the index -1 is used twice, or negative`, func(p *Plan) { p.Slots[1].Index = -1 }},
		{`the interface "fleet0" is used twice`, func(p *Plan) { p.Slots[1].TAP = "fleet0" }},
		{`the interface "eno1" is used twice`, func(p *Plan) { p.Slots[1].TAP = "eno1" }},
		{`"a/b" is not the name of an interface`, func(p *Plan) { p.Slots[1].TAP = "a/b" }},
		{`"abcdefghijklmnop" is not the name`, func(p *Plan) { p.Slots[1].TAP = "abcdefghijklmnop" }},
		{`the address 10.0.0.2 is used twice`, func(p *Plan) { p.Slots[1].Address = p.Slots[0].Address }},
		{`the address 10.0.0.1 is used twice`, func(p *Plan) { p.Slots[1].Address = p.Network.Gateway }},
		{`10.1.0.1 is not in 10.0.0.0/24`, func(p *Plan) { p.Slots[1].Address = netip.MustParseAddr("10.1.0.1") }},
		{`invalid IP is not in 10.0.0.0/24`, func(p *Plan) { p.Slots[1].Address = netip.Addr{} }},
		{`the address fd00::2 is used twice`, func(p *Plan) { p.Slots[1].Address6 = &same6 }},
		{`address6 and subnet6 must be set together`, func(p *Plan) { p.Slots[1].Address6 = nil }},
		{`subnet6 and gateway6 must be set together`, func(p *Plan) { p.Network.Gateway6 = nil }},
		{`slots[0]: 0 queues`, func(p *Plan) { p.Slots[0].Queues = 0 }},
		{`slots[0]: 257 queues`, func(p *Plan) { p.Slots[0].Queues = 257 }},
		{`"10.0.0.1/24" is not an IPv4 network`, func(p *Plan) { p.Network.Subnet = netip.MustParsePrefix("10.0.0.1/24") }},
		{`network.mtu: 1000`, func(p *Plan) { p.Network.MTU = 1000 }},
		{`"01:00:5e:00:00:01" is not a unicast`, func(p *Plan) { p.Network.HostMAC = "01:00:5e:00:00:01" }},
		{`host_mac and worker_mac are the same`, func(p *Plan) { p.Network.HostMAC = p.Network.GuestMAC }},
		{`unknown action "maybe"`, func(p *Plan) { p.Network.Egress[0].Action = "maybe" }},
		{`tcp/25-24 are not ports`, func(p *Plan) { p.Network.Egress[0].Ports[0].Last = 24 }},
		{`disks.image: "/etc/x" is not a clean path below "/s"`, func(p *Plan) { p.Disks.Image = "/etc/x" }},
		{`disks.image: "/s/../x"`, func(p *Plan) { p.Disks.Image = "/s/../x" }},
		{`disks.mount_options: "loop,suid\nx" are not`, func(p *Plan) { p.Disks.MountOptions = "loop,suid\nx" }},
		{`disks.mount_options: "" are not`, func(p *Plan) { p.Disks.MountOptions = "" }},
		{`disks.memory: only backing "tmpfs" has one`, func(p *Plan) { p.Disks.Memory = "/s/ram" }},
		{`disks.memory: "/ram" is not`, func(p *Plan) { p.Disks = NewDisks("/s", "tmpfs", 1); p.Disks.Memory = "/ram" }},
		{`disks.image: "/s/disks.xfs" is not a clean path below "/s/ram"`, func(p *Plan) {
			p.Disks = NewDisks("/s", "tmpfs", 1)
			p.Disks.Image = "/s/disks.xfs"
		}},
		{`disks: a directory has neither`, func(p *Plan) { p.Disks.Backing = "directory" }},
		{`paths.run: "/run/../etc" is not a clean`, func(p *Plan) { p.Paths.Run = "/run/../etc" }},
		{`paths.state: "s" is not a clean`, func(p *Plan) { p.Paths.State = "s" }},
		{`paths.clones: "/x" is not below "/s/disks"`, func(p *Plan) { p.Paths.Clones = "/x" }},
		{`paths.run: `, func(p *Plan) { p.Paths.Run = "/" + strings.Repeat("r", 60) }},
		{`user: "a b" is not a user name`, func(p *Plan) { p.User = "a b" }},
		{`hypervisor.driver: unknown "xen"`, func(p *Plan) { p.Hypervisor.Driver = "xen" }},
		{`hypervisor.binary: "-x" is not a program`, func(p *Plan) { p.Hypervisor.Binary = "-x" }},
		{`disks.backing: unknown "zfs"`, func(p *Plan) { p.Disks.Backing = "zfs" }},
		{`images[0]: "../x" is not a valid name`, func(p *Plan) { p.Images[0].Name = "../x" }},
		{`image.i: it needs exactly one source`, func(p *Plan) { p.Images[0].Source = Source{} }},
		{`image.i: the files of its source are not clean absolute paths`, func(p *Plan) {
			p.Images[0].Source = Source{File: &FileSource{Disk: "disk", Kernel: "/k"}}
		}},
		{`prebuild.steps[0] needs a name and one of`, func(p *Plan) { p.Images[0].Prebuild.Steps[0].Packages = []string{"x"} }},
		{`prebuild.timeout must be above 0`, func(p *Plan) { p.Images[0].Prebuild.Timeout = 0 }},
		{`pools[0]: ".." is not a valid name`, func(p *Plan) { p.Pools[0].Name = ".." }},
		{`pool.p: host "h" has no image "j": it has i`, func(p *Plan) { p.Pools[0].Image = "j" }},
		{`pool.p: cpus, memory and disk must be above 0`, func(p *Plan) { p.Pools[0].Memory = -1 }},
		{`pool.p: start must be "warm" or "cold"; got "hot"`, func(p *Plan) { p.Pools[0].Start = "hot" }},
		{`runners[0]: host "h" has no pool "q": it has p`, func(p *Plan) { p.Runners[0].Pool = "q" }},
		{`files[0]: "etc/c" is not a clean absolute path`, func(p *Plan) { p.Files[0].Path = "etc/c" }},
		{`files[1]: "/etc/c" is written twice`, func(p *Plan) { p.Files = append(p.Files, p.Files[0]) }},
		{`/etc/c: the mode "+644" is not octal`, func(p *Plan) { p.Files[0].Mode = "+644" }},
		{`/etc/c: root:0 0 is not an owner`, func(p *Plan) { p.Files[0].Group = "0 0" }},
		{`"rot13" is not a function`, func(p *Plan) { p.Files[0].Secrets[0].Secret = Piece{Op: "rot13", Of: Text{{From: "env:T"}}} }},
		{`"password" is not the place of a secret`, func(p *Plan) { p.Runners[0].Token = Text{{From: "password"}} }},
		{`piece 0 needs exactly one of text, from and op`, func(p *Plan) { p.Runners[0].Token = Text{{}} }},
		{`it has both content and a secret`, func(p *Plan) {
			p.Images[0].Prebuild.Steps = []Step{{Name: "f", File: &StepFile{Path: "/f", Mode: "0600", Content: "a", Secret: Text{{From: "env:T"}}}}}
		}},
		{`/etc/c: the placeholder "@V@" is not in it`, func(p *Plan) { p.Files[0].Secrets[0].Placeholder = "@V@" }},
		{`units[0]: "../x" is not the name of a unit`, func(p *Plan) { p.Units[0].Name = "../x" }},
		{`sysctls[0]: "a=b" = "1" is not a setting`, func(p *Plan) { p.Sysctls[0].Key = "a=b" }},
		{`sysctls[0]: "net/../../x" = "1"`, func(p *Plan) { p.Sysctls[0].Key = "net/../../x" }},
	} {
		p := small()
		c.edit(p)
		_, err := Parse(text(t, p))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %s", err, c.want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	good := string(text(t, small()))
	for _, c := range []struct{ name, text, want string }{
		{"empty", "", "not a plan: line 1: unexpected end of JSON input"},
		{"no plan", "{}", "the plan has format version 0, but this fleetingd reads and writes version 2"},
		{"newer", strings.Replace(good, `"version": 2`, `"version": 3, "new": {}`, 1), "compile the spec again with the fleetingd"},
		{"unknown field", strings.Replace(good, `"host"`, `"hsot"`, 1), `unknown field "hsot"`},
		{"more after the end", good + "{}", "invalid character '{' after top-level value"},
		{"wrong type", strings.Replace(good, `"mtu": 1500`, `"mtu": "x"`, 1), "not a plan: line "},
		{"nanoseconds", strings.Replace(good, `"refresh": "0s"`, `"refresh": 60`, 1), `a duration is a string such as "30m"`},
		{"too large", strings.Repeat(" ", MaxSize+1), "more than the 67108864 that are allowed"},
		{"deep", strings.Repeat("[", 20000), "not a plan"},
	} {
		if _, err := Parse([]byte(c.text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %s", c.name, err, c.want)
		}
	}
}

// TestFindingsAreBounded: a plan that is wrong everywhere is refused in a few lines.
func TestFindingsAreBounded(t *testing.T) {
	p := small()
	for range 1000 {
		p.Units = append(p.Units, Unit{Name: "/"})
	}
	_, err := Parse(text(t, p))
	if n := strings.Count(err.Error(), "\n"); n >= maxFindings {
		t.Errorf("%d lines of findings", n)
	}
}

func TestLookUps(t *testing.T) {
	p := small()
	pool, err := p.Pool("p")
	if err != nil {
		t.Fatal(err)
	}
	if s := p.PoolSlots(pool); len(s) != 2 || s[0].TAP != "fleet0" {
		t.Errorf("the pool's slots are %v", s)
	}
	image, err := p.Image("i")
	if err != nil || p.BuildSlot(image).TAP != "fleet2" {
		t.Errorf("the image: %v, %v", image, err)
	}
	p.Pools = append(p.Pools, Pool{Name: "q"})
	if _, err := p.Pool("x"); err == nil || err.Error() != `host "h" has no pool "x": it has p, q` {
		t.Errorf("an unknown pool: %v", err)
	}
	p.Images = nil
	if _, err := p.Image("x"); err == nil || err.Error() != `host "h" has no image "x": it has none` {
		t.Errorf("an unknown image: %v", err)
	}
	if got := p.Origin(KindPool, "p"); got != "host.hcl:3" {
		t.Errorf("the pool's origin is %q", got)
	}
}

func TestWorkerSeed(t *testing.T) {
	p := small()
	got := p.WorkerSeed(&p.Pools[0], p.Slots[1], "p-Ab_9-", "ssh-ed25519 K")
	want := seed.Seed{
		InstanceID: "p-Ab_9-", Hostname: "p-ab-9",
		Network: &seed.Network{
			MAC: "02:fd:00:00:00:02", MTU: 1500, DNS: p.Network.DNS,
			Addresses: []netip.Addr{p.Slots[1].Address, *p.Slots[1].Address6},
			Gateways:  []netip.Addr{p.Network.Gateway, *p.Network.Gateway6},
		},
		Users: []seed.User{{Name: "ci", AuthorizedKeys: []string{"ssh-ed25519 K"}}},
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	for id, want := range map[string]string{"": "worker", "-_-": "worker", strings.Repeat("ab", 40): strings.Repeat("ab", 31) + "a"} {
		if got := Label(id, 63); got != want {
			t.Errorf("the label of %q is %q, want %q", id, got, want)
		}
	}
}

func TestFill(t *testing.T) {
	f := small().Files[0]
	values := map[string]string{"env:T": "@U@", "env:U": "u"}
	got, err := f.Fill(func(from string) (string, error) { return values[from], nil })
	if want := "a @U@ b @U@ u"; err != nil || got != want {
		t.Errorf("got %q, %v; want %q: what a secret holds is no placeholder", got, err, want)
	}
	_, err = f.Fill(func(string) (string, error) { return "", os.ErrNotExist })
	if err == nil || err.Error() != "/etc/c: secret for @T@: file does not exist" {
		t.Errorf("a secret that is not there: %v", err)
	}
}

// TestTextRead: functions of the spec are applied to the values that are read.
func TestTextRead(t *testing.T) {
	values := map[string]string{"file:/x": " a\"b\n", "env:U": "u"}
	read := func(from string) (string, error) {
		if v, ok := values[from]; ok {
			return v, nil
		}
		return "", os.ErrNotExist
	}
	file := Text{{From: "file:/x"}}
	for _, tt := range []struct {
		text Text
		want string
	}{
		{Text{{Literal: "A="}, {From: "env:U"}, {Literal: ";"}}, "A=u;"},
		{Text{{Op: "trimspace", Of: file}}, `a"b`},
		{Text{{Op: "chomp", Of: file}}, ` a"b`},
		{Text{{Literal: `{"a":"`}, {Op: "jsonencode", Of: file}, {Literal: `"}`}}, `{"a":" a\"b\n"}`},
		{Text{{Op: "base64encode", Of: Text{{Literal: "user:"}, {From: "env:U"}}}}, "dXNlcjp1"},
		{Text{{Op: "base64encode", Of: Text{{Op: "trimspace", Of: file}}}}, "YSJi"},
	} {
		if got, err := tt.text.Read(read); err != nil || got != tt.want {
			t.Errorf("%+v: %q, %v; want %q", tt.text, got, err, tt.want)
		}
	}
	if _, err := (Text{{Op: "chomp", Of: Text{{From: "env:V"}}}}).Read(read); err == nil {
		t.Error("a secret that does not exist can be read")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(text(f, small()))
	f.Add([]byte(`{"version":1,"slots":[{}],"pools":[{"first_slot":-1,"max_instances":9223372036854775807}]}`))
	f.Add([]byte(`{"version":1,"network":{"subnet":"::/0","subnet6":"0.0.0.0/0","gateway6":""}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := Parse(data)
		if err != nil {
			if strings.Contains(err.Error(), "%!") {
				t.Errorf("a broken message: %s", err)
			}
			return
		}
		// Whatever Parse accepts can be used without a panic, and survives a round trip.
		for i := range p.Pools {
			for _, s := range p.PoolSlots(&p.Pools[i]) {
				p.WorkerSeed(&p.Pools[i], s, "id", "key")
			}
		}
		for i := range p.Images {
			p.BuildSlot(&p.Images[i])
		}
		if _, err := p.Digest(); err != nil {
			t.Error(err)
		}
		if _, err := Parse(text(t, p)); err != nil {
			t.Errorf("it does not come back: %v", err)
		}
	})
}
