package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/need"
)

func stockTree(t *testing.T) string {
	return tree(t, map[string]string{
		"usr/":           "",
		"etc/machine-id": "0123456789abcdef0123456789abcdef\n", "var/lib/dbus/machine-id": "0123\n",
		"etc/ssh/ssh_host_rsa_key": "k", "etc/ssh/ssh_host_rsa_key.pub": "k", "etc/ssh/sshd_config": "Port 22\n",
		"etc/netplan/50-cloud-init.yaml": "n", "etc/netplan/99-own.yaml": "own",
		"var/lib/cloud/instance": "-> instances/i", "var/lib/cloud/instances/i/user-data.txt": "u",
		"var/lib/systemd/random-seed": "r", "var/log/apt/history.log": "h", "var/log/journal/x/system.journal": "j",
		"var/cache/apt/archives/git.deb": "d", "var/lib/apt/lists/deb.example_Packages": "lists",
		"root/.bash_history": "h", "home/ci/.bash_history": "h", "home/ci/.profile": "p",
		"etc/systemd/system/timers.target.wants/apt-daily.timer":     "-> /usr/lib/systemd/system/apt-daily.timer",
		"etc/systemd/system/timers.target.wants/fstrim.timer":        "-> /usr/lib/systemd/system/fstrim.timer",
		"etc/systemd/system/multi-user.target.wants/docker.service":  "-> /usr/lib/systemd/system/docker.service",
		"etc/systemd/system/sockets.target.wants/snapd.socket":       "-> /usr/lib/systemd/system/snapd.socket",
		"etc/systemd/system/multi-user.target.wants/snapd.service":   "-> /usr/lib/systemd/system/snapd.service",
		"etc/systemd/system/sshd-keygen.service":                     "[Unit]\n",
		"etc/NetworkManager/system-connections/cloud-init-eth0.conf": "n",
		"etc/modules": "# nothing\n\n", "etc/modules-load.d/modules.conf": "-> ../modules",
	})
}

