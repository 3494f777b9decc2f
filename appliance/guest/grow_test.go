package guest

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/need"
)

// A mounted ext4 grows with its disk, and only then.
func TestGrowExt4(t *testing.T) {
	need.Root(t)
	need.Tools(t, "mke2fs", "losetup", "mount", "umount")
	dir := t.TempDir()
	disk, at := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	do := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %q: %v\n%s", name, args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	do("mke2fs", "-q", "-t", "ext4", "-T", "default", disk, "64M")
	if err := errors.Join(os.Mkdir(at, 0o755), os.Truncate(disk, 1<<30)); err != nil {
		t.Fatal(err)
	}
	loop := do("losetup", "--find", "--show", disk)
	t.Cleanup(func() { exec.Command("losetup", "--detach", loop).Run() })
	do("mount", loop, at)
	t.Cleanup(func() { do("umount", at) })
	total := func() int64 {
		t.Helper()
		var st unix.Statfs_t
		if err := unix.Statfs(at, &st); err != nil {
			t.Fatal(err)
		}
		return int64(st.Blocks) * st.Bsize
	}
	before := total()
	if err := growExt4(at, loop, 64<<20); err != nil || total() != before {
		t.Errorf("a disk of the same size: %v, %d bytes after %d", err, total(), before)
	}
	err := growExt4(at, loop, 1<<30)
	if errors.Is(err, unix.EPERM) {
		t.Skip("root here has no CAP_SYS_RESOURCE, which growing takes: a worker grows in package image's TestDebianVM")
	}
	for range 2 {
		if err := growExt4(at, loop, 1<<30); err != nil || total() < 900<<20 {
			t.Errorf("a larger disk: %v, %d bytes", err, total())
		}
	}
	if err := growExt4(at, loop, 2<<30); err == nil || !strings.Contains(err.Error(), loop) {
		t.Errorf("a disk that is smaller than it says: %v", err)
	}
}

func FuzzExt4Size(f *testing.F) {
	sb := make([]byte, 2048)
	copy(sb[1024+0x38:], "\x53\xef")
	f.Add(sb)
	f.Add([]byte("short"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if blocks, size, ok := ext4Size(bytes.NewReader(b)); ok && (size < 1024 || size > 64<<10) {
			t.Fatalf("%d blocks of %d", blocks, size)
		}
	})
}
