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

// A failed image is made again after minBackoff, then after twice as long each time, up to maxBackoff.
const (
	minBackoff = 5 * time.Second
	maxBackoff = 5 * time.Minute
)

// sealer gives the sealed image to all workers that wait for it, and makes it once for all
// of them. It is not tied to any of them: a prebuild goes on when its worker is given up.
type sealer struct {
	log     hclog.Logger
	image   string
	ensure  func() (*image.Sealed, error)
	stop    <-chan struct{} // the Group ends
	start   func(func())    // runs a function that the Group waits for when it ends
	backoff time.Duration   // the first; tests make it short

	mu  sync.Mutex
	now *making // nil: nobody has asked since the last was made
}

// making is one image on its way, through as many attempts as it takes.
type making struct {
	done   chan struct{} // closed when sealed or err is set
	failed chan struct{} // closed when the first attempt has failed
	sealed *image.Sealed
	err    error

	mu   sync.Mutex
	last error // of the last attempt
}

// get waits for the image. While it is being made there is no limit, since a prebuild has
// one of its own; once an attempt has failed, get waits for patience and no longer.
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
		return nil, fmt.Errorf("%w: there is no image %q after %s: %w", errStartTimeout, s.image, patience, m.last)
	}
}

// make tries until there is an image or the Group ends.
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

// report says why there is no image, with the step of the prebuild that failed and the end of its output.
func (s *sealer) report(err error, attempt int, pause time.Duration) {
	args := []any{"image", s.image, "error", oneLine(err), "attempt", attempt, "again_in", pause.String()}
	var step *guest.StepError
	if errors.As(err, &step) {
		args = append(args, "step", step.Step, "exit_code", step.Code, "output", strings.Join(step.Tail, "\n"))
	}
	s.log.Error("the image was not made; workers wait for it", args...)
}
