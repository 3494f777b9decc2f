package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
)

func runCommand() *cli.Command {
	return &cli.Command{
		Name:      "run",
		Usage:     "run a command in fresh VMs, on a host where nothing is set up",
		ArgsUsage: "HOST -- CMD…",
		Description: `Brings up what the spec's host needs (network, firewall, a file system that can clone), prebuilds the
pool's image unless it is there, starts workers through the same plugin that GitLab Runner starts, runs CMD
on each over SSH, and takes everything down again but its caches. Exits with CMD's exit code.

One word of CMD is a script for the worker's shell ('make && make test'); several are run as they are.`,
		Flags: append(specFlags(),
			&cli.StringFlag{Name: "pool", Usage: "the pool to start workers of; may be left out where there is only one", Value: ""},
			&cli.IntFlag{Name: "n", Usage: "how many workers", Value: 1},
			&cli.BoolFlag{Name: "keep", Usage: "keep the workers until Ctrl-C when CMD has ended"},
			&cli.BoolFlag{Name: "timings", Usage: "print how long each phase took, as JSON on standard error"},
			&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "show the plugin's log"},
		),
		Action: runAction,
	}
}

// runJobsName is the command that the root half starts as the runtime user.
const runJobsName = "internal-run-jobs"

func runJobsCommand() *cli.Command {
	return &cli.Command{
		Name:   runJobsName,
		Hidden: true,
		Usage:  "the unprivileged half of run",
		Action: func(*cli.Context) error { return runJobs() },
	}
}

func runAction(c *cli.Context) error {
	command := jobCommand(c.Args().Tail())
	if len(command) == 0 {
		return usageErrorf("run needs a spec and a command: fleetingd run host.hcl -- uname -a")
	}
	if c.Int("n") < 1 {
		return usageErrorf("-n %d: at least one worker is needed", c.Int("n"))
	}
	spec, p, err := compileSpec(c, compile.Options{})
	if err != nil {
		return err
	}
	pool, err := pickPool(p, c.String("pool"), c.Int("n"))
	if err != nil {
		return err
	}
	where := ""
	if line := p.Origin(plan.KindPool, pool.Name); line != "" {
		where = line + ": "
	}
	if err := p.CanStart(pool); err != nil {
		return fmt.Errorf("%s%w", where, err)
	}
	if os.Getuid() != 0 {
		return errors.New("run needs root to make interfaces, firewall rules and a mount; the plugin and the VMs then run as an ordinary user. Try: sudo fleetingd run …")
	}
	if pool.Limits.CPUQuotaPercent > 0 {
		fmt.Fprintf(c.App.ErrWriter, "fleetingd: %spool %q: this run does not hold its workers to cpu_quota: that takes the cgroup which "+
			"systemd delegates to gitlab-runner.service\n", where, pool.Name)
	}
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	r := &hostRun{
		plan:    p,
		pool:    pool,
		view:    newView(os.Stderr),
		secrets: spec.Host.SecretVariables(),
		req: jobRequest{
			Pool: pool.Name, Instances: c.Int("n"), Command: command,
			Keep: c.Bool("keep"), Verbose: c.Bool("verbose"), Secrets: prebuildSecrets(spec.Host),
		},
	}
	start := time.Now()
	code, err := r.run(ctx)
	if c.Bool("timings") {
		err = errors.Join(err, printTimings(os.Stderr, r.view.phases, time.Since(start)))
	}
	if err != nil {
		return exitError{err, max(code, 1)}
	}
	if code != 0 {
		return cli.Exit("", code)
	}
	return nil
}

// jobCommand is what follows "--". Without it the command's own flags would be taken for run's.
func jobCommand(args []string) []string {
	if len(args) < 2 || args[0] != "--" {
		return nil
	}
	return args[1:]
}

