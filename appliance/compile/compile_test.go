package compile_test

import (
	"bytes"
	"crypto/sha256"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/hcl/v2"
	"golang.org/x/tools/txtar"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

var update = flag.Bool("update", false, "write the golden trees anew")

// load loads a spec from text.
func load(t testing.TB, name, source string) *hostspec.Host {
	t.Helper()
	r, diags := hostspec.Load(hostspec.Options{Path: name, Source: []byte(source)})
	if diags.HasErrors() {
		t.Fatalf("%s: %v", name, diags)
	}
	return r.Host
}

func compiled(t testing.TB, h *hostspec.Host) *plan.Plan {
	t.Helper()
	p, diags := compile.Compile(h, compile.Options{})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	return p
}

// golden calls test for each case of testdata/golden, with its spec and what it compiles to.
func golden(t *testing.T, test func(t *testing.T, name, spec string, p *plan.Plan)) {
	t.Helper()
	cases, err := filepath.Glob("testdata/golden/*.txtar")
	if err != nil || len(cases) == 0 {
		t.Fatalf("no golden trees: %v", err)
	}
	for _, name := range cases {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txtar"), func(t *testing.T) {
			archive, err := txtar.ParseFile(name)
			if err != nil {
				t.Fatal(err)
			}
			spec := string(archive.Files[0].Data)
			test(t, name, spec, compiled(t, load(t, "host.hcl", spec)))
		})
	}
}

// TestGolden compares each spec's tree, file by file. ISO images are compared by their digests.
func TestGolden(t *testing.T) {
	golden(t, func(t *testing.T, name, _ string, p *plan.Plan) {
		archive, err := txtar.ParseFile(name)
		if err != nil {
			t.Fatal(err)
		}
		tree, err := p.Tree(nil)
		if err != nil {
			t.Fatal(err)
		}
		got := txtar.Archive{Comment: archive.Comment, Files: archive.Files[:1:1]}
		for _, f := range tree {
			file := txtar.File{Name: fmt.Sprintf("%s (%04o)", strings.TrimPrefix(f.Path, "/"), f.Mode), Data: f.Data}
			if strings.HasSuffix(f.Path, ".iso") {
				file.Data = fmt.Appendf(nil, "%d bytes, sha256 %x\n", len(f.Data), sha256.Sum256(f.Data))
			}
			got.Files = append(got.Files, file)
		}
		if *update {
			if err := os.WriteFile(name, txtar.Format(&got), 0o644); err != nil {
				t.Fatal(err)
			}
			return
		}
		if d := cmp.Diff(string(txtar.Format(archive)), string(txtar.Format(&got))); d != "" {
			t.Errorf("the tree is another (-golden +got); go test ./appliance/compile -update writes it anew:\n%s", d)
		}
	})
}

// TestPlanComesBack reads each plan as the plugin does.
func TestPlanComesBack(t *testing.T) {
	golden(t, func(t *testing.T, _, _ string, p *plan.Plan) {
		first, err := p.JSON()
		if err != nil {
			t.Fatal(err)
		}
		back, err := plan.Parse(first)
		if err != nil {
			t.Fatal(err)
		}
		second, err := back.JSON()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(first, second) {
			t.Errorf("plan.json changes when it is read and written:\n%s", cmp.Diff(string(first), string(second)))
		}
		if bytes.Contains(first, []byte("null")) {
			t.Error("there is a null in plan.json: an empty list is []")
		}
	})
}

