// Package host is the door to a real host: it makes, reads back and removes what a Plan says of
// its network. It touches only what it made itself, which it knows by a
// mark (a link's alias, a rule's comment) or by its own notes, never by a name alone. It
// decides nothing: rules, names and addresses are the Plan's.
package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/vishvananda/netlink"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
)

// Options of the network. The zero value takes the TAPs' owner from the plan.
type Options struct {
	// UID and GID own the TAPs: the kernel lets only a process with both open one. Where
	// both are 0 they are those of the plan's user.
	UID, GID int
	// Trial: the network is for a while (`fleetingd run`), on a host that is not its own. NetworkUp then turns on the forwarding of
	// the links that need it, not the host's, and refuses to change a network that is up for good. NetworkLeave takes it down.
	Trial bool
}

// Difference is one part of the network that is not as the plan says.
type Difference struct {
	Object  string `json:"object"`         // "TAP fleet3", "table inet fleetingd"
	Problem string `json:"problem"`        // "is missing"
	Cure    string `json:"cure,omitempty"` // "" where NetworkUp fixes it
}

func (d Difference) String() string {
	if d.Cure == "" {
		return d.Object + " " + d.Problem
	}
	return d.Object + " " + d.Problem + "; cure: " + d.Cure
}

// NetworkUp makes the host's network equal to the plan: firewall, routing, the gateway's address, and a TAP with its
// route for each slot. It is idempotent. It needs root, or CAP_NET_ADMIN. It works in the network namespace
// of the calling thread, and stays on that thread.
//
// When it fails, it undoes its changes, and the error names the object. Before it changes anything it refuses what would break others:
// an address range or a name in use, the network of another plan, a TAP that a VM has open and that would have to be recreated.
func NetworkUp(ctx context.Context, p *plan.Plan, o Options) error {
	return withNetwork(ctx, p, o, func(n *network) error { return n.up(ctx) })
}

// ErrOtherPlan is what NetworkDown returns where there is nothing to do for its plan, and another plan's network stays up.
var ErrOtherPlan = errors.New("this plan's network is not up, but another plan's is")

// NetworkDown removes what NetworkUp made and restores the settings that it changed. It is idempotent. It continues after a failure,
// and returns all errors.
func NetworkDown(ctx context.Context, p *plan.Plan) error {
	return withNetwork(ctx, p, Options{}, func(n *network) error { return n.down(ctx) })
}

// NetworkDownAll removes every network that NetworkUp made on this host, whatever its plan, and returns the names of the TAPs by their
// plan's state folder. run is the plans' common Paths.Run; the notes lie beside it. Otherwise it works like NetworkDown.
func NetworkDownAll(ctx context.Context, run string) (taps map[string][]string, err error) {
	p := &plan.Plan{Paths: plan.Paths{Run: run}}
	err = withNetwork(ctx, p, Options{}, func(n *network) (err error) {
		taps, err = n.downAll(ctx)
		return err
	})
	return taps, err
}

// NetworkLeave takes down what NetworkUp made for trials, whatever plan it was of. A network that is up for good stays; so does one that
// a NetworkUp without Options.Trial has taken over since. It is idempotent.
func NetworkLeave(ctx context.Context, p *plan.Plan) error {
	return withNetwork(ctx, p, Options{}, func(n *network) error {
		if !n.notes.Trial {
			return nil
		}
		_, err := n.downAll(ctx)
		return err
	})
}

// NetworkCheck lists what NetworkUp would change. It changes nothing.
func NetworkCheck(ctx context.Context, p *plan.Plan, o Options) ([]Difference, error) {
	var found []Difference
	err := withNetwork(ctx, p, o, func(n *network) error {
		steps, err := n.steps(ctx)
		for _, s := range steps {
			found = append(found, s.fixes...)
		}
		return err
	})
	return found, err
}

// NetworkIsUp reports whether TAPs of the plan's state_dir exist, of this plan or an earlier one.
func NetworkIsUp(p *plan.Plan) (bool, error) {
	links, err := whole(netlink.LinkList)
	if err != nil {
		return false, fmt.Errorf("network: list links: %w", err)
	}
	mark := (&network{plan: p}).mark()
	return slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Attrs().Alias == mark }), nil
}

// network is one piece of work on the network of a plan.
type network struct {
	plan  *plan.Plan
	opts  Options
	door  door
	notes *notes
}

// withNetwork does something under the network's lock.
func withNetwork(ctx context.Context, p *plan.Plan, o Options, do func(*network) error) error {
	if err := os.MkdirAll(notesDir(p), 0o755); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	lock, err := state.WaitLock(ctx, filepath.Join(notesDir(p), "lock"))
	if err != nil {
		return fmt.Errorf("network: another fleetingd is changing it: %w", err)
	}
	defer lock.Unlock()
	k, err := openKernel()
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	defer k.close()
	return work(p, o, k, do)
}

