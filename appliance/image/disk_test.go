package image

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/need"
)

// disk returns a raw disk with some bytes set.
func disk(size int, set map[int]string) []byte {
	b := make([]byte, size)
	for at, s := range set {
		copy(b[at:], s)
	}
	return b
}

func le(v any) string {
	var b bytes.Buffer
	binary.Write(&b, binary.LittleEndian, v)
	return b.String()
}

const (
	ext4Magic = 1024 + 0x38
	mib       = 1 << 20
)

// gpt returns a disk with partitions, each with or without an ext4 magic number at its first sector.
func gpt(parts []gptPart) []byte {
	b := disk(8*mib, map[int]string{512: "EFI PART", 512 + 72: le(uint64(2)), 512 + 80: le(uint32(128)), 512 + 84: le(uint32(128))})
	for i, p := range parts {
		entry := b[2*512+128*i:]
		copy(entry, p.kind)
		copy(entry[16:], "\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f"+string(rune('0'+i)))
		copy(entry[32:], le(p.first)+le(p.last))
		if p.ext4 {
			copy(b[int(p.first)*512+ext4Magic:], "\x53\xef")
		}
	}
	return b
}

type gptPart struct {
	kind        string
	first, last uint64
	ext4        bool
}

const (
	linuxType = "\xaf\x3d\xc6\x0f\x83\x84\x72\x47\x8e\x79\x3d\x69\xd8\x47\x7d\xe4"
	efiType   = "\x28\x73\x2a\xc1\x1f\xf8\xd2\x11\xba\x4b\x00\xa0\xc9\x3e\xc9\x3b"
)

func TestRootArg(t *testing.T) {
	mbr := disk(4*mib, map[int]string{
		440: "\x78\x56\x34\x12", 446 + 4: "\x83", 446 + 8: le(uint32(2048)), 446 + 12: le(uint32(4096)), 510: "\x55\xaa",
		2048*512 + ext4Magic: "\x53\xef",
	})
	for name, c := range map[string]struct {
		disk       []byte
		want, fail string
	}{
		"ext4 without partitions": {disk: disk(mib, map[int]string{ext4Magic: "\x53\xef"}), want: "root=/dev/vda rootflags=noinit_itable"},
		"xfs":                     {disk: disk(mib, map[int]string{0: "XFSB"}), want: "root=/dev/vda"},
		"mbr":                     {disk: mbr, want: "root=PARTUUID=12345678-01 rootflags=noinit_itable"},
		"gpt, the largest": {disk: gpt([]gptPart{{efiType, 34, 2000, true}, {linuxType, 2048, 4095, true}, {linuxType, 4096, 12000, true}}),
			want: "root=PARTUUID=04030201-0605-0807-090a-0b0c0d0e0f32 rootflags=noinit_itable"},
		"gpt, nothing for Linux": {disk: gpt([]gptPart{{efiType, 34, 2000, true}, {linuxType, 2048, 4095, false}}), fail: "no Linux partition"},
		"gpt, damaged":           {disk: disk(mib, map[int]string{512: "EFI PART", 512 + 84: le(uint32(1 << 30))}), fail: "damaged"},
		"nothing":                {disk: disk(mib, nil), fail: "cmdline"},
		"empty":                  {disk: nil, fail: "neither"},
	} {
		got, err := rootArg(bytes.NewReader(c.disk))
		if c.fail != "" {
			if err == nil || !strings.Contains(err.Error(), c.fail) {
				t.Errorf("%s: %q, %v; want an error with %q", name, got, err, c.fail)
			}
		} else if err != nil || got != c.want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.want)
		}
	}
}

