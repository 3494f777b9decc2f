package hostspec

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func withRunner(token string) string {
	return minimal + fmt.Sprintf(`
variable "token" {
  type      = string
  sensitive = true
  default   = null
}
variable "tokens" {
  type    = map(string)
  default = null
}
locals {
  dir = "/run/secrets"
}
runner "r" {
  pool  = pool.small
  url   = "https://gitlab.example.com"
  token = %s
}
`, token)
}

const hunter = "glrt-hunter2"

// tokenOf is the one secret that the runner's token is made of.
func tokenOf(t *testing.T, h *Host) Secret {
	t.Helper()
	all := slices.Collect(h.Runners[0].Token.Secrets())
	if len(all) != 1 {
		t.Fatalf("the token has %d secrets", len(all))
	}
	return all[0]
}

// TestSecretIsAReference loads specs where the secret cannot be read, and then reads it.
func TestSecretIsAReference(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	for _, tt := range []struct {
		name, token, from string
		opts              Options
		missing           string // what Read says where the secret is not there
	}{
		{"file", fmt.Sprintf("file(%q)", path), "file:" + path, Options{}, path},
		{"trimmed file", fmt.Sprintf("trimspace(file(%q))", path), "file:" + path, Options{}, path},
		{"parentheses", fmt.Sprintf("(\"${file(%q)}\")", path), "file:" + path, Options{}, path},
		{"path from a local", `file("${local.dir}/token")`, "file:/run/secrets/token", Options{}, "/run/secrets/token"},
		{"environment", `env("TOKEN")`, "env:TOKEN", Options{}, "the environment has no TOKEN"},
		{"variable", "var.token", "var:token", Options{}, "FLEETINGD_VAR_token"},
		{"empty variable", "var.token", "var:token", Options{Environ: []string{"FLEETINGD_VAR_token="}}, "the variable token is empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			src := withRunner(tt.token)
			secret := tokenOf(t, load(t, tt.opts, src))
			if secret.From != tt.from {
				t.Errorf("From is %q", secret.From)
			}
			if v, err := secret.Read(); err == nil || !strings.Contains(err.Error(), tt.missing) {
				t.Errorf("read %q, %v", v, err)
			}
		})
	}

	if err := os.WriteFile(path, []byte(hunter+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	environ := []string{"TOKEN=" + hunter, "FLEETINGD_VAR_token=" + hunter, `FLEETINGD_VAR_tokens={ "a" = "` + hunter + `" }`}
	for token, from := range map[string]string{
		fmt.Sprintf("file(%q)", path): "file:" + path,
		`env("TOKEN")`:                "env:TOKEN",
		"var.token":                   "var:token",
		`var.tokens["a"]`:             "var:tokens.a",
		"var.tokens.a":                "var:tokens.a",
	} {
		h := load(t, Options{Environ: environ}, withRunner(token))
		secret := tokenOf(t, h)
		if v, err := secret.Read(); err != nil || v != hunter || secret.From != from {
			t.Errorf("%s: %q from %q, %v", token, v, secret.From, err)
		}
		if printed := fmt.Sprintf("%+v %+v %#v", h, h.Runners[0], h.Runners[0]); strings.Contains(printed, "hunter2") {
			t.Errorf("%s: a printed host shows the secret: %s", token, printed)
		}
	}
}

func TestSecretThatIsUseless(t *testing.T) {
	for text, want := range map[string]string{
		"":                         "is empty",
		"\n":                       "is empty",
		"a\x00b":                   "not text",
		"\xff":                     "not text",
		strings.Repeat("x", 1<<19): "larger than 256 KiB",
	} {
		path := filepath.Join(t.TempDir(), "token")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		secret := tokenOf(t, load(t, Options{}, withRunner(fmt.Sprintf("file(%q)", path))))
		if _, err := secret.Read(); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%.20q: %v", text, err)
		}
	}
	if _, err := (Secret{}).Read(); err == nil {
		t.Error("no secret can be read")
	}
}

func TestCheckToken(t *testing.T) {
	for token, want := range map[string]string{
		"glrt-t3_abc.01.xyz": "", "a\nb": "more than one line", "\ta": "blank", "a b": "blank", "a\u00a0": "blank", `a"b`: "quote", `a\b`: "quote", "a\x7f": "quote",
	} {
		err := CheckToken(token)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v", token, err)
		}
	}
}

