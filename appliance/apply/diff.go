package apply

import (
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/state"
)

// Step is one change of a host. Its undo is to write Before.
type Step struct {
	host.Object
	Before, After host.State // nil: it does not exist
	Origin        string     // the line of the spec that it comes from, or ""
	Conflict      Conflict
}

// Conflict says why a step needs somebody's word.
type Conflict string

const (
	// Drift is an object of fleetingd's that somebody else changed.
	Drift Conflict = "drift"
	// Foreign is an object that was there before fleetingd and is not what the plan wants.
	Foreign Conflict = "foreign"
)

// The kinds of the actions that follow from other steps. Their State {"do": "yes"} has the action done when it is written, as After or, on
// the way back, as Before; an empty one does nothing.
const (
	KindReload   host.Kind = "reload"   // systemd reads its unit files
	KindRestart  host.Kind = "restart"  // of the unit
	KindTmpfiles host.Kind = "tmpfiles" // systemd-tmpfiles makes what a file names
	KindEmpty    host.Kind = "empty"    // a folder's content is removed; that has no undo
	KindEnd      host.Kind = "end"      // what still runs in a unit is ended, whatever it is
)

// tmpfilesPath is where every plan has its folders for systemd-tmpfiles.
const tmpfilesPath = "/etc/tmpfiles.d/fleetingd.conf"

func isAction(kind host.Kind) bool {
	return kind == KindReload || kind == KindRestart || kind == KindTmpfiles || kind == KindEmpty || kind == KindEnd
}

func doNow(kind host.Kind, name string) Step {
	return Step{Object: host.Object{Kind: kind, Name: name}, Before: host.State{}, After: host.State{"do": "yes"}}
}

func doOnUndo(kind host.Kind, name string) Step {
	return Step{Object: host.Object{Kind: kind, Name: name}, Before: host.State{"do": "yes"}, After: host.State{}}
}

// same reports whether two states are equal; nil is no empty state.
func same(a, b host.State) bool { return (a == nil) == (b == nil) && maps.Equal(a, b) }

// satisfied reports whether an object is as it is wanted. A disk image that is larger serves as well: it is sparse, and cannot shrink.
func satisfied(kind host.Kind, have, want host.State) bool {
	if kind == host.KindDiskImage && have != nil && want != nil {
		has, err := strconv.ParseInt(have["size"], 10, 64)
		wants, err1 := strconv.ParseInt(want["size"], 10, 64)
		return err == nil && err1 == nil && has >= wants
	}
	return same(have, want)
}

// Diff returns the steps that make a host what is wanted: first what goes, the last first; then what is wanted, in its order. have is the state
// of every object of want and owned; owned is what the current generation put there.
func Diff(have map[host.Object]host.State, want []Item, owned []state.Owned) []Step {
	wanted := map[host.Object]bool{}
	for _, w := range want {
		wanted[w.Object] = true
	}
	ours := map[host.Object]state.Owned{}
	var gone []Step
	for _, o := range owned {
		object := objectOf(o)
		ours[object] = o
		if !wanted[object] && !same(have[object], o.Original) {
			s := Step{Object: object, Before: have[object], After: o.Original}
			if drifted(object.Kind, have[object], o.State) && have[object] != nil {
				s.Conflict = Drift
			}
			gone = append(gone, s)
		}
	}
	slices.Reverse(gone)
	var made []Step
	for _, w := range want {
		now := have[w.Object]
		if satisfied(w.Kind, now, w.State) {
			continue
		}
		s := Step{Object: w.Object, Before: now, After: w.State, Origin: w.Origin}
		o, isOurs := ours[w.Object]
		switch {
		case isOurs && drifted(w.Kind, now, o.State):
			s.Conflict = Drift
		case !isOurs && isForeign(w.Kind, now):
			s.Conflict = Foreign
		}
		made = append(made, s)
	}
	return append(around(gone, false), around(made, true)...)
}

func objectOf(o state.Owned) host.Object { return host.Object{Kind: host.Kind(o.Kind), Name: o.Name} }

