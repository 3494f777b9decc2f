package hostspec

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
)

// HCL's parsers and evaluators recurse, and a Go stack that overflows cannot be
// recovered from. So depth is bounded before they see the text.
const (
	// maxDepth bounds brackets within brackets plus operators in a row: each costs
	// a few KiB of stack, of which Go allows 1 GB.
	maxDepth = 500
	// maxExponent bounds a number literal: 1e999999999 would be a GB once it is text.
	maxExponent = 300
	// maxValue bounds a variable's or local's value, in elements and bytes. Without
	// it ten locals, each the last one ten times, make ten thousand million bytes.
	maxValue = 1 << 18
)

// guardSource finds what must not reach a parser; nil where all is well.
func guardSource(src []byte, path string, isJSON bool) *hcl.Diagnostic {
	if isJSON {
		return guardJSON(src, path)
	}
	tokens, _ := hclsyntax.LexConfig(src, path, hcl.InitialPos)
	return guardTokens(tokens)
}

// guardExprText is the guard for an expression on its own.
func guardExprText(src []byte) *hcl.Diagnostic {
	tokens, _ := hclsyntax.LexExpression(src, "", hcl.InitialPos)
	return guardTokens(tokens)
}

// level is one open bracket, quote or template sequence.
type level struct {
	newlineEnds bool // a line end ends an item here: in a body or an object
	operators   int  // in the item so far
}

func guardTokens(tokens hclsyntax.Tokens) *hcl.Diagnostic {
	levels := []level{{newlineEnds: true}}
	depth := 0 // of all levels: one for each, and their operators
	for _, t := range tokens {
		top := &levels[len(levels)-1]
		switch t.Type {
		case hclsyntax.TokenOParen, hclsyntax.TokenOBrack, hclsyntax.TokenOBrace, hclsyntax.TokenOQuote,
			hclsyntax.TokenOHeredoc, hclsyntax.TokenTemplateInterp, hclsyntax.TokenTemplateControl:
			// a[0][0] and %{if}%{if} nest without one bracket in another.
			if t.Type == hclsyntax.TokenOBrack || t.Type == hclsyntax.TokenTemplateControl {
				top.operators++
				depth++
			}
			levels = append(levels, level{newlineEnds: t.Type == hclsyntax.TokenOBrace})
			depth++
		case hclsyntax.TokenCParen, hclsyntax.TokenCBrack, hclsyntax.TokenCBrace, hclsyntax.TokenCQuote,
			hclsyntax.TokenCHeredoc, hclsyntax.TokenTemplateSeqEnd:
			if len(levels) > 1 {
				depth -= 1 + top.operators
				levels = levels[:len(levels)-1]
			}
		case hclsyntax.TokenComma:
			depth -= top.operators
			top.operators = 0
		case hclsyntax.TokenNewline, hclsyntax.TokenComment: // a comment holds its line's end
			if top.newlineEnds {
				depth -= top.operators
				top.operators = 0
			}
		case hclsyntax.TokenNumberLit:
			if !smallExponent(t.Bytes) {
				return guardError(t.Range, "Too large a number", "The exponent of a number may be at most %d.", maxExponent)
			}
		case hclsyntax.TokenIdent, hclsyntax.TokenQuotedLit, hclsyntax.TokenStringLit,
			hclsyntax.TokenEqual, hclsyntax.TokenEOF,
			hclsyntax.TokenInvalid, hclsyntax.TokenBadUTF8, hclsyntax.TokenQuotedNewline: // no parser goes deeper for these
		default:
			top.operators++
			depth++
		}
		if depth > maxDepth {
			return tooDeep(t.Range)
		}
	}
	return nil
}

func tooDeep(at hcl.Range) *hcl.Diagnostic {
	return guardError(at, "Nested too deeply", "Brackets, operators and template sequences may nest at most %d deep. "+
		"Give a name to a part of it in a locals block.", maxDepth)
}

func guardError(at hcl.Range, summary, detail string, args ...any) *hcl.Diagnostic {
	return &hcl.Diagnostic{
		Severity: hcl.DiagError,
		Summary:  summary,
		Detail:   fmt.Sprintf(detail, args...),
		Subject:  &at,
	}
}

