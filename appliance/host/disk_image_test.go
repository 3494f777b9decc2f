package host

import (
	"crypto/sha256"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	needs "github.com/fleetingd/fleetingd/appliance/need"
)

func needsXFS(t *testing.T) {
	t.Helper()
	needs.Root(t)
	needs.Tools(t, "mkfs.xfs", "xfs_growfs", "mount", "umount", "losetup")
}

func sized(size int64) State { return State{"size": strconv.FormatInt(size, 10)} }

func TestSettleDisks(t *testing.T) {
	needs.Root(t)
	canClone := func(string) error { return nil }
	cannot := func(string) error { return errors.New("ext4 cannot clone") }
	state := filepath.Join(t.TempDir(), "not/yet")
	free, err := freeSpace(os.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		backing  string
		size     int64
		canClone func(string) error
		want     string
		wantSize int64
	}{
		{"directory", 0, cannot, "directory", 0},
		{"tmpfs", 5 * gib, cannot, "tmpfs", 5 * gib},
		{"auto", 0, canClone, "directory", 0},
		{"auto", 7 * gib, cannot, "xfs-image", 7 * gib},
		{"auto", 0, cannot, "xfs-image", free / 5 * 4 / gib * gib},
		{"xfs-image", 7 * gib, canClone, "xfs-image", 7 * gib},
	} {
		got, size, err := SettleDisks(state, c.backing, c.size, c.canClone)
		if off := size - c.wantSize; err != nil || got != c.want || off > gib || off < -gib || size%gib != 0 {
			t.Errorf("%s, %d: %s, %d, %v; want %s, %d", c.backing, c.size, got, size, err, c.want, c.wantSize)
		}
	}
	if _, err := os.Stat(filepath.Dir(state)); err == nil {
		t.Error("looking at the host made a folder")
	}

	// An image that is there is used, and kept.
	if err := os.MkdirAll(state, 0o755); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(state, "disks.xfs")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 3*gib); err != nil {
		t.Fatal(err)
	}
	for _, size := range []int64{0, 3 * gib, 4 * gib} {
		got, settled, err := SettleDisks(state, "auto", size, canClone)
		if err != nil || got != "xfs-image" || settled != max(size, 3*gib) {
			t.Errorf("%d beside an image of 3 GiB: %s, %d, %v", size, got, settled, err)
		}
	}
	_, _, err = SettleDisks(state, "xfs-image", 2*gib, canClone)
	if !errors.Is(err, ErrCannotShrink) || !strings.Contains(err.Error(), `write size = "3GiB" or more`) {
		t.Error(err)
	}
}

func TestDiskImages(t *testing.T) {
	needsXFS(t)
	p := diskPlan(t, "xfs-image", 400<<20)
	d, image := NewTree("/", filepath.Join(t.TempDir(), "notes.json")).DiskImages(), p.Disks.Image
	if s := readOne(t, d, image); s != nil {
		t.Errorf("a missing image is %v", s)
	}
	// What a crash left of an earlier try is no image.
	if err := os.WriteFile(newImage(image), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	writeOne(t, d, image, sized(400<<20))
	if _, err := os.Stat(newImage(image)); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	// It grows while it is not mounted.
	writeOne(t, d, image, sized(512<<20))
	if _, err := DisksUp(t.Context(), p, clones); err != nil {
		t.Fatal(err)
	}
	sealed := filepath.Join(p.Paths.Disks, "sealed")
	if err := os.WriteFile(sealed, []byte(strings.Repeat("sealed", 1<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	before := sum(t, sealed)
	space := func() int64 {
		var st unix.Statfs_t
		if err := unix.Statfs(p.Paths.Disks, &st); err != nil {
			t.Fatal(err)
		}
		return int64(st.Blocks) * st.Bsize
	}
	small := space()

	// And while it is: from wherever a crash left it.
	grown := int64(768 << 20)
	for _, crash := range []string{"none", "after truncate", "after losetup"} {
		if crash != "none" {
			if err := os.Truncate(image, grown); err != nil {
				t.Fatal(err)
			}
		}
		if crash == "after losetup" {
			loops, err := loopsOver(image)
			if err != nil || len(loops) != 1 || loops[0].mount != p.Paths.Disks {
				t.Fatalf("%v, %v", loops, err)
			}
			if err := command(t.Context(), "losetup", "-c", loops[0].device); err != nil {
				t.Fatal(err)
			}
		}
		if s := readOne(t, d, image); s["size"] == sized(grown)["size"] {
			t.Errorf("%s: it is not grown, and reads %v", crash, s)
		}
		writeOne(t, d, image, sized(grown))
		writeOne(t, d, image, sized(grown))
		if now := space(); now < small+200<<20 {
			t.Errorf("%s: the file system has %d MiB, and had %d", crash, now>>20, small>>20)
		}
		small, grown = space(), grown+256<<20
	}
	if sum(t, sealed) != before {
		t.Error("what lay in the image changed")
	}
	if err := clones(p.Paths.Disks); err != nil {
		t.Error(err)
	}

	if err := d.Write(t.Context(), image, sized(400<<20)); !errors.Is(err, ErrCannotShrink) {
		t.Error(err)
	}
	if err := d.Write(t.Context(), image, nil); err == nil || !strings.Contains(err.Error(), "is mounted on "+p.Paths.Disks) {
		t.Errorf("an image in use was removed: %v", err)
	}
	if sum(t, sealed) != before {
		t.Error("what lay in the image changed")
	}
	if err := DisksDown(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	writeOne(t, d, image, nil)
	writeOne(t, d, image, nil)
}

func sum(t *testing.T, file string) [32]byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

func TestDiskImagesRefuse(t *testing.T) {
	needsXFS(t)
	dir := t.TempDir()
	d := NewTree("/", filepath.Join(dir, "notes.json")).DiskImages()
	theirs := filepath.Join(dir, "theirs.xfs")
	if err := os.WriteFile(theirs, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link.xfs")
	if err := os.Symlink(theirs, link); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		want State
		err  string
	}{
		{theirs, sized(gib), "it is not an XFS image, so fleetingd did not make it"},
		{link, sized(gib), "symbolic link"},
		{filepath.Join(dir, "tiny.xfs"), sized(1 << 20), "XFS needs 300"},
		{filepath.Join(dir, "x.xfs"), State{"size": "5GiB"}, `size "5GiB" is not a number of bytes`},
		{filepath.Join(dir, "x.xfs"), State{"size": "5", "label": "x"}, `unknown key "label"`},
	} {
		if err := d.Write(t.Context(), c.name, c.want); err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v; want %q", c.name, err, c.err)
		}
	}
	if b, err := os.ReadFile(theirs); err != nil || len(b) != 1<<20 {
		t.Errorf("somebody else's file was touched: %d bytes, %v", len(b), err)
	}
}
