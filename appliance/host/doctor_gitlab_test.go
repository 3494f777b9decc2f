package host

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

func TestDoctorDestinations(t *testing.T) {
	subnet6 := netip.MustParsePrefix("fd7e:1ee7::/64")
	private := func(a netip.Addr) string {
		if a.Unmap().IsPrivate() {
			return "it is private"
		}
		return ""
	}
	for _, tt := range []struct {
		name    string
		answer  []string
		err     error
		subnet6 *netip.Prefix
		want    Finding
	}{
		{"public", []string{"198.51.100.7"}, nil, nil,
			Finding{"reach", StatusOK, "workers may connect to GitLab at gitlab.example.com", "", false}},
		{"private", []string{"::ffff:10.20.0.3"}, nil, nil,
			Finding{"reach", StatusWarn, "workers cannot connect to GitLab at gitlab.example.com:443 (10.20.0.3): it is private", "egress for ::ffff:10.20.0.3", false}},
		{"one of two", []string{"198.51.100.7", "10.20.0.3"}, nil, nil,
			Finding{"reach", StatusWarn, "workers cannot connect to GitLab at gitlab.example.com:443 (10.20.0.3): it is private", "egress for 10.20.0.3", false}},
		{"private IPv6, which workers do not have", []string{"198.51.100.7", "fd00::3"}, nil, nil,
			Finding{"reach", StatusOK, "workers may connect to GitLab at gitlab.example.com", "", false}},
		{"private IPv6, which they have", []string{"198.51.100.7", "fd00::3"}, nil, &subnet6,
			Finding{"reach", StatusWarn, "workers cannot connect to GitLab at gitlab.example.com:443 (fd00::3): it is private", "egress for fd00::3", false}},
		{"no name", nil, errors.New("no such host"), nil,
			Finding{"reach", StatusWarn, "GitLab at gitlab.example.com: no such host", "getent ahosts gitlab.example.com", false}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := &doctor{plan: &plan.Plan{Network: plan.Network{Subnet6: tt.subnet6}}, probes: Probes{
				Destinations: []Destination{{What: "GitLab", Name: "gitlab.example.com", Port: 443, Denies: private,
					Cure: func(a netip.Addr) string { return "egress\n  for " + a.String() }}},
				Resolve: func(ctx context.Context, name string) ([]netip.Addr, error) {
					if _, ok := ctx.Deadline(); !ok || name != "gitlab.example.com" {
						t.Errorf("asked for %q, with a deadline: %v", name, ok)
					}
					var all []netip.Addr
					for _, a := range tt.answer {
						all = append(all, netip.MustParseAddr(a))
					}
					return all, tt.err
				},
			}}
			d.destinations(t.Context())
			if !slices.Equal(d.found, []Finding{tt.want}) {
				t.Errorf("found %+v\nwant  %+v", d.found, tt.want)
			}
		})
	}
}
