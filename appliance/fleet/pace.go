package fleet

import (
	"context"
	"math/rand/v2"
	"regexp"
	"strings"
	"sync"
	"time"
)

// When a worker cannot start, the next one is tried after minPause, then after twice as long each time, up to maxPause.
const (
	minPause = time.Second
	maxPause = 5 * time.Minute
)

// startError is an error of a step of a worker's start.
type startError struct {
	step string
	err  error
}

func (e *startError) Error() string { return e.step + ": " + e.err.Error() }
func (e *startError) Unwrap() error { return e.err }

// pacer keeps workers from failing one after another for the same reason. After a failure, workers wait, reported as creating, while
// one at a time is tried at growing intervals. Once one starts, all of them may.
type pacer struct {
	least  time.Duration // the initial pause
	now    func() time.Time
	jitter func(time.Duration) time.Duration

	mu      sync.Mutex
	reasons map[string]*failing
	trying  bool
	changed chan struct{} // closed and replaced at each change
}

// failing is a reason why workers cannot start.
type failing struct {
	times int // in a row, counted at most once per interval
	until time.Time
}

func newPacer() *pacer {
	return &pacer{
		least: minPause, now: time.Now,
		// 20 % more or less: the pools of a host fail for the same reason at the same time.
		jitter:  func(d time.Duration) time.Duration { return d - d/5 + rand.N(2*d/5+1) },
		reasons: map[string]*failing{}, changed: make(chan struct{}),
	}
}

// wait returns when a worker may try to start. first means that it tries on behalf of all waiting workers: the caller must then call
// ended for it in any case.
func (p *pacer) wait(ctx context.Context) (first bool, err error) {
	for {
		p.mu.Lock()
		left, changed := p.left(), p.changed
		free := len(p.reasons) == 0
		if !free && left <= 0 && !p.trying {
			p.trying, first = true, true
		}
		p.mu.Unlock()
		if free || first {
			return first, nil
		}
		var elapsed <-chan time.Time
		if left > 0 {
			elapsed = time.After(left)
		}
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-changed:
		case <-elapsed:
		}
	}
}

// left returns how long nobody may try; the caller holds mu.
func (p *pacer) left() time.Duration {
	var left time.Duration
	for _, f := range p.reasons {
		left = max(left, f.until.Sub(p.now()))
	}
	return left
}

// verdict says how to treat a failure.
type verdict struct {
	news  bool // the first for its reason in this interval, to be logged
	times int
	pause time.Duration
}

// ended records the outcome of a worker that wait has admitted: that it started, or the reason why it could not. reason is "" if it was
// deleted before that was known.
func (p *pacer) ended(first, started bool, reason string) verdict {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer func() {
		close(p.changed)
		p.changed = make(chan struct{})
	}()
	if first {
		p.trying = false
	}
	switch {
	case started:
		clear(p.reasons)
		return verdict{}
	case reason == "":
		return verdict{}
	}
	f := p.reasons[reason]
	if f == nil {
		f = &failing{}
		p.reasons[reason] = f
	}
	if left := f.until.Sub(p.now()); left > 0 { // it began before the failure that is already known
		return verdict{times: f.times, pause: left}
	}
	pause := maxPause
	if f.times < 20 {
		pause = min(p.least<<f.times, maxPause)
	}
	pause = p.jitter(pause)
	f.times++
	f.until = p.now().Add(pause)
	return verdict{news: true, times: f.times, pause: pause}
}

var digits = regexp.MustCompile(`[0-9]+`)

// reasonOf returns why a worker could not start, without the details of this worker: its id, link, addresses and numbers.
func reasonOf(w *worker, e *startError) string {
	text := e.Error()
	names := []string{w.id, "ID"}
	if w.slot.TAP != "" {
		names = append(names, w.slot.TAP, "TAP")
	}
	if w.slot.Address.IsValid() {
		names = append(names, w.slot.Address.String(), "ADDRESS")
	}
	return digits.ReplaceAllString(strings.NewReplacer(names...).Replace(text), "#")
}

// failed tells the pacer about a worker that could not start, and logs it once per reason and interval.
func (g *Group) failed(w *worker, e *startError) {
	v := g.pace.ended(w.first, false, reasonOf(w, e))
	args := []any{"worker", w.id, "step", e.step, "error", oneLine(e.err), "age_ms", ms(w.created)}
	if !v.news {
		g.log.Debug("worker could not start for a known reason", args...)
		return
	}
	args = append(args, "failures", v.times, "next_try_in", v.pause.Round(time.Millisecond).String())
	if tail := g.consoleTail(w.id); tail != nil {
		args = append(args, "console", tail)
	}
	g.log.Error("worker could not start; others wait until one can", args...)
}
