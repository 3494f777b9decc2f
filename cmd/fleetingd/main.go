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
	// Before the CLI is built: without fleetingd-guest next to it, this program runs in every worker's boot, where milliseconds count.
	if guest.IsCommand(os.Args) {
		os.Exit(guest.Command(os.Args, version))
	}
	if isPlugin(os.Args) {
		servePlugin()
		return
	}
	os.Exit(run(os.Args))
}

// run is main for tests (testscript calls it in-process). It returns the exit code: 0
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
	// The library's own flag has the alias -v, which means --verbose in other commands.
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

// usageError is an error for wrong usage: exit code 2.
type usageError struct{ error }

func (usageError) ExitCode() int { return 2 }

// commands returns all commands; each has its own file.
func commands() []*cli.Command {
	return []*cli.Command{
		compileCommand(),
		validateCommand(),
		fmtCommand(),
		initCommand(),
		convertCommand(),
		doctorCommand(),
		planCommand(),
		applyCommand(),
		confirmCommand(),
		statusCommand(),
		generationsCommand(),
		diffCommand(),
		rollbackCommand(),
		gcCommand(),
		destroyCommand(),
		networkCommand(),
		runCommand(),
		runJobsCommand(),
		imageCommand(),
		refreshCommand(),
		licensesCommand(),
	}
}