// drifted reports whether somebody changed an object since it was written. What is merely broken is no drift: apply mends it.
func drifted(kind host.Kind, have, written host.State) bool {
	switch kind {
	case host.KindSecretFile:
		return !host.SameButSecrets(have, written)
	case host.KindUnit:
		// A unit that failed, or is on its way, was not stopped by anybody.
		return have == nil || have["enablement"] != written["enablement"] || written["active"] == "active" && have["active"] == "inactive"
	case KindNetwork:
		return false // every reboot takes it down
	case host.KindDiskImage:
		return have == nil
	}
	return !same(have, written)
}

// isForeign reports whether an object that fleetingd did not make may be of value to somebody. A folder keeps what is in it, and a unit, a
// setting or a package is not lost by being turned on.
func isForeign(kind host.Kind, have host.State) bool {
	switch kind {
	case host.KindFile, host.KindUser, host.KindDiskImage, host.KindProgram, host.KindAptKey:
		return have != nil
	case host.KindSecretFile:
		// gitlab-runner writes a file without runners by itself.
		return have != nil && strings.Contains(have["content"], "[[runners]]")
	}
	return false
}

// around puts the actions around the steps that they follow from. The ones that are only done on the way back come before what they follow
// from, since that way leads from the last step to the first.
func around(steps []Step, starts bool) []Step {
	unitFile := func(s Step) bool { return s.Kind == host.KindFile && isUnitFile(s.Name) }
	networkFile := func(s Step) bool { return s.Kind == host.KindFile && path.Dir(s.Name) == "/etc/systemd/network" }
	mount := func(s Step) bool { return starts && s.Kind == host.KindUnit && isMount(s.Name) }
	var restarts []string
	if starts {
		restarts = restartsFor(steps)
	}
	var out []Step
	for _, unit := range restarts {
		out = append(out, doOnUndo(KindRestart, unit))
	}
	for i, s := range steps {
		if i == slices.IndexFunc(steps, unitFile) {
			out = append(out, doOnUndo(KindReload, "systemd"))
		}
		if i == slices.IndexFunc(steps, networkFile) {
			out = append(out, doOnUndo(KindReload, "systemd-networkd"))
		}
		out = append(out, s)
		if i == lastIndex(steps, unitFile) {
			out = append(out, doNow(KindReload, "systemd"))
		}
		if i == lastIndex(steps, networkFile) {
			out = append(out, doNow(KindReload, "systemd-networkd"))
		}
		if i == lastIndex(steps, mount) {
			out = append(out, doNow(KindTmpfiles, tmpfilesPath))
		}
	}
	for _, unit := range restarts {
		out = append(out, doNow(KindRestart, unit))
	}
	return out
}

// restartsFor returns the units that have to restart, since their files change. A unit that the same steps start reads its new files anyway.
func restartsFor(steps []Step) []string {
	var units []string
	for _, s := range steps {
		unit := ""
		if s.Kind == host.KindFile && forRunning(s.Before["content"]) != forRunning(s.After["content"]) {
			unit = unitOf(s.Name)
		}
		starts := func(s Step) bool { return s.Kind == host.KindUnit && s.Name == unit }
		if restartable(unit) && !slices.Contains(units, unit) && !slices.ContainsFunc(steps, starts) {
			units = append(units, unit)
		}
	}
	return units
}

// forRunning is as much of a unit file as matters to a unit that runs: no comments, and nothing that is only asked when it starts.
func forRunning(text string) string {
	lines := strings.Split(text, "\n")
	return strings.Join(slices.DeleteFunc(lines, func(line string) bool {
		return line == "" || strings.HasPrefix(line, "#") || strings.HasPrefix(line, "Description=") ||
			strings.HasPrefix(line, "Assert") || strings.HasPrefix(line, "Condition")
	}), "\n")
}

func lastIndex(steps []Step, is func(Step) bool) int {
	for i, s := range slices.Backward(steps) {
		if is(s) {
			return i
		}
	}
	return -1
}

// unitOf returns the unit that a unit file or a drop-in belongs to, or "".
func unitOf(file string) string {
	rest, ok := strings.CutPrefix(file, unitDir)
	if !ok {
		return ""
	}
	unit, _, isDropIn := strings.Cut(rest, ".d/")
	if !isDropIn {
		unit = rest
	}
	return unit
}

// restartable reports whether a unit has to restart to take its changed files. A mount would pull the disks from under the workers; what the
// network's unit does, the network's step has done; other services of ours run only when a timer starts them.
func restartable(unit string) bool { return unit == runnerUnit || strings.HasSuffix(unit, ".timer") }
