package image

import (
	"bufio"
	"bytes"
	"crypto"
	_ "embed" // the keyring
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	pgperrors "github.com/ProtonMail/go-crypto/openpgp/errors"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

//go:embed keys/ubuntu-cloudimage.asc
var ubuntuKeys []byte

// maxSums limits the size of a list of checksums and of its signature, in bytes. Canonical's lists have about 10 KB.
const maxSums = 1 << 20

// sumList is a list of checksums that a publisher keeps beside the files.
type sumList struct {
	byName map[string]checksum // SHA-256 if a name has several
	bare   checksum            // the digest of a list that has one digest and no name; "" for none
}

// bsdLine is the format of BSD's tools, sha256sum --tag and openssl dgst: "SHA256 (name) = digest".
var bsdLine = regexp.MustCompile(`^([A-Za-z0-9/-]+) ?\((.*)\) ?= ?([0-9A-Fa-f]+)$`)

// gnuLine is the format of sha256sum: a digest, a space, a space or an asterisk (text or binary, which are the same on Linux), a name.
// Some lists have a single space or a tab.
var gnuLine = regexp.MustCompile(`^([0-9A-Fa-f]{32,})[ \t]+\*?(\S.*)$`)

// parseSums reads a list of checksums: the output of sha256sum or sha512sum, in GNU or BSD format, or a single digest. It removes a
// clear-signature without checking it; verifySigned checks signatures of known publishers. It skips comments and lines of other
// algorithms.
func parseSums(data []byte) (*sumList, error) {
	text, err := sumText(data)
	if err != nil {
		return nil, err
	}
	list := &sumList{byName: map[string]checksum{}}
	lines := bufio.NewScanner(strings.NewReader(text))
	lines.Buffer(nil, 4096)
	n, weak := 0, ""
	for lines.Scan() {
		n++
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		name, hex, algorithm, err := splitSum(line)
		if err != nil {
			return nil, fmt.Errorf("line %d %w", n, err)
		}
		if algorithm != "" {
			weak = algorithm
			continue
		}
		sum, err := parseChecksum(hex)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if err := list.add(name, sum); err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
	}
	switch err := lines.Err(); {
	case err != nil:
		return nil, fmt.Errorf("after line %d: %w", n, err)
	case len(list.byName) == 0 && list.bare == "" && weak != "":
		return nil, fmt.Errorf("it has neither SHA-256 nor SHA-512 digests, only %s, which can be forged", weak)
	case len(list.byName) == 0 && list.bare == "":
		return nil, errors.New("it names no file")
	case len(list.byName) > 0 && list.bare != "":
		return nil, errors.New("it has one digest without a name, and others with names")
	}
	return list, nil
}

// sumText returns the text of a list, without a byte order mark and without the signature around it.
func sumText(data []byte) (string, error) {
	switch head := bytes.ToLower(bytes.TrimSpace(data[:min(len(data), 512)])); {
	case bytes.HasPrefix(data, []byte{0xff, 0xfe}), bytes.HasPrefix(data, []byte{0xfe, 0xff}):
		return "", errors.New("it is in UTF-16, but a list of checksums must be ASCII")
	case bytes.HasPrefix(head, []byte("<!doctype")), bytes.HasPrefix(head, []byte("<html")), bytes.HasPrefix(head, []byte("<?xml")):
		return "", fmt.Errorf("it is a web page, not a list of checksums: %.80q", data)
	case bytes.IndexByte(data, 0) >= 0:
		return "", errors.New("it is not text")
	}
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	if block, _ := clearsign.Decode(data); block != nil {
		return string(block.Plaintext), nil
	}
	if bytes.Contains(data, []byte("-----BEGIN PGP")) {
		return "", errors.New("its clear-signed form is damaged")
	}
	return string(data), nil
}

// splitSum splits a line. algorithm is set for the algorithms that are skipped. name is empty for a digest of standard input, which
// is how lists of one unnamed file are made.
func splitSum(line string) (name, digest, algorithm string, err error) {
	if m := bsdLine.FindStringSubmatch(line); m != nil {
		if m[2] == "-" || m[2] == "stdin" { // sha256sum --tag, openssl dgst
			m[2] = ""
		}
		switch strings.NewReplacer("-", "", "/", "").Replace(strings.ToUpper(m[1])) {
		case "SHA256", "SHA512", "SHA2256", "SHA2512":
			return m[2], m[3], "", nil
		default:
			return m[2], m[3], m[1], nil
		}
	}
	if m := gnuLine.FindStringSubmatch(line); m != nil {
		if m[2] == "-" {
			m[2] = ""
		}
		// MD5, SHA-1, SHA-224, SHA-384
		if other := map[int]string{32: "MD5", 40: "SHA-1", 56: "SHA-224", 96: "SHA-384"}[len(m[1])]; other != "" {
			return m[2], m[1], other, nil
		}
		return m[2], m[1], "", nil
	}
	if _, err := parseChecksum(line); err == nil {
		return "", line, "", nil
	}
	return "", "", "", fmt.Errorf("is neither `DIGEST  NAME` nor `SHA256 (NAME) = DIGEST`: %.80q", line)
}

// add adds a digest. A name may have one digest of each algorithm, and repeat it.
func (l *sumList) add(name string, sum checksum) error {
	if name == "" {
		if len(l.bare) == len(sum) && l.bare != sum {
			return errors.New("a second digest without a name")
		}
		if len(l.bare) != sha256Digits {
			l.bare = sum
		}
		return nil
	}
	name = strings.TrimPrefix(name, "./")
	old := l.byName[name]
	if len(old) == len(sum) && old != sum {
		return fmt.Errorf("%q has two digests, %s and %s", name, old, sum)
	}
	if len(old) != sha256Digits { // images are kept by SHA-256: a file with a known one need not be fetched again
		l.byName[name] = sum
	}
	return nil
}

// of returns the digest of a file: by its path relative to the list, or else by its name alone. It is an error if the name occurs in
// several folders with different digests. A bare digest applies to the disk.
func (l *sumList) of(list, file string, disk bool) (checksum, error) {
	if l.bare != "" {
		if disk {
			return l.bare, nil
		}
		return "", nil
	}
	at, err1 := url.Parse(list)
	f, err2 := url.Parse(file)
	if err := errors.Join(err1, err2); err != nil {
		return "", err
	}
	if rel, ok := strings.CutPrefix(f.Path, strings.TrimSuffix(path.Dir(at.Path), "/")+"/"); ok && l.byName[rel] != "" {
		return l.byName[rel], nil
	}
	base := path.Base(f.Path)
	if sum := l.byName[base]; sum != "" {
		return sum, nil
	}
	var found checksum
	for name, sum := range l.byName {
		if path.Base(name) != base {
			continue
		}
		if found != "" && found != sum {
			return "", fmt.Errorf("it has several files named %q, in different folders", base)
		}
		found = sum
	}
	return found, nil
}

// some names a few of the files in the list, for messages.
func (l *sumList) some() string {
	if l.bare != "" {
		return "one digest without a name"
	}
	names := slices.Sorted(maps.Keys(l.byName))
	quoted := make([]string, 0, 5)
	for _, name := range names[:min(len(names), 5)] {
		quoted = append(quoted, fmt.Sprintf("%.60q", name))
	}
	if len(names) > 5 {
		return fmt.Sprintf("%d files, among them %s", len(names), strings.Join(quoted, ", "))
	}
	return strings.Join(quoted, ", ")
}

// checkSHA256 returns the digest in lower case.
func checkSHA256(s string) (string, error) {
	if b, err := hex.DecodeString(s); err != nil || len(b) != 32 {
		return "", fmt.Errorf("%.80q is not a SHA-256 digest: 64 hex digits", s)
	}
	return strings.ToLower(s), nil
}

// verifySigned checks a detached signature, armored or binary, against a keyring. Keys and signatures must not have expired at now.
func verifySigned(keyring openpgp.EntityList, signed, signature []byte, now time.Time) error {
	raw := io.Reader(bytes.NewReader(signature))
	if bytes.HasPrefix(bytes.TrimSpace(signature), []byte("-----BEGIN PGP")) {
		block, err := armor.Decode(raw)
		if err != nil {
			return fmt.Errorf("its signature is damaged: %w", err)
		}
		if block.Type != openpgp.SignatureType {
			return fmt.Errorf("its signature is a %q, not a %q", block.Type, openpgp.SignatureType)
		}
		raw = block.Body
	}
	// One day of grace for a host whose clock is slow: go-crypto refuses signatures from the future, which are harmless.
	config := &packet.Config{Time: func() time.Time { return now.Add(24 * time.Hour) }}
	// The library still accepts SHA-1 and MD5, which have collisions.
	strong := []crypto.Hash{crypto.SHA256, crypto.SHA384, crypto.SHA512}
	_, _, err := openpgp.VerifyDetachedSignatureAndHash(keyring, bytes.NewReader(signed), raw, strong, config)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, pgperrors.ErrUnknownIssuer):
		return fmt.Errorf("its signature is not by a trusted key (%s)", fingerprints(keyring))
	default:
		return fmt.Errorf("its signature is not valid (trusted keys: %s): %w", fingerprints(keyring), err)
	}
}

func fingerprints(keyring openpgp.EntityList) string {
	var all []string
	for _, e := range keyring {
		all = append(all, fmt.Sprintf("%X", e.PrimaryKey.Fingerprint))
	}
	return strings.Join(all, ", ")
}

// readKeyring reads an armored keyring.
func readKeyring(armored []byte) (openpgp.EntityList, error) {
	keyring, err := openpgp.ReadArmoredKeyRing(bytes.NewReader(armored))
	if err != nil {
		return nil, fmt.Errorf("read the embedded keys: %w", err)
	}
	return keyring, nil
}
