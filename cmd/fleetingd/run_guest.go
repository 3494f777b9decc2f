package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// A run is a guest on its host, beside other runs and perhaps a serving plugin. Runs of one plan form a session: the first brings up
// what all need, and the last takes it down. Each run has a number, a part of its pool's slots, and a pool of its own over them, named
// for the number, so that no plugin takes its workers for its own.
//
// What runs know of one another lies in guestDir, which is root's:
//
//	setup.lock    held while one comes up, goes down, or cleans up after a killed one
//	session.lock  shared by all runs
//	session.json  what they share
//	session.plan.json
//	N.lock        held by run N for as long as it lives
//	N.json        what run N has
//	N.plan.json   the plan of its plugin
//
// Lock files stay: removing one would let two processes hold two files of one name.
const guestDir = plan.RunDir + "-run"

// setupPatience is how long a run waits for another one to come up or go down.
const setupPatience = 10 * time.Minute

// session is what the runs of one plan share.
type session struct {
	Plan  string `json:"plan"`  // its digest
	State string `json:"state"` // its state_dir
	Disks bool   `json:"disks"` // a run mounted the disks: the last one unmounts them
	// Made are the folders that the session made in place of systemd-tmpfiles, the outermost first.
	Made []string `json:"made,omitempty"`
}

// guestRun is what one run has.
type guestRun struct {
	Number int    `json:"number"`
	Pool   string `json:"pool"`  // of the spec
	Own    string `json:"own"`   // its own pool's name
	First  int    `json:"first"` // slot
	Slots  int    `json:"slots"`
	TUN    string `json:"tun,omitempty"` // a device node of its own
}

func guestFile(number int, suffix string) string {
	return filepath.Join(guestDir, strconv.Itoa(number)+suffix)
}

// join makes this run a part of the session, or begins one, and gives it its number and slots. It holds the setup lock until settled.
func (r *hostRun) join(ctx context.Context) error {
	if _, err := mkdirs(guestDir, 0, 0); err != nil {
		return err
	}
	if err := r.lockSetup(ctx); err != nil {
		return err
	}
	r.defers(r.leave)
	if err := r.shareSession(ctx); err != nil {
		return err
	}
	others, err := r.otherRuns(ctx)
	if err != nil {
		return err
	}
	if err := r.sharePool(); err != nil {
		return err
	}
	return r.takeSlots(others)
}

func (r *hostRun) lockSetup(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, setupPatience)
	defer cancel()
	var err error
	if r.setup, err = state.WaitLock(ctx, filepath.Join(guestDir, "setup.lock")); err != nil {
		return fmt.Errorf("another `fleetingd run` is coming up or going down: %w", err)
	}
	return nil
}

// settled lets other runs come up.
func (r *hostRun) settled(context.Context) error {
	setup := r.setup
	r.setup = nil
	return setup.Unlock()
}

// shareSession takes a share of the session of this plan, or begins it.
func (r *hostRun) shareSession(ctx context.Context) error {
	digest, err := r.plan.Digest()
	if err != nil {
		return err
	}
	path := filepath.Join(guestDir, "session.lock")
	r.sessionLock, err = state.TryLock(path)
	switch {
	case err == nil: // nobody else is here
		if err := r.endKilledSession(ctx); err != nil {
			return err
		}
		return errors.Join(r.beginSession(digest), r.sessionLock.Share())
	case !errors.Is(err, state.ErrLocked):
		return err
	}
	if r.sessionLock, err = state.TryShare(path); err != nil {
		return err
	}
	if err := readJSON(sessionPath(), &r.session); err != nil {
		return err
	}
	if r.session.Plan != digest {
		return fmt.Errorf("another `fleetingd run` with another spec (state_dir %s) is under way on this host; wait until it ends, "+
			"or run its spec", r.session.State)
	}
	return nil
}

