package plan

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"iter"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Text is text with secrets in it, in pieces. It holds where to read each secret, never its value.
type Text []Piece

// Piece is a part of a Text: a Literal, the secret at From, or the result of the function Op on the text Of.
type Piece struct {
	Literal string `json:"text,omitempty"`
	From    string `json:"from,omitempty"` // "file:/run/secrets/x", "env:NAME", "var:name", or "spec:PLACE", for the reader of the spec
	Op      string `json:"op,omitempty"`   // trimspace, chomp, base64encode, or jsonencode (without the quotes around the result)
	Of      Text   `json:"of,omitempty"`
}

// Places yields the From of each secret in the text, in order.
func (t Text) Places() iter.Seq[string] {
	return func(yield func(string) bool) { t.each(yield) }
}

func (t Text) each(yield func(string) bool) bool {
	for _, p := range t {
		if p.From != "" && !yield(p.From) || !p.Of.each(yield) {
			return false
		}
	}
	return true
}

// Read assembles the text; read returns the secret at a place. Its own errors never hold a value.
func (t Text) Read(read func(from string) (string, error)) (string, error) {
	var b strings.Builder
	for _, p := range t {
		text, err := p.read(read)
		if err != nil {
			return "", err
		}
		b.WriteString(text)
	}
	return b.String(), nil
}

func (p Piece) read(read func(from string) (string, error)) (string, error) {
	switch {
	case p.From != "":
		return read(p.From)
	case p.Op == "":
		return p.Literal, nil
	}
	of, err := p.Of.Read(read)
	if err != nil {
		return "", err
	}
	return ops[p.Op](of), nil
}

var ops = map[string]func(string) string{
	"trimspace":    strings.TrimSpace,
	"chomp":        func(s string) string { return strings.TrimRight(s, "\r\n") },
	"base64encode": func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) },
	"jsonencode": func(s string) string {
		b, _ := json.Marshal(s) // cannot fail for a string
		return string(b[1 : len(b)-1])
	},
}

func (t Text) check(f *findings, where string) {
	for i, p := range t {
		f.unless(count(p.Literal != "", p.From != "", p.Op != "") == 1, "%s: piece %d needs exactly one of text, from and op", where, i)
		if p.Op != "" {
			f.unless(ops[p.Op] != nil && len(p.Of) > 0, "%s: piece %d: %q is not a function with a text", where, i, p.Op)
		}
		if p.From != "" {
			kind, place, ok := strings.Cut(p.From, ":")
			f.unless(ok && place != "" && oneOf(kind, "file", "env", "var", "spec"), "%s: piece %d: %q is not the place of a secret",
				where, i, p.From)
		}
		p.Of.check(f, where)
	}
}

// Fill returns the file's content with its secrets in place of their placeholders; read returns the secret at a place.
// Placeholders are always within a basic string of TOML, between double quotes. Its own errors never hold a value.
func (f *File) Fill(read func(from string) (string, error)) (string, error) {
	var pairs []string
	for _, s := range f.Secrets {
		value, err := Text{s.Secret}.Read(read)
		if err != nil {
			return "", fmt.Errorf("%s: secret for %s: %w", f.Path, s.Placeholder, err)
		}
		if !utf8.ValidString(value) {
			return "", fmt.Errorf("%s: secret for %s: it is not UTF-8 text", f.Path, s.Placeholder)
		}
		pairs = append(pairs, s.Placeholder, escapeTOML(value))
	}
	// One pass, so that a placeholder in a secret's value is not replaced.
	return strings.NewReplacer(pairs...).Replace(f.Content), nil
}

// escapeTOML escapes text for a basic string (https://toml.io/en/v1.0.0#string).
func escapeTOML(s string) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r == '\r':
			b.WriteString(`\r`)
		case unicode.IsControl(r):
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}
