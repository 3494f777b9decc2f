package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
)

// files are the parts of a source. Disk and Kernel are always set.
type files struct {
	Disk, Kernel, Initrd part
	Cmdline              string // empty: derived from the disk
	Arch                 string
}

// part is one file of a source.
type part struct {
	at     string // path or URL; "" for none
	digest string // SHA-256 in hex
	// vouched is its checksum from a list that has no SHA-256 of it.
	vouched checksum
	limit   int64 // bytes, of a `url` source
	sealed  bool  // it lies where only root can write, so it is not hashed again
}

// wanted returns the expected digest of a download, or "" if none is known.
func (p part) wanted() checksum {
	if p.digest != "" {
		return checksum(p.digest)
	}
	return p.vouched
}

// filesInputs are what the digest of a base of three files is computed from. They do not include where the files came from: the same files
// from another mirror are the same base.
type filesInputs struct {
	Format  int    `json:"format"`
	Disk    string `json:"disk"`
	Kernel  string `json:"kernel"`
	Initrd  string `json:"initrd,omitempty"`
	Cmdline string `json:"cmdline,omitempty"`
	Arch    string `json:"arch,omitempty"`
}

func (f *files) inputs() filesInputs {
	return filesInputs{formatVersion, f.Disk.digest, f.Kernel.digest, f.Initrd.digest, f.Cmdline, f.Arch}
}

// resolveFile hashes the files of a `file` source.
func (s *Store) resolveFile(ctx context.Context, name string, src *plan.FileSource) (*files, error) {
	f := &files{Cmdline: src.Cmdline, Arch: s.arch}
	for _, p := range []struct {
		to   *part
		path string
	}{{&f.Disk, src.Disk}, {&f.Kernel, src.Kernel}, {&f.Initrd, src.Initrd}} {
		if p.path == "" {
			continue
		}
		digest, err := hashFile(ctx, p.path, s.plan.Paths.Cache, s.bytesOf(name, PhaseVerify, p.path))
		if err != nil {
			return nil, err
		}
		*p.to = part{at: p.path, digest: digest}
	}
	return f, nil
}

// resolveURL determines the digests of a `url` source. It fetches a file whose digest is unknown, such as the kernel of a source with
// sha256, which is the disk's.
func (s *Store) resolveURL(ctx context.Context, name string, src *plan.URLSource) (*files, error) {
	f := &files{Cmdline: src.Cmdline, Arch: s.arch}
	var sums *sumList
	at := src.SHA256Sums
	if at == "" && src.SHA256 == "" {
		at = sibling(src.Disk, "SHA256SUMS")
	}
	if at != "" {
		var err error
		if sums, err = s.sums(ctx, at); err != nil {
			return nil, err
		}
	}
	f.Disk.limit, f.Kernel.limit, f.Initrd.limit = maxDisk, maxKernel, maxKernel
	for _, p := range []struct {
		to          *part
		url, digest string
	}{{&f.Disk, src.Disk, src.SHA256}, {&f.Kernel, src.Kernel, ""}, {&f.Initrd, src.Initrd, ""}} {
		if p.url == "" {
			continue
		}
		p.to.at, p.to.digest = p.url, strings.ToLower(p.digest)
		if p.to.digest == "" {
			if err := s.resolveDigest(ctx, name, p.to, sums, at); err != nil {
				return nil, err
			}
		}
	}
	return f, nil
}

// wayOut is the cure for any problem with a list of checksums.
const wayOut = `write sha256 = "…", the disk's own digest, into the url block instead`

