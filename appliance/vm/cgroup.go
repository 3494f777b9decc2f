package vm

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups creates one cgroup v2 per VMM, below the subtree that systemd has delegated to this process. A nil *cgroups, or
// one on a host without delegation, creates none.
type cgroups struct {
	log  *slog.Logger
	root func() string // computed once; "" without delegation
	warn sync.Once     // for limits that could not be set
}

// controllers are those that the limits need.
var controllers = []string{"cpu", "memory", "io", "pids"}

const cgroupMount = "/sys/fs/cgroup"

// vmmMemory is what a VMM may use besides its guest's memory, in bytes, for its own code and queues.
const vmmMemory = 256 << 20

// vmmThreads limits a VMM's threads: some per vCPU and queue. QEMU uses up to 64 for disks.
const vmmThreads = 512

func newCgroups(log *slog.Logger) *cgroups {
	c := &cgroups{log: log}
	c.root = sync.OnceValue(func() string {
		root, err := delegated(cgroupMount)
		if err != nil {
			log.Warn("VMs run without cgroups: the kernel does not enforce limits on CPU and memory", "reason", err)
			return ""
		}
		return root
	})
	return c
}

// delegated returns the cgroup that was delegated to this process, after enabling its controllers for its children. systemd marks it with
// an attribute (Delegate= in systemd.resource-control(5)). Write access does not prove delegation: root can write to any cgroup.
func delegated(mount string) (string, error) {
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	path, err := parseCgroup(string(data))
	if err != nil {
		return "", err
	}
	own := filepath.Join(mount, path)
	for dir := own; strings.HasPrefix(dir, mount+"/"); dir = filepath.Dir(dir) {
		if !marked(dir) {
			continue
		}
		if dir == own {
			return "", fmt.Errorf("this process runs in the delegated cgroup %s itself, but the kernel can only limit children of "+
				"cgroups without processes; set DelegateSubgroup= in the unit (systemd 254 and newer)", dir)
		}
		return dir, enable(dir)
	}
	return "", fmt.Errorf("no cgroup above %s is delegated to this process; the unit that starts it needs "+
		"Delegate=cpu memory io pids and DelegateSubgroup=", own)
}

// parseCgroup returns the path in the cgroup v2 line, "0::/path", of /proc/self/cgroup.
func parseCgroup(data string) (string, error) {
	for line := range strings.Lines(data) {
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok && strings.HasPrefix(path, "/") {
			return path, nil
		}
	}
	return "", errors.New("this system has no cgroup v2")
}

// marked reports whether systemd has delegated the cgroup: user.delegate for an unprivileged user, trusted.delegate for root.
func marked(dir string) bool {
	for _, name := range []string{"user.delegate", "trusted.delegate"} {
		value := make([]byte, 8)
		if n, err := unix.Getxattr(dir, name, value); err == nil && string(value[:n]) == "1" {
			return true
		}
	}
	return false
}

// enable enables the controllers for the children of dir.
func enable(dir string) error {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, name := range controllers {
		if !slices.Contains(strings.Fields(string(have)), name) {
			return fmt.Errorf("the controller %s was not delegated to %s; the unit needs Delegate=%s", name, dir,
				strings.Join(controllers, " "))
		}
	}
	return setCgroup(dir, "cgroup.subtree_control", "+"+strings.Join(controllers, " +"))
}

// make creates a VM's cgroup with its limits, and returns its path, or "" without delegation.
// more is memory in bytes that this VMM needs in addition to vmmMemory.
func (c *cgroups) make(cfg Config, more int64) (string, error) {
	if c == nil {
		return "", nil
	}
	root := c.root()
	if root == "" {
		return "", nil
	}
	dir := filepath.Join(root, "vm-"+strings.ReplaceAll(cfg.ID, "/", "_"))
	// An empty cgroup of that name was left by a plugin that was killed before it started the VMM.
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return "", fmt.Errorf("cgroup of VM %s: %s is in use: %w", cfg.ID, dir, err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", fmt.Errorf("cgroup of VM %s: %w", cfg.ID, err)
	}
	if err := limit(dir, cfg, more); err != nil {
		return "", errors.Join(fmt.Errorf("cgroup of VM %s: %w", cfg.ID, err), removeCgroup(dir))
	}
	if err := limitIO(dir, cfg); err != nil {
		// The VMM enforces this limit as well.
		c.warn.Do(func() { c.log.Warn("disk_iops is only enforced by the VMM", "reason", err) })
	}
	return dir, nil
}

func limit(dir string, cfg Config, more int64) error {
	// Half a percent of the guest's memory is for the page tables that map it.
	errs := []error{
		setCgroup(dir, "memory.max", strconv.FormatInt(cfg.Memory+cfg.Memory/200+vmmMemory+more, 10)),
		// The kernel kills all of the VMM or nothing of it.
		setCgroup(dir, "memory.oom.group", "1"),
		setCgroup(dir, "pids.max", strconv.Itoa(vmmThreads)),
	}
	if percent := cfg.Limits.CPUQuotaPercent; percent > 0 {
		const period = 100_000 // µs, the kernel's default
		errs = append(errs, setCgroup(dir, "cpu.max", fmt.Sprintf("%d %d", percent*period/100, period)))
	}
	return errors.Join(errs...)
}

// limitIO sets io.max for the device that holds the first disk.
func limitIO(dir string, cfg Config) error {
	if cfg.Limits.DiskIOPS == 0 || len(cfg.Disks) == 0 {
		return nil
	}
	device, err := blockDevice(cfg.Disks[0].Path)
	if err != nil || device == "" {
		return err
	}
	return setCgroup(dir, "io.max", fmt.Sprintf("%s riops=%d wiops=%d", device, cfg.Limits.DiskIOPS, cfg.Limits.DiskIOPS))
}

// blockDevice returns "major:minor" of the whole disk that holds a file, or "" if there is none (tmpfs).
func blockDevice(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	if unix.Major(st.Dev) == 0 { // tmpfs, btrfs, overlayfs: not on a device of its own
		return "", nil
	}
	name := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	dir, err := filepath.EvalSymlinks("/sys/dev/block/" + name)
	if err != nil {
		return "", fmt.Errorf("the device of %s: %w", path, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "partition")); err != nil {
		return name, nil
	}
	// io.max only accepts whole disks.
	whole, err := os.ReadFile(filepath.Join(filepath.Dir(dir), "dev"))
	return strings.TrimSpace(string(whole)), err
}

func setCgroup(dir, name, value string) error {
	if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0); err != nil {
		return fmt.Errorf("write %q: %w", value, err)
	}
	return nil
}

// removeCgroup removes a cgroup without processes. The kernel may need a
// moment to notice that it is empty, so EBUSY is retried for a second.
func removeCgroup(path string) error {
	if path == "" {
		return nil
	}
	var err error
	for range 100 {
		err = unix.Rmdir(path)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("remove cgroup %s: %w", path, err)
}

// oomKilled reports whether the kernel killed a process in the cgroup because memory ran out.
func oomKilled(path string) bool {
	if path == "" {
		return false
	}
	data, err := os.ReadFile(filepath.Join(path, "memory.events"))
	if err != nil {
		return false // no memory controller
	}
	for line := range strings.Lines(string(data)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strings.TrimSpace(n) != "0"
		}
	}
	return false
}
