package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hcled"
	"golang.org/x/term"

	"github.com/fleetingd/fleetingd/appliance/visible"
)

// diagnostic is a finding in the format of `terraform validate -json`, which editors
// and CI can read
// (https://developer.hashicorp.com/terraform/cli/commands/validate#json-output-format).
type diagnostic struct {
	Severity string       `json:"severity"` // error, warning
	Summary  string       `json:"summary"`
	Detail   string       `json:"detail,omitempty"`
	Range    *sourceRange `json:"range,omitempty"`
	Snippet  *snippet     `json:"snippet,omitempty"`
}

type sourceRange struct {
	Filename string    `json:"filename"`
	Start    sourcePos `json:"start"`
	End      sourcePos `json:"end"`
}

type sourcePos struct {
	Line   int `json:"line"`
	Column int `json:"column"` // in characters, from 1
	Byte   int `json:"byte"`   // in the file, from 0
}

// snippet holds the source lines of a finding. The offsets are bytes of Code.
type snippet struct {
	Context   *string  `json:"context"` // `pool "small"`
	Code      string   `json:"code"`
	StartLine int      `json:"start_line"`
	Start     int      `json:"highlight_start_offset"`
	End       int      `json:"highlight_end_offset"`
	Values    []string `json:"values"` // always empty: values may be secret
}

func newDiagnostic(d *hcl.Diagnostic, files map[string]*hcl.File) diagnostic {
	out := diagnostic{Severity: "error", Summary: d.Summary, Detail: d.Detail}
	if d.Severity == hcl.DiagWarning {
		out.Severity = "warning"
	}
	if d.Subject == nil {
		return out
	}
	r := *d.Subject
	out.Range = &sourceRange{r.Filename, position(r.Start), position(r.End)}
	if f := files[r.Filename]; f != nil {
		out.Snippet = newSnippet(f, r)
	}
	return out
}

func position(p hcl.Pos) sourcePos { return sourcePos{p.Line, p.Column, p.Byte} }

const (
	snippetLines = 4
	snippetWidth = 200 // bytes of a line: a spec may be a single line of a megabyte
)

// newSnippet returns the lines of a range of a file, or nil if the range is not within
// the file.
func newSnippet(f *hcl.File, r hcl.Range) *snippet {
	src := f.Bytes
	if r.Start.Byte < 0 || r.Start.Byte > len(src) || r.Start.Byte > r.End.Byte {
		return nil
	}
	end := min(r.End.Byte, len(src))
	from := 1 + bytes.LastIndexByte(src[:r.Start.Byte], '\n')
	from = max(from, r.Start.Byte-snippetWidth/2)
	to, lines := r.Start.Byte, 0
	for to < len(src) && to-r.Start.Byte < snippetWidth*snippetLines {
		if src[to] == '\n' {
			if lines++; lines == snippetLines || to >= end {
				break
			}
		}
		to++
	}
	if lines == 0 {
		to = min(to, r.Start.Byte+snippetWidth)
	}
	for from > 0 && from < len(src) && !utf8.RuneStart(src[from]) {
		from--
	}
	s := &snippet{
		Code:      strings.ToValidUTF8(strings.TrimRight(string(src[from:to]), "\r\n"), "?"),
		StartLine: r.Start.Line,
		Start:     r.Start.Byte - from,
		Values:    []string{},
	}
	s.Start = min(s.Start, len(s.Code))
	s.End = max(s.Start, min(end-from, len(s.Code)))
	if c := hcled.ContextString(f, r.Start.Byte); c != "" {
		s.Context = &c
	}
	return s
}

// diagnosticPrinter prints findings for people.
type diagnosticPrinter struct {
	w     io.Writer
	color bool
	width int // where lines are wrapped; 0: not at all
}

// newDiagnosticPrinter colours and wraps output to a terminal (https://no-color.org);
// in a pipe each sentence stays on one line, for grep.
func newDiagnosticPrinter(w io.Writer) diagnosticPrinter {
	p := diagnosticPrinter{w: w}
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return p
	}
	p.color = os.Getenv("NO_COLOR") == ""
	if width, _, err := term.GetSize(int(f.Fd())); err == nil {
		p.width = min(width, 100)
	}
	return p
}

func (p diagnosticPrinter) print(d diagnostic) {
	title, code := "Error", "31"
	if d.Severity == "warning" {
		title, code = "Warning", "33"
	}
	fmt.Fprintf(p.w, "%s: %s\n\n", p.paint(code, title), p.paint("1", visible.Columns(d.Summary)))
	if d.Range != nil {
		p.source(d)
	}
	if d.Detail != "" {
		for line := range strings.Lines(d.Detail) {
			fmt.Fprintf(p.w, "%s\n", wrap(visible.Columns(strings.TrimSuffix(line, "\n")), p.width))
		}
		fmt.Fprintln(p.w)
	}
}

func (p diagnosticPrinter) source(d diagnostic) {
	in := ":"
	if d.Snippet != nil && d.Snippet.Context != nil {
		in = ", in " + visible.Columns(*d.Snippet.Context) + ":"
	}
	fmt.Fprintf(p.w, "  on %s line %d, column %d%s\n", visible.Columns(d.Range.Filename), d.Range.Start.Line, d.Range.Start.Column, in)
	if s := d.Snippet; s != nil {
		for i, line := range strings.Split(s.Code, "\n") {
			fmt.Fprintf(p.w, "%4d: %s\n", s.StartLine+i, visible.Columns(line))
			if i == 0 {
				fmt.Fprintf(p.w, "      %s\n", p.paint("31", marker(line, s.Start, s.End)))
			}
		}
	}
	fmt.Fprintln(p.w)
}

// marker underlines the bytes from start to end of a line.
func marker(line string, start, end int) string {
	start = min(start, len(line))
	end = min(max(end, start), len(line))
	indent := strings.Map(func(r rune) rune {
		if r == '\t' {
			return r
		}
		return ' '
	}, line[:start])
	return indent + strings.Repeat("^", max(1, utf8.RuneCountInString(line[start:end])))
}

func (p diagnosticPrinter) paint(code, s string) string {
	if !p.color {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

// wrap breaks a line between words. An indented line is an example and stays unchanged.
func wrap(s string, width int) string {
	if width == 0 || strings.HasPrefix(s, " ") {
		return s
	}
	var b strings.Builder
	col := 0
	for i, word := range strings.Split(s, " ") {
		n := utf8.RuneCountInString(word)
		switch {
		case i == 0:
		case col+1+n > width:
			b.WriteByte('\n')
			col = 0
		default:
			b.WriteByte(' ')
			col++
		}
		b.WriteString(word)
		col += n
	}
	return b.String()
}
