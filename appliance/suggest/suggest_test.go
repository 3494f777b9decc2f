package suggest

import (
	"slices"
	"strings"
	"testing"
)

func TestNearest(t *testing.T) {
	keys := []string{"pool", "plan", "vm_memory_mb", "vm_subnet"}
	long := strings.Repeat("x", 65)
	for _, c := range []struct {
		given string
		known []string
		want  string
	}{
		{"plan", keys, "plan"},
		{"Plan", keys, "plan"},
		{"pol", keys, "pool"},
		{"vm_memory_md", keys, "vm_memory_mb"},
		{"VM_SUBNETT", keys, "vm_subnet"},
		{"gid", []string{"ID"}, "ID"},
		{"egress", keys, ""},
		{"", keys, ""},
		{"", []string{"a", "ab"}, ""},
		{"plan", nil, ""},
		// Two wrong letters of three make another word, unless they are only swapped.
		{"vat", []string{"var", "vote"}, "var"},
		{"bat", []string{"var"}, ""},
		{"vra", []string{"var"}, "var"},
		{"vars", []string{"local", "var"}, "var"},
		{"variable", []string{"local", "var"}, "var"},
		// One begins with the other.
		{"cloudhypervisor-v2", []string{"cloudhypervisor", "qemu"}, "cloudhypervisor"},
		{"net", []string{"image", "network"}, "network"},
		{"ne", []string{"image", "network"}, ""},
		{"networks-of-b", []string{"ne"}, ""},
		// The nearer one wins, and the first by name of two that are as near.
		{"smalls", []string{"smell", "small"}, "small"},
		{"pool-c", []string{"pool-b", "pool-a"}, "pool-a"},
		{long, []string{long}, ""},
		{"b\xff\x00", []string{"bad"}, ""},
	} {
		if got := Nearest(c.given, c.known); got != c.want {
			t.Errorf("Nearest(%q, %q) = %q, want %q", c.given, c.known, got, c.want)
		}
		reversed := slices.Clone(c.known)
		slices.Reverse(reversed)
		if got := Nearest(c.given, reversed); got != c.want {
			t.Errorf("Nearest(%q, %q) = %q, want %q", c.given, reversed, got, c.want)
		}
	}
}

func TestDidYouMean(t *testing.T) {
	if got, want := DidYouMean("pol", []string{"pool", "plan"}), ` (did you mean "pool"?)`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := DidYouMean("egress", []string{"pool", "plan"}); got != "" {
		t.Errorf("got %q, want nothing", got)
	}
}
