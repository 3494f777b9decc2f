package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"

	"github.com/fleetingd/fleetingd/appliance/fleet"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// sweepTimeout is how long the workers of a run that was killed may take to be removed.
const sweepTimeout = time.Minute

// sweep removes the workers that are left of a run's pool, and prebuilds' VMs: those of a run whose unprivileged half was killed.
// If there are some, another unprivileged half does it. Root must not: the records, the clones and their consoles lie in folders of the
// runtime user, who could have root write other files.
func (r *hostRun) sweep(ctx context.Context, user runtimeUser, p *plan.Plan, req jobRequest) error {
	var left []string
	for _, pattern := range []string{filepath.Join(p.Paths.Workers, req.Pool, "*.json*"), filepath.Join(p.Paths.Run, "prebuild-*")} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		left = append(left, found...)
	}
	if len(left) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*sweepTimeout)
	defer cancel()
	rep, err := r.unprivileged(ctx, user, req)
	if err == nil && rep.Error != "" {
		err = errors.New(rep.Error)
	}
	return err
}

// sweep is the unprivileged part of it.
func sweep(req jobRequest) error {
	ctx, cancel := context.WithTimeout(context.Background(), sweepTimeout)
	defer cancel()
	store, p, err := openImages(req, nil)
	if err != nil {
		return err
	}
	err = store.EndPrebuilds(ctx)
	records, rerr := filepath.Glob(filepath.Join(p.Paths.Workers, req.Pool, "*.json*"))
	if len(records) > 0 {
		rerr = sweepPool(ctx, req)
	}
	return errors.Join(err, rerr)
}

// sweepPool is the plugin's own recovery, asked to keep nothing.
func sweepPool(ctx context.Context, req jobRequest) (err error) {
	config, err := json.Marshal(map[string]string{"plan": req.Plan, "pool": req.Pool})
	if err != nil {
		return err
	}
	g := fleet.New(fleet.Options{Version: version, Driver: vm.Open, OnlyRemove: true})
	if err := json.Unmarshal(config, g); err != nil {
		return err
	}
	if _, err := g.Init(ctx, hclog.NewNullLogger(), provider.Settings{}); err != nil {
		return fmt.Errorf("look for workers that were left: %w", err)
	}
	defer func() { err = errors.Join(err, g.Shutdown(ctx)) }()
	var left []string
	err = g.Update(ctx, func(id string, _ provider.State) { left = append(left, id) })
	if err != nil || len(left) == 0 {
		return err
	}
	if _, err := g.Decrease(ctx, left); err != nil {
		return err
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		remain := 0
		err := g.Update(ctx, func(_ string, s provider.State) {
			if s != provider.StateDeleted && s != provider.StateTimeout {
				remain++
			}
		})
		if err != nil || remain == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d workers of pool %q could not be removed within %s", remain, req.Pool, sweepTimeout)
		case <-tick.C:
		}
	}
}
