package image

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// bzImage packs a kernel as the kernel's build does: the boot sector, four sectors of setup code, some code, the payload.
func bzImage(payload []byte) []byte {
	const code = 16
	b := make([]byte, 5*512+code, 5*512+code+len(payload)+64)
	copy(b[headerMagic:], "HdrS")
	binary.LittleEndian.PutUint16(b[headerVersion:], 0x20f)
	binary.LittleEndian.PutUint32(b[payloadOffset:], code)
	binary.LittleEndian.PutUint32(b[payloadLength:], uint32(len(payload)))
	return append(append(b, payload...), make([]byte, 64)...)
}

func zstdPayload(tb testing.TB, kernel []byte) []byte {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		tb.Fatal(err)
	}
	return binary.LittleEndian.AppendUint32(w.EncodeAll(kernel, nil), uint32(len(kernel)))
}

func gzipPayload(tb testing.TB, kernel []byte) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(kernel); err != nil {
		tb.Fatal(err)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// note is an ELF note (elf(5)).
func note(owner string, kind uint32, desc []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(len(owner)+1))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(desc)))
	b = binary.LittleEndian.AppendUint32(b, kind)
	for _, part := range [][]byte{append([]byte(owner), 0), desc} {
		b = append(b, part...)
		b = append(b, make([]byte, -len(b)&3)...)
	}
	return b
}

// elfKernel is a 64-bit ELF executable with one segment of notes.
func elfKernel(machine uint16, notes ...[]byte) []byte {
	all := bytes.Join(notes, nil)
	b := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	b = binary.LittleEndian.AppendUint16(b, 2) // ET_EXEC
	b = binary.LittleEndian.AppendUint16(b, machine)
	b = binary.LittleEndian.AppendUint32(b, 1)
	b = binary.LittleEndian.AppendUint64(b, 0x1000000) // e_entry
	b = binary.LittleEndian.AppendUint64(b, 64)        // e_phoff
	b = binary.LittleEndian.AppendUint64(b, 0)
	b = binary.LittleEndian.AppendUint32(b, 0)
	for _, n := range []uint16{64, 56, 1, 64, 0, 0} { // e_ehsize, e_phentsize, e_phnum, e_shentsize, …
		b = binary.LittleEndian.AppendUint16(b, n)
	}
	b = binary.LittleEndian.AppendUint32(b, 4) // PT_NOTE
	b = binary.LittleEndian.AppendUint32(b, 4)
	for _, n := range []uint64{64 + 56, 0, 0, uint64(len(all)), uint64(len(all)), 4} { // p_offset, …
		b = binary.LittleEndian.AppendUint64(b, n)
	}
	return append(b, all...)
}

const amd64, arm64 = 62, 183 // EM_X86_64, EM_AARCH64

// pvhNotes are the notes of a Linux kernel: one of its own, Xen's name for it, and its entry point.
func pvhNotes() []byte {
	return bytes.Join([][]byte{note("Linux", 0x101, make([]byte, 27)), note("Xen", 6, []byte("linux\x00")),
		note("Xen", 18, make([]byte, 8))}, nil)
}

func TestVmlinux(t *testing.T) {
	kernel := elfKernel(amd64, pvhNotes())
	good := bzImage(zstdPayload(t, kernel))
	edit := func(at int, with ...byte) []byte {
		b := bytes.Clone(good)
		copy(b[at:], with)
		return b
	}
	for name, c := range map[string]struct {
		image []byte
		fail  string
	}{
		"zstd":                      {image: good},
		"gzip":                      {image: bzImage(gzipPayload(t, kernel))},
		"setup sectors unsaid":      {image: edit(setupSects, 0)}, // are four
		"empty":                     {fail: "not a bzImage"},
		"an ELF executable already": {image: kernel, fail: "not a bzImage"},
		"an old protocol":           {image: edit(headerVersion, 0x07, 0x02), fail: "not a bzImage"},
		"cut off":                   {image: good[:len(good)-100], fail: "its payload ends at"},
		"payload of 4 GiB":          {image: edit(payloadLength, 0xff, 0xff, 0xff, 0xff), fail: "its payload ends at"},
		"xz":                        {image: bzImage([]byte("\xfd7zXZ\x00 and so on")), fail: "neither zstd nor gzip"},
		"zstd, damaged":             {image: edit(5*512+16+8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff), fail: "unpack: "},
		"gzip, damaged":             {image: bzImage(gzipPayload(t, kernel)[:30]), fail: "unpack: "},
		"larger than it may be":     {image: bzImage(zstdPayload(t, make([]byte, maxUnpacked+1))), fail: "larger than 256 MiB"},
		"no ELF":                    {image: bzImage(zstdPayload(t, []byte("MZ"))), fail: "not an ELF"},
		"another architecture":      {image: bzImage(zstdPayload(t, elfKernel(arm64, pvhNotes()))), fail: "EM_AARCH64"},
		"no PVH":                    {image: bzImage(zstdPayload(t, elfKernel(amd64, note("Xen", 6, []byte("linux"))))), fail: "CONFIG_PVH"},
		"another's note 18":         {image: bzImage(zstdPayload(t, elfKernel(amd64, note("GNU", 18, make([]byte, 8))))), fail: "CONFIG_PVH"},
		"notes without end":         {image: bzImage(zstdPayload(t, elfKernel(amd64, pvhNotes(), make([]byte, maxNotes)))), fail: "CONFIG_PVH"},
		"notes cut off":             {image: bzImage(zstdPayload(t, elfKernel(amd64, pvhNotes()[:20]))), fail: "CONFIG_PVH"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := vmlinux(c.image)
			switch {
			case c.fail != "" && (err == nil || !strings.Contains(err.Error(), c.fail)):
				t.Errorf("error %v, want one with %q", err, c.fail)
			case c.fail == "" && err != nil:
				t.Error(err)
			case c.fail == "" && !bytes.Equal(got, kernel):
				t.Errorf("another kernel came out than went in")
			}
		})
	}
}

func FuzzVmlinux(f *testing.F) {
	kernel := elfKernel(amd64, pvhNotes())
	f.Add(bzImage(zstdPayload(f, kernel)), kernel)
	f.Add(bzImage(gzipPayload(f, kernel)), kernel[:100])
	f.Add(kernel, bzImage(nil))
	f.Fuzz(func(t *testing.T, image, elf []byte) {
		if kernel, err := vmlinux(image); err == nil && checkPVH(kernel) != nil {
			t.Error("a kernel that no VMM can start")
		}
		_ = checkPVH(elf) // most images do not come so far
	})
}
