package hostspec_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

const canary = "CANARY4f1d9b"

// traces are what a canary can be seen by.
func traces() []string {
	sum := sha256.Sum256([]byte(canary))
	sumLine := sha256.Sum256([]byte(canary + "\n"))
	return []string{
		canary, strings.ToLower(canary), base64.StdEncoding.EncodeToString([]byte(canary))[:12],
		fmt.Sprintf("%x", sum)[:12], fmt.Sprintf("%x", sumLine)[:12], fmt.Sprintf("%x", canary),
	}
}

func shows(text string) bool {
	return slices.ContainsFunc(traces(), func(t string) bool { return strings.Contains(text, t) })
}

// block is a block of a spec that is put together here, to be written in either syntax.
type block struct {
	typ, label string
	attrs      map[string]string // expressions in native syntax
	blocks     []*block
}

func (b *block) native(out *strings.Builder) {
	if b.typ != "" {
		out.WriteString(b.typ)
		if b.label != "" {
			fmt.Fprintf(out, " %q", b.label)
		}
		out.WriteString(" {\n")
	}
	for _, name := range slices.Sorted(maps.Keys(b.attrs)) {
		fmt.Fprintf(out, "%s = %s\n", name, b.attrs[name])
	}
	for _, c := range b.blocks {
		c.native(out)
	}
	if b.typ != "" {
		out.WriteString("}\n")
	}
}

func (b *block) json() map[string]any {
	body := map[string]any{}
	for name, expr := range b.attrs {
		switch {
		case b.typ == "variable" && name == "type":
			body[name] = expr
		case b.typ == "variable":
			body[name] = json.RawMessage(expr)
		default:
			body[name] = "${" + expr + "}"
		}
	}
	for _, c := range b.blocks {
		inner := any(c.json())
		if c.label != "" {
			inner = map[string]any{c.label: inner}
		}
		list, _ := body[c.typ].([]any)
		body[c.typ] = append(list, inner)
	}
	return body
}

// spec gives the text in both syntaxes, by the name of the file.
func (b *block) spec(t *testing.T) map[string]string {
	t.Helper()
	var native strings.Builder
	b.native(&native)
	text, err := json.Marshal(b.json())
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{"host.hcl": native.String(), "host.hcl.json": string(text)}
}

// sources are the blocks of an image of which it takes one.
var sources = []string{"file", "url", "ubuntu", "debian"}

// beside is what an attribute's example is valid with.
var beside = map[string]map[string]string{
	"host.disks.size":       {"backing": `"xfs-image"`},
	"runner.policy.periods": {"timezone": `"UTC"`},

	"host.install.package.apt":     aptPackage,
	"host.install.package.key":     aptPackage,
	"host.install.package.key_url": aptPackage,
	"host.install.package.file":    filePackage,
	"host.install.package.sha256":  filePackage,
}

var (
	aptPackage = map[string]string{
		"apt": `"https://packages.example.com ./"`, "key": `"F6403F6544A38863DAA0B6E03F01618A51312F3F"`, "key_url": `"https://packages.example.com/key"`,
	}
	filePackage = map[string]string{"file": `"https://example.com/x"`, "sha256": `"` + strings.Repeat("0", 64) + `"`}
)

// plant gives a valid spec in which one attribute has a value.
func plant(kinds map[string]hostspec.Kind, path []string, attr, value string) *block {
	root := &block{blocks: []*block{
		{typ: "variable", label: "canary", attrs: map[string]string{"type": "string", "sensitive": "true"}},
		{typ: "variable", label: "canaries", attrs: map[string]string{"type": "object({ a = list(string), b = map(string) })", "sensitive": "true"}},
		{typ: "locals", attrs: map[string]string{}},
	}}
	child := func(parent *block, path []string, label string) *block {
		kind := kinds[strings.Join(path, ".")]
		typ := path[len(path)-1]
		if parent.typ == "image" && slices.Contains(sources, typ) {
			parent.blocks = slices.DeleteFunc(parent.blocks, func(b *block) bool { return slices.Contains(sources, b.typ) })
		}
		for _, b := range parent.blocks {
			if b.typ == typ {
				return b
			}
		}
		b := &block{typ: typ, attrs: map[string]string{}}
		if kind.Labels > 0 {
			b.label = label
		}
		for _, a := range kind.Attributes {
			if a.Required {
				b.attrs[a.Name] = a.Example
			}
		}
		parent.blocks = append(parent.blocks, b)
		return b
	}
	child(root, []string{"host"}, "metal-01")
	image := child(root, []string{"image"}, "ubuntu")
	child(image, []string{"image", "ubuntu"}, "")
	pool := child(root, []string{"pool"}, "small")
	pool.attrs["image"] = "image.ubuntu"
	pool.attrs["start"] = `"cold"`
	runner := child(root, []string{"runner"}, "small")
	runner.attrs["token"] = `env("TOKEN")`

	at := root
	for i := range path {
		label := "x"
		switch path[i] {
		case "host", "image", "pool", "runner": // there already
		case "hypervisor":
			label = "qemu"
		case "package":
			label = "gitlab-runner"
		case "file":
			label = "/etc/x"
		}
		at = child(at, path[:i+1], label)
	}
	maps.Copy(at.attrs, beside[strings.Join(path, ".")+"."+attr])
	at.attrs[attr] = value
	return root
}

