package hostspec_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/zclconf/go-cty/cty"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// oddTexts are what editors, clipboards and other systems put into a spec. Each is of one kind, so that what refuses one says
// nothing of the others.
var oddTexts = map[string]string{
	"words":           "a b",
	"blanks around":   "  a b  ",
	"lines":           "first\n  second\n\nlast\n",
	"Windows' lines":  "a\r\nb\r\n",
	"tabs":            "a\tb\t",
	"quotes":          `say "it's"`,
	"backslashes":     `C:\new\table\\`,
	"shell":           `x=$(id -u) && echo ${x:-y} $x '%{n}' %{ # ; | > $${z}`,
	"TOML":            "a = \"\"\"b\"\"\" ''' # c",
	"YAML":            "- a: &x [b, {c: d}] !!str |\n  e: ~",
	"accents":         "Grüße, señor Ångström",
	"other scripts":   "日本語 العربية 🚀",
	"decomposed":      "u\u0308ber",
	"invisible":       "a\u200bb\u2028c\ufeffd",
	"control letters": "a\x01b\x1b[31mc\x7f",
	"NUL":             "a\x00b",
	"looks like HCL":  `"}\nrunner "x" {`,
	"our placeholder": "@SECRET:runner.small.token@",
	"number":          "007",
	"truth":           "yes",
	"full stop":       "noble.",
}

// literal writes a text as native syntax and JSON have it.
func literal(text string) string {
	return string(hclwrite.TokensForValue(cty.StringVal(text)).Bytes())
}

// TestTextArrives plants odd texts in every attribute of the language that takes text: what is not refused stands in the plan, or in
// config.toml, as it was written. The plan is read back as the plugin reads it.
func TestTextArrives(t *testing.T) {
	kinds := kindsOf(t)
	environ := []string{"TOKEN=glrt-x", "FLEETINGD_VAR_canary=x", "FLEETINGD_VAR_canaries={ a = [], b = {} }"}
	took := map[string]int{}
	for _, key := range slices.Sorted(maps.Keys(kinds)) {
		for _, attr := range kinds[key].Attributes {
			place := key + "." + attr.Name
			var write func(string) string
			switch {
			case place == "runner.settings":
				write = func(s string) string {
					return "{ environment = [" + literal("A="+s) + "], pre_build_script = " + literal(s) + " }"
				}
			case strings.HasPrefix(attr.Example, `"`):
				write = literal
			case strings.HasPrefix(attr.Example, `["`):
				write = func(s string) string { return "[" + literal(s) + "]" }
			default:
				continue // a number, a boolean, a reference
			}
			for _, name := range slices.Sorted(maps.Keys(oddTexts)) {
				text := oddTexts[name]
				if place == "image.prebuild.file.mode" && name == "number" {
					continue // "007" and "0007" are one mode
				}
				specs := plant(kinds, kinds[key].Path, attr.Name, write(text)).spec(t)
				specs["plain/host.hcl.json"] = plainJSON(t, specs["host.hcl.json"], write(text), text)
				for file, src := range specs {
					if strings.Contains(text, "\u0308") { // cty composes what the test writes
						src = strings.ReplaceAll(src, "über", text)
					}
					res, _ := hostspec.Load(hostspec.Options{Path: filepath.Join("testdata", file), Source: []byte(src), Environ: environ})
					if res.Host == nil {
						continue
					}
					p, diags := compile.Compile(res.Host, compile.Options{})
					if diags.HasErrors() {
						continue
					}
					if !arrived(t, p, text) {
						t.Errorf("%s, %s, %s: %q was taken and does not arrive\n%s", place, name, file, text, src)
					}
					took[place]++
				}
			}
		}
	}
	// What takes free text takes nearly all of it.
	for _, place := range []string{"image.prebuild.run", "image.prebuild.file.content", "runner.settings"} {
		if took[place] < 2*(len(oddTexts)-4) {
			t.Errorf("%s took only %d of %d texts", place, took[place], 2*len(oddTexts))
		}
	}
}

