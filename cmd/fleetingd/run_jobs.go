package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"gitlab.com/gitlab-org/fleeting/fleeting"
	"gitlab.com/gitlab-org/fleeting/fleeting/connector"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"

	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// jobRequest is what the root half of `fleetingd run` tells the unprivileged
// half, over a pipe: the command must not stand in two process lists.
type jobRequest struct {
	Plan      string   `json:"plan"` // path of plan.json
	Pool      string   `json:"pool"`
	Instances int      `json:"instances"`
	Command   []string `json:"command"`
	Keep      bool     `json:"keep"`
	Verbose   bool     `json:"verbose"`
	Sweep     bool     `json:"sweep"` // run nothing: remove the pool's workers
	// Secrets are those of the prebuilds' files, by their places. The unprivileged half may not be able to read them itself.
	Secrets map[string]secretValue `json:"secrets,omitempty"`
}

// secretValue is a secret, or why it cannot be read: that matters only where an image is to be built.
type secretValue struct {
	Value string `json:"value,omitempty"`
	Error string `json:"error,omitempty"`
}

func (req *jobRequest) secret(from string) (string, error) {
	s, ok := req.Secrets[from]
	switch {
	case !ok:
		return "", fmt.Errorf("the spec names no secret %q", from)
	case s.Error != "":
		return "", errors.New(s.Error)
	}
	return s.Value, nil
}

// prebuildSecrets reads what the prebuilds of a spec need.
func prebuildSecrets(h *hostspec.Host) map[string]secretValue {
	all := map[string]secretValue{}
	for s := range h.PrebuildSecrets() {
		value, err := s.Read()
		if err != nil {
			all[s.From] = secretValue{Error: err.Error()}
			continue
		}
		all[s.From] = secretValue{Value: value}
	}
	return all
}

// jobReport is the answer.
type jobReport struct {
	ExitCode int     `json:"exit_code"`
	Error    string  `json:"error,omitempty"`
	Phases   []Phase `json:"phases"`
}

// The pipes of the unprivileged half.
const (
	requestFD = 3
	reportFD  = 4
)

// selfExe is this program, whatever its path is and whoever may reach that:
// the kernel's link needs no search permission on the folders above.
const selfExe = "/proc/self/exe"

