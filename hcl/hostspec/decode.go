package hostspec

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/hcl/v2/json"
	"github.com/zclconf/go-cty/cty"
)

var rootSchema = &hcl.BodySchema{Blocks: []hcl.BlockHeaderSchema{
	{Type: "variable", LabelNames: []string{"name"}},
	{Type: "locals"},
	{Type: "host", LabelNames: []string{"name"}},
	{Type: "image", LabelNames: []string{"name"}},
	{Type: "pool", LabelNames: []string{"name"}},
	{Type: "runner", LabelNames: []string{"name"}},
}}

// spec is all blocks of a file.
type spec struct {
	hosts   []*Host
	images  []*Image
	pools   []*Pool
	runners []*Runner
}

// decode turns blocks into structs. It finds wrong types, units and references'
// forms; what values mean together is validate's.
func (l *loader) decode(content *hcl.BodyContent) *spec {
	s := &spec{}
	for _, b := range content.Blocks {
		switch b.Type {
		case "host":
			s.hosts = append(s.hosts, l.decodeHost(b))
		case "image":
			s.images = append(s.images, l.decodeImage(b))
		case "pool":
			s.pools = append(s.pools, l.decodePool(b))
		case "runner":
			s.runners = append(s.runners, l.decodeRunner(b))
		}
	}
	for _, h := range s.hosts {
		h.Images, h.Pools, h.Runners = s.images, s.pools, s.runners
	}
	return s
}

func (l *loader) decodeHost(b *hcl.Block) *Host {
	h := &Host{Name: b.Labels[0], Range: b.DefRange}
	attrs := []attrSpec{
		{"egress_interface", `"eno1"`, true},
		{"state_dir", `"/var/lib/fleetingd"`, false},
		{"refresh", `"24h"`, false},
	}
	blocks := []hcl.BlockHeaderSchema{
		{Type: "disks"}, {Type: "network"}, {Type: "hypervisor", LabelNames: []string{"driver"}},
	}
	// The keys of gitlab_runner are GitLab Runner's. In JSON it is an object like settings.
	if json.IsJSONBody(b.Body) {
		attrs = append(attrs, attrSpec{"gitlab_runner", `{ listen_address = "127.0.0.1:9252" }`, false})
	} else {
		blocks = append(blocks, hcl.BlockHeaderSchema{Type: "gitlab_runner"})
	}
	// "install = false" stands in the place of the block.
	if !json.IsJSONBody(b.Body) || installIsAttribute(b.Body) {
		attrs = append(attrs, attrSpec{"install", `false`, false})
	}
	if !installIsAttribute(b.Body) {
		blocks = append(blocks, hcl.BlockHeaderSchema{Type: "install"})
	}
	s := l.open(b, h, attrs, blocks...)
	s.text("egress_interface", &h.EgressInterface)
	s.text("state_dir", &h.StateDir)
	s.duration("refresh", &h.Refresh)

	// A block that is not there is the host itself, for what there is to say about it.
	h.Disks.Range, h.Network.Range, h.Hypervisor.Range = b.DefRange, b.DefRange, b.DefRange
	for _, owner := range []any{&h.Disks, &h.Network, &h.Hypervisor} {
		l.attrs[attrKey{owner, ""}] = attrInfo{rng: b.DefRange}
	}
	if b := s.one("disks"); b != nil {
		l.decodeDisks(b, &h.Disks)
	}
	if b := s.one("network"); b != nil {
		l.decodeNetwork(b, &h.Network)
	}
	if b := s.one("hypervisor"); b != nil {
		l.decodeHypervisor(b, &h.Hypervisor)
	}
	l.decodeInstall(s, &h.Install)
	if b := s.one("gitlab_runner"); b != nil {
		s.content.Attributes["gitlab_runner"] = l.asObject(b)
	}
	s.settings("gitlab_runner", &h.GitLabRunner)
	return h
}

