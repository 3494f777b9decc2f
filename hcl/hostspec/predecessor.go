package hostspec

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/zclconf/go-cty/cty"

	"github.com/fleetingd/fleetingd/appliance/suggest"
)

// PredecessorKeys are the plugin_config keys of helmholtzcloud's fleeting-plugin-fleetingd, which this one
// succeeds (its README, "Configuration Reference").
var PredecessorKeys = []string{
	keyEgress, keyDir, keySubnet, keyCPUs, keyMemory, keyDisk, keyCommands, keyConsole,
}

const (
	keyEgress   = "egress_interface"
	keyDir      = "vm_disk_directory"
	keySubnet   = "vm_subnet"
	keyCPUs     = "vm_num_cpu_cores"
	keyMemory   = "vm_memory_mb"
	keyDisk     = "vm_disk_size_gb"
	keyCommands = "vm_prebuild_cloudinit_extra_cmds"
	keyConsole  = "vm_enable_virtio_console"
)

// The environment of a plugin with the predecessor's keys, which had no key for these. They are for sites
// without internet, and for tests.
const (
	// EnvImage is the URL of a disk image, raw or qcow2, that is used in place of Ubuntu's; SHA256SUMS beside it is
	// checked. Nothing but vm_prebuild_cloudinit_extra_cmds is installed in it. Its user is "ubuntu".
	EnvImage = "FLEETINGD_IMAGE_URL"
	// EnvKernel and EnvInitrd are the URLs of its kernel and initrd. The initrd may be left out.
	EnvKernel = "FLEETINGD_KERNEL_URL"
	EnvInitrd = "FLEETINGD_INITRD_URL"
	// EnvHypervisor is "cloud-hypervisor" (the default) or "qemu".
	EnvHypervisor = "FLEETINGD_HYPERVISOR"
)

const (
	// predecessorPool and the image's name are seen in logs and in the workers' host names.
	predecessorPool  = "default"
	predecessorImage = "ubuntu"
	// predecessorRoom is how many workers the predecessor's /24 has room for here, rounded down: 256 addresses
	// without the network's, the broadcast, the gateway's and the prebuild's are 252. There it was 63.
	predecessorRoom = 250
)

// PredecessorOptions are what FromPredecessor may not ask the machine for.
type PredecessorOptions struct {
	Machine string   // the machine's name
	Arch    string   // GOARCH
	Environ []string // os.Environ
}

// Predecessor is a plugin_config of the predecessor in the terms of a spec.
type Predecessor struct {
	EgressInterface, StateDir string
	Subnet                    string // "172.16.120.0/24"
	CPUs, MemoryMiB, DiskGiB  int64  // qemu-img's G, which the predecessor handed the disk's size to, is 2^30
	Console                   bool
	Run                       []string // the extra commands
}

// ParsePredecessor reads the predecessor's plugin_config, decoded from JSON or TOML. With errors among the findings, which name the keys,
// the result is not to be used.
func ParsePredecessor(keys map[string]any) (Predecessor, hcl.Diagnostics) {
	p := &predecessor{keys: keys}
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		if !slices.Contains(PredecessorKeys, k) {
			p.errorf("Unknown key", "plugin_config has no key %s%s.", quote(k), suggest.DidYouMean(k, PredecessorKeys))
		}
	}
	v := Predecessor{
		EgressInterface: p.text(keyEgress, "eth0"),
		StateDir:        path.Clean(p.text(keyDir, "/srv/fleetingd")),
		Subnet:          p.subnet(),
		Run:             p.commands(),
		CPUs:            p.whole(keyCPUs, 8),
		MemoryMiB:       p.whole(keyMemory, 16384),
		DiskGiB:         p.whole(keyDisk, 30),
		Console:         p.boolean(keyConsole),
	}
	return v, p.diags
}

// FromPredecessor makes a host of the predecessor's plugin_config, decoded from JSON or TOML: defaulted and
// validated like any. The findings name its keys. The host has one pool, and no runner: its config.toml is
// there already.
func FromPredecessor(keys map[string]any, o PredecessorOptions) (*Host, hcl.Diagnostics) {
	text, diags := PredecessorSpec(keys, o)
	if diags.HasErrors() {
		return nil, diags
	}
	res, found := Load(Options{Path: "plugin_config.hcl", Source: text, AnyHost: true})
	lines := strings.Split(string(text), "\n")
	for _, d := range found {
		diags = append(diags, blame(d, lines))
	}
	return res.Host, diags
}

// PredecessorSpec is the host.hcl that does what the predecessor did with these keys.
func PredecessorSpec(keys map[string]any, o PredecessorOptions) ([]byte, hcl.Diagnostics) {
	values, diags := ParsePredecessor(keys)
	p := &predecessor{env: environ(o.Environ), diags: diags}
	body := p.host(values, o)
	if p.diags.HasErrors() {
		return nil, p.diags
	}
	return hclwrite.Format([]byte(body)), nil
}

