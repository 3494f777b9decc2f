package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
)

// The plugin is two processes. GitLab Runner never restarts a plugin that died: it stays up, takes no more jobs, and systemd
// considers the service healthy. So the process that the runner starts, the front, holds only the handshake and the RPC endpoint. Its
// child, the back, is a Group and does all the work. When the back dies, or the plan or the binary changes, the front starts another
// one, which repeats Init, and passes the calls on. Workers are not affected: the new Group adopts them.

const (
	// callPatience is how long a call waits while the back is being restarted.
	callPatience = 5 * time.Second
	// A back that cannot be started is retried after minRebirth, then after twice as long each time, up to maxRebirth.
	minRebirth = 500 * time.Millisecond
	maxRebirth = 30 * time.Second
	// patientBirths is how many starts in a row may fail before calls return the reason at once.
	patientBirths = 2
)

// front is the process that GitLab Runner talks to.
type front struct {
	check  func([]byte) error // checks a plugin_config
	launch func(launchOptions) (*back, error)
	watch  time.Duration // how often plan and binary are checked for changes

	log      hclog.Logger
	config   json.RawMessage
	settings provider.Settings

	life sync.Mutex // held by Init, Shutdown and a replacement

	mu      sync.Mutex
	back    *back         // nil while none is running
	ready   chan struct{} // closed when back is set; replaced when the back goes
	failure error         // why no back is running; set after patientBirths failed starts
	closed  chan struct{} // closed by Shutdown
	ended   chan struct{} // closed when the supervisor has ended
}

var (
	_ provider.InstanceGroup = (*front)(nil)
	_ json.Unmarshaler       = (*front)(nil)
)

func newFront(check func([]byte) error, launch func(launchOptions) (*back, error)) *front {
	return &front{check: check, launch: launch, watch: watchInterval, ready: make(chan struct{}), closed: make(chan struct{})}
}

// UnmarshalJSON checks and stores the plugin_config; it refuses what a Group would refuse.
func (f *front) UnmarshalJSON(data []byte) error {
	if err := f.check(data); err != nil {
		return err
	}
	f.config = append(json.RawMessage(nil), data...)
	return nil
}

// Init starts the first back. Its errors are those of the Group.
func (f *front) Init(ctx context.Context, log hclog.Logger, settings provider.Settings) (provider.ProviderInfo, error) {
	f.life.Lock()
	defer f.life.Unlock()
	if f.log != nil {
		return provider.ProviderInfo{}, errors.New("the plugin was initialized twice in one process; it serves one pool")
	}
	f.log, f.settings = log.Named("fleetingd"), settings
	b, info, err := f.birth(ctx)
	if err != nil {
		f.log = nil
		return provider.ProviderInfo{}, err
	}
	f.ended = make(chan struct{})
	f.set(b)
	go f.supervise(b)
	return info, nil
}

// birth starts a back and calls its Init.
func (f *front) birth(ctx context.Context) (*back, provider.ProviderInfo, error) {
	var info provider.ProviderInfo
	b, err := f.launch(launchOptions{})
	if err != nil {
		return nil, info, err
	}
	if err := b.call(ctx, "Init", InitArgs{f.config, f.settings}, &info); err != nil {
		b.kill()
		return nil, info, err
	}
	return b, info, nil
}

func (f *front) set(b *back) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.back, f.failure = b, nil
	closeOnce(f.ready)
}

func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// unset makes calls wait for the next back. It is called by the first to notice that the back is gone.
func (f *front) unset(b *back) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.back == b {
		f.back, f.ready = nil, make(chan struct{})
	}
}

