package compile_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"text/tabwriter"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// Why checks of `systemd-analyze security` fail on purpose, by the check's name: for every service, for the unprivileged ones, and
// for the one that is root.
var (
	exposed = map[string]string{
		"SystemCallFilter=~@resources":        "part of @system-service: Go and the VMMs set limits and priorities of their threads",
		"SystemCallFilter=~@privileged":       "part of @system-service: without capabilities these calls return EPERM anyway",
		"RootDirectory=/RootImage=":           "it works on the host's files; ProtectSystem=strict keeps it from writing to others",
		"PrivateDevices=":                     "it needs /dev/net/tun and /dev/kvm; DevicePolicy=closed denies the others",
		"DeviceAllow=":                        "it needs /dev/net/tun and /dev/kvm",
		"PrivateNetwork=":                     "the workers' network is the host's",
		"PrivateUsers=":                       "TAPs and files belong to users of the host",
		"IPAddressDeny=":                      "the addresses of GitLab, mirrors and workers are the site's",
		"RestrictAddressFamilies=~AF_NETLINK": "it reads links and routes",
		"RestrictAddressFamilies=~AF_UNIX":    "it logs to the journal, and controls VMMs through sockets",
		"ProcSubset=":                         "it reads /proc/sys and /proc/meminfo",
	}
	exposedUser = map[string]string{
		"RestrictAddressFamilies=~AF_(INET|INET6)": "it connects to GitLab, mirrors and workers",
		"SupplementaryGroups=":                     "the group kvm may open /dev/kvm",
		"ProtectControlGroups=":                    "each VMM gets a cgroup with its pool's limits",
		"Delegate=":                                "each VMM gets a cgroup with its pool's limits",
		"MemoryDenyWriteExecute=":                  "QEMU's software emulation writes code and runs it",
	}
	exposedRoot = map[string]string{
		"User=/DynamicUser=":                   "it changes links, routes and the firewall",
		"CapabilityBoundingSet=~CAP_NET_ADMIN": "it changes links, routes and the firewall",
		"ProtectKernelTunables=":               "it writes the TAPs' settings below /proc/sys/net",
		"UMask=":                               "everyone may read its notes",
	}
)

// TestUnitSecurity prints what systemd-analyze finds in each service, with the reason beside each point, and fails on a point without a
// reason. An unprivileged service may have an exposure of 2.0 at most.
func TestUnitSecurity(t *testing.T) {
	need.Tools(t, "systemd-analyze")
	golden(t, func(t *testing.T, _, _ string, p *plan.Plan) {
		dir := t.TempDir()
		for _, f := range p.Files {
			if name, ok := strings.CutPrefix(f.Path, "/etc/systemd/system/"); ok {
				write(t, filepath.Join(dir, name), f.Content)
			}
		}
		services := []string{"fleetingd-network.service"}
		if p.Refresh > 0 {
			services = append(services, "fleetingd-refresh.service")
		}
		if len(p.Runners) > 0 {
			services = append(services, "gitlab-runner.service")
			write(t, filepath.Join(dir, "gitlab-runner.service"), "[Service]\nExecStart=/usr/bin/gitlab-runner run\n")
		}
		for _, s := range services {
			reasons, most := maps.Clone(exposed), 2.0
			if s == "fleetingd-network.service" {
				maps.Copy(reasons, exposedRoot)
				most = 2.1
			} else {
				maps.Copy(reasons, exposedUser)
			}
			checkSecurity(t, filepath.Join(dir, s), reasons, most)
		}
	})
}

// checkSecurity runs `systemd-analyze security` on a unit file and its drop-ins. most is the exposure it may have, from 0 to 10.
func checkSecurity(t *testing.T, unit string, reasons map[string]string, most float64) {
	t.Helper()
	analyze := func(args ...string) ([]byte, error) {
		cmd := exec.CommandContext(t.Context(), "systemd-analyze", append([]string{"security", "--offline=true", "--no-pager"}, args...)...)
		cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+filepath.Dir(unit)+":")
		return cmd.Output()
	}
	out, err := analyze("--json=short", unit)
	if err != nil {
		t.Fatalf("systemd-analyze security %s: %v\n%s", unit, err, out)
	}
	var checks []struct {
		Name     string
		Set      *bool   // null: the check does not apply
		Exposure *string // "0.2"; null: none
	}
	if err := json.Unmarshal(out, &checks); err != nil {
		t.Fatalf("systemd-analyze security --json: %v\n%s", err, out)
	}
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	for _, c := range checks {
		if c.Set == nil || *c.Set || c.Exposure == nil {
			continue
		}
		reason := reasons[c.Name]
		if reason == "" {
			t.Errorf("%s: %s costs %s: set it, or give the reason not to", filepath.Base(unit), c.Name, *c.Exposure)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", *c.Exposure, c.Name, reason)
	}
	w.Flush()
	t.Logf("%s:\n%s", filepath.Base(unit), table.String())
	// The threshold is ten times the exposure; above it, the command exits with 1.
	if out, err := analyze(fmt.Sprintf("--threshold=%.0f", most*10), unit); err != nil {
		t.Errorf("%s is exposed by more than %.1f: %v\n%s", filepath.Base(unit), most, err, out)
	}
}
