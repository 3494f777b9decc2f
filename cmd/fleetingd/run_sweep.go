package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/hashicorp/go-hclog"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"

	"github.com/fleetingd/fleetingd/appliance/fleet"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// sweepTimeout is how long the workers of a run that was killed may take to be removed.
const sweepTimeout = time.Minute

// sweep removes what workers of the pool are left: those of a run whose unprivileged half was killed. Where there are
// some, another unprivileged half does it. Root must not: the plan's copy, the records, the clones and their consoles all lie
// in folders of the runtime user, who could have root start another program and write other files.
func (r *hostRun) sweep(ctx context.Context) error {
	records, err := os.ReadDir(filepath.Join(r.plan.Paths.Workers, r.pool.Name))
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(records) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*sweepTimeout)
	defer cancel()
	rep, err := r.unprivileged(ctx, jobRequest{Plan: r.req.Plan, Pool: r.pool.Name, Sweep: true})
	if err == nil && rep.Error != "" {
		err = errors.New(rep.Error)
	}
	return err
}

// sweep is the plugin's own recovery, asked to keep nothing.
func sweep(req jobRequest) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), sweepTimeout)
	defer cancel()
	config, err := json.Marshal(map[string]string{"plan": req.Plan, "pool": req.Pool})
	if err != nil {
		return err
	}
	g := fleet.New(fleet.Options{Version: version, Driver: vm.Open})
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