func TestDiskFormat(t *testing.T) {
	qcow2 := func(set map[int]string) []byte {
		b := disk(1024, map[int]string{0: "QFI\xfb", 4: "\x00\x00\x00\x03"})
		for at, s := range set {
			copy(b[at:], s)
		}
		return b
	}
	for name, c := range map[string]struct {
		disk       []byte
		want, fail string
	}{
		"raw":               {disk: disk(1024, nil), want: "raw"},
		"qcow2":             {disk: qcow2(nil), want: "qcow2"},
		"backing file":      {disk: qcow2(map[int]string{15: "\x68"}), fail: "backing file"},
		"data file":         {disk: qcow2(map[int]string{79: "\x04"}), fail: "external data file"},
		"encrypted":         {disk: qcow2(map[int]string{35: "\x02"}), fail: "encrypted"},
		"a later version":   {disk: qcow2(map[int]string{4: "\x00\x00\x00\x09"}), fail: "version 9"},
		"vmdk":              {disk: disk(1024, map[int]string{0: "KDMV"}), fail: "VMDK"},
		"gzip":              {disk: disk(1024, map[int]string{0: "\x1f\x8b\x08"}), fail: "gunzip"},
		"the server's page": {disk: disk(1024, map[int]string{0: "<!DOCTYPE html>"}), fail: "HTML"},
		"small":             {disk: []byte("x"), fail: "too few for a disk"},
	} {
		got, err := diskFormat(bytes.NewReader(c.disk))
		if c.fail != "" {
			if err == nil || !strings.Contains(err.Error(), c.fail) {
				t.Errorf("%s: %q, %v; want an error with %q", name, got, err, c.fail)
			}
		} else if err != nil || got != c.want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, c.want)
		}
	}
}

// sparseReader is a hostile disk: a few bytes at its start, and zeros without end.
type sparseReader []byte

func (s sparseReader) ReadAt(p []byte, at int64) (int, error) {
	if at < 0 {
		return 0, io.ErrUnexpectedEOF
	}
	clear(p)
	if at < int64(len(s)) {
		copy(p, s[at:])
	}
	return len(p), nil
}

func FuzzDisk(f *testing.F) {
	f.Add(disk(2048, map[int]string{ext4Magic: "\x53\xef"}))
	f.Add(gpt([]gptPart{{linuxType, 34, 40, true}})[:64<<10])
	f.Add(disk(1024, map[int]string{0: "QFI\xfb", 4: "\x00\x00\x00\x03"}))
	f.Add(disk(1024, map[int]string{446 + 4: "\x83", 446 + 8: le(uint32(1)), 510: "\x55\xaa"}))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, r := range []io.ReaderAt{bytes.NewReader(b), sparseReader(b)} {
			if arg, err := rootArg(r); err == nil && (!strings.HasPrefix(arg, "root=") || strings.ContainsAny(arg, "\x00\n\"")) {
				t.Fatalf("root argument %q", arg)
			}
			if format, err := diskFormat(r); err == nil && format != formatRaw && format != formatQcow2 {
				t.Fatalf("format %q", format)
			}
		}
	})
}

// What real tools write is read correctly.
func TestRealDisks(t *testing.T) {
	need.Tools(t, "qemu-img", "mke2fs", "sfdisk")
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	do := func(stdin, name string, args ...string) {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Stdin = strings.NewReader(stdin)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
		}
	}
	do("", "mke2fs", "-q", "-t", "ext4", at("plain.raw"), "8M")
	do("", "qemu-img", "convert", "-f", "raw", "-O", "qcow2", at("plain.raw"), at("plain.qcow2"))
	do("", "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", at("plain.qcow2"), at("backed.qcow2"))

	if err := convert(t.Context(), at("plain.qcow2"), at("out.raw")); err != nil {
		t.Fatal(err)
	}
	plain, err1 := os.ReadFile(at("plain.raw"))
	out, err2 := os.ReadFile(at("out.raw"))
	if err1 != nil || err2 != nil || !bytes.Equal(plain, out) {
		t.Errorf("the disk is another one after qcow2 and back (%v, %v)", err1, err2)
	}
	if err := convert(t.Context(), at("backed.qcow2"), at("none.raw")); err == nil || !strings.Contains(err.Error(), "backing file") {
		t.Errorf("a backing file is taken: %v", err)
	}
	if _, err := os.Stat(at("none.raw")); err == nil {
		t.Error("a refused disk left a file")
	}

	if err := os.WriteFile(at("gpt.raw"), make([]byte, 32*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	do("label: gpt\nsize=1MiB, type=U\ntype=L, uuid=11223344-5566-7788-99AA-BBCCDDEEFF00\n", "sfdisk", "-q", at("gpt.raw"))
	do("", "mke2fs", "-q", "-t", "ext4", "-E", "offset=2097152", at("gpt.raw"), "20M")
	f, err := os.Open(at("gpt.raw"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := rootArg(f)
	if want := "root=PARTUUID=11223344-5566-7788-99aa-bbccddeeff00 rootflags=noinit_itable"; err != nil || got != want {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}
