package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/fleetingd/fleetingd/appliance/apply"
	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

func planCommand() *cli.Command {
	return &cli.Command{
		Name:      "plan",
		Usage:     "show what apply would change on this host",
		ArgsUsage: "HOST",
		Description: `Compares this host with HOST and shows each object that differs, with the line of the spec that it comes from. It needs root, to read
what belongs to root, and changes nothing. Secrets are masked: a changed one shows as changed.

-o FILE saves the plan. "fleetingd apply FILE" then does exactly that, or nothing if the host has changed since.
packaging/docs/apply.md documents the JSON.`,
		Flags: append(specFlags(),
			&cli.BoolFlag{Name: "json", Usage: "print JSON"},
			&cli.BoolFlag{Name: "detailed-exitcode", Usage: "exit with 0 if nothing would change, 2 if something would, and 1 after an error"},
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "save the plan to `FILE` for apply"},
			rootFlag(),
		),
		Action: planAction,
	}
}

func applyCommand() *cli.Command {
	return &cli.Command{
		Name:      "apply",
		Usage:     "make this host what the spec says",
		ArgsUsage: "HOST|FILE",
		Description: `Shows what would change on this host, asks, and does it, one step after the other. Needs root. Running jobs go on.
If a step fails, or you interrupt it, everything is undone: the host is as it was. So it is after a crash or a power cut, at the next boot
or the next apply. A second apply of the same spec changes nothing. FILE is what "fleetingd plan -o FILE" saved.

Nothing that somebody else wrote or changed is overwritten without --overwrite; for GitLab Runner's config.toml, --adopt. What was there
before is kept, and destroy puts it back.`,
		Flags: append(specFlags(),
			&cli.BoolFlag{Name: "auto-approve", Usage: "do not ask"},
			&cli.DurationFlag{Name: "confirm", Usage: "undo everything after `DURATION` (2m, say) unless \"fleetingd confirm\" is run before", DefaultText: "final at once"},
			&cli.BoolFlag{Name: "overwrite", Usage: "overwrite files and settings that somebody else changed or wrote"},
			&cli.BoolFlag{Name: "adopt", Usage: "replace a config.toml of GitLab Runner that has runners"},
			rootFlag(),
		),
		Action: applyAction,
	}
}

func rootFlag() cli.Flag {
	return &cli.StringFlag{Name: "root", Usage: "write to the file system below `DIR`, and act on nothing that runs"}
}

// target is what a command line asks to be applied, and to which host.
type target struct {
	spec   string // for people
	engine *apply.Engine
	change *apply.Change
	close  func()
}

