// Package vmtest makes the small real guest that tests of the drivers boot:
// Debian's cloud kernel and an initrd with the virtio modules and one static Go
// program. It boots in seconds under emulation. Only tests import it.
package vmtest

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/need"
)

// modules are those that the guest loads, without their dependencies.
var modules = []string{
	"virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_balloon",
	"vmw_vsock_virtio_transport", "button", "evdev",
}

// Guest returns the paths of a kernel and an initrd. They are those of
// FLEETINGD_VMTEST_KERNEL and FLEETINGD_VMTEST_INITRD if both are set (for a
// compiled test on a host without packages), and otherwise are made from Debian's
// packages once and kept in need.Cache.
func Guest(t testing.TB) (kernel, initrd string) {
	t.Helper()
	kernel, initrd = os.Getenv("FLEETINGD_VMTEST_KERNEL"), os.Getenv("FLEETINGD_VMTEST_INITRD")
	if kernel != "" && initrd != "" {
		return kernel, initrd
	}
	need.Tools(t, "apt-get", "apt-cache", "dpkg-deb", "go")
	kernel, tree := debianKernel(t)
	init := filepath.Join(t.TempDir(), "init")
	_, here, _, _ := runtime.Caller(0)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", init, "./init")
	cmd.Dir = filepath.Dir(here)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	output(t, cmd)

	image := initramfs(t, init, tree)
	sum := sha256.Sum256(image)
	initrd = filepath.Join(need.Cache(t), "vmtest", "initrd-"+hex.EncodeToString(sum[:8]))
	if _, err := os.Stat(initrd); err != nil {
		writeOnce(t, initrd, image)
	}
	return kernel, initrd
}

// debianKernel downloads and unpacks the cloud kernel that apt would install.
func debianKernel(t testing.TB) (kernel, tree string) {
	t.Helper()
	meta := "linux-image-cloud-" + runtime.GOARCH
	for line := range strings.Lines(output(t, exec.Command("apt-cache", "depends", meta))) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "Depends:" {
			meta = f[1]
			break
		}
	}
	version := strings.TrimPrefix(meta, "linux-image-")
	tree = filepath.Join(need.Cache(t), "vmtest", version)
	kernel = filepath.Join(tree, "boot", "vmlinuz-"+version)
	if _, err := os.Stat(kernel); err == nil {
		return kernel, tree
	}
	if err := os.MkdirAll(filepath.Dir(tree), 0o755); err != nil {
		t.Fatal(err)
	}
	// In the same folder, so that it can be renamed.
	tmp, err := os.MkdirTemp(filepath.Dir(tree), "new-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(tmp)
	download := exec.Command("apt-get", "download", "-q", meta)
	download.Dir = tmp
	output(t, download)
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if len(debs) != 1 {
		t.Fatalf("apt-get download %s left %d packages", meta, len(debs))
	}
	output(t, exec.Command("dpkg-deb", "-x", debs[0], filepath.Join(tmp, "x")))
	if err := os.Rename(filepath.Join(tmp, "x"), tree); err != nil {
		if _, there := os.Stat(kernel); there != nil { // otherwise another test was first
			t.Fatal(err)
		}
	}
	return kernel, tree
}

// initramfs returns an uncompressed cpio archive: /init, and /modules/NN-name.ko in load order.
func initramfs(t testing.TB, init, tree string) []byte {
	t.Helper()
	files := map[string]string{}
	filepath.WalkDir(filepath.Join(tree, "lib", "modules"), func(path string, d os.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok && err == nil && !d.IsDir() {
			files[strings.ReplaceAll(name, "-", "_")] = path
		}
		return nil
	})
	var out cpio
	for _, dir := range []string{"modules", "dev", "proc", "sys"} {
		out.add(dir, 0o40755, nil)
	}
	// Go's runtime needs standard streams to start. The kernel only opens them for init if it has a console by
	// then, or this device.
	out.device("dev/null", 1, 3)
	var loaded []string
	var load func(name string)
	load = func(name string) {
		if slices.Contains(loaded, name) {
			return
		}
		path, ok := files[name]
		if !ok {
			return // built into the kernel
		}
		data := module(t, path)
		for _, dep := range depends(t, path, data) {
			load(dep)
		}
		out.add(fmt.Sprintf("modules/%02d-%s.ko", len(loaded), name), 0o100644, data)
		loaded = append(loaded, name)
	}
	for _, name := range modules {
		load(name)
	}
	data, err := os.ReadFile(init)
	if err != nil {
		t.Fatal(err)
	}
	out.add("init", 0o100755, data)
	out.add("TRAILER!!!", 0, nil)
	return out.Bytes()
}

// module reads a module, which newer kernels ship compressed.
func module(t testing.TB, path string) []byte {
	t.Helper()
	if strings.HasSuffix(path, ".xz") {
		return []byte(output(t, exec.Command("xz", "-dc", path)))
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// depends returns the module's dependencies, in the sense of modinfo.
func depends(t testing.TB, path string, data []byte) []string {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	info := f.Section(".modinfo")
	if info == nil {
		t.Fatalf("%s has no .modinfo", path)
	}
	fields, err := info.Data()
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	for field := range strings.SplitSeq(string(fields), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ",")
		}
	}
	return nil
}

// cpio is an archive in the kernel's "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst).
type cpio struct {
	bytes.Buffer
	inode int
}

func (c *cpio) add(name string, mode int, data []byte) { c.entry(name, mode, 0, 0, data) }

func (c *cpio) device(name string, major, minor int) { c.entry(name, 0o20600, major, minor, nil) }

func (c *cpio) entry(name string, mode, major, minor int, data []byte) {
	c.inode++
	fmt.Fprintf(c, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", c.inode, mode, 0, 0, 1, 0, len(data),
		0, 0, major, minor, len(name)+1, 0)
	c.WriteString(name + "\x00")
	c.pad()
	c.Write(data)
	c.pad()
}

func (c *cpio) pad() { c.Write(make([]byte, -c.Len()&3)) }

func writeOnce(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path+".new", data, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func output(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, &stderr)
	}
	return string(out)
}