// TestSecretIsNowhere puts a secret in every place where one can be written wrongly:
// neither findings nor the source that snippets are cut from may show it.
func TestSecretIsNowhere(t *testing.T) {
	varFile := filepath.Join(t.TempDir(), "vars.hcl")
	if err := os.WriteFile(varFile, []byte("token = \""+hunter+"\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Files of variables that are not in order: the secret is on the line that is found fault with.
	varFiles := map[string]string{
		"a.hcl": "token = \"" + hunter + "\n", "b.hcl": "tokn = \"" + hunter + "\"\n", "c.hcl": "token = \"" + hunter + "\"\ntoken = \"" + hunter + "\"\n",
		"d.hcl": "token \"" + hunter + "\" {\n}\n", "e.hcl": "token = " + hunter + "\n", "f.hcl": "token = x(\"" + hunter + "\")\n", "g.hcl": hunter + "\n",
		"h.hcl": "token = <<EOT\n" + hunter + "\n", "i.hcl": "token: \"" + hunter + "\"\n", "j.hcl": "token = \"${" + hunter + "}\"\n",
		"a.json": `{"token": ` + hunter + `}`, "b.json": `{"token": "` + hunter, "c.json": `{"tokn": "` + hunter + `"}`, "d.json": `["` + hunter + `"]`,
		"e.json": `{"token": "` + hunter + `", "token": "` + hunter + `"}`, "g.json": `{"token": {"` + hunter + `": 1}}`,
		"h.json": hunter, "i.json": `{"token": "\x` + hunter + `"}`, "j.json": `{"token": 1` + hunter + `}`, "k.json": `{` + hunter + `: 1}`,
	}
	for name, content := range varFiles {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		res, diags := Load(Options{Path: "host.hcl", Source: []byte(withRunner("var.token")), VarFiles: []string{path}})
		if len(diags) == 0 {
			t.Errorf("%s: nothing was found in %s", name, content)
		}
		for _, d := range diags {
			if strings.Contains(d.Summary+d.Detail, "hunter2") {
				t.Errorf("%s: a finding shows the secret: %s", name, text(d))
			}
		}
		if strings.Contains(string(res.Files[path].Bytes), "hunter2") {
			t.Errorf("%s: a snippet can show the secret: %s: %v", name, res.Files[path].Bytes, diags)
		}
	}
	sensitive := Options{Environ: []string{"FLEETINGD_VAR_token=" + hunter}}
	for _, tt := range []struct {
		name, src string
		opts      Options
	}{
		{"literal", withRunner(`"` + hunter + `"`), Options{}},
		{"literal over lines", withRunner("<<-EOT\n    " + hunter + "\n    EOT"), Options{}},
		{"literal in JSON", `{"runner": {"r": {"token": "` + hunter + `"}}}`, Options{Path: "host.hcl.json"}},
		{"default", strings.Replace(withRunner("var.token"), "null", `"`+hunter+`"`, 1), Options{}},
		{"wrong type from a file", strings.Replace(withRunner("var.token"), "string", "number", 1), Options{VarFiles: []string{varFile}}},
		{"wrong type from the environment", strings.Replace(withRunner("var.token"), "string", "number", 1), sensitive},
		{"in a function that fails", withRunner("var.token") + "locals {\n  x = parseint(var.token, 10)\n}\n", sensitive},
		{"in a local that fails", withRunner("var.token") + "locals {\n  y = var.token\n  x = cidrhost(local.y, 1)\n}\n", sensitive},
		{"as an attribute", strings.Replace(withRunner("var.token"), `"https://gitlab.example.com"`, "var.token", 1), sensitive},
		{"within an attribute", strings.Replace(withRunner("var.token"), `"https://gitlab.example.com"`, `"https://${var.token}"`, 1), sensitive},
		{"as a size", strings.Replace(withRunner("var.token"), `"1GiB"`, "var.token", 1), sensitive},
		{"in a URL", strings.Replace(withRunner("var.token"), `https://gitlab.example.com`, "https://oauth2:"+hunter+"@gitlab.example.com", 1), sensitive},
		{"as an index", withRunner(`var.tokens[var.token]`), sensitive},
		{"as a path", withRunner(`file(var.token)`), sensitive},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.opts.Source = []byte(tt.src)
			if tt.opts.Path == "" {
				tt.opts.Path = "host.hcl"
			}
			res, diags := Load(tt.opts)
			if !diags.HasErrors() {
				t.Fatal("nothing was found")
			}
			for _, d := range diags {
				if strings.Contains(d.Summary+d.Detail, "hunter2") {
					t.Errorf("a finding shows the secret: %s", text(d))
				}
				if d.EvalContext != nil {
					t.Errorf("a finding carries the values of variables: %s", text(d))
				}
			}
			for name, f := range res.Files {
				if strings.Contains(string(f.Bytes), "hunter2") {
					t.Errorf("the source of %s shows the secret:\n%s", name, f.Bytes)
				}
			}
		})
	}
}

