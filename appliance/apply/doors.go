package apply

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
)

// StateDir is apply's own folder on every host (see state.Dir). It does not lie in the spec's state_dir, which may change.
const StateDir = "/var/lib/fleetingd-apply"

// Host says which host an Engine is opened for.
type Host struct {
	// Root is "" for this host. Else it is a folder with the file system of another, which is written and not brought to life.
	Root string
	// Plan is what is to be applied; nil if that is not known yet, or for destroy.
	Plan *plan.Plan
	// Secret gives the value of a secret of the Plan by its place.
	Secret  func(from string) (string, error)
	Version string
	// Fetch and Get download what the plan installs from elsewhere.
	Fetch host.Fetch
	Get   host.Get
}

// Open returns the engine of a host. Close it when done. The caller locks the engine's Dir if it is going to change anything.
func Open(ctx context.Context, h Host) (*Engine, func(), error) {
	root := h.Root
	if root == "" {
		root = "/"
	}
	path := filepath.Join(root, StateDir)
	dir := state.ReadDir(path)
	plans, current, err := knownPlans(dir, h.Plan)
	if err != nil {
		return nil, nil, err
	}
	owned := map[string]host.State{}
	if current != nil {
		for _, o := range current.Objects {
			if host.Kind(o.Kind) == host.KindSecretFile {
				owned[o.Name] = o.State
			}
		}
	}
	var files []plan.File
	if h.Plan != nil {
		files = h.Plan.Files
	}
	tree := host.NewTree(root, StateDir+"/tree.json")
	e := &Engine{Dir: dir, Version: h.Version, Doors: map[host.Kind]host.Door{
		host.KindFile:       tree.Files(),
		host.KindFolder:     tree.Folders(),
		host.KindSecretFile: tree.SecretFiles(files, owned, h.Secret, StateDir+"/secrets.json"),
	}}
	_, err = os.Stat(filepath.Join(root, "etc/passwd"))
	if err == nil {
		e.Doors[host.KindUser], e.Doors[host.KindGroup], e.Doors[host.KindMember] = tree.Users(), tree.Groups(), tree.Members()
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, err
	}
	if h.Root != "" {
		return e, func() {}, nil
	}
	units, err := host.OpenUnits(ctx)
	if err != nil {
		return nil, nil, err
	}
	e.Doors[host.KindUnit] = units
	e.Doors[host.KindSysctl] = host.Sysctls()
	e.Doors[host.KindDiskImage] = tree.DiskImages()
	e.Doors[KindNetwork] = network{plans}
	e.Doors[KindReload] = action(func(ctx context.Context, name string) error { return reload(ctx, units, name) })
	e.Doors[KindRestart] = action(func(ctx context.Context, name string) error { return restart(ctx, units, name) })
	e.Doors[KindTmpfiles] = action(tmpfiles)
	e.Doors[KindEmpty] = action(empty)
	e.Doors[KindEnd] = action(endUnit)
	e.Arm = arm
	if h.Fetch != nil && h.Get != nil {
		installs(e, tree, h, plans)
	}
	return e, units.Close, nil
}

// installs adds the doors to packages and programs.
func installs(e *Engine, tree *host.Tree, h Host, plans []*plan.Plan) {
	debs, urls := map[string]host.Deb{}, map[string]string{}
	for _, p := range slices.Backward(plans) { // what is to be applied comes first, so it wins
		if p.Install == nil {
			continue
		}
		for _, d := range p.Install.Debs {
			debs[d.Package] = host.Deb{URL: d.URL, SHA256: d.SHA256}
		}
		for _, d := range p.Install.Programs {
			urls[d.SHA256] = d.URL
		}
	}
	e.Doors[host.KindProgram] = tree.Programs(StateDir+"/programs", urls, h.Fetch)
	if host.HasApt() {
		e.Doors[host.KindAptKey] = tree.AptKeys(h.Get)
		e.Doors[host.KindPackage] = host.NewPackages(StateDir+"/packages", debs, h.Fetch)
	}
}

// arm has systemd run the rollback: it outlives this process, its session and its terminal. A boot ends it, and the recover unit takes over.
func arm(ctx context.Context, after time.Duration) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	// A name of its own each time: an earlier one may be running, and does nothing while this apply has the lock, or may still be confirmed.
	unit := fmt.Sprintf("fleetingd-unconfirmed-%d", time.Now().UnixNano())
	return command(ctx, "systemd-run", "--quiet", "--collect", "--unit="+unit, "--on-active="+fmt.Sprintf("%.3fs", after.Seconds()),
		"--timer-property=AccuracySec=100ms", self, "rollback", "--unconfirmed")
}

// endLimit is how long what is killed may take to be gone.
const endLimit = 30 * time.Second

