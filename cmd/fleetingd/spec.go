package main

import (
	"fmt"
	"io"
	"os"

	"github.com/hashicorp/hcl/v2"
	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// errDiagnosed ends a command with exit code 1 after its errors have been printed.
var errDiagnosed = cli.Exit("", 1)

// specFlags returns the flags of every command that reads a host spec.
func specFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "var", Usage: "set a variable: `NAME=VALUE` (may be repeated)"},
		&cli.StringSliceFlag{Name: "var-file", Usage: "set variables from `FILE`, HCL or JSON (may be repeated; the last wins)"},
		&cli.StringFlag{Name: "host", Usage: "`NAME` of the host block to use (default: the only one, or the one with this machine's name)"},
	}
}

// specOptions returns the options from the flags and the one argument, HOST. HOST "-" is standard input.
func specOptions(c *cli.Context) (hostspec.Options, error) {
	path := c.Args().First()
	if path == "" {
		return hostspec.Options{}, usageError{fmt.Errorf("%s: missing spec: %s %s HOST.hcl", c.Command.Name, c.App.Name, c.Command.Name)}
	}
	opts := hostspec.Options{
		Path:     path,
		Vars:     c.StringSlice("var"),
		VarFiles: c.StringSlice("var-file"),
		Environ:  os.Environ(),
		Host:     c.String("host"),
	}
	if name, err := os.Hostname(); err == nil {
		opts.Machine = name
	}
	if path == "-" {
		src, err := readStdin(c)
		if err != nil {
			return opts, err
		}
		opts.Source, opts.Path = src, stdinName
	}
	return opts, nil
}

// stdinName stands for standard input in diagnostics. Relative paths in such a spec
// start at the working directory.
const stdinName = "<stdin>"

func readStdin(c *cli.Context) ([]byte, error) {
	const most = 1 << 20 // the same as hostspec.ReadSource
	src, err := io.ReadAll(io.LimitReader(c.App.Reader, most+1))
	if err != nil {
		return nil, fmt.Errorf("cannot read standard input: %w", err)
	}
	if len(src) > most {
		return nil, fmt.Errorf("standard input is larger than the limit of %d KiB", most>>10)
	}
	if src == nil {
		src = []byte{}
	}
	return src, nil
}

// loadSpec reads the spec that the command line names and prints its diagnostics.
// If there are errors, it returns errDiagnosed.
func loadSpec(c *cli.Context) (*hostspec.Result, error) {
	opts, err := specOptions(c)
	if err != nil {
		return nil, err
	}
	res, diags := hostspec.Load(opts)
	printDiagnostics(c.App.ErrWriter, res.Files, diags)
	if diags.HasErrors() {
		return res, errDiagnosed
	}
	return res, nil
}

// printDiagnostics prints findings for people.
func printDiagnostics(w io.Writer, files map[string]*hcl.File, diags hcl.Diagnostics) {
	const most = 50
	p := newDiagnosticPrinter(w)
	for i, d := range diags {
		if i == most {
			fmt.Fprintf(w, "… and %d more.\n", len(diags)-most)
			break
		}
		p.print(newDiagnostic(d, files))
	}
}
