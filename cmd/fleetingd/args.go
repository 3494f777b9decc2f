package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/appliance/suggest"
)

// strictUsage makes wrong usage of every command an error with exit code 2. The library
// would print the whole help to standard output and exit with 1.
func strictUsage(commands []*cli.Command) {
	for _, c := range commands {
		c.OnUsageError = wrongFlag
		// Otherwise help in `fleetingd validate help` would not be a file name.
		c.HideHelpCommand = true
		if len(c.Subcommands) > 0 {
			c.Action = noCommand
			strictUsage(c.Subcommands)
		}
	}
}

func wrongFlag(c *cli.Context, err error, _ bool) error {
	return usageError{fmt.Errorf("%w; see %s --help", err, c.Command.HelpName)}
}

// noCommand runs if the arguments name no command.
func noCommand(c *cli.Context) error {
	commands := c.App.Commands
	if len(c.Command.Subcommands) > 0 {
		commands = c.Command.Subcommands
	}
	given := c.Args().First()
	if given == "" {
		if err := cli.ShowSubcommandHelp(c); err != nil {
			return err
		}
		return usageError{fmt.Errorf("missing command; see fleetingd --help")}
	}
	var names []string
	for _, cmd := range commands {
		names = append(names, cmd.Name)
	}
	if near := suggest.Nearest(given, names); near != "" {
		return usageError{fmt.Errorf("unknown command %q; did you mean %q?", given, near)}
	}
	return usageError{fmt.Errorf("unknown command %q; see fleetingd --help", given)}
}

// flagsFirst moves a command's flags before its arguments: people write
// `fleetingd compile HOST -o DIR`, but package flag stops at the first argument. It leaves
// everything after "--" unchanged.
func flagsFirst(args []string, commands []*cli.Command) []string {
	head := min(1, len(args))
	var cmd *cli.Command
	for head < len(args) {
		i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(args[head]) })
		if i < 0 {
			break
		}
		cmd = commands[i]
		commands = cmd.Subcommands
		head++
	}
	if cmd == nil {
		return args
	}
	var flags, rest []string
	for i := head; i < len(args); i++ {
		arg := args[i]
		switch {
		case arg == "--":
			rest = append(rest, args[i:]...)
			i = len(args)
		case len(arg) < 2 || arg[0] != '-':
			rest = append(rest, arg)
		default:
			flags = append(flags, arg)
			if !takesValue(cmd, arg) {
				continue
			}
			if i++; i == len(args) || args[i] == "--" {
				// Its value is missing. Package flag reports that if nothing follows.
				return slices.Concat(args[:head], flags)
			}
			flags = append(flags, args[i])
		}
	}
	return slices.Concat(args[:head], flags, rest)
}

// takesValue reports whether a flag's value is the argument after it.
func takesValue(cmd *cli.Command, arg string) bool {
	name := strings.TrimLeft(arg, "-")
	if strings.Contains(name, "=") {
		return false
	}
	for _, f := range cmd.Flags {
		if slices.Contains(f.Names(), name) {
			_, isBool := f.(*cli.BoolFlag)
			return !isBool
		}
	}
	return false
}
