package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/appliance/apply"
	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/state"
)

func confirmCommand() *cli.Command {
	return &cli.Command{
		Name:        "confirm",
		Usage:       "keep what apply --confirm changed",
		Description: "Needs root. Run it from a new login: that you could log in shows that the host is still reachable.",
		Action: func(c *cli.Context) error {
			return changing(c, func(_ context.Context, e *apply.Engine) error {
				n, err := e.Confirm()
				if err == nil {
					fmt.Fprintf(c.App.Writer, "generation %d stays\n", n)
				}
				return err
			})
		},
	}
}

func generationsCommand() *cli.Command {
	return &cli.Command{
		Name:        "generations",
		Usage:       "list what was applied to this host",
		Description: "The current generation is marked with *. The last ten are kept. Needs root.",
		Action:      listGenerations,
	}
}

func diffCommand() *cli.Command {
	return &cli.Command{
		Name:      "diff",
		Usage:     "show what changed between two generations",
		ArgsUsage: "N M",
		Flags:     []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print JSON"}},
		Action:    diffGenerations,
	}
}

func rollbackCommand() *cli.Command {
	return &cli.Command{
		Name:      "rollback",
		Usage:     "return to an earlier generation",
		ArgsUsage: "[N]",
		Description: `Applies generation N again, by default the one before the current. Needs root. Secrets are read again from their files and from the
environment; a secret that came from --var must be in FLEETINGD_VAR_name.

If an apply waits for its confirmation, it takes that back and does nothing else.`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "auto-approve", Usage: "do not ask"},
			&cli.BoolFlag{Name: "overwrite", Usage: "overwrite files and settings that somebody else changed or wrote"},
			&cli.BoolFlag{Name: "unconfirmed", Usage: "only undo an apply that was cut off, or not confirmed in time; systemd runs this"},
		},
		Action: rollback,
	}
}

func gcCommand() *cli.Command {
	return &cli.Command{
		Name:   "gc",
		Usage:  "remove old generations",
		Flags:  []cli.Flag{&cli.IntFlag{Name: "keep", Value: state.Keep, Usage: "keep the last `N` generations, and the current one"}},
		Action: collectGenerations,
	}
}

func destroyCommand() *cli.Command {
	return &cli.Command{
		Name:  "destroy",
		Usage: "leave this host as it was before the first apply",
		Description: `Ends all workers and removes what apply put on this host: services, files, network, images and the generations. What was there before
comes back: files, settings, and whether services ran. Needs root.`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "auto-approve", Usage: "do not ask"},
			&cli.BoolFlag{Name: "drain", Usage: "let running jobs end first"},
			&cli.BoolFlag{Name: "packages", Usage: "also remove the packages that apply installed"},
		},
		Action: destroy,
	}
}

// needsRoot refuses to go on without root, and arguments that the command does not take.
func needsRoot(c *cli.Context, most int) error {
	if c.NArg() > most {
		return usageErrorf("%s: unexpected argument %q; see fleetingd %s --help", c.Command.Name, c.Args().Get(most), c.Command.Name)
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s: only root can read and change this host; use sudo", c.Command.Name)
	}
	return nil
}

// changing does something with this host's engine under its lock.
func changing(c *cli.Context, do func(context.Context, *apply.Engine) error) error {
	if err := needsRoot(c, 0); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	return locked(ctx, apply.Host{Version: version, Fetch: image.Download, Get: image.Get}, do)
}

// locked opens a host under its lock and leaves unfinished applies alone.
func locked(ctx context.Context, h apply.Host, do func(context.Context, *apply.Engine) error) error {
	d, err := state.OpenDir(apply.StateDir)
	if err != nil {
		return err
	}
	lock, err := d.Lock()
	if err != nil {
		return busy(err)
	}
	defer lock.Unlock()
	e, closeHost, err := apply.Open(ctx, h)
	if err != nil {
		return err
	}
	defer closeHost()
	return do(ctx, e)
}