func sessionPath() string     { return filepath.Join(guestDir, "session.json") }
func sessionPlanPath() string { return filepath.Join(guestDir, "session.plan.json") }

// beginSession notes what is about to be made, and makes the folder of sockets.
func (r *hostRun) beginSession(digest string) error {
	data, err := r.plan.JSON()
	if err != nil {
		return err
	}
	if err := state.WriteFile(sessionPlanPath(), data, 0o600); err != nil {
		return err
	}
	r.session = session{Plan: digest, State: r.plan.Paths.State}
	if err := writeJSON(sessionPath(), r.session); err != nil {
		return err
	}
	if r.session.Made, err = mkdirs(r.plan.Paths.Run, r.user.UID, r.user.GID); err != nil {
		return err
	}
	return writeJSON(sessionPath(), r.session)
}

// endKilledSession takes down what a session left whose last run was killed.
func (r *hostRun) endKilledSession(ctx context.Context) error {
	var left session
	err := readJSON(sessionPath(), &left)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if _, err := r.otherRuns(ctx); err != nil {
		return err
	}
	p, err := state.ReadPlan(sessionPlanPath())
	if err != nil {
		return err
	}
	return endSession(ctx, p, left)
}

// endSession takes down what the runs of a session shared.
func endSession(ctx context.Context, p *plan.Plan, s session) error {
	if err := host.NetworkLeave(ctx, p); err != nil {
		return err
	}
	if s.Disks && !appliedHere(p) {
		if err := host.DisksDown(ctx, p); err != nil {
			return err
		}
	}
	up, err := host.NetworkIsUp(p)
	if err != nil {
		return err
	}
	for _, pool := range p.Pools {
		if up {
			break // a plugin may serve them
		}
		if err := removeIfThere(filepath.Join(p.Paths.Run, pool.Name+".lock")); err != nil {
			return err
		}
	}
	return errors.Join(removeEmpty(s.Made), removeIfThere(sessionPath(), sessionPlanPath()))
}

// otherRuns are the runs that are under way. Of those that were killed it removes what they left.
func (r *hostRun) otherRuns(ctx context.Context) ([]guestRun, error) {
	records, err := filepath.Glob(filepath.Join(guestDir, "[0-9]*.json"))
	if err != nil {
		return nil, err
	}
	var alive []guestRun
	for _, path := range records {
		if strings.HasSuffix(path, ".plan.json") {
			continue
		}
		var run guestRun
		if err := readJSON(path, &run); err != nil {
			return nil, err
		}
		lock, err := state.TryLock(guestFile(run.Number, ".lock"))
		if errors.Is(err, state.ErrLocked) {
			alive = append(alive, run)
			continue
		}
		if err != nil {
			return nil, err
		}
		err = r.removeRun(ctx, run)
		if err := errors.Join(err, lock.Unlock()); err != nil {
			return nil, fmt.Errorf("clean up after a run that was killed: %w", err)
		}
	}
	return alive, nil
}

// sharePool keeps a plugin from serving the pool while runs use its slots, and refuses where one does.
func (r *hostRun) sharePool() error {
	path := filepath.Join(r.plan.Paths.Run, r.pool.Name+".lock")
	_, err := os.Lstat(path)
	absent := errors.Is(err, fs.ErrNotExist)
	r.poolLock, err = state.TryShare(path)
	if errors.Is(err, state.ErrLocked) {
		return fmt.Errorf("pool %q is served by GitLab Runner on this host: `fleetingd run` does not take its slots; choose another pool (--pool)",
			r.pool.Name)
	}
	if err != nil {
		return err
	}
	if absent { // a plugin opens it, too
		if err := os.Lchown(path, r.user.UID, r.user.GID); err != nil {
			return err
		}
	}
	workers, err := filepath.Glob(filepath.Join(r.plan.Paths.Workers, r.pool.Name, "*.json"))
	if err != nil {
		return err
	}
	if len(workers) > 0 {
		return fmt.Errorf("pool %q has %d workers of this host's GitLab Runner: `fleetingd run` does not take its slots; choose another pool (--pool)",
			r.pool.Name, len(workers))
	}
	return nil
}

