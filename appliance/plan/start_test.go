package plan

import (
	"strings"
	"testing"
)

func TestCanStart(t *testing.T) {
	for _, c := range []struct {
		driver string
		pool   Pool
		want   string // in the error, "" for none
	}{
		{"qemu", Pool{Start: "cold", Limits: Limits{CPUQuotaPercent: 100, DiskIOPS: 10}}, ""},
		{"qemu", Pool{Start: "warm"}, `write start = "cold"`},
		{"cloud-hypervisor", Pool{Start: "warm"}, `write start = "cold"`},
		{"qemu", Pool{Start: "cold", Limits: Limits{NetworkMbps: 1}}, "remove network_mbps from the pool's limits"},
		{"cloud-hypervisor", Pool{Start: "cold", Limits: Limits{NetworkMbps: 1}}, ""},
	} {
		c.pool.Name = "p"
		err := (&Plan{Hypervisor: Hypervisor{Driver: c.driver}}).CanStart(&c.pool)
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s, %+v: %v", c.driver, c.pool, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), `pool "p"`) || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s, %+v: %v, want %q", c.driver, c.pool, err, c.want)
		}
	}
}