func smallExponent(number []byte) bool {
	if len(number) > maxExponent {
		return false
	}
	_, exp, ok := bytes.Cut(bytes.ToLower(number), []byte("e"))
	if !ok {
		return true
	}
	n, err := strconv.Atoi(string(exp))
	return err == nil && n <= maxExponent && n >= -maxExponent
}

// guardJSON walks the tokens without recursion. Where the text is no JSON it stops
// looking: HCL's parser, which is bounded by the depth found until there, says so.
func guardJSON(src []byte, path string) *hcl.Diagnostic {
	if at, deep := jsonDepth(src); deep {
		return tooDeep(rangeAt(src, path, at))
	}
	dec := json.NewDecoder(bytes.NewReader(src))
	dec.UseNumber()
	for {
		tok, err := dec.Token()
		if err != nil {
			return nil
		}
		var d *hcl.Diagnostic
		switch tok := tok.(type) {
		case json.Number:
			if !smallExponent([]byte(tok)) {
				d = guardError(hcl.Range{}, "Too large a number", "The exponent of a number may be at most %d.", maxExponent)
			}
		case string:
			d = guardJSONString(tok)
		}
		if d != nil {
			// Only now: finding the line of every token would make a large file's time quadratic.
			at := rangeAt(src, path, int(dec.InputOffset())-1)
			d.Subject = &at
			return d
		}
	}
}

// guardJSONString guards a string both as the template and, in the places where HCL
// reads it so, as the bare expression that it may be.
func guardJSONString(s string) *hcl.Diagnostic {
	tokens, _ := hclsyntax.LexTemplate([]byte(s), "", hcl.InitialPos)
	return guardTokens(tokens)
}

// jsonDepth finds where brackets outside of strings nest too deeply.
func jsonDepth(src []byte) (at int, deep bool) {
	depth, inString := 0, false
	for i := 0; i < len(src); i++ {
		switch c := src[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '[' || c == '{':
			if depth++; depth > maxDepth {
				return i, true
			}
		case c == ']' || c == '}':
			depth--
		}
	}
	return 0, false
}

// rangeAt is the position of one byte. It counts lines from the start, so it is for
// findings only.
func rangeAt(src []byte, path string, at int) hcl.Range {
	at = max(0, min(at, len(src)))
	line := 1 + bytes.Count(src[:at], []byte("\n"))
	col := at - bytes.LastIndexByte(src[:at], '\n')
	pos := hcl.Pos{Line: line, Column: col, Byte: at}
	end := hcl.Pos{Line: line, Column: col + 1, Byte: at + 1}
	return hcl.Range{Filename: path, Start: pos, End: end}
}

// guardType refuses a type in JSON syntax, where the expression hides in a string,
// that would nest too deeply.
func (l *loader) guardType(expr hcl.Expression) bool {
	if s, ok := jsonString(expr); ok {
		if d := guardExprText([]byte(s)); d != nil {
			d.Subject = expr.Range().Ptr()
			l.diags = append(l.diags, d)
			return false
		}
	}
	return true
}

// jsonString is the text of an expression that is a string in JSON syntax.
func jsonString(expr hcl.Expression) (string, bool) {
	if _, native := expr.(hclsyntax.Expression); native {
		return "", false
	}
	raw, _ := expr.Value(nil)
	if raw.Type() != cty.String || !raw.IsKnown() || raw.IsNull() {
		return "", false
	}
	return raw.AsString(), true
}

// guardExpr refuses an expression that would take too much work.
func (l *loader) guardExpr(expr hcl.Expression) bool {
	work := estimate(expr, l.resolve)
	if work > maxWork {
		l.errorf(expr.Range().Ptr(), "Too much work", "Evaluating this could touch more than %d million elements and bytes. "+
			"Use fewer for expressions within each other, or shorter lists.", maxWork>>20)
		return false
	}
	before := l.work
	l.work += work
	if l.work > maxTotalWork {
		if before <= maxTotalWork { // say it once
			l.errorf(expr.Range().Ptr(), "Too much work", "Evaluating the whole spec could touch more than %d million elements and "+
				"bytes, from here on. Use fewer for expressions within each other, or shorter lists.", maxTotalWork>>20)
		}
		return false
	}
	return true
}

// resolve is what a reference stands for, as far as is known.
func (l *loader) resolve(t hcl.Traversal) cty.Value {
	val, diags := t.TraverseAbs(l.scope.ctx)
	if diags.HasErrors() {
		return cty.DynamicVal
	}
	return val
}
