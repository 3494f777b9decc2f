package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
)

// The accepted formats of a source's disk.
const (
	formatRaw   = "raw"
	formatQcow2 = "qcow2"
)

// foreign lists the first bytes of files that are neither raw nor qcow2. A raw disk has no such mark, so these have to be excluded.
var foreign = []struct{ magic, name, cure string }{
	{"KDMV", "a VMDK image", "qemu-img convert -O qcow2"},
	{"# Disk DescriptorFile", "a VMDK image's descriptor", "qemu-img convert -O qcow2"},
	{"vhdxfile", "a VHDX image", "qemu-img convert -O qcow2"},
	{"conectix", "a VHD image", "qemu-img convert -O qcow2"},
	{"<<< ", "a VirtualBox image", "qemu-img convert -O qcow2"},
	{"\x1f\x8b", "compressed with gzip", "gunzip"},
	{"BZh", "compressed with bzip2", "bunzip2"},
	{"\xfd7zXZ\x00", "compressed with xz", "unxz"},
	{"\x28\xb5\x2f\xfd", "compressed with zstd", "unzstd"},
	{"<!DOCTYPE", "an HTML page", ""},
	{"<html", "an HTML page", ""},
}

// diskFormat tells raw from qcow2 by the header, and refuses other known formats. QEMU is never left to guess: it would take a raw disk
// into which a guest wrote a qcow2 header for qcow2, and open the backing file named there (CVE-2008-2004 and similar).
func diskFormat(r io.ReaderAt) (string, error) {
	header := make([]byte, 512)
	n, err := r.ReadAt(header, 0)
	if n < len(header) {
		if err == io.EOF {
			return "", fmt.Errorf("it has %d bytes, too few for a disk", n)
		}
		return "", err
	}
	if bytes.HasPrefix(header, []byte("QFI\xfb")) {
		return formatQcow2, checkQcow2(header)
	}
	for _, f := range foreign {
		if bytes.HasPrefix(header, []byte(f.magic)) {
			if f.cure == "" {
				return "", fmt.Errorf("it is %s; a disk must be raw or qcow2: open it in a browser to see what it says", f.name)
			}
			return "", fmt.Errorf("it is %s; a disk must be raw or qcow2: convert it with %s", f.name, f.cure)
		}
	}
	return formatRaw, nil
}

// checkQcow2 refuses an image that needs other files or a key (https://www.qemu.org/docs/master/interop/qcow2.html, "Header").
func checkQcow2(header []byte) error {
	version := binary.BigEndian.Uint32(header[4:])
	if version != 2 && version != 3 {
		return fmt.Errorf("it is a qcow2 image of version %d; only 2 and 3 are supported", version)
	}
	if binary.BigEndian.Uint64(header[8:]) != 0 {
		return errors.New("it is a qcow2 image with a backing file, which could be any file on this host; " +
			"`qemu-img convert -O qcow2` makes one that stands alone")
	}
	if binary.BigEndian.Uint32(header[32:]) != 0 {
		return errors.New("it is an encrypted qcow2 image; decrypt it with `qemu-img convert -O qcow2`")
	}
	const externalData = 1 << 2 // incompatible_features, bit 2
	if version == 3 && binary.BigEndian.Uint64(header[72:])&externalData != 0 {
		return errors.New("it is a qcow2 image with an external data file, which could be any file on this host; " +
			"`qemu-img convert -O qcow2` makes one that stands alone")
	}
	return nil
}

// convert makes dst, which must not exist, a raw, sparse copy of src.
func convert(ctx context.Context, src, dst string) (err error) {
	format, err := probeFile(src)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(dst)
		}
	}()
	if format == formatRaw {
		if err := reflink(src, dst, 0o600); err == nil {
			return nil
		} // on another file system it takes a real copy, once
	}
	if _, err := exec.LookPath("qemu-img"); err != nil {
		return fmt.Errorf("convert %s to a raw disk: qemu-img is not on PATH; install it with: apt-get install qemu-utils", src)
	}
	return command(ctx, nil, "qemu-img", "convert", "-f", format, "-O", "raw", "--", src, dst)
}

func probeFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	format, err := diskFormat(f)
	if err != nil {
		return "", fmt.Errorf("disk %s: %w", path, err)
	}
	return format, nil
}

// rootArg finds the root file system of a raw disk and returns the kernel's argument for it. A partition is named by its PARTUUID, which
// the kernel can resolve without an initrd, and which stays the same when the partition grows.
func rootArg(disk io.ReaderAt) (string, error) {
	if fs := fileSystemAt(disk, 0); fs != "" {
		return "root=/dev/vda" + rootFlags(fs), nil
	}
	if p, err := gptRoot(disk); err != nil || p.id != "" {
		return "root=PARTUUID=" + p.id + rootFlags(p.fs), err
	}
	if p := mbrRoot(disk); p.id != "" {
		return "root=PARTUUID=" + p.id + rootFlags(p.fs), nil
	}
	return "", errors.New("it has no Linux file system (ext4, XFS or btrfs), neither directly nor in a GPT or MBR partition; " +
		"if it boots nevertheless, set `cmdline`")
}

