package host

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// KindDiskImage is the kind of the door that Tree.DiskImages returns.
const KindDiskImage Kind = "disk-image"

// ErrCannotShrink is the answer to a Write of a smaller size: XFS cannot shrink, and clones lie in the image. It stays as it is, sparse, so it
// takes no more space for being larger.
var ErrCannotShrink = errors.New("XFS cannot shrink, so the image keeps its size; it is sparse and takes only the space in use")

// SettleDisks decides what a spec's disks are on this host, before it is compiled: the backing, which is never "auto" then, and the size of
// the image in bytes. An image that exists is used, with its own size if the spec gives none. Else backing "auto" is "directory" if canClone
// finds nothing against the state folder (or, if it does not exist, the closest folder above it), and "xfs-image" if it does. The default
// size is four fifths of the free space, in whole GiB. An image smaller than it is now is an error: it is never made anew over its clones.
func SettleDisks(stateDir, backing string, size int64, canClone func(dir string) error) (string, int64, error) {
	if backing != "auto" && backing != "xfs-image" {
		return backing, size, nil
	}
	image := plan.NewDisks(stateDir, "xfs-image", size).Image
	fi, err := os.Lstat(image)
	switch {
	case err == nil && size == 0:
		return "xfs-image", fi.Size(), nil
	case err == nil && size < fi.Size():
		return "", 0, fmt.Errorf("disks: size is %s, but %s has %s already: %w; write size = %q or more", gibs(size), image, gibs(fi.Size()),
			ErrCannotShrink, gibs(fi.Size()))
	case err == nil:
		return "xfs-image", size, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", 0, fmt.Errorf("disks: %w", err)
	}
	there, err := realMachine().existing(filepath.Join(stateDir, "disks"))
	if err != nil {
		return "", 0, fmt.Errorf("disks: %w", err)
	}
	if backing == "auto" && canClone(there) == nil {
		return "directory", 0, nil
	}
	if size == 0 {
		free, err := freeSpace(there)
		if err != nil {
			return "", 0, fmt.Errorf("disks: %w", err)
		}
		if size = free / 5 * 4 / gib * gib; size == 0 {
			return "", 0, fmt.Errorf("disks: %s has only %d MiB free, too little for the workers' disks; free some space, or write another state_dir",
				there, free>>20)
		}
	}
	return "xfs-image", size, nil
}

