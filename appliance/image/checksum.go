package image

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"hash"
	"strings"
)

// checksum is an expected SHA-256 or SHA-512 digest in lower-case hex; its length tells which. "" means none.
type checksum string

// The lengths of digests, in hex digits.
const (
	sha256Digits = 2 * sha256.Size
	sha512Digits = 2 * sha512.Size
)

// parseChecksum returns the digest in lower case.
func parseChecksum(s string) (checksum, error) {
	if b, err := hex.DecodeString(s); err != nil || 2*len(b) != sha256Digits && 2*len(b) != sha512Digits {
		return "", fmt.Errorf("%.80q is neither a SHA-256 digest (%d hex digits) nor a SHA-512 digest (%d)", s, sha256Digits, sha512Digits)
	}
	return checksum(strings.ToLower(s)), nil
}

func (c checksum) algorithm() string {
	if len(c) == sha512Digits {
		return "SHA-512"
	}
	return "SHA-256"
}

// hashes computes a file's SHA-256, by which images are kept, and also its SHA-512 if that is the expected digest.
type hashes struct {
	sha256, sha512 hash.Hash // sha512 may be nil
}

func newHashes(want checksum) *hashes {
	h := &hashes{sha256: sha256.New()}
	if len(want) == sha512Digits {
		h.sha512 = sha512.New()
	}
	return h
}

func (h *hashes) Write(b []byte) (int, error) {
	if h.sha512 != nil {
		h.sha512.Write(b)
	}
	return h.sha256.Write(b)
}

func (h *hashes) reset() {
	h.sha256.Reset()
	if h.sha512 != nil {
		h.sha512.Reset()
	}
}

// sum returns the SHA-256 in hex.
func (h *hashes) sum() string { return hex.EncodeToString(h.sha256.Sum(nil)) }

// vouched returns the digest to compare with the expected one.
func (h *hashes) vouched() checksum {
	if h.sha512 != nil {
		return checksum(hex.EncodeToString(h.sha512.Sum(nil)))
	}
	return checksum(h.sum())
}