// work reads the notes and does the work. Tests call it with a door that fails.
func work(p *plan.Plan, o Options, d door, do func(*network) error) error {
	notes, err := readNotes(p)
	if err != nil {
		return fmt.Errorf("network: %w", err)
	}
	if err := do(&network{plan: p, opts: o, door: d, notes: notes}); err != nil {
		return fmt.Errorf("network: %w", err)
	}
	return nil
}

// owner returns the user and group that may open the TAPs.
func (n *network) owner() (uid, gid int, err error) {
	if n.opts.UID != 0 || n.opts.GID != 0 {
		return n.opts.UID, n.opts.GID, nil
	}
	u, err := user.Lookup(n.plan.User)
	if err != nil {
		return 0, 0, fmt.Errorf("the TAPs' owner: %w (systemd-sysusers creates the user when the host is applied)", err)
	}
	uid, err = strconv.Atoi(u.Uid)
	if err != nil {
		return 0, 0, fmt.Errorf("the TAPs' owner: user %s has the uid %q: %w", n.plan.User, u.Uid, err)
	}
	gid, err = strconv.Atoi(u.Gid)
	if err != nil {
		return 0, 0, fmt.Errorf("the TAPs' owner: user %s has the gid %q: %w", n.plan.User, u.Gid, err)
	}
	return uid, gid, nil
}

func (n *network) up(ctx context.Context) error {
	steps, err := n.steps(ctx)
	if err != nil {
		return err
	}
	if n.opts.Trial && n.notes.Applied != nil && !n.notes.Trial && len(steps) > 0 {
		return fmt.Errorf("it is up for good, and differs from this plan (%s, for one): run the spec that it was made from, or take it down "+
			"first (fleetingd network down --all)", steps[0].differs())
	}
	// A network that is up for good stays so: a trial only uses it.
	trial := n.opts.Trial && (n.notes.Trial || n.notes.Applied == nil)
	if len(steps) == 0 && trial == n.notes.Trial {
		return nil
	}
	before := *n.notes
	n.notes.Trial = trial
	// Noted before it is done, so that the notes show after a crash what may exist.
	if err := n.noteIntent(); err != nil {
		return err
	}
	for i, s := range steps {
		slog.DebugContext(ctx, "network: started", "step", s.name)
		if err := s.do(ctx); err != nil {
			slog.DebugContext(ctx, "network: failed", "step", s.name, "error", err)
			return errors.Join(err, undo(context.WithoutCancel(ctx), steps[:i]), writeNotes(n.plan, &before))
		}
		slog.DebugContext(ctx, "network: finished", "step", s.name)
	}
	n.notes.Addresses = slices.DeleteFunc(n.notes.Addresses, func(a netip.Addr) bool { return !slices.Contains(n.gateways(), a) })
	n.notes.Applied = &applied{EgressInterface: n.plan.EgressInterface, Network: n.plan.Network, Slots: n.plan.Slots}
	return writeNotes(n.plan, n.notes)
}

// undo takes steps back, the last first.
func undo(ctx context.Context, steps []step) error {
	var errs []error
	for _, s := range slices.Backward(steps) {
		if s.undo == nil {
			continue
		}
		if err := s.undo(ctx); err != nil {
			errs = append(errs, fmt.Errorf("undo %q: %w", s.name, err))
		}
	}
	return errors.Join(errs...)
}

// noteIntent notes what is now, so that down can bring it back: once, before the first change.
func (n *network) noteIntent() error {
	closed, err := n.closedLinks()
	if err != nil {
		return err
	}
	for _, link := range closed {
		if s := (noted{link.path, link.value}); !slices.Contains(n.notes.Sysctls, s) {
			n.notes.Sysctls = append(n.notes.Sysctls, s)
		}
	}
	for _, f := range n.routing() {
		on, err := f.on()
		if err != nil {
			return err
		}
		if on || slices.ContainsFunc(n.notes.Sysctls, func(s noted) bool { return s.Path == f.all }) {
			continue
		}
		before, err := f.before()
		if err != nil {
			return err
		}
		for _, s := range before {
			if !slices.ContainsFunc(n.notes.Sysctls, func(o noted) bool { return o.Path == s.path }) {
				n.notes.Sysctls = append(n.notes.Sysctls, noted{s.path, s.value})
			}
		}
	}
	have, err := loopbackAddresses()
	if err != nil {
		return err
	}
	for _, a := range n.gateways() {
		if !slices.Contains(have, a) && !slices.Contains(n.notes.Addresses, a) {
			n.notes.Addresses = append(n.notes.Addresses, a)
		}
	}
	return writeNotes(n.plan, n.notes)
}
