package hostspec

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/hcl/v2"

	"github.com/fleetingd/fleetingd/appliance/need"
)

const minimal = `
host "metal-01" {
  egress_interface = "eno1"
}
image "debian" {
  debian {
    suite = "trixie"
  }
}
pool "small" {
  image         = image.debian
  cpus          = 2
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = 3
}
`

// load loads a text that must be valid, and returns its host.
func load(t *testing.T, opts Options, src string) *Host {
	t.Helper()
	opts.Source = []byte(src)
	if opts.Path == "" {
		opts.Path = "host.hcl"
	}
	res, diags := Load(opts)
	for _, d := range diags {
		t.Errorf("%s", d)
	}
	if t.Failed() {
		t.FailNow()
	}
	return res.Host
}

// findings loads a text and gives all that is found in it, as text.
func findings(opts Options, src string) string {
	opts.Source = []byte(src)
	if opts.Path == "" {
		opts.Path = "host.hcl"
	}
	_, diags := Load(opts)
	var b strings.Builder
	for _, d := range diags {
		b.WriteString(text(d) + "\n")
	}
	return b.String()
}

var (
	ignoreRanges = cmpopts.IgnoreTypes(hcl.Range{})
	compareNet   = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
	compareAddr  = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	secretFrom   = cmp.Comparer(func(a, b Secret) bool { return a.From == b.From })
)

func TestDefaults(t *testing.T) {
	got := load(t, Options{}, minimal)
	image := &Image{Name: "debian", Debian: &DebianSource{Suite: "trixie", Arch: "amd64"}, User: "ci"}
	pool := &Pool{Name: "small", Image: "debian", CPUs: 2, Memory: 1 << 30, Disk: 5 << 30, Start: "warm", MaxInstances: 3,
		Limits: Limits{Connections: DefaultConnections}}
	want := &Host{
		Name: "metal-01", EgressInterface: "eno1", StateDir: "/var/lib/fleetingd", Refresh: 24 * time.Hour,
		Disks: Disks{Backing: "auto"},
		Network: Network{
			Subnet: netip.MustParsePrefix("172.16.120.0/22"), MTU: 1500,
			DNS: []netip.Addr{netip.MustParseAddr("1.1.1.3"), netip.MustParseAddr("1.0.0.3")},
		},
		Hypervisor: Hypervisor{Driver: "cloud-hypervisor", Binary: "cloud-hypervisor", Sandbox: true},
		Images:     []*Image{image},
		Pools:      []*Pool{pool},
	}
	if d := cmp.Diff(want, got, ignoreRanges, compareNet, compareAddr, secretFrom); d != "" {
		t.Error(d)
	}
}

