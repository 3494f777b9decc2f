package guest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// growRoot makes the root file system as large as its disk: a pool's disk may be larger than the image's.
// If they are the same size, it costs a stat and a read. It supports ext4; other file systems only grow if cloud-init is kept.
func growRoot(ctx context.Context) error {
	var st unix.Stat_t
	if err := unix.Stat("/", &st); err != nil {
		return fmt.Errorf("stat /: %w", err)
	}
	sys, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if errors.Is(err, os.ErrNotExist) {
		return nil // not on a disk of its own: btrfs, overlayfs
	}
	if err != nil {
		return err
	}
	if err := growPartition(ctx, sys); err != nil {
		return err
	}
	sectors, err := readNumber(filepath.Join(sys, "size"))
	if err != nil {
		return err
	}
	return growExt4("/", "/dev/"+filepath.Base(sys), sectors*512) // sysfs counts units of 512 bytes, whatever the disk's sector size
}

// growPartition extends a partition to the end of its disk. sys is its folder in sysfs.
func growPartition(ctx context.Context, sys string) error {
	number, err := os.ReadFile(filepath.Join(sys, "partition"))
	if errors.Is(err, os.ErrNotExist) {
		return nil // a whole disk
	}
	if err != nil {
		return err
	}
	disk := filepath.Dir(sys)
	var n [3]int64
	for i, f := range []string{filepath.Join(disk, "size"), filepath.Join(sys, "start"), filepath.Join(sys, "size")} {
		if n[i], err = readNumber(f); err != nil {
			return err
		}
	}
	const mib = 2048 // sectors: for GPT's backup and alignment
	if n[0]-n[1]-n[2] <= mib || !onPath("growpart") {
		return nil
	}
	_, err = capture(ctx, "growpart", "/dev/"+filepath.Base(disk), strings.TrimSpace(string(number)))
	return err
}

func readNumber(path string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

// ext4Resize is EXT4_IOC_RESIZE_FS (linux/fs/ext4/ext4.h: _IOW('f', 16, __u64)), which is how resize2fs resizes
// a mounted file system.
const ext4Resize = 0x40086610

// growExt4 grows the ext4 file system that is mounted at mount from the device dev to size bytes.
func growExt4(mount, dev string, size int64) error {
	d, err := os.Open(dev)
	if err != nil {
		return err
	}
	defer d.Close()
	blocks, blockSize, ok := ext4Size(d)
	if !ok || blocks < 0 || size/blockSize <= blocks {
		return nil
	}
	m, err := os.Open(mount)
	if err != nil {
		return err
	}
	defer m.Close()
	want := uint64(size / blockSize)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, m.Fd(), ext4Resize, uintptr(unsafe.Pointer(&want))); errno != 0 {
		return fmt.Errorf("grow the file system on %s from %d to %d blocks of %d bytes: %w", dev, blocks, want, blockSize, errno)
	}
	return nil
}

// ext4Size reads a superblock (Documentation/filesystems/ext4/super.rst); ok is false for any other file system.
func ext4Size(r io.ReaderAt) (blocks, blockSize int64, ok bool) {
	sb := make([]byte, 1024)
	if _, err := r.ReadAt(sb, 1024); err != nil || binary.LittleEndian.Uint16(sb[0x38:]) != 0xef53 {
		return 0, 0, false
	}
	shift := binary.LittleEndian.Uint32(sb[0x18:]) // s_log_block_size, of 1 KiB
	if shift > 6 {
		return 0, 0, false
	}
	const has64bit = 0x80
	blocks = int64(binary.LittleEndian.Uint32(sb[0x4:]))
	if binary.LittleEndian.Uint32(sb[0x60:])&has64bit != 0 {
		blocks |= int64(binary.LittleEndian.Uint32(sb[0x150:])) << 32
	}
	return blocks, 1024 << shift, true
}
