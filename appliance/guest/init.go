package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// rootPatience is how long the root disk may take to appear after its driver was loaded.
const rootPatience = 10 * time.Second

// Init is /init of the initrd that Seal made: it loads the drivers, mounts the root disk and becomes the system's init. On
// errors it powers off: a machine that hangs here would look alive to its host.
func Init(args []string) {
	err := boot(args)
	if f, kerr := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); kerr == nil {
		fmt.Fprintf(f, "<2>fleetingd initrd: %v; powering off\n", err)
		f.Close()
	}
	fmt.Fprintf(os.Stderr, "fleetingd initrd: %v; powering off\n", err)
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func boot(args []string) error {
	for _, m := range []struct{ fstype, at string }{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := unix.Mount(m.fstype, m.at, m.fstype, unix.MS_NOSUID, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	data, err := os.ReadFile("/" + bootPlanName)
	if err != nil {
		return err
	}
	var p bootPlan
	if err := json.Unmarshal(data, &p); err != nil {
		return err
	}
	for _, m := range p.Modules {
		if err := loadModule(m); err != nil {
			return err
		}
	}
	// Load the drivers of this VM's devices now: udev would do so seconds later. They are not needed to boot.
	for _, id := range virtioDevices("/sys/bus/virtio/devices") {
		for _, m := range p.Devices[id] {
			if err := loadModule(m); err != nil {
				fmt.Fprintln(os.Stderr, "fleetingd initrd:", err)
			}
		}
	}
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	init, flags := bootArgs(string(line))
	dev := "/dev/" + p.Root
	for end := time.Now().Add(rootPatience); ; time.Sleep(time.Millisecond) {
		if _, err = os.Stat(dev); err == nil {
			break
		}
		if time.Now().After(end) {
			return fmt.Errorf("the root disk %s did not appear in %v", dev, rootPatience)
		}
	}
	// Writable at once: the image was sealed clean, so there is nothing to check first (systemd-fsck-root.service
	// sees that and does nothing), and systemd-remount-fs.service only adds fstab's options.
	if err := unix.Mount(dev, "/root", p.FSType, 0, flags); err != nil {
		return fmt.Errorf("mount the root disk %s (%s): %w", dev, p.FSType, err)
	}
	for _, m := range p.Mounts {
		// On an error systemd tries again and reports it.
		if err := os.MkdirAll(m.At, 0o755); err == nil {
			_ = unix.Mount(m.FSType, m.At, m.FSType, m.Flags, "")
		}
	}
	if err := switchRoot(); err != nil {
		return err
	}
	for _, path := range append(init, "/sbin/init", "/usr/lib/systemd/systemd", "/etc/init", "/bin/init") {
		if _, serr := os.Stat(path); serr == nil {
			err = syscall.Exec(path, append([]string{path}, args...), os.Environ())
			return fmt.Errorf("start %s: %w", path, err)
		}
	}
	return errors.New("the root disk has no /sbin/init")
}

// bootArgs extracts init= and rootflags= from the kernel's command line.
func bootArgs(line string) (init []string, flags string) {
	for _, w := range strings.Fields(line) {
		switch k, v, _ := strings.Cut(w, "="); k {
		case "init":
			init = []string{v}
		case "rootflags":
			flags = v
		}
	}
	return init, flags
}

func loadModule(path string) error {
	f, err := os.Open("/" + path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", path, err)
	}
	return nil
}

// virtioDevices returns the ids of the devices present, in decimal.
func virtioDevices(sys string) []string {
	found, _ := filepath.Glob(filepath.Join(sys, "*", "device")) // the pattern is valid
	var ids []string
	for _, p := range found {
		b, err := os.ReadFile(p)
		var n int
		if err == nil {
			_, err = fmt.Sscanf(strings.TrimSpace(string(b)), "0x%x", &n)
		}
		if err == nil {
			ids = append(ids, fmt.Sprint(n))
		}
	}
	return ids
}

// switchRoot makes /root the root and frees the initrd's memory. It works as switch_root(8) does, because
// pivot_root(2) is not possible from the first root file system (https://docs.kernel.org/filesystems/ramfs-rootfs-initramfs.html).
func switchRoot() error {
	for _, m := range []string{"/dev", "/proc", "/sys"} {
		if err := unix.Mount(m, "/root"+m, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", m, err)
		}
	}
	if err := errors.Join(os.RemoveAll("/modules"), os.Remove("/init"), os.Remove("/"+bootPlanName)); err != nil {
		return err
	}
	if err := os.Chdir("/root"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}