// TestJSONIsTheSameLanguage loads one spec in both syntaxes.
func TestJSONIsTheSameLanguage(t *testing.T) {
	env := Options{Environ: []string{"FLEETINGD_VAR_count=7", "FLEETINGD_VAR_region=eu"}}
	native := load(t, env, `
variable "count" { type = number }
variable "region" { type = string }
locals { zone = "${var.region}-1" }
host "metal-01" {
  egress_interface = "eno1"
  refresh          = "0s"
  gitlab_runner {
    log_format     = "json"
    session_server = { listen_address = ":8093" }
  }
  network {
    dns = ["9.9.9.9"]
    egress "a" {
      action = "allow"
      to     = ["10.0.0.0/8"]
      ports  = ["tcp/1-2"]
    }
    egress "b" { action = "deny" }
  }
  hypervisor "qemu" { accel = "tcg" }
}
image "u" {
  ubuntu { release = "noble" }
  prebuild {
    run = ["echo ${local.zone}"]
    file "/etc/x" { content = jsonencode({ a = [1, true] }) }
  }
}
pool "small" {
  image         = image.u
  cpus          = 2
  memory        = "1GiB"
  disk          = "5GiB"
  max_instances = var.count
}
runner "r" {
  pool     = pool.small
  url      = "https://gitlab.example.com"
  token    = file("/run/secrets/token")
  executor = "docker-autoscaler"
  settings = { limit = 3, docker = { image = "alpine", privileged = true }, environment = ["A=b"] }
  policy { idle_count = 1 }
  policy {
    periods         = ["* 8-18 * * mon-fri"]
    preemptive_mode = false
    scale_factor    = 1.5
  }
}
`)
	env.Path = "host.hcl.json"
	json := load(t, env, `{
  "//": "a comment",
  "variable": {"count": {"type": "number"}, "region": {"type": "string"}},
  "locals": {"zone": "${var.region}-1"},
  "host": {"metal-01": {
    "egress_interface": "eno1",
    "refresh": "0s",
    "gitlab_runner": {"log_format": "json", "session_server": {"listen_address": ":8093"}},
    "network": {
      "dns": ["9.9.9.9"],
      "egress": [
        {"a": {"action": "allow", "to": ["10.0.0.0/8"], "ports": ["tcp/1-2"]}},
        {"b": {"action": "deny"}}
      ]
    },
    "hypervisor": {"qemu": {"accel": "tcg"}}
  }},
  "image": {"u": {
    "ubuntu": {"release": "noble"},
    "prebuild": {
      "run": ["echo ${local.zone}"],
      "file": {"/etc/x": {"content": "${jsonencode({a = [1, true]})}"}}
    }
  }},
  "pool": {"small": {
    "image": "${image.u}", "cpus": 2, "memory": "1GiB", "disk": "5GiB", "max_instances": "${var.count}"
  }},
  "runner": {"r": {
    "pool": "pool.small",
    "url": "https://gitlab.example.com",
    "token": "${file(\"/run/secrets/token\")}",
    "executor": "docker-autoscaler", "settings": {"limit": 3, "docker": {"image": "alpine", "privileged": true}, "environment": ["A=b"]},
    "policy": [
      {"idle_count": 1},
      {"periods": ["* 8-18 * * mon-fri"], "preemptive_mode": false, "scale_factor": 1.5}
    ]
  }}
}`)
	if d := cmp.Diff(native, json, ignoreRanges, compareNet, compareAddr, secretFrom); d != "" {
		t.Error(d)
	}
	if native.Pools[0].MaxInstances != 7 || native.Images[0].Prebuild.Run[0] != "echo eu-1" || native.Refresh != 0 {
		t.Errorf("variables and locals have no effect: %+v", native)
	}
	if native.Hypervisor.Binary != "qemu-system-x86_64" {
		t.Errorf("binary %q", native.Hypervisor.Binary)
	}
	if limit := native.Runners[0].Settings["limit"]; limit != int64(3) {
		t.Errorf("limit is %T %v", limit, limit)
	}
}

func TestJSONFindings(t *testing.T) {
	for _, tt := range []struct{ name, src, want string }{
		{"no JSON", `{"host": `, "ERROR: "},
		{"not an object", `[1]`, "ERROR: "},
		{"unknown block", `{"hots": {"a": {}}}`, `No argument or block type is named "hots". Did you mean "host"?`},
		{"literal token", `{"runner": {"r": {"pool": "pool.x", "url": "https://x", "token": "glrt-secret"}}}`, "could read a secret that is written in it"},
		{"unit", `{"pool": {"p": {"image": "image.x", "cpus": 1, "memory": 8, "disk": "8GB", "max_instances": 1}}}`, `write "8GiB"`},
		{"unknown reference", `{"image": {"ubuntu": {}}, "pool": {"p": {"image": "image.ubunut"}}}`, "Did you mean image.ubuntu?"},
		{"no reference", `{"pool": {"p": {"image": "ubuntu"}}}`, "Write the name of an image block"},
		{"a shell's variable", `{"locals": {"x": "echo ${HOME}"}}`, "write $${HOME} instead of ${HOME}"},
		{"curl's", `{"locals": {"x": "curl -w %{http_code}"}}`, "write %%{ instead of %{"},
		{"deep", strings.Repeat(`{"a":`, 100000), "Nested too deeply"},
		{"deep in a string", `{"locals": {"x": "${` + strings.Repeat("(", 100000) + `"}}`, "Nested too deeply"},
		{"deep type", `{"variable": {"x": {"type": "` + strings.Repeat("list(", 100000) + `"}}}`, "Nested too deeply"},
		{"huge number", `{"locals": {"x": 1e999999999}}`, "Too large a number"},
		{"work in a string", `{"locals": {"x": "${[for a in range(1000) : [for b in range(1000) : range(1000)]]}"}}`, "Too much work"},
		{"work in a key", `{"locals": {"x": {"${join(\"\", [for a in range(1000) : [for b in range(1000) : join(\"\", range(1000))]])}": 1}}}`, "Too much work"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := findings(Options{Path: "host.hcl.json"}, tt.src); !strings.Contains(got, tt.want) {
				t.Errorf("want %q in:\n%.2000s", tt.want, got)
			}
		})
	}
}

