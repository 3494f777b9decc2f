package seed_test

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/seed"
)

func worker() seed.Seed {
	return seed.Seed{
		InstanceID: "small-7",
		Hostname:   "small-7",
		Network: &seed.Network{
			MAC:       "02:fd:00:00:00:02",
			Addresses: []netip.Addr{netip.MustParseAddr("172.16.120.2"), netip.MustParseAddr("fd7e:1ee7::2")},
			Gateways:  []netip.Addr{netip.MustParseAddr("172.16.120.1"), netip.MustParseAddr("fd7e:1ee7::1")},
			DNS:       []netip.Addr{netip.MustParseAddr("1.1.1.3")},
			MTU:       1500,
		},
		Users: []seed.User{{Name: "ubuntu", AuthorizedKeys: []string{"ssh-ed25519 AAAA job"}}},
		WriteFiles: []seed.File{
			{Path: "/etc/odd", Content: "a: b # \"c\"\n\t- 'd'\x00\xff{{ e }}\n", Mode: "0644"},
		},
		RunCmd: [][]string{{"sh", "-c", "echo \"$HOME\" '&&' : yes"}},
	}
}

func iso(t testing.TB, s seed.Seed) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := s.WriteISO(&b); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestISOComesBack(t *testing.T) {
	want := worker()
	want.WriteFiles[0].Content = "a: b # \"c\"\n\t- 'd'\x00{{ e }}\n" // JSON carries UTF-8 only
	got, err := seed.ReadISO(bytes.NewReader(iso(t, want)))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); d != "" {
		t.Errorf("the seed came back other than it went (-want +got):\n%s", d)
	}
}

// TestISOUnderLinux mounts the ISO: cloud-init opens the files by these names.
func TestISOUnderLinux(t *testing.T) {
	need.Root(t)
	need.Tools(t, "losetup", "blkid", "mount")
	s := worker()
	s.Extra = map[string][]byte{"fleetingd": bytes.Repeat([]byte("guest"), 100_000)}
	file := filepath.Join(t.TempDir(), "seed.iso")
	if err := s.ISOFile(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "blkid", "-p", "-o", "value", "-s", "LABEL", file).Output(); err != nil ||
		string(out) != "cidata\n" {
		t.Errorf("blkid finds the label %q (%v), want cidata", out, err)
	}
	dir := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "mount", "-o", "ro,loop", "-t", "iso9660", file, dir).CombinedOutput(); err != nil {
		t.Skipf("skipped: this kernel does not mount ISO 9660 images: %s", out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	want := []string{"fleetingd", "fleetingd.json", "meta-data", "network-config", "user-data"}
	if !slices.Equal(names, want) {
		t.Errorf("Linux shows %q, want %q", names, want)
	}
	got, err := os.ReadFile(filepath.Join(dir, "fleetingd"))
	if err != nil || !bytes.Equal(got, s.Extra["fleetingd"]) {
		t.Errorf("the guest binary comes back as %d bytes (%v), want %d", len(got), err, len(s.Extra["fleetingd"]))
	}
}

func TestISOIsTheSameLater(t *testing.T) {
	s := worker()
	first := iso(t, s)
	// The library's clock has a resolution of 10 ms.
	for start := time.Now(); time.Since(start) < 15*time.Millisecond; {
	}
	if !bytes.Equal(first, iso(t, s)) {
		t.Error("two ISOs of one seed differ")
	}
	if year := []byte("20"); bytes.Contains(first[16*2048+813:16*2048+813+68], year) {
		t.Error("there is a date in the volume descriptor")
	}
}

func TestISORefusesBadNames(t *testing.T) {
	for _, name := range []string{"", "user-data", "UPPER", "a/b", "..", ".x", "x.", "a.b.c", "é", "name-of-more-than-28-bytes-xx"} {
		s := seed.Seed{Extra: map[string][]byte{name: nil}}
		if err := s.WriteISO(new(bytes.Buffer)); err == nil {
			t.Errorf("the name %q was taken", name)
		}
	}
}

func TestISOWriteFails(t *testing.T) {
	s := worker()
	if err := s.WriteISO(failing{}); err == nil {
		t.Error("no error from a full disk")
	}
}

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, unix.ENOSPC }

// FuzzReadISO changes the parts of an image that locate the others, instead of its 40 KB of zeroes.
func FuzzReadISO(f *testing.F) {
	good := iso(f, worker())
	const volume, root, dir = 16 * 2048, 16*2048 + 156, 18 * 2048
	own := bytes.Index(good, []byte(`{"instance_id"`))
	f.Add(good[volume:volume+80], good[root:root+34], good[dir:dir+300], good[own:own+800])
	f.Add([]byte("\x01CD001"), []byte{34}, []byte{255, 34}, []byte(`{}`))
	f.Fuzz(func(t *testing.T, v, r, d, j []byte) {
		image := bytes.Clone(good)
		for i, at := range []int{volume, root, dir, own} {
			copy(image[at:min(at+2048, len(image))], [][]byte{v, r, d, j}[i])
		}
		s, err := seed.ReadISO(bytes.NewReader(image))
		if err != nil {
			return
		}
		if err := s.WriteISO(nowhere{}); err != nil {
			t.Errorf("read, but not written again: %v", err)
		}
	})
}

func BenchmarkISO(b *testing.B) {
	guest := bytes.Repeat([]byte{0x5a}, 25<<20)
	for name, extra := range map[string]map[string][]byte{"worker": nil, "prebuild-25MB": {"fleetingd": guest}} {
		b.Run(name, func(b *testing.B) {
			s := worker()
			s.Extra = extra
			for b.Loop() {
				if err := s.WriteISO(nowhere{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

type nowhere struct{}

func (nowhere) Write(p []byte) (int, error) { return len(p), nil }
