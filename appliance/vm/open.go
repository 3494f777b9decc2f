package vm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// Open returns the driver that a plan asks for. It looks at nothing yet: that is Probe.
func Open(h plan.Hypervisor, log *slog.Logger) (Driver, error) {
	switch h.Driver {
	case "cloud-hypervisor":
		return newCloudHypervisor(h, log), nil
	case "qemu":
		return newQEMU(h, log)
	default:
		return nil, fmt.Errorf("hypervisor %q is not known; there are \"cloud-hypervisor\" and \"qemu\"", h.Driver)
	}
}

// versionOf returns the version that a hypervisor's --version gives; parse finds it in the output. Errors name the binary.
func versionOf(ctx context.Context, binary string, parse func(out string) (string, error)) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", binary, err)
	}
	version, err := parse(string(out))
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", binary, err)
	}
	return version, nil
}

// maxDir leaves room for the longest socket name in sockaddr_un's 108 bytes.
const maxDir = 80

// check finds what no driver can start.
func (c *Config) check() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.ID == "" || len(c.ID) > 64 || strings.ContainsFunc(c.ID, func(r rune) bool { return r <= ' ' || r > '~' }) {
		bad("the id %q is not 1 to 64 printable ASCII characters", c.ID)
	}
	if len(c.Dir) > maxDir {
		bad("its folder %s is longer than %d bytes: sockets there could not be named", c.Dir, maxDir)
	}
	if c.CPUs < 1 {
		bad("it has %d CPUs", c.CPUs)
	}
	if c.Memory < 1<<20 {
		bad("it has %d bytes of memory", c.Memory)
	}
	for _, d := range c.Disks {
		if len(d.Serial) > 20 {
			bad("the disk serial %q is longer than 20 bytes", d.Serial)
		}
	}
	if n := c.Net; n != nil && (n.Queues < 1 || n.Queues > c.CPUs) {
		bad("its TAP %s has %d queue pairs; 1 to %d (one a CPU) can be used", n.TAP, n.Queues, c.CPUs)
	}
	for _, path := range c.paths() {
		if !filepath.IsAbs(path) {
			bad("the path %q is not absolute", path)
		}
	}
	// Cloud Hypervisor says of these only that they cannot be opened, not which they are.
	for _, path := range []string{c.Kernel, c.Initrd} {
		if _, err := os.Stat(path); path != "" && err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("VM %s: %w", c.ID, errors.Join(errs...))
	}
	return nil
}

// paths are all paths that must be absolute.
func (c *Config) paths() []string {
	paths := []string{c.Dir, c.Kernel}
	for _, p := range []string{c.Initrd, c.Console, c.Cgroup} {
		if p != "" {
			paths = append(paths, p)
		}
	}
	for _, d := range c.Disks {
		paths = append(paths, d.Path)
	}
	return paths
}

// kernelCommandLine adds what the driver alone knows: where the console is, and that a panicked
// guest restarts at once, to be seen as a reboot, rather than hang until some timeout. What the caller says stays.
func kernelCommandLine(c *Config, console string) string {
	has := func(key string) bool {
		return slices.ContainsFunc(strings.Fields(c.Cmdline), func(w string) bool { return strings.HasPrefix(w, key) })
	}
	line := c.Cmdline
	if c.Console != "" && !has("console=") {
		line += " console=" + console
	}
	if !has("panic=") {
		line += " panic=-1"
	}
	return strings.TrimSpace(line)
}
