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

// cgroups makes one cgroup v2 a VMM, below the subtree that systemd has delegated to this process. A nil one, or one on
// a host that has delegated none, makes none.
type cgroups struct {
	log  *slog.Logger
	root func() string // asked once; "" for none
	warn sync.Once     // what of the limits could not be set
}

// controllers are what the limits need.
var controllers = []string{"cpu", "memory", "io", "pids"}

const cgroupMount = "/sys/fs/cgroup"

// vmmMemory is what a VMM may use beside its guest's memory, for its own code and queues.
const vmmMemory = 256 << 20

// vmmThreads bounds a VMM's threads: some for each vCPU and queue. QEMU takes up to 64 for disks.
const vmmThreads = 512

func newCgroups(log *slog.Logger) *cgroups {
	c := &cgroups{log: log}
	c.root = sync.OnceValue(func() string {
		root, err := delegated(cgroupMount)
		if err != nil {
			log.Warn("VMs run without a cgroup each: limits of CPU and memory are not enforced by the kernel", "reason", err)
			return ""
		}
		return root
	})
	return c
}

// delegated finds the cgroup that was delegated to this process, and turns its controllers on. systemd marks it with an
// attribute (Delegate= in systemd.resource-control(5)); a cgroup that merely can be written, as all can by root, is not ours.
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
			return "", fmt.Errorf("this process runs in the delegated cgroup %s itself, and the kernel gives limits to children of "+
				"empty ones only; set DelegateSubgroup= in the unit (systemd 254 and newer)", dir)
		}
		return dir, enable(dir)
	}
	return "", fmt.Errorf("no cgroup above %s is delegated to this process; the unit that starts it needs "+
		"Delegate=cpu memory io pids and DelegateSubgroup=", own)
}

// parseCgroup finds the cgroup v2 line, "0::/path", of /proc/self/cgroup.
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

// enable turns the controllers on for the children of dir.
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

// make makes the cgroup of a VM with its limits, and returns "" where there is nothing to make it in.
// more is memory that this VMM needs above vmmMemory, in bytes.
func (c *cgroups) make(cfg Config, more int64) (string, error) {
	if c == nil {
		return "", nil
	}
	root := c.root()
	if root == "" {
		return "", nil
	}
	dir := filepath.Join(root, "vm-"+strings.ReplaceAll(cfg.ID, "/", "_"))
	// An empty one of that name is what a plugin left that was killed between making it and starting the VMM.
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
		// The VMM's own limiter holds: this is the second line.
		c.warn.Do(func() { c.log.Warn("disk_iops is enforced by the VMM alone", "reason", err) })
	}
	return dir, nil
}

func limit(dir string, cfg Config, more int64) error {
	// Half of a percent of the guest's memory is for the page tables that map it.
	errs := []error{
		setCgroup(dir, "memory.max", strconv.FormatInt(cfg.Memory+cfg.Memory/200+vmmMemory+more, 10)),
		// The kernel ends the VMM as a whole, or not at all.
		setCgroup(dir, "memory.oom.group", "1"),
		setCgroup(dir, "pids.max", strconv.Itoa(vmmThreads)),
	}
	if percent := cfg.Limits.CPUQuotaPercent; percent > 0 {
		const period = 100_000 // µs, the kernel's default
		errs = append(errs, setCgroup(dir, "cpu.max", fmt.Sprintf("%d %d", percent*period/100, period)))
	}
	return errors.Join(errs...)
}

// limitIO sets io.max on the device that holds the first disk.
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

// blockDevice is "major:minor" of the whole disk below a file, and "" where there is none (tmpfs).
func blockDevice(path string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	if unix.Major(st.Dev) == 0 { // tmpfs, btrfs, overlayfs: no device of its own
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
	// io.max takes whole disks only.
	whole, err := os.ReadFile(filepath.Join(filepath.Dir(dir), "dev"))
	return strings.TrimSpace(string(whole)), err
}

func setCgroup(dir, name, value string) error {
	if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0); err != nil {
		return fmt.Errorf("write %q: %w", value, err)
	}
	return nil
}

// removeCgroup removes a cgroup that no process is in any more. The kernel takes a
// moment to see that: EBUSY is asked again for a second.
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

// oomKilled reports whether the kernel ended something in the cgroup for want of memory.
func oomKilled(path string) bool {
	if path == "" {
		return false
	}
	data, err := os.ReadFile(filepath.Join(path, "memory.events"))
	if err != nil {
		return false // no memory controller there
	}
	for line := range strings.Lines(string(data)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strings.TrimSpace(n) != "0"
		}
	}
	return false
}
