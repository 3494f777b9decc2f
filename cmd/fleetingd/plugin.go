package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"gitlab.com/gitlab-org/fleeting/fleeting/plugin"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/fleet"
	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// pluginName is the program's name when it is the plugin and nothing else: GitLab Runner looks
// `fleeting-plugin-…` up in PATH.
const pluginName = "fleeting-plugin-fleetingd"

// The magic cookie that go-plugin puts into a plugin's environment. fleeting keeps its own
// constants for it internal (fleeting/internal/plugin/plugin.go).
const (
	cookieKey   = "FLEETING_INSTANCE_GROUP_PLUGIN"
	cookieValue = "4c6410b1-cb78-4962-8c76-ab936d0ea908"
)

// isPlugin reports whether this process was started as the plugin: by its name, or by GitLab Runner with the
// path of fleetingd itself. The runner gives no arguments; a command of fleetingd that a plugin starts inherits
// the cookie, and has some.
func isPlugin(args []string) bool {
	if filepath.Base(args[0]) == pluginName {
		return true
	}
	return len(args) == 1 && os.Getenv(cookieKey) == cookieValue
}

// servePlugin is the plugin's main function. It takes its arguments (`version`, `bootstrap`) from the command line.
func servePlugin() {
	v := plugin.VersionInfo{Name: pluginName, Version: version, Reference: version}
	fleet.Serve(fleet.New(fleet.Options{
		Version:   v.String(),
		BuildInfo: v.BuildInfo(),
		Driver:    vm.Open,
		Routes:    routes,

		Secrets:     readSecret,
		Predecessor: &fleet.Predecessor{Keys: hostspec.PredecessorKeys, Plan: predecessorPlan, Up: predecessorUp},
	}), v)
}

// routes sorts the troubles that the host's routing makes: without a way to its workers, the plugin cannot work.
func routes(p *plan.Plan, slots []plan.Slot) (troubles []string, err error) {
	found, err := host.Troubles(p, slots)
	if err != nil {
		return nil, err
	}
	var lost []error
	for _, t := range found {
		if t.Lost {
			lost = append(lost, errors.New("network: "+t.String()))
		} else {
			troubles = append(troubles, t.String())
		}
	}
	return troubles, errors.Join(lost...)
}

// readSecret reads a secret of a prebuild with this process's own rights and environment.
func readSecret(from string) (string, error) { return hostspec.ReadSecret(from, os.Environ()) }

// predecessorPlan compiles the predecessor's plugin_config to a Plan. There is no other user on such a host:
// the plugin and the VMMs run as what the runner runs as, which was and is root.
func predecessorPlan(keys map[string]any) (*plan.Plan, error) {
	machine, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	h, diags := hostspec.FromPredecessor(keys, hostspec.PredecessorOptions{
		Machine: machine, Arch: runtime.GOARCH, Environ: os.Environ(),
	})
	if diags.HasErrors() {
		return nil, errors.New(oneLine(diags))
	}
	p, diags := compile.Compile(h, compile.Options{})
	if diags.HasErrors() {
		return nil, errors.New(oneLine(diags))
	}
	p.User = "root"
	return p, nil
}

// predecessorUp makes the host what the Plan says, as `apply` would for good.
func predecessorUp(ctx context.Context, p *plan.Plan) error {
	if _, err := host.DisksUp(ctx, p, image.CanClone); err != nil {
		return fmt.Errorf("vm_disk_directory: %w", err)
	}
	if err := host.NetworkUp(ctx, p, host.Options{}); err != nil {
		return fmt.Errorf("bring the network up: %w", err)
	}
	return nil
}

// oneLine is all errors among the findings as one line of the runner's log.
func oneLine(diags hcl.Diagnostics) string {
	var all []string
	for _, d := range diags {
		if d.Severity == hcl.DiagError {
			all = append(all, d.Summary+": "+strings.Join(strings.Fields(d.Detail), " "))
		}
	}
	return strings.Join(all, "; ")
}
