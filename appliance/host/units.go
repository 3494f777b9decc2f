package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"

	"github.com/fleetingd/fleetingd/appliance/visible"
)

// KindUnit is the kind of the door Units.
const KindUnit Kind = "unit"

// Units is the door to systemd's units. A unit's State has its "enablement" as `systemctl is-enabled` prints it, and "active", which is
// "active", "inactive", "failed", or on the way to one of them. A unit without a file does not exist; to remove one is to stop and disable it.
//
// Unit files are files. After they changed, Reload has systemd read them.
type Units struct {
	bus bus
	// settle is how long a service must stay up to count as started: systemd calls one of Type=simple started as soon as it was forked.
	settle time.Duration
	// journal returns the last lines of a unit's log.
	journal func(ctx context.Context, unit string) string
}

// bus is as much of systemd's D-Bus interface (org.freedesktop.systemd1(5)) as the door uses. Tests replace it by faults.
type bus interface {
	GetAllPropertiesContext(ctx context.Context, unit string) (map[string]any, error)
	ListUnitFilesByPatternsContext(ctx context.Context, states, patterns []string) ([]dbus.UnitFile, error)
	EnableUnitFilesContext(ctx context.Context, files []string, runtime, force bool) (bool, []dbus.EnableUnitFileChange, error)
	DisableUnitFilesContext(ctx context.Context, files []string, runtime bool) ([]dbus.DisableUnitFileChange, error)
	StartUnitContext(ctx context.Context, name, mode string, result chan<- string) (int, error)
	StopUnitContext(ctx context.Context, name, mode string, result chan<- string) (int, error)
	RestartUnitContext(ctx context.Context, name, mode string, result chan<- string) (int, error)
	KillUnitWithTarget(ctx context.Context, name string, target dbus.Who, signal int32) error
	ResetFailedUnitContext(ctx context.Context, name string) error
	ReloadContext(ctx context.Context) error
	Close()
}

// OpenUnits connects to systemd: root directly, so that no message bus needs to run.
func OpenUnits(ctx context.Context) (*Units, error) {
	connect := dbus.NewSystemdConnectionContext
	if os.Geteuid() != 0 {
		connect = dbus.NewSystemConnectionContext
	}
	// The connection must outlive ctx: what a cancelled apply did is undone over it.
	conn, err := connect(context.WithoutCancel(ctx))
	if err != nil {
		return nil, fmt.Errorf("cannot reach systemd over D-Bus: %w; services can only be managed on a host that was booted with systemd "+
			"(--root DIR writes a host's files without it)", err)
	}
	return &Units{bus: conn, settle: time.Second, journal: lastJournal}, nil
}

// Close ends the connection.
func (u *Units) Close() { u.bus.Close() }

// Reload has systemd read all unit files again, as `systemctl daemon-reload` does.
func (u *Units) Reload(ctx context.Context) error {
	if err := u.bus.ReloadContext(ctx); err != nil {
		return fmt.Errorf("systemd cannot reload its units: %w", err)
	}
	return nil
}