// rootFlags returns the mount options of a worker's root. Without them each clone would initialize the inode tables that mke2fs left
// uninitialized, in the background of its job (ext4(5), init_itable).
func rootFlags(fs string) string {
	if fs == "ext4" {
		return " rootflags=noinit_itable"
	}
	return ""
}

// partition is a partition with a Linux file system.
type partition struct {
	id   string // PARTUUID, as the kernel writes it; "" for none
	fs   string
	size uint64 // in sectors, minus one
}

// fileSystemAt returns the name of the file system at an offset, by its magic number, or "" if none is recognized.
func fileSystemAt(disk io.ReaderAt, at int64) string {
	for _, fs := range []struct {
		name   string
		offset int64
		magic  string
	}{
		{"ext4", 1024 + 0x38, "\x53\xef"}, // s_magic, also of ext2 and ext3
		{"xfs", 0, "XFSB"},                // sb_magicnum
		{"btrfs", 64<<10 + 0x40, "_BHRfS_M"},
	} {
		got := make([]byte, len(fs.magic))
		if _, err := disk.ReadAt(got, at+fs.offset); err == nil && string(got) == fs.magic {
			return fs.name
		}
	}
	return ""
}

const sectorSize = 512 // of a virtio disk

// GPT's partition types for a root file system
// (https://uapi-group.org/specifications/specs/discoverable_partitions_specification/).
var rootTypes = map[string]bool{
	"4f68bce3-e8cd-4db1-96e7-fbcaf984b709": true, // root, amd64
	"b921b045-1df0-41c3-af44-4c6f280d3fae": true, // root, arm64
	"72ec70a6-cf74-40e6-bd49-4bda08e8f224": true, // root, riscv64
	"0fc63daf-8483-4772-8e79-3d69d8477de4": true, // Linux data, which most images use
}

// gptRoot returns the largest Linux partition with a file system; its id is "" if there is no GPT (UEFI specification, 5.3).
func gptRoot(disk io.ReaderAt) (partition, error) {
	header := make([]byte, 92)
	if _, err := disk.ReadAt(header, sectorSize); err != nil || string(header[:8]) != "EFI PART" {
		return partition{}, nil
	}
	table := binary.LittleEndian.Uint64(header[72:])
	count := binary.LittleEndian.Uint32(header[80:])
	size := binary.LittleEndian.Uint32(header[84:])
	if count > 1024 || size < 128 || size > 4096 || table > 1<<32 {
		return partition{}, errors.New("its GPT is damaged: sgdisk --verify shows how")
	}
	var best partition
	entry := make([]byte, 128)
	for i := range int64(count) {
		if _, err := disk.ReadAt(entry, int64(table)*sectorSize+i*int64(size)); err != nil {
			break // the rest is beyond the end of the disk
		}
		first, last := binary.LittleEndian.Uint64(entry[32:]), binary.LittleEndian.Uint64(entry[40:])
		if !rootTypes[guid(entry)] || first > last || last > 1<<50 || last-first < best.size {
			continue
		}
		if fs := fileSystemAt(disk, int64(first)*sectorSize); fs != "" {
			best = partition{guid(entry[16:]), fs, last - first}
		}
	}
	if best.id == "" {
		return best, errors.New("its GPT has no Linux partition with a file system; " +
			"if it boots nevertheless, set `cmdline`")
	}
	return best, nil
}

// guid formats a GUID in the usual way; its first three fields are little-endian (UEFI specification, appendix A).
func guid(b []byte) string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint16(b[4:]),
		binary.LittleEndian.Uint16(b[6:]), b[8:10], b[10:16])
}

// mbrRoot returns the largest Linux partition of an MBR. The kernel makes up its PARTUUID: disk signature, dash, number.
func mbrRoot(disk io.ReaderAt) (best partition) {
	sector := make([]byte, sectorSize)
	if _, err := disk.ReadAt(sector, 0); err != nil || sector[510] != 0x55 || sector[511] != 0xaa {
		return best
	}
	for i := range 4 {
		entry := sector[446+16*i:]
		first, size := binary.LittleEndian.Uint32(entry[8:]), binary.LittleEndian.Uint32(entry[12:])
		const linux = 0x83
		if entry[4] != linux || uint64(size) < best.size+1 {
			continue
		}
		if fs := fileSystemAt(disk, int64(first)*sectorSize); fs != "" {
			id := fmt.Sprintf("%08x-%02x", binary.LittleEndian.Uint32(sector[440:]), i+1)
			best = partition{id, fs, uint64(size) - 1}
		}
	}
	return best
}

// cmdline returns the kernel command line of an image whose spec has none. The driver adds the console and the behaviour on a panic.
func cmdline(root string) string { return root + " rw quiet" }