// TestSameBytesAnywhere compiles each spec again in another folder, time zone, locale and environment.
func TestSameBytesAnywhere(t *testing.T) {
	golden(t, func(t *testing.T, _, spec string, p *plan.Plan) {
		first, err := p.Tree(nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Setenv("TZ", "Pacific/Kiritimati")
		t.Setenv("LC_ALL", "tr_TR.UTF-8")
		t.Setenv("HOME", "/nonexistent")
		local := time.Local
		time.Local = time.FixedZone("elsewhere", 14*3600)
		t.Cleanup(func() { time.Local = local })
		t.Chdir(t.TempDir())
		for range 10 { // Go iterates over maps in random order
			again, err := compiled(t, load(t, "/some/where/else/host.hcl", spec)).Tree(nil)
			if err != nil {
				t.Fatal(err)
			}
			for i := range max(len(first), len(again)) {
				if i >= min(len(first), len(again)) || first[i].Path != again[i].Path || first[i].Mode != again[i].Mode ||
					!bytes.Equal(first[i].Data, again[i].Data) {
					t.Fatalf("another tree:\n%s", cmp.Diff(first, again))
				}
			}
		}
	})
}

func TestCommentChangesNoDigest(t *testing.T) {
	golden(t, func(t *testing.T, _, spec string, p *plan.Plan) {
		want, err := p.Digest()
		if err != nil {
			t.Fatal(err)
		}
		moved := compiled(t, load(t, "host.hcl", "# a comment\n\n"+spec))
		if got, err := moved.Digest(); err != nil || got != want {
			t.Errorf("a comment changes the digest: %s, %v; was %s", got, err, want)
		}
		if moved.Origins[plan.Address(plan.KindPool, p.Pools[0].Name)] == p.Origin(plan.KindPool, p.Pools[0].Name) {
			t.Errorf("the origin did not move with its line: %v", p.Origins)
		}
	})
}

func host(slots int) *hostspec.Host {
	return &hostspec.Host{
		Name: "h", EgressInterface: "eno1", StateDir: "/var/lib/fleetingd", Refresh: 24 * time.Hour,
		Disks: hostspec.Disks{Backing: "auto"},
		Network: hostspec.Network{
			Subnet: netip.MustParsePrefix("10.64.0.0/16"), MTU: 1500,
			DNS: []netip.Addr{netip.MustParseAddr("1.1.1.3")},
		},
		Hypervisor: hostspec.Hypervisor{Driver: "cloud-hypervisor", Binary: "cloud-hypervisor", Sandbox: true},
		Images: []*hostspec.Image{{
			Name: "i", User: "ubuntu",
			Ubuntu: &hostspec.UbuntuSource{Release: "noble", Mirror: "https://m", Arch: "amd64"},
		}},
		Pools: []*hostspec.Pool{{
			Name: "p", Image: "i", CPUs: 2, Memory: 1 << 30, Disk: 1 << 30, Start: "cold", MaxInstances: slots,
		}},
		Runners: []*hostspec.Runner{{
			Name: "r", Pool: "p", URL: "https://gitlab.example.com", Token: hostspec.Text{{Secret: hostspec.Secret{From: "file:/run/secrets/t"}}},
			Executor: "instance", CapacityPerInstance: 1, MaxUseCount: 1,
		}},
	}
}

// TestPlaceholderInSettings: text that looks like the placeholder of a secret would be replaced by the secret.
func TestPlaceholderInSettings(t *testing.T) {
	h := host(1)
	h.Runners[0].Settings = map[string]any{"pre_build_script": "echo @SECRET:runner.r.token@"}
	p, diags := compile.Compile(h, compile.Options{})
	if p != nil && !diags.HasErrors() || !strings.Contains(diags.Error(), "@SECRET:runner.r.token@") {
		t.Errorf("findings: %v", diags)
	}
	// Keys whose placeholders would be the same word each get their own.
	x := func(from string) hostspec.Text { return hostspec.Text{{Secret: hostspec.Secret{From: "env:" + from}}} }
	h.Runners[0].Settings = map[string]any{"docker": map[string]any{"sysctls": map[string]any{
		"a\n\"b": x("A"), "a__b": x("B"), "a.b": x("C"), "c": append(x("D"), x("E")...), "ü@": x("F"),
	}}}
	p = compiled(t, h)
	tree, err := p.Tree(func(from string) (string, error) { return "<" + from + ">", nil })
	if err != nil {
		t.Fatal(err)
	}
	var config struct {
		Runners []struct {
			Docker struct{ Sysctls map[string]string }
		}
	}
	for _, f := range tree {
		if f.Path == "/etc/gitlab-runner/config.toml" {
			if _, err := toml.Decode(string(f.Data), &config); err != nil {
				t.Fatal(err)
			}
		}
	}
	want := map[string]string{"a\n\"b": "<env:A>", "a__b": "<env:B>", "a.b": "<env:C>", "c": "<env:D><env:E>", "ü@": "<env:F>"}
	if d := cmp.Diff(want, config.Runners[0].Docker.Sysctls); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

func TestSubnetIsFull(t *testing.T) {
	h := host(1021)
	h.Network.Subnet = netip.MustParsePrefix("172.16.120.0/22")
	p := compiled(t, h) // 1,021 workers and the image's prebuild
	if got, want := p.Slots[0].Address.String(), "172.16.120.2"; got != want {
		t.Errorf("the first worker has %s, want %s", got, want)
	}
	if got, want := p.Slots[1021].Address.String(), "172.16.123.255"; got != want {
		t.Errorf("the last slot has %s, want %s: a routed subnet has no broadcast address", got, want)
	}
	h.Pools[0].MaxInstances++
	_, diags := compile.Compile(h, compile.Options{})
	want := "172.16.120.0/22 has 1022 addresses for workers, but 1023 are needed: 1022 for the pools' max_instances and one " +
		"for the prebuild of each of 1 images. Use a larger subnet, or fewer instances."
	if len(diags) != 1 || diags[0].Detail != want {
		t.Errorf("got %v, want %s", diags, want)
	}
	h.Pools[0].MaxInstances = 10
	h.Network.Subnet6 = netip.MustParsePrefix("fd00::/125")
	if _, diags := compile.Compile(h, compile.Options{}); !diags.HasErrors() {
		t.Error("11 slots fit into an IPv6 /125")
	}
}

// TestRefused has one mistake each that only the compiled whole shows.
func TestRefused(t *testing.T) {
	for _, c := range []struct {
		name, want string
		change     func(*hostspec.Host)
	}{
		{"no pool", `host "h" has no pool "q": it has p`, func(h *hostspec.Host) { h.Runners[0].Pool = "q" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := host(1)
			h.Range = hcl.Range{Filename: "host.hcl", Start: hcl.InitialPos}
			c.change(h)
			p, diags := compile.Compile(h, compile.Options{})
			if !diags.HasErrors() || p != nil {
				t.Fatalf("compiled: %v", diags)
			}
			if !strings.Contains(diags.Error(), c.want) {
				t.Errorf("got %v, want %s", diags, c.want)
			}
		})
	}
}

// BenchmarkCompile compiles a spec to plan.json and its digest. Goal: 4,000 slots in less than 100 ms.
func BenchmarkCompile(b *testing.B) {
	for _, slots := range []int{10, 1000, 4000} {
		b.Run(fmt.Sprint(slots), func(b *testing.B) {
			h := host(slots)
			for b.Loop() {
				p := compiled(b, h)
				if _, err := p.JSON(); err != nil {
					b.Fatal(err)
				}
				if _, err := p.Digest(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
