package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// MainOptions configures Main.
type MainOptions struct {
	Prebuild bool   // run the host's steps instead of bringing up a worker
	Version  string // of this program, for the host's log
	Log      *slog.Logger
}

// Main is `fleetingd guest`, run as root in a VM. It returns when ctx ends, or with an error if it cannot start.
func Main(ctx context.Context, o MainOptions) error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return fmt.Errorf("read the boot id: %w", err)
	}
	id := strings.TrimSpace(string(boot))
	if o.Prebuild {
		return servePrebuild(ctx, o, id)
	}
	return serveWorker(ctx, o, id)
}

// servePrebuild runs the host's commands until the machine is powered off.
func servePrebuild(ctx context.Context, o MainOptions, boot string) error {
	a := newAgent(modePrebuild, boot, o.Version, o.Log)
	s := &sealer{root: "/", log: o.Log, stock: enabledUnits("/")}
	var first sync.Once
	a.do = func(ctx context.Context, c command, say func(string)) result {
		first.Do(func() { waitCloudInit(ctx, say) })
		if c.step != nil {
			return runStep(ctx, *c.step, say)
		}
		e, err := s.seal(ctx, say)
		if err != nil {
			return result{code: 1, err: err}
		}
		// If the host disappears between done and poweroff, the sealed machine must not keep running: it would change its disk.
		time.AfterFunc(hostGone, a.poweroff)
		return result{export: e}
	}
	a.poweroff = sync.OnceFunc(func() {
		if err := exec.Command("systemctl", "poweroff", "--no-block").Run(); err != nil {
			o.Log.Error("power off", "error", err)
		}
	})
	return a.serve(ctx, openChannel)
}

// serveWorker gives the machine its identity, tells systemd to start what is ordered after it, and tells the host when
// the worker is ready. Then it only waits for the host to ask again.
func serveWorker(ctx context.Context, o MainOptions, boot string) error {
	a := newAgent(modeWorker, boot, o.Version, o.Log)
	idle := a.beat("")
	var wg sync.WaitGroup
	wg.Go(func() { _ = a.serve(ctx, openChannel) }) // returns only when ctx ends
	defer wg.Wait()

	host, err := bringUp(ctx, o.Log)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		// Keep running, so that the host can ask why.
		o.Log.Error("this worker cannot get ready", "error", err)
		a.report(message{Type: typeFailed, Error: cut(err.Error(), maxText)})
	} else {
		up, _ := uptime()
		o.Log.Info("ready", "hostname", host, "after", up)
		a.report(message{Type: typeReady, Hostname: host, TookMS: up.Milliseconds()})
	}
	idle()
	return nil
}

// bringUp turns this machine into a worker and returns its host name.
func bringUp(ctx context.Context, log *slog.Logger) (string, error) {
	if keepsCloudInit("/") {
		if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
			return "", fmt.Errorf("tell systemd: %w", err)
		}
		waitCloudInit(ctx, func(l string) { log.Warn(l) })
	} else {
		if err := growRoot(ctx); err != nil {
			log.Warn("cannot grow the root file system to its disk", "error", err) // most jobs can do without
		}
		err := applySeed(ctx, log)
		// Start sshd and the rest in any case: someone may have to log in to find the cause.
		if _, nerr := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil || nerr != nil {
			return "", errors.Join(err, nerr)
		}
	}
	if err := waitLogin(ctx, "/"); err != nil {
		return "", err
	}
	return os.Hostname()
}

// uptime returns the time since the kernel started.
func uptime() (time.Duration, error) {
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return 0, err
	}
	up, _, _ := strings.Cut(string(b), " ")
	s, err := strconv.ParseFloat(up, 64)
	return time.Duration(s * float64(time.Second)), err
}

// keepCloudInit is a file that a prebuild creates to let cloud-init set up the image's workers at every boot, as it would
// without fleetingd: for custom datasources or vendor data. It costs most of a boot's time.
const keepCloudInit = "etc/fleetingd/keep-cloud-init"

func keepsCloudInit(root string) bool {
	_, err := os.Stat(filepath.Join(root, keepCloudInit))
	return err == nil
}
