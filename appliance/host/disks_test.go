package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	needs "github.com/fleetingd/fleetingd/appliance/need" // the package has a "need" of its own
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// clones tries FICLONE in a folder.
func clones(dir string) error {
	a, err := os.CreateTemp(dir, "a")
	if err != nil {
		return err
	}
	defer os.Remove(a.Name())
	defer a.Close()
	if _, err := a.Write(make([]byte, 4096)); err != nil {
		return err
	}
	b, err := os.CreateTemp(dir, "b")
	if err != nil {
		return err
	}
	defer os.Remove(b.Name())
	defer b.Close()
	return unix.IoctlFileClone(int(b.Fd()), int(a.Fd()))
}

func diskPlan(t *testing.T, backing string, size int64) *plan.Plan {
	state := t.TempDir()
	p := &plan.Plan{
		Paths: plan.Paths{State: state, Disks: filepath.Join(state, "disks")},
		Disks: plan.NewDisks(state, backing, size),
	}
	t.Cleanup(func() {
		if err := DisksDown(context.Background(), p); err != nil {
			t.Error(err)
		}
	})
	return p
}

func TestDisks(t *testing.T) {
	needs.Root(t)
	needs.Tools(t, "mkfs.xfs", "mount", "umount")
	for _, backing := range []string{"xfs-image", "tmpfs"} {
		t.Run(backing, func(t *testing.T) {
			p := diskPlan(t, backing, 512<<20)
			for i := range 2 { // twice is once
				d, err := DisksUp(t.Context(), p, clones)
				if err != nil {
					t.Fatal(err)
				}
				if d.Size != 512<<20 || d.Found != (i == 1) {
					t.Errorf("the image has %d bytes; found: %v", d.Size, d.Found)
				}
				if n, err := mounts(p.Paths.Disks); n != 1 || err != nil {
					t.Fatalf("%d mounts, %v", n, err)
				}
			}
			kept := filepath.Join(p.Paths.Disks, "kept")
			if err := os.WriteFile(kept, []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := DisksDown(t.Context(), p); err != nil {
					t.Fatal(err)
				}
				for _, dir := range []string{p.Paths.Disks, p.Disks.Memory} {
					if n, err := mounts(dir); n != 0 || err != nil {
						t.Fatalf("%s: %d mounts, %v", dir, n, err)
					}
				}
			}
			if _, err := DisksUp(t.Context(), p, clones); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(kept); (err == nil) != (backing == "xfs-image") {
				t.Errorf("after down and up: %v", err)
			}
		})
	}
}

func TestDisksAuto(t *testing.T) {
	needs.Root(t)
	needs.Tools(t, "mkfs.xfs", "mount", "umount")
	p := diskPlan(t, "auto", 512<<20)
	d, err := DisksUp(t.Context(), p, func(string) error { return nil })
	if err != nil || d.Backing != "directory" {
		t.Fatalf("where the folder can clone it is used: %+v, %v", d, err)
	}
	if _, err := os.Stat(p.Disks.Image); err == nil {
		t.Error("an image was made that nobody needs")
	}
	refuse := true
	d, err = DisksUp(t.Context(), p, func(dir string) error {
		if refuse {
			refuse = false
			return errors.New("ext4 cannot clone")
		}
		return clones(dir)
	})
	if err != nil || d.Backing != "xfs-image" {
		t.Fatalf("where it cannot there is an image: %+v, %v", d, err)
	}
}

func TestDisksFailures(t *testing.T) {
	needs.Root(t)
	needs.Tools(t, "mkfs.xfs", "mount", "umount")
	no := errors.New("ext4 cannot clone")
	for _, c := range []struct {
		name, backing string
		size          int64
		canClone      func(string) error
		want          string
	}{
		{"directory", "directory", 0, func(string) error { return no }, `backing = "xfs-image"`},
		{"too small", "xfs-image", 1 << 20, func(string) error { return no }, "XFS needs 300"},
		{"cannot clone after all", "xfs-image", 512 << 20, func(string) error { return no }, "cannot clone"},
		{"mkfs fails", "xfs-image", 512 << 20, func(dir string) error {
			// The image's name is taken by a folder, under the name that it is made by.
			return errors.Join(no, os.MkdirAll(filepath.Join(filepath.Dir(dir), "disks.xfs.new"), 0o755))
		}, "is a directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := diskPlan(t, c.backing, c.size)
			_, err := DisksUp(t.Context(), p, c.canClone)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error %v, want %q in it", err, c.want)
			}
			if n, err := mounts(p.Paths.Disks); n != 0 || err != nil {
				t.Errorf("left behind: %d mounts, %v", n, err)
			}
		})
	}
}

// A file system of somebody else's on the folder is used where it can clone, and never unmounted.
func TestDisksOfSomebodyElse(t *testing.T) {
	needs.Root(t)
	needs.Tools(t, "mount", "umount")
	p := diskPlan(t, "auto", 0)
	if err := os.MkdirAll(p.Paths.Disks, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := command(t.Context(), "mount", "-t", "tmpfs", "tmpfs", p.Paths.Disks); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(p.Paths.Disks, 0) })
	if _, err := DisksUp(t.Context(), p, clones); err == nil {
		t.Error("tmpfs cannot clone, and was taken")
	}
	if err := DisksDown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if n, _ := mounts(p.Paths.Disks); n != 1 {
		t.Error("somebody else's mount was unmounted")
	}
}