// installIsAttribute reports whether install is an attribute in JSON, where only its value tells it from a block.
func installIsAttribute(body hcl.Body) bool {
	if !json.IsJSONBody(body) {
		return false
	}
	attrs, _ := body.JustAttributes()
	a := attrs["install"]
	if a == nil {
		return false
	}
	v, _ := a.Expr.Value(nil) // without a context, JSON's strings are strings
	return !v.Type().IsObjectType() && !v.Type().IsTupleType()
}

func (l *loader) decodeInstall(host *section, in *Install) {
	b := host.one("install")
	if a := host.content.Attributes["install"]; a != nil {
		on := true
		host.boolean("install", &on)
		in.Off, in.Range = !on, a.Range
		if b != nil {
			l.errorf(&b.DefRange, "Two ways to install", "install is written both as an attribute and as a block. Keep one.")
		}
	}
	if b == nil {
		return
	}
	in.Range = b.DefRange
	s := l.open(b, in, nil, hcl.BlockHeaderSchema{Type: "package", LabelNames: []string{"name"}})
	for _, b := range s.content.Blocks.OfType("package") {
		in.Packages = append(in.Packages, l.decodePackage(b))
	}
}

func (l *loader) decodePackage(b *hcl.Block) *Package {
	p := &Package{Name: b.Labels[0], Range: b.DefRange}
	s := l.open(b, p, []attrSpec{
		{"apt", `"https://packages.example.com/runner trixie main"`, false},
		{"key", `"F6403F6544A38863DAA0B6E03F01618A51312F3F"`, false},
		{"key_url", `"https://packages.example.com/runner/key.asc"`, false},
		{"file", `"https://example.com/cloud-hypervisor-static"`, false},
		{"sha256", `"0000000000000000000000000000000000000000000000000000000000000000"`, false},
	})
	if a, v := s.scalar("apt", cty.String); v != nil {
		var err error
		if p.Apt, err = parseAptRepository(v.AsString()); err != nil {
			l.masks = append(l.masks, a.Expr.Range()) // a password may be in it
			s.fail(a, nil, "%v", err)
		} else {
			s.done(a)
		}
	}
	parsed(s, "key", parseFingerprint, &p.Key)
	s.text("key_url", &p.KeyURL)
	s.text("file", &p.File)
	s.text("sha256", &p.SHA256)
	return p
}

var (
	aptSuiteSyntax  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/+-]*$`)
	componentSyntax = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._/-]*$`)
)

// parseAptRepository reads "URL SUITE COMPONENT…" (sources.list(5)).
func parseAptRepository(text string) (AptRepository, error) {
	fields := strings.Fields(text)
	if len(fields) < 2 {
		return AptRepository{}, errors.New(`a repository is written as "URL SUITE COMPONENT", such as "https://packages.example.com/runner trixie main"`)
	}
	r := AptRepository{URL: fields[0], Suite: fields[1], Components: fields[2:]}
	if u, err := url.Parse(r.URL); err != nil || !slices.Contains([]string{"http", "https", "file"}, u.Scheme) || u.Path == "" && u.Host == "" {
		return r, errors.New("its URL must start with https://, http:// or file://")
	}
	if !aptSuiteSyntax.MatchString(r.Suite) && r.Suite != "./" {
		return r, fmt.Errorf("%s is not the name of a suite, such as trixie", quote(r.Suite))
	}
	if flat := strings.HasSuffix(r.Suite, "/"); flat != (len(r.Components) == 0) {
		return r, errors.New("it needs a component after the suite, such as main (only a suite that ends in / has none)")
	}
	for _, c := range r.Components {
		if !componentSyntax.MatchString(c) {
			return r, fmt.Errorf("%s is not the name of a component, such as main", quote(c))
		}
	}
	return r, nil
}

// parseFingerprint reads a fingerprint of OpenPGP version 4 or 6, as gpg prints it.
func parseFingerprint(text string) (string, error) {
	digits := strings.ToUpper(strings.Join(strings.Fields(text), ""))
	if b, err := hex.DecodeString(digits); err != nil || len(b) != 20 && len(b) != 32 {
		return "", errors.New("the fingerprint of a key has 40 hexadecimal digits (gpg --show-keys --with-fingerprint FILE prints it)")
	}
	return digits, nil
}

