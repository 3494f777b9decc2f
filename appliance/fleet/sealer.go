package fleet

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/fleetingd/fleetingd/appliance/guest"
	"github.com/fleetingd/fleetingd/appliance/image"
)

// A failed build is repeated after minBackoff, then after twice as long each time, up to maxBackoff.
const (
	minBackoff = 5 * time.Second
	maxBackoff = 5 * time.Minute
)

// sealer provides the sealed image to all workers that wait for it, and builds it once for all
// of them. A build does not depend on any one worker: it continues when the worker that asked for it is gone.
type sealer struct {
	log     hclog.Logger
	image   string
	ensure  func() (*image.Sealed, error)
	stop    <-chan struct{} // closed when the Group ends
	start   func(func())    // runs a function in the background; the Group waits for it when it ends
	backoff time.Duration   // the initial one; tests shorten it

	mu  sync.Mutex
	now *making // nil if no build is in progress
}

// making is one build of an image, with as many attempts as it takes.
type making struct {
	done   chan struct{} // closed when sealed or err is set
	failed chan struct{} // closed once the first attempt has failed
	sealed *image.Sealed
	err    error

	mu   sync.Mutex
	last error // of the last attempt
}

// get waits for the image. The first attempt is not limited, because a prebuild has its own
// time limit; once an attempt has failed, get waits no longer than patience.
func (s *sealer) get(ctx context.Context, patience time.Duration) (*image.Sealed, error) {
	s.mu.Lock()
	m := s.now
	if m == nil {
		m = &making{done: make(chan struct{}), failed: make(chan struct{})}
		s.now = m
		s.start(func() { s.make(m) })
	}
	s.mu.Unlock()
	select {
	case <-m.done:
		return m.sealed, m.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-m.failed:
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-m.done:
		return m.sealed, m.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-t.C:
		m.mu.Lock()
		defer m.mu.Unlock()
		return nil, fmt.Errorf("%w: image %q is not available after %s: %w", errStartTimeout, s.image, patience, m.last)
	}
}

// make tries until the image is built or the Group ends.
func (s *sealer) make(m *making) {
	pause := s.backoff
	for attempt := 1; ; attempt++ {
		start := time.Now()
		sealed, err := s.ensure()
		ended := false
		select {
		case <-s.stop:
			ended = true
		default:
		}
		if err == nil || ended {
			s.mu.Lock()
			s.now = nil
			s.mu.Unlock()
			m.sealed, m.err = sealed, err
			close(m.done)
			if err == nil && !sealed.Cached {
				s.log.Info("image ready", "image", s.image, "digest", sealed.Digest, "phase", "image", "ms", ms(start))
			}
			return
		}
		m.mu.Lock()
		m.last = err
		m.mu.Unlock()
		if attempt == 1 {
			close(m.failed)
		}
		s.report(err, attempt, pause)
		select {
		case <-s.stop:
		case <-time.After(pause):
		}
		pause = min(2*pause, maxBackoff)
	}
}

// report logs why the build failed, with the failed step of the prebuild and the end of its output.
func (s *sealer) report(err error, attempt int, pause time.Duration) {
	args := []any{"image", s.image, "error", oneLine(err), "attempt", attempt, "again_in", pause.String()}
	var step *guest.StepError
	if errors.As(err, &step) {
		args = append(args, "step", step.Step, "exit_code", step.Code, "output", strings.Join(step.Tail, "\n"))
	}
	s.log.Error("building the image failed; workers wait for it", args...)
}
