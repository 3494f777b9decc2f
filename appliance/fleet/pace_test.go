package fleet

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"gitlab.com/gitlab-org/fleeting/fleeting"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// TestFailuresArePaced drives the Group with fleeting's own Provisioner on a host where no VM starts, for more than a minute of fake
// time, and then on one where VMs start again.
func TestFailuresArePaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHost(t, 8)
		var cured atomic.Bool
		var tries atomic.Int64
		h.driver.start = func(_ context.Context, cfg vm.Config) error {
			if cured.Load() {
				return nil
			}
			tries.Add(1)
			return fmt.Errorf("open /dev/net/tun for %s: permission denied; chmod 0666 /dev/net/tun", cfg.Net.TAP)
		}
		g := h.group()
		g.pace.least, g.pace.jitter = minPause, func(d time.Duration) time.Duration { return d }
		runnerLog := &logBuffer{}
		p, err := fleeting.Init(t.Context(), hclog.New(&hclog.LoggerOptions{Output: runnerLog, Level: hclog.Info}), logTo{g, h.logger()},
			fleeting.WithMaxSize(8), fleeting.WithUpdateInterval(time.Second), fleeting.WithUpdateIntervalWhenExpecting(100*time.Millisecond))
		if err != nil {
			t.Fatal(err)
		}
		// taskscaler asks for as many as are missing, too.
		demand := func(n int) {
			c := p.Capacity()
			if have := c.Creating + c.Running + c.Requested; have < n {
				p.Request(n - have)
			}
		}
		for end := time.Now().Add(70 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			demand(4)
		}
		tried := tries.Load()
		lines := strings.Count(h.log.String(), "\n") + strings.Count(runnerLog.String(), "\n")
		t.Logf("70 s on a host where no VM starts: %d workers tried, %d lines in the log of runner and plugin", tried, lines)
		if tried > 12 || lines > 200 {
			t.Errorf("%d workers tried, %d log lines\n%s", tried, lines, runnerLog)
		}
		if n := strings.Count(h.log.String(), "[ERROR]"); n < 5 || n > 8 {
			t.Errorf("%d error lines, want one an interval\n%s", n, h.log)
		}
		if !strings.Contains(h.log.String(), "chmod 0666 /dev/net/tun") {
			t.Errorf("the log does not say what to do\n%s", h.log)
		}

		cured.Store(true)
		start := time.Now()
		for ; p.Capacity().Running < 4; time.Sleep(100 * time.Millisecond) {
			demand(4)
			if time.Since(start) > 2*time.Minute {
				t.Fatalf("%+v\n%s", p.Capacity(), h.log)
			}
		}
		t.Logf("%v after the cure, four run", time.Since(start))
		// From now on nobody waits.
		start = time.Now()
		for ; p.Capacity().Running < 8; time.Sleep(100 * time.Millisecond) {
			demand(8)
		}
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("workers still wait %v", took)
		}
		p.Shutdown(t.Context())
		time.Sleep(2 * time.Second) // of the bubble: the Provisioner's loop looks for its end once a round
	})
}

// logTo gives the Group a logger of its own.
type logTo struct {
	*Group
	log hclog.Logger
}

func (l logTo) Init(ctx context.Context, _ hclog.Logger, s provider.Settings) (provider.ProviderInfo, error) {
	return l.Group.Init(ctx, l.log, s)
}

func TestPacer(t *testing.T) {
	now := time.Unix(0, 0)
	p := newPacer()
	p.now, p.jitter = func() time.Time { return now }, func(d time.Duration) time.Duration { return d }
	pass := func() (first bool) {
		t.Helper()
		first, err := p.wait(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return first
	}
	blocked := func() {
		t.Helper()
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errDeleted)
		if first, err := p.wait(ctx); first || !errors.Is(err, errDeleted) {
			t.Errorf("let through (%t, %v)", first, err)
		}
	}
	for range 2 {
		if pass() {
			t.Error("somebody tries for others where nothing is wrong")
		}
	}
	want := []time.Duration{1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300}
	for i, seconds := range want {
		v := p.ended(i > 0, false, "a")
		if !v.news || v.times != i+1 || v.pause != seconds*time.Second {
			t.Errorf("failure %d: %+v", i+1, v)
		}
		if v := p.ended(false, false, "a"); v.news {
			t.Error("the same failure is news twice in one interval")
		}
		blocked()
		now = now.Add(seconds * time.Second)
		if !pass() {
			t.Error("nobody tries once the pause is over")
		}
		blocked() // one is enough
	}
	// Another reason starts from the beginning, and the longer pause counts.
	if v := p.ended(true, false, "b"); !v.news || v.pause != time.Second {
		t.Errorf("another reason: %+v", v)
	}
	// One that was deleted while it tried proves nothing: the next one tries.
	now = now.Add(time.Second)
	if !pass() {
		t.Error("nobody tries")
	}
	p.ended(true, false, "")
	if !pass() {
		t.Error("nobody tries after the one that was deleted")
	}
	p.ended(true, true, "")
	for range 2 {
		if pass() {
			t.Error("a success does not reset the pacer")
		}
	}
}

func TestReasonOf(t *testing.T) {
	reason := func(id, tap, text string) string {
		w := &worker{id: id, slot: plan.Slot{TAP: tap}}
		return reasonOf(w, &startError{"start its VM", errors.New(text)})
	}
	if a, b := reason("small-1", "fleet3", "open TAP fleet3 for /run/small-1/vm: busy (pid 12)"), reason("small-2", "fleet14", "open TAP fleet14 for /run/small-2/vm: busy (pid 7)"); a != b {
		t.Errorf("two reasons: %q, %q", a, b)
	}
	if a, b := reason("small-1", "fleet3", "busy"), reason("small-1", "fleet3", "permission denied"); a == b {
		t.Errorf("one reason: %q", a)
	}
}