// asObject is a block as the attribute that it would be in JSON: a map of its attributes.
func (l *loader) asObject(b *hcl.Block) *hcl.Attribute {
	body := b.Body.(*hclsyntax.Body)
	for _, inner := range body.Blocks {
		l.errorf(inner.DefRange().Ptr(), "Unexpected block", "Settings of %s are written with an equals sign. Write %s = { … }.", b.Type, inner.Type)
	}
	object := &hclsyntax.ObjectConsExpr{SrcRange: b.DefRange, OpenRange: b.DefRange}
	for _, name := range slices.Sorted(maps.Keys(body.Attributes)) {
		a := body.Attributes[name]
		key := &hclsyntax.ScopeTraversalExpr{SrcRange: a.NameRange, Traversal: hcl.Traversal{hcl.TraverseRoot{Name: name, SrcRange: a.NameRange}}}
		object.Items = append(object.Items, hclsyntax.ObjectConsItem{KeyExpr: &hclsyntax.ObjectConsKeyExpr{Wrapped: key}, ValueExpr: a.Expr})
	}
	return &hcl.Attribute{Name: b.Type, Expr: object, Range: b.DefRange, NameRange: b.TypeRange}
}

func (l *loader) decodeDisks(b *hcl.Block, d *Disks) {
	d.Range = b.DefRange
	s := l.open(b, d, []attrSpec{{"backing", `"auto"`, false}, {"size", `"200GiB"`, false}})
	s.text("backing", &d.Backing)
	s.size("size", &d.Size)
}

func (l *loader) decodeNetwork(b *hcl.Block, n *Network) {
	n.Range = b.DefRange
	s := l.open(b, n, []attrSpec{
		{"subnet", `"172.16.120.0/22"`, false},
		{"subnet6", `"fd7e:1ee7::/64"`, false},
		{"dns", `["1.1.1.3", "1.0.0.3"]`, false},
		{"mtu", `1500`, false},
	}, hcl.BlockHeaderSchema{Type: "egress", LabelNames: []string{"name"}})
	parsed(s, "subnet", parsePrefix, &n.Subnet)
	parsed(s, "subnet6", parsePrefix, &n.Subnet6)
	parsedList(s, "dns", parseAddr, &n.DNS)
	s.integer("mtu", &n.MTU)
	for _, b := range s.content.Blocks.OfType("egress") {
		n.Egress = append(n.Egress, l.decodeEgress(b))
	}
}

func parseAddr(text string) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, errors.New(`an address is written as "1.1.1.3" or "2606:4700:4700::1113"`)
	}
	return a, nil
}

func (l *loader) decodeEgress(b *hcl.Block) *Egress {
	e := &Egress{Name: b.Labels[0], Range: b.DefRange}
	s := l.open(b, e, []attrSpec{
		{"action", `"allow"`, true},
		{"to", `["10.20.0.15/32"]`, false},
		{"ports", `["tcp/443"]`, false},
	})
	s.text("action", &e.Action)
	parsedList(s, "to", parsePrefix, &e.To)
	parsedList(s, "ports", parsePorts, &e.Ports)
	return e
}

func (l *loader) decodeHypervisor(b *hcl.Block, h *Hypervisor) {
	h.Driver, h.Range = b.Labels[0], b.DefRange
	s := l.open(b, h, []attrSpec{
		{"binary", `"cloud-hypervisor"`, false},
		{"sandbox", `true`, false},
		{"accel", `"auto"`, false},
	})
	s.text("binary", &h.Binary)
	s.boolean("sandbox", &h.Sandbox)
	s.text("accel", &h.Accel)
}

