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

// Open returns the driver that a plan asks for. It does not check the machine: Probe does.
func Open(h plan.Hypervisor, log *slog.Logger) (Driver, error) {
	switch h.Driver {
	case "cloud-hypervisor":
		return newCloudHypervisor(h, log), nil
	case "qemu":
		return newQEMU(h, log)
	default:
		return nil, fmt.Errorf("unknown hypervisor %q: it must be \"cloud-hypervisor\" or \"qemu\"", h.Driver)
	}
}

// versionOf returns the version in the output of a hypervisor's --version, as found by parse. Errors name the binary.
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

// check finds what no driver could start.
func (c *Config) check() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.ID == "" || len(c.ID) > 64 || strings.ContainsFunc(c.ID, func(r rune) bool { return r <= ' ' || r > '~' }) {
		bad("the id %q must be 1 to 64 printable ASCII characters", c.ID)
	}
	if len(c.Dir) > maxDir {
		bad("its folder %s is longer than %d bytes, which leaves no room for the names of its sockets", c.Dir, maxDir)
	}
	if c.CPUs < 1 {
		bad("it needs at least 1 CPU; got %d", c.CPUs)
	}
	if c.Memory < 1<<20 {
		bad("it needs at least 1 MiB of memory; got %d bytes", c.Memory)
	}
	for _, d := range c.Disks {
		if len(d.Serial) > 20 {
			bad("the disk serial %q is longer than 20 bytes", d.Serial)
		}
	}
	if n := c.Net; n != nil && (n.Queues < 1 || n.Queues > c.CPUs) {
		bad("its TAP %s has %d queue pairs; 1 to %d (one per CPU) can be used", n.TAP, n.Queues, c.CPUs)
	}
	for _, path := range c.paths() {
		if !filepath.IsAbs(path) {
			bad("the path %q is not absolute", path)
		}
	}
	// Cloud Hypervisor's own error does not tell which of them cannot be opened.
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

// paths returns all paths that must be absolute.
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

// kernelCommandLine adds what only the driver knows: the console, and panic=-1, which turns a panic of the guest into a visible reboot
// instead of a hang until some timeout. Options of the caller take precedence.
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
