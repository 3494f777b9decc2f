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

// pluginName is the name under which this program is only the plugin: GitLab Runner looks for
// `fleeting-plugin-…` in PATH.
const pluginName = "fleeting-plugin-fleetingd"

// The magic cookie that go-plugin sets in a plugin's environment. fleeting keeps its
// constants for it internal (fleeting/internal/plugin/plugin.go).
const (
	cookieKey   = "FLEETING_INSTANCE_GROUP_PLUGIN"
	cookieValue = "4c6410b1-cb78-4962-8c76-ab936d0ea908"
)

// isPlugin reports whether this process was started as the plugin: under its name, or by GitLab Runner with the
// path of fleetingd itself. The runner passes no arguments; a fleetingd command that a plugin starts inherits
// the cookie, but has arguments.
func isPlugin(args []string) bool {
	if filepath.Base(args[0]) == pluginName {
		return true
	}
	return len(args) == 1 && os.Getenv(cookieKey) == cookieValue
}

// servePlugin is the plugin's main function. It reads its arguments (`version`, `bootstrap`) from the command line.
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

// routes sorts problems of the host's routing: without a route to its workers, the plugin cannot work.
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

// readSecret reads a secret of a prebuild with the rights and the environment of this process.
func readSecret(from string) (string, error) { return hostspec.ReadSecret(from, os.Environ()) }

// predecessorPlan compiles the predecessor's plugin_config to a Plan. Such a host has no separate user:
// the plugin and the VMMs run as the runner's user, which is root.
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

// predecessorUp sets up the host according to the Plan.
func predecessorUp(ctx context.Context, p *plan.Plan) error {
	if _, err := host.DisksUp(ctx, p, image.CanClone); err != nil {
		return fmt.Errorf("vm_disk_directory: %w", err)
	}
	if err := host.NetworkUp(ctx, p, host.Options{}); err != nil {
		return fmt.Errorf("set up the network: %w", err)
	}
	return nil
}

// oneLine joins all errors among the findings into one line for the runner's log.
func oneLine(diags hcl.Diagnostics) string {
	var all []string
	for _, d := range diags {
		if d.Severity == hcl.DiagError {
			all = append(all, d.Summary+": "+strings.Join(strings.Fields(d.Detail), " "))
		}
	}
	return strings.Join(all, "; ")
}
