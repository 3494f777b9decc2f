package host

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	testneed "github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// What apply installs or sets right is no reason for it not to begin; all else is.
func TestDoctorByApply(t *testing.T) {
	testneed.Root(t)
	device := filepath.Join(t.TempDir(), "kvm")
	if err := os.WriteFile(device, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chown(device, 0, 4711), os.Chmod(device, 0o660)); err != nil {
		t.Fatal(err)
	}
	bare := func(install *plan.Install) map[string]Finding {
		d := healthy()
		d.plan.Install = install
		d.machine.lookPath = func(name string) (string, error) {
			if name == "apt-get" {
				return "/usr/bin/apt-get", nil
			}
			return "", fs.ErrNotExist
		}
		d.probes.Driver = func(context.Context) (string, string, error) {
			return "", "", errors.New("cloud-hypervisor is not on PATH")
		}
		d.probes.CanClone = func(string) error { return errors.New("ext4 cannot clone") }
		d.machine.openAs = func(a *account, _ string) error {
			if a == nil {
				return nil
			}
			return fs.ErrPermission
		}
		next := d.machine.stat
		d.machine.stat = func(path string) (fs.FileInfo, error) {
			switch path {
			case "/dev/kvm":
				return os.Stat(device)
			case "/usr/share/keyrings/debian-archive-keyring.gpg":
				return nil, fs.ErrNotExist
			}
			return next(path)
		}
		found := map[string]Finding{}
		for _, f := range d.examine(t.Context()) {
			found[f.Check] = f
		}
		return found
	}
	checks := []string{"hypervisor", "disks", "qemu-img", "mmdebstrap", "mke2fs", "debian-archive-keyring", "gitlab-runner"}
	all := bare(&plan.Install{
		Packages: []string{"debian-archive-keyring", "e2fsprogs", "gitlab-runner", "mmdebstrap", "qemu-utils", "xfsprogs"},
		Programs: []plan.Download{{Package: "cloud-hypervisor"}},
	})
	some := bare(&plan.Install{Packages: []string{"qemu-utils"}})
	none := bare(nil)
	for _, check := range checks {
		for name, found := range map[string]map[string]Finding{"all": all, "some": some, "none": none} {
			f := found[check]
			want := name == "all" || name == "some" && check == "qemu-img"
			if f.Status != StatusFail || f.ByApply != want {
				t.Errorf("with %s installed, %s: %+v", name, check, f)
			}
		}
	}
	if f := none["user"]; f.Status != StatusFail || !f.ByApply {
		t.Errorf("a user who is not in the device's group: %+v", f)
	}
	if err := os.Chmod(device, 0o600); err != nil {
		t.Fatal(err)
	}
	if f := bare(nil)["user"]; f.Status != StatusFail || f.ByApply {
		t.Errorf("a device that its group may not open: %+v", f)
	}
}
