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

// The plugin is two processes. GitLab Runner never starts a plugin again that died: it stays up, takes no further job, and systemd
// sees a healthy service. So what the runner starts, the front, holds the handshake, the RPC endpoint and no state worth mentioning. Its
// child, the back, is a Group and does all the work. The front starts a back again when it dies, or when the plan or the binary
// changed, has it replay Init, and hands the calls on. Workers do not notice: a Group adopts them.

const (
	// callPatience is how long a call waits for a back that is being started again.
	callPatience = 5 * time.Second
	// A back that cannot be started is tried again after minRebirth, then after twice as long each time, up to maxRebirth.
	minRebirth = 500 * time.Millisecond
	maxRebirth = 30 * time.Second
	// patientBirths is how many births in a row may fail before calls are answered with the reason at once.
	patientBirths = 2
)

// front is what GitLab Runner talks to.
type front struct {
	check  func([]byte) error // of a plugin_config
	launch func(launchOptions) (*back, error)
	watch  time.Duration // how often plan and binary are looked at

	log      hclog.Logger
	config   json.RawMessage
	settings provider.Settings

	life sync.Mutex // held by Init, Shutdown and a replacement

	mu      sync.Mutex
	back    *back         // nil while there is none
	ready   chan struct{} // closed when back is set; another one when it goes
	failure error         // why there is no back; set after patientBirths failed births
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

// UnmarshalJSON takes the plugin_config, and refuses what a Group would.
func (f *front) UnmarshalJSON(data []byte) error {
	if err := f.check(data); err != nil {
		return err
	}
	f.config = append(json.RawMessage(nil), data...)
	return nil
}

// Init starts the first back. Its error is the Group's.
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

// birth starts a back and has it do Init.
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

// unset takes a back away from the calls: they wait for the next one. Whoever notices first that it is gone does so.
func (f *front) unset(b *back) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.back == b {
		f.back, f.ready = nil, make(chan struct{})
	}
}

// supervise sees to it that there is a back, until Shutdown.
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

// rebirth starts a back, as often as it takes; nil where the plugin is ending.
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
			f.log.Debug("the plugin's working half is back", "pid", b.pid)
			return b
		}
		if failed < patientBirths {
			continue
		}
		f.mu.Lock()
		f.failure = fmt.Errorf("the plugin's working half does not start: %w", err)
		f.mu.Unlock()
		f.log.Error("the plugin's working half does not start; no worker is made until it does", "error", err, "attempt", failed,
			"again_in", pause.String())
		if !f.sleep(pause) {
			return nil
		}
		// Jittered: the plugins of several pools fail for one reason.
		pause = min(2*pause, maxRebirth) - rand.N(pause/4)
	}
}

// sleep waits, unless the plugin is ending.
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

// replace has another back take over because plan or binary changed. The new one is asked first whether it could; where it could not,
// the former one stays. The change comes at a moment when no worker is being made, so that none is lost to it.
func (f *front) replace(old *back, what string) *back {
	ctx, cancel := context.WithTimeout(context.Background(), quietTimeout+birthTimeout)
	defer cancel()
	if err := f.tryOut(ctx); err != nil {
		f.log.Error("what changed cannot be used; the plugin goes on with what it has", "changed", what, "error", err)
		return nil
	}
	if !f.waitQuiet(ctx, old) {
		return nil // it died meanwhile, or the plugin is ending: the supervisor sees to that
	}
	f.life.Lock()
	defer f.life.Unlock()
	if f.isClosing() {
		return nil
	}
	f.unset(old)
	if err := old.call(ctx, "Shutdown", ShutdownArgs{endTimeout}, &struct{}{}); err != nil {
		f.log.Debug("the plugin's former working half", "error", err)
	}
	old.end(ctx)
	b := f.rebirth()
	if b != nil {
		f.log.Info("the plugin's working half is replaced", "changed", what)
	}
	return b
}

// tryOut asks a second back whether plan and settings would do. It takes nothing from the first.
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

// waitQuiet waits until a back makes no worker, for quietTimeout at most.
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

// do calls the back, and calls the next one where that one dies meanwhile: all calls may be made twice. While none can be started it
// takes its time to say so, since the runner asks, and logs, several times a second.
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
			// The supervisor notices it in a moment, too.
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

// Update shows every worker, once: what a back that died has shown already is forgotten.
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

// Increase asks for n workers. Those that a back has begun to make before it died are removed by the next.
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

// ConnectInfo is how to reach a worker.
func (f *front) ConnectInfo(ctx context.Context, id string) (provider.ConnectInfo, error) {
	var info provider.ConnectInfo
	err := f.do(ctx, "ConnectInfo", id, &info)
	return info, err
}

// Heartbeat fails where a worker is not running.
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

// Shutdown ends the back in order. It may be called again.
func (f *front) Shutdown(ctx context.Context) error {
	f.mu.Lock()
	b := f.back
	closeOnce(f.closed)
	f.mu.Unlock()
	f.life.Lock()
	defer f.life.Unlock()
	if f.log == nil {
		return nil // Init has not been there, or failed
	}
	var err error
	if b != nil {
		left := endTimeout
		if d, ok := ctx.Deadline(); ok {
			left = time.Until(d)
		}
		if err = b.call(ctx, "Shutdown", ShutdownArgs{left}, &struct{}{}); errors.Is(err, errBackGone) {
			err = nil // what it left is the next plugin's
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

// endOnce ends the plugin and returns the exit code.
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