func busy(err error) error {
	if errors.Is(err, state.ErrLocked) {
		return fmt.Errorf("another fleetingd is changing this host; try again when it is done: %w", err)
	}
	return err
}

func listGenerations(c *cli.Context) error {
	if err := needsRoot(c, 0); err != nil {
		return err
	}
	d := state.ReadDir(apply.StateDir)
	all, err := d.Numbers()
	if err != nil {
		return err
	}
	current, err := d.CurrentNumber()
	if err != nil {
		return err
	}
	j, err := d.Journal()
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(c.App.Writer, 0, 8, 2, ' ', 0)
	for _, n := range all {
		g, err := d.Generation(n)
		if err != nil {
			return err
		}
		mark, note := " ", ""
		if n == current {
			mark = "*"
		}
		if j != nil && j.Head.Generation == n {
			mark, note = "?", "not final"
		}
		fmt.Fprintf(w, "%s %d\t%s\t%s\tplan %.6s\t%s\t%s\n", mark, n, g.Created.Local().Format(time.DateTime), g.Plan.Host, g.Digest,
			count(len(g.Plan.Slots), "slot"), note)
	}
	if len(all) == 0 {
		fmt.Fprintln(w, "nothing has been applied to this host")
	}
	return w.Flush()
}

// number reads the number of a generation.
func number(c *cli.Context, i int) (int, error) {
	n, err := strconv.Atoi(c.Args().Get(i))
	if err != nil || n < 1 {
		return 0, usageErrorf("%s: %q is not the number of a generation; fleetingd generations lists them", c.Command.Name, c.Args().Get(i))
	}
	return n, nil
}

// generation reads one, and says which there are if there is none of that number.
func generation(d *state.Dir, n int) (*state.Generation, error) {
	g, err := d.Generation(n)
	if errors.Is(err, state.ErrNoGeneration) {
		return nil, fmt.Errorf("%w; fleetingd generations lists those that are kept", err)
	}
	return g, err
}

func diffGenerations(c *cli.Context) error {
	if c.NArg() != 2 {
		return usageErrorf("diff takes the numbers of two generations: fleetingd diff 1 2")
	}
	if err := needsRoot(c, 2); err != nil {
		return err
	}
	var g [2]*state.Generation
	for i := range g {
		n, err := number(c, i)
		if err != nil {
			return err
		}
		if g[i], err = generation(state.ReadDir(apply.StateDir), n); err != nil {
			return err
		}
	}
	change, err := apply.Between(g[0], g[1])
	if err != nil {
		return err
	}
	return show(c, change, fmt.Sprintf("generation %d", g[1].Number))
}

func rollback(c *cli.Context) error {
	if c.Bool("unconfirmed") {
		return rollbackUnconfirmed(c)
	}
	if err := needsRoot(c, 1); err != nil {
		return err
	}
	wanted := 0
	if c.NArg() == 1 {
		n, err := number(c, 0)
		if err != nil {
			return err
		}
		wanted = n
	}
	ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	d, err := state.OpenDir(apply.StateDir)
	if err != nil {
		return err
	}
	lock, err := d.Lock()
	if err != nil {
		return busy(err)
	}
	defer lock.Unlock()
	j, err := d.Journal()
	if err != nil {
		return err
	}
	if j != nil {
		return takeBack(ctx, c, wanted)
	}
	if wanted == 0 {
		if wanted, err = apply.Former(d); err != nil {
			return err
		}
	}
	g, err := generation(d, wanted)
	if err != nil {
		return err
	}
	e, closeHost, err := apply.Open(ctx, apply.Host{Plan: g.Plan, Secret: readSecret, Version: version, Fetch: image.Download, Get: image.Get})
	if err != nil {
		return err
	}
	defer closeHost()
	change, err := e.Look(ctx, g.Plan)
	if err != nil {
		return err
	}
	return doChange(ctx, c, e, change, fmt.Sprintf("generation %d", wanted), apply.Options{
		Allow: apply.Allow{Overwrite: c.Bool("overwrite")}, Onto: wanted,
	})
}