func TestVariables(t *testing.T) {
	const src = minimal + `
variable "name" {
  type = string
}
variable "list" {
  type    = list(string)
  default = ["git"]
}
variable "limits" {
  type    = object({ mtu = optional(number, 1400), interfaces = optional(list(string), []) })
  default = {}
}
image "x" {
  debian {
    suite    = var.name
    packages = var.list
  }
}
`
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	hclFile := write("a.hcl", `name = "from-file"`)
	jsonFile := write("b.json", `{"name": "from-json", "list": ["curl"]}`)
	environ := []string{"FLEETINGD_VAR_name=from-env", `FLEETINGD_VAR_list=["vim", "nano"]`, "FLEETINGD_VAR_other=ignored"}

	for _, tt := range []struct {
		name  string
		opts  Options
		suite string
		list  string
	}{
		{"environment", Options{Environ: environ}, "from-env", "[vim nano]"},
		{"a file wins over the environment", Options{Environ: environ, VarFiles: []string{hclFile}}, "from-file", "[vim nano]"},
		{"the last file wins", Options{Environ: environ, VarFiles: []string{hclFile, jsonFile}}, "from-json", "[curl]"},
		{"a flag wins over all", Options{Environ: environ, VarFiles: []string{hclFile}, Vars: []string{"name=from-flag"}}, "from-flag", "[vim nano]"},
		{"default", Options{Vars: []string{"name=x"}}, "x", "[git]"},
		{"an equals sign in the value", Options{Vars: []string{"name=x", `list=["a=b"]`}}, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.suite == "" {
				if got := findings(tt.opts, src); !strings.Contains(got, `"a=b" is not the name of a Debian package`) {
					t.Error(got)
				}
				return
			}
			d := load(t, tt.opts, src).Images[1].Debian
			if d.Suite != tt.suite || fmt.Sprint(d.Packages) != tt.list {
				t.Errorf("suite %q, packages %v", d.Suite, d.Packages)
			}
		})
	}

	for _, tt := range []struct {
		name string
		opts Options
		want string
	}{
		{"no equals sign", Options{Vars: []string{"name"}}, `"name" has no "="`},
		{"unknown flag", Options{Vars: []string{"nmae=x"}}, `declares no such variable (did you mean "name"?)`},
		{"unknown in a file", Options{VarFiles: []string{write("c.hcl", `nam = 1`)}, Vars: []string{"name=x"}}, `WARNING: Unknown variable: host.hcl declares no variable "nam"`},
		{"not set", Options{}, `Set it with --var name=VALUE, in a --var-file, or with FLEETINGD_VAR_name`},
		{"wrong syntax", Options{Vars: []string{"name=x", "list=a,b"}}, `write it as in the spec, such as '["a", "b"]'`},
		{"wrong type", Options{Vars: []string{"name=x", "list={}"}}, "does not fit"},
		{"deep", Options{Vars: []string{"name=x", "list=" + strings.Repeat("[", 1e6)}}, "too deeply nested"},
		{"work", Options{Vars: []string{"name=x", "list=" + "[for a in range(1000) : [for b in range(1000) : range(1000)]]"}}, "too much work"},
		{"file not there", Options{VarFiles: []string{filepath.Join(dir, "none")}}, "no such file or directory"},
		{"file refers", Options{VarFiles: []string{write("d.hcl", `name = var.list`)}}, "Variables not allowed"},
		{"file has blocks", Options{VarFiles: []string{write("e.hcl", `host "x" {}`)}}, "Blocks are not allowed here"},
		{"file is a directory", Options{VarFiles: []string{dir}}, "it is a directory, not a regular file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := findings(tt.opts, src); !strings.Contains(got, tt.want) {
				t.Errorf("want %q in:\n%.1000s", tt.want, got)
			}
		})
	}
}