func usageErrorf(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// exitError is an error with an exit code of its own.
type exitError struct {
	error
	code int
}

func (e exitError) ExitCode() int { return e.code }
func (e exitError) Unwrap() error { return e.error }

// pickPool is the named pool, or the only one.
func pickPool(p *plan.Plan, name string, n int) (*plan.Pool, error) {
	if name == "" {
		if len(p.Pools) != 1 {
			var names []string
			for _, pool := range p.Pools {
				names = append(names, pool.Name)
			}
			return nil, usageErrorf("the spec has %d pools; choose one with --pool (%s)", len(p.Pools), strings.Join(names, ", "))
		}
		name = p.Pools[0].Name
	}
	pool, err := p.Pool(name)
	if err != nil {
		return nil, usageError{err}
	}
	if n > pool.MaxInstances {
		return nil, usageErrorf("-n %d: pool %q has max_instances = %d", n, name, pool.MaxInstances)
	}
	return pool, nil
}

// hostRun is the root half of a run: it brings up what `apply` does for good,
// and starts the unprivileged half.
type hostRun struct {
	plan *plan.Plan
	pool *plan.Pool
	view *view
	req  jobRequest
	user runtimeUser
	// secrets are the variables of the environment that hold secrets of the spec.
	secrets []string
	undo    []func() error // in the order they were done; run in reverse

	// The run's part of the session: see join.
	setup, sessionLock, number, poolLock *state.Lock
	session                              session
	own                                  guestRun
}

func (r *hostRun) run(ctx context.Context) (code int, err error) {
	defer func() {
		end := r.view.begin("clean up", "host")
		err = errors.Join(err, r.unwind())
		end.done("host")
	}()
	r.user, err = findRuntimeUser(r.plan)
	if err != nil {
		return 1, err
	}
	for _, step := range []func(context.Context) error{r.join, r.folders, r.disks, r.network, r.settled, r.base} {
		if err := step(ctx); err != nil {
			return 1, err
		}
		if ctx.Err() != nil {
			return 130, nil
		}
	}
	rep, err := r.unprivileged(ctx, r.user, r.req)
	if err != nil {
		return 1, err
	}
	r.view.phases = append(r.view.phases, rep.Phases...)
	if rep.Error != "" {
		return rep.ExitCode, errors.New(rep.Error)
	}
	return rep.ExitCode, nil
}

func (r *hostRun) unwind() error {
	var errs []error
	for i := len(r.undo) - 1; i >= 0; i-- {
		if err := r.undo[i](); err != nil {
			errs = append(errs, fmt.Errorf("clean up: %w", err))
		}
	}
	r.undo = nil
	return errors.Join(errs...)
}

func (r *hostRun) defers(undo func() error) { r.undo = append(r.undo, undo) }

// folders makes the state folders, for the runtime user, and a way to open TAPs.
func (r *hostRun) folders(context.Context) error {
	p := r.plan.Paths
	if _, err := mkdirs(p.State, 0, 0); err != nil {
		return err
	}
	if err := reachable(p.State); err != nil {
		return err
	}
	for _, dir := range []string{p.Workers, p.Cache} {
		if _, err := mkdirs(dir, r.user.UID, r.user.GID); err != nil {
			return err
		}
		if err := chownTree(dir, r.user); err != nil {
			return err
		}
	}
	return r.ownTUN()
}

// disks gives the clones a file system that can clone.
func (r *hostRun) disks(ctx context.Context) error {
	ph := r.view.begin("disks", r.plan.Paths.Disks)
	d, err := host.DisksUp(ctx, r.plan, image.CanClone)
	if err != nil {
		return err
	}
	if !d.Found { // else they are mounted for good, or by another run
		r.session.Disks = true
		if err := writeJSON(sessionPath(), r.session); err != nil {
			return err
		}
	}
	for _, dir := range []string{r.plan.Paths.Images, r.plan.Paths.Clones} {
		if _, err := mkdirs(dir, r.user.UID, r.user.GID); err != nil {
			return err
		}
		// Not of what a link there points at: the folder above may be the user's.
		if err := os.Lchown(dir, r.user.UID, r.user.GID); err != nil {
			return err
		}
	}
	ph.done(d.String())
	return nil
}

// network brings the workers' network up. One that is up for good, for a runner of this host, is used if it is the same, and never changed.
func (r *hostRun) network(ctx context.Context) error {
	ph := r.view.begin("network", r.plan.Network.Subnet.String())
	if err := host.NetworkUp(ctx, r.plan, r.user.options()); err != nil {
		return err
	}
	troubles, err := host.Troubles(r.plan, r.plan.Slots)
	if err != nil {
		return err
	}
	for _, t := range troubles {
		r.view.log("warning: " + t.String())
	}
	ph.done(fmt.Sprintf("%d slots in %s, out by %s", len(r.plan.Slots), r.plan.Network.Subnet, r.plan.EgressInterface))
	return nil
}

// base makes the base images that only root can make.
func (r *hostRun) base(ctx context.Context) error {
	img, err := r.plan.Image(r.pool.Image)
	if err != nil {
		return err
	}
	ip := newImageProgress(r.view)
	ip.new = true // the unprivileged half says it of all images
	_, err = image.NewBuilder(r.plan, image.Options{Log: slog.New(slog.DiscardHandler), Progress: ip.show}).Build(ctx, img, false)
	ip.end(err == nil)
	return err
}

// withoutSecrets is an environment for processes of the runtime user, whose environment every other one of them may read.
func withoutSecrets(environ, secrets []string) []string {
	return slices.DeleteFunc(slices.Clone(environ), func(line string) bool {
		name, _, _ := strings.Cut(line, "=")
		return slices.Contains(secrets, name) || strings.HasPrefix(name, "FLEETINGD_VAR_")
	})
}

// unprivileged starts the unprivileged half as the user, and waits for its report.
func (r *hostRun) unprivileged(ctx context.Context, user runtimeUser, req jobRequest) (jobReport, error) {
	var rep jobReport
	request, toChild, err := os.Pipe()
	if err != nil {
		return rep, err
	}
	fromChild, report, err := os.Pipe()
	if err != nil {
		return rep, errors.Join(err, request.Close(), toChild.Close())
	}
	defer fromChild.Close()
	cmd := exec.CommandContext(ctx, selfExe, runJobsName)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{request, report} // requestFD, reportFD
	cmd.Dir = "/"
	cmd.Env = append(append(withoutSecrets(os.Environ(), r.secrets), "HOME="+r.plan.Paths.State, "TMPDIR="+os.TempDir()), r.tunEnviron()...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: user.credential(),
		// A root half that is killed must not leave workers behind that nobody takes down.
		Pdeathsig: syscall.SIGTERM,
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	err = cmd.Start()
	request.Close()
	report.Close()
	if err != nil {
		toChild.Close()
		return rep, fmt.Errorf("start the unprivileged half as uid %d: %w", user.UID, err)
	}
	sent := json.NewEncoder(toChild).Encode(req)
	toChild.Close()
	decoded := json.NewDecoder(fromChild).Decode(&rep)
	err = cmd.Wait()
	if decoded != nil {
		return rep, fmt.Errorf("the unprivileged half ended without a report: %w", errors.Join(sent, err, decoded))
	}
	return rep, nil
}