// takeBack undoes the apply that waits for its confirmation. The caller holds the lock.
func takeBack(ctx context.Context, c *cli.Context, wanted int) error {
	e, closeHost, err := apply.Open(ctx, apply.Host{Version: version, Fetch: image.Download, Get: image.Get})
	if err != nil {
		return err
	}
	defer closeHost()
	if err := e.Revert(ctx); err != nil {
		return err
	}
	fmt.Fprintln(c.App.Writer, "the apply that was not final has been undone: the host is as it was before it")
	if wanted > 0 {
		fmt.Fprintf(c.App.Writer, "to go on to generation %d: fleetingd rollback %d\n", wanted, wanted)
	}
	return nil
}

// rollbackUnconfirmed is what systemd runs, at boot and when the time for a confirmation is over.
func rollbackUnconfirmed(c *cli.Context) error {
	if err := needsRoot(c, 0); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM)
	defer stop()
	d := state.ReadDir(apply.StateDir)
	if j, err := d.Journal(); err != nil || j == nil {
		return err
	}
	// An apply that still runs ends by itself.
	lock, err := state.WaitLock(ctx, d.Path("lock"))
	if err != nil {
		return err
	}
	defer lock.Unlock()
	e, closeHost, err := apply.Open(ctx, apply.Host{Version: version, Fetch: image.Download, Get: image.Get})
	if err != nil {
		return err
	}
	defer closeHost()
	found, err := e.Recover(ctx)
	if err != nil {
		return err
	}
	text := map[apply.Recovery]string{
		apply.Undone:   "the last apply has been undone: the host is as it was before it",
		apply.Finished: "the last apply was finished",
		apply.Pending:  "the last apply may still be confirmed; nothing was done",
	}[found]
	if text != "" {
		fmt.Fprintln(c.App.Writer, text)
	}
	return nil
}

func collectGenerations(c *cli.Context) error {
	if err := needsRoot(c, 0); err != nil {
		return err
	}
	if c.Int("keep") < 1 {
		return usageErrorf("gc: --keep must be at least 1; got %d", c.Int("keep"))
	}
	d := state.ReadDir(apply.StateDir)
	if n, err := d.CurrentNumber(); err != nil || n == 0 {
		return err
	}
	lock, err := d.Lock()
	if err != nil {
		return busy(err)
	}
	defer lock.Unlock()
	if j, err := d.Journal(); err != nil {
		return err
	} else if j != nil {
		return errors.New(unfinished(j))
	}
	removed, err := d.Prune(c.Int("keep"))
	fmt.Fprintf(c.App.Writer, "removed %s\n", count(len(removed), "generation"))
	return err
}

func destroy(c *cli.Context) error {
	return changing(c, func(ctx context.Context, e *apply.Engine) error {
		found, err := e.Recover(ctx)
		if err == nil && found == apply.Pending {
			err = apply.ErrPending
		}
		if err != nil {
			return err
		}
		change, err := e.LookDestroy(ctx, apply.DestroyOptions{Packages: c.Bool("packages"), Drain: c.Bool("drain")})
		if errors.Is(err, apply.ErrNothing) {
			return errors.Join(err, e.Dir.RemoveAll())
		}
		if err != nil {
			return err
		}
		if err := show(c, change, ""); err != nil {
			return err
		}
		if err := approve(c, "Destroy?"); err != nil {
			return err
		}
		e.Progress = progress(c.App.ErrWriter)
		// What somebody changed in fleetingd's own files goes with them; the list says so.
		if err := e.Destroy(ctx, change, apply.Allow{Overwrite: true, Adopt: true}); err != nil {
			return err
		}
		fmt.Fprintf(c.App.Writer, "%s is as it was before the first apply\n", change.Current.Plan.Host)
		return nil
	})
}
