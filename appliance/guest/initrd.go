package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// bootPlan tells the initrd's init what to do. It is made when the image is sealed. Its modules are paths in the initrd.
type bootPlan struct {
	Root    string              `json:"root"` // block device, as in /dev
	FSType  string              `json:"fstype"`
	Modules []string            `json:"modules"`           // to find the devices and mount the root
	Devices map[string][]string `json:"devices,omitempty"` // by virtio device id: loaded where there is such a device
	Mounts  []bootMount         `json:"mounts,omitempty"`
	Binary  string              `json:"-"`
}

// bootMount is one of the kernel's own file systems, which systemd would mount.
type bootMount struct {
	Unit   string  `json:"-"`
	FSType string  `json:"fstype"`
	At     string  `json:"at"`
	Flags  uintptr `json:"flags"` // mount(2)
}

// apiMounts are mounted by the initrd, with one system call each. systemd would start a program for each, but finds them mounted.
// The options are those of its units.
var apiMounts = []bootMount{
	{"dev-hugepages.mount", "hugetlbfs", "/dev/hugepages", unix.MS_NOSUID | unix.MS_NODEV},
	{"dev-mqueue.mount", "mqueue", "/dev/mqueue", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	{"sys-kernel-debug.mount", "debugfs", "/sys/kernel/debug", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	{"sys-kernel-tracing.mount", "tracefs", "/sys/kernel/tracing", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
}

// wantedMounts returns the apiMounts that this system mounts by its distribution's default, unless its owner changed that.
func (s *sealer) wantedMounts() []bootMount {
	var wanted []bootMount
	for _, m := range apiMounts {
		_, stock := os.Lstat(s.path("usr/lib/systemd/system/sysinit.target.wants/" + m.Unit))
		_, own := os.Lstat(s.path("etc/systemd/system/" + m.Unit))
		_, dropIn := os.Lstat(s.path("etc/systemd/system/" + m.Unit + ".d"))
		if stock == nil && own != nil && dropIn != nil {
			wanted = append(wanted, m)
		}
	}
	return wanted
}

const bootPlanName = "boot.json"

// virtioDrivers are the drivers of a worker's devices by their number in the virtio specification (virtio 1.2, 5).
var virtioDrivers = map[string]string{
	"1": "virtio_net", "2": "virtio_blk", "3": "virtio_console", "4": "virtio_rng", "19": "vmw_vsock_virtio_transport",
}

// initrd makes an initrd with the virtio drivers, the driver of the root file system and this program as /init (Init), and nothing
// else: no udev, no shell, no search for disks. It only fits this image's root disk. Its files are not compressed: clones of the
// image share them in the host's page cache, and unpacking would take longer than copying.
func (s *sealer) initrd(ctx context.Context, k kernel) ([]byte, error) {
	dev, fstype, err := rootDevice(s.root)
	if err != nil {
		return nil, err
	}
	m, err := readModules(filepath.Join(s.root, "lib/modules", k.version))
	if err != nil {
		return nil, err
	}
	p := bootPlan{Root: dev, FSType: fstype, Devices: map[string][]string{}, Mounts: s.wantedMounts()}
	for _, name := range []string{"virtio_pci", "virtio_blk", fstype} {
		files, err := m.closure(name, p.Modules)
		if err != nil {
			return nil, err
		}
		p.Modules = append(p.Modules, files...)
	}
	for id, name := range virtioDrivers {
		// If the kernel lacks one, either there is no such device or udev finds the driver later.
		if files, err := m.closure(name, p.Modules); err == nil && len(files) > 0 {
			p.Devices[id] = files
		}
	}
	p.Binary, err = os.Executable()
	if err != nil {
		return nil, err
	}
	return p.pack(ctx, m)
}

// pack writes the initrd: a cpio archive in the format "newc"
// (https://docs.kernel.org/driver-api/early-userspace/buffer-format.html).
func (p bootPlan) pack(ctx context.Context, m *modules) ([]byte, error) {
	var c cpio
	for _, d := range []string{"dev", "proc", "sys", "root", "modules"} {
		c.add(d, syscall.S_IFDIR|0o755, nil)
	}
	// The kernel opens it as init's standard streams, so early errors are visible.
	c.device("dev/console", 5, 1)
	// If the console's driver is not loaded yet (hvc0), init has no standard streams, and Go's runtime
	// exits if it finds neither those nor /dev/null.
	c.device("dev/null", 1, 3)
	place := map[string]string{}
	files := slices.Clone(p.Modules)
	for _, d := range p.Devices {
		files = append(files, d...)
	}
	slices.Sort(files)
	for _, f := range slices.Compact(files) {
		data, err := m.read(ctx, f)
		if err != nil {
			return nil, fmt.Errorf("read the kernel module %s: %w", f, err)
		}
		place[f] = "modules/" + moduleName(f) + ".ko"
		c.add(place[f], syscall.S_IFREG|0o644, data)
	}
	rename := func(list []string) []string {
		out := make([]string, len(list))
		for i, f := range list {
			out[i] = place[f]
		}
		return out
	}
	p.Modules = rename(p.Modules)
	devices := map[string][]string{}
	for id, list := range p.Devices {
		devices[id] = rename(list)
	}
	p.Devices = devices
	data, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	c.add(bootPlanName, syscall.S_IFREG|0o644, data)
	bin, err := os.ReadFile(p.Binary)
	if err != nil {
		return nil, err
	}
	c.add("init", syscall.S_IFREG|0o755, bin)
	return c.bytes(), nil
}

// cpio is an archive being written.
type cpio struct {
	buf   bytes.Buffer
	inode int
}

func (c *cpio) add(name string, mode uint32, data []byte) { c.entry(name, mode, 0, 0, data) }

func (c *cpio) device(name string, major, minor uint32) {
	c.entry(name, syscall.S_IFCHR|0o600, major, minor, nil)
}

func (c *cpio) entry(name string, mode, rmajor, rminor uint32, data []byte) {
	c.inode++
	fmt.Fprintf(&c.buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", c.inode, mode, 0, 0, 1, 0,
		len(data), 0, 0, rmajor, rminor, len(name)+1, 0)
	c.buf.WriteString(name)
	c.buf.WriteByte(0)
	c.align()
	c.buf.Write(data)
	c.align()
}

func (c *cpio) align() { c.buf.Write(make([]byte, -c.buf.Len()&3)) }

func (c *cpio) bytes() []byte {
	c.entry("TRAILER!!!", 0, 0, 0, nil)
	return c.buf.Bytes()
}

// rootDevice returns the block device that / is mounted from ("vda1") and its file system. It must be a disk or partition, not a mapping:
// the first disk of a clone has the same name.
func rootDevice(root string) (dev, fstype string, err error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", "", err
	}
	number, fstype := "", ""
	for l := range strings.Lines(string(data)) {
		// proc_pid_mountinfo(5): id, parent, major:minor, root, mount point, options, fields -, file system, …
		w := strings.Fields(l)
		if i := slices.Index(w, "-"); len(w) > 5 && i > 0 && len(w) > i+1 && w[4] == root {
			number, fstype = w[2], w[i+1]
		}
	}
	link, err := os.Readlink(filepath.Join("/sys/dev/block", number))
	if number == "" || err != nil {
		return "", "", fmt.Errorf("the root file system (%s) is not on a block device: %w", fstype, errors.Join(err))
	}
	if dev = filepath.Base(link); !strings.HasPrefix(dev, "vd") {
		return "", "", fmt.Errorf("the root file system is on %s, which is not a virtio disk", dev)
	}
	return dev, fstype, nil
}