func sealTree(t *testing.T, root string, stock map[string]bool) map[string]string {
	t.Helper()
	s := sealer{root: root, log: slog.New(slog.DiscardHandler), stock: stock}
	for name, step := range map[string]func() error{"install": s.install, "shortenBoot": s.shortenBoot, "stop": s.stopWriters, "clean": s.clean} {
		if err := step(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	return listing(t, root)
}

func TestSealTree(t *testing.T) {
	root := stockTree(t)
	if err := os.WriteFile(filepath.Join(root, "etc/crypttab"), []byte("data /dev/vdc\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// A step enabled the fstrim timer, so it must stay.
	stock := enabledUnits(root)
	delete(stock, "fstrim.timer")
	got := sealTree(t, root, stock)

	masked := map[string]bool{}
	for name := range got {
		if to, ok := strings.CutPrefix(got[name], "-> /dev/null"); ok && to == "" && strings.HasPrefix(name, "etc/systemd/system") {
			_, static := slowStatics[filepath.Base(name)]
			_, generator := idleGenerators[filepath.Base(name)]
			if !static && !generator && name != "etc/systemd/system/systemd-modules-load.service" {
				t.Errorf("%s is masked, and nobody says why", name)
			}
			delete(got, name)
			masked[filepath.Base(name)] = true
		}
	}
	want := map[string]string{
		"etc/machine-id": "", "var/lib/dbus/machine-id": "-> /etc/machine-id",
		"etc/ssh/sshd_config": "Port 22\n", "etc/netplan/99-own.yaml": "own",
		"var/log/apt/history.log": "", "var/lib/apt/lists/deb.example_Packages": "lists", "home/ci/.profile": "p",
		"etc/systemd/system/timers.target.wants/fstrim.timer":             "-> /usr/lib/systemd/system/fstrim.timer",
		"etc/systemd/system/multi-user.target.wants/docker.service":       "-> /usr/lib/systemd/system/docker.service",
		"etc/systemd/system/sockets.target.wants/snapd.socket":            "-> /usr/lib/systemd/system/snapd.socket",
		"etc/systemd/system/sshd-keygen.service":                          "[Unit]\n",
		"etc/systemd/system/sysinit.target.wants/fleetingd-guest.service": "-> /etc/systemd/system/fleetingd-guest.service",
		"etc/systemd/system/fleetingd-guest.service":                      string(unitText),
		"etc/cloud/cloud-init.disabled":                                   "by fleetingd: the guest part applies a worker's seed\n",
		"etc/systemd/network/10-fleetingd.link":                           got["etc/systemd/network/10-fleetingd.link"],
		"etc/NetworkManager/conf.d/10-fleetingd.conf":                     got["etc/NetworkManager/conf.d/10-fleetingd.conf"],
		"etc/.updated": got["etc/.updated"], "var/.updated": got["var/.updated"], "etc/crypttab": "data /dev/vdc\n",
		"etc/modules": "# nothing\n\n", "etc/modules-load.d/modules.conf": "-> ../modules",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(- want, + got):\n%s", d)
	}
	if !masked["systemd-veritysetup-generator"] || masked["systemd-cryptsetup-generator"] {
		t.Errorf("a generator is masked where it has nothing to do, and only there: %v", masked)
	}
	usr, err := os.Stat(filepath.Join(root, "usr"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"etc/.updated", "var/.updated"} {
		if i, err := os.Stat(filepath.Join(root, f)); err != nil || !i.ModTime().Equal(usr.ModTime()) {
			t.Errorf("%s is of another time than /usr: %v", f, err)
		}
	}
	before := listing(t, root)
	if d := cmp.Diff(before, sealTree(t, root, stock)); d != "" {
		t.Errorf("sealing twice (- once, + twice):\n%s", d)
	}
}

// TestLoadsModules: the service that loads modules stays enabled if there is one to load.
func TestLoadsModules(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		want  bool
	}{
		"no files":          {map[string]string{"etc/": ""}, false},
		"comments":          {map[string]string{"etc/modules-load.d/a.conf": "# a\n; b\n \n"}, false},
		"a link to nothing": {map[string]string{"etc/modules-load.d/modules.conf": "-> ../modules"}, false},
		"not a .conf":       {map[string]string{"etc/modules-load.d/README": "br_netfilter\n"}, false},
		"by a step":         {map[string]string{"etc/modules-load.d/k8s.conf": "# for pods\nbr_netfilter"}, true},
		"by a package":      {map[string]string{"usr/lib/modules-load.d/fwupd.conf": "msr\n"}, true},
	} {
		c.files["usr/"] = ""
		s := sealer{root: tree(t, c.files), log: slog.New(slog.DiscardHandler)}
		if got, err := s.loadsModules(); err != nil || got != c.want {
			t.Errorf("%s: %t, %v", name, got, err)
		}
		if err := s.shortenBoot(); err != nil {
			t.Fatal(err)
		}
		_, err := os.Lstat(s.path("etc/systemd/system/systemd-modules-load.service"))
		if masked := err == nil; masked == c.want {
			t.Errorf("%s: masked is %t", name, masked)
		}
	}
}

// TestWantedMounts: a file system that the image's owner configured is left to systemd.
func TestWantedMounts(t *testing.T) {
	s := sealer{root: tree(t, map[string]string{
		"usr/lib/systemd/system/sysinit.target.wants/dev-mqueue.mount":       "-> ../dev-mqueue.mount",
		"usr/lib/systemd/system/sysinit.target.wants/dev-hugepages.mount":    "-> ../dev-hugepages.mount",
		"usr/lib/systemd/system/sysinit.target.wants/sys-kernel-debug.mount": "-> ../sys-kernel-debug.mount",
		"usr/lib/systemd/system/sys-kernel-tracing.mount":                    "not wanted",
		"etc/systemd/system/dev-hugepages.mount.d/size.conf":                 "[Mount]\nOptions=pagesize=1G\n",
		"etc/systemd/system/sys-kernel-debug.mount":                          "-> /dev/null",
	})}
	got := s.wantedMounts()
	if len(got) != 1 || got[0].At != "/dev/mqueue" {
		t.Errorf("%+v", got)
	}
}

// TestAnswerCloudInit: the status is answered at once, and everything else is passed on to cloud-init.
func TestAnswerCloudInit(t *testing.T) {
	root := tree(t, map[string]string{"usr/bin/cloud-init": "#!/bin/sh\necho real \"$@\"; exit 5\n"})
	s := sealer{root: root, log: slog.New(slog.DiscardHandler)}
	if err := s.shortenBoot(); err != nil {
		t.Fatal(err)
	}
	// Its paths are those of the image.
	text := strings.NewReplacer("/etc/cloud", root+"/etc/cloud", "/usr/bin/cloud-init", root+"/usr/bin/cloud-init").Replace(string(cloudInitAnswer))
	script := filepath.Join(root, "answer")
	if err := errors.Join(os.WriteFile(script, []byte(text), 0o755), os.Chmod(filepath.Join(root, "usr/bin/cloud-init"), 0o755)); err != nil {
		t.Fatal(err)
	}
	type answer struct {
		out  string
		code int
	}
	ask := func(args ...string) answer {
		cmd := exec.Command(script, args...)
		out, err := cmd.Output()
		if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
			t.Fatal(err)
		}
		return answer{string(out), cmd.ProcessState.ExitCode()}
	}
	for _, c := range []struct {
		args []string
		want answer
	}{
		{[]string{"status", "--wait"}, answer{"\nstatus: disabled\n", 0}},
		{[]string{"status", "-w"}, answer{"\nstatus: disabled\n", 0}},
		{[]string{"status"}, answer{"status: disabled\n", 0}},
		{[]string{"status", "--long"}, answer{"real status --long\n", 5}},
		{[]string{"clean", "--logs"}, answer{"real clean --logs\n", 5}},
		{nil, answer{"real\n", 5}},
	} {
		if got := ask(c.args...); got != c.want {
			t.Errorf("%q gives %+v, want %+v", c.args, got, c.want)
		}
	}
	if err := os.Remove(filepath.Join(root, "etc/cloud/cloud-init.disabled")); err != nil {
		t.Fatal(err)
	}
	if got := ask("status", "--wait"); got.code != 5 {
		t.Errorf("a job has enabled cloud-init, and it is not asked: %+v", got)
	}

	for name, files := range map[string]map[string]string{
		"no cloud-init": {"usr/": ""}, "the owner's own": {"usr/bin/cloud-init": "x", "usr/local/bin/cloud-init": "own"},
	} {
		s := sealer{root: tree(t, files), log: slog.New(slog.DiscardHandler)}
		if err := s.answerCloudInit(); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(s.path("usr/local/bin/cloud-init")); err == nil && string(got) != "own" {
			t.Errorf("%s: it is %q", name, got)
		}
	}
}

func TestSealKeepsCloudInit(t *testing.T) {
	root := stockTree(t)
	if err := os.MkdirAll(filepath.Join(root, "etc/fleetingd"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, keepCloudInit), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	got := sealTree(t, root, enabledUnits(root))
	for _, name := range []string{"etc/cloud/cloud-init.disabled", "etc/systemd/network/10-fleetingd.link", "usr/local/bin/cloud-init"} {
		if _, ok := got[name]; ok {
			t.Errorf("cloud-init was to be kept, and %s is there", name)
		}
	}
	if _, ok := got["etc/systemd/system/sysinit.target.wants/fleetingd-guest.service"]; !ok {
		t.Error("nobody says that the worker is ready")
	}
}

// installedAt is where the prebuild's seed (package compile) puts the program.
const installedAt = "/usr/lib/fleetingd/fleetingd"

// TestUnit checks the unit with systemd itself.
func TestUnit(t *testing.T) {
	need.Tools(t, "systemd-analyze")
	p := filepath.Join(t.TempDir(), unitName)
	// systemd-analyze requires that the program exists.
	text := bytes.ReplaceAll(unitText, []byte(installedAt), []byte("/bin/true"))
	if err := os.WriteFile(p, text, 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("systemd-analyze", "verify", "--man=no", p).CombinedOutput(); err != nil || bytes.Contains(out, []byte(unitName)) {
		t.Errorf("%v: %s", err, out)
	}
	if !bytes.Contains(unitText, []byte("ExecStart="+installedAt+" guest\n")) {
		t.Error("the unit starts something else")
	}
}

func TestFindKernel(t *testing.T) {
	root := tree(t, map[string]string{
		"boot/vmlinuz-6.9.1-cloud": "k", "boot/vmlinuz-6.12.10-cloud": "k", "boot/vmlinuz-7.0-nomodules": "k", "boot/vmlinuz": "-> vmlinuz-gone",
		"lib/modules/6.9.1-cloud/modules.dep": "", "lib/modules/6.12.10-cloud/modules.dep": "", "boot/initrd.img-6.12.10-cloud": "i",
	})
	k, err := findKernel(root)
	if err != nil || k.version != "6.12.10-cloud" || k.initrd != filepath.Join(root, "boot/initrd.img-6.12.10-cloud") {
		t.Errorf("%+v, %v", k, err)
	}
	if err := os.Symlink("boot/vmlinuz-6.9.1-cloud", filepath.Join(root, "vmlinuz")); err != nil {
		t.Fatal(err)
	}
	if k, err = findKernel(root); err != nil || k.version != "6.9.1-cloud" || k.initrd != "" {
		t.Errorf("what the distribution's link says counts: %+v, %v", k, err)
	}
	s := sealer{root: t.TempDir(), log: slog.New(slog.DiscardHandler)}
	e, err := s.export(t.Context(), func(string) {})
	if err != nil || e.Bytes != 0 || !strings.Contains(e.Reason, "no kernel") {
		t.Errorf("an image without a kernel: %+v, %v", e, err)
	}
}

func testModules(t *testing.T) *modules {
	t.Helper()
	dir := tree(t, map[string]string{
		"modules.dep": "kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio_pci_modern_dev.ko kernel/drivers/virtio/virtio.ko\n" +
			"kernel/drivers/virtio/virtio_pci_modern_dev.ko: kernel/drivers/virtio/virtio.ko\nkernel/drivers/virtio/virtio.ko:\n" +
			"kernel/fs/ext4/ext4.ko: kernel/fs/mbcache.ko\nkernel/fs/mbcache.ko:\nkernel/crypto/crc32c_generic.ko:\n" +
			"kernel/a.ko: kernel/b.ko\nkernel/b.ko: kernel/a.ko\n",
		"modules.builtin":                     "kernel/drivers/block/virtio_blk.ko\n",
		"modules.softdep":                     "# comment\nsoftdep ext4 pre: crypto-crc32c no-such post: other\n",
		"modules.alias":                       "alias crypto-crc32c crc32c_generic\nalias pci:v00001AF4d* virtio_pci\n",
		"kernel/drivers/virtio/virtio_pci.ko": "PCI", "kernel/drivers/virtio/virtio_pci_modern_dev.ko": "MODERN", "kernel/drivers/virtio/virtio.ko": "VIRTIO",
		"kernel/fs/ext4/ext4.ko": "EXT4", "kernel/fs/mbcache.ko": "MB", "kernel/crypto/crc32c_generic.ko": "CRC",
	})
	m, err := readModules(dir)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestModules(t *testing.T) {
	m := testModules(t)
	for name, want := range map[string]string{
		"virtio-pci": "virtio virtio_pci_modern_dev virtio_pci",
		"virtio_blk": "",
		"ext4":       "crc32c_generic mbcache ext4",
	} {
		files, err := m.closure(name, nil)
		var names []string
		for _, f := range files {
			names = append(names, moduleName(f))
		}
		if got := strings.Join(names, " "); err != nil || got != want {
			t.Errorf("%s takes %q, want %q (%v)", name, got, want, err)
		}
	}
	if files, err := m.closure("virtio_pci", []string{"kernel/drivers/virtio/virtio.ko"}); err != nil || len(files) != 2 {
		t.Errorf("what is there already is not loaded again: %v, %v", files, err)
	}
	if _, err := m.closure("btrfs", nil); err == nil || !strings.Contains(err.Error(), "has no module btrfs") {
		t.Error(err)
	}
	if _, err := m.closure("a", nil); err == nil || !strings.Contains(err.Error(), "cycle") {
		t.Error(err)
	}
}

// TestInitrd unpacks the initrd with cpio.
func TestInitrd(t *testing.T) {
	need.Tools(t, "cpio")
	need.Root(t) // for the device node
	m := testModules(t)
	bin := filepath.Join(t.TempDir(), "bin")
	if err := os.WriteFile(bin, []byte("BINARY"), 0o755); err != nil {
		t.Fatal(err)
	}
	p := bootPlan{Root: "vda1", FSType: "ext4", Binary: bin, Modules: []string{"kernel/drivers/virtio/virtio.ko", "kernel/fs/mbcache.ko"},
		Devices: map[string][]string{"1": {"kernel/fs/ext4/ext4.ko"}}}
	data, err := p.pack(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.Command("cpio", "-idm", "--quiet")
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(data)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, dev := range []string{"dev/console", "dev/null"} {
		path := filepath.Join(dir, dev)
		if i, err := os.Lstat(path); err != nil || i.Mode()&os.ModeCharDevice == 0 {
			t.Errorf("%s: %v", dev, err)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	got := listing(t, dir)
	var plan bootPlan
	if err := json.Unmarshal([]byte(got[bootPlanName]), &plan); err != nil {
		t.Fatal(err)
	}
	want := bootPlan{Root: "vda1", FSType: "ext4", Modules: []string{"modules/virtio.ko", "modules/mbcache.ko"}, Devices: map[string][]string{"1": {"modules/ext4.ko"}}}
	if d := cmp.Diff(want, plan); d != "" {
		t.Errorf("boot plan (- want, + got):\n%s", d)
	}
	delete(got, bootPlanName)
	if d := cmp.Diff(map[string]string{"init": "BINARY", "modules/virtio.ko": "VIRTIO", "modules/mbcache.ko": "MB", "modules/ext4.ko": "EXT4"}, got); d != "" {
		t.Errorf("files (- want, + got):\n%s", d)
	}
	if i, err := os.Stat(filepath.Join(dir, "init")); err != nil || i.Mode().Perm() != 0o755 {
		t.Errorf("init: %v", err)
	}
}

func TestBootArgs(t *testing.T) {
	init, flags := bootArgs("root=/dev/vda1 ro rootflags=discard,noatime quiet init=/bin/other\n")
	if len(init) != 1 || init[0] != "/bin/other" || flags != "discard,noatime" {
		t.Errorf("%v, %q", init, flags)
	}
}

func TestNatural(t *testing.T) {
	for _, c := range [][2]string{{"6.9.1", "6.12.1"}, {"6.12.9", "6.12.10"}, {"", "1"}, {"6.1-a", "6.1-b"}, {"6.1", "6.1.0"}} {
		if natural(c[0], c[1]) >= 0 || natural(c[1], c[0]) <= 0 || natural(c[0], c[0]) != 0 {
			t.Errorf("%q and %q", c[0], c[1])
		}
	}
}