// plainJSON writes a text in JSON without an expression around it, as jsonencode and Nix do.
func plainJSON(t *testing.T, src, expr, text string) string {
	t.Helper()
	marshal := func(s string) string {
		data, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	return strings.ReplaceAll(src, marshal("${"+expr+"}"), marshal(strings.NewReplacer("${", "$${", "%{", "%%{").Replace(text)))
}

// arrived reports whether a text stands in a plan that was written and read, or in its config.toml.
func arrived(t *testing.T, p *plan.Plan, text string) bool {
	t.Helper()
	data, err := p.JSON()
	if err != nil {
		t.Fatal(err)
	}
	if p, err = plan.Parse(data); err != nil {
		t.Errorf("the plan cannot be read: %v", err)
		return false
	}
	var tree any
	if err := json.Unmarshal(data, &tree); err != nil {
		t.Fatal(err)
	}
	found := holds(tree, text)
	for _, f := range p.Files {
		if strings.HasSuffix(f.Path, "config.toml") {
			var config map[string]any
			if _, err := toml.Decode(f.Content, &config); err != nil {
				t.Errorf("config.toml cannot be read: %v\n%s", err, f.Content)
			}
			found = found || holds(config, text) || holds(config, "A="+text)
		}
	}
	return found
}

// holds reports whether a string somewhere in a value is the text.
func holds(v any, text string) bool {
	switch v := v.(type) {
	case string:
		return v == text
	case []any:
		return slices.ContainsFunc(v, func(e any) bool { return holds(e, text) })
	case []map[string]any:
		return slices.ContainsFunc(v, func(e map[string]any) bool { return holds(e, text) })
	case map[string]any:
		for _, e := range v {
			if holds(e, text) {
				return true
			}
		}
	}
	return false
}

// textSpec is a spec with text in all the ways of writing it.
const textSpec = `
locals { word = "noble" }
host "h" { egress_interface = "eno1" }
image "i" {
  ubuntu { release = "${"noble"}" }
  prebuild {
    run = [<<-EOT
      set -e
      echo "${local.word}" \
        two
    EOT
    , "${"echo"} hi", <<EOT
#!/usr/bin/env python3
print("x")
EOT
    ]
    file "/etc/x" {
      content = <<EOT
#!/bin/sh
a
EOT
    }
  }
}
pool "p" {
  image         = image.i
  cpus          = 1
  memory        = "1GiB"
  disk          = "4GiB"
  start         = "cold"
  max_instances = 1
}
`

// TestWindowsLines: a spec with CR LF, or with a byte order mark, is the one with LF.
func TestWindowsLines(t *testing.T) {
	digest := func(name, src string) string {
		t.Helper()
		res, diags := hostspec.Load(hostspec.Options{Path: name, Source: []byte(src)})
		if diags.HasErrors() {
			t.Fatalf("%s: %v", name, diags)
		}
		p, diags := compile.Compile(res.Host, compile.Options{})
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		d, err := p.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	want := digest("host.hcl", textSpec)
	crlf := strings.ReplaceAll(textSpec, "\n", "\r\n")
	for what, src := range map[string]string{"CR LF": crlf, "BOM": "\ufeff" + textSpec, "both": "\ufeff" + crlf} {
		if got := digest("host.hcl", src); got != want {
			t.Errorf("%s: the plan is another", what)
		}
	}
	const js = `{"host": {"h": {"egress_interface": "eno1"}}, "image": {"i": {"debian": {"suite": "trixie"}}}, "pool":
{"p": {"image": "image.i", "cpus": 1, "memory": "1GiB", "disk": "4GiB", "start": "cold", "max_instances": 1}}}
`
	if digest("host.hcl.json", js) != digest("host.hcl.json", strings.ReplaceAll(js, "\n", "\r\n")) {
		t.Error("JSON with CR LF: the plan is another")
	}
}

// TestTextIsRefused: text that would arrive as something else is an error that says what to do.
func TestTextIsRefused(t *testing.T) {
	step := func(expr string) string { return strings.Replace(textSpec, `"${"echo"} hi"`, expr, 1) }
	for _, c := range []struct{ name, src, want string }{
		{"Windows' lines by escapes", step(`"a\r\nb"`), "Command 1 has line ends of Windows (CR LF)"},
		{"an interpreter with CR", step(`"#!/bin/sh\r\nb"`), `Command 1 starts with "#!/bin/sh\r", which ends in a carriage return`},
		{"a file of Windows", step(`file("testdata/crlf.sh")`), "Command 1 starts with"},
		{"a file's interpreter", strings.Replace(textSpec, "content = <<EOT\n#!/bin/sh\na\nEOT\n", `content = "#!/bin/sh\r\na"`+"\n", 1), "The content of /etc/x starts with"},
		{"decomposed", step("\"echo u\u0308ber\""), "Text would change: It has letters and their accents as characters of their own"},
		{"decomposed by an escape", step(`"echo u\u0308ber"`), "Text would change"},
		{"decomposed in a heredoc", strings.Replace(textSpec, "set -e", "echo u\u0308ber", 1), "Text would change"},
		{"decomposed in a file", step(`file("testdata/decomposed.txt")`), "decomposed, NFD"},
		{"a mode that is a number", strings.Replace(textSpec, "content = <<EOT\n#!/bin/sh", "mode = 420\n      content = <<EOT\n#!/bin/sh", 1), "mode must be octal digits in quotes; got a number"},
		{"a file by its URL", strings.Replace(textSpec, `ubuntu { release = "${"noble"}" }`, "url {\n disk = \"file:///srv/x.raw\"\n kernel = \"https://x.example.com/k\"\n}", 1),
			"Write a file block in place of the url block:\n\nfile {\n  disk = \"/srv/x.raw\"\n}"},
	} {
		_, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: []byte(c.src)})
		var all strings.Builder
		for _, d := range diags {
			fmt.Fprintf(&all, "%s: %s\n", d.Summary, d.Detail)
		}
		if !diags.HasErrors() || !strings.Contains(all.String(), c.want) {
			t.Errorf("%s: want %q in:\n%s", c.name, c.want, &all)
		}
	}
	// A comment may have any form.
	if _, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: []byte("# u\u0308ber\n" + textSpec)}); diags.HasErrors() {
		t.Errorf("a decomposed comment: %v", diags)
	}
}

