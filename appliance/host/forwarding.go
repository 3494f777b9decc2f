package host

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// forwarding is the switch that lets the host route, of one family. The kernel copies what is written to it to every
// interface, so the interfaces' own values are kept and put back.
type forwarding struct{ all, conf string }

var (
	forwarding4 = forwarding{"net/ipv4/ip_forward", "net/ipv4/conf"}
	forwarding6 = forwarding{"net/ipv6/conf/all/forwarding", "net/ipv6/conf"}
)

// before is what must be written, in this order, to have the present state again.
func (f forwarding) before() ([]setting, error) {
	value, err := readSysctl(f.all)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", f.all, err)
	}
	settings := []setting{{f.all, value}}
	paths, err := filepath.Glob(filepath.Join("/proc/sys", f.conf, "*", "forwarding"))
	if err != nil {
		return nil, err
	}
	for _, p := range paths {
		p = strings.TrimPrefix(p, "/proc/sys/")
		own, err := readSysctl(p)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the interface went meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", p, err)
		}
		if own != value {
			settings = append(settings, setting{p, own})
		}
	}
	return settings, nil
}

// on reports whether the host routes.
func (f forwarding) on() (bool, error) {
	value, err := readSysctl(f.all)
	if err != nil {
		return false, fmt.Errorf("read %s: %w", f.all, err)
	}
	return value != "0", nil
}

// enable turns routing on. For IPv6 an interface that forwards takes no router advertisements, and the host would lose
// the default route that it has from one: but only the "all" switch decides what is forwarded, so each
// interface gets its own value back, and takes advertisements (accept_ra=2) while it changes.
func (f forwarding) enable(k door) error {
	if f == forwarding4 {
		return k.writeSysctl(setting{f.all, "1"})
	}
	names, err := os.ReadDir(filepath.Join("/proc/sys", f.conf))
	if err != nil {
		return err
	}
	var restore []setting
	for _, n := range names {
		if n.Name() == "all" {
			continue
		}
		dir := f.conf + "/" + n.Name()
		own, err := readSysctl(dir + "/forwarding")
		if err != nil || own != "0" {
			continue // gone, or a router already
		}
		restore = append(restore, setting{dir + "/forwarding", own})
		if ra, err := readSysctl(dir + "/accept_ra"); err == nil && ra == "1" {
			if err := k.writeSysctl(setting{dir + "/accept_ra", "2"}); err != nil {
				return errors.Join(err, restoreSysctls(k, restore))
			}
			restore = append(restore, setting{dir + "/accept_ra", ra})
		}
	}
	return errors.Join(k.writeSysctl(setting{f.all, "1"}), restoreSysctls(k, restore))
}

// restoreSysctls writes earlier values back. An interface that went took its settings along.
func restoreSysctls(k door, settings []setting) error {
	var errs []error
	for _, s := range settings {
		if err := k.writeSysctl(s); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