// resolveDigest determines the SHA-256 of one file of a `url` source, from a list of checksums if there is one. It fetches a file whose
// SHA-256 is unknown.
func (s *Store) resolveDigest(ctx context.Context, name string, p *part, sums *sumList, list string) error {
	if sums != nil {
		vouched, err := sums.of(list, p.at, p.limit == maxDisk)
		if err != nil {
			return fmt.Errorf("%s: %w; %s", redacted(list), err, wayOut)
		}
		if vouched == "" && sums.bare == "" {
			return fmt.Errorf("%s has no digest for %s: it has %s; %s", redacted(list), redacted(p.at), sums.some(), wayOut)
		}
		p.vouched = vouched
		if vouched.algorithm() == "SHA-256" {
			p.digest = string(vouched)
		} else {
			p.digest = s.known512(vouched)
		}
	}
	if p.digest != "" {
		return nil
	}
	if p.vouched == "" && !strings.HasPrefix(p.at, "https:") {
		s.log().Warn("this file cannot be verified; name a list of checksums that has it with sha256sums", "image", name, "url", redacted(p.at))
	}
	digest, err := s.fetch(ctx, name, *p, p.limit)
	if err != nil {
		return err
	}
	p.digest = digest
	if p.vouched != "" {
		return state.WriteFile(s.path512(p.vouched), []byte(digest+"\n"), 0o600)
	}
	return nil
}

// path512 is where the SHA-256 of a file with a known SHA-512 is cached. Without it every refresh would fetch the file again.
func (s *Store) path512(sum checksum) string {
	return filepath.Join(s.plan.Paths.Cache, "sha512-"+string(sum[:64]))
}

func (s *Store) known512(sum checksum) string {
	b, err := os.ReadFile(s.path512(sum))
	if err != nil {
		return ""
	}
	known, err := checkSHA256(strings.TrimSpace(string(b)))
	if err != nil {
		return ""
	}
	return known
}

// resolveUbuntu determines the digests of a cloud image, and checks Canonical's signature of them. The image's folder and its subfolder
// "unpacked" each have a signed list.
func (s *Store) resolveUbuntu(ctx context.Context, src *plan.UbuntuSource) (*files, error) {
	folder := strings.TrimSuffix(src.Mirror, "/") + "/" + src.Release + "/current/"
	stem := src.Release + "-server-cloudimg-" + src.Arch
	f := &files{Arch: src.Arch}
	for _, p := range []struct {
		to           *part
		folder, name string
	}{
		{&f.Disk, folder, stem + ".img"},
		{&f.Kernel, folder + "unpacked/", stem + "-vmlinuz-generic"},
		{&f.Initrd, folder + "unpacked/", stem + "-initrd-generic"},
	} {
		sums, err := s.signedSums(ctx, p.folder+"SHA256SUMS")
		if err != nil {
			return nil, err
		}
		sum := sums.byName[p.name]
		if sum == "" || sum.algorithm() != "SHA-256" {
			return nil, fmt.Errorf("%sSHA256SUMS has no SHA-256 of %s: it has %s", p.folder, p.name, sums.some())
		}
		*p.to = part{at: p.folder + p.name, digest: string(sum)}
	}
	return f, nil
}

// sums fetches a list of digests.
func (s *Store) sums(ctx context.Context, address string) (*sumList, error) {
	b, err := s.net.bytes(ctx, address, maxSums)
	if err != nil {
		return nil, fmt.Errorf("%w; %s", err, wayOut)
	}
	sums, err := parseSums(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; %s", redacted(address), err, wayOut)
	}
	return sums, nil
}

// signedSums fetches a list of digests, which must be signed by Canonical.
func (s *Store) signedSums(ctx context.Context, address string) (*sumList, error) {
	signed, err := s.net.bytes(ctx, address, maxSums)
	if err != nil {
		return nil, err
	}
	signature, err := s.net.bytes(ctx, address+".gpg", maxSums)
	if err != nil {
		return nil, fmt.Errorf("%s cannot be verified: %w", redacted(address), err)
	}
	keyring, err := readKeyring(s.ubuntuKeys)
	if err != nil {
		return nil, err
	}
	if err := verifySigned(keyring, signed, signature, time.Now()); err != nil {
		return nil, fmt.Errorf("%s: %w; it was discarded", redacted(address), err)
	}
	sums, err := parseSums(signed)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", redacted(address), err)
	}
	return sums, nil
}

