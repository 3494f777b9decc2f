package fleet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// probe opens the driver and asks it whether VMs can start here.
func (g *Group) probe(ctx context.Context, p *plan.Plan) (vm.Driver, error) {
	d, err := g.opts.Driver(p.Hypervisor, g.slog)
	if err != nil {
		return nil, err
	}
	info, err := d.Probe(ctx)
	if err != nil {
		return nil, fmt.Errorf("hypervisor %s: %w", d.Name(), err)
	}
	g.log.Info("hypervisor", "driver", d.Name(), "binary", info.Binary, "version", info.Version, "accel", info.Accel)
	return d, nil
}

// checkLinks checks that the pool's TAPs exist and may be opened, without opening one: adopted workers may be using
// them, and opening a missing TAP would create it.
func checkLinks(p *plan.Plan, slots []plan.Slot) error {
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("list the network interfaces: %w", err)
	}
	byName := make(map[string]netlink.Link, len(links))
	for _, l := range links {
		byName[l.Attrs().Name] = l
	}
	uid := os.Getuid()
	var missing, foreign []string
	for _, s := range slots {
		if l, ok := byName[s.TAP]; !ok {
			missing = append(missing, s.TAP)
		} else if !mayOpen(l, uid) {
			foreign = append(foreign, s.TAP)
		}
	}
	cure := fmt.Sprintf("`fleetingd network up --plan FILE` creates them for the user %q", p.User)
	if len(missing) > 0 {
		return fmt.Errorf("%d of the pool's %d TAPs do not exist (the first is %s): %s",
			len(missing), len(slots), missing[0], cure)
	}
	if len(foreign) > 0 {
		return fmt.Errorf("%d of the pool's %d interfaces are not TAPs that uid %d may open (the first is %s): %s",
			len(foreign), len(slots), uid, foreign[0], cure)
	}
	return nil
}

// checkRoutes checks how packets travel between the pool's workers, this host and the internet: other software may have changed that
// since the network came up.
func (g *Group) checkRoutes(p *plan.Plan, slots []plan.Slot) error {
	if g.opts.Routes == nil {
		return nil
	}
	troubles, err := g.opts.Routes(p, slots)
	for _, t := range troubles {
		g.log.Warn("network", "problem", t)
	}
	return err
}

// tryStart tries once what each worker's start needs from the host besides its VMM: a descriptor of /dev/net/tun, and a clone.
func tryStart(p *plan.Plan) error {
	tun := vm.TUN()
	fd, err := unix.Open(tun, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("open %s as uid %d: %w: restore the mode that udev sets: chmod 0666 %s", tun, os.Getuid(), err, tun)
	case err != nil:
		return fmt.Errorf("open %s: %w: load its module: modprobe tun", tun, err)
	}
	if err := unix.Close(fd); err != nil {
		return fmt.Errorf("close %s: %w", tun, err)
	}
	if err := image.CanClone(p.Paths.Clones); err != nil {
		return fmt.Errorf("workers' disks: %w", err)
	}
	return nil
}

// mayOpen reports whether the TAP belongs to the user. Root may open any.
func mayOpen(l netlink.Link, uid int) bool {
	tap, ok := l.(*netlink.Tuntap)
	return ok && tap.Mode == netlink.TUNTAP_MODE_TAP && (uid == 0 || int64(tap.Owner) == int64(uid))
}

// makeFolders creates the folders that this pool needs, and checks that they are writable.
func (g *Group) makeFolders(p *plan.Plan) error {
	for _, dir := range []string{filepath.Join(p.Paths.Workers, g.pool.Name), filepath.Join(p.Paths.Clones, g.pool.Name)} {
		if err := makeFolder(p, dir, 0o750); err != nil {
			return err
		}
	}
	return nil
}

func makeFolder(p *plan.Plan, dir string, mode os.FileMode) error {
	err := os.MkdirAll(dir, mode)
	if err == nil {
		err = unix.Access(dir, unix.W_OK|unix.X_OK)
	}
	if err != nil {
		return fmt.Errorf("uid %d cannot create or write the folder %s: %w: `systemd-tmpfiles --create` as root "+
			"creates the folders of the plan's user %q", os.Getuid(), dir, err, p.User)
	}
	return nil
}