// blame says with which key a finding about the text that was made of it has to do.
func blame(d *hcl.Diagnostic, lines []string) *hcl.Diagnostic {
	out := &hcl.Diagnostic{Severity: d.Severity, Summary: d.Summary, Detail: d.Detail}
	if d.Subject == nil || d.Subject.Start.Line < 1 || d.Subject.Start.Line > len(lines) {
		return out
	}
	line := lines[d.Subject.Start.Line-1]
	if _, from, ok := strings.Cut(line, "# "); ok {
		out.Summary = from + ": " + d.Summary
	}
	return out
}

// predecessor is one conversion.
type predecessor struct {
	keys  map[string]any
	env   map[string]string
	diags hcl.Diagnostics
}

func (p *predecessor) errorf(summary, detail string, args ...any) {
	p.diags = append(p.diags, &hcl.Diagnostic{
		Severity: hcl.DiagError, Summary: summary, Detail: fmt.Sprintf(detail, args...),
	})
}

// host is the text. Each value's line ends with the key that it came from: blame reads it, and so do people.
func (p *predecessor) host(v Predecessor, o PredecessorOptions) string {
	var b bytes.Buffer
	line := func(attr, value, from string) { fmt.Fprintf(&b, "%s = %s # %s\n", attr, value, from) }

	fmt.Fprintf(&b, "host %s {\n", literal(HostLabel(o.Machine)))
	line("egress_interface", literal(v.EgressInterface), keyEgress)
	line("state_dir", literal(v.StateDir), keyDir)
	fmt.Fprintf(&b, "\nnetwork {\n")
	line("subnet", literal(v.Subnet), keySubnet)
	fmt.Fprintf(&b, "}\n")
	if h := p.env[EnvHypervisor]; h != "" {
		fmt.Fprintf(&b, "\nhypervisor %s { # %s\n}\n", literal(h), EnvHypervisor)
	}
	fmt.Fprintf(&b, "}\n\nimage %s {\n", literal(predecessorImage))
	p.source(&b, line, o.Arch)
	b.WriteString("user = \"ubuntu\"\n\nprebuild {\n")
	commands := v.Run
	if p.env[EnvImage] == "" {
		b.WriteString("packages = [\"ca-certificates\", \"curl\"]\n")
		commands = append(slices.Clone(UbuntuCommands), commands...)
	}
	line("run", list(commands), keyCommands)
	fmt.Fprintf(&b, "}\n}\n\npool %s {\nimage = image.%s\n", literal(predecessorPool), predecessorImage)
	line("cpus", strconv.FormatInt(v.CPUs, 10), keyCPUs)
	line("memory", literal(strconv.FormatInt(v.MemoryMiB, 10)+"MiB"), keyMemory)
	line("disk", literal(strconv.FormatInt(v.DiskGiB, 10)+"GiB"), keyDisk)
	line("console", strconv.FormatBool(v.Console), keyConsole)
	fmt.Fprintf(&b, "start = \"cold\"\nmax_instances = %d\n}\n", predecessorRoom)
	return b.String()
}

// UbuntuCommands are what the predecessor did to Ubuntu's image before the extra commands. Jobs need gitlab-runner
// in the VM for artifacts and caches.
var UbuntuCommands = []string{
	"DEBIAN_FRONTEND=noninteractive apt-get -y upgrade",
	`curl -fsSL "https://packages.gitlab.com/install/repositories/runner/gitlab-runner/script.deb.sh" | os=ubuntu dist=noble bash`,
	"DEBIAN_FRONTEND=noninteractive apt-get -y install gitlab-runner",
}

func (p *predecessor) source(b *bytes.Buffer, line func(attr, value, from string), arch string) {
	disk, kernel, initrd := p.env[EnvImage], p.env[EnvKernel], p.env[EnvInitrd]
	switch {
	case disk == "" && (kernel != "" || initrd != ""):
		p.errorf("Incomplete environment", "%s and %s need %s, which is not set.", EnvKernel, EnvInitrd, EnvImage)
	case disk == "":
		b.WriteString("ubuntu {\nrelease = \"noble\"\n")
		if arch != "" {
			fmt.Fprintf(b, "arch = %s\n", literal(arch))
		}
		b.WriteString("}\n")
	case kernel == "":
		p.errorf("Incomplete environment", "%s is set, and %s is not: the VM boots a kernel from outside the disk.",
			EnvImage, EnvKernel)
	default:
		b.WriteString("url {\n")
		line("disk", literal(disk), EnvImage)
		line("kernel", literal(kernel), EnvKernel)
		if initrd != "" {
			line("initrd", literal(initrd), EnvInitrd)
		}
		b.WriteString("}\n")
	}
}

// text is a string that has to be there.
func (p *predecessor) text(key, example string) string {
	v, ok := p.keys[key]
	s, isText := v.(string)
	switch {
	case !ok:
		p.missing(key, strconv.Quote(example))
	case !isText:
		p.wrongType(key, v, fmt.Sprintf("a string such as %q", example))
	case s == "":
		p.errorf("Empty value", "%s is empty. Write, for example: %s = %q", key, key, example)
	}
	return s
}