// runJobs is the unprivileged half of `fleetingd run`: prebuild, then the plugin as a
// subprocess under fleeting's own Provisioner and connector, as GitLab Runner drives it.
func runJobs() error {
	var req jobRequest
	in := os.NewFile(requestFD, "request")
	err := json.NewDecoder(in).Decode(&req)
	in.Close()
	if err != nil {
		return fmt.Errorf("this command is for `fleetingd run` alone: no request on descriptor %d: %w", requestFD, err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()

	v := newView(os.Stderr)
	var code int
	if req.Sweep {
		err = sweep(req) // whatever signal comes: it has a deadline
	} else {
		code, err = runPool(ctx, v, req)
	}
	if ctx.Err() != nil && code == 0 {
		code = 130 // 128 + SIGINT, as shells say it
	}
	v.clear()
	rep := jobReport{ExitCode: code, Phases: v.phases}
	if err != nil {
		rep.Error = err.Error()
	}
	out := os.NewFile(reportFD, "report")
	defer out.Close()
	return json.NewEncoder(out).Encode(rep)
}

// runPool makes the image, starts the workers and runs the command on each. The
// exit code is the first non-zero one of the commands.
func runPool(ctx context.Context, v *view, req jobRequest) (int, error) {
	if err := prebuild(ctx, v, req); err != nil {
		return 1, err
	}
	pluginConfig, err := json.Marshal(map[string]string{"plan": req.Plan, "pool": req.Pool})
	if err != nil {
		return 1, err
	}
	var ending atomic.Bool
	log := pluginLog(v, req.Verbose, &ending)
	boot := v.begin("plugin", "starting as "+fmt.Sprintf("uid %d", os.Getuid()))
	plugin, err := fleeting.RunPlugin(selfExe, pluginConfig, fleeting.WithPluginLogger(log.Named("plugin")))
	if err != nil {
		return 1, fmt.Errorf("start the plugin: %w", err)
	}
	defer plugin.Kill()

	updates := make(chan fleeting.Instance, 64)
	prov, err := fleeting.Init(ctx, log.Named("provisioner"), plugin.InstanceGroup(),
		fleeting.WithMaxSize(0),
		fleeting.WithUpdateInterval(time.Second),
		// The plugin's Update costs microseconds; this bounds how late a ready worker is noticed.
		fleeting.WithUpdateIntervalWhenExpecting(50*time.Millisecond),
		fleeting.WithDeletionRetryInterval(10*time.Second),
		fleeting.WithShutdownDeletionInterval(100*time.Millisecond),
		fleeting.WithShutdownDeletionRetries(300),
		fleeting.WithSubscriber(func(all []fleeting.Instance) {
			for _, i := range all {
				updates <- i
			}
		}))
	if err != nil {
		return 1, err
	}
	boot.done(fmt.Sprintf("running as uid %d", os.Getuid()))
	defer func() {
		// Nothing reads updates any more, and the Provisioner must not block on them.
		go func() {
			for range updates {
			}
		}()
		ending.Store(true)
		end := v.begin("clean up", "workers")
		for _, i := range prov.Instances() {
			i.Delete()
		}
		prov.Shutdown(context.WithoutCancel(ctx))
		end.done("workers gone")
	}()

	r := &jobRun{v: v, req: req, updates: updates}
	return r.run(ctx, prov)
}

// jobRun is the workers of one run.
type jobRun struct {
	v       *view
	req     jobRequest
	updates <-chan fleeting.Instance
	out     sync.Mutex // of stdout and stderr, where several workers write
}

type jobResult struct {
	worker string
	code   int
	err    error
}

func (r *jobRun) run(ctx context.Context, prov *fleeting.Provisioner) (int, error) {
	n := r.req.Instances
	start := time.Now()
	waiting := r.v.begin("workers", r.progress(0))
	prov.Request(n)

	results := make(chan jobResult, n)
	started := map[string]bool{}
	ready, finished, code := 0, 0, 0
	var errs []error
	for finished < n {
		select {
		case <-ctx.Done():
			return code, errors.Join(errs...)
		case i := <-r.updates:
			switch {
			case started[i.ID()]:
			case i.Cause() == fleeting.CausePreexisted:
				// A run that was killed left it; it may hold a slot that this one needs.
				i.Delete()
			case i.State() == provider.StateRunning:
				started[i.ID()] = true
				ready++
				r.v.add(Phase{Name: "ready", Worker: i.ID(), Detail: i.ID(), Seconds: time.Since(start).Seconds()})
				if ready < n {
					waiting.update(r.progress(ready))
				}
				go func() { results <- r.job(ctx, i) }()
			case i.State() != provider.StateCreating:
				started[i.ID()] = true
				err := i.Heartbeat(ctx)
				if err == nil {
					err = errors.New("no reason given; --verbose shows the plugin's log")
				}
				results <- jobResult{worker: i.ID(), code: 1, err: fmt.Errorf("worker %s did not start (%s): %w", i.ID(), i.State(), err)}
			}
		case res := <-results:
			finished++
			if code == 0 {
				code = res.code
			}
			if res.err != nil {
				errs = append(errs, res.err)
			}
		}
	}
	if r.req.Keep {
		r.v.clear()
		fmt.Fprintln(os.Stderr, "fleetingd: --keep: the workers stay until Ctrl-C (or SIGTERM)")
		<-ctx.Done()
	}
	return code, errors.Join(errs...)
}

func (r *jobRun) progress(ready int) string {
	return fmt.Sprintf("%d of %d ready", ready, r.req.Instances)
}

// job runs the command on a worker that is ready.
func (r *jobRun) job(ctx context.Context, i fleeting.Instance) jobResult {
	res := jobResult{worker: i.ID()}
	info, err := i.ConnectInfo(ctx)
	if err != nil {
		res.code, res.err = 1, fmt.Errorf("worker %s: connect info: %w", i.ID(), err)
		return res
	}
	if r.req.Keep {
		r.v.log(fmt.Sprintf("kept: %s %s@%s", i.ID(), info.Username, info.InternalAddr))
	}
	stdout, stderr := r.writers(i.ID())
	defer stdout.Close()
	defer stderr.Close()
	r.v.clear()
	start := time.Now()
	err = newWorkerSession().run(ctx, info, connector.RunOptions{Command: shellCommand(r.req.Command), Stdout: stdout, Stderr: stderr})
	r.v.add(Phase{Name: "command", Worker: i.ID(), Detail: i.ID(), Seconds: time.Since(start).Seconds()})
	var exit *connector.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit) && exit.ExitCode() != 0:
		res.code = exit.ExitCode()
	case ctx.Err() != nil:
		res.code = 130
	default:
		// The command ended without an exit code: the connection broke, or the VM died under it.
		if hb := i.Heartbeat(ctx); hb != nil {
			err = fmt.Errorf("%w (%w)", hb, err)
		}
		res.code, res.err = 1, fmt.Errorf("worker %s: %w", i.ID(), err)
	}
	return res
}

// writers are where a worker's output goes: as it is for one worker, line by
// line with the worker's name before it for several.
func (r *jobRun) writers(id string) (stdout, stderr io.WriteCloser) {
	if r.req.Instances == 1 {
		return nopCloser{os.Stdout}, nopCloser{os.Stderr}
	}
	return &lines{mu: &r.out, w: os.Stdout, prefix: id + ": "}, &lines{mu: &r.out, w: os.Stderr, prefix: id + ": "}
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// shellCommand is what SSH hands to the login shell. One word is a script, as in
// `ssh host 'a; b'`; several are an argument vector, so that
// `-- sh -c 'echo $HOME'` runs exactly that.
func shellCommand(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}

// pluginLog is the plugin's and the Provisioner's log: what went wrong is shown, the
// rest only with --verbose.
func pluginLog(v *view, verbose bool, ending *atomic.Bool) hclog.Logger {
	level := hclog.Error
	if verbose {
		level = hclog.Debug
	}
	return hclog.New(&hclog.LoggerOptions{Level: level, Output: viewWriter{v}, DisableTime: true,
		// The Provisioner's Shutdown cancels its own loop, which then reports that as an error, and asks again itself.
		Exclude: func(_ hclog.Level, msg string, _ ...any) bool {
			return ending.Load() && (msg == "reconcile" || msg == "decreasing instances")
		},
	})
}

// viewWriter takes the live line away before a log line is written.
type viewWriter struct{ v *view }

func (w viewWriter) Write(p []byte) (int, error) {
	w.v.clear()
	return os.Stderr.Write(p)
}
