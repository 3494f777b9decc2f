package image

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/visible"
)

// xfs mounts a file system that can clone, with this many MiB (at least 300).
func xfs(t testing.TB, mib int64) string {
	t.Helper()
	need.Root(t)
	need.Tools(t, "mkfs.xfs", "mount", "umount")
	dir := t.TempDir()
	img, at := filepath.Join(dir, "xfs.img"), filepath.Join(dir, "mnt")
	f, err := os.Create(img)
	if err := errors.Join(err, f.Truncate(mib<<20), f.Close(), os.Mkdir(at, 0o755)); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.xfs", "-q", "-m", "reflink=1", img).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.xfs: %v\n%s", err, out)
	}
	if out, err := exec.Command("mount", "-o", "loop", img, at).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", at).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	return at
}

// sparse makes a disk of size bytes with some content at both ends.
func sparse(t testing.TB, path string, size int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err1 := f.WriteAt([]byte("the beginning"), 0)
	_, err2 := f.WriteAt([]byte("the end"), size-7)
	if err := errors.Join(err1, err2, f.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestClone(t *testing.T) {
	dir := xfs(t, 512)
	if err := CanClone(dir); err != nil {
		t.Fatal(err)
	}
	wantOnly(t, dir)
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	sparse(t, src, 10<<30)
	s := &Store{}
	if err := s.Clone(t.Context(), &Sealed{Disk: src}, dst, 30<<30); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(dst)
	if err != nil || fi.Size() != 30<<30 || fi.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v: want 30 GiB, mode 0600", fi, err)
	}
	if n := allocated(fi); n > 1<<20 {
		t.Errorf("the clone takes up %d bytes", n)
	}
	// Writing to a clone does not change the image.
	f, err := os.OpenFile(dst, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	end := make([]byte, 7)
	_, err1 := f.WriteAt([]byte("XXX"), 0)
	_, err2 := f.ReadAt(end, 10<<30-7)
	head, err3 := readHead(src, 13)
	if err := errors.Join(err1, err2, err3); err != nil || string(end) != "the end" || string(head) != "the beginning" {
		t.Errorf("clone ends with %q, image begins with %q, %v", end, head, err)
	}

	wantError(t, s.Clone(t.Context(), &Sealed{Disk: src}, dst, 30<<30), "exists")
	small := filepath.Join(dir, "small")
	wantError(t, s.Clone(t.Context(), &Sealed{Disk: src}, small, 1<<30), "10 GiB", "1 GiB", "larger")
	if _, err := os.Lstat(small); err == nil {
		t.Error("a refused clone is there")
	}
}

func readHead(path string, n int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, n)
	_, err = f.ReadAt(b, 0)
	return b, err
}

func TestCloneWhereItCannot(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=16m", "test", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command("umount", dir).Run() })
	wantError(t, CanClone(dir), "tmpfs", "never makes a full copy", "xfs-image")
	wantOnly(t, dir)

	src := filepath.Join(xfs(t, 300), "src")
	sparse(t, src, 1<<20)
	dst := filepath.Join(dir, "dst")
	wantError(t, cloneDisk(src, dst, 1<<20), "different file systems")
	wantOnly(t, dir)
	wantError(t, CanClone(filepath.Join(dir, "none")), "no such file")
}

// On a full disk cloning fails with a clear error, and leaves nothing.
func TestCloneOnFullDisk(t *testing.T) {
	dir := xfs(t, 300)
	src := filepath.Join(dir, "src")
	// Every second block is written: a clone needs 400 KiB for its own list of extents.
	f, err := os.Create(src)
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(25000) {
		if _, err := f.WriteAt([]byte{1}, i*8192); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	// Just enough room for a file's inode: otherwise the open would fail already.
	fill(t, filepath.Join(dir, "filler"), 256<<10)
	var full error
	for i := range 2000 {
		dst := filepath.Join(dir, fmt.Sprint("clone", i))
		if full = cloneDisk(src, dst, 1<<30); full != nil {
			if _, err := os.Lstat(dst); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the clone that failed is there (%v)", err)
			}
			break
		}
	}
	if !errors.Is(full, unix.ENOSPC) {
		t.Fatalf("%v; want no space left on device", full)
	}
	wantError(t, full, src, "no space left")
}

// fill leaves this many bytes free on a file system.
func fill(t *testing.T, path string, free int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-free); err != nil {
		t.Fatal(err)
	}
}

// Sparse disks of two sizes with the same content: cloning them must take the same time.
func BenchmarkClone(b *testing.B) {
	for _, gib := range []int64{30, 300} {
		b.Run(fmt.Sprintf("%dGiB", gib), func(b *testing.B) {
			dir := xfs(b, 2048)
			src := filepath.Join(dir, "src")
			f, err := os.Create(src)
			if err != nil {
				b.Fatal(err)
			}
			for i := range int64(1000) { // a used disk: a thousand extents, all over it
				if _, err := f.WriteAt(bytes.Repeat([]byte{1}, 256<<10), i*(gib<<30)/1000); err != nil {
					b.Fatal(err)
				}
			}
			if err := errors.Join(f.Truncate(gib<<30), f.Sync(), f.Close()); err != nil {
				b.Fatal(err)
			}
			dst := filepath.Join(dir, "dst")
			for b.Loop() {
				if err := cloneDisk(src, dst, gib<<30); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := os.Remove(dst); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

func TestBytesText(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1 << 20: "1 MiB", 30 << 30: "30 GiB", 1536 << 20: "1.5 GiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("%d: %q, want %q", n, got, want)
		}
	}
	if got := visible.Text("a\x1b[31m\"b\"\n"); strings.ContainsAny(got, "\x1b\n") || !strings.Contains(got, `"b"`) {
		t.Errorf("%q", got)
	}
}
