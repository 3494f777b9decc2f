package netrange

import (
	"net/netip"
	"slices"
	"testing"
)

func TestTakers(t *testing.T) {
	for _, tt := range []struct {
		subnet string
		by     []string
	}{
		{"172.16.120.0/22", nil}, // the default
		{"172.16.0.0/16", nil},
		{"172.17.0.0/24", []string{"Docker"}},
		{"172.31.255.0/24", []string{"Docker"}},
		{"172.16.0.0/12", []string{"Docker"}},
		{"172.32.0.0/16", nil},
		{"192.168.122.0/25", []string{"Docker", "libvirt"}},
		{"10.0.1.0/24", []string{"Docker Swarm"}},
		{"10.64.0.0/16", nil},
		{"10.89.3.0/24", []string{"Podman"}},
		{"10.43.7.0/24", []string{"k3s"}},
		{"10.111.0.0/16", []string{"Kubernetes (kubeadm)"}},
		{"10.112.0.0/16", nil},
		{"100.100.0.0/16", []string{"Tailscale"}},
		{"fd7e:1ee7::/64", nil},
	} {
		if got := Takers(netip.MustParsePrefix(tt.subnet)); !slices.Equal(got, tt.by) {
			t.Errorf("%s: %q, want %q", tt.subnet, got, tt.by)
		}
	}
}

// TestFree looks for a range of every size, with more and more of the machine in use.
func TestFree(t *testing.T) {
	for _, tt := range []struct {
		bits int
		used []string
		want string // "": none
	}{
		{22, nil, "172.16.120.0/22"},
		{24, nil, "172.16.120.0/24"},
		{16, nil, "172.16.0.0/16"},
		{12, nil, "10.16.0.0/12"},
		{24, []string{"172.16.120.0/22"}, "172.16.0.0/24"},
		{24, []string{"172.16.120.0/22", "172.16.0.0/30"}, "172.16.16.0/24"},
		{24, []string{"172.16.0.0/16"}, "10.2.0.0/24"},
		{22, []string{"172.16.0.0/12", "10.0.0.0/9"}, "10.128.0.0/22"},
		{22, []string{"172.16.0.0/12", "10.0.0.0/8"}, ""},
		{8, nil, ""},
	} {
		used := func(p netip.Prefix) bool {
			return slices.ContainsFunc(tt.used, func(u string) bool { return netip.MustParsePrefix(u).Overlaps(p) })
		}
		got, ok := Free(tt.bits, used)
		if ok != (tt.want != "") || ok && got.String() != tt.want {
			t.Errorf("/%d beside %v: %s %v, want %s", tt.bits, tt.used, got, ok, tt.want)
		}
	}
	// Whatever the size, what is proposed is a network of that size which nobody takes.
	for bits := 8; bits <= 32; bits++ {
		got, ok := Free(bits, func(netip.Prefix) bool { return false })
		if ok && (got.Bits() != bits || got != got.Masked() || Takers(got) != nil || !got.Addr().IsPrivate()) {
			t.Errorf("/%d: %s, which %q take", bits, got, Takers(got))
		}
		if !ok && bits >= 12 {
			t.Errorf("/%d: none", bits)
		}
	}
}
