// Package suggest finds the known name that a mistyped one most likely stands for.
package suggest

import (
	"fmt"
	"slices"
	"strings"

	"github.com/agext/levenshtein"
)

// longest is the length in bytes of the longest name that is compared, since the distance is quadratic in it.
const longest = 64

// DidYouMean returns ` (did you mean "x"?)` for the known name x that is nearest to given, or "" if none is near.
func DidYouMean(given string, known []string) string {
	if s := Nearest(given, known); s != "" {
		return fmt.Sprintf(" (did you mean %q?)", s)
	}
	return ""
}

// Nearest returns the known name that is one or two typos away from given, or begins like it, or "" if none is near.
// It ignores case, and its answer does not depend on the order of known.
func Nearest(given string, known []string) string {
	if len(given) > longest {
		return ""
	}
	known = slices.Sorted(slices.Values(known))
	best, bestDist := "", 3
	for _, k := range known {
		a, b := strings.ToLower(given), strings.ToLower(k)
		d := levenshtein.Distance(a, b, nil)
		// Two wrong letters of three make another word, unless they are only swapped.
		if d < bestDist && (d <= len(k)/2 || letters(a) == letters(b)) {
			best, bestDist = k, d
		}
	}
	if best != "" {
		return best
	}
	for _, k := range known {
		if min(len(given), len(k)) >= 3 && (strings.HasPrefix(k, given) || strings.HasPrefix(given, k)) {
			return k
		}
	}
	return ""
}

// letters returns the bytes of s in order.
func letters(s string) string {
	b := []byte(s)
	slices.Sort(b)
	return string(b)
}
