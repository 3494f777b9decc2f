package image

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
	"github.com/google/go-cmp/cmp"
)

// TestParseSums: the forms of lists that publishers keep beside their images.
func TestParseSums(t *testing.T) {
	a, b := strings.Repeat("a", 64), strings.Repeat("B", 64)
	long := strings.Repeat("c", 128)
	lower := strings.ToLower(b)
	signed := func(text string) string {
		var out bytes.Buffer
		w, err := clearsign.Encode(&out, newKey(t, nil).PrivateKey, nil)
		if err != nil {
			t.Fatal(err)
		}
		w.Write([]byte(text))
		w.Close()
		return out.String()
	}
	for name, c := range map[string]struct {
		text string
		want map[string]string
	}{
		"coreutils":      {"# made by hand\n" + a + "  one.img\n" + b + " *unpacked/two\r\n\n" + a + "  ./three four\n", map[string]string{"one.img": a, "unpacked/two": lower, "three four": a}},
		"one blank":      {a + " one.img\n", map[string]string{"one.img": a}},
		"tab":            {a + "\tone.img\n", map[string]string{"one.img": a}},
		"indented":       {"  " + a + "  one.img  \n", map[string]string{"one.img": a}},
		"BSD":            {"# one.img: 42 bytes\nSHA256 (one.img) = " + a + "\nSHA256 (dir/two (1).img) = " + b, map[string]string{"one.img": a, "dir/two (1).img": lower}},
		"openssl":        {"SHA2-256(one.img)= " + a + "\n", map[string]string{"one.img": a}},
		"SHA-512":        {long + "  one.img\n", map[string]string{"one.img": long}},
		"BSD SHA-512":    {"SHA512 (one.img) = " + long, map[string]string{"one.img": long}},
		"both":           {"SHA512 (one.img) = " + long + "\nSHA256 (one.img) = " + a, map[string]string{"one.img": a}},
		"with weak ones": {"MD5 (one.img) = " + a[:32] + "\nSHA1 (one.img) = " + a[:40] + "\nSHA256 (one.img) = " + a, map[string]string{"one.img": a}},
		"BOM":            {"\xef\xbb\xbf" + a + "  one.img\n", map[string]string{"one.img": a}},
		"clear-signed":   {signed("# Fedora\n- dash\nSHA256 (one.img) = " + a + "\n"), nil},
		"clear-signed 2": {signed("# Fedora\nSHA256 (one.img) = " + a + "\n"), map[string]string{"one.img": a}},
		"said twice":     {a + "  x\n" + strings.ToUpper(a) + "  x\n", map[string]string{"x": a}},
		"bare":           {"\n" + b + "\r\n", map[string]string{"": lower}},
		"bare SHA-512":   {long, map[string]string{"": long}},
		"stdin":          {b + "  -\n", map[string]string{"": lower}},
		"stdin, binary":  {b + " *-\n", map[string]string{"": lower}},
		"stdin, tab":     {a + "\t-", map[string]string{"": a}},
		"stdin, BSD":     {"SHA256 (-) = " + a, map[string]string{"": a}},
		"stdin, openssl": {"SHA2-256(stdin)= " + a, map[string]string{"": a}},
		"stdin, both":    {"SHA512 (-) = " + long + "\nSHA256 (-) = " + a, map[string]string{"": a}},
		"stdin, both 2":  {a + "  -\n" + long + "  -\n" + a[:32] + "  -\n", map[string]string{"": a}},
		"a file stdin":   {a + "  stdin\n" + b + "  dir/-\n", map[string]string{"stdin": a, "dir/-": lower}},
	} {
		t.Run(name, func(t *testing.T) {
			list, err := parseSums([]byte(c.text))
			if c.want == nil {
				wantError(t, err, "- dash")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]string{}
			for name, sum := range list.byName {
				got[name] = string(sum)
			}
			if list.bare != "" {
				got[""] = string(list.bare)
			}
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	for text, want := range map[string]string{
		"":                                         "names no file",
		"<html>404</html>":                         "web page",
		"\n<!DOCTYPE html><title>404</title>":      "web page",
		"404 page not found":                       "line 1 is neither",
		"\xff\xfea\x00":                            "UTF-16",
		a + "\x00":                                 "not text",
		a[:62] + "  one":                           "neither a SHA-256 digest",
		a + "  x\n" + b + "  x":                    "two digests",
		"SHA256 (x) = " + a + "\n" + b + "  x":     "two digests",
		a + "  " + strings.Repeat("x", 8192):       "after line 0",
		a[:32] + "  one.img":                       "only MD5",
		"SHA1 (x) = " + a[:40]:                     "only SHA1",
		a + "\n" + b:                               "second digest",
		a + "\n" + b + "  x":                       "others with names",
		a + "  -\n" + b + "  x":                    "others with names",
		a + "  -\n" + b:                            "second digest",
		a[:32] + "  -":                             "only MD5",
		"-----BEGIN PGP SIGNED MESSAGE-----\n" + a: "clear-signed form is damaged",
	} {
		if _, err := parseSums([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %q", text, err, want)
		}
	}
}

func FuzzParseSums(f *testing.F) {
	a := strings.Repeat("a", 64)
	for _, seed := range []string{
		"", a + "  x\n", a + " *x\r\n", "# c\n", a + "  x\n" + a + "  x", "\x00", a, "SHA256 (x) = " + a, "SHA512 (x) = " + a + a,
		"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n" + a + "  x\n-----BEGIN PGP SIGNATURE-----\n\nwsBz\n-----END PGP SIGNATURE-----",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := parseSums(data)
		if err != nil {
			return
		}
		if len(list.byName) == 0 && list.bare == "" {
			t.Fatal("a list of nothing")
		}
		for name, sum := range list.byName {
			if _, err := parseChecksum(string(sum)); err != nil || name == "" || !bytes.Contains(bytes.ToLower(data), []byte(sum)) {
				t.Fatalf("%q %q: not from the input", name, sum)
			}
		}
	})
}

// The embedded keys are the two that Canonical names, and are usable.
func TestUbuntuKeys(t *testing.T) {
	keyring, err := readKeyring(ubuntuKeys)
	if err != nil {
		t.Fatal(err)
	}
	want := "D2EB44626FDDC30B513D5BB71A5D6C4C7DB87C81, 4A3CE3CD565D7EB5C810E2B97FF3F408476CF100"
	if got := fingerprints(keyring); got != want {
		t.Errorf("the keyring holds %s, want %s", got, want)
	}
	for _, e := range keyring {
		if len(keyring.KeysByIdUsage(e.PrimaryKey.KeyId, packet.KeyFlagSign)) != 1 {
			t.Errorf("%X cannot sign", e.PrimaryKey.Fingerprint)
		}
	}
}

func newKey(t *testing.T, config *packet.Config) *openpgp.Entity {
	t.Helper()
	e, err := openpgp.NewEntity("Test", "", "test@example.com", config)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// armored returns a keyring in the form in which the real one is embedded.
func armored(t *testing.T, keys ...*openpgp.Entity) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := armor.Encode(&b, openpgp.PublicKeyType, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		if err := k.Serialize(w); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func sign(t *testing.T, key *openpgp.Entity, text []byte, config *packet.Config) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := openpgp.ArmoredDetachSign(&b, key, bytes.NewReader(text), config); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestVerifySigned(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) *packet.Config {
		return &packet.Config{Time: func() time.Time { return now.Add(-d) }}
	}
	good, other := newKey(t, nil), newKey(t, nil)
	short := ago(48 * time.Hour)
	short.KeyLifetimeSecs = 3600
	expired := newKey(t, short)
	text := []byte("the sums")
	keyring, err := readKeyring(armored(t, good, expired))
	if err != nil {
		t.Fatal(err)
	}
	var binary bytes.Buffer
	if err := openpgp.DetachSign(&binary, good, bytes.NewReader(text), nil); err != nil {
		t.Fatal(err)
	}
	lapsed := ago(72 * time.Hour)
	lapsed.SigLifetimeSecs = 3600
	oldKey := newKey(t, ago(100*time.Hour))
	for name, c := range map[string]struct {
		keys      openpgp.EntityList
		text      string
		signature []byte
		want      string // "" for valid
	}{
		"good":                {keyring, "the sums", sign(t, good, text, nil), ""},
		"good, binary":        {keyring, "the sums", binary.Bytes(), ""},
		"other text":          {keyring, "the sumS", sign(t, good, text, nil), "not valid"},
		"other key":           {keyring, "the sums", sign(t, other, text, nil), "not by a trusted key"},
		"expired key":         {keyring, "the sums", sign(t, expired, text, ago(47*time.Hour+30*time.Minute)), "expired"},
		"expired signature":   {openpgp.EntityList{oldKey}, "the sums", sign(t, oldKey, text, lapsed), "expired"},
		"empty":               {keyring, "the sums", nil, "not by a trusted key"},
		"garbage":             {keyring, "the sums", []byte("<html>not found</html>"), "not valid"},
		"a key, no signature": {keyring, "the sums", armored(t, good), "not a"},
		"cut armor":           {keyring, "the sums", sign(t, good, text, nil)[:60], "signature"},
	} {
		t.Run(name, func(t *testing.T) {
			err := verifySigned(c.keys, []byte(c.text), c.signature, now)
			if c.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, c.want)
		})
	}
}

func FuzzVerifySigned(f *testing.F) {
	f.Add([]byte("-----BEGIN PGP SIGNATURE-----\n\nwsBz\n-----END PGP SIGNATURE-----"), []byte("x"))
	f.Add([]byte{0xc2, 0x5e, 4, 0}, []byte(""))
	keyring, err := readKeyring(ubuntuKeys)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, signature, signed []byte) {
		if verifySigned(keyring, signed, signature, time.Now()) == nil {
			t.Fatal("a signature of Canonical's was found by chance")
		}
	})
}

func TestSumOf(t *testing.T) {
	list := &sumList{byName: map[string]checksum{
		"disk.img": "1", "unpacked/vmlinuz": "2", "other": "3", "a/twice": "4", "b/twice": "5", "a/same": "6", "b/same": "6", "/srv/www/abs.img": "7",
	}}
	for file, want := range map[string]checksum{
		"https://h/r/disk.img": "1", "https://h/r/unpacked/vmlinuz": "2", "https://mirror/x/disk.img?a=b": "1", "https://h/r/none": "",
		"https://h/r/b/twice": "5", "https://h/x/same": "6", "https://h/r/abs.img": "7", "https://h/x/vmlinuz": "2",
	} {
		got, err := list.of("https://h/r/SHA256SUMS", file, true)
		if err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", file, got, err, want)
		}
	}
	if _, err := list.of("https://h/r/SHA256SUMS", "https://h/x/twice", true); err == nil {
		t.Error("one of two different digests is taken by chance")
	}
	bare := &sumList{bare: "8"}
	for disk, want := range map[bool]checksum{true: "8", false: ""} {
		if got, err := bare.of("https://h/disk.img.sha256", "https://h/any", disk); got != want || err != nil {
			t.Errorf("disk %t: %q, %v", disk, got, err)
		}
	}
	if got := fmt.Sprint(sibling("https://h/r/disk.img?x=1", "SHA256SUMS")); got != "https://h/r/SHA256SUMS" {
		t.Error(got)
	}
}
