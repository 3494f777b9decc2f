package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

func networkCommand() *cli.Command {
	return &cli.Command{
		Name:  "network",
		Usage: "make the workers' links, routes and firewall, take them down, compare them with the plan",
		Subcommands: []*cli.Command{
			{
				Name:  "up",
				Usage: "make this host's network equal to the plan",
				Description: "Needs root. Changes only what differs, so a second run changes nothing. What it did is undone when it fails.\n" +
					"It stops before it changes anything where that would take an address range or a name from somebody else, or a\n" +
					"TAP from a VM that runs.",
				Flags: []cli.Flag{planFlag()},
				Action: func(c *cli.Context) error {
					return onNetwork(c, func(ctx context.Context, p *plan.Plan) error { return host.NetworkUp(ctx, p, host.Options{}) })
				},
			},
			{
				Name:        "down",
				Usage:       "take away what up made, and put back the settings that it changed",
				Description: "Needs root. A VM that still runs loses its network.",
				Flags:       []cli.Flag{planFlag()},
				Action:      func(c *cli.Context) error { return onNetwork(c, host.NetworkDown) },
			},
			{
				Name:        "check",
				Usage:       "list what is not as the plan says",
				Description: "Needs root, to read the firewall. Changes nothing. Exits with 1 where something differs.",
				Flags:       []cli.Flag{planFlag(), &cli.BoolFlag{Name: "json", Usage: "print JSON"}},
				Action:      func(c *cli.Context) error { return onNetwork(c, checkNetwork(c)) },
			},
		},
	}
}

// onNetwork does something with the --plan, until a signal says to stop.
func onNetwork(c *cli.Context, do func(context.Context, *plan.Plan) error) error {
	p, err := readPlan(c)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM)
	defer stop()
	return do(ctx, p)
}

func checkNetwork(c *cli.Context) func(context.Context, *plan.Plan) error {
	return func(ctx context.Context, p *plan.Plan) error {
		found, err := host.NetworkCheck(ctx, p, host.Options{})
		if err != nil {
			return err
		}
		if c.Bool("json") {
			e := json.NewEncoder(c.App.Writer)
			e.SetIndent("", "  ")
			if err := e.Encode(append([]host.Difference{}, found...)); err != nil { // none are [], not null
				return err
			}
		} else {
			for _, d := range found {
				fmt.Fprintln(c.App.Writer, d)
			}
		}
		if len(found) > 0 {
			return fmt.Errorf("the network differs from the plan in %d places: `fleetingd network up --plan %s` mends them",
				len(found), c.String("plan"))
		}
		return nil
	}
}
