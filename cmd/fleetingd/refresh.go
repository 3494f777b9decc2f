package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

func refreshCommand() *cli.Command {
	return &cli.Command{
		Name:  "refresh",
		Usage: "rebuild the workers' images if their sources have changed",
		Description: "Builds new images beside the ones in use and swaps when done: new workers start from the new images, running ones are not\n" +
			"affected. If a source does not answer, its existing base is used with a warning; after a week without an answer, or three\n" +
			"refresh intervals if those are longer, refresh fails as well. fleetingd-refresh.timer runs it: first --root-part as root, which\n" +
			"builds from Debian's packages, then the rest as the plan's user.",
		Flags: []cli.Flag{
			planFlag(),
			&cli.BoolFlag{Name: "root-part", Usage: "as root: build from packages only, and start no VM"},
		},
		Action: refreshImages,
	}
}

func refreshImages(c *cli.Context) error {
	p, err := readPlan(c)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM)
	defer stop()
	log := textLog(c.App.ErrWriter)
	opts := image.Options{Log: log, Secrets: readSecret, Progress: func(e image.Progress) {
		if e.Line != "" {
			log.Info(e.Line, "image", e.Image, "phase", string(e.Phase))
		}
	}}
	if c.Bool("root-part") {
		return refreshBuilt(ctx, image.NewBuilder(p, opts), p, log)
	}
	if opts.Driver, err = vm.Open(p.Hypervisor, log); err != nil {
		return err
	}
	store, err := image.Open(p, opts)
	if err != nil {
		return err
	}
	return refreshAll(ctx, c, store, p, log)
}

// refreshBuilt is root's part: images that are built from packages.
func refreshBuilt(ctx context.Context, b *image.Builder, p *plan.Plan, log *slog.Logger) error {
	var errs []error
	for i := range p.Images {
		_, err := b.Build(ctx, &p.Images[i], true)
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return err // nothing is pruned after a failure: images in use must stay
	}
	removed, err := b.Prune(ctx)
	logPruned(log, removed)
	return err
}

func logPruned(log *slog.Logger, removed []string) {
	if len(removed) > 0 {
		log.Info("removed unreferenced images", "number", len(removed))
	}
}

// refreshAll continues after an image that cannot be built or has an outdated base, and reports it at the end.
func refreshAll(ctx context.Context, c *cli.Context, store *image.Store, p *plan.Plan, log *slog.Logger) error {
	var errs []error
	for i := range p.Images {
		img := &p.Images[i]
		sealed, err := store.Refresh(ctx, img)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		news := "rebuilt"
		if sealed.Cached {
			news = "unchanged"
		}
		fmt.Fprintf(c.App.Writer, "image %s: %s (%s)\n", img.Name, news, sealed.Digest[:12])
		errs = append(errs, store.CheckAge(ctx, img))
	}
	if err := errors.Join(errs...); err != nil {
		return err // nothing is pruned after a failure: images in use must stay
	}
	removed, err := store.Prune(ctx, nil)
	logPruned(log, removed)
	return err
}