// gibs is a size as a spec has it.
func gibs(size int64) string {
	for _, u := range []struct {
		bytes int64
		name  string
	}{{gib, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if size%u.bytes == 0 {
			return strconv.FormatInt(size/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(size, 10) + "B"
}

// DiskImages returns the door to XFS images, named by their paths. An image's State has its "size" in bytes. It is made sparse, grows while it
// is mounted, never shrinks (ErrCannotShrink), and is not removed while it is in use.
func (t *Tree) DiskImages() Door { return diskImages{t} }

type diskImages struct{ *Tree }

func (d diskImages) Read(_ context.Context, names []string) (map[string]State, error) {
	return eachName(KindDiskImage, names, func(name string) (State, error) {
		size, err := d.size(name)
		if err != nil || size == 0 {
			return nil, err
		}
		return State{"size": strconv.FormatInt(size, 10)}, nil
	})
}

// smallestGroup is the least that XFS adds when it grows, in bytes (XFS_MIN_AG_BYTES): what is left beyond that at an image's end stays unused.
const smallestGroup = 16 << 20

// size is the image's size, or its file system's if a crash kept that from growing; 0 if there is no image.
func (d diskImages) size(name string) (int64, error) {
	at, err := d.openAbove(name, trust{})
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer at.Close()
	fi, err := at.regular(filepath.Base(name))
	if err != nil || fi == nil {
		return 0, err
	}
	xfs, err := d.xfsSize(at, name)
	if errors.Is(err, fs.ErrPermission) {
		return fi.Size(), nil // only root sees into it
	}
	if err != nil {
		return 0, err
	}
	if xfs > fi.Size()-smallestGroup {
		return fi.Size(), nil
	}
	return xfs, nil
}

// xfsSize is the size of the file system in an image, in bytes: of a mounted one the kernel knows it, else the superblock
// (struct xfs_dsb in the kernel's fs/xfs/libxfs/xfs_format.h).
func (d diskImages) xfsSize(at *folder, name string) (int64, error) {
	loops, err := loopsOver(d.onHost(name))
	if err != nil {
		return 0, err
	}
	for _, l := range loops {
		if l.mount != "" {
			return mountedXFS(l.mount)
		}
	}
	f, err := at.Open(filepath.Base(name))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var head struct {
		Magic     [4]byte
		BlockSize uint32
		Blocks    uint64
	}
	err = binary.Read(f, binary.BigEndian, &head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return 0, err
	}
	if string(head.Magic[:]) != "XFSB" || head.Blocks > 1<<48 {
		return 0, errors.New("it is not an XFS image, so fleetingd did not make it; move it away")
	}
	return int64(head.Blocks) * int64(head.BlockSize), nil
}

// mountedXFS asks the kernel (XFS_IOC_FSGEOMETRY_V1 in its fs/xfs/libxfs/xfs_fs.h).
func mountedXFS(dir string) (int64, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var geometry struct {
		blockSize uint32
		_         [7]uint32
		blocks    uint64
		_         [9]uint64
	}
	const get = 2<<30 | unsafe.Sizeof(geometry)<<16 | 'X'<<8 | 100
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), get, uintptr(unsafe.Pointer(&geometry))); errno != 0 {
		return 0, &fs.PathError{Op: "XFS_IOC_FSGEOMETRY", Path: dir, Err: errno}
	}
	return int64(geometry.blocks) * int64(geometry.blockSize), nil
}

// loopOver is a loop device over an image, and where it is mounted; "" if it is not.
type loopOver struct{ device, mount string }

func loopsOver(image string) ([]loopOver, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var loops []loopOver
	for _, f := range files {
		backing, err := os.ReadFile(f)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) {
			continue // it was released meanwhile
		}
		if err != nil {
			return nil, err
		}
		if strings.TrimSuffix(string(backing), "\n") != image {
			continue
		}
		l := loopOver{device: "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(f)))}
		if err := eachMount(func(point, source string) {
			if source == l.device {
				l.mount = point
			}
		}); err != nil {
			return nil, err
		}
		loops = append(loops, l)
	}
	return loops, nil
}

func (d diskImages) Write(ctx context.Context, name string, want State) error {
	return named(KindDiskImage, name, d.write(ctx, name, want))
}

func (d diskImages) write(ctx context.Context, name string, want State) error {
	have, err := d.size(name)
	if err != nil {
		return err
	}
	if want == nil {
		return d.remove(name)
	}
	if err := onlyKeys(want, "size"); err != nil {
		return err
	}
	size, err := strconv.ParseInt(want["size"], 10, 64)
	if err != nil {
		return fmt.Errorf("size %q is not a number of bytes", want["size"])
	}
	at, err := d.openAbove(name, trust{write: true, make: true})
	if err != nil {
		return err
	}
	defer at.Close()
	switch {
	case have == 0:
		return makeXFS(ctx, d.onHost(name), size)
	case size < have:
		return fmt.Errorf("%s to %s: %w", gibs(have), gibs(size), ErrCannotShrink)
	case size > have:
		return d.grow(ctx, at, name, size)
	}
	return nil
}

// grow makes the file larger, then the loop device, then the file system. Each of them may have been done before a crash.
func (d diskImages) grow(ctx context.Context, at *folder, name string, size int64) error {
	f, err := at.OpenFile(filepath.Base(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(size), f.Sync(), f.Close()); err != nil {
		return err
	}
	loops, err := loopsOver(d.onHost(name))
	if err != nil {
		return err
	}
	for _, l := range loops {
		if err := command(ctx, "losetup", "--set-capacity", l.device); err != nil {
			return err
		}
		if l.mount != "" {
			return command(ctx, "xfs_growfs", "-d", l.mount)
		}
	}
	return growUnmounted(ctx, d.onHost(name))
}

// growUnmounted mounts an image for as long as it takes to grow what is in it.
func growUnmounted(ctx context.Context, image string) error {
	dir, err := os.MkdirTemp("", "fleetingd-grow-")
	if err != nil {
		return err
	}
	if err := command(ctx, "mount", "-t", "xfs", "-o", "loop,nodev,nosuid,noexec", image, dir); err != nil {
		return errors.Join(err, os.Remove(dir))
	}
	err = command(ctx, "xfs_growfs", "-d", dir)
	err = errors.Join(err, command(context.WithoutCancel(ctx), "umount", dir))
	return errors.Join(err, os.Remove(dir))
}

func (d diskImages) remove(name string) error {
	loops, err := loopsOver(d.onHost(name))
	if err != nil {
		return err
	}
	for _, l := range loops {
		if l.mount != "" {
			return fmt.Errorf("it is in use: %s is mounted on %s", l.device, l.mount)
		}
	}
	if err := gone(os.Remove(d.onHost(newImage(name)))); err != nil {
		return err
	}
	return d.removeFile(name)
}

// newImage is the name under which an image is made.
func newImage(path string) string { return path + ".new" }