// literally makes a pattern (fnmatch(3)) that matches one name. Names of mount units have backslashes.
var literally = strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`)

// Read returns the states of the units.
func (u *Units) Read(ctx context.Context, names []string) (map[string]State, error) {
	if len(names) == 0 {
		return map[string]State{}, nil
	}
	patterns := make([]string, len(names))
	for i, name := range names {
		patterns[i] = literally.Replace(name)
	}
	// The property UnitFileState is as of the last reload.
	files, err := u.bus.ListUnitFilesByPatternsContext(ctx, nil, patterns)
	if err != nil {
		return nil, fmt.Errorf("systemd cannot list its unit files: %w", err)
	}
	enablement := map[string]string{}
	for _, f := range files {
		enablement[filepath.Base(f.Path)] = f.Type
	}
	return eachName(KindUnit, names, func(name string) (State, error) {
		p, err := u.properties(ctx, name)
		if err != nil {
			return nil, err
		}
		enabled, ok := enablement[name]
		if !ok {
			enabled = p.text("UnitFileState")
		}
		if !ok && p.text("LoadState") == "not-found" {
			return nil, nil
		}
		return State{"enablement": enabled, "active": p.text("ActiveState")}, nil
	})
}

// properties are those of a unit and of its type, by their D-Bus names.
type properties map[string]any

func (u *Units) properties(ctx context.Context, name string) (properties, error) {
	p, err := u.bus.GetAllPropertiesContext(ctx, name)
	return p, err
}

func (p properties) text(name string) string {
	s, _ := p[name].(string)
	return s
}

// timeout is a time limit of a unit's, or what a unit without one may take.
func (p properties) timeout(names ...string) time.Duration {
	const unlimited = 15 * time.Minute
	for _, name := range names {
		if usec, ok := p[name].(uint64); ok && usec > 0 && usec < math.MaxInt64/uint64(time.Microsecond) {
			return time.Duration(usec) * time.Microsecond
		}
	}
	return unlimited
}

// Write enables, disables, starts or stops a unit, and waits until that is done. A masked unit is refused: someone said that it must not run.
func (u *Units) Write(ctx context.Context, name string, want State) error {
	return named(KindUnit, name, u.write(ctx, name, want))
}

func (u *Units) write(ctx context.Context, name string, want State) error {
	if err := onlyKeys(want, "enablement", "active"); err != nil {
		return err
	}
	all, err := u.Read(ctx, []string{name})
	if err != nil {
		return err
	}
	have := all[name]
	if want == nil {
		if have == nil {
			return nil
		}
		want = State{"enablement": have["enablement"], "active": "inactive"}
		if have["enablement"] == "enabled" {
			want["enablement"] = "disabled"
		}
	}
	switch {
	case have == nil:
		return errors.New("systemd knows no such unit")
	case have["enablement"] == "masked" && (want["enablement"] != "masked" || want["active"] == "active"):
		return fmt.Errorf("it is masked, so somebody wants it not to run; if that is no longer so: systemctl unmask %s", name)
	}
	if err := u.enable(ctx, name, have["enablement"], want["enablement"]); err != nil {
		return err
	}
	switch runs := have["active"] != "inactive" && have["active"] != "failed"; {
	case want["active"] == "active" && have["active"] != "active":
		return u.start(ctx, name, have["active"] == "failed")
	case want["active"] != "active" && runs:
		return u.job(ctx, name, "stop", u.bus.StopUnitContext, "TimeoutStopUSec", "TimeoutUSec")
	}
	return nil
}

func (u *Units) enable(ctx context.Context, name, have, want string) error {
	switch {
	case have == want:
		return nil
	case have == "disabled" && want == "enabled":
		installs, changes, err := u.bus.EnableUnitFilesContext(ctx, []string{name}, false, false)
		if err == nil && !installs && len(changes) == 0 {
			err = errors.New("its [Install] section names no unit that would start it")
		}
		if err != nil {
			return fmt.Errorf("enable it: %w", err)
		}
	case have == "enabled" && want == "disabled":
		if _, err := u.bus.DisableUnitFilesContext(ctx, []string{name}, false); err != nil {
			return fmt.Errorf("disable it: %w", err)
		}
	default:
		return fmt.Errorf("it is %s, and cannot be made %s", have, want)
	}
	return nil
}

func (u *Units) start(ctx context.Context, name string, failed bool) error {
	if failed { // it may have failed too often to be started once more
		if err := u.bus.ResetFailedUnitContext(ctx, name); err != nil {
			return fmt.Errorf("forget that it failed: %w", err)
		}
	}
	if err := u.job(ctx, name, "start", u.bus.StartUnitContext, "TimeoutStartUSec", "TimeoutUSec"); err != nil {
		return err
	}
	return u.staysUp(ctx, name)
}

// Restart restarts a unit and waits until it is up again. A service that systemd stops with SIGQUIT and always starts again is only sent that
// signal: GitLab Runner takes no further job then, ends when those that run have ended, and comes back, whatever happens to this process. Its
// limit is that of the unit's stop.
func (u *Units) Restart(ctx context.Context, name string) error {
	return named(KindUnit, name, u.restart(ctx, name))
}

func (u *Units) restart(ctx context.Context, name string) error {
	p, err := u.properties(ctx, name)
	if err != nil {
		return err
	}
	signal, _ := p["KillSignal"].(int32)
	pid, _ := p["MainPID"].(uint32)
	if signal != int32(syscall.SIGQUIT) || p.text("Restart") != "always" || pid == 0 {
		if err := u.job(ctx, name, "restart", u.bus.RestartUnitContext, "TimeoutStartUSec", "TimeoutUSec"); err != nil {
			return err
		}
		return u.staysUp(ctx, name)
	}
	if err := u.bus.KillUnitWithTarget(ctx, name, dbus.Main, signal); err != nil {
		return fmt.Errorf("send SIGQUIT: %w", err)
	}
	limit := p.timeout("TimeoutStopUSec")
	slog.InfoContext(ctx, "restarting gracefully: running jobs end first", "unit", name, "limit", limit)
	waited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err = u.until(waited, name, func(p properties) bool {
		now, _ := p["MainPID"].(uint32)
		return now != pid && now != 0 && p.text("ActiveState") == "active"
	})
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return fmt.Errorf("it got SIGQUIT %s ago and still runs; it restarts by itself as soon as its jobs have ended", limit)
	}
	if err != nil {
		return err
	}
	return u.staysUp(ctx, name)
}

// job queues a job for a unit and waits for its result.
func (u *Units) job(ctx context.Context, name, verb string, queue func(context.Context, string, string, chan<- string) (int, error),
	limits ...string,
) error {
	p, err := u.properties(ctx, name)
	if err != nil {
		return err
	}
	// systemd has limits of its own; this one is for a systemd that does not answer.
	limit := p.timeout(limits...) + time.Minute
	waited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	done := make(chan string, 1)
	if _, err := queue(waited, name, "replace", done); err != nil {
		return u.failure(ctx, name, fmt.Sprintf("%s: %v", verb, err))
	}
	select {
	case result := <-done:
		if result != "done" {
			return u.failure(ctx, name, fmt.Sprintf("%s: %s", verb, u.why(ctx, name, result)))
		}
		return nil
	case <-waited.Done():
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", verb, ctx.Err())
		}
		return u.failure(ctx, name, fmt.Sprintf("%s: systemd has not finished after %s", verb, limit))
	}
}

// why explains a job's result (the signal JobRemoved in org.freedesktop.systemd1(5)).
func (u *Units) why(ctx context.Context, name, result string) string {
	switch result {
	case "dependency":
		return "a unit that it needs failed" + u.failedNeeds(ctx, name)
	case "skipped":
		return "a condition in its file does not hold (systemctl status " + name + ")"
	case "assert":
		return "an assertion in its file does not hold (systemctl status " + name + ")"
	case "canceled":
		return "another job replaced it"
	case "timeout":
		return "it took longer than it may"
	}
	if p, err := u.properties(ctx, name); err == nil && p.text("Result") != "" && p.text("Result") != "success" {
		status, _ := p["ExecMainStatus"].(int32)
		return fmt.Sprintf("%s (%s, status %d)", result, p.text("Result"), status)
	}
	return result
}

func (u *Units) failedNeeds(ctx context.Context, name string) string {
	p, err := u.properties(ctx, name)
	if err != nil {
		return ""
	}
	var failed []string
	for _, kind := range []string{"Requires", "Requisite", "BindsTo"} {
		needs, _ := p[kind].([]string)
		for _, need := range needs {
			if n, err := u.properties(ctx, need); err == nil && n.text("ActiveState") == "failed" && !slices.Contains(failed, need) {
				failed = append(failed, need)
			}
		}
	}
	if len(failed) == 0 {
		return ""
	}
	return ": " + strings.Join(failed, ", ")
}

// failure is an error with the unit's last words.
func (u *Units) failure(ctx context.Context, name, what string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if lines := u.journal(ctx, name); lines != "" {
		what += "; its log ends with:\n" + lines
	}
	return errors.New(what)
}

// lastJournal asks journalctl, since the journal's files have no reader in Go.
func lastJournal(ctx context.Context, unit string) string {
	_ = exec.CommandContext(ctx, "journalctl", "--sync").Run() // without it the last lines may be missing, which is no reason to fail
	out, err := exec.CommandContext(ctx, "journalctl", "--unit", unit, "--lines", "10", "--output", "cat", "--no-pager", "--quiet").Output()
	if err != nil {
		return fmt.Sprintf("(journalctl --unit %s: %v)", unit, err)
	}
	return strings.Join(visible.LastLines(string(out), 10), "\n")
}

// staysUp watches a service for a moment after its start.
func (u *Units) staysUp(ctx context.Context, name string) error {
	p, err := u.properties(ctx, name)
	if met, ok := p["ConditionResult"].(bool); err == nil && ok && !met && p.text("ActiveState") == "inactive" {
		return u.failure(ctx, name, "start: "+u.why(ctx, name, "skipped")) // to systemd that is done
	}
	if err != nil || !strings.HasSuffix(name, ".service") || p.text("Type") == "oneshot" {
		return err
	}
	restarts := p["NRestarts"]
	ctx, cancel := context.WithTimeout(ctx, u.settle)
	defer cancel()
	err = u.until(ctx, name, func(now properties) bool {
		p = now
		return now.text("ActiveState") != "active" || now["NRestarts"] != restarts
	})
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return nil
	case err != nil:
		return err
	}
	status, _ := p["ExecMainStatus"].(int32)
	return u.failure(ctx, name, fmt.Sprintf("it started and ended at once (%s, status %d)", p.text("Result"), status))
}

// until asks for a unit's properties until they are as they should be.
func (u *Units) until(ctx context.Context, name string, ok func(properties) bool) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		p, err := u.properties(ctx, name)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return err
		case ok(p):
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}