// openTarget compiles the spec, or reads the saved plan, and compares the host with it. With write, it takes the lock, and ends what
// an earlier apply left.
func openTarget(ctx context.Context, c *cli.Context, write bool) (*target, error) {
	if c.NArg() != 1 {
		return nil, usageErrorf("%s takes one spec, and was given %d: fleetingd %s HOST.hcl", c.Command.Name, c.NArg(), c.Command.Name)
	}
	root, err := rootOf(c)
	if err != nil {
		return nil, err
	}
	h := apply.Host{Root: root, Version: version, Fetch: image.Download, Get: image.Get}
	t := &target{spec: filepath.Base(c.Args().First())}
	saved, err := savedPlan(c, write)
	if err != nil {
		return nil, err
	}
	if saved != nil {
		t.spec, h.Plan, h.Secret = saved.Spec, saved.Plan, readSecret
		if err := isThisHost(saved.Plan, root); err != nil {
			return nil, err
		}
	} else {
		res, p, err := compileHere(c, root)
		if err != nil {
			return nil, err
		}
		h.Plan = p
		if h.Secret, err = readSecrets(c, res, p, ""); err != nil {
			return nil, err
		}
	}
	if root == "" {
		if err := ready(h.Plan); err != nil {
			return nil, err
		}
	}
	if t.engine, t.close, err = openEngine(ctx, c, h, write); err != nil {
		return nil, err
	}
	t.change, err = t.engine.Look(ctx, h.Plan)
	if err == nil && saved != nil {
		err = saved.Moved(t.change)
	}
	if err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

// rootOf is the --root, which must exist: a mistyped one would be filled in silence.
func rootOf(c *cli.Context) (string, error) {
	root := c.String("root")
	if root == "" {
		if os.Geteuid() != 0 {
			return "", fmt.Errorf("%s: only root can read and change this host; use sudo", c.Command.FullName())
		}
		return "", nil
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	if root == "/" {
		return "", usageErrorf("%s: --root / is this host; leave --root out", c.Command.FullName())
	}
	fi, err := os.Stat(root)
	if err == nil && !fi.IsDir() {
		err = errors.New("it is not a folder")
	}
	if err != nil {
		return "", fmt.Errorf("--root %s: %w", root, err)
	}
	return root, nil
}

// savedPlan reads the argument if it is a saved plan; nil if it is a spec.
func savedPlan(c *cli.Context, write bool) (*apply.Saved, error) {
	if !write || c.Args().First() == "-" {
		return nil, nil
	}
	saved, err := apply.ReadSaved(c.Args().First())
	switch {
	case errors.Is(err, apply.ErrNotSaved):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("%s: %w", c.Args().First(), err)
	}
	for _, f := range []string{"var", "var-file", "host"} {
		if c.IsSet(f) {
			return nil, usageErrorf("apply: --%s has no effect on a saved plan", f)
		}
	}
	return saved, nil
}

// isThisHost refuses a saved plan of a host with another name. A spec is for whoever applies it, but a plan was made for one host.
func isThisHost(p *plan.Plan, root string) error {
	current, err := state.ReadDir(filepath.Join("/", root, apply.StateDir)).Current()
	if err != nil {
		return err
	}
	if current != nil && current.Plan.Host != p.Host {
		return fmt.Errorf("the saved plan is for host %s, and this is %s; nothing was changed", p.Host, current.Plan.Host)
	}
	return nil
}

// compileHere compiles the spec for this very host: programs are where this one is, what the spec leaves to the host's disks is decided, and
// what the current generation has, too, keeps its slots.
func compileHere(c *cli.Context, root string) (*hostspec.Result, *plan.Plan, error) {
	res, err := loadSpec(c)
	if err != nil {
		return nil, nil, err
	}
	current, err := state.ReadDir(filepath.Join("/", root, apply.StateDir)).Current()
	if err != nil {
		return nil, nil, err
	}
	var o compile.Options
	if current != nil {
		o.Former = current.Plan
	}
	if root == "" {
		self, err := os.Executable()
		if err != nil {
			return nil, nil, err
		}
		o.BinDir = filepath.Dir(self)
		d := &res.Host.Disks
		if d.Backing, d.Size, err = host.SettleDisks(res.Host.StateDir, d.Backing, d.Size, image.CanClone); err != nil {
			return nil, nil, err
		}
	}
	p, diags := compile.Compile(res.Host, o)
	printDiagnostics(c.App.ErrWriter, res.Files, diags)
	if diags.HasErrors() {
		return nil, nil, errDiagnosed
	}
	return res, p, nil
}

// ready refuses what would fail only after something was changed.
func ready(p *plan.Plan) error {
	if len(p.Runners) == 0 {
		return nil
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	plugin := filepath.Join(filepath.Dir(self), pluginName)
	if _, err := os.Stat(plugin); err != nil {
		return fmt.Errorf("GitLab Runner starts fleetingd by the name of its plugin, which is not installed; nothing was changed: ln -s fleetingd %s", plugin)
	}
	return nil
}

// openEngine opens a host. With write, the engine holds the lock until close, and what an earlier apply left is over.
func openEngine(ctx context.Context, c *cli.Context, h apply.Host, write bool) (*apply.Engine, func(), error) {
	dir := filepath.Join("/", h.Root, apply.StateDir)
	if !write {
		return apply.Open(ctx, h)
	}
	d, err := state.OpenDir(dir)
	if err != nil {
		return nil, nil, err
	}
	lock, err := d.Lock()
	if err != nil {
		if errors.Is(err, state.ErrLocked) {
			err = fmt.Errorf("another fleetingd is changing this host; try again when it is done: %w", err)
		}
		return nil, nil, err
	}
	release := func() { lock.Unlock() }
	e, closeHost, err := apply.Open(ctx, h)
	if err != nil {
		release()
		return nil, nil, err
	}
	done := func() { closeHost(); release() }
	found, err := e.Recover(ctx)
	switch {
	case err != nil:
	case found == apply.Pending:
		err = apply.ErrPending
	case found == apply.Undone:
		fmt.Fprintln(c.App.ErrWriter, "fleetingd: an earlier apply was cut off or not confirmed in time; it has been undone")
	case found == apply.Finished:
		fmt.Fprintln(c.App.ErrWriter, "fleetingd: an earlier apply was cut off after its last step; it is finished now")
	}
	if err != nil {
		done()
		return nil, nil, err
	}
	return e, done, nil
}

func planAction(c *cli.Context) error {
	ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM)
	defer stop()
	t, err := openTarget(ctx, c, false)
	if err != nil {
		return err
	}
	defer t.close()
	if j, err := t.engine.Dir.Journal(); err != nil {
		return err
	} else if j != nil {
		fmt.Fprintln(c.App.ErrWriter, "fleetingd: "+unfinished(j))
	}
	if err := show(c, t.change, t.spec); err != nil {
		return err
	}
	if out := c.String("output"); out != "" {
		if err := t.change.Save(out, t.spec); err != nil {
			return fmt.Errorf("save the plan: %w", err)
		}
		fmt.Fprintf(c.App.ErrWriter, "saved to %s; to do it: fleetingd apply %s\n", out, out)
	}
	if c.Bool("detailed-exitcode") && !t.change.Empty() {
		return cli.Exit("", 2)
	}
	return nil
}

// unfinished says what a journal is about.
func unfinished(j *state.Journal) string {
	if j.Waiting != nil && !j.Committed {
		return fmt.Sprintf("generation %d waits for its confirmation until %s: fleetingd confirm keeps it, fleetingd rollback takes it back",
			j.Head.Generation, j.Waiting.Deadline.Local().Format(time.TimeOnly))
	}
	return fmt.Sprintf("an apply that began at %s has not ended; if none is running, it was cut off, and `fleetingd rollback --unconfirmed` ends it",
		j.Head.Started.Local().Format(time.DateTime))
}

func show(c *cli.Context, change *apply.Change, spec string) error {
	if c.Bool("json") {
		return change.WriteJSON(c.App.Writer)
	}
	return change.Render(c.App.Writer, apply.View{Spec: spec, Color: colorful(c.App.Writer)})
}

// colorful reports whether colours help whoever reads w (https://no-color.org).
func colorful(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && term.IsTerminal(int(f.Fd()))
}

func applyAction(c *cli.Context) error {
	if c.IsSet("confirm") && (c.Duration("confirm") < time.Second || c.String("root") != "") {
		return usageErrorf("apply: --confirm takes at least 1s, and not together with --root")
	}
	ctx, stop := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	t, err := openTarget(ctx, c, true)
	if err != nil {
		return err
	}
	defer t.close()
	o := apply.Options{Allow: apply.Allow{Overwrite: c.Bool("overwrite"), Adopt: c.Bool("adopt")}, Confirm: c.Duration("confirm")}
	return doChange(ctx, c, t.engine, t.change, t.spec, o)
}

// doChange shows a change, asks, and does it.
func doChange(ctx context.Context, c *cli.Context, e *apply.Engine, change *apply.Change, what string, o apply.Options) error {
	if err := show(c, change, what); err != nil || change.Empty() {
		return err
	}
	if err := change.Refusal(o.Allow); err != nil {
		return err
	}
	if err := approve(c, "Apply?"); err != nil {
		return err
	}
	e.Progress = progress(c.App.ErrWriter)
	res, err := e.Apply(ctx, change, o)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.App.Writer, "%s: generation %d is in place, %s\n", change.Plan.Host, res.Generation, count(res.Steps, "step"))
	if !res.Deadline.IsZero() {
		fmt.Fprintf(c.App.Writer, "It is undone at %s, unless somebody confirms it before. From a new login: fleetingd confirm\n",
			res.Deadline.Local().Format(time.TimeOnly))
	}
	return nil
}

// progress prints a line for each step that may take a while.
func progress(w io.Writer) func(s apply.Step, i, of int) {
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	return func(s apply.Step, i, of int) {
		fmt.Fprintf(w, "\r\x1b[K[%d/%d] %.70s", i+1, of, s.Object)
		if i+1 == of {
			fmt.Fprint(w, "\r\x1b[K")
		}
	}
}

// approve asks on the terminal. Without one, nobody can say yes.
func approve(c *cli.Context, question string) error {
	if c.Bool("auto-approve") {
		return nil
	}
	if in, ok := c.App.Reader.(*os.File); !ok || !term.IsTerminal(int(in.Fd())) {
		return fmt.Errorf("%s: nothing was changed, since nobody can be asked without a terminal; --auto-approve does it without asking", c.Command.Name)
	}
	fmt.Fprintf(c.App.Writer, "\n%s [y/N] ", question)
	line, err := bufio.NewReader(c.App.Reader).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if answer := strings.ToLower(strings.TrimSpace(line)); answer != "y" && answer != "yes" {
		return errors.New("nothing was changed")
	}
	return nil
}