// whole is a number that has to be there.
func (p *predecessor) whole(key string, example int64) int64 {
	v, ok := p.keys[key]
	if !ok {
		p.missing(key, strconv.FormatInt(example, 10))
		return 0
	}
	n, isWhole := asInteger(v)
	switch {
	case !isWhole:
		p.wrongType(key, v, fmt.Sprintf("a whole number such as %d", example))
	case n < 1:
		p.errorf("Invalid value", "%s must be 1 or more, such as %d; got %d.", key, example, n)
	}
	return n
}

// asInteger takes what JSON (with and without UseNumber) and TOML make of a number.
func asInteger(v any) (int64, bool) {
	switch n := v.(type) {
	case json.Number:
		i, err := n.Int64()
		return i, err == nil
	case int64:
		return n, true
	case int:
		return int64(n), true
	case float64:
		return int64(n), n == math.Trunc(n) && math.Abs(n) < 1<<53
	}
	return 0, false
}

func (p *predecessor) boolean(key string) bool {
	v, ok := p.keys[key]
	b, isBool := v.(bool)
	if ok && !isBool {
		p.wrongType(key, v, "true or false")
	}
	return b
}

var threeOctets = regexp.MustCompile(`^([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,3})\.$`)

// subnet makes "172.16.120.0/24" of "172.16.120.", to which the predecessor appended the last number.
func (p *predecessor) subnet() string {
	const example = "172.16.120."
	s := p.text(keySubnet, example)
	if s != "" && !threeOctets.MatchString(s) {
		p.errorf("Invalid value", "%s must be the first three numbers of an address with their dots, such as %q; got %s.",
			keySubnet, example, quote(s))
	}
	return s + "0/24"
}

// commands are the extra commands. The predecessor pasted each into a YAML list, where one in quotes is the
// text within them, and cloud-init ran that list with sh, without -e. So each still runs as it did before, and fails
// the prebuild only with its own exit code.
func (p *predecessor) commands() []string {
	v, ok := p.keys[keyCommands]
	if !ok {
		return nil
	}
	const want = `a list of strings such as ["apt-get install -y git"]`
	var items []any
	switch l := v.(type) {
	case []any:
		items = l
	case []string:
		for _, s := range l {
			items = append(items, s)
		}
	default:
		p.wrongType(keyCommands, v, want)
		return nil
	}
	var out []string
	for i, item := range items {
		s, isText := item.(string)
		switch {
		case !isText:
			p.wrongType(fmt.Sprintf("%s[%d]", keyCommands, i), item, "a string")
		case strings.TrimSpace(s) == "":
			p.errorf("Empty value", "%s[%d] is empty. Remove it.", keyCommands, i)
		default:
			out = append(out, "#!/bin/sh\n"+unquoteYAML(s))
		}
	}
	return out
}

// unquoteYAML takes the quotes off a string that YAML reads as a quoted one. JSON's escapes are YAML's (YAML
// 1.2, 5.7), and what is no quoted string as a whole is a plain one.
func unquoteYAML(s string) string {
	t := strings.TrimSpace(s)
	if len(t) < 2 || t[0] != t[len(t)-1] {
		return s
	}
	switch t[0] {
	case '"':
		var text string
		if json.Unmarshal([]byte(t), &text) == nil {
			return text
		}
	case '\'':
		inner := t[1 : len(t)-1]
		if !strings.Contains(strings.ReplaceAll(inner, "''", ""), "'") {
			return strings.ReplaceAll(inner, "''", "'")
		}
	}
	return s
}

func (p *predecessor) missing(key, example string) {
	p.errorf("Missing key", "plugin_config needs %s. Write, for example: %s = %s", key, key, example)
}

func (p *predecessor) wrongType(key string, v any, want string) {
	p.errorf("Wrong type", "%s must be %s; got %s.", key, want, shownType(v))
}

// shownType is a value of the wrong type for a message.
func shownType(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case string:
		return "the string " + quote(v)
	case bool:
		return fmt.Sprintf("the boolean %t", v)
	case json.Number:
		return "the number " + quote(v.String())
	case float64, int64, int:
		return fmt.Sprintf("the number %v", v)
	case []any, []string:
		return "a list"
	case map[string]any:
		return "a table"
	}
	return "something else"
}

// HostLabel is a machine's name as the label of its host block, or "localhost" if it cannot be one. The label is only for people.
func HostLabel(name string) string {
	name = strings.ToLower(name)
	if len(name) > maxHost || !hostSyntax.MatchString(name) {
		return "localhost"
	}
	return name
}

// literal is a string in HCL's quotes, its template marks escaped.
func literal(s string) string {
	return string(hclwrite.TokensForValue(cty.StringVal(s)).Bytes())
}

func list(items []string) string {
	quoted := make([]string, len(items))
	for i, s := range items {
		quoted[i] = literal(s)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}
