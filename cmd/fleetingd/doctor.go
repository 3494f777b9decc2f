package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/visible"
	"github.com/fleetingd/fleetingd/appliance/vm"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:      "doctor",
		Usage:     "check this host against a spec and suggest fixes",
		ArgsUsage: "HOST",
		Description: `Checks what HOST needs of this machine: that KVM runs a guest, that the kernel accepts the firewall, that no other firewall
drops the workers' packets, that files can be cloned, that there is enough memory and disk, and so on. Each finding comes
with the command that fixes it. It changes nothing. Some checks need root.

Exits with 0 if nothing fails; warnings do not count as failures.`,
		Flags:  append(specFlags(), &cli.BoolFlag{Name: "json", Usage: "print the findings as JSON"}),
		Action: doctorAction,
	}
}

func doctorAction(c *cli.Context) error {
	if c.NArg() != 1 {
		return usageError{fmt.Errorf("doctor takes one spec; got %d: fleetingd doctor HOST.hcl", c.NArg())}
	}
	res, p, err := compileSpec(c, compile.Options{})
	if err != nil {
		return err
	}
	found := host.Doctor(c.Context, p, host.Probes{
		KVM:      vm.ProbeKVM,
		Driver:   func(ctx context.Context) (binary, version string, _ error) { return probeDriver(ctx, p.Hypervisor) },
		CanClone: image.CanClone,

		Destinations: destinations(res.Host),
		Resolve: func(ctx context.Context, name string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", name)
		},
	})
	report := newDoctorReport(p.Host, found)
	write := report.table
	if c.Bool("json") {
		write = report.json
	}
	if err := write(c.App.Writer); err != nil {
		return err
	}
	if !report.OK {
		return errDiagnosed
	}
	return nil
}

// destinations returns the servers that jobs need by name, without duplicates.
func destinations(h *hostspec.Host) []host.Destination {
	var all []host.Destination
	for _, r := range h.Runners {
		for _, d := range r.Destinations() {
			if _, err := netip.ParseAddr(d.Host); err == nil ||
				slices.ContainsFunc(all, func(o host.Destination) bool { return o.Name == d.Host && o.Port == d.Port }) {
				continue
			}
			all = append(all, host.Destination{
				What: d.What, Name: d.Host, Port: d.Port,
				Denies: func(a netip.Addr) string { return h.Network.Denies(a, d.Port) },
				Cure:   func(a netip.Addr) string { return h.Network.CureFor(d, a) },
			})
		}
	}
	return all
}

func probeDriver(ctx context.Context, h plan.Hypervisor) (binary, version string, _ error) {
	driver, err := vm.Open(h, slog.New(slog.DiscardHandler))
	if err != nil {
		return "", "", err
	}
	info, err := driver.Probe(ctx)
	return info.Binary, info.Version, err
}

// doctorReport is the JSON output of doctor. Adding fields keeps its version; other changes need a new one.
type doctorReport struct {
	Version int            `json:"version"`
	Host    string         `json:"host"`
	OK      bool           `json:"ok"` // no check failed
	Checks  []host.Finding `json:"checks"`
}

func newDoctorReport(name string, found []host.Finding) doctorReport {
	failed := slices.ContainsFunc(found, func(f host.Finding) bool { return f.Status == host.StatusFail })
	return doctorReport{Version: 1, Host: name, OK: !failed, Checks: found}
}

func (r doctorReport) json(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false) // cures are meant to be copied
	return enc.Encode(r)
}

func (r doctorReport) table(w io.Writer) error {
	counts := map[host.Status]int{}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	for _, f := range r.Checks {
		counts[f.Status]++
		fmt.Fprintf(tw, "%s\t%s\t%s\n", f.Status, f.Check, visible.Columns(f.Detail))
		if f.Cure != "" {
			fmt.Fprintf(tw, "\t\tcure: %s\n", f.Cure)
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nhost %s: %d passed, %d warnings, %d failed\n", r.Host, counts[host.StatusOK], counts[host.StatusWarn],
		counts[host.StatusFail])
	return err
}
