package main

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

func validateCommand() *cli.Command {
	return &cli.Command{
		Name:      "validate",
		Usage:     "check a host spec, without looking at any host",
		ArgsUsage: "HOST",
		Description: "Reads HOST (host.hcl, host.hcl.json, or - for standard input) and prints everything that is wrong with it.\n" +
			"It does not read secrets. The exit code is 0 for a valid spec, 1 for an invalid one and 2 for wrong usage.",
		Flags: append(specFlags(),
			&cli.BoolFlag{Name: "json", Usage: "print the result as JSON, in the format of terraform validate -json"}),
		Action: validateSpec,
	}
}

func validateSpec(c *cli.Context) error {
	if c.NArg() != 1 {
		return usageError{fmt.Errorf("validate takes one spec; got %d: fleetingd validate HOST.hcl", c.NArg())}
	}
	opts, err := specOptions(c)
	if err != nil {
		return err
	}
	opts.AnyHost = true
	res, diags := hostspec.Load(opts)
	if c.Bool("json") {
		if err := printValidationJSON(c, res.Files, diags); err != nil {
			return err
		}
	} else {
		printDiagnostics(c.App.ErrWriter, res.Files, diags)
	}
	if diags.HasErrors() {
		return errDiagnosed
	}
	if !c.Bool("json") {
		fmt.Fprintf(c.App.Writer, "%s is valid: %s\n", opts.Path, summary(res))
	}
	return nil
}

// summary returns "host metal-01, 2 pools, 22 slots": one slot per worker, and one per
// image for its prebuild.
func summary(res *hostspec.Result) string {
	slots := len(res.Host.Images)
	for _, p := range res.Host.Pools {
		slots += p.MaxInstances
	}
	hosts := "host " + res.Hosts[0]
	if len(res.Hosts) > 1 {
		hosts = "hosts " + strings.Join(res.Hosts, ", ")
	}
	return fmt.Sprintf("%s, %s, %s", hosts, count(len(res.Host.Pools), "pool"), count(slots, "slot"))
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// printValidationJSON prints the result in the format of terraform validate -json.
func printValidationJSON(c *cli.Context, files map[string]*hcl.File, diags hcl.Diagnostics) error {
	out := struct {
		FormatVersion string       `json:"format_version"`
		Valid         bool         `json:"valid"`
		ErrorCount    int          `json:"error_count"`
		WarningCount  int          `json:"warning_count"`
		Diagnostics   []diagnostic `json:"diagnostics"`
	}{FormatVersion: "1.0", Valid: !diags.HasErrors(), Diagnostics: []diagnostic{}}
	for _, d := range diags {
		if d.Severity == hcl.DiagError {
			out.ErrorCount++
		} else {
			out.WarningCount++
		}
		out.Diagnostics = append(out.Diagnostics, newDiagnostic(d, files))
	}
	enc := json.NewEncoder(c.App.Writer)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(out)
}
