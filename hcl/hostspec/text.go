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
	"unicode/utf8"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
	"golang.org/x/text/unicode/norm"
)

// Text arrives on the host and in the guest as it stands in the spec, or the spec is refused. These would change it on the way:
// Windows line ends, which only the editor means; the composed form (NFC) that HCL gives every string; JSON's way with bytes
// that are not UTF-8; and numbers where text is meant, since HCL writes 1.10 as 1.1 and reads 420, a mode, as decimal.

// unixLines is the source with LF for each CR LF: a heredoc in a file with Windows line ends means lines.
func unixLines(src []byte) []byte { return bytes.ReplaceAll(src, []byte("\r\n"), []byte("\n")) }

var (
	errDecomposed = errors.New("it has letters and their accents as characters of their own (decomposed, NFD), which HCL would compose (NFC); " +
		"convert it, with uconv -x any-nfc for example")
	errJoins = errors.New("it begins with a combining character, which HCL would join with what comes before; write both as one text")
	errBytes = errors.New("it is not text in UTF-8; convert it, with iconv -t UTF-8 for example")
)

// checkText returns why HCL would change a text.
func checkText(text string) error {
	switch {
	case !utf8.ValidString(text):
		return errBytes
	case !norm.NFC.IsNormalString(text):
		return errDecomposed
	case text != "" && !norm.NFC.PropertiesString(text).BoundaryBefore():
		return errJoins
	}
	return nil
}

// checkSource finds literal text that HCL would change.
func checkSource(src []byte, path string, isJSON bool) *hcl.Diagnostic {
	ascii := !bytes.ContainsFunc(src, func(r rune) bool { return r >= utf8.RuneSelf })
	if ascii && !bytes.Contains(src, []byte(`\u`)) && !bytes.Contains(src, []byte(`\U`)) {
		return nil
	}
	if isJSON {
		return checkJSONText(src, path)
	}
	tokens, _ := hclsyntax.LexConfig(src, path, hcl.InitialPos)
	if at, err := checkLiterals(tokens); err != nil {
		return changed(at, err)
	}
	return nil
}

// checkLiterals checks the literal parts of templates.
func checkLiterals(tokens hclsyntax.Tokens) (hcl.Range, error) {
	for _, t := range tokens {
		text := string(t.Bytes)
		switch t.Type {
		case hclsyntax.TokenQuotedLit:
			text = unescape(text)
		case hclsyntax.TokenStringLit:
		default:
			continue
		}
		if err := checkText(text); err != nil && !errors.Is(err, errBytes) { // HCL's parser reports those itself
			return t.Range, err
		}
	}
	return hcl.Range{}, nil
}

func checkJSONText(src []byte, path string) *hcl.Diagnostic {
	for at := 0; at < len(src); {
		r, size := utf8.DecodeRune(src[at:])
		if r == utf8.RuneError && size == 1 {
			return changed(rangeAt(src, path, at), errBytes)
		}
		at += size
	}
	if at := loneSurrogate(src); at >= 0 {
		return changed(rangeAt(src, path, at), errors.New(`it has half of a surrogate pair; write both halves, such as \ud83d\ude80, or the character itself`))
	}
	d := json.NewDecoder(bytes.NewReader(src))
	for {
		t, err := d.Token()
		if err != nil { // the end, or what HCL's parser reports better
			return nil
		}
		text, ok := t.(string)
		if !ok {
			continue
		}
		err = checkText(text)
		if err == nil {
			tokens, _ := hclsyntax.LexTemplate([]byte(text), "", hcl.InitialPos)
			_, err = checkLiterals(tokens)
		}
		if err != nil {
			return changed(rangeAt(src, path, int(d.InputOffset())-1), err)
		}
	}
}

// surrogate is an escape in JSON: any, or that of half a surrogate pair.
var surrogate = regexp.MustCompile(`\\(?:u[dD][89abAB][0-9A-Fa-f]{2}\\u[dD][c-fC-F][0-9A-Fa-f]{2}|(u[dD][89a-fA-F][0-9A-Fa-f]{2})|.)`)

