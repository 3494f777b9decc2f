// Package visible makes text that comes from elsewhere (a guest, a server, a file name) safe for a terminal and for one line of a log:
// nothing in it can move the cursor, change a title or reorder the text around it.
package visible

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Text returns s with colours taken out and every other control or invisible character written as Go would write it ("\x1b", "\u202e").
// A tab stays.
func Text(s string) string { return escape(s, 1<<62) }

// Cut is Text for a text that may be of any length: it stops after about n bytes.
func Cut(s string, n int) string { return escape(s, n) }

func escape(s string, n int) string {
	var b strings.Builder
	for i := 0; i < len(s) && b.Len() < n; {
		if end := colour(s[i:]); end > 0 {
			i += end
			continue
		}
		r, size := rune(s[i]), 1
		if r >= 0x80 {
			r, size = utf8.DecodeRuneInString(s[i:])
		}
		switch {
		case r == unicode.ReplacementChar && size == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case r == '\t' || unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			q := strconv.QuoteRune(r)
			b.WriteString(q[1 : len(q)-1])
		}
		i += size
	}
	return b.String()
}

// LastLines returns the last lines of s that are not blank, n at most, each made fit as Text does. A carriage return ends a line, too, as
// progress bars use it; zeros at the start of s are what a hole in a file reads as.
func LastLines(s string, n int) []string {
	var last []string
	for line := range strings.FieldsFuncSeq(strings.TrimLeft(s, "\x00"), func(r rune) bool { return r == '\n' || r == '\r' }) {
		if line = strings.TrimRight(line, " \t"); line != "" {
			last = append(last[max(0, len(last)-n+1):], line)
		}
	}
	for i, line := range last {
		last[i] = Text(line)
	}
	return last
}

// colour is the length of the SGR sequence ("\x1b[1;31m", ECMA-48 8.3.117) that s begins with, or 0.
func colour(s string) int {
	if !strings.HasPrefix(s, "\x1b[") {
		return 0
	}
	end := 2 + len(s[2:]) - len(strings.TrimLeft(s[2:], "0123456789;"))
	if end < len(s) && s[end] == 'm' {
		return end + 1
	}
	return 0
}

// Columns returns s with each such character replaced by one that is as wide, for text in which columns are counted.
func Columns(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return utf8.RuneError
	}, s)
}
