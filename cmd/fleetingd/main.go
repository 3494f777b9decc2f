// Command fleetingd turns a bare-metal Linux host into a GitLab CI appliance.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/appliance/guest"
)

func main() {
	// Before the CLI is built: where there is no fleetingd-guest beside it, each millisecond here is one of every worker's boot.
	if guest.IsCommand(os.Args) {
		os.Exit(guest.Command(os.Args, version))
	}
	if isPlugin(os.Args) {
		servePlugin()
		return
	}
	os.Exit(run(os.Args))
}

// run is main for tests (testscript calls it in-process): the exit code is 0
// for done, 1 for failed, 2 for wrong usage.
func run(args []string) int {
	app := &cli.App{
		Name:           "fleetingd",
		Usage:          "a GitLab CI appliance: every job in a fresh virtual machine",
		Version:        version,
		Commands:       commands(),
		ExitErrHandler: func(*cli.Context, error) {},
		OnUsageError:   wrongFlag,
		Action:         noCommand,
		// --var 'list=["a", "b"]' is one value.
		DisableSliceFlagSeparator: true,
	}
	// The library's own has the alias -v, which is --verbose elsewhere here.
	cli.VersionFlag = &cli.BoolFlag{Name: "version", Usage: "print the version", DisableDefaultText: true}
	strictUsage(app.Commands)
	err := app.Run(flagsFirst(args, app.Commands))
	if err == nil {
		return 0
	}
	if msg := err.Error(); msg != "" {
		fmt.Fprintln(os.Stderr, "fleetingd: "+msg)
	}
	var coder cli.ExitCoder
	if errors.As(err, &coder) {
		return coder.ExitCode()
	}
	return 1
}

// usageError is wrong usage: exit code 2.
type usageError struct{ error }

func (usageError) ExitCode() int { return 2 }

// commands is every command; each has a file of its own.
func commands() []*cli.Command {
	return []*cli.Command{
		compileCommand(),
		validateCommand(),
		fmtCommand(),
		initCommand(),
		convertCommand(),
		doctorCommand(),
		networkCommand(),
		runCommand(),
		runJobsCommand(),
		imageCommand(),
		refreshCommand(),
		licensesCommand(),
	}
}
