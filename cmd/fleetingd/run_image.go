package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/guest"
	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// imageProgress shows the making of an image as phases of a view.
type imageProgress struct {
	v    *view
	new  bool // show only what is made, not what is there already
	ph   *running
	name image.Phase
	last string // the last line of output, for the phase's end
	base bool   // something was said of the base image
}

func newImageProgress(v *view) *imageProgress { return &imageProgress{v: v} }

// show takes the events of one image, which come one after the other.
func (p *imageProgress) show(e image.Progress) {
	if e.Phase == image.PhaseBase || e.Phase == image.PhaseSealed {
		p.end(true)
		if e.Cached && !p.new {
			if e.Phase == image.PhaseSealed && !p.base { // what was made of the base is there, and nobody asked for it
				p.there(image.PhaseBase, e.Image)
			}
			p.there(e.Phase, e.Image)
		}
		p.base = p.base || e.Phase == image.PhaseBase
		return
	}
	if p.ph == nil || p.name != e.Phase {
		p.end(true)
		p.name, p.last = e.Phase, e.Item
		p.ph = p.v.begin(p.label(e.Phase), e.Item)
	}
	switch {
	case e.Line != "":
		if e.Phase == image.PhasePrebuild {
			p.v.log(e.Line)
		} else {
			p.ph.update(e.Line)
		}
	case e.Total > 0:
		p.last = e.Item
		p.ph.update(fmt.Sprintf("%s %d of %d MB", e.Item, e.Done/1e6, e.Total/1e6))
	case e.Item != "":
		p.last = e.Item
		p.ph.update(e.Item)
	}
}

func (p *imageProgress) there(ph image.Phase, name string) {
	p.v.add(Phase{Name: p.label(ph), Detail: name + ": cached", Cached: true})
}

// end ends the phase that is under way.
func (p *imageProgress) end(ok bool) {
	if p.ph == nil {
		return
	}
	detail := p.last
	if !ok {
		detail = strings.TrimSpace(detail + " failed")
	}
	p.ph.done(detail)
	p.ph = nil
}

// label is what a phase is called in a run.
func (p *imageProgress) label(ph image.Phase) string {
	switch ph {
	case image.PhaseBase:
		return "image"
	case image.PhaseSealed:
		return "prebuild"
	}
	return string(ph)
}

// prebuild makes the pool's sealed image unless it is there, in sight of the
// user: the plugin finds it then. A failed step is no reason to try again, as it is for the plugin.
func prebuild(ctx context.Context, v *view, req jobRequest) error {
	ip := newImageProgress(v)
	store, p, err := openImages(req, ip.show)
	if err != nil {
		return err
	}
	pool, err := p.Pool(req.Pool)
	if err != nil {
		return err
	}
	img, err := p.Image(pool.Image)
	if err != nil {
		return err
	}
	_, err = store.Ensure(ctx, img)
	ip.end(err == nil)
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	if step, ok := errors.AsType[*guest.StepError](err); ok && v.w == nil {
		// On a terminal its output stands above already.
		if len(step.Tail) == 0 {
			return fmt.Errorf("%w; it printed nothing", err)
		}
		return fmt.Errorf("%w; its last lines:\n  %s", err, strings.Join(step.Tail, "\n  "))
	}
	return err
}

// openImages opens the images of a request's plan, with the driver that prebuilds them.
func openImages(req jobRequest, progress func(image.Progress)) (*image.Store, *plan.Plan, error) {
	p, err := state.ReadPlan(req.Plan)
	if err != nil {
		return nil, nil, err
	}
	log := slog.New(slog.DiscardHandler)
	driver, err := vm.Open(p.Hypervisor, log)
	if err != nil {
		return nil, nil, err
	}
	store, err := image.Open(p, image.Options{Log: log, Driver: driver, Secrets: req.secret, Progress: progress})
	return store, p, err
}