// endUnit stops a unit and kills all that still runs in its control group, VMs above all. It waits for none of their jobs.
func endUnit(ctx context.Context, name string) error {
	// Queued first: otherwise a service that always restarts would come back.
	if err := command(ctx, "systemctl", "stop", "--no-block", name); err != nil && !strings.Contains(err.Error(), "not loaded") {
		return err
	}
	group := "/sys/fs/cgroup/system.slice/" + name
	err := os.WriteFile(group+"/cgroup.kill", []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nothing runs in it
	}
	if err != nil {
		return fmt.Errorf("end what runs in %s: %w", name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, endLimit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		events, err := os.ReadFile(group + "/cgroup.events")
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || err == nil && strings.Contains(string(events), "populated 0") {
			return stopped(ctx, name)
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: what was killed in it is still there: %w", name, ctx.Err())
		case <-tick.C:
		}
	}
}

// knownPlans are the plans whose networks this host may have, the likeliest first.
func knownPlans(dir *state.Dir, p *plan.Plan) ([]*plan.Plan, *state.Generation, error) {
	var plans []*plan.Plan
	if p != nil {
		plans = append(plans, p)
	}
	current, err := dir.Current()
	if err != nil {
		return nil, nil, err
	}
	if current != nil {
		plans = append(plans, current.Plan)
	}
	j, err := dir.Journal()
	if err != nil {
		return nil, nil, err
	}
	if j != nil && j.Head.Generation > 0 {
		g, err := dir.Generation(j.Head.Generation)
		if err == nil {
			plans = append(plans, g.Plan)
		} else if !errors.Is(err, state.ErrNoGeneration) {
			return nil, nil, err
		}
	}
	return plans, current, nil
}

// action is the door to the actions of one kind.
type action func(ctx context.Context, name string) error

func (action) Read(_ context.Context, names []string) (map[string]host.State, error) {
	found := map[string]host.State{}
	for _, name := range names {
		found[name] = host.State{}
	}
	return found, nil
}

func (do action) Write(ctx context.Context, name string, want host.State) error {
	if want["do"] != "yes" {
		return nil
	}
	return do(ctx, name)
}

func reload(ctx context.Context, units *host.Units, name string) error {
	if name == "systemd" {
		return units.Reload(ctx)
	}
	const networkd = "systemd-networkd.service"
	found, err := units.Read(ctx, []string{networkd})
	if err != nil || found[networkd]["active"] != "active" {
		return err
	}
	return command(ctx, "networkctl", "reload")
}

// restartPatience is how long apply waits for a unit that ends its jobs first.
const restartPatience = 15 * time.Second

// restart has a unit take its changed files. One that has jobs to end restarts by itself after them.
func restart(ctx context.Context, units *host.Units, name string) error {
	found, err := units.Read(ctx, []string{name})
	if err != nil || found[name]["active"] != "active" {
		return err // nobody wants it to run
	}
	limited, cancel := context.WithTimeout(ctx, restartPatience)
	defer cancel()
	err = units.Restart(limited, name)
	if name == runnerUnit && errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil
	}
	return err
}

func tmpfiles(ctx context.Context, name string) error {
	return command(ctx, "systemd-tmpfiles", "--create", name)
}

// empty removes a file, or what is in a folder. Nothing in it is followed: what is removed is removed by its name in its folder.
func empty(_ context.Context, name string) error {
	fi, err := os.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode().IsRegular() {
		return os.Remove(name)
	}
	root, err := os.OpenRoot(name)
	if err != nil {
		return err
	}
	defer root.Close()
	f, err := root.Open(".")
	if err != nil {
		return err
	}
	names, err := f.Readdirnames(-1)
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	for _, n := range names {
		if err := root.RemoveAll(n); err != nil {
			return fmt.Errorf("empty %s: %w", name, err)
		}
	}
	return nil
}

// stopped waits until systemd has seen that a unit's processes are gone, and has it forget how they went.
func stopped(ctx context.Context, name string) error {
	if err := command(ctx, "systemctl", "stop", name); err != nil {
		return err
	}
	if err := command(ctx, "systemctl", "reset-failed", name); err != nil && !strings.Contains(err.Error(), "not loaded") {
		return err
	}
	return nil
}

// command runs a program of the host. Its error has the command and what it said.
func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// network is the door to the workers' links, routes and firewall. Its one object has no name. Its State has the digest of the "plan" that it is
// like, and "differs" with what differs from that.
type network struct{ plans []*plan.Plan }

// networkDigest identifies as much of a plan as makes its network.
func networkDigest(p *plan.Plan) (string, error) {
	b, err := json.Marshal([]any{p.EgressInterface, p.User, p.Paths.State, p.Network, p.Slots})
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}

func (d network) Read(ctx context.Context, names []string) (map[string]host.State, error) {
	found := map[string]host.State{}
	for _, name := range names {
		s, err := d.read(ctx)
		if err != nil {
			return nil, err
		}
		found[name] = s
	}
	return found, nil
}

func (d network) read(ctx context.Context) (host.State, error) {
	var s host.State
	for _, p := range d.plans {
		up, err := host.NetworkIsUp(p)
		if err != nil {
			return nil, err
		}
		if !up {
			continue
		}
		digest, err := networkDigest(p)
		if err != nil {
			return nil, err
		}
		found, err := host.NetworkCheck(ctx, p, host.Options{})
		if err != nil {
			return nil, err
		}
		if len(found) == 0 {
			return host.State{"plan": digest}, nil
		}
		var lines []string
		for _, f := range found {
			lines = append(lines, f.String())
		}
		s = host.State{"plan": digest, "differs": strings.Join(lines, "\n")} // the last is the plan that was applied
	}
	return s, nil
}

func (d network) Write(ctx context.Context, _ string, want host.State) error {
	if want == nil {
		var errs []error
		for _, p := range d.plans {
			up, err := host.NetworkIsUp(p)
			if err == nil && up {
				err = host.NetworkDown(ctx, p)
				if errors.Is(err, host.ErrOtherPlan) {
					continue
				}
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
	for _, p := range d.plans {
		digest, err := networkDigest(p)
		if err != nil {
			return err
		}
		if digest == want["plan"] {
			return host.NetworkUp(ctx, p, host.Options{})
		}
	}
	return errors.New("the workers' network: the plan that it was made for is not kept here any more")
}