// loneSurrogate is the place of an escape that stands for no character, or -1. Go's decoder makes U+FFFD of it.
func loneSurrogate(src []byte) int {
	for _, m := range surrogate.FindAllSubmatchIndex(src, -1) {
		if m[2] >= 0 {
			return m[0]
		}
	}
	return -1
}

func changed(at hcl.Range, err error) *hcl.Diagnostic {
	return &hcl.Diagnostic{Severity: hcl.DiagError, Summary: "Text would change", Detail: capital(err.Error()) + ".", Subject: &at}
}

// writtenNumber returns a number as it is written out, with its sign, or "" if the expression is not that.
func (l *loader) writtenNumber(expr hcl.Expression) string {
	at := expr.Range()
	if native := unwrap(expr); native != nil {
		if u, ok := native.(*hclsyntax.UnaryOpExpr); ok && u.Op == hclsyntax.OpNegate {
			native = u.Val
		}
		if lit, ok := native.(*hclsyntax.LiteralValueExpr); !ok || lit.Val.Type() != cty.Number {
			return ""
		}
		if _, ok := expr.(hclsyntax.Expression); !ok { // in a string of JSON
			text, _ := jsonString(expr)
			return strings.Trim(text, "${} ()")
		}
	} else if _, ok := jsonString(expr); ok {
		return ""
	}
	f := l.files[at.Filename]
	if f == nil || at.End.Byte > len(f.Bytes) || at.Start.Byte > at.End.Byte {
		return ""
	}
	return strings.Trim(string(f.Bytes[at.Start.Byte:at.End.Byte]), "\"${} ()")
}

// asText converts a value to text. A number that is written out must be written as HCL would write it: 1.10 would become 1.1.
func (s *section) asText(a *hcl.Attribute, expr hcl.Expression, v cty.Value) (cty.Value, error) {
	text, err := convert.Convert(v, cty.String)
	if err != nil || text.IsNull() || v.Type() != cty.Number {
		return text, err
	}
	if number := s.l.writtenNumber(expr); number != "" && number != text.AsString() {
		at := expr.Range()
		if expr == a.Expr {
			s.fail(a, &at, "as text, %s would become %q. Write %s = %q", number, text.AsString(), a.Name, number)
		} else {
			s.fail(a, &at, "as text, %s would become %q: write %q", number, text.AsString(), number)
		}
		return text, errFound
	}
	return text, nil
}

// checkNumbers finds numbers in templates that HCL would write in another way: "v${1.10}" is v1.1.
func (l *loader) checkNumbers(expr hcl.Expression) bool {
	root, isNative := expr.(hclsyntax.Expression)
	var src []byte
	if isNative {
		if f := l.files[expr.Range().Filename]; f != nil {
			src = f.Bytes
		}
	} else if text, ok := jsonString(expr); ok && strings.Contains(text, "${") {
		src = []byte(text)
		root, _ = hclsyntax.ParseTemplate(src, "", hcl.InitialPos)
	}
	if root == nil || src == nil {
		return true
	}
	var at *hcl.Range
	var number, becomes string
	_ = hclsyntax.VisitAll(root, func(n hclsyntax.Node) hcl.Diagnostics {
		t, ok := n.(*hclsyntax.TemplateExpr)
		if !ok || at != nil {
			return nil
		}
		for _, part := range t.Parts {
			lit, ok := part.(*hclsyntax.LiteralValueExpr)
			if !ok || lit.Val.Type() != cty.Number || lit.SrcRange.End.Byte > len(src) {
				continue
			}
			text, err := convert.Convert(lit.Val, cty.String)
			written := string(src[lit.SrcRange.Start.Byte:lit.SrcRange.End.Byte])
			if err == nil && at == nil && text.AsString() != written {
				at, number, becomes = lit.SrcRange.Ptr(), written, text.AsString()
			}
		}
		return nil
	})
	if at == nil {
		return true
	}
	if !isNative {
		at = expr.Range().Ptr()
	}
	l.errorf(at, "Text would change", "As text, the number %s would become %q. Write it without ${ }.", number, becomes)
	return false
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
