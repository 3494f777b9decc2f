package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/hashicorp/hcl/v2"
	"github.com/rogpeppe/go-internal/diff"
	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

func fmtCommand() *cli.Command {
	return &cli.Command{
		Name:      "fmt",
		Usage:     "format host specs",
		ArgsUsage: "HOST…",
		Description: "Rewrites each HOST in place and prints the names of those that changed; - formats standard input to standard output.\n" +
			"With -check it writes nothing, and the exit code is 1 if a file is not formatted.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "check", Usage: "write nothing; exit with 1 and name the files that are not formatted"},
			&cli.BoolFlag{Name: "diff", Usage: "write nothing; print what would change"},
		},
		Action: fmtSpecs,
	}
}

func fmtSpecs(c *cli.Context) error {
	if c.NArg() == 0 {
		return usageError{errors.New("fmt: missing spec: fleetingd fmt HOST.hcl")}
	}
	changed, failed := false, false
	for _, path := range c.Args().Slice() {
		ch, err := fmtSpec(c, path)
		switch {
		case errors.Is(err, errDiagnosed):
			failed = true
		case err != nil:
			fmt.Fprintf(c.App.ErrWriter, "fleetingd: fmt: %v\n", err)
			failed = true
		}
		changed = changed || ch
	}
	if failed || changed && c.Bool("check") {
		return errDiagnosed
	}
	return nil
}

// fmtSpec formats one file and reports whether that changes it.
func fmtSpec(c *cli.Context, path string) (changed bool, err error) {
	name, old, err := readForFmt(c, path)
	if err != nil {
		return false, err
	}
	formatted, diags := hostspec.Format(old, name)
	if diags.HasErrors() {
		printDiagnostics(c.App.ErrWriter, map[string]*hcl.File{name: {Bytes: old}}, diags)
		return false, errDiagnosed
	}
	changed = !bytes.Equal(old, formatted)
	check, showDiff := c.Bool("check"), c.Bool("diff")
	if path == "-" && !check && !showDiff {
		_, err := c.App.Writer.Write(formatted)
		return changed, err
	}
	if !changed {
		return false, nil
	}
	if check || !showDiff {
		fmt.Fprintln(c.App.Writer, name)
	}
	if showDiff {
		if _, err := c.App.Writer.Write(diff.Diff(name, old, name+" (formatted)", formatted)); err != nil {
			return true, err
		}
	}
	if check || showDiff {
		return true, nil
	}
	return true, replaceFile(path, formatted)
}

func readForFmt(c *cli.Context, path string) (name string, src []byte, err error) {
	if path == "-" {
		src, err = readStdin(c)
		return stdinName, src, err
	}
	if strings.HasSuffix(path, ".json") {
		return path, nil, fmt.Errorf("%s is JSON, and fmt only formats HCL's native syntax; use jq, for example", path)
	}
	src, err = hostspec.ReadSource(path)
	if err != nil {
		err = fmt.Errorf("cannot read %s: %w", path, err)
	}
	return path, src, err
}

// replaceFile replaces a file, keeping its mode and owner. It follows symbolic
// links.
func replaceFile(path string, data []byte) error {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if err := state.WriteFile(path, data, st.Mode().Perm()); err != nil {
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok && int(sys.Uid) != os.Geteuid() {
		if err := os.Chown(path, int(sys.Uid), int(sys.Gid)); err != nil {
			return fmt.Errorf("%s was written, but its owner has changed: %w", path, err)
		}
	}
	return nil
}
