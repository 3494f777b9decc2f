package host

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
)

// Disks is the file system that DisksUp made or found.
type Disks struct {
	Dir     string // where it is: the Plan's Paths.Disks
	Backing string // "directory", "xfs-image" or "tmpfs"
	Image   string // the file that is mounted; "" for a directory
	Size    int64  // bytes, of the image
	Found   bool   // it was there: this call mounted nothing
}

func (d Disks) String() string {
	if d.Image == "" {
		return d.Dir + " clones"
	}
	return fmt.Sprintf("XFS image %s (%d GiB, sparse) on %s", d.Image, d.Size>>30, d.Dir)
}

// minXFS is what mkfs.xfs takes since xfsprogs 5.19.
const minXFS = 300 << 20

// DisksUp gives the Plan's disks folder a file system that can clone files. With backing "auto" that is the folder's own if canClone
// finds nothing against it, else an XFS image on a loop device. It is idempotent. When it fails, nothing stays mounted. It needs root.
//
// An existing image is mounted as it is, whatever size the Plan gives now.
func DisksUp(ctx context.Context, p *plan.Plan, canClone func(dir string) error) (Disks, error) {
	d := Disks{Dir: p.Paths.Disks, Backing: p.Disks.Backing}
	if err := os.MkdirAll(d.Dir, 0o755); err != nil {
		return d, fmt.Errorf("disks: %w", err)
	}
	mounted, err := mounts(d.Dir)
	if err != nil {
		return d, fmt.Errorf("disks: %w", err)
	}
	ours, err := onOurImage(p)
	if err != nil {
		return d, fmt.Errorf("disks: %w", err)
	}
	why := canClone(d.Dir)
	switch {
	case why != nil && mounted > 0:
		return d, fmt.Errorf("disks: what is mounted on %s cannot be used: %w", d.Dir, why)
	case why != nil && d.Backing == "directory":
		return d, fmt.Errorf("disks: backing = \"directory\": %w; write backing = \"xfs-image\" in the disks block", why)
	case why == nil && !ours && (d.Backing == "directory" || d.Backing == "auto" || mounted > 0):
		d.Backing, d.Found = "directory", true
		return d, nil
	}
	if d.Backing == "auto" {
		d.Backing = "xfs-image"
	}
	d.Image = p.Disks.Image
	if ours {
		d.Found = true
		return d, imageSize(&d)
	}
	if err := disksMount(ctx, p, &d); err != nil {
		return d, errors.Join(fmt.Errorf("disks: %w", err), DisksDown(context.WithoutCancel(ctx), p))
	}
	if err := canClone(d.Dir); err != nil {
		return d, errors.Join(fmt.Errorf("disks: %s: %w", d.Image, err), DisksDown(context.WithoutCancel(ctx), p))
	}
	return d, nil
}

func disksMount(ctx context.Context, p *plan.Plan, d *Disks) error {
	if ram := p.Disks.Memory; ram != "" {
		if err := os.MkdirAll(ram, 0o700); err != nil {
			return err
		}
		n, err := mounts(ram)
		if err != nil {
			return err
		}
		if n == 0 {
			if err := command(ctx, "mount", "-t", "tmpfs", "-o", p.Disks.MemoryOptions, "tmpfs", ram); err != nil {
				return err
			}
		}
	}
	if err := makeXFS(ctx, d.Image, p.Disks.Size); err != nil {
		return err
	}
	if err := imageSize(d); err != nil {
		return err
	}
	return command(ctx, "mount", "-t", "xfs", "-o", p.Disks.MountOptions, d.Image, d.Dir)
}

// DisksDown unmounts what DisksUp mounted. The image stays, since the sealed images are in it; what is on a tmpfs is lost. It is
// idempotent.
func DisksDown(ctx context.Context, p *plan.Plan) error {
	var errs []error
	// Only our own mounts: the image on the disks folder, and the tmpfs that may hold it.
	for _, dir := range []string{p.Paths.Disks, p.Disks.Memory} {
		for dir != "" {
			n, err := mounts(dir)
			if err != nil {
				return fmt.Errorf("disks: %w", err)
			}
			if n == 0 {
				break
			}
			if dir == p.Paths.Disks {
				if ours, err := onOurImage(p); err != nil || !ours {
					return errors.Join(append(errs, err)...)
				}
			}
			if err := command(ctx, "umount", dir); err != nil {
				return fmt.Errorf("disks: %w", err)
			}
		}
	}
	if ram := p.Disks.Memory; ram != "" {
		if err := os.Remove(ram); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("disks: %w", err))
		}
	}
	return errors.Join(errs...)
}

// makeXFS creates the image if it does not exist, under a temporary name until it is complete. The image is sparse: size is what it may
// grow to; 0 means four fifths of the free space below it.
func makeXFS(ctx context.Context, path string, size int64) error {
	if _, err := os.Stat(path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if size == 0 {
		var st unix.Statfs_t
		if err := unix.Statfs(filepath.Dir(path), &st); err != nil {
			return fmt.Errorf("free space for %s: %w", path, err)
		}
		size = int64(st.Bavail) * st.Bsize / 5 * 4
	}
	if size < minXFS {
		return fmt.Errorf("%s would have %d MiB, but XFS needs 300; free some space, or set another state_dir", path, size>>20)
	}
	part := newImage(path)
	f, err := os.OpenFile(part, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(f.Truncate(size), f.Close())
	if err == nil {
		err = command(ctx, "mkfs.xfs", "-q", "-m", "reflink=1", "-L", "fleetingd", part)
	}
	if err == nil {
		err = flushFile(part)
	}
	if err == nil {
		err = os.Rename(part, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(part))
	}
	return state.SyncFolder(filepath.Dir(path))
}

func flushFile(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func imageSize(d *Disks) error {
	st, err := os.Stat(d.Image)
	if err != nil {
		return err
	}
	d.Size = st.Size()
	return nil
}

// command runs a program of the host. Its error has the command and what it said.
func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// mounts counts what is mounted on a folder (proc_pid_mountinfo(5)).
func mounts(dir string) (int, error) {
	n := 0
	err := eachMount(func(point, _ string) {
		if point == dir {
			n++
		}
	})
	return n, err
}

// onOurImage reports whether the uppermost mount on the disks folder is a loop device over our image.
func onOurImage(p *plan.Plan) (bool, error) {
	source := ""
	err := eachMount(func(point, src string) {
		if point == p.Paths.Disks {
			source = src
		}
	})
	if err != nil || !strings.HasPrefix(source, "/dev/loop") {
		return false, err
	}
	backing, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(source), "loop/backing_file"))
	if err != nil {
		return false, fmt.Errorf("what is behind %s: %w", source, err)
	}
	return strings.TrimSpace(string(backing)) == p.Disks.Image, nil
}

// eachMount goes through the mounts of this process, the uppermost last.
func eachMount(visit func(point, source string)) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		// 36 35 98:0 /root /point rw,… optional fields - xfs /dev/loop0 rw,…
		before, after, ok := strings.Cut(lines.Text(), " - ")
		head, tail := strings.Fields(before), strings.Fields(after)
		if ok && len(head) > 4 && len(tail) > 1 {
			visit(unescape.Replace(head[4]), unescape.Replace(tail[1]))
		}
	}
	return lines.Err()
}