// TestTextWouldChange: what HCL or JSON would write in another way is refused, in both syntaxes.
func TestTextWouldChange(t *testing.T) {
	const native = `
variable "x" { default = "a" }
host "h" { egress_interface = "eno1" }
image "i" {
  debian {
    suite    = "trixie"
    packages = ["git"]
  }
  prebuild {
    file "/etc/x" {
      content = CONTENT
    }
  }
}
pool "p" {
  image         = image.i
  cpus          = 1
  memory        = "1GiB"
  disk          = "4GiB"
  start         = "cold"
  max_instances = 1
}
`
	const js = `{"variable": {"x": {"default": "a"}}, "host": {"h": {"egress_interface": "eno1"}}, "image": {"i": {"debian": {"suite": "trixie", "packages": ["git"]},
"prebuild": {"file": {"/etc/x": {"content": CONTENT}}}}}, "pool":
{"p": {"image": "image.i", "cpus": 1, "memory": "1GiB", "disk": "4GiB", "start": "cold", "max_instances": 1}}}
`
	for _, c := range []struct{ file, content, env, want, arrives string }{
		{"host.hcl", `1.10`, "", `As text, 1.10 would become "1.1". Write content = "1.10"`, ""},
		{"host.hcl", `(0644)`, "", `Write content = "0644"`, ""},
		{"host.hcl", `-1.50`, "", `Write content = "-1.50"`, ""},
		{"host.hcl", `"${1.10}"`, "", `Write content = "1.10"`, ""},
		{"host.hcl", `"v${1.10}"`, "", `the number 1.10 would become "1.1"`, ""},
		{"host.hcl", `join("", ["v${007}"])`, "", `the number 007 would become "7"`, ""},
		{"host.hcl", `"v${1.1}"`, "", "", "v1.1"},
		{"host.hcl", `17`, "", "", "17"},
		{"host.hcl", `"${"x"}"`, "", "", "x"},
		{"host.hcl", `"e${"\u0301"}"`, "", "begins with a combining character", ""},
		{"host.hcl", "\"e${\"\u0301\"}\"", "", "begins with a combining character", ""},
		{"host.hcl", `"\ud83d\ude80"`, "", "Cannot encode character U+d83d in UTF-8", ""},
		{"host.hcl", "\"a\xffb\"", "", "All input files must be UTF-8", ""},
		{"host.hcl", `var.x`, "e\u0301", "decomposed, NFD", ""},
		{"host.hcl", `"e${var.x}"`, "\u0301", "begins with a combining character", ""},
		{"host.hcl", `var.x`, "a\xffb", "not text in UTF-8", ""},
		{"host.hcl", `var.x`, "a\r\nb", "", "a\r\nb"},
		{"host.hcl.json", `1.10`, "", `Write content = "1.10"`, ""},
		{"host.hcl.json", `1e2`, "", `Write content = "1e2"`, ""},
		{"host.hcl.json", `"${1.10}"`, "", `Write content = "1.10"`, ""},
		{"host.hcl.json", `"v${1.10}"`, "", `the number 1.10 would become "1.1"`, ""},
		{"host.hcl.json", `17`, "", "", "17"},
		{"host.hcl.json", `"${\"x\"}"`, "", "", "x"},
		{"host.hcl.json", `"e${\"\\u0301\"}"`, "", "begins with a combining character", ""},
		{"host.hcl.json", `"e\u0301"`, "", "decomposed, NFD", ""},
		{"host.hcl.json", `"\ud83d\ude80"`, "", "", "🚀"},
		{"host.hcl.json", `"\\ud83d"`, "", "", `\ud83d`},
		{"host.hcl.json", `"\ud83d"`, "", "half of a surrogate pair", ""},
		{"host.hcl.json", `"\ude80\ud83d"`, "", "half of a surrogate pair", ""},
		{"host.hcl.json", "\"a\xffb\"", "", "not text in UTF-8", ""},
	} {
		src := native
		if strings.HasSuffix(c.file, ".json") {
			src = js
		}
		opts := hostspec.Options{Path: c.file, Source: []byte(strings.Replace(src, "CONTENT", c.content, 1))}
		if c.env != "" {
			opts.Environ = []string{"FLEETINGD_VAR_x=" + c.env}
		}
		res, diags := hostspec.Load(opts)
		var all strings.Builder
		for _, d := range diags {
			fmt.Fprintf(&all, "%s: %s\n", d.Summary, d.Detail)
			if d.Subject == nil || d.Subject.Start.Line < 1 {
				t.Errorf("%s %q: a finding without a place: %s", c.file, c.content, d.Detail)
			}
		}
		switch {
		case c.want != "":
			if res.Host != nil || !strings.Contains(all.String(), c.want) {
				t.Errorf("%s %q: want %q in:\n%s", c.file, c.content, c.want, &all)
			}
		case res.Host == nil:
			t.Errorf("%s %q: refused:\n%s", c.file, c.content, &all)
		case res.Host.Images[0].Prebuild.Files[0].Content != c.arrives:
			t.Errorf("%s %q: got %q", c.file, c.content, res.Host.Images[0].Prebuild.Files[0].Content)
		}
	}
	// In a list, the finding is at the element.
	_, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: []byte(strings.Replace(strings.Replace(native, `["git"]`, `["git", 1.10]`, 1), "CONTENT", `"a"`, 1))})
	if len(diags) != 1 || !strings.Contains(diags[0].Detail, `write "1.10"`) || diags[0].Subject.Start.Line != 7 {
		t.Errorf("a number in a list: %v", diags)
	}
	// A mode that is a number has the cure that was meant.
	for number, want := range map[string]string{"420": "0644", "493": "0755", "0600": "0600", "755": "0755", "9": "0644"} {
		_, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: []byte(strings.Replace(native, "CONTENT", "\"a\"\n mode = "+number, 1))})
		if len(diags) != 1 || !strings.HasSuffix(diags[0].Detail, fmt.Sprintf("Write mode = %q", want)) {
			t.Errorf("mode = %s: %v", number, diags)
		}
	}
}