// forms are ways to write a secret: E stands for it.
var forms = map[string]string{
	"plain":       `E`,
	"template":    `"a${E}b"`,
	"parentheses": `(("${E}"))`,
	"local":       `local.c2`,
	"heredoc":     "<<-EOT\n  x ${E}\n  EOT\n",
	"loop":        "<<EOT\n%{ for x in [E] }${x}%{ endfor }\nEOT\n",
	"list":        `[E]`,
	"in a list":   `["a", "b=${E}"]`,
	"map":         `{ environment = ["A=${E}", E], cache = { Path = E } }`,
	"key":         `{ (E) = "x" }`,
	"element":     `[for x in ["a", E] : x][1]`,
	"join":        `join("", ["a", E])`,
	"format":      `format("%s-%s", "a", E)`,
	"quoted":      `format("%q", E)`,
	"trimmed":     `trimspace(chomp(E))`,
	"JSON":        `jsonencode({ a = E, b = [E], (E) = 1 })`,
	"decoded":     `jsondecode("\"${E}\"")`,
	"base64":      `base64encode("u:${E}")`,
	"upper":       `upper(lower(E))`,
	"reversed":    `strrev(E)`,
	"part":        `substr(E, 0, 6)`,
	"split":       `split("4", E)`,
	"replaced":    `replace(E, "CANARY", "X")`,
	"compared":    `E == "x" ? E : "a${E}"`,
	"tried":       `try(E, "x")`,
	"index":       `{ "CANARY4f1d9b" = E }[E]`,
	"number":      `parseint(E, 16)`,
	"address":     `cidrhost(E, 1)`,
	"set":         `tolist(toset([E]))[0]`,
	"merged":      `merge({ environment = [E] }, { environment = ["B=${E}"] })`,
	"values":      `values({ a = E })[0]`,
	"no function": `nosuch(E)`,
}

// tried reports whether a secret is tried in a form and a syntax. A full run tries everything. Else each secret is tried in the main
// forms; an attribute that takes it so (came) is tried with the others too, each with one of the secrets.
func tried(secret, form, name string, came bool) bool {
	kind := slices.Index([]string{"file", "env", "variable"}, secret)
	switch native := name == "host.hcl"; {
	case need.Full():
		return true
	case form == "plain" || form == "map":
		return kind >= 0 && native
	case form == "in a list" || form == "local":
		return kind == len(form)%3 && !native
	default:
		return came && (kind == len(form)%3 || kind < 0 && form == "template") && native
	}
}

func kindsOf(t *testing.T) map[string]hostspec.Kind {
	t.Helper()
	kinds := map[string]hostspec.Kind{}
	for _, k := range hostspec.Language() {
		kinds[strings.Join(k.Path, ".")] = k
	}
	// What the walk rests on: it goes into every depth.
	for _, known := range []string{"host.network.egress", "image.prebuild.file", "pool.limits", "runner.policy"} {
		if len(kinds[known].Attributes) == 0 {
			t.Fatalf("the language has no %s: %v", known, slices.Sorted(maps.Keys(kinds)))
		}
	}
	return kinds
}