func TestHostIsPicked(t *testing.T) {
	two := minimal + "host \"metal-02\" {\n  egress_interface = \"eth0\"\n}\n"
	for _, tt := range []struct {
		opts Options
		want string
	}{
		{Options{Host: "metal-02"}, "metal-02"},
		{Options{Machine: "metal-01"}, "metal-01"},
		{Options{Machine: "metal-02.example.com"}, "metal-02"},
		{Options{Host: "metal-01", Machine: "metal-02"}, "metal-01"},
		{Options{AnyHost: true}, "metal-01"},
	} {
		if h := load(t, tt.opts, two); h.Name != tt.want {
			t.Errorf("%+v picks %s", tt.opts, h.Name)
		}
	}
	if h := load(t, Options{Machine: "elsewhere"}, minimal); h.Name != "metal-01" {
		t.Error("the only host is not taken")
	}
	for _, tt := range []struct {
		opts Options
		want string
	}{
		{Options{Host: "metal-03"}, `has no host block "metal-03" (did you mean "metal-01"?)`},
		{Options{Host: "metal-03", AnyHost: true}, `has no host block "metal-03"`},
		{Options{Machine: "laptop"}, `none has this machine's name, "laptop". Choose one with --host: "metal-01" and "metal-02"`},
		{Options{}, `has 2 host blocks. Choose one with --host`},
	} {
		if got := findings(tt.opts, two); !strings.Contains(got, tt.want) {
			t.Errorf("%+v: want %q in:\n%s", tt.opts, tt.want, got)
		}
	}
}

// TestDeepAndHuge gives HCL's recursive parsers what would overflow their stack,
// which no program survives.
func TestDeepAndHuge(t *testing.T) {
	n := 90_000
	if need.Full() {
		n = 900_000 // near the largest source that is read
	}
	for _, tt := range []struct{ name, src, want string }{
		{"brackets", "locals {\n x = " + strings.Repeat("[", n), "Nested too deeply"},
		{"parentheses", "locals {\n x = " + strings.Repeat("(", n), "Nested too deeply"},
		{"objects", "locals {\n x = " + strings.Repeat("{a=", n/3), "Nested too deeply"},
		{"blocks", strings.Repeat("a {\n", n/4), "Nested too deeply"},
		{"not", "locals {\n x = " + strings.Repeat("!", n), "Nested too deeply"},
		{"minus", "locals {\n x = " + strings.Repeat("- ", n/2), "Nested too deeply"},
		{"sum", "locals {\n x = 1" + strings.Repeat("+1", n/2) + "\n}\n", "Nested too deeply"},
		{"conditions", "locals {\n x = " + strings.Repeat("true?1:", n/7) + "1\n}\n", "Nested too deeply"},
		{"templates", "locals {\n x = " + strings.Repeat(`"${`, n/3), "Nested too deeply"},
		{"directives", "locals {\n x = \"" + strings.Repeat(`%{if true}`, n/10) + "\"\n}\n", "Nested too deeply"},
		{"indices", "locals {\n x = a" + strings.Repeat(`[0]`, n/3) + "\n}\n", "Nested too deeply"},
		{"splats", "locals {\n x = a" + strings.Repeat(`.*`, n/2) + "\n}\n", "Nested too deeply"},
		{"calls", "locals {\n x = " + strings.Repeat(`a(`, n/2) + "\n}\n", "Nested too deeply"},
		{"fors", "locals {\n x = " + strings.Repeat(`[for a in `, n/10) + "\n}\n", "Nested too deeply"},
		{"functions' types", "variable \"x\" {\n type = " + strings.Repeat(`list(`, n/5) + "\n}\n", "Nested too deeply"},
		{"locals in a row", localChain(2000), "Locals nested too deeply"},
		{"number", "locals {\n x = 1e999999999\n}\n", "Too large a number"},
		{"digits", "locals {\n x = " + strings.Repeat("9", n) + "\n}\n", "Too large a number"},
		{"garbage", strings.Repeat("\xff\x00", n/2), "ERROR: "},
		{"quotes", strings.Repeat(`"`, n), "ERROR: "},
		{"many locals", manyLocals(5000), "no host block"},
		{"as deep as may be", "locals {\n x = " + strings.Repeat("[", 240) + strings.Repeat("]", 240) + "\n}\n", "no host block"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := findings(Options{}, tt.src); !strings.Contains(got, tt.want) {
				t.Errorf("want %q in:\n%.1000s", tt.want, got)
			}
		})
	}
}