// sibling returns the URL of another file in the same folder.
func sibling(address, name string) string {
	u, err := url.Parse(address)
	if err != nil {
		return address // the download's error says what is wrong with it
	}
	u.Path, u.RawPath, u.RawQuery = path.Join(path.Dir(u.Path), name), "", ""
	return u.String()
}

// fetch downloads a part into the cache and returns its digest. It uses a cached file with the expected digest.
func (s *Store) fetch(ctx context.Context, name string, p part, limit int64) (digest string, err error) {
	dst := s.cached(p)
	// Two specs may have the same source; concurrent downloads of it would write to the same file.
	lock, err := s.shelf.lock(ctx, filepath.Base(dst))
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, lock.Unlock()) }()
	if p.digest != "" && fileSize(dst) > 0 {
		digest, err := hashFile(ctx, dst, "", s.bytesOf(name, PhaseVerify, redacted(p.at)))
		if err != nil || digest == p.digest {
			return digest, err
		}
	}
	progress := s.bytesOf(name, PhaseDownload, redacted(p.at))
	return s.net.file(ctx, download{url: p.at, dst: dst, want: p.wanted(), max: limit, progress: progress})
}

// cached returns where a part's download lies until its base is built.
func (s *Store) cached(p part) string {
	return filepath.Join(s.plan.Paths.Cache, downloadPrefix+sha256Hex([]byte(p.at))[:32])
}

const downloadPrefix = "download-"

// collect puts a source's parts into a draft. It fetches and verifies them, and makes the disk raw.
func (s *Store) collect(ctx context.Context, name string, f *files, d *draft) error {
	for _, p := range []struct {
		part
		dst   string
		limit int64
	}{{f.Kernel, kernelFile, maxKernel}, {f.Initrd, initrdFile, maxKernel}, {f.Disk, diskFile, maxDisk}} {
		if p.at == "" {
			continue
		}
		local, err := s.local(ctx, name, p.part, p.limit)
		if err != nil {
			return err
		}
		s.report(Progress{Image: name, Phase: PhaseConvert, Item: p.dst})
		if err := s.take(ctx, local, d.path(p.dst), p.dst == diskFile); err != nil {
			return err
		}
		if err := s.release(ctx, p.part, local); err != nil {
			return err
		}
	}
	return nil
}

// local returns the path of a part, and fetches it if necessary.
func (s *Store) local(ctx context.Context, name string, p part, limit int64) (string, error) {
	if !isURL(p.at) {
		return p.at, nil
	}
	_, err := s.fetch(ctx, name, p, limit)
	return s.cached(p), err
}

// release is called when a part has been taken. It removes a download, which is no longer needed, and checks that a file on this host is
// still the one that was hashed.
func (s *Store) release(ctx context.Context, p part, local string) error {
	if isURL(p.at) {
		return os.Remove(local)
	}
	if p.sealed {
		return nil
	}
	digest, err := hashFile(ctx, local, s.plan.Paths.Cache, nil)
	if err == nil && digest != p.digest {
		err = fmt.Errorf("%s changed while it was read; is something writing to it?", local)
	}
	return err
}

func isURL(at string) bool {
	return strings.HasPrefix(at, "http://") || strings.HasPrefix(at, "https://")
}

// take puts one verified file into a draft.
func (s *Store) take(ctx context.Context, src, dst string, disk bool) error {
	if disk {
		return convert(ctx, src, dst)
	}
	return copyFile(src, dst)
}

// copyFile makes dst, which must not exist, a copy of a small file.
func copyFile(src, dst string) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	n, err := io.Copy(out, io.LimitReader(in, maxKernel+1))
	if n > maxKernel {
		err = fmt.Errorf("%s is larger than %s, the limit for a kernel or initrd", src, bytesText(maxKernel))
	}
	return errors.Join(err, out.Close())
}

func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
