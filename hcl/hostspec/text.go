package hostspec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"golang.org/x/text/unicode/norm"
)

// Text arrives on the host and in the guest as it stands in the spec, or the spec is refused. Three things would change it on the way:
// line ends of Windows, which only the editor means; the composed form (NFC) that HCL gives every string; and a mode that is a number,
// which is decimal in HCL and octal everywhere else.

// unixLines is the source with LF for each CR LF: a heredoc in a file with Windows line ends means lines.
func unixLines(src []byte) []byte { return bytes.ReplaceAll(src, []byte("\r\n"), []byte("\n")) }

// errDecomposed is text that HCL would compose.
var errDecomposed = errors.New("it has letters and their accents as characters of their own (decomposed, NFD), which HCL would compose (NFC); " +
	"convert it, with uconv -x any-nfc for example")

// checkComposed finds literal text that HCL would change.
func checkComposed(src []byte, path string, isJSON bool) *hcl.Diagnostic {
	if norm.NFC.IsNormal(src) && !bytes.Contains(src, []byte(`\u`)) && !bytes.Contains(src, []byte(`\U`)) {
		return nil
	}
	if isJSON {
		return checkComposedJSON(src, path)
	}
	tokens, _ := hclsyntax.LexConfig(src, path, hcl.InitialPos)
	for _, t := range tokens {
		text := string(t.Bytes)
		switch t.Type {
		case hclsyntax.TokenQuotedLit:
			text = unescape(text)
		case hclsyntax.TokenStringLit:
		default:
			continue
		}
		if !norm.NFC.IsNormalString(text) {
			return decomposed(t.Range)
		}
	}
	return nil
}

func checkComposedJSON(src []byte, path string) *hcl.Diagnostic {
	d := json.NewDecoder(bytes.NewReader(src))
	for {
		t, err := d.Token()
		if err != nil { // the end, or what HCL's parser reports better
			return nil
		}
		if text, ok := t.(string); ok && !norm.NFC.IsNormalString(text) {
			before := src[:d.InputOffset()]
			line := bytes.Count(before, []byte("\n"))
			column := len(before) - bytes.LastIndexByte(before, '\n')
			at := hcl.Pos{Line: line + 1, Column: column, Byte: len(before)}
			return decomposed(hcl.Range{Filename: path, Start: at, End: at})
		}
	}
}

func decomposed(at hcl.Range) *hcl.Diagnostic {
	return &hcl.Diagnostic{Severity: hcl.DiagError, Summary: "Text in decomposed form", Detail: capital(errDecomposed.Error()) + ".", Subject: &at}
}

// unicodeEscape is \uNNNN or \UNNNNNNNN in a quoted template.
var unicodeEscape = regexp.MustCompile(`\\(?:u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8})`)

// unescape resolves the Unicode escapes of a quoted template's literal.
func unescape(text string) string {
	return unicodeEscape.ReplaceAllStringFunc(text, func(s string) string {
		n, err := strconv.ParseUint(s[2:], 16, 32)
		if err != nil {
			return s
		}
		return string(rune(n))
	})
}

// checkLines finds line ends of Windows in a script: to a shell, the carriage return is a part of the line's last word.
func checkLines(script string) error {
	if !strings.Contains(script, "\r\n") {
		return nil
	}
	return errors.New(`has line ends of Windows (CR LF), which the shell takes for a part of each line's last word; convert the file that it comes from, ` +
		`with dos2unix for example, or write replace(…, "\r\n", "\n")`)
}

// checkInterpreter finds a program's first line that names no interpreter.
func checkInterpreter(text string) error {
	line, _, _ := strings.Cut(text, "\n")
	name, ok := strings.CutPrefix(line, "#!")
	if !ok {
		return nil
	}
	if strings.HasSuffix(line, "\r") {
		return fmt.Errorf("starts with %s, which ends in a carriage return (line ends of Windows), so the kernel looks for an interpreter of that name; "+
			`convert the file that it comes from, with dos2unix for example, or write replace(…, "\r\n", "\n")`, quote(line))
	}
	if !path.IsAbs(strings.TrimLeft(name, " \t")) {
		return fmt.Errorf("starts with %s, which must name an interpreter by its absolute path. Write, for example, #!/bin/sh or #!/usr/bin/env python3", quote(line))
	}
	return nil
}

// withoutStop takes the full stop off a detail that ends in code: it would be copied with it.
func withoutStop(detail string) string {
	text, ok := strings.CutSuffix(detail, ".")
	if !ok {
		return detail
	}
	for _, lead := range []string{"rite, for example: ", "rite "} {
		i := strings.LastIndex(text, lead)
		if i < 0 {
			continue
		}
		code := text[i+len(lead):]
		if !strings.ContainsAny(code, "={") {
			continue
		}
		if _, diags := hclsyntax.ParseConfig([]byte(code+"\n"), "", hcl.InitialPos); !diags.HasErrors() {
			return text
		}
	}
	return detail
}