// TestManyJSONTokens: the guard's time grows with the file and not with its square. A third of a million strings, as a
// generated file may have, take it some 100 ms; with the line of each of them found it was more than a minute.
// TestManySecrets: a secret costs as much as the few bytes that stand for it.
func TestManySecrets(t *testing.T) {
	var env strings.Builder
	const n = 500
	for i := range n {
		fmt.Fprintf(&env, "\"V%d=${file(\"/run/secrets/v%d\")}\",\n", i, i)
	}
	spec := strings.Replace(withRunner(`file("/run/secrets/token")`), "token =", "settings = { environment = [\n"+env.String()+"] }\ntoken =", 1)
	res, diags := Load(Options{Path: "host.hcl", Source: []byte(spec)})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	got := 0
	for range res.Host.Runners[0].Secrets() {
		got++
	}
	if got != n+1 {
		t.Errorf("%d secrets, want %d", got, n+1)
	}
	// What file() reads of the spec's own folder still counts.
	src := strings.ReplaceAll(spec, `file("/run/secrets/v`, `file("v`)
	if _, diags := Load(Options{Path: "host.hcl", Source: []byte(src)}); !strings.Contains(diags.Error(), "touch more than") {
		t.Errorf("%v", diags)
	}
}

func TestManyJSONTokens(t *testing.T) {
	src := []byte(`{"locals": {"x": [` + strings.Repeat(`"",`, maxSource/3-10) + `""]}}`)
	start := time.Now()
	if d := guardJSON(src, "host.hcl.json"); d != nil {
		t.Error(d)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("it took %v", took)
	}
}

func localChain(n int) string {
	var b strings.Builder
	b.WriteString("locals {\n")
	for i := range n {
		fmt.Fprintf(&b, "  l%d = local.l%d\n", i, i+1)
	}
	fmt.Fprintf(&b, "  l%d = 1\n}\n", n)
	return b.String()
}

func manyLocals(n int) string {
	var b strings.Builder
	b.WriteString("locals {\n")
	for i := range n {
		fmt.Fprintf(&b, "  l%d = \"x-${%d}\"\n", i, i)
	}
	b.WriteString("}\n")
	return b.String()
}

// TestUnreadable names what cannot be a spec.
func TestUnreadable(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo.hcl")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	large := filepath.Join(dir, "large.hcl")
	if err := os.WriteFile(large, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(large, 1<<40); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		dir:                              "it is a directory",
		fifo:                             "it is a FIFO",
		large:                            "it is larger than 1024 KiB",
		"/dev/zero":                      "it is a device",
		filepath.Join(dir, "none"):       "no such file or directory",
		filepath.Join(large, "none.hcl"): "not a directory",
	} {
		_, diags := Load(Options{Path: path})
		if !diags.HasErrors() || !strings.Contains(diags.Error(), want) || !strings.Contains(diags.Error(), path) {
			t.Errorf("%s: want %q in: %v", path, want, diags)
		}
	}
}

// TestManyWrongNames: where every name is wrong, the first ones get a suggestion, and the rest do not take minutes.
func TestManyWrongNames(t *testing.T) {
	const many = 5000
	lines := func(format string) string {
		var b strings.Builder
		for i := range many {
			fmt.Fprintf(&b, format, i)
		}
		return b.String()
	}
	for what, src := range map[string]string{
		"settings":  strings.Replace(withRunner(`env("KEY")`), "token = env", "settings = {\nlimitt = 1\n"+lines("x%d_y = 1\n")+"}\n token = env", 1),
		"locals":    "locals {\nlimit = 1\na = local.limitt\n" + lines("x%d_y = local.nope\n") + "}\n" + minimal,
		"variables": "variable \"limit\" { default = 1 }\nlocals {\na = var.limitt\n" + lines("x%d_y = var.nope\n") + "}\n" + minimal,
		"starts":    "variable \"limit\" { default = 1 }\nlocals {\na = var.limitt\n}\n" + minimal + lines("pool \"x%d\" { start = \"wram\" }\n"),
	} {
		start := time.Now()
		l := newLoader(Options{Path: "host.hcl", Source: []byte(src)})
		l.load()
		if most := maxCompared + many + 2; l.compared > most {
			t.Errorf("%s: %d names were compared, %d at most", what, l.compared, most)
		}
		if !slices.ContainsFunc(l.diags, func(d *hcl.Diagnostic) bool {
			return strings.Contains(d.Detail, `(did you mean "limit"?)`) || strings.Contains(d.Detail, `; did you mean "limit"?`)
		}) {
			t.Errorf("%s: the first finding has no suggestion", what)
		}
		t.Logf("%s: %d findings in %v", what, len(l.diags), time.Since(start))
	}
}
