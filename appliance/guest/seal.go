package guest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// unitName is the guest part's systemd unit in a sealed image.
const unitName = "fleetingd-guest.service"

//go:embed fleetingd-guest.service
var unitText []byte

// sealer turns this machine into an image: it adds what clones need and removes what must not exist twice.
type sealer struct {
	root  string
	log   *slog.Logger
	stock map[string]bool // the units that the image enabled before the first step
}

// seal leaves the machine ready to be powered off and cloned. say reports what may interest a person.
func (s *sealer) seal(ctx context.Context, say func(string)) (Export, error) {
	if err := s.install(); err != nil {
		return Export{}, fmt.Errorf("install the guest part: %w", err)
	}
	if err := s.shortenBoot(); err != nil {
		return Export{}, fmt.Errorf("shorten later boots: %w", err)
	}
	export, err := s.export(ctx, say)
	if err != nil {
		return Export{}, err
	}
	if err := s.stopWriters(); err != nil {
		say(err.Error()) // at worst, the image has a superfluous file
	}
	if err := s.clean(); err != nil {
		return Export{}, fmt.Errorf("remove the machine's identity: %w", err)
	}
	// The disk is raw and sparse: this returns what the prebuild freed (packages, caches) to the host. Not every disk supports it.
	if err := run("fstrim", "/"); err != nil {
		say(err.Error())
	}
	if err := run("sync"); err != nil {
		return Export{}, err
	}
	return export, nil
}

func (s *sealer) path(p string) string { return filepath.Join(s.root, p) }

// install adds the unit and enables it. The program itself is already there: it is running.
func (s *sealer) install() error {
	unit := s.path("etc/systemd/system/" + unitName)
	if err := os.MkdirAll(filepath.Dir(unit), 0o755); err != nil {
		return err
	}
	if err := writeFile(unit, unitText, 0o644); err != nil {
		return err
	}
	return s.link("/etc/systemd/system/"+unitName, "etc/systemd/system/sysinit.target.wants/"+unitName)
}

// link makes a symbolic link, in place of whatever was there.
func (s *sealer) link(to, at string) error {
	p := s.path(at)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		return err
	}
	if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Symlink(to, p)
}

// stopWriters stops services that would write identity back at power-off: systemd's random seed, the journal.
func (s *sealer) stopWriters() error {
	if s.root != "/" {
		return nil
	}
	err := run("systemctl", "stop", "systemd-random-seed.service")
	if onPath("journalctl") {
		err = errors.Join(err, run("journalctl", "--relinquish-var"))
	}
	return err
}

// identityFiles must not exist in two machines. Logs and histories of the prebuild are of no interest afterwards.
var identityFiles = []string{
	"etc/ssh/ssh_host_*",
	"etc/machine-id.*", "var/lib/dbus/machine-id",
	"var/lib/systemd/random-seed", "var/lib/systemd/credential.secret", "var/lib/systemd/timesync/clock",
	"etc/iscsi/initiatorname.iscsi", "etc/nvme/host*",
	"etc/sudoers.d/90-fleetingd",

	// cloud-init's record of this instance, so that it recognizes a clone as a new one, and this instance's network
	// configuration, which would conflict with a worker's.
	"var/lib/cloud/*",
	"etc/netplan/50-cloud-init.yaml", "etc/network/interfaces.d/50-cloud-init*",
	"etc/systemd/network/10-cloud-init-*", "etc/NetworkManager/system-connections/cloud-init-*",
	"etc/udev/rules.d/70-persistent-net.rules",
	"var/lib/dhcp/*", "var/lib/dhcpcd/*", "var/lib/NetworkManager/*lease*", "var/lib/systemd/network/*",

	"var/log/journal/*", "var/log/cloud-init*", "root/.bash_history", "home/*/.bash_history",
	// Packages already installed. The lists stay, so that a job's `apt-get install` works without an update; clones share them.
	"var/cache/apt/archives/*.deb", "var/cache/apt/archives/partial/*", "var/cache/dnf/*", "var/cache/apk/*",
}

// clean removes identityFiles and empties the logs.
func (s *sealer) clean() error {
	var errs []error
	for _, pattern := range identityFiles {
		found, err := filepath.Glob(s.path(pattern))
		errs = append(errs, err)
		for _, p := range found {
			errs = append(errs, os.RemoveAll(p))
		}
	}
	errs = append(errs, s.emptyLogs())
	// Empty, not missing: systemd then creates a new id at each clone's first boot, but does not treat that as the system's first
	// boot, which would start its set-up services.
	id := s.path("etc/machine-id")
	errs = append(errs, writeFile(id, nil, 0o444))
	if _, err := os.Lstat(s.path("var/lib/dbus")); err == nil {
		errs = append(errs, s.link("/etc/machine-id", "var/lib/dbus/machine-id"))
	}
	return errors.Join(errs...)
}

// emptyLogs empties the files below /var/log but keeps them: some daemons do not create their own.
func (s *sealer) emptyLogs() error {
	dir := s.path("var/log")
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		return os.Truncate(p, 0)
	})
}

// kernel is the kernel that clones boot.
type kernel struct {
	version string // as uname -r prints it
	image   string // absolute paths on this machine
	initrd  string // the distribution's, may be ""
}

