package apply

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// Word is a change between two plans in words, where a diff of their JSON would tell people little.
type Word struct {
	Action string `json:"action"` // create, update, delete
	Kind   string `json:"kind"`   // pool, image, slots, egress, runner
	Name   string `json:"name"`
	Origin string `json:"origin,omitempty"`
	Text   string `json:"text"`
}

// Words compares two plans; the old one may be nil.
func Words(from, to *plan.Plan) []Word {
	if from == nil {
		from = &plan.Plan{}
	}
	if to == nil {
		to = &plan.Plan{}
	}
	w := words{to: to}
	w.pools(from.Pools, to.Pools)
	w.images(from.Images, to.Images)
	w.slots(from, to)
	w.egress(from.Network.Egress, to.Network.Egress)
	w.runners(from.Runners, to.Runners)
	return w.found
}

type words struct {
	to    *plan.Plan
	found []Word
}

const (
	create = "create"
	update = "update"
	remove = "delete"
)

func (w *words) add(action, kind, name, text string) {
	w.found = append(w.found, Word{action, kind, name, w.to.Origin(kind, name), text})
}

// named compares two lists by their names.
func named[T any](w *words, kind string, from, to []T, name func(T) string, created func(T) string, changed func(a, b T) string) {
	for _, t := range to {
		i := slices.IndexFunc(from, func(f T) bool { return name(f) == name(t) })
		if i < 0 {
			w.add(create, kind, name(t), created(t))
			continue
		}
		if !reflect.DeepEqual(from[i], t) {
			if text := changed(from[i], t); text != "" {
				w.add(update, kind, name(t), text)
			}
		}
	}
	for _, f := range from {
		if !slices.ContainsFunc(to, func(t T) bool { return name(f) == name(t) }) {
			w.add(remove, kind, name(f), "")
		}
	}
}

func (w *words) pools(from, to []plan.Pool) {
	named(w, plan.KindPool, from, to, func(p plan.Pool) string { return p.Name },
		func(p plan.Pool) string {
			return fmt.Sprintf("%s: %s, %s memory, %s disk, image %s", count(p.MaxInstances, "worker"), count(p.CPUs, "CPU"), size(p.Memory),
				size(p.Disk), p.Image)
		},
		func(a, b plan.Pool) string {
			text := changes(
				change("image", a.Image, b.Image), change("CPUs", a.CPUs, b.CPUs), change("memory", size(a.Memory), size(b.Memory)),
				change("disk", size(a.Disk), size(b.Disk)), change("start", a.Start, b.Start), change("console", a.Console, b.Console),
				change("max_instances", a.MaxInstances, b.MaxInstances), change("start_timeout", time.Duration(a.StartTimeout), time.Duration(b.StartTimeout)),
				change("cpu_quota", percent(a.Limits.CPUQuotaPercent), percent(b.Limits.CPUQuotaPercent)),
				change("disk_iops", limit(a.Limits.DiskIOPS), limit(b.Limits.DiskIOPS)),
				change("network_mbps", limit(a.Limits.NetworkMbps), limit(b.Limits.NetworkMbps)),
				change("connections", limit(a.Limits.Connections), limit(b.Limits.Connections)),
			)
			if text != "" {
				text += "; takes effect for new workers"
			}
			return text
		})
}

func (w *words) images(from, to []plan.Image) {
	named(w, plan.KindImage, from, to, func(im plan.Image) string { return im.Name },
		func(plan.Image) string { return "built before the first worker starts" },
		func(a, b plan.Image) string {
			var what []string
			if !reflect.DeepEqual(a.Source, b.Source) {
				what = append(what, "another source")
			}
			if !samePrebuild(a.Prebuild, b.Prebuild) {
				what = append(what, "another prebuild")
			}
			if a.User != b.User {
				what = append(what, change("user", a.User, b.User))
			}
			if len(what) == 0 {
				return ""
			}
			return strings.Join(what, ", ") + "; built anew, and new workers use it"
		})
}

// samePrebuild leaves out the seed, which has the address of the image's slot.
func samePrebuild(a, b *plan.Prebuild) bool {
	if a == nil || b == nil {
		return a == b
	}
	return a.Timeout == b.Timeout && reflect.DeepEqual(a.Steps, b.Steps)
}

func (w *words) slots(from, to *plan.Plan) {
	if len(from.Slots) == 0 || len(to.Slots) == 0 {
		return
	}
	var text []string
	switch n := len(to.Slots) - len(from.Slots); {
	case n > 0:
		text = append(text, count(n, "slot")+" more")
	case n < 0:
		text = append(text, count(-n, "slot")+" fewer")
	}
	moved := 0
	had := make(map[string]plan.Slot, len(from.Slots))
	for _, s := range from.Slots {
		had[s.TAP] = s
	}
	for _, s := range to.Slots {
		if f, ok := had[s.TAP]; ok && !reflect.DeepEqual(f, s) {
			moved++
		}
	}
	if moved > 0 {
		text = append(text, count(moved, "slot")+" changed")
	}
	if s := change("subnet", from.Network.Subnet, to.Network.Subnet); s != "" {
		text = append(text, s)
	}
	if s := change("MTU", from.Network.MTU, to.Network.MTU); s != "" {
		text = append(text, s)
	}
	if len(text) > 0 {
		w.add(update, "slots", "", strings.Join(text, ", "))
	}
}

func (w *words) egress(from, to []plan.Egress) {
	named(w, plan.KindEgress, from, to, func(e plan.Egress) string { return e.Name },
		func(e plan.Egress) string { return e.Action + " " + egressText(e) },
		func(a, b plan.Egress) string {
			return changes(change("action", a.Action, b.Action), change("to", egressText(a), egressText(b)))
		})
}

func egressText(e plan.Egress) string {
	var to []string
	for _, p := range e.To {
		to = append(to, p.String())
	}
	text := strings.Join(to, ", ")
	if text == "" {
		text = "anywhere"
	}
	for _, p := range e.Ports {
		text += fmt.Sprintf(" %s/%d", p.Protocol, p.First)
		if p.Last != p.First {
			text += fmt.Sprintf("-%d", p.Last)
		}
	}
	return text
}

func (w *words) runners(from, to []plan.Runner) {
	named(w, plan.KindRunner, from, to, func(r plan.Runner) string { return r.Name },
		func(r plan.Runner) string { return "takes jobs for pool " + r.Pool },
		func(a, b plan.Runner) string { return change("pool", a.Pool, b.Pool) })
}

func change[T comparable](what string, from, to T) string {
	if from == to {
		return ""
	}
	return fmt.Sprintf("%s %v → %v", what, from, to)
}

func changes(all ...string) string {
	return strings.Join(slices.DeleteFunc(all, func(s string) bool { return s == "" }), ", ")
}

func limit(n int) string {
	if n == 0 {
		return "no limit"
	}
	return strconv.Itoa(n)
}

func percent(n int) string {
	if n == 0 {
		return "no limit"
	}
	return strconv.Itoa(n) + "%"
}

// size is a number of bytes as a spec has it.
func size(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	i := 0
	for ; i < len(units)-1 && n >= 1024 && n%1024 == 0; i++ {
		n /= 1024
	}
	return strconv.FormatInt(n, 10) + units[i]
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return strconv.Itoa(n) + " " + what + "s"
}