func (l *loader) decodeImage(b *hcl.Block) *Image {
	i := &Image{Name: b.Labels[0], Range: b.DefRange}
	s := l.open(b, i, []attrSpec{{"user", `"ci"`, false}},
		hcl.BlockHeaderSchema{Type: "file"}, hcl.BlockHeaderSchema{Type: "url"},
		hcl.BlockHeaderSchema{Type: "ubuntu"}, hcl.BlockHeaderSchema{Type: "debian"},
		hcl.BlockHeaderSchema{Type: "prebuild"})
	s.text("user", &i.User)
	if b := s.one("file"); b != nil {
		i.File = l.decodeFileSource(b)
	}
	if b := s.one("url"); b != nil {
		i.URL = l.decodeURLSource(b)
	}
	if b := s.one("ubuntu"); b != nil {
		i.Ubuntu = l.decodeUbuntuSource(b)
	}
	if b := s.one("debian"); b != nil {
		i.Debian = l.decodeDebianSource(b)
	}
	if b := s.one("prebuild"); b != nil {
		i.Prebuild = l.decodePrebuild(b)
	}
	return i
}

func (l *loader) decodeFileSource(b *hcl.Block) *FileSource {
	f := &FileSource{}
	s := l.open(b, f, []attrSpec{
		{"disk", `"/srv/images/golden.qcow2"`, true},
		{"kernel", `"/srv/images/vmlinuz"`, true},
		{"initrd", `"/srv/images/initrd.img"`, false},
		{"cmdline", `"root=/dev/vda1 console=ttyS0"`, false},
	})
	s.text("disk", &f.Disk)
	s.text("kernel", &f.Kernel)
	s.text("initrd", &f.Initrd)
	s.text("cmdline", &f.Cmdline)
	return f
}

func (l *loader) decodeURLSource(b *hcl.Block) *URLSource {
	u := &URLSource{}
	s := l.open(b, u, []attrSpec{
		{"disk", `"https://images.example.com/golden.qcow2"`, true},
		{"kernel", `"https://images.example.com/vmlinuz"`, true},
		{"initrd", `"https://images.example.com/initrd.img"`, false},
		{"sha256", `"9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"`, false},
		{"sha256sums", `"https://images.example.com/SHA256SUMS"`, false},
		{"cmdline", `"root=/dev/vda1 console=ttyS0"`, false},
	})
	s.text("disk", &u.Disk)
	s.text("kernel", &u.Kernel)
	s.text("initrd", &u.Initrd)
	s.text("sha256", &u.SHA256)
	s.text("sha256sums", &u.SHA256Sums)
	s.text("cmdline", &u.Cmdline)
	return u
}

func (l *loader) decodeUbuntuSource(b *hcl.Block) *UbuntuSource {
	u := &UbuntuSource{}
	s := l.open(b, u, []attrSpec{
		{"release", `"noble"`, true},
		{"mirror", `"https://cloud-images.ubuntu.com"`, false},
		{"arch", `"amd64"`, false},
	})
	s.text("release", &u.Release)
	s.text("mirror", &u.Mirror)
	s.text("arch", &u.Arch)
	return u
}

func (l *loader) decodeDebianSource(b *hcl.Block) *DebianSource {
	d := &DebianSource{}
	s := l.open(b, d, []attrSpec{
		{"suite", `"trixie"`, true},
		{"mirror", `"https://mirror.example.com/debian"`, false},
		{"security_mirror", `"https://mirror.example.com/debian-security"`, false},
		{"packages", `["git"]`, false},
		{"arch", `"amd64"`, false},
	})
	s.text("suite", &d.Suite)
	s.text("mirror", &d.Mirror)
	s.text("security_mirror", &d.SecurityMirror)
	s.texts("packages", &d.Packages)
	s.text("arch", &d.Arch)
	return d
}