func TestSecretOnTheCommandLine(t *testing.T) {
	got := findings(Options{Vars: []string{"token=" + hunter}}, withRunner("var.token"))
	if !strings.HasPrefix(got, "WARNING: ") || !strings.Contains(got, "process list") || strings.Contains(got, "hunter2") {
		t.Errorf("findings: %s", got)
	}
}

// TestSensitiveVariableNotSet: one finding is enough.
func TestSensitiveVariableNotSet(t *testing.T) {
	src := withRunner("var.unset") + "variable \"unset\" {\n  type = string\n  sensitive = true\n}\nlocals {\n  x = \"a${var.unset}\"\n}\n"
	if got := findings(Options{}, src); strings.Count(got, "ERROR") != 1 || !strings.Contains(got, `The variable "unset" has no default`) {
		t.Errorf("findings: %s", got)
	}
}

// TestSecretForms: what the pieces of a secret's text are.
func TestSecretForms(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	path := write("x", hunter+"\n")
	write("pre.sh", "echo "+hunter+"\n")
	write("list.json", `{"environment": ["A=1"], "limit": 3}`)
	opts := Options{Path: filepath.Join(dir, "host.hcl"), Environ: []string{"A=" + hunter}}
	settings := func(expr string) string {
		return withRunner("env(\"A\")") + strings.Replace(fmt.Sprintf("locals {\n  v = FILE\n  list = jsondecode(file(\"list.json\"))\n  s = %s\n}\n", expr), "FILE", fmt.Sprintf("file(%q)", path), 1)
	}
	for _, tt := range []struct {
		expr string
		want string // of the setting environment: literals as they are, secrets in {}
	}{
		{`[local.v]`, "[{file:" + path + "}]"},
		{`["X=${local.v}", "Y=2"]`, "[X={file:" + path + "} Y=2]"},
		{`["${env("A")}-${local.v}"]`, "[{env:A}-{file:" + path + "}]"},
		{`[trimspace(local.v), chomp("A=${env("A")}")]`, "[trimspace({file:" + path + "}) chomp(A={env:A})]"},
		{`[jsonencode({ a = base64encode("u:${env("A")}") })]`, `[{"a":"jsonencode(base64encode(u:{env:A}))"}]`},
		{`[format("%s=%v", "K", env("A"))]`, "[K={env:A}]"},
		{`[join("=", ["a", env("A")])]`, "[a={env:A}]"},
		{`concat(["a="], reverse([env("A"), "b="]))`, "[a= b= {env:A}]"},
		{`[for k, v in { A = env("A") } : "${k}=${v}"]`, "[A={env:A}]"},
		{`[file("pre.sh")]`, "[{spec:runner \"r\".settings.environment.0}]"},
		{`[upper(file("pre.sh")), "x${trimspace(file("pre.sh"))}"]`, "[{spec:runner \"r\".settings.environment.0} {spec:runner \"r\".settings.environment.1}]"},
		{`reverse(["a=", file("pre.sh")])`, "[{spec:runner \"r\".settings.environment.0} a=]"},
		{`local.list.environment`, "[A=1]"},
	} {
		src := strings.Replace(settings(tt.expr), "  token = env", "  settings = { environment = local.s, limit = local.list.limit }\n  token = env", 1)
		got := load(t, opts, src).Runners[0].Settings
		if text := fmt.Sprint(plainText(got["environment"])); text != tt.want || got["limit"] != int64(3) {
			t.Errorf("%s: %s, want %s", tt.expr, text, tt.want)
		}
	}
}

// plainText shows a setting, its secrets by their places.
func plainText(v any) any {
	switch v := v.(type) {
	case Text:
		out := ""
		for _, p := range v {
			switch {
			case p.Op != "":
				out += fmt.Sprintf("%s(%s)", p.Op, plainText(p.Of))
			case p.Secret.From != "":
				out += "{" + p.Secret.From + "}"
			default:
				out += p.Literal
			}
		}
		return out
	case []any:
		var list []any
		for _, e := range v {
			list = append(list, plainText(e))
		}
		return list
	}
	return v
}

func TestReadSecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, []byte("value\r\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{"A=a\n", "FLEETINGD_VAR_v=b"}
	for _, tt := range []struct{ from, want, err string }{
		{"file:" + path, "value", ""},
		{"file:" + path + "y", "", "no such file"},
		{"file:/dev/zero", "", "not a regular file"},
		{"env:A", "a", ""},
		{"env:B", "", "the environment has no B"},
		{"var:v", "b", ""},
		{"var:w", "", "set FLEETINGD_VAR_w in the environment of gitlab-runner.service"},
		{"spec:x", "", "only be read with the spec"},
		{"", "", "only be read with the spec"},
	} {
		got, err := ReadSecret(tt.from, env)
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: %q, %v", tt.from, got, err)
		}
	}
}
