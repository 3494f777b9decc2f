package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/apply"
	"github.com/fleetingd/fleetingd/appliance/fleet"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/visible"
)

func statusCommand() *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "show how this host is doing",
		Description: `Shows the current generation, whether it is final, what somebody changed since it was applied, services, pools and disk space.
Needs root, to read what belongs to root, and changes nothing. Exits with 0 whatever it finds; see the JSON's "ok".`,
		Flags:  []cli.Flag{&cli.BoolFlag{Name: "json", Usage: "print JSON"}},
		Action: statusAction,
	}
}

// statusReport is the JSON of status. Fields are only added; anything else makes another version.
type statusReport struct {
	Version    int           `json:"version"`
	Host       string        `json:"host"`       // "" if nothing is applied
	Generation int           `json:"generation"` // 0 if nothing is applied
	Applied    *time.Time    `json:"applied"`
	Plan       string        `json:"plan"`       // digest
	Unfinished string        `json:"unfinished"` // what an apply that has not ended waits for, or ""
	OK         bool          `json:"ok"`         // applied and final, nothing changed since, and no unit failed
	Drift      []statusDrift `json:"drift"`
	Units      []apply.Unit  `json:"units"`
	Pools      []statusPool  `json:"pools"`
	Disk       *statusDisk   `json:"disk"` // null if the workers' disks cannot be asked
}

type statusDrift struct {
	Kind    string `json:"kind"`
	Name    string `json:"name"`
	Problem string `json:"problem"`
}

type statusPool struct {
	Name     string `json:"name"`
	Slots    int    `json:"slots"`
	Running  int    `json:"running"`
	Starting int    `json:"starting"`
	Free     int    `json:"free"`
}

type statusDisk struct {
	Path string `json:"path"`
	Used uint64 `json:"used"` // bytes
	Size uint64 `json:"size"`
}

func statusAction(c *cli.Context) error {
	if err := needsRoot(c, 0); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	r, err := newStatusReport(ctx)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		e := json.NewEncoder(c.App.Writer)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		return e.Encode(r)
	}
	return r.table(c.App.Writer)
}

func newStatusReport(ctx context.Context) (*statusReport, error) {
	e, closeHost, err := apply.Open(ctx, apply.Host{Version: version})
	if err != nil {
		return nil, err
	}
	defer closeHost()
	s, err := e.Status(ctx)
	if err != nil {
		return nil, err
	}
	r := &statusReport{Version: 1, Drift: []statusDrift{}, Units: append([]apply.Unit{}, s.Units...), Pools: []statusPool{}}
	if s.Unfinished != nil {
		r.Unfinished = unfinished(s.Unfinished)
	}
	if s.Current == nil {
		return r, nil
	}
	p := s.Current.Plan
	r.Host, r.Generation, r.Applied, r.Plan = p.Host, s.Current.Number, &s.Current.Created, s.Current.Digest
	for _, d := range s.Drift {
		r.Drift = append(r.Drift, statusDrift{string(d.Kind), d.Name, d.Problem})
	}
	for i := range p.Pools {
		pool, err := newStatusPool(p, &p.Pools[i])
		if err != nil {
			return nil, err
		}
		r.Pools = append(r.Pools, pool)
	}
	r.Disk = newStatusDisk(p.Paths.Disks)
	r.OK = r.Unfinished == "" && len(r.Drift) == 0
	return r, nil
}

func newStatusPool(p *plan.Plan, pool *plan.Pool) (statusPool, error) {
	running, starting, err := fleet.Count(p, pool.Name)
	return statusPool{pool.Name, pool.MaxInstances, running, starting, max(0, pool.MaxInstances-running-starting)}, err
}

func newStatusDisk(path string) *statusDisk {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return nil
	}
	block := uint64(st.Bsize) //nolint:gosec // a block's size is positive
	return &statusDisk{Path: path, Used: (st.Blocks - st.Bfree) * block, Size: st.Blocks * block}
}

func (r *statusReport) table(w io.Writer) error {
	if r.Generation == 0 {
		fmt.Fprintln(w, "nothing is applied to this host")
	} else {
		fmt.Fprintf(w, "%s: generation %d, plan %.6s, applied %s\n", visible.Text(r.Host), r.Generation, r.Plan, r.Applied.Local().Format(time.DateTime))
	}
	if r.Unfinished != "" {
		fmt.Fprintln(w, r.Unfinished)
	}
	if r.Generation == 0 {
		return nil
	}
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	if len(r.Drift) == 0 {
		fmt.Fprintln(tw, "drift\tnone")
	}
	for _, d := range r.Drift {
		fmt.Fprintf(tw, "drift\t%s\t%s\n", visible.Columns(strings.TrimSpace(d.Kind+" "+d.Name)), visible.Columns(d.Problem))
	}
	for _, u := range r.Units {
		fmt.Fprintf(tw, "unit\t%s\t%s, %s\n", u.Name, u.Active, u.Enablement)
	}
	for _, p := range r.Pools {
		fmt.Fprintf(tw, "pool\t%s\t%d running, %d starting, %d free\n", p.Name, p.Running, p.Starting, p.Free)
	}
	if r.Disk != nil {
		fmt.Fprintf(tw, "disk\t%s\t%.1f of %.1f GiB used\n", r.Disk.Path, float64(r.Disk.Used)/(1<<30), float64(r.Disk.Size)/(1<<30))
	}
	return tw.Flush()
}