func (l *loader) decodePrebuild(b *hcl.Block) *Prebuild {
	p := &Prebuild{Range: b.DefRange}
	s := l.open(b, p, []attrSpec{
		{"packages", `["git", "podman"]`, false},
		{"run", `["systemctl enable podman.socket"]`, false},
		{"timeout", `"30m"`, false},
	}, hcl.BlockHeaderSchema{Type: "file", LabelNames: []string{"path"}})
	s.texts("packages", &p.Packages)
	s.texts("run", &p.Run)
	s.duration("timeout", &p.Timeout)
	for _, b := range s.content.Blocks.OfType("file") {
		f := &PrebuildFile{Path: b.Labels[0]}
		s := l.open(b, f, []attrSpec{{"content", `"text"`, true}, {"mode", `"0644"`, false}})
		s.textOrSecret("content", &f.Content, &f.Secret)
		s.mode("mode", &f.Mode)
		p.Files = append(p.Files, f)
	}
	return p
}

// mode is permissions. As a number they would be decimal, and 420 be read as 0420 instead of 0644.
func (s *section) mode(name string, to *string) {
	a, v := s.value(name)
	switch {
	case v == nil:
	case v.Type() == cty.Number:
		s.fail(a, nil, "%s must be octal digits in quotes; got a number, which HCL takes for decimal. Write %s = %q", name, name, octalMode(s.l.writtenNumber(a.Expr)))
	default:
		parsed(s, name, parseMode, to)
	}
}

// decimalModes are usual permissions as decimal numbers, which is what JSON and YAML have for them.
var decimalModes = map[string]string{
	"256": "0400", "292": "0444", "384": "0600", "416": "0640", "420": "0644", "438": "0666", "448": "0700", "488": "0750", "493": "0755", "511": "0777",
}

// octalMode is what a number was most likely meant to be as permissions.
func octalMode(number string) string {
	if mode, ok := decimalModes[number]; ok {
		return mode
	}
	if mode, err := parseMode(number); err == nil {
		return mode
	}
	return "0644"
}

// parseMode reads permissions as four octal digits.
func parseMode(text string) (string, error) {
	var mode uint32
	if len(text) < 3 || len(text) > 4 {
		return "", errors.New(`a mode is octal digits, such as "0644" or "0755"`)
	}
	for _, c := range text {
		if c < '0' || c > '7' {
			return "", errors.New(`a mode is octal digits, such as "0644" or "0755"`)
		}
		mode = mode<<3 | uint32(c-'0')
	}
	return fmt.Sprintf("%04o", mode), nil
}

func (l *loader) decodePool(b *hcl.Block) *Pool {
	p := &Pool{Name: b.Labels[0], Range: b.DefRange}
	s := l.open(b, p, []attrSpec{
		{"image", `image.ubuntu`, true},
		{"cpus", `4`, true},
		{"memory", `"8GiB"`, true},
		{"disk", `"30GiB"`, true},
		{"start", `"warm"`, false},
		{"console", `false`, false},
		{"max_instances", `20`, true},
	}, hcl.BlockHeaderSchema{Type: "limits"})
	s.reference("image", &p.Image)
	s.integer("cpus", &p.CPUs)
	s.size("memory", &p.Memory)
	s.size("disk", &p.Disk)
	s.text("start", &p.Start)
	s.boolean("console", &p.Console)
	s.integer("max_instances", &p.MaxInstances)
	if b := s.one("limits"); b != nil {
		s := l.open(b, &p.Limits, []attrSpec{
			{"cpu_quota", `"400%"`, false}, {"disk_iops", `5000`, false}, {"network_mbps", `500`, false},
			{"connections", `16384`, false},
		})
		parsed(s, "cpu_quota", parsePercent, &p.Limits.CPUQuotaPercent)
		s.integer("disk_iops", &p.Limits.DiskIOPS)
		s.integer("network_mbps", &p.Limits.NetworkMbps)
		s.integer("connections", &p.Limits.Connections)
	}
	return p
}

