package guest

import (
	"bytes"
	_ "embed"
	"errors"
	"os"
	"path/filepath"
	"strings"
)

// notForWorkers are units that distributions enable for long-lived machines or for hardware, and what each is
// for. They are disabled, not masked or removed, so a job can start them. Only units that the base
// image enabled are disabled; those that a prebuild step enables stay enabled.
var notForWorkers = map[string]string{
	// A worker has its address before any of these starts, and no other link comes up afterwards.
	"systemd-networkd-wait-online.service": "waits for links that networkd does not manage, two minutes long",
	"NetworkManager-wait-online.service":   "the same for NetworkManager",
	"ifupdown-wait-online.service":         "the same for ifupdown",

	// Scheduled housekeeping for machines that still exist next week. It takes CPU, disk and the package lock from the job.
	"apt-daily.timer":                        "updates package lists, and holds apt's lock while a job wants it",
	"apt-daily-upgrade.timer":                "upgrades packages under the job",
	"unattended-upgrades.service":            "waits for shutdown to upgrade packages",
	"dnf-makecache.timer":                    "updates dnf's package lists",
	"man-db.timer":                           "indexes manual pages",
	"dpkg-db-backup.timer":                   "copies dpkg's database",
	"e2scrub_all.timer":                      "checks LVM snapshots of ext4",
	"e2scrub_reap.service":                   "removes what e2scrub left",
	"fstrim.timer":                           "trims weekly",
	"logrotate.timer":                        "rotates logs daily",
	"motd-news.timer":                        "fetches advertisements for /etc/motd",
	"update-notifier-download.timer":         "desktop",
	"update-notifier-motd.timer":             "counts updates for /etc/motd",
	"apport-autoreport.timer":                "sends crash reports",
	"apport-autoreport.path":                 "sends crash reports",
	"apport.service":                         "collects crash reports",
	"ua-timer.timer":                         "Ubuntu Pro",
	"ua-reboot-cmds.service":                 "Ubuntu Pro",
	"ubuntu-advantage.service":               "Ubuntu Pro",
	"esm-cache.service":                      "Ubuntu Pro",
	"sysstat.service":                        "accounts activity",
	"sysstat-collect.timer":                  "accounts activity",
	"sysstat-summary.timer":                  "accounts activity",
	"snapd.service":                          "seeds snaps at boot; its socket stays, so `snap` starts it",
	"snapd.seeded.service":                   "waits for that",
	"snapd.apparmor.service":                 "loads the profiles of snaps",
	"snapd.autoimport.service":               "imports assertions from removable disks",
	"snapd.core-fixup.service":               "Ubuntu Core",
	"snapd.recovery-chooser-trigger.service": "Ubuntu Core",
	"snapd.snap-repair.timer":                "Ubuntu Core",

	// Hardware and hypervisors that a worker does not have.
	"fwupd-refresh.timer":          "fetches firmware",
	"fwupd.service":                "firmware",
	"ModemManager.service":         "modems",
	"multipathd.service":           "multipath storage",
	"multipathd.socket":            "multipath storage",
	"iscsid.socket":                "iSCSI storage",
	"open-iscsi.service":           "iSCSI storage",
	"lvm2-monitor.service":         "watches LVM mirrors",
	"blk-availability.service":     "takes LVM and multipath apart at shutdown",
	"open-vm-tools.service":        "VMware",
	"vgauth.service":               "VMware",
	"hv-kvp-daemon.service":        "Hyper-V",
	"thermald.service":             "CPU temperature",
	"udisks2.service":              "removable disks",
	"keyboard-setup.service":       "a keyboard",
	"console-setup.service":        "a screen's font",
	"getty@tty1.service":           "a screen's login",
	"secureboot-db.service":        "UEFI secure boot",
	"systemd-pstore.service":       "archives what firmware kept of a crash; it has the module for UEFI loaded",
	"grub-common.service":          "records a good boot for GRUB, which does not run",
	"grub-initrd-fallback.service": "the same",
	"pollinate.service":            "asks a server on the internet for entropy",
	"networkd-dispatcher.service":  "runs hooks when networkd's links change",
}