// TestSecretsArrive: a secret is a file's bytes but for one final newline. Nothing but text is a secret.
func TestSecretsArrive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	src := strings.Replace(textSpec, "content = <<EOT\n#!/bin/sh\na\nEOT\n", fmt.Sprintf("content = \"<${file(%q)}>\"\n", path), 1)
	for written, want := range map[string]string{
		"s3cret\n": "s3cret", "s3cret\r\n": "s3cret", "s3cret": "s3cret", "a\n\n": "a\n", " a \n": " a ",
		"-----BEGIN\r\nx\r\n-----END\r\n": "-----BEGIN\r\nx\r\n-----END", "u\u0308ber\n": "u\u0308ber", "\ufeffa\n": "\ufeffa",
		"${x} %{y}\n": "${x} %{y}", "a\xffb\n": "", "a\x00b\n": "", "\n": "",
	} {
		if err := os.WriteFile(path, []byte(written), 0o600); err != nil {
			t.Fatal(err)
		}
		res, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: []byte(src)})
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		p, diags := compile.Compile(res.Host, compile.Options{})
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		got, err := p.Images[0].Prebuild.Steps[0].File.Secret.Read(func(from string) (string, error) { return hostspec.ReadSecret(from, nil) })
		if (err != nil) != (want == "") || err == nil && got != "<"+want+">" {
			t.Errorf("%q: got %q, %v", written, got, err)
		}
	}
}