func (l *loader) decodeRunner(b *hcl.Block) *Runner {
	r := &Runner{Name: b.Labels[0], Range: b.DefRange}
	s := l.open(b, r, []attrSpec{
		{"pool", `pool.small`, true},
		{"url", `"https://gitlab.example.com"`, true},
		{"token", `file("/run/secrets/gitlab-token")`, true},
		{"executor", `"instance"`, false},
		{"capacity_per_instance", `1`, false},
		{"max_use_count", `1`, false},
		{"settings", `{ output_limit = 8192 }`, false},
	}, hcl.BlockHeaderSchema{Type: "policy"})
	s.reference("pool", &r.Pool)
	s.text("url", &r.URL)
	s.secret("token", &r.Token)
	s.text("executor", &r.Executor)
	s.integer("capacity_per_instance", &r.CapacityPerInstance)
	s.integer("max_use_count", &r.MaxUseCount)
	s.settings("settings", &r.Settings)
	for _, b := range s.content.Blocks.OfType("policy") {
		r.Policies = append(r.Policies, l.decodePolicy(b))
	}
	return r
}

func (l *loader) decodePolicy(b *hcl.Block) *Policy {
	p := &Policy{Range: b.DefRange}
	s := l.open(b, p, []attrSpec{
		{"periods", `["* 8-18 * * mon-fri"]`, false},
		{"timezone", `"Europe/Berlin"`, false},
		{"idle_count", `4`, false},
		{"idle_time", `"5m"`, false},
		{"scale_factor", `1.5`, false},
		{"scale_factor_limit", `10`, false},
		{"preemptive_mode", `true`, false},
	})
	s.texts("periods", &p.Periods)
	s.text("timezone", &p.Timezone)
	s.integer("idle_count", &p.IdleCount)
	s.duration("idle_time", &p.IdleTime)
	s.float("scale_factor", &p.ScaleFactor)
	s.integer("scale_factor_limit", &p.ScaleFactorLimit)
	var preemptive bool
	s.boolean("preemptive_mode", &preemptive)
	if l.ok(p, "preemptive_mode") {
		p.PreemptiveMode = &preemptive
	}
	return p
}

// settings is a map of another program's settings, as plain Go values. Text that holds secrets is a Text.
func (s *section) settings(name string, to *map[string]any) {
	a, v := s.valueWithSecrets(name)
	if v == nil {
		return
	}
	if err := s.l.tokens.account(*v); err != nil {
		s.fail(a, nil, "%v", err)
		return
	}
	if t := v.Type(); !t.IsObjectType() && !t.IsMapType() {
		s.fail(a, nil, "%s must be a map; got a %s. Write, for example: %s", name, kindName(t), s.example(name))
		return
	}
	p := plainer{tokens: &s.l.tokens, what: s.what}
	got, err := p.plain(*v, name, nil)
	if err != nil {
		s.fail(a, nil, "%v", err)
		return
	}
	*to = got.(map[string]any)
	s.done(a)
	s.noteKeys(a.Expr, settingPath{name})
	s.settingSecrets(*to, settingPath{name})
}

// noteKeys notes where the keys of a map are, and the elements of its lists, as far as they are written out.
func (s *section) noteKeys(expr hcl.Expression, p settingPath) {
	if elems, diags := hcl.ExprList(expr); !diags.HasErrors() {
		for i, e := range elems {
			at := p.to(fmt.Sprintf("[%d]", i))
			s.l.attrs[attrKey{s.owner, at.id()}] = attrInfo{rng: e.Range(), ok: true}
			s.noteKeys(e, at)
		}
	}
	pairs, diags := hcl.ExprMap(expr)
	if diags.HasErrors() {
		return
	}
	for _, pair := range pairs {
		if key, diags := s.l.value(pair.Key, nil); !diags.HasErrors() && key.Type() == cty.String && key.IsKnown() && !key.IsNull() {
			at := p.to(key.AsString())
			s.l.attrs[attrKey{s.owner, at.id()}] = attrInfo{rng: pair.Key.Range(), ok: true, expr: pair.Value}
			s.noteKeys(pair.Value, at)
		}
	}
}

