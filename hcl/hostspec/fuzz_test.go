package hostspec

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
)

// seedCorpus is every fixture and example.
func seedCorpus(f *testing.F, patterns ...string) {
	f.Helper()
	n := 0
	for _, pattern := range patterns {
		files, err := filepath.Glob(pattern)
		if err != nil {
			f.Fatal(err)
		}
		for _, path := range files {
			src, err := os.ReadFile(path)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(src)
			n++
		}
	}
	if n == 0 {
		f.Fatalf("no files in %v", patterns)
	}
}

const fuzzSecret = "hunter2-of-KEY"

// checkLoad loads any bytes at all: a host or errors, never both, never a panic; and
// each finding lies within the source.
func checkLoad(t *testing.T, src []byte, path string) {
	if src == nil {
		src = []byte{}
	}
	opts := Options{Path: path, Source: src, Host: "metal-01", Environ: []string{"FLEETINGD_VAR_token=x", "HOME=/root", "KEY=" + fuzzSecret}}
	res, diags := Load(opts)
	if (res.Host == nil) != diags.HasErrors() {
		t.Fatalf("host %v with findings %v", res.Host, diags)
	}
	for _, d := range diags {
		checkFinding(t, d, res)
	}
	// What is only in the environment comes out of no spec, however it is written.
	if shown := fmt.Sprintf("%v %+v", diags, res.Host); !bytes.Contains(src, []byte(fuzzSecret)) && strings.Contains(shown, fuzzSecret) {
		t.Fatalf("the secret is shown: %s", shown)
	}
	if res.Host != nil {
		for _, r := range res.Host.Runners {
			if shown := fmt.Sprintf("%+v", r); !bytes.Contains(src, []byte(fuzzSecret)) && strings.Contains(shown, fuzzSecret) {
				t.Fatalf("the secret is shown: %s", shown)
			}
		}
	}
	again, diagsAgain := Load(opts)
	if (again.Host == nil) != (res.Host == nil) || len(diagsAgain) != len(diags) {
		t.Fatalf("loaded twice, found two things: %v and %v", diags, diagsAgain)
	}
	if res.Host != nil {
		for _, r := range res.Host.Runners {
			if len(r.Token) == 0 {
				t.Fatal("a runner without a token's place")
			}
		}
	}
}

func checkFinding(t *testing.T, d *hcl.Diagnostic, res *Result) {
	if d.Summary == "" || d.Detail == "" {
		t.Fatalf("a finding without a text: %#v", d)
	}
	if d.Subject == nil {
		return
	}
	file := res.Files[d.Subject.Filename]
	if file == nil {
		t.Fatalf("a finding in a file %q that was not read: %s", d.Subject.Filename, text(d))
	}
	// HCL's JSON parser may point one past the end of what is cut off.
	if s := d.Subject.Start; s.Byte < 0 || s.Byte > len(file.Bytes)+1 || s.Line < 1 {
		t.Fatalf("a finding outside of its source of %d bytes: %v: %s", len(file.Bytes), d.Subject, text(d))
	}
}

func FuzzLoad(f *testing.F) {
	seedCorpus(f, "testdata/findings/*.hcl", "../../packaging/examples/*/*.hcl")
	for _, expr := range []string{
		`env("KEY")`, `"${env("KEY")}"`, `trimspace(env("KEY"))`, `upper(env("KEY"))`, `jsonencode({ (env("KEY")) = [env("KEY")] })`,
		`[for k, v in { a = env("KEY") } : "${k}${v}"][0]`, `env("KEY") == "" ? "a" : env("KEY")`, `format("%s%q", "a", env("KEY"))`,
		`base64encode(join(",", [env("KEY"), "%{ for x in [env("KEY")] }${x}%{ endfor }"]))`, `values(zipmap(["a"], [env("KEY")]))[0]`,
		`coalesce(null, element([env("KEY")], 5), "x")`, `lookup({ a = env("KEY") }, "a", "")`, `flatten([[env("KEY")]])[0]`,
	} {
		f.Add([]byte(strings.Replace(withRunner(`"${local.x}"`), "locals {", "locals {\n x = "+expr+"\n", 1)))
		f.Add([]byte(strings.Replace(withRunner(`env("KEY")`), "token = env", "settings = { environment = [\"A=${"+expr+"}\"] }\n token = env", 1)))
	}
	f.Fuzz(func(t *testing.T, src []byte) { checkLoad(t, src, "host.hcl") })
}

func FuzzLoadJSON(f *testing.F) {
	seedCorpus(f, "../../packaging/examples/*/*.json")
	f.Add([]byte(`{"locals": {"x": "${[for a in range(10) : a]}"}, "variable": {"t": {"type": "list(string)", "default": []}}}`))
	f.Fuzz(func(t *testing.T, src []byte) { checkLoad(t, src, "host.hcl.json") })
}

// FuzzFormat: what was formatted is formatted, and says the same.
func FuzzFormat(f *testing.F) {
	seedCorpus(f, "testdata/findings/*.hcl", "../../packaging/examples/*/*.hcl")
	f.Fuzz(func(t *testing.T, src []byte) {
		once, diags := Format(src, "host.hcl")
		if diags.HasErrors() {
			return
		}
		if _, diags := Format(once, "host.hcl"); diags.HasErrors() {
			t.Fatalf("formatting broke it: %v\n%s", diags, once)
		}
		// It may move space and add the last line's end, and nothing else.
		if a, b := squeeze(src), squeeze(once); !bytes.Equal(a, b) {
			t.Fatalf("formatting changed it from\n%s\nto\n%s", src, once)
		}
	})
}

func squeeze(src []byte) []byte {
	return bytes.Join(bytes.FieldsFunc(src, func(r rune) bool { return r == ' ' || r == '\t' || r == '\n' || r == '\r' }), nil)
}

func FuzzUnits(f *testing.F) {
	for _, s := range []string{"8GiB", "8GB", "8 g", "1.5TiB", "30m", "1h30m", "0s", "7d", "400%", "4", "tcp/443", "udp/1-65535",
		"10.0.0.1/8", "fd00::1", "* 8-18/2 1,2 jan-mar mon", "0755", "-1%", "99999999999999999999GiB", "1e9h", "::ffff:1.2.3.4/96"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := parseSize(s); err == nil && n < 0 {
			t.Errorf("size %q is %d", s, n)
		}
		if d, err := parseDuration(s); err == nil && d < 0 {
			t.Errorf("duration %q is %v", s, d)
		}
		if n, err := parsePercent(s); err == nil && n < 0 {
			t.Errorf("quota %q is %d", s, n)
		}
		if p, err := parsePorts(s); err == nil && (p.First == 0 || p.Last < p.First) {
			t.Errorf("ports %q are %v", s, p)
		}
		if p, err := parsePrefix(s); err == nil && p != p.Masked() {
			t.Errorf("prefix %q is %v", s, p)
		}
		if m, err := parseMode(s); err == nil && len(m) != 4 {
			t.Errorf("mode %q is %q", s, m)
		}
		_, _ = parsePeriod(s)
	})
}
