package fleet

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"

	"github.com/fleetingd/fleetingd/appliance/image"
)

// newSlog adapts fleeting's logger for packages that use slog.
func newSlog(log hclog.Logger) *slog.Logger { return slog.New(hclogHandler{log: log}) }

type hclogHandler struct {
	log    hclog.Logger
	prefix string
}

func (h hclogHandler) Enabled(_ context.Context, l slog.Level) bool {
	return h.log.GetLevel() <= hclogLevel(l)
}

func (h hclogHandler) Handle(_ context.Context, r slog.Record) error {
	args := make([]any, 0, 2*r.NumAttrs())
	r.Attrs(func(a slog.Attr) bool {
		args = h.append(args, a)
		return true
	})
	h.log.Log(hclogLevel(r.Level), r.Message, args...)
	return nil
}

func (h hclogHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	var args []any
	for _, a := range attrs {
		args = h.append(args, a)
	}
	return hclogHandler{h.log.With(args...), h.prefix}
}

func (h hclogHandler) WithGroup(name string) slog.Handler {
	return hclogHandler{h.log, h.prefix + name + "."}
}

func (h hclogHandler) append(args []any, a slog.Attr) []any {
	value := a.Value.Resolve()
	if value.Kind() == slog.KindDuration {
		// hclog's JSON, which carries a plugin's log to the runner, would turn it into a number of nanoseconds.
		return append(args, h.prefix+a.Key, value.Duration().String())
	}
	return append(args, h.prefix+a.Key, value.Any())
}

func hclogLevel(l slog.Level) hclog.Level {
	switch {
	case l < slog.LevelDebug:
		return hclog.Trace
	case l < slog.LevelInfo:
		return hclog.Debug
	case l < slog.LevelWarn:
		return hclog.Info
	case l < slog.LevelError:
		return hclog.Warn
	}
	return hclog.Error
}

// progressLog logs how an image is made: a line for the beginning and the end of each phase, and the output of
// steps as debug lines.
type progressLog struct {
	log hclog.Logger

	mu    sync.Mutex
	phase image.Phase
	item  string
	start time.Time
}

func newProgressLog(log hclog.Logger) *progressLog { return &progressLog{log: log} }

func (p *progressLog) show(e image.Progress) {
	p.mu.Lock()
	defer p.mu.Unlock()
	done := e.Phase == image.PhaseBase || e.Phase == image.PhaseSealed
	if e.Phase != p.phase || e.Item != p.item {
		if p.phase != "" {
			p.log.Info("image phase done", "image", e.Image, "phase", string(p.phase), "item", p.item, "ms", ms(p.start))
		}
		p.phase, p.item, p.start = e.Phase, e.Item, time.Now()
		if !done {
			p.log.Info("image phase", "image", e.Image, "phase", string(e.Phase), "item", e.Item)
		}
	}
	if e.Line != "" {
		p.log.Debug("image output", "image", e.Image, "phase", string(e.Phase), "item", e.Item, "line", e.Line)
	}
	if done {
		p.phase, p.item = "", ""
		if !e.Cached {
			p.log.Info("image made", "image", e.Image, "phase", string(e.Phase))
		}
	}
}