// findKernel finds the kernel that the distribution would boot next: a prebuild may have installed a newer one.
func findKernel(root string) (kernel, error) {
	for _, l := range []string{"vmlinuz", "boot/vmlinuz"} { // Debian's and Ubuntu's links to the current one
		to, err := os.Readlink(filepath.Join(root, l))
		if err != nil {
			continue
		}
		if k, err := kernelOf(root, filepath.Base(to)); err == nil {
			return k, nil
		}
	}
	found, err := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if err != nil {
		return kernel{}, err
	}
	var best kernel
	for _, p := range found {
		if k, err := kernelOf(root, filepath.Base(p)); err == nil && natural(best.version, k.version) < 0 {
			best = k
		}
	}
	if best.version == "" {
		return kernel{}, errors.New("the image has no kernel with modules in /boot")
	}
	return best, nil
}

func kernelOf(root, base string) (kernel, error) {
	k := kernel{version: strings.TrimPrefix(base, "vmlinuz-"), image: filepath.Join(root, "boot", base)}
	if _, err := os.Stat(k.image); err != nil || k.version == base {
		return kernel{}, fmt.Errorf("%s is not a kernel: %w", base, errors.Join(err))
	}
	if _, err := os.Stat(filepath.Join(root, "lib/modules", k.version, "modules.dep")); err != nil {
		return kernel{}, err
	}
	for _, name := range []string{"initrd.img-" + k.version, "initramfs-" + k.version + ".img", "initrd-" + k.version} {
		if _, err := os.Stat(filepath.Join(root, "boot", name)); err == nil {
			k.initrd = filepath.Join(root, "boot", name)
			break
		}
	}
	return k, nil
}

// natural compares versions: numbers by value, everything else bytewise.
func natural(a, b string) int {
	for a != "" && b != "" {
		na, nb := digits(a), digits(b)
		x, y := a[:max(na, 1)], b[:max(nb, 1)]
		if na > 0 && nb > 0 {
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if len(x) != len(y) {
				return len(x) - len(y)
			}
		}
		if c := strings.Compare(x, y); c != 0 {
			return c
		}
		a, b = a[max(na, 1):], b[max(nb, 1):]
	}
	return len(a) - len(b)
}

func digits(s string) int { return len(s) - len(strings.TrimLeft(s, "0123456789")) }

// export writes the kernel and an initrd to the disk that the host attached for it. Workers boot them directly, without a
// bootloader or a search for the root disk.
func (s *sealer) export(ctx context.Context, say func(string)) (Export, error) {
	k, err := findKernel(s.root)
	if err != nil {
		return Export{Reason: err.Error()}, nil
	}
	disk, err := findDisk("/sys/block", ExportSerial)
	if err != nil {
		return Export{Reason: err.Error()}, nil
	}
	initrd, err := s.initrd(ctx, k)
	if err != nil {
		if k.initrd == "" {
			return Export{Reason: "no initrd: " + err.Error()}, nil
		}
		say("the image keeps its own initrd, so later boots take longer: " + err.Error())
		if initrd, err = os.ReadFile(k.initrd); err != nil {
			return Export{}, err
		}
	}
	image, err := readKernel(k.image)
	if err != nil {
		return Export{}, err
	}
	out, err := os.OpenFile(filepath.Join("/dev", disk), os.O_WRONLY, 0)
	if err != nil {
		return Export{}, err
	}
	n, err := writeExport(out, image, initrd)
	if err := errors.Join(err, out.Sync(), out.Close()); err != nil {
		return Export{}, fmt.Errorf("write the kernel and initrd to %s: %w", disk, err)
	}
	return Export{Bytes: n, Kernel: k.version}, nil
}

// readKernel reads a kernel image. On arm64 and riscv64 distributions compress it, which no VMM supports.
func readKernel(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil || !bytes.HasPrefix(data, []byte{0x1f, 0x8b}) {
		return data, err
	}
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.LimitReader(z, maxExportFile))
}

// writeExport writes what ReadExport reads and returns its length.
func writeExport(w io.Writer, kernel, initrd []byte) (int64, error) {
	c := &counter{w: w}
	tw := tar.NewWriter(c)
	for _, f := range []struct {
		name string
		data []byte
	}{{ExportKernel, kernel}, {ExportInitrd, initrd}} {
		if err := tw.WriteHeader(&tar.Header{Name: f.name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(f.data))}); err != nil {
			return 0, err
		}
		if _, err := tw.Write(f.data); err != nil {
			return 0, err
		}
	}
	return c.n, errors.Join(tw.Close(), c.pad())
}

// counter counts bytes and pads to whole sectors: a disk takes nothing smaller.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func (c *counter) pad() error {
	_, err := c.w.Write(make([]byte, -c.n&4095))
	return err
}

// findDisk finds a virtio disk by its serial number.
func findDisk(sys, serial string) (string, error) {
	found, err := filepath.Glob(filepath.Join(sys, "*", "serial"))
	if err != nil {
		return "", err
	}
	for _, p := range found {
		if b, err := os.ReadFile(p); err == nil && strings.TrimSpace(string(b)) == serial {
			return filepath.Base(filepath.Dir(p)), nil
		}
	}
	return "", fmt.Errorf("the host attached no disk with the serial number %q to write the kernel to", serial)
}

// capture runs a program and returns its standard output.
func capture(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, nil
}