// settingSecrets refuses literals for the settings that are secrets. A variable may hold one that is not declared as
// sensitive, if it was set from outside: as for token.
func (s *section) settingSecrets(table map[string]any, at settingPath) {
	for key, v := range table {
		place := at.to(key)
		info := s.l.attrs[attrKey{s.owner, place.id()}]
		if !isSecretSetting(place[1:]) {
			if inner, ok := v.(map[string]any); ok {
				s.settingSecrets(inner, place)
			}
			continue
		}
		if _, ok := v.(Text); ok {
			continue
		}
		if _, ok := v.(string); !ok { // a finding about its type follows
			if info.expr != nil {
				s.l.masks = append(s.l.masks, info.expr.Range())
			}
			continue
		}
		rng := s.l.placeOf(s.owner, place)
		var err error
		if info.expr != nil {
			var text Text
			if text, err = s.l.secretText(info.expr); err == nil {
				table[key] = text
				continue
			}
			rng = info.expr.Range().Ptr()
		}
		if !errors.Is(err, errFound) {
			s.l.errorf(rng, "Secret in the spec", "%s is a secret, and everyone who can read the spec, its repository or its plan could read it here. "+
				`Write %s = file("/run/secrets/%s"), env("NAME"), or var.NAME with a variable that is set from outside.`,
				quote(place[1:].String()), key, strings.ToLower(key))
		}
	}
}

// plainer turns values into plain Go values.
type plainer struct {
	*tokens
	what string // `runner "small"`, for the names of secrets
}

// plain is a value as string, Text, bool, int64, float64, []any or map[string]any. What is
// null in a map is left out; TOML has no null. Files are the marks of what the value is in.
func (p plainer) plain(v cty.Value, at string, files []fileMark) (any, error) {
	v, marks := v.Unmark()
	for m := range marks {
		if f, ok := m.(fileMark); ok {
			files = append(slices.Clone(files), f)
		}
	}
	t := v.Type()
	switch {
	case v.IsNull():
		return nil, errors.New("a list in it has a null, which GitLab Runner's config.toml cannot hold; remove it")
	case t == cty.String:
		return p.text(v.AsString(), at, len(files) > 0), nil
	case t == cty.Bool:
		return v.True(), nil
	case t == cty.Number:
		f := v.AsBigFloat()
		if n, acc := f.Int64(); acc == big.Exact {
			return n, nil
		}
		if f.IsInt() || f.IsInf() {
			return nil, fmt.Errorf("the number %s is too large", f.Text('g', 10))
		}
		n, _ := f.Float64()
		return n, nil
	case t.IsObjectType() || t.IsMapType():
		m := map[string]any{}
		for k, e := range v.AsValueMap() {
			if e.IsNull() {
				continue
			}
			got, err := p.plain(e, at+"."+k, files)
			if err != nil {
				return nil, err
			}
			m[k] = got
		}
		return m, nil
	case t.IsListType() || t.IsTupleType() || t.IsSetType():
		list := []any{}
		for i, e := range v.AsValueSlice() {
			got, err := p.plain(e, at+"."+strconv.Itoa(i), files)
			if err != nil {
				return nil, err
			}
			list = append(list, got)
		}
		return list, nil
	default:
		return nil, fmt.Errorf("%s cannot be the value of a setting", t.FriendlyName())
	}
}

// text is a string, or a Text where it holds secrets or the text of a file beside the spec.
func (p plainer) text(s, at string, file bool) any {
	if !p.holds(s) && (!file || s == "") {
		return s
	}
	text := p.split(s)
	if !file {
		return text
	}
	// Which part of it is the file's is not known: all is kept out of the plan.
	for i, piece := range text {
		if piece.Literal == "" {
			continue
		}
		from := fmt.Sprintf("spec:%s.%s", p.what, at)
		if len(text) > 1 {
			from += fmt.Sprintf("[%d]", i)
		}
		literal := piece.Literal
		if i == len(text)-1 {
			literal = strings.TrimSuffix(strings.TrimSuffix(literal, "\n"), "\r")
		}
		text[i] = Piece{Secret: Secret{From: from, read: func() (string, error) { return literal, nil }}}
	}
	return text
}
