package image

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Limits on the size of an unpacked kernel and of its notes, in bytes. Those of distributions have 60 MB, and about 500 bytes of notes.
const (
	maxUnpacked = 256 << 20
	maxNotes    = 64 << 10
)

// vmlinux returns the ELF executable in a bzImage, the form in which distributions ship x86 kernels: a program that unpacks the kernel and
// starts it, at every boot. Both drivers can start the executable directly at its PVH entry point
// (https://xenbits.xen.org/docs/unstable/misc/pvh.html). The price is KASLR, which the unpacking program does. It protects a kernel from
// the programs in its guest, and the only ones there belong to the job, which is root.
//
// An error says why the kernel cannot be started in this way. It does not quote data, which may come from a guest.
func vmlinux(bzImage []byte) ([]byte, error) {
	packed, err := payload(bzImage)
	if err != nil {
		return nil, err
	}
	kernel, err := unpack(packed)
	if err != nil {
		return nil, err
	}
	return kernel, checkPVH(kernel)
}

// Fields of the boot protocol's header (https://docs.kernel.org/arch/x86/boot.html).
const (
	setupSects    = 0x1f1 // u8, sectors of 512 bytes after the first
	headerMagic   = 0x202 // "HdrS"
	headerVersion = 0x206 // u16
	payloadOffset = 0x248 // u32, from the end of the setup code
	payloadLength = 0x24c // u32
	headerEnd     = 0x250
)

// payload returns the compressed kernel in a bzImage.
func payload(b []byte) ([]byte, error) {
	if len(b) < headerEnd || string(b[headerMagic:headerMagic+4]) != "HdrS" || binary.LittleEndian.Uint16(b[headerVersion:]) < 0x208 {
		return nil, errors.New("not a bzImage of boot protocol 2.08 or later")
	}
	sects := int64(b[setupSects])
	if sects == 0 {
		sects = 4
	}
	start := (1+sects)*512 + int64(binary.LittleEndian.Uint32(b[payloadOffset:]))
	end := start + int64(binary.LittleEndian.Uint32(b[payloadLength:]))
	if end > int64(len(b)) {
		return nil, fmt.Errorf("its payload ends at %d of %d bytes", end, len(b))
	}
	return b[start:end], nil
}

// unpack handles the two compressions that current distributions use. Kernels with another one stay as they are.
func unpack(packed []byte) ([]byte, error) {
	var from io.Reader
	switch {
	case bytes.HasPrefix(packed, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(bytes.NewReader(packed))
		if err != nil {
			return nil, fmt.Errorf("gzip: %w", err)
		}
		z.Multistream(false)
		from = z
	case bytes.HasPrefix(packed, []byte{0x28, 0xb5, 0x2f, 0xfd}) && len(packed) > 8:
		// The kernel's build appends the unpacked length (scripts/Makefile.lib, size_append), and compresses with a window of 128 MiB.
		z, err := zstd.NewReader(bytes.NewReader(packed[:len(packed)-4]), zstd.WithDecoderConcurrency(1),
			zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderMaxMemory(maxUnpacked))
		if err != nil {
			return nil, fmt.Errorf("zstd: %w", err)
		}
		defer z.Close()
		from = z
	default:
		return nil, errors.New("it is compressed with neither zstd nor gzip")
	}
	kernel, err := io.ReadAll(io.LimitReader(from, maxUnpacked+1))
	if err != nil {
		return nil, fmt.Errorf("unpack: %w", err)
	}
	if len(kernel) > maxUnpacked {
		return nil, fmt.Errorf("it is larger than %d MiB when unpacked", maxUnpacked>>20)
	}
	return kernel, nil
}

// checkPVH returns an error if a VMM cannot start the executable, because no note names an entry point.
func checkPVH(kernel []byte) error {
	f, err := elf.NewFile(bytes.NewReader(kernel))
	if err != nil {
		return errors.New("its payload is not an ELF executable")
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("its payload is for %v, %v", f.Machine, f.Class)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > maxNotes {
			continue
		}
		notes := make([]byte, p.Filesz)
		if _, err := p.ReadAt(notes, 0); err == nil && hasPVHNote(notes) {
			return nil
		}
	}
	return errors.New("it has no PVH entry point (CONFIG_PVH)")
}

// hasPVHNote looks for XEN_ELFNOTE_PHYS32_ENTRY (https://xenbits.xen.org/docs/unstable/hypercall/x86_64/include,public,elfnote.h.html)
// in a segment of notes (elf(5), "Notes").
func hasPVHNote(notes []byte) bool {
	const phys32Entry = 18
	for len(notes) >= 12 {
		name := int64(binary.LittleEndian.Uint32(notes))
		desc := int64(binary.LittleEndian.Uint32(notes[4:]))
		kind := binary.LittleEndian.Uint32(notes[8:])
		end := 12 + (name+3)&^3 + (desc+3)&^3
		if end > int64(len(notes)) {
			return false
		}
		if kind == phys32Entry && string(notes[12:12+name]) == "Xen\x00" && desc > 0 {
			return true
		}
		notes = notes[end:]
	}
	return false
}
