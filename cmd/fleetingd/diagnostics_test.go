package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/hashicorp/hcl/v2"

	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// FuzzPrint prints the findings of arbitrary bytes, for people and as JSON: short
// lines of valid UTF-8, without anything that a terminal would obey.
func FuzzPrint(f *testing.F) {
	for _, s := range []string{
		"", "}", "host", "host \"x\" {", "locals {\n\tx = \"\u00e9\u200b\x1b[2J${nope}\"\n}\n", "a = <<EOT\nx", "x = 1\r\ny = \xff",
		strings.Repeat("a = 1 ", 1000), "host \"a\" {\n" + strings.Repeat("\n", 50), `{"host": [}`, `{"a":{"b":`,
	} {
		f.Add([]byte(s), false)
		f.Add([]byte(s), true)
	}
	f.Fuzz(func(t *testing.T, src []byte, isJSON bool) {
		path := "host.hcl"
		if isJSON {
			path += ".json"
		}
		if src == nil {
			src = []byte{}
		}
		res, diags := hostspec.Load(hostspec.Options{Path: path, Source: src})
		var out bytes.Buffer
		printDiagnostics(&out, res.Files, diags)
		if !utf8.Valid(out.Bytes()) || strings.ContainsFunc(out.String(), func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' }) {
			t.Fatalf("control characters in %q", out.String())
		}
		for _, d := range diags {
			s := newDiagnostic(d, res.Files).Snippet
			if s == nil {
				continue
			}
			if s.Start < 0 || s.End < s.Start || s.End > len(s.Code) || len(s.Code) > (snippetLines+2)*snippetWidth {
				t.Fatalf("offsets %d to %d of %d bytes", s.Start, s.End, len(s.Code))
			}
			if _, err := json.Marshal(s); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestMarkerIsUnderItsText(t *testing.T) {
	src := "pool \"p\" {\n\té = \"8GB\" # 8\n}\n"
	at := strings.Index(src, `"8GB"`)
	d := &hcl.Diagnostic{Severity: hcl.DiagError, Summary: "s", Detail: "one\n\n  an example", Subject: &hcl.Range{
		Filename: "f",
		Start:    hcl.Pos{Line: 2, Column: 6, Byte: at},
		End:      hcl.Pos{Line: 2, Column: 11, Byte: at + 5},
	}}
	var out bytes.Buffer
	printDiagnostics(&out, map[string]*hcl.File{"f": {Bytes: []byte(src)}}, hcl.Diagnostics{d})
	want := "Error: s\n\n  on f line 2, column 6:\n" +
		"   2: \té = \"8GB\" # 8\n" +
		"      \t    ^^^^^\n\none\n\n  an example\n\n"
	if out.String() != want {
		t.Errorf("got\n%q\nwant\n%q", out.String(), want)
	}
}

func TestWrap(t *testing.T) {
	for in, want := range map[string]string{
		"one two three":   "one two\nthree",
		"  one two three": "  one two three",
		"onetwothreefour": "onetwothreefour",
		"":                "",
	} {
		if got := wrap(in, 7); got != want {
			t.Errorf("%q becomes %q", in, got)
		}
	}
}
