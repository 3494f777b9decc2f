package main

import (
	"fmt"
	"io"
	"os"

	"github.com/hashicorp/hcl/v2"
	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// errDiagnosed ends a command whose reasons have been printed already: exit code 1.
var errDiagnosed = cli.Exit("", 1)

// specFlags are the flags of every command that reads a host spec.
func specFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "var", Usage: "set a variable: `NAME=VALUE` (may be repeated)"},
		&cli.StringSliceFlag{Name: "var-file", Usage: "set variables from `FILE`, HCL or JSON (may be repeated; the last wins)"},
		&cli.StringFlag{Name: "host", Usage: "the host block to take: `NAME` (default: the only one, or this machine's name)"},
	}
}

// specOptions is what the flags and the one argument HOST ask for. HOST "-" is standard input.
func specOptions(c *cli.Context) (hostspec.Options, error) {
	path := c.Args().First()
	if path == "" {
		return hostspec.Options{}, usageError{fmt.Errorf("%s: which spec? Write: %s %s HOST.hcl", c.Command.Name, c.App.Name, c.Command.Name)}
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

// stdinName stands for standard input in diagnostics; files that the spec names are
// then looked up from the working directory.
const stdinName = "<stdin>"

func readStdin(c *cli.Context) ([]byte, error) {
	const most = 1 << 20 // as hostspec.ReadSource
	src, err := io.ReadAll(io.LimitReader(c.App.Reader, most+1))
	if err != nil {
		return nil, fmt.Errorf("cannot read standard input: %w", err)
	}
	if len(src) > most {
		return nil, fmt.Errorf("standard input is larger than %d KiB, the most that is read", most>>10)
	}
	if src == nil {
		src = []byte{}
	}
	return src, nil
}

// loadSpec reads the spec that the command line names and prints what there is to
// say about it. After errors it returns errDiagnosed.
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

// printDiagnostics writes findings for people.
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