// supervise keeps a back running until Shutdown.
func (f *front) supervise(b *back) {
	defer close(f.ended)
	w := newWatcher(planPath(f.config))
	tick := time.NewTicker(f.watch)
	defer tick.Stop()
	for {
		select {
		case <-b.gone:
			f.unset(b)
			if f.isClosing() {
				return
			}
			f.log.Warn("the plugin's working half ended; starting it again", "pid", b.pid, "reason", b.reason())
			seen := w.look()
			if b = f.rebirth(); b == nil {
				return
			}
			w.accept(seen)
		case <-tick.C:
			if what, seen := w.changed(); what != "" {
				if next := f.replace(b, what); next != nil {
					b = next
				}
				w.accept(seen)
			}
		}
	}
}

// rebirth starts a back, trying as often as necessary. It returns nil if the plugin is ending.
func (f *front) rebirth() *back {
	pause := minRebirth
	for failed := 1; ; failed++ {
		ctx, cancel := context.WithTimeout(context.Background(), birthTimeout)
		b, _, err := f.birth(ctx)
		cancel()
		if f.isClosing() {
			if b != nil {
				b.kill()
			}
			return nil
		}
		if err == nil {
			f.set(b)
			f.log.Debug("the plugin's working half has been restarted", "pid", b.pid)
			return b
		}
		if failed < patientBirths {
			continue
		}
		f.mu.Lock()
		f.failure = fmt.Errorf("the plugin's working half cannot be started: %w", err)
		f.mu.Unlock()
		f.log.Error("cannot start the plugin's working half; no workers are created until it starts", "error", err, "attempt", failed,
			"again_in", pause.String())
		if !f.sleep(pause) {
			return nil
		}
		// Jitter, because the plugins of several pools fail for the same reason at the same time.
		pause = min(2*pause, maxRebirth) - rand.N(pause/4)
	}
}

// sleep waits, and reports false if the plugin is ending.
func (f *front) sleep(d time.Duration) bool {
	select {
	case <-f.closed:
		return false
	case <-time.After(d):
		return true
	}
}

func (f *front) isClosing() bool {
	select {
	case <-f.closed:
		return true
	default:
		return false
	}
}

// replace starts another back because the plan or the binary has changed. It first asks a trial back whether it could take over; if
// not, the old one stays. It waits until no worker is being created, so that none is lost.
func (f *front) replace(old *back, what string) *back {
	ctx, cancel := context.WithTimeout(context.Background(), quietTimeout+birthTimeout)
	defer cancel()
	if err := f.tryOut(ctx); err != nil {
		f.log.Error("cannot use the new version; the plugin continues with the old one", "changed", what, "error", err)
		return nil
	}
	if !f.waitQuiet(ctx, old) {
		return nil // it died meanwhile, or the plugin is ending: supervise handles that
	}
	f.life.Lock()
	defer f.life.Unlock()
	if f.isClosing() {
		return nil
	}
	f.unset(old)
	if err := old.call(ctx, "Shutdown", ShutdownArgs{endTimeout}, &struct{}{}); err != nil {
		f.log.Debug("shutting down the plugin's former working half", "error", err)
	}
	old.end(ctx)
	b := f.rebirth()
	if b != nil {
		f.log.Info("replaced the plugin's working half", "changed", what)
	}
	return b
}

// tryOut asks a second back whether it could start with the plan and the settings. It does not affect the first.
func (f *front) tryOut(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, birthTimeout)
	defer cancel()
	b, err := f.launch(launchOptions{fresh: true})
	if err != nil {
		return err
	}
	defer b.kill()
	return b.call(ctx, "Check", InitArgs{f.config, f.settings}, &struct{}{})
}

// waitQuiet waits until a back creates no workers, for quietTimeout at most.
func (f *front) waitQuiet(ctx context.Context, b *back) bool {
	for deadline := time.Now().Add(quietTimeout); time.Now().Before(deadline); {
		var creating int
		if err := b.call(ctx, "Creating", struct{}{}, &creating); err != nil {
			return false
		}
		if creating == 0 {
			return true
		}
		if !f.sleep(200 * time.Millisecond) {
			return false
		}
	}
	return true
}