// takeSlots takes a number, and as many slots of the pool as the run needs.
func (r *hostRun) takeSlots(others []guestRun) error {
	used, numbers := map[int]bool{}, map[int]bool{}
	for _, o := range others {
		numbers[o.Number] = true
		for s := range o.Slots {
			used[o.First+s] = true
		}
	}
	number := 0
	for numbers[number] {
		number++
	}
	first, ok := freeSlots(r.pool, r.req.Instances, used)
	if !ok {
		return fmt.Errorf("pool %q has %d slots, and other runs use so many that %d are not free in a row; wait until one ends, or use fewer (-n)",
			r.pool.Name, r.pool.MaxInstances, r.req.Instances)
	}
	var err error
	if r.number, err = state.TryLock(guestFile(number, ".lock")); err != nil {
		return err
	}
	r.own = guestRun{Number: number, Pool: r.pool.Name, Own: ownPool(r.plan, r.pool.Name, number), First: first, Slots: r.req.Instances}
	own, err := ownPlan(r.plan, r.own)
	if err != nil {
		return err
	}
	data, err := own.JSON()
	if err != nil {
		return err
	}
	r.req.Plan, r.req.Pool = guestFile(number, ".plan.json"), r.own.Own
	return errors.Join(state.WriteFile(r.req.Plan, data, 0o644), r.record())
}

// record writes down what the run has, before it uses it.
func (r *hostRun) record() error { return writeJSON(guestFile(r.own.Number, ".json"), r.own) }

// freeSlots finds n slots of a pool in a row that nobody uses.
func freeSlots(pool *plan.Pool, n int, used map[int]bool) (first int, ok bool) {
	free := 0
	for s := pool.FirstSlot; s < pool.FirstSlot+pool.MaxInstances; s++ {
		if free++; used[s] {
			free = 0
		}
		if free == n {
			return s - n + 1, true
		}
	}
	return 0, false
}

// maxPoolName is how long a pool's name may be: it becomes a part of host names.
const maxPoolName = 32

// ownPool is the name of a run's own pool, which no pool of the plan has.
func ownPool(p *plan.Plan, pool string, number int) string {
	suffix := "-run" + strconv.Itoa(number)
	name := pool[:min(len(pool), maxPoolName-len(suffix))] + suffix
	for {
		if _, err := p.Pool(name); err != nil {
			return name
		}
		name += "x"
	}
}

// ownPlan is the plan with one pool: a run's own, over its slots.
func ownPlan(p *plan.Plan, run guestRun) (*plan.Plan, error) {
	pool, err := p.Pool(run.Pool)
	if err != nil {
		return nil, err
	}
	own, mine := *p, *pool
	mine.Name, mine.FirstSlot, mine.MaxInstances = run.Own, run.First, run.Slots
	own.Pools = []plan.Pool{mine}
	own.Runners, own.Files, own.Units, own.Sysctls = []plan.Runner{}, []plan.File{}, []plan.Unit{}, []plan.Sysctl{}
	own.Origins = map[string]string{plan.Address(plan.KindPool, run.Own): p.Origin(plan.KindPool, run.Pool),
		plan.Address(plan.KindImage, pool.Image): p.Origin(plan.KindImage, pool.Image)}
	return &own, nil
}

