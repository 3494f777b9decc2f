package image

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

func TestParseSums(t *testing.T) {
	a, b := strings.Repeat("a", 64), strings.Repeat("B", 64)
	sums, err := parseSums([]byte("# made by hand\n" + a + "  one.img\n" + b + " *unpacked/two\r\n\n" + a + "  ./three four\n"))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"one.img": a, "unpacked/two": strings.ToLower(b), "three four": a} {
		if sums[name] != want {
			t.Errorf("%s: %q, want %q", name, sums[name], want)
		}
	}
	for text, want := range map[string]string{
		"":                                   "names no file",
		"<html>404</html>":                   "line 1",
		a + " one":                           "line 1",
		a[:62] + "  one":                     "64 hex digits",
		a + "  x\n" + b + "  x":              "two digests",
		a + "  " + strings.Repeat("x", 8192): "after line 0",
	} {
		if _, err := parseSums([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %q", text, err, want)
		}
	}
}

func FuzzParseSums(f *testing.F) {
	a := strings.Repeat("a", 64)
	for _, seed := range []string{"", a + "  x\n", a + " *x\r\n", "# c\n", a + "  x\n" + a + "  x", "\x00", a} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		sums, err := parseSums(data)
		if (err == nil) == (len(sums) == 0) {
			t.Fatalf("%d sums and error %v", len(sums), err)
		}
		for name, digest := range sums {
			if _, err := checkSHA256(digest); err != nil || !bytes.Contains(data, []byte(name)) {
				t.Fatalf("%q %q: not from the input", name, digest)
			}
		}
	})
}

// The keys that are embedded are the two that Canonical names, and can be used.
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

// armored is a keyring as it is embedded.
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
	sums := map[string]string{"disk.img": "1", "unpacked/vmlinuz": "2", "other": "3"}
	for file, want := range map[string]string{
		"https://h/r/disk.img": "1", "https://h/r/unpacked/vmlinuz": "2", "https://mirror/x/disk.img?a=b": "1", "https://h/r/none": "",
	} {
		if got := sumOf(sums, "https://h/r/SHA256SUMS", file); got != want {
			t.Errorf("%s: %q, want %q", file, got, want)
		}
	}
	if got := fmt.Sprint(sibling("https://h/r/disk.img?x=1", "SHA256SUMS")); got != "https://h/r/SHA256SUMS" {
		t.Error(got)
	}
}
