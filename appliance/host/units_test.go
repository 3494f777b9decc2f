package host

import (
	"context"
	"errors"
	"maps"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
)

// faultyBus is a systemd with one service, to have it fail; units_lab_test.go has the real one.
type faultyBus struct {
	props                    properties
	enablement               string // "": no file
	result                   string // of jobs; "": they never end
	err                      error  // of everything but reading
	enabled, reset, stopped  bool
	dies                     bool // right after its start
	killed                   syscall.Signal
	returns                  bool // after SIGQUIT
	changesNothing, reloaded bool
}

func (b *faultyBus) GetAllPropertiesContext(context.Context, string) (map[string]any, error) {
	if b.dies && b.props["ActiveState"] == "active" {
		b.props["NRestarts"] = b.props["NRestarts"].(uint32) + 1
	}
	return maps.Clone(b.props), nil
}

func (b *faultyBus) ListUnitFilesByPatternsContext(_ context.Context, _, patterns []string) ([]dbus.UnitFile, error) {
	if b.enablement == "" {
		return nil, nil
	}
	return []dbus.UnitFile{{Path: "/etc/systemd/system/" + strings.ReplaceAll(patterns[0], `\\`, `\`), Type: b.enablement}}, nil
}

func (b *faultyBus) EnableUnitFilesContext(context.Context, []string, bool, bool) (bool, []dbus.EnableUnitFileChange, error) {
	b.enabled = true
	return !b.changesNothing, nil, b.err
}

func (b *faultyBus) DisableUnitFilesContext(context.Context, []string, bool) ([]dbus.DisableUnitFileChange, error) {
	b.enabled = false
	return nil, b.err
}

func (b *faultyBus) job(result chan<- string, state string) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.result != "" {
		result <- b.result
	}
	if b.result == "done" {
		b.props["ActiveState"] = state
	}
	return 1, nil
}

func (b *faultyBus) StartUnitContext(_ context.Context, _, _ string, result chan<- string) (int, error) {
	return b.job(result, "active")
}

func (b *faultyBus) RestartUnitContext(_ context.Context, _, _ string, result chan<- string) (int, error) {
	return b.job(result, "active")
}

func (b *faultyBus) StopUnitContext(_ context.Context, _, _ string, result chan<- string) (int, error) {
	b.stopped = true
	return b.job(result, "inactive")
}

func (b *faultyBus) KillUnitWithTarget(_ context.Context, _ string, target dbus.Who, signal int32) error {
	if target != dbus.Main {
		return errors.New("the VMMs would get it, too")
	}
	b.killed = syscall.Signal(signal)
	if b.returns {
		b.props["MainPID"] = uint32(43)
	}
	return b.err
}

func (b *faultyBus) ResetFailedUnitContext(context.Context, string) error {
	b.reset = true
	return b.err
}
func (b *faultyBus) ReloadContext(context.Context) error { b.reloaded = true; return b.err }
func (b *faultyBus) Close()                              {}

func testUnits(b *faultyBus, active string) *Units {
	if b.props == nil {
		b.props = properties{}
	}
	for name, value := range (properties{"ActiveState": active, "LoadState": "loaded", "Type": "simple", "NRestarts": uint32(0),
		"ExecMainStatus": int32(0), "Result": "success", "TimeoutStartUSec": uint64(1), "TimeoutStopUSec": uint64(100_000)}) {
		if _, ok := b.props[name]; !ok {
			b.props[name] = value
		}
	}
	return &Units{bus: b, settle: 60 * time.Millisecond, journal: func(context.Context, string) string { return "last words" }}
}

func TestUnitsFail(t *testing.T) {
	up := State{"enablement": "enabled", "active": "active"}
	down := State{"enablement": "disabled", "active": "inactive"}
	for _, c := range []struct {
		name   string
		bus    *faultyBus
		active string
		want   State
		err    []string
	}{
		{"unknown", &faultyBus{props: properties{"LoadState": "not-found"}}, "inactive", up, []string{"unit x.service: systemd knows no such unit"}},
		{"masked", &faultyBus{enablement: "masked"}, "inactive", up, []string{"it is masked", "systemctl unmask x.service"}},
		{"enable", &faultyBus{enablement: "disabled", err: errors.New("read-only file system")}, "inactive", up, []string{"enable it: read-only file system"}},
		{"nothing to enable", &faultyBus{enablement: "disabled", changesNothing: true}, "inactive", up, []string{"[Install] section"}},
		{"disable", &faultyBus{enablement: "enabled", err: errors.New("no")}, "active", down, []string{"disable it: no"}},
		{"static", &faultyBus{enablement: "static"}, "active", down, []string{"it is static, and cannot be made disabled"}},
		{"refused", &faultyBus{enablement: "enabled", err: errors.New("transaction is destructive")}, "inactive", up,
			[]string{"start: transaction is destructive", "last words"}},
		{"failed", &faultyBus{enablement: "enabled", result: "failed", props: properties{"Result": "exit-code", "ExecMainStatus": int32(3)}}, "inactive",
			up, []string{"start: failed (exit-code, status 3)", "its log ends with:\nlast words"}},
		{"needs", &faultyBus{enablement: "enabled", result: "dependency",
			props: properties{"Requires": []string{"y.service"}, "ActiveState": "failed"}}, "", up, []string{"a unit that it needs failed: y.service"}},
		{"condition", &faultyBus{enablement: "enabled", result: "skipped"}, "inactive", up, []string{"a condition in its file does not hold"}},
		{"assertion", &faultyBus{enablement: "enabled", result: "assert"}, "inactive", up, []string{"an assertion in its file does not hold"}},
		{"slow", &faultyBus{enablement: "enabled", result: "timeout"}, "inactive", up, []string{"it took longer than it may"}},
		{"dies", &faultyBus{enablement: "enabled", result: "done", dies: true}, "inactive", up, []string{"it started and ended at once", "last words"}},
		{"stop", &faultyBus{enablement: "disabled", result: "failed"}, "active", down, []string{"stop: failed"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := testUnits(c.bus, c.active).Write(t.Context(), "x.service", c.want)
			for _, want := range c.err {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%v; want %q", err, want)
				}
			}
		})
	}
}

// A systemd that never answers does not hold an apply for ever, and whoever gives up is told that.
func TestUnitsNoAnswer(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	b := &faultyBus{enablement: "enabled"}
	err := testUnits(b, "inactive").Write(ctx, "x.service", State{"enablement": "enabled", "active": "active"})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestUnitsWrite(t *testing.T) {
	b := &faultyBus{enablement: "disabled", result: "done"}
	u := testUnits(b, "failed")
	if err := u.Write(t.Context(), "x.service", State{"enablement": "enabled", "active": "active"}); err != nil {
		t.Fatal(err)
	}
	if !b.enabled || !b.reset || b.props["ActiveState"] != "active" {
		t.Errorf("%+v", b)
	}
	b.enablement = "enabled"
	b.err = errors.New("nothing is to be done")
	if err := u.Write(t.Context(), "x.service", State{"enablement": "enabled", "active": "active"}); err != nil {
		t.Error(err)
	}
	b.err = nil
	if err := u.Write(t.Context(), "x.service", nil); err != nil || !b.stopped || b.enabled {
		t.Errorf("%v: %+v", err, b)
	}
	b.enablement, b.props["LoadState"] = "", "not-found"
	if err := u.Write(t.Context(), "x.service", nil); err != nil {
		t.Error(err)
	}
	if s := readOne(t, u, "x.service"); s != nil {
		t.Errorf("a missing unit is %v", s)
	}
}

func TestUnitsRestart(t *testing.T) {
	runner := func() properties {
		return properties{"KillSignal": int32(syscall.SIGQUIT), "Restart": "always", "MainPID": uint32(42)}
	}
	b := &faultyBus{props: runner(), returns: true}
	if err := testUnits(b, "active").Restart(t.Context(), "x.service"); err != nil || b.killed != syscall.SIGQUIT {
		t.Errorf("%v: %+v", err, b)
	}
	b = &faultyBus{props: runner()}
	err := testUnits(b, "active").Restart(t.Context(), "x.service")
	if err == nil || !strings.Contains(err.Error(), "still runs; it restarts by itself as soon as its jobs have ended") {
		t.Error(err)
	}
	b = &faultyBus{result: "done"}
	if err := testUnits(b, "active").Restart(t.Context(), "x.service"); err != nil || b.killed != 0 {
		t.Errorf("an ordinary service: %v: %+v", err, b)
	}
	b = &faultyBus{result: "failed"}
	if err := testUnits(b, "active").Restart(t.Context(), "x.service"); err == nil || !strings.Contains(err.Error(), "restart: failed") {
		t.Error(err)
	}
}

func TestUnitsWithoutSystemd(t *testing.T) {
	if _, err := os.Stat("/run/systemd/private"); err == nil {
		t.Skip("skipped: systemd runs here; TestDoorsInLab uses it")
	}
	u, err := OpenUnits(t.Context())
	if err == nil {
		u.Close()
	}
	for _, want := range []string{"cannot reach systemd over D-Bus", "booted with systemd", "--root DIR"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q", err, want)
		}
	}
}
