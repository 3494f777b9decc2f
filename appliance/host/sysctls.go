package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
)

// KindSysctl is the kind of the door that Sysctls returns.
const KindSysctl Kind = "sysctl"

// Sysctls returns the door to the kernel's settings as they are now; what they are after a boot is a file in /etc/sysctl.d. A setting is named
// as sysctl(8) names it, and its State has its "value". If net.ipv4.ip_forward is off, the State also has "forwarding", the interfaces that
// forward all the same: the kernel copies the switch to each of them. No setting can be removed.
//
// It works in the network namespace of the calling thread.
func Sysctls() Door { return sysctls{} }

type sysctls struct{}

const ipForward = "net.ipv4.ip_forward"

func (d sysctls) Read(_ context.Context, names []string) (map[string]State, error) {
	found := make(map[string]State, len(names))
	var errs []error
	for _, name := range names {
		s, err := d.read(name)
		if err != nil {
			errs = append(errs, fmt.Errorf("sysctl %s: %w", name, err))
		}
		found[name] = s
	}
	return found, errors.Join(errs...)
}

func (d sysctls) read(name string) (State, error) {
	at, err := sysctlPath(name)
	if err != nil {
		return nil, err
	}
	value, err := readSysctl(at)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s := State{"value": oneSpace(value)}
	if name == ipForward && s["value"] == "0" {
		interfaces, err := forwarding4.interfaces()
		if err != nil {
			return nil, err
		}
		var on []string
		for _, i := range interfaces {
			if i.value != "0" {
				on = append(on, filepath.Base(filepath.Dir(i.path)))
			}
		}
		if len(on) > 0 {
			slices.Sort(on)
			s["forwarding"] = strings.Join(on, " ")
		}
	}
	return s, nil
}

// oneSpace is a value as two writers of it would agree on: the kernel separates numbers by tabs.
func oneSpace(value string) string { return strings.Join(strings.Fields(value), " ") }

// sysctlPath is where a setting is below /proc/sys. As in sysctl.d(5), the first separator decides what separates.
func sysctlPath(name string) (string, error) {
	at := name
	if i := strings.IndexAny(name, "./"); i >= 0 && name[i] == '.' {
		at = strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}
	if at == "" || strings.HasPrefix(at, "/") || filepath.Clean(at) != at || strings.HasPrefix(at, "..") {
		return "", errors.New("this is not the name of a kernel setting")
	}
	return at, nil
}

func (d sysctls) Write(_ context.Context, name string, want State) error {
	if err := d.write(name, want); err != nil {
		return fmt.Errorf("sysctl %s: %w", name, err)
	}
	return nil
}

func (d sysctls) write(name string, want State) error {
	have, err := d.read(name)
	switch {
	case err != nil:
		return err
	case have == nil && want == nil:
		return nil
	case have == nil:
		return errors.New("this kernel has no such setting (is its module loaded?)")
	case want == nil:
		return errors.New("a setting of the kernel cannot be removed")
	}
	if err := onlyKeys(want, "value", "forwarding"); err != nil {
		return err
	}
	at, err := sysctlPath(name)
	if err != nil {
		return err
	}
	value := oneSpace(want["value"])
	if have["value"] != value || have["forwarding"] != want["forwarding"] {
		if err := new(kernel).writeSysctl(setting{at, value}); err != nil {
			return err
		}
	}
	for i := range strings.FieldsSeq(want["forwarding"]) {
		err := new(kernel).writeSysctl(setting{filepath.Join(forwarding4.conf, i, "forwarding"), "1"})
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // the interface went meanwhile
			return err
		}
	}
	now, err := d.read(name)
	if err == nil && now["value"] != value {
		err = fmt.Errorf("the kernel made %q of %q", now["value"], value)
	}
	return err
}
