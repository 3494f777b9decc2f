package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

func networkCommand() *cli.Command {
	return &cli.Command{
		Name:  "network",
		Usage: "set up, tear down or check the workers' network",
		Subcommands: []*cli.Command{
			{
				Name:  "up",
				Usage: "set up the network according to the plan",
				Description: "Needs root. It changes only what differs, so a second run changes nothing, and undoes its changes if it fails.\n" +
					"It refuses to take an address range or a name that others use, or a TAP that a running VM has open; it then\n" +
					"changes nothing. It warns if the network is up but something else keeps workers from the internet.",
				Flags: []cli.Flag{planFlag()},
				Action: func(c *cli.Context) error {
					return onNetwork(c, networkUp(c))
				},
			},
			{
				Name:  "down",
				Usage: "remove what up created, and restore the settings that it changed",
				Description: "Needs root. Running VMs lose their network. --all needs no plan: it finds what is up from the kernel's state\n" +
					"and from notes in " + plan.RunDir + "-network.",
				Flags:  []cli.Flag{planFlag(), &cli.BoolFlag{Name: "all", Usage: "remove the network of every plan"}},
				Action: networkDown,
			},
			{
				Name:        "check",
				Usage:       "list what differs from the plan",
				Description: "Needs root, to read the firewall. Changes nothing. Exits with 1 if something differs, or if routes or rules of\nthis host keep the network from working.",
				Flags:       []cli.Flag{planFlag(), &cli.BoolFlag{Name: "json", Usage: "print JSON"}},
				Action:      func(c *cli.Context) error { return onNetwork(c, checkNetwork(c)) },
			},
		},
	}
}

// onNetwork runs do on the --plan, until a signal stops it.
func onNetwork(c *cli.Context, do func(context.Context, *plan.Plan) error) error {
	p, err := readPlan(c)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM)
	defer stop()
	return do(ctx, p)
}

func networkDown(c *cli.Context) error {
	switch {
	case !c.Bool("all"):
		return onNetwork(c, host.NetworkDown)
	case c.String("plan") != "":
		return usageErrorf("%s takes either --plan or --all", c.Command.FullName())
	case c.NArg() > 0:
		return usageErrorf("%s takes no arguments; got %q", c.Command.FullName(), c.Args().First())
	}
	ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM)
	defer stop()
	taps, err := host.NetworkDownAll(ctx, plan.RunDir)
	for _, state := range slices.Sorted(maps.Keys(taps)) {
		if err == nil {
			fmt.Fprintf(c.App.Writer, "removed the network of state_dir %s: %d TAPs\n", state, len(taps[state]))
		}
	}
	if err == nil && len(taps) == 0 {
		fmt.Fprintln(c.App.Writer, "no network of fleetingd is up")
	}
	return err
}

// networkUp also warns about what keeps workers from the internet but is not for fleetingd to change.
func networkUp(c *cli.Context) func(context.Context, *plan.Plan) error {
	return func(ctx context.Context, p *plan.Plan) error {
		if err := host.NetworkUp(ctx, p, host.Options{}); err != nil {
			return err
		}
		troubles, err := host.Troubles(p, p.Slots)
		if err != nil {
			return err
		}
		for _, t := range troubles {
			fmt.Fprintf(c.App.ErrWriter, "warning: %s\n", t)
		}
		return nil
	}
}

func checkNetwork(c *cli.Context) func(context.Context, *plan.Plan) error {
	return func(ctx context.Context, p *plan.Plan) error {
		found, err := host.NetworkCheck(ctx, p, host.Options{})
		if err != nil {
			return err
		}
		fixable := len(found)
		troubles, err := host.Troubles(p, p.Slots)
		if err != nil {
			return err
		}
		for _, t := range troubles {
			if fixable > 0 && t.Lost {
				continue // what differs explains it
			}
			found = append(found, t.Difference)
		}
		if c.Bool("json") {
			e := json.NewEncoder(c.App.Writer)
			e.SetIndent("", "  ")
			if err := e.Encode(append([]host.Difference{}, found...)); err != nil { // [] if there are none, not null
				return err
			}
		} else {
			for _, d := range found {
				fmt.Fprintln(c.App.Writer, d)
			}
		}
		switch {
		case fixable > 0:
			return fmt.Errorf("the network differs from the plan in %d places; `fleetingd network up --plan %s` fixes them",
				fixable, c.String("plan"))
		case len(found) > 0:
			return errors.New("the network matches the plan, but other settings of this host keep it from working")
		}
		return nil
	}
}