// slowStatics have no [Install] section, so only masking keeps them from starting. A worker needs none of them.
var slowStatics = map[string]string{
	"sshd-keygen.service":              "makes RSA keys at boot; a worker's host keys come from the guest part, before sshd",
	"regenerate_ssh_host_keys.service": "the same, elsewhere",
	"systemd-firstboot.service":        "asks questions on the console of a new machine",
	"modprobe@drm.service":             "graphics",
	"systemd-pcrphase.service":         "TPM measurements",
	"systemd-pcrphase-sysinit.service": "TPM measurements",
	"cloud-init-hotplugd.socket":       "listens for cloud-init, which does not run",

	"systemd-udev-load-credentials.service": "reads udev rules from credentials, which a worker does not get",
	"systemd-random-seed.service":           "keeps entropy between boots; a worker boots once and gets its entropy from virtio-rng",
}

// idleGenerators are programs that systemd runs before its first unit (systemd.generator(7)) and that have nothing to do in a
// worker, each with the file that would give it work, or "". A link to /dev/null masks a generator.
var idleGenerators = map[string]string{
	"cloud-init-generator":               "",             // a shell script that finds cloud-init disabled
	"systemd-bless-boot-generator":       "",             // boot counting of systemd-boot, which does not run
	"systemd-cryptsetup-generator":       "etc/crypttab", // encrypted disks
	"systemd-hibernate-resume-generator": "",             // hibernation
	"systemd-integritysetup-generator":   "etc/integritytab",
	"systemd-rc-local-generator":         "etc/rc.local",
	"systemd-ssh-generator":              "",              // SSH over vsock: a worker's sshd serves only its address
	"systemd-system-update-generator":    "system-update", // offline updates
	"systemd-tpm2-generator":             "",              // a TPM
	"systemd-veritysetup-generator":      "etc/veritytab",
}

// shortenBoot keeps at boot only what a job needs. It removes nothing.
func (s *sealer) shortenBoot() error {
	var errs []error
	for unit := range notForWorkers {
		if s.stock[unit] {
			errs = append(errs, s.disable(unit))
		}
	}
	if !keepsCloudInit(s.root) {
		// Python, four times in a row before sshd: more than half the time of a plain boot. The file is documented in
		// https://docs.cloud-init.io/en/latest/howto/disable_cloud_init.html.
		errs = append(errs, s.write("etc/cloud/cloud-init.disabled", "by fleetingd: the guest part applies a worker's seed\n"))
		errs = append(errs, s.answerCloudInit())
		for unit := range slowStatics {
			errs = append(errs, s.mask(unit))
		}
		for name, tab := range idleGenerators {
			if _, err := os.Stat(s.path(tab)); tab == "" || errors.Is(err, os.ErrNotExist) {
				errs = append(errs, s.link("/dev/null", "etc/systemd/system-generators/"+name))
			}
		}
		if s.rootIsDisk() {
			// It looks for more file systems in the root disk's partition table.
			errs = append(errs, s.link("/dev/null", "etc/systemd/system-generators/systemd-gpt-auto-generator"))
		}
		load, err := s.loadsModules()
		errs = append(errs, err)
		if !load {
			errs = append(errs, s.mask("systemd-modules-load.service"))
		}
		// Keep the kernel's name for the only interface. Otherwise udev renames it while the guest part configures it.
		errs = append(errs, s.write("etc/systemd/network/10-fleetingd.link",
			"# by fleetingd: the worker's one interface keeps the kernel's name\n[Match]\nDriver=virtio_net\n\n[Link]\nNamePolicy=keep kernel\n"))
		if _, err := os.Stat(s.path("etc/NetworkManager")); err == nil {
			errs = append(errs, s.write("etc/NetworkManager/conf.d/10-fleetingd.conf",
				"# by fleetingd: no DHCP on a worker's interface, its address comes from the seed\n[main]\nno-auto-default=*\n"))
		}
	}
	return errors.Join(append(errs, s.updateDone())...)
}

// cloudInitAnswer comes before cloud-init in PATH.
//
//go:embed cloud-init.sh
var cloudInitAnswer []byte

