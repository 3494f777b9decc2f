package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Clone makes dst, which must not exist, a clone of the sealed disk with mode 0600, grown to size bytes. The two share their blocks
// (FICLONE, ioctl_ficlone(2)), so the size does not matter for the time it takes. Clone never copies: if the file system cannot clone, it
// returns an error and leaves no dst.
func (s *Store) Clone(ctx context.Context, img *Sealed, dst string, size int64) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return cloneDisk(img.Disk, dst, size)
}

func cloneDisk(src, dst string, size int64) (err error) {
	if err := reflink(src, dst, 0o600); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(dst))
		}
	}()
	have := fileSize(dst)
	if have > size {
		return fmt.Errorf("clone %s to %s: the image's disk is %s, the pool's only %s; a disk can grow but not shrink: "+
			"make the pool's disk larger", src, dst, bytesText(have), bytesText(size))
	}
	return os.Truncate(dst, size)
}

// reflink makes dst, which must not exist, share the blocks of src.
func reflink(src, dst string, mode os.FileMode) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return fmt.Errorf("clone: %w", err)
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return fmt.Errorf("clone: %w", err)
	}
	defer func() {
		if err = errors.Join(err, out.Close()); err != nil {
			err = errors.Join(err, os.Remove(dst))
		}
	}()
	if err := unix.IoctlFileClone(int(out.Fd()), int(in.Fd())); err != nil {
		return cloneError(src, dst, err)
	}
	return nil
}

// cloneError explains why FICLONE failed and what to do.
func cloneError(src, dst string, err error) error {
	switch {
	case errors.Is(err, unix.EXDEV):
		return fmt.Errorf("clone %s to %s: a clone shares blocks with its image, but they are on different file systems: "+
			"keep `disks` and the images on the same one (FICLONE: %w)", src, dst, err)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOTTY),
		errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("clone %s to %s: its file system (%s) cannot clone files, and fleetingd never makes a full copy: "+
			"use XFS (mkfs.xfs -m reflink=1) or btrfs, or let fleetingd make one: "+
			"disks { backing = \"xfs-image\" } (FICLONE: %w)",
			src, dst, fileSystem(filepath.Dir(dst)), err)
	default: // ENOSPC, EDQUOT and EIO need no explanation
		return fmt.Errorf("clone %s to %s: %w", src, dst, err)
	}
}

// CanClone tries to clone a small file of its own in dir. The error says why files there cannot be cloned, and what to do.
func CanClone(dir string) (err error) {
	f, err := os.CreateTemp(dir, ".can-clone-*")
	if err != nil {
		return fmt.Errorf("try to clone a file: %w", err)
	}
	clone := f.Name() + ".clone"
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	_, err = f.Write(make([]byte, 4096)) // cloning an empty file can succeed even if no other can be cloned
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("try to clone a file: %w", err)
	}
	if err := reflink(f.Name(), clone, 0o600); err != nil {
		return err
	}
	return os.Remove(clone)
}

// fileSystems names the values of statfs(2)'s f_type that are common for disks of a Linux host.
var fileSystems = map[int64]string{
	unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "XFS without reflink", unix.BTRFS_SUPER_MAGIC: "btrfs",
	unix.TMPFS_MAGIC: "tmpfs", unix.OVERLAYFS_SUPER_MAGIC: "overlayfs", unix.NFS_SUPER_MAGIC: "NFS",
	unix.F2FS_SUPER_MAGIC: "F2FS", 0x2fc12fc1: "ZFS",
}

func fileSystem(dir string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "of unknown type"
	}
	if name, ok := fileSystems[int64(st.Type)]; ok {
		return name
	}
	return fmt.Sprintf("type %#x", st.Type)
}

// bytesText formats a size for people: "30 GiB".
func bytesText(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	v, u := float64(n), 0
	for v >= 1024 && u < len(units)-1 {
		v, u = v/1024, u+1
	}
	return fmt.Sprintf("%.4g %s", v, units[u])
}
