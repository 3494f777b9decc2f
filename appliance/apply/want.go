// Package apply makes a host equal to its plan: it compares the two, shows what would change, changes it one object after the other, each with
// its undo in a journal, and takes it back when something fails or when nobody confirms it.
package apply

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// Item is one object that a plan wants on its host.
type Item struct {
	host.Object
	State  host.State
	Origin string // the line of the spec, "host.hcl:12"; "" if the plan does not know
}

// KindNetwork is the kind of the one object that stands for the workers' links, routes and firewall.
const KindNetwork host.Kind = "network"

// runnerUnit is started last, when all is there that it needs.
const runnerUnit = "gitlab-runner.service"

// unitDir is where systemd reads units of the administrator.
const unitDir = "/etc/systemd/system/"

// Want returns what a plan wants on its host, in the order in which it is to be made.
func Want(p *plan.Plan) ([]Item, error) {
	w := &wants{plan: p}
	for _, add := range []func() error{
		w.accounts, w.folders, w.files, w.settings, w.unitFiles, w.mounts, w.network, w.planFile, w.units, w.secretFiles, w.runner,
	} {
		if err := add(); err != nil {
			return nil, err
		}
	}
	return w.items, nil
}

type wants struct {
	plan  *plan.Plan
	items []Item
}

func (w *wants) add(kind host.Kind, name string, s host.State, origin string) {
	w.items = append(w.items, Item{host.Object{Kind: kind, Name: name}, s, origin})
}

func (w *wants) file(dir string) *plan.File {
	i := slices.IndexFunc(w.plan.Files, func(f plan.File) bool { return path.Dir(f.Path) == dir })
	if i < 0 {
		return nil
	}
	return &w.plan.Files[i]
}

// lines are the fields of each line of the plan's file in a folder of systemd's. That file makes at every boot what apply makes now.
func (w *wants) lines(dir string, least int) (lines [][]string, origin string, err error) {
	f := w.file(dir)
	if f == nil {
		return nil, "", nil
	}
	for line := range strings.Lines(f.Content) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		fields := split(line)
		if len(fields) < least {
			return nil, "", fmt.Errorf("%s: the plan's line %q has fewer than %d fields", f.Path, line, least)
		}
		lines = append(lines, fields)
	}
	return lines, w.plan.Origin(plan.KindFile, f.Path), nil
}

// split splits a line at its spaces, but for those between double quotes.
func split(line string) []string {
	var fields []string
	for i, part := range strings.Split(line, `"`) {
		if i%2 == 1 {
			fields = append(fields, part)
			continue
		}
		fields = append(fields, strings.Fields(part)...)
	}
	return fields
}

// accounts are the users and memberships of sysusers.d(5).
func (w *wants) accounts() error {
	lines, origin, err := w.lines("/etc/sysusers.d", 3)
	for _, f := range lines {
		switch {
		case f[0] == "u" && len(f) == 6:
			w.add(host.KindUser, f[1], host.State{"comment": f[3], "home": f[4], "shell": f[5]}, origin)
		case f[0] == "m" && len(f) == 3:
			w.add(host.KindMember, f[1]+"/"+f[2], host.State{"member": "yes"}, origin)
		default:
			return fmt.Errorf("the plan's sysusers.d has the line %q, which apply does not know", strings.Join(f, " "))
		}
	}
	return err
}

// folders are those of tmpfiles.d(5). What lies on the disks' file system is made once that is mounted (see KindTmpfiles).
func (w *wants) folders() error {
	lines, origin, err := w.lines("/etc/tmpfiles.d", 5)
	for _, f := range lines {
		if f[0] != "d" {
			return fmt.Errorf("the plan's tmpfiles.d has the line %q, which apply does not know", strings.Join(f, " "))
		}
		if w.mounted() && strings.HasPrefix(f[1], w.plan.Paths.Disks+"/") {
			continue
		}
		w.add(host.KindFolder, f[1], host.State{"mode": f[2], "owner": f[3], "group": f[4]}, origin)
	}
	return err
}

// mounted reports whether something is mounted on the disks' folder.
func (w *wants) mounted() bool {
	return slices.ContainsFunc(w.plan.Units, func(u plan.Unit) bool { return strings.HasSuffix(u.Name, ".mount") && u.Start })
}

func isUnitFile(name string) bool { return strings.HasPrefix(name, unitDir) }

func (w *wants) files() error {
	w.filesIf(func(f plan.File) bool { return len(f.Secrets) == 0 && !isUnitFile(f.Path) }, host.KindFile)
	return nil
}

func (w *wants) unitFiles() error {
	w.filesIf(func(f plan.File) bool { return len(f.Secrets) == 0 && isUnitFile(f.Path) }, host.KindFile)
	return nil
}

func (w *wants) secretFiles() error {
	w.filesIf(func(f plan.File) bool { return len(f.Secrets) > 0 }, host.KindSecretFile)
	return nil
}

func (w *wants) filesIf(is func(plan.File) bool, kind host.Kind) {
	for _, f := range w.plan.Files {
		if is(f) {
			w.add(kind, f.Path, host.State{"content": f.Content, "mode": f.Mode, "owner": f.Owner, "group": f.Group},
				w.plan.Origin(plan.KindFile, f.Path))
		}
	}
}

func (w *wants) settings() error {
	for _, s := range w.plan.Sysctls {
		w.add(host.KindSysctl, s.Key, host.State{"value": s.Value}, w.plan.Origin(plan.KindSysctl, s.Key))
	}
	// On a tmpfs, the image is made anew at every boot, by a unit.
	if d := w.plan.Disks; w.mounted() && d.Memory == "" {
		w.add(host.KindDiskImage, d.Image, host.State{"size": fmt.Sprint(d.Size)}, "")
	}
	return nil
}

func (w *wants) unitsIf(is func(name string) bool) {
	for _, u := range w.plan.Units {
		if !is(u.Name) || !u.Enable && !u.Start {
			continue
		}
		s := host.State{"enablement": "disabled", "active": "inactive"}
		if u.Enable {
			s["enablement"] = "enabled"
		}
		if u.Start {
			s["active"] = "active"
		}
		w.add(host.KindUnit, u.Name, s, w.plan.Origin(plan.KindUnit, u.Name))
	}
}

func isMount(name string) bool { return strings.HasSuffix(name, ".mount") }

func (w *wants) mounts() error {
	w.unitsIf(isMount)
	return nil
}

func (w *wants) units() error {
	w.unitsIf(func(name string) bool { return !isMount(name) && name != runnerUnit })
	return nil
}

func (w *wants) runner() error {
	w.unitsIf(func(name string) bool { return name == runnerUnit })
	return nil
}

func (w *wants) network() error {
	digest, err := networkDigest(w.plan)
	if err != nil {
		return err
	}
	w.add(KindNetwork, "", host.State{"plan": digest}, w.plan.Origin(plan.KindSysctl, "net.ipv4.ip_forward"))
	return nil
}

// planFile comes after the network: a plugin that runs takes a new plan as soon as it is there.
func (w *wants) planFile() error {
	text, err := w.plan.JSON()
	if err != nil {
		return err
	}
	// The plugin reads it as the plan's user. Prebuild steps may hold text that is not for everybody on the host.
	w.add(host.KindFile, plan.Path, host.State{"content": string(text), "mode": "0640", "owner": "root", "group": w.plan.User}, "")
	return nil
}