// do calls the back, and the next one if that one dies meanwhile: all calls may be repeated. While no back can be started, it
// waits before it returns the error, since the runner calls, and logs, several times a second.
func (f *front) do(ctx context.Context, method string, args, reply any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, callPatience, errors.New("the plugin's working half is being started again"))
	defer cancel()
	for {
		f.mu.Lock()
		b, ready, failure := f.back, f.ready, f.failure
		f.mu.Unlock()
		switch {
		case f.isClosing():
			return errShutdown
		case b != nil:
			if err := b.call(ctx, method, args, reply); !errors.Is(err, errBackGone) {
				return err
			}
			// supervise will notice it in a moment, too.
			select {
			case <-b.gone:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			f.unset(b)
		default:
			select {
			case <-ready:
			case <-f.closed:
			case <-ctx.Done():
				if failure != nil {
					return failure
				}
				return context.Cause(ctx)
			}
		}
	}
}

// Update reports every worker once: an answer that a dying back had begun is dropped.
func (f *front) Update(ctx context.Context, fn func(id string, state provider.State)) error {
	var all []ShownWorker
	if err := f.do(ctx, "Update", struct{}{}, &all); err != nil {
		return err
	}
	for _, s := range all {
		fn(s.ID, s.State)
	}
	return nil
}

// Increase asks for n workers. If a back dies before it answers, the next one removes the workers that it began.
func (f *front) Increase(ctx context.Context, n int) (int, error) {
	var made int
	err := f.do(ctx, "Increase", n, &made)
	return made, err
}

// Decrease removes workers.
func (f *front) Decrease(ctx context.Context, ids []string) ([]string, error) {
	var removed []string
	err := f.do(ctx, "Decrease", ids, &removed)
	return removed, err
}

// ConnectInfo returns how to reach a worker.
func (f *front) ConnectInfo(ctx context.Context, id string) (provider.ConnectInfo, error) {
	var info provider.ConnectInfo
	err := f.do(ctx, "ConnectInfo", id, &info)
	return info, err
}

// Heartbeat returns an error if a worker is not running.
func (f *front) Heartbeat(ctx context.Context, id string) error {
	return f.do(ctx, "Heartbeat", id, &struct{}{})
}

// Suspend is not supported: ProviderInfo does not offer it.
func (f *front) Suspend(context.Context, []string) ([]string, error) {
	return nil, provider.ErrSuspendResumeNotSupported
}

// Resume is not supported: ProviderInfo does not offer it.
func (f *front) Resume(context.Context, []string) ([]string, error) {
	return nil, provider.ErrSuspendResumeNotSupported
}

// Shutdown shuts the back down. It is idempotent.
func (f *front) Shutdown(ctx context.Context) error {
	f.mu.Lock()
	b := f.back
	closeOnce(f.closed)
	f.mu.Unlock()
	f.life.Lock()
	defer f.life.Unlock()
	if f.log == nil {
		return nil // Init was not called, or failed
	}
	var err error
	if b != nil {
		left := endTimeout
		if d, ok := ctx.Deadline(); ok {
			left = time.Until(d)
		}
		if err = b.call(ctx, "Shutdown", ShutdownArgs{left}, &struct{}{}); errors.Is(err, errBackGone) {
			err = nil // the next plugin cleans up what it left
		}
		b.end(ctx)
	}
	f.set(nil)
	select {
	case <-f.ended:
	case <-ctx.Done():
	}
	return err
}

// endOnce shuts the plugin down and returns the exit code.
func (f *front) endOnce(reason string) int {
	ctx, cancel := context.WithTimeout(context.Background(), endTimeout)
	defer cancel()
	f.life.Lock()
	log := f.log
	f.life.Unlock()
	if log != nil {
		log.Info("plugin shutting down", "reason", reason)
	}
	if err := f.Shutdown(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "fleetingd:", err)
		return 1
	}
	return 0
}
