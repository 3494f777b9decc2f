package visible

import (
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestText(t *testing.T) {
	for in, want := range map[string]string{
		"plain ünï\tcode":         "plain ünï\tcode",
		"\x1b[1;31mred\x1b[0m":    "red",
		"\x1b[2Jcleared":          `\x1b[2Jcleared`,
		"\x1b]0;title\x07":        `\x1b]0;title\a`,
		"two\r\nlines":            `two\r\nlines`,
		"\u202eevil":              `\u202eevil`,
		"zero\u200bwidth":         `zero\u200bwidth`,
		"no \xff UTF-8":           `no \xff UTF-8`,
		"the character \ufffd":    "the character \ufffd",
		"a backslash \\x1b stays": `a backslash \x1b stays`,
	} {
		if got := Text(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
	if got := Cut(strings.Repeat("\x00", 1000), 10); len(got) > 10+len(`\x00`) {
		t.Errorf("%d bytes", len(got))
	}
	if got := Columns("a\x1b\u202eb\tü"); got != "a\ufffd\ufffdb\tü" {
		t.Errorf("%q", got)
	}
}

func TestLastLines(t *testing.T) {
	for in, want := range map[string][]string{
		"":                         nil,
		"\n \r\n":                  nil,
		"one":                      {"one"},
		"one\r\ntwo\n":             {"one", "two"},
		"1\n2\n\n3 \n  4\n":        {"2", "3", "  4"},
		"10%\r20%\r30%\r100%\r\n":  {"20%", "30%", "100%"},
		"\x00\x00\x00after a hole": {"after a hole"},
		"a\x1b[2J\nb\x00c\n":       {`a\x1b[2J`, `b\x00c`},
	} {
		if got := LastLines(in, 3); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("\x1b[31m\u202e\xff")
	f.Fuzz(func(t *testing.T, s string) {
		for _, r := range Text(s) + Columns(s) {
			if r != '\t' && !unicode.IsPrint(r) && r != utf8.RuneError {
				t.Fatalf("%q lets %q through", s, r)
			}
		}
		if utf8.RuneCountInString(Columns(s)) != utf8.RuneCountInString(s) {
			t.Fatalf("%q: another number of columns", s)
		}
	})
}
