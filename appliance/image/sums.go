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
	"strings"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	pgperrors "github.com/ProtonMail/go-crypto/openpgp/errors"
	"github.com/ProtonMail/go-crypto/openpgp/packet"
)

//go:embed keys/ubuntu-cloudimage.asc
var ubuntuKeys []byte

// maxSums bounds a SHA256SUMS file and its signature, in bytes: Canonical's have some 10 KB.
const maxSums = 1 << 20

// parseSums reads what `sha256sum` writes: a digest of 64 hex digits, a space, a
// space or a star (text or binary: the same on Linux), a name. It gives the
// digests, in lower case, by name. Empty lines and lines that begin with # are skipped.
func parseSums(data []byte) (map[string]string, error) {
	sums := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(data))
	lines.Buffer(nil, 4096)
	n := 0
	for lines.Scan() {
		n++
		line := strings.TrimSuffix(lines.Text(), "\r")
		if line == "" || line[0] == '#' {
			continue
		}
		digest, rest, ok := strings.Cut(line, " ")
		if !ok || len(rest) < 2 || (rest[0] != ' ' && rest[0] != '*') {
			return nil, fmt.Errorf("line %d is not `DIGEST  NAME`: %.80q", n, line)
		}
		digest, err := checkSHA256(digest)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		name := strings.TrimPrefix(rest[1:], "./")
		if old, ok := sums[name]; ok && old != digest {
			return nil, fmt.Errorf("line %d: %q has two digests, %s and %s", n, name, old, digest)
		}
		sums[name] = digest
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("after line %d: %w", n, err)
	}
	if len(sums) == 0 {
		return nil, errors.New("it names no file")
	}
	return sums, nil
}

// checkSHA256 gives the digest in lower case.
func checkSHA256(s string) (string, error) {
	if b, err := hex.DecodeString(s); err != nil || len(b) != 32 {
		return "", fmt.Errorf("%.80q is no SHA-256 digest: 64 hex digits", s)
	}
	return strings.ToLower(s), nil
}

// verifySigned checks a detached signature, armored or not, against a keyring.
// now is what keys and signatures must not have expired by.
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
	// A day's grace for a host whose clock is behind: a signature from the future is no attack, but go-crypto
	// refuses it.
	config := &packet.Config{Time: func() time.Time { return now.Add(24 * time.Hour) }}
	// SHA-1 and MD5 collide, and the library accepts them still.
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
