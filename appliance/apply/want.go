// Package apply makes a host equal to its plan: it compares the two, shows what would change, changes it one object after the other, each with
// its undo in a journal, and takes it back when something fails or when nobody confirms it.
package apply

import (
	"fmt"
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

// The timer that rebuilds images, and what it starts.
const (
	refreshTimer = "fleetingd-refresh.timer"
	refreshUnit  = "fleetingd-refresh.service"
)

// recoverUnit is the unit that runs Recover at boot.
const recoverUnit = "fleetingd-recover.service"

// unitDir is where systemd reads units of the administrator.
const unitDir = "/etc/systemd/system/"

// Want returns what a plan wants on its host, in the order in which it is to be made.
func Want(p *plan.Plan) ([]Item, error) {
	w := &wants{plan: p}
	for _, add := range []func() error{
		w.recoverUnit, w.packages, w.account, w.folders, w.files, w.settings, w.unitFiles, w.mounts, w.network, w.planFile, w.units, w.secretFiles, w.runner,
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

// packages are what the distribution and others bring. A source's key comes before the source, and both before what they are for.
func (w *wants) packages() error {
	in := w.plan.Install
	if in == nil {
		return nil
	}
	for _, s := range in.Sources {
		origin := w.plan.Origin(plan.KindPackage, s.Package)
		w.add(host.KindAptKey, s.KeyPath(), host.State{"fingerprint": s.Fingerprint, "url": s.KeyURL}, origin)
		f := s.File()
		w.add(host.KindFile, f.Path, fileState(f), origin)
	}
	for _, name := range in.Packages {
		w.add(host.KindPackage, name, host.State{"installed": "yes"}, w.plan.Origin(plan.KindPackage, name))
	}
	for _, d := range in.Programs {
		w.add(host.KindProgram, d.ProgramPath(), host.State{"sha256": d.SHA256, "mode": "0755", "owner": "root", "group": "root"},
			w.plan.Origin(plan.KindPackage, d.Package))
	}
	return nil
}

func (w *wants) account() error {
	a := w.plan.Account()
	w.add(host.KindUser, a.Name, host.State{"comment": a.Comment, "home": a.Home, "shell": a.Shell}, "")
	for _, g := range a.Groups {
		w.add(host.KindMember, a.Name+"/"+g, host.State{"member": "yes"}, "")
	}
	return nil
}

// folders are the plan's. What lies on the disks' file system is made once that is mounted (see KindTmpfiles).
func (w *wants) folders() error {
	for _, f := range w.plan.Folders() {
		if f.Mounted && w.mounted() && f.Path != w.plan.Paths.Disks {
			continue
		}
		w.add(host.KindFolder, f.Path, host.State{"mode": f.Mode, "owner": f.Owner, "group": f.Group}, "")
	}
	return nil
}

// mounted reports whether something is mounted on the disks' folder.
func (w *wants) mounted() bool {
	return slices.ContainsFunc(w.plan.Units, func(u plan.Unit) bool { return strings.HasSuffix(u.Name, ".mount") && u.Start })
}

func fileState(f plan.File) host.State {
	return host.State{"content": f.Content, "mode": f.Mode, "owner": f.Owner, "group": f.Group}
}

// recoverUnit takes back, after a power cut, what was not finished or confirmed. It comes before all that it may have to take back.
func (w *wants) recoverUnit() error {
	w.filesIf(func(f plan.File) bool { return f.Path == unitDir+recoverUnit }, host.KindFile)
	w.unitsIf(func(name string) bool { return name == recoverUnit })
	return nil
}

func isUnitFile(name string) bool { return strings.HasPrefix(name, unitDir) }

func (w *wants) files() error {
	w.filesIf(func(f plan.File) bool { return len(f.Secrets) == 0 && !isUnitFile(f.Path) }, host.KindFile)
	return nil
}

func (w *wants) unitFiles() error {
	w.filesIf(func(f plan.File) bool {
		return len(f.Secrets) == 0 && isUnitFile(f.Path) && f.Path != unitDir+recoverUnit
	}, host.KindFile)
	return nil
}

func (w *wants) secretFiles() error {
	w.filesIf(func(f plan.File) bool { return len(f.Secrets) > 0 }, host.KindSecretFile)
	return nil
}

func (w *wants) filesIf(is func(plan.File) bool, kind host.Kind) {
	for _, f := range w.plan.Files {
		if is(f) {
			w.add(kind, f.Path, fileState(f),
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
	w.unitsIf(func(name string) bool { return !isMount(name) && name != runnerUnit && name != recoverUnit })
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