// ownTUN makes a device node for the run's user if /dev/net/tun is closed to it. The mode of /dev/net/tun is not a run's to change: others
// may rely on it. A TAP is protected by its owner, not by the node that it is opened by.
func (r *hostRun) ownTUN() error {
	const tun = "/dev/net/tun"
	st, err := os.Stat(tun)
	if err != nil {
		return fmt.Errorf("%w: load the tun module: modprobe tun", err)
	}
	if st.Mode().Perm()&0o006 == 0o006 {
		return nil
	}
	// With the pid: a run in a container may have another guestDir and the same /dev.
	r.own.TUN = fmt.Sprintf("%s-fleetingd-run%d-%d", tun, r.own.Number, os.Getpid())
	if err := r.record(); err != nil {
		return err
	}
	const major, minor = 10, 200 // Documentation/admin-guide/devices.txt of the kernel
	err = unix.Mknod(r.own.TUN, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor)))
	if err == nil {
		err = os.Lchown(r.own.TUN, r.user.UID, r.user.GID)
	}
	if err != nil {
		return fmt.Errorf("uid %d may not open %s (mode %04o), and a node of its own cannot be made: %w; cure: chmod 0666 %s, which is udev's mode",
			r.user.UID, tun, st.Mode().Perm(), err, tun)
	}
	return nil
}

// tunEnviron is what the run's processes must know of its own node.
func (r *hostRun) tunEnviron() []string {
	if r.own.TUN == "" {
		return nil
	}
	return []string{vm.TUNVariable + "=" + r.own.TUN}
}

// leave ends this run's part of the session, and the session if this is the last run.
func (r *hostRun) leave() error {
	ctx := context.Background()
	if r.setup == nil {
		if err := r.lockSetup(ctx); err != nil {
			return err
		}
	}
	var errs []error
	if r.number != nil {
		errs = append(errs, r.removeRun(ctx, r.own), r.number.Unlock())
	}
	if r.sessionLock != nil {
		errs = append(errs, r.leaveSession(ctx))
	}
	return errors.Join(append(errs, r.setup.Unlock())...)
}

// leaveSession takes down what the runs share if nobody else shares it.
func (r *hostRun) leaveSession(ctx context.Context) error {
	var errs []error
	switch err := r.sessionLock.Upgrade(); {
	case err == nil:
		var shared session
		if err = readJSON(sessionPath(), &shared); err == nil && shared.Plan == r.session.Plan {
			err = endSession(ctx, r.plan, shared)
		}
		errs = append(errs, err)
	case !errors.Is(err, state.ErrLocked):
		errs = append(errs, err)
	}
	if r.poolLock != nil {
		errs = append(errs, r.poolLock.Unlock())
	}
	return errors.Join(append(errs, r.sessionLock.Unlock())...)
}

// appliedHere reports whether the host has a plan that uses the same disks: they are not a run's to unmount then.
func appliedHere(p *plan.Plan) bool {
	applied, err := state.ReadPlan(plan.Path)
	return err == nil && applied.Paths.Disks == p.Paths.Disks
}

// removeRun removes what a run leaves when it ends, or when it was killed: workers, prebuilds' VMs, and its files.
func (r *hostRun) removeRun(ctx context.Context, run guestRun) error {
	path := guestFile(run.Number, ".plan.json")
	p, err := state.ReadPlan(path)
	if errors.Is(err, fs.ErrNotExist) {
		return removeIfThere(guestFile(run.Number, ".json"))
	}
	if err != nil {
		return err
	}
	user, err := findRuntimeUser(p)
	if err != nil {
		return err
	}
	if err := r.sweep(ctx, user, p, jobRequest{Plan: path, Pool: run.Own, Sweep: true}); err != nil {
		return err
	}
	files := []string{filepath.Join(p.Paths.Workers, run.Own), filepath.Join(p.Paths.Clones, run.Own), filepath.Join(p.Paths.Run, run.Own+".lock")}
	if run.TUN != "" {
		files = append(files, run.TUN)
	}
	// The record last: whoever finds it does all of this again.
	return removeIfThere(append(files, path, guestFile(run.Number, ".json"))...)
}

func removeIfThere(paths ...string) error {
	for _, path := range paths {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func writeJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return state.WriteFile(path, data, 0o600)
}

func readJSON(path string, v any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}