// TestCanaryEverywhere plants a secret in every attribute of the language, in every kind and form. It may come out in two
// places: in config.toml, where that is filled, and in a prebuild's file, which goes by the guest's channel.
func TestCanaryEverywhere(t *testing.T) {
	kinds := kindsOf(t)
	dir := t.TempDir()
	secretFile := filepath.Join(dir, "secret")
	if err := os.WriteFile(secretFile, []byte(canary+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	secrets := map[string]string{
		"file": fmt.Sprintf("file(%q)", secretFile), "env": `env("CANARY")`, "variable": "var.canary",
		"element of a variable": "var.canaries.a[0]", "value of a variable": `var.canaries.b["k"]`,
		"all variables": `join("", values({ for k, v in var : k => try(v.a[0], v) }))`,
	}
	environ := []string{"CANARY=" + canary, "FLEETINGD_VAR_canary=" + canary, "TOKEN=glrt-x",
		`FLEETINGD_VAR_canaries={ a = ["` + canary + `"], b = { k = "` + canary + `", ` + canary + ` = "x" } }`}
	came := map[string]bool{} // attributes from which it came out
	for _, key := range slices.Sorted(maps.Keys(kinds)) {
		for _, attr := range kinds[key].Attributes {
			place := key + "." + attr.Name
			t.Run(place, func(t *testing.T) {
				// The spec is valid with an ordinary value: what refuses the secret is not something else.
				for name, src := range plant(kinds, kinds[key].Path, attr.Name, attr.Example).spec(t) {
					_, diags := hostspec.Load(hostspec.Options{Path: filepath.Join(dir, name), Source: []byte(src), Environ: environ})
					if diags.HasErrors() && attr.Name != "token" {
						t.Fatalf("%s: the example %s is refused, so this test says nothing (see beside): %v\n%s", name, attr.Example, diags, src)
					}
				}
				for _, form := range append([]string{"plain", "map"}, slices.Sorted(maps.Keys(forms))...) { // what a token or settings take, first
					for _, secret := range slices.Sorted(maps.Keys(secrets)) {
						expr := secrets[secret]
						value := strings.ReplaceAll(strings.ReplaceAll(strings.ReplaceAll(forms[form], "EOT", "\x00"), "E", expr), "\x00", "EOT")
						root := plant(kinds, kinds[key].Path, attr.Name, value)
						root.blocks[2].attrs = map[string]string{"c1": expr, "c2": `"x${local.c1}"`}
						for name, src := range root.spec(t) {
							if !tried(secret, form, name, came[place]) {
								continue
							}
							c := canaryCase{t: t, name: fmt.Sprintf("%s, %s, %s", secret, form, name), src: src}
							if c.run(hostspec.Options{Path: filepath.Join(dir, name), Source: []byte(src), Environ: environ}) {
								came[place] = true
							}
						}
					}
				}
			})
		}
	}
	got := slices.Sorted(maps.Keys(came))
	if want := []string{"image.prebuild.file.content", "runner.settings", "runner.token"}; !slices.Equal(got, want) {
		t.Errorf("secrets came out of %q, want %q", got, want)
	}
}

// TestCanarySettings plants a secret in every key of config.toml that a spec can set. Where the key takes text, the secret comes out
// in config.toml. Of a key that is known to be a secret a literal is refused, and not shown.
func TestCanarySettings(t *testing.T) {
	kinds := kindsOf(t)
	dir := t.TempDir()
	secretFile := filepath.Join(dir, "secret")
	for _, path := range []string{secretFile, filepath.Join(dir, "beside")} {
		if err := os.WriteFile(path, []byte(canary+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	environ := []string{"CANARY=" + canary, "FLEETINGD_VAR_canary=" + canary, "FLEETINGD_VAR_canaries={ a = [], b = {} }", "TOKEN=glrt-x"}
	secrets := map[string]string{
		"file": fmt.Sprintf("file(%q)", secretFile), "env": `env("CANARY")`, "variable": "var.canary", "file beside the spec": `file("beside")`,
	}
	keys := hostspec.SettingKeys()
	if len(keys) < 150 {
		t.Fatalf("there are only %d keys", len(keys))
	}
	refused := 0
	for i, key := range keys {
		place := strings.Join(key.Path, ".")
		spec := func(value string) *block {
			switch {
			case key.In == "[]" && place == "environment":
				value = fmt.Sprintf(`["A=${%s}"]`, value)
			case key.In == "[]":
				value = "[" + value + "]"
			case key.In == "{}":
				value = "{ a = " + value + " }"
			}
			for _, name := range slices.Backward(key.Path[1:]) {
				value = fmt.Sprintf("{ %q = %s }", name, value)
			}
			if key.Global {
				return plant(kinds, []string{"host", "gitlab_runner"}, key.Path[0], value)
			}
			return plant(kinds, []string{"runner"}, "settings", fmt.Sprintf("{ %q = %s }", key.Path[0], value))
		}
		for n, secret := range slices.Sorted(maps.Keys(secrets)) {
			if !need.Full() && !key.Secret && i%len(secrets) != n {
				continue // one key in four is tried with each
			}
			expr := secrets[secret]
			src := spec(expr).spec(t)["host.hcl"]
			c := canaryCase{t: t, name: place + ", " + secret, src: src}
			came := c.run(hostspec.Options{Path: filepath.Join(dir, "host.hcl"), Source: []byte(src), Environ: environ})
			if key.Text && !came {
				_, diags := hostspec.Load(hostspec.Options{Path: filepath.Join(dir, "host.hcl"), Source: []byte(src), Environ: environ})
				t.Errorf("%s takes text, and no secret from %s: %v", place, secret, diags)
			}
		}
		if !key.Secret {
			continue
		}
		refused++
		for _, literal := range []string{`"` + canary + `"`, "<<EOT\n" + canary + "\nEOT\n", `["` + canary + `"]`, `{ a = "` + canary + `" }`, `upper("` + canary + `")`} {
			src := spec(literal).spec(t)["host.hcl"]
			res, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: []byte(src), Environ: environ})
			if !diags.HasErrors() {
				t.Errorf("%s takes the literal %s", place, literal)
			}
			canaryCase{t: t, name: place + ", literal"}.findings(diags)
			if shows(string(res.Files["host.hcl"].Bytes)) {
				t.Errorf("%s: a snippet can show the literal %s", place, literal)
			}
		}
	}
	if refused < 5 {
		t.Errorf("only %d keys are known to be secrets", refused)
	}
}

type canaryCase struct {
	t         *testing.T
	name, src string
}

func (c canaryCase) check(what, text string) {
	c.t.Helper()
	if shows(text) {
		c.t.Errorf("%s: %s shows the secret:\n%.3000s\n%s", c.name, what, text, c.src)
	}
}

// run loads, compiles and fills, and reports whether the secret came out where it may.
func (c canaryCase) run(opts hostspec.Options) (came bool) {
	c.t.Helper()
	res, diags := hostspec.Load(opts)
	c.findings(diags)
	for name, f := range res.Files {
		if !strings.Contains(c.src, canary) {
			c.check("the source "+name, string(f.Bytes))
		}
	}
	if res.Host == nil {
		return false
	}
	h := res.Host
	c.check("the host", fmt.Sprintf("%+v %+v %+v %+v %#v", h, h.Runners[0], h.Images[0], h.Pools[0], h.Runners[0]))
	p, diags := compile.Compile(h, compile.Options{})
	c.findings(diags)
	if p == nil {
		return false
	}
	text, err := p.JSON()
	if err != nil {
		c.t.Fatal(err)
	}
	c.check("the plan", string(text))
	if _, err := plan.Parse(text); err != nil {
		c.t.Errorf("%s: the plan cannot be read: %v", c.name, err)
	}
	if need.Full() {
		c.tree(p, nil)
	}

	values := map[string]string{}
	for _, r := range h.Runners {
		for _, s := range r.Secrets() {
			values[s.From] = c.read(s)
		}
	}
	for _, s := range h.GitLabRunnerSecrets() {
		values[s.From] = c.read(s)
	}
	read := func(from string) (string, error) { return values[from], nil }
	came = c.tree(p, read)
	for s := range h.PrebuildSecrets() {
		values[s.From] = c.read(s)
	}
	for i := range p.Images {
		if p.Images[i].Prebuild == nil {
			continue
		}
		for _, s := range p.Images[i].Prebuild.Steps {
			if s.File != nil {
				content, err := s.File.Secret.Read(read)
				if err != nil {
					c.t.Error(err)
				}
				came = came || shows(content)
			}
		}
	}
	return came
}

func (c canaryCase) read(s hostspec.Secret) string {
	c.check("the name of a secret", s.From)
	value, err := s.Read()
	if err != nil {
		c.check("an error", err.Error())
	}
	return value
}

func (c canaryCase) findings(diags hcl.Diagnostics) {
	c.t.Helper()
	for _, d := range diags {
		if !strings.Contains(c.src, canary) {
			c.check("a finding", d.Summary+": "+d.Detail)
		}
		if strings.Contains(d.Detail, "@secret:") {
			c.t.Errorf("%s: a finding shows a token: %s", c.name, d.Detail)
		}
		if d.EvalContext != nil {
			c.t.Errorf("%s: a finding carries values", c.name)
		}
	}
}

func (c canaryCase) tree(p *plan.Plan, read func(string) (string, error)) (came bool) {
	c.t.Helper()
	files, err := p.Tree(read)
	if err != nil {
		c.t.Errorf("%s: %v", c.name, err)
	}
	for _, f := range files {
		if read != nil && f.Path == "/etc/gitlab-runner/config.toml" && f.Mode == 0o600 {
			came = came || shows(string(f.Data))
			continue
		}
		c.check(f.Path, string(f.Data))
		if strings.Contains(string(f.Data), "@secret:") {
			c.t.Errorf("%s: %s holds a token", c.name, f.Path)
		}
	}
	return came
}