// answerCloudInit makes `cloud-init status --wait` answer at once: GitLab recommends it for instance_ready_command, and it loads
// most of cloud-init's Python only to report that it is disabled.
func (s *sealer) answerCloudInit() error {
	const path = "usr/local/bin/cloud-init"
	if _, err := os.Stat(s.path("usr/bin/cloud-init")); err != nil {
		return nil // not there, or elsewhere
	}
	if old, err := os.ReadFile(s.path(path)); err == nil && !bytes.Equal(old, cloudInitAnswer) {
		return nil // the image has its own program there
	}
	if err := os.MkdirAll(filepath.Dir(s.path(path)), 0o755); err != nil {
		return err
	}
	return writeFile(s.path(path), cloudInitAnswer, 0o755)
}

// rootIsDisk reports whether the root file system fills the whole disk, without a partition table.
func (s *sealer) rootIsDisk() bool {
	dev, _, err := rootDevice(s.root)
	if err != nil {
		return false
	}
	_, err = os.Stat("/sys/class/block/" + dev + "/partition")
	return errors.Is(err, os.ErrNotExist)
}

// loadsModules reports whether systemd-modules-load.service has anything to load (modules-load.d(5)). Distributions ship
// files that hold only comments.
func (s *sealer) loadsModules() (bool, error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil || bytes.Contains(line, []byte("modules_load=")) || bytes.Contains(line, []byte("modules-load=")) {
		return true, err
	}
	for _, dir := range []string{"etc", "usr/local/lib", "usr/lib", "lib"} {
		found, err := filepath.Glob(s.path(dir + "/modules-load.d/*.conf"))
		if err != nil {
			return true, err
		}
		for _, p := range found {
			data, err := os.ReadFile(p)
			if errors.Is(err, os.ErrNotExist) {
				continue // Debian's link to /etc/modules, which a step may have removed
			}
			if err != nil {
				return true, err
			}
			if namesModule(string(data)) {
				return true, nil
			}
		}
	}
	return false, nil
}

// namesModule reports whether a modules-load.d(5) file has more than comments.
func namesModule(text string) bool {
	for l := range strings.Lines(text) {
		if l = strings.TrimSpace(l); l != "" && l[0] != '#' && l[0] != ';' {
			return true
		}
	}
	return false
}

// updateDone tells systemd that /etc and /var are up to date with /usr (systemd-update-done.service(8)). Packages that the
// prebuild installed made /usr newer, so each clone would rebuild the hardware database, ld.so's cache and the journal's catalog,
// which the packages' own scripts have already done.
func (s *sealer) updateDone() error {
	usr, err := os.Stat(s.path("usr"))
	if err != nil {
		return err
	}
	for _, f := range []string{"etc/.updated", "var/.updated"} {
		if err := s.write(f, "# by fleetingd, instead of systemd-update-done.service\n"); err != nil {
			return err
		}
		if err := os.Chtimes(s.path(f), usr.ModTime(), usr.ModTime()); err != nil {
			return err
		}
	}
	return nil
}

func (s *sealer) write(path, text string) error {
	p := s.path(path)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		return err
	}
	return writeFile(p, []byte(text), 0o644)
}

// enabledUnits returns the units that a machine's links enable.
func enabledUnits(root string) map[string]bool {
	units := map[string]bool{}
	for _, dir := range []string{"wants", "requires"} {
		found, _ := filepath.Glob(filepath.Join(root, "etc/systemd/system/*."+dir, "*")) // the pattern is valid
		for _, p := range found {
			units[filepath.Base(p)] = true
		}
	}
	return units
}

// disable removes the links that start a unit at boot, as `systemctl disable` does.
func (s *sealer) disable(unit string) error {
	var errs []error
	for _, dir := range []string{"wants", "requires"} {
		found, err := filepath.Glob(s.path("etc/systemd/system/*." + dir + "/" + strings.ReplaceAll(unit, "[", `\[`)))
		errs = append(errs, err)
		for _, p := range found {
			errs = append(errs, os.Remove(p))
		}
	}
	return errors.Join(errs...)
}

// mask keeps a unit from starting at all, unless the image's owner has a unit of that name.
func (s *sealer) mask(unit string) error {
	if _, err := os.Lstat(s.path("etc/systemd/system/" + unit)); err == nil {
		return nil
	}
	return s.link("/dev/null", "etc/systemd/system/"+unit)
}
