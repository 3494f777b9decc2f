package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
)

func imageCommand() *cli.Command {
	return &cli.Command{
		Name:  "image",
		Usage: "list the images that workers are cloned from, and remove old ones",
		Subcommands: []*cli.Command{
			{
				Name:   "list",
				Usage:  "list base and sealed images",
				Flags:  []cli.Flag{planFlag(), &cli.BoolFlag{Name: "json", Usage: "print JSON"}},
				Action: listImages,
			},
			{
				Name:  "prune",
				Usage: "remove images that the plan does not use",
				Description: "Removes images that the plan does not use, and the remains of interrupted builds and downloads. Running workers keep their\n" +
					"disks. As root it removes what root built; as the plan's user, everything else.",
				Flags:  []cli.Flag{planFlag()},
				Action: pruneImages,
			},
		},
	}
}

// planFlag is the flag for the compiled host.
func planFlag() cli.Flag {
	return &cli.StringFlag{Name: "plan", Usage: "the compiled host, a `FILE` that `fleetingd compile` wrote"}
}

// readPlan reads the --plan of a command without other arguments.
func readPlan(c *cli.Context) (*plan.Plan, error) {
	if c.NArg() > 0 {
		return nil, usageError{fmt.Errorf("%s takes no arguments; got %q", c.Command.FullName(), c.Args().First())}
	}
	path := c.String("plan")
	if path == "" {
		// The library's own "required" would print the whole help to standard output and exit with 1.
		return nil, usageErrorf("%s: missing --plan: use /etc/fleetingd/plan.json, or a plan.json that fleetingd compile wrote", c.Command.FullName())
	}
	return state.ReadPlan(path)
}

func textLog(w io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }

func listImages(c *cli.Context) error {
	p, err := readPlan(c)
	if err != nil {
		return err
	}
	store, err := image.Open(p, image.Options{Log: textLog(c.App.ErrWriter)})
	if err != nil {
		return err
	}
	items, err := store.List(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		e := json.NewEncoder(c.App.Writer)
		e.SetIndent("", "  ")
		return e.Encode(append([]image.Item{}, items...)) // without images [], not null
	}
	w := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "DIGEST\tKIND\tIMAGE\tBUILT\tUSED\tCURRENT")
	for _, i := range items {
		current := "no"
		if i.Current {
			current = "yes"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d MiB\t%s\n", i.Digest[:12], i.Kind, i.Image, i.Built.Format(time.RFC3339), i.Used>>20, current)
	}
	return w.Flush()
}

func pruneImages(c *cli.Context) error {
	p, err := readPlan(c)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM)
	defer stop()
	store, err := image.Open(p, image.Options{Log: textLog(c.App.ErrWriter)})
	if err != nil {
		return err
	}
	removed, err := store.Prune(ctx, nil)
	if os.Getuid() == 0 {
		built, berr := image.NewBuilder(p, image.Options{Log: textLog(c.App.ErrWriter)}).Prune(ctx)
		// Only the runtime user may prune that user's folder.
		if _, theirs := errors.AsType[*image.OwnerError](err); theirs {
			err = nil
		}
		removed, err = append(removed, built...), errors.Join(err, berr)
	}
	for _, digest := range removed {
		fmt.Fprintln(c.App.Writer, "removed", digest[:12])
	}
	return err
}
