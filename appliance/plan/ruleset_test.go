package plan_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// nft strings have no escapes, so a user's text must not be able to end one.
func TestComment(t *testing.T) {
	for in, want := range map[string]string{
		"egress artifact-store":     "egress artifact-store",
		"a \" b' \\ ; $(x)\n{}\x00": "a _ b' _ _ _(x)____",
		"größe":                     "gr__e",
		strings.Repeat("x", 200):    strings.Repeat("x", 128),
	} {
		if got := plan.Comment(in); got != want {
			t.Errorf("Comment(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestSetValues(t *testing.T) {
	six := netip.MustParseAddr("fd00::2")
	slots := []plan.Slot{{TAP: "fleet0", Address: netip.MustParseAddr("10.0.0.2"), Address6: &six}}
	s := plan.Set{Key: []plan.DataType{plan.TypeIFName, plan.TypeIPv4, plan.TypeIPv6}, Slots: true}
	if diff := cmp.Diff([][]string{{"fleet0", "10.0.0.2", "fd00::2"}}, s.Values(slots)); diff != "" {
		t.Errorf("a set of slots: %s", diff)
	}
	s = plan.Set{Key: []plan.DataType{plan.TypePort}, Elements: []string{"22", "80-90"}}
	if diff := cmp.Diff([][]string{{"22"}, {"80-90"}}, s.Values(slots)); diff != "" {
		t.Errorf("a set of ports: %s", diff)
	}
}
