package apply

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// testSpec has something of every kind.
const testSpec = `
host "lab" {
  egress_interface = "eth0"
  disks {
    backing = "xfs-image"
    size    = "20GiB"
  }
  network { subnet = "172.16.70.0/28" }
  hypervisor "qemu" {}
  refresh = "24h"
}
image "debian" {
  file {
    disk   = "/srv/base/disk.raw"
    kernel = "/srv/base/kernel"
  }
  prebuild { run = ["true"] }
  user = "ci"
}
pool "small" {
  image         = image.debian
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  start         = "cold"
  max_instances = 2
}
runner "small" {
  pool  = pool.small
  url   = "https://gitlab.example.com"
  token = file("/run/secrets/gitlab-token")
}
`

func compiled(t testing.TB, spec string) *plan.Plan {
	t.Helper()
	res, diags := hostspec.Load(hostspec.Options{Path: filepath.Join(t.TempDir(), "host.hcl"), Source: []byte(spec)})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	p, diags := compile.Compile(res.Host, compile.Options{})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	return p
}

// fakeHost is a host in memory. It injects faults.
type fakeHost struct {
	objects map[host.Object]host.State
	writes  int
	at      int // the Write that is hurt, from 1; 0: none
	fault   fault
	log     []string // of all Writes
}

type fault string

const (
	noFault    fault = ""
	anError    fault = "error"
	killBefore fault = "kill before"
	killIn     fault = "kill in"
	killAfter  fault = "kill after"
)

var faults = []fault{anError, killBefore, killIn, killAfter}

// errKilled is what a killed process panics with: nothing of it runs on.
var errKilled = errors.New("killed")

var errInjected = errors.New("injected")

type fakeDoor struct {
	*fakeHost
	kind host.Kind
}

func (d fakeDoor) Read(_ context.Context, names []string) (map[string]host.State, error) {
	found := map[string]host.State{}
	for _, name := range names {
		if isAction(d.kind) {
			found[name] = host.State{}
			continue
		}
		found[name] = maps.Clone(d.objects[host.Object{Kind: d.kind, Name: name}])
	}
	return found, nil
}

func (d fakeDoor) Write(_ context.Context, name string, want host.State) error {
	o := host.Object{Kind: d.kind, Name: name}
	d.writes++
	hurt := noFault
	if d.writes == d.at {
		hurt = d.fault
	}
	if hurt == killBefore {
		panic(errKilled)
	}
	d.log = append(d.log, fmt.Sprint(o, " ", want["do"]))
	torn := host.State{"torn": "yes"}
	switch {
	case isAction(d.kind):
	case hurt == killIn || hurt == anError:
		d.objects[o] = torn
	case want == nil:
		delete(d.objects, o)
	default:
		d.objects[o] = maps.Clone(want)
	}
	switch hurt {
	case anError:
		return errInjected
	case killIn, killAfter:
		panic(errKilled)
	}
	return nil
}

var allKinds = []host.Kind{
	host.KindFile, host.KindFolder, host.KindSecretFile, host.KindUser, host.KindMember, host.KindSysctl, host.KindDiskImage, host.KindUnit,
	host.KindPackage, host.KindProgram, host.KindAptKey, KindNetwork, KindReload, KindRestart, KindTmpfiles, KindEmpty, KindEnd,
}

// engine opens the host anew, as the next process does.
func (h *fakeHost) engine(t testing.TB, dir string) *Engine {
	t.Helper()
	d, err := state.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	e := &Engine{Dir: d, Version: "test", Doors: map[host.Kind]host.Door{}}
	for _, kind := range allKinds {
		e.Doors[kind] = fakeDoor{h, kind}
	}
	return e
}

// stateFolder is a folder for one host's state: in memory if that can be, since thousands of applies flush each step.
func stateFolder(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "fleetingd-apply-")
	if err != nil {
		return filepath.Join(t.TempDir(), "apply")
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return filepath.Join(dir, "apply")
}

// bareHost has what a plan changes and what it must leave alone.
func bareHost() *fakeHost {
	return &fakeHost{objects: map[host.Object]host.State{
		{Kind: host.KindSysctl, Name: "net.ipv4.ip_forward"}: {"value": "0"},
		{Kind: host.KindUnit, Name: runnerUnit}:              {"enablement": "disabled", "active": "inactive"},
		{Kind: host.KindFile, Name: "/etc/passwd"}:           {"content": "somebody's"},
	}}
}

func (h *fakeHost) snapshot() map[host.Object]host.State {
	all := map[host.Object]host.State{}
	for o, s := range h.objects {
		all[o] = maps.Clone(s)
	}
	return all
}

// killed does something as a process that a fault may end.
func killed(do func() error) (err error, wasKilled bool) { //nolint:revive // the error is the first result on purpose: it is the done thing's
	defer func() {
		if r := recover(); r != nil {
			if r != errKilled { //nolint:errorlint // a panic's value
				panic(r)
			}
			wasKilled = true
		}
	}()
	return do(), false
}

// step names a step for a matrix.
func stepName(s Step) string {
	what := "write"
	switch {
	case isAction(s.Kind) && s.After["do"] == "yes":
		what = "do"
	case isAction(s.Kind):
		what = "do on undo"
	case s.After == nil:
		what = "remove"
	case s.Before == nil:
		what = "create"
	}
	return fmt.Sprintf("%-10s %s", what, describe(s.Object))
}

func mustLook(t testing.TB, e *Engine, p *plan.Plan) *Change {
	t.Helper()
	c, err := e.Look(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func mustApply(t testing.TB, e *Engine, p *plan.Plan, o Options) Result {
	t.Helper()
	res, err := e.Apply(t.Context(), mustLook(t, e, p), o)
	if err != nil {
		t.Fatal(err)
	}
	return res
}
