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
)

// files are the parts of a source. Disk and Kernel are always there.
type files struct {
	Disk, Kernel, Initrd part
	Cmdline              string // empty: made from what is on the disk
	Arch                 string
}

// part is one file of a source.
type part struct {
	at     string // path or URL; "" for none
	digest string // SHA-256 in hex
	sealed bool   // it lies where only root writes: it is not looked at again
}

// filesInputs are what a base of three files is the digest of. Where they came from is no part
// of it: the same files from a mirror are the same base.
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

// resolveURL finds out the digests of a `url` source. A file that none is known of (a kernel beside a
// disk with sha256) is fetched for it.
func (s *Store) resolveURL(ctx context.Context, name string, src *plan.URLSource) (*files, error) {
	f := &files{Cmdline: src.Cmdline, Arch: s.arch}
	var sums map[string]string
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
	for _, p := range []struct {
		to          *part
		url, digest string
	}{{&f.Disk, src.Disk, src.SHA256}, {&f.Kernel, src.Kernel, ""}, {&f.Initrd, src.Initrd, ""}} {
		if p.url == "" {
			continue
		}
		p.to.at, p.to.digest = p.url, strings.ToLower(p.digest)
		if p.to.digest == "" && sums != nil {
			p.to.digest = sumOf(sums, at, p.url)
			if p.to.digest == "" {
				return nil, fmt.Errorf("%s names no digest for %s: it has %s", redacted(at), redacted(p.url), some(sums))
			}
		}
		if p.to.digest == "" {
			if !strings.HasPrefix(p.url, "https:") {
				s.log().Warn("nothing vouches for this file: give its SHA256SUMS with sha256sums",
					"image", name, "url", redacted(p.url))
			}
			digest, err := s.fetch(ctx, name, *p.to, maxKernel)
			if err != nil {
				return nil, err
			}
			p.to.digest = digest
		}
	}
	return f, nil
}

// resolveUbuntu finds out the digests of a cloud image, and checks Canonical's signature over them. The
// folder and the one below it, unpacked, have a signed list each.
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
		*p.to = part{at: p.folder + p.name, digest: sums[p.name]}
		if p.to.digest == "" {
			return nil, fmt.Errorf("%sSHA256SUMS names no %s: it has %s", p.folder, p.name, some(sums))
		}
	}
	return f, nil
}

// sums fetches a list of digests.
func (s *Store) sums(ctx context.Context, address string) (map[string]string, error) {
	b, err := s.net.bytes(ctx, address, maxSums)
	if err != nil {
		return nil, err
	}
	sums, err := parseSums(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", redacted(address), err)
	}
	return sums, nil
}

// signedSums fetches a list of digests that Canonical must have signed.
func (s *Store) signedSums(ctx context.Context, address string) (map[string]string, error) {
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
		return nil, fmt.Errorf("%s: %w; nothing of it is used", redacted(address), err)
	}
	sums, err := parseSums(signed)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", redacted(address), err)
	}
	return sums, nil
}

// sibling is the URL of another file in the same folder.
func sibling(address, name string) string {
	u, err := url.Parse(address)
	if err != nil {
		return address // the download will say what is wrong with it
	}
	u.Path, u.RawPath, u.RawQuery = path.Join(path.Dir(u.Path), name), "", ""
	return u.String()
}

// sumOf looks a file up: by its place as seen from the list, and else by its name.
func sumOf(sums map[string]string, list, file string) string {
	l, err1 := url.Parse(list)
	f, err2 := url.Parse(file)
	if err1 != nil || err2 != nil {
		return ""
	}
	if rel, ok := strings.CutPrefix(f.Path, strings.TrimSuffix(path.Dir(l.Path), "/")+"/"); ok && sums[rel] != "" {
		return sums[rel]
	}
	return sums[path.Base(f.Path)]
}

// some names a few of the files in a list, for a message.
func some(sums map[string]string) string {
	var names []string
	for name := range sums {
		if names = append(names, fmt.Sprintf("%.60q", name)); len(names) == 5 {
			break
		}
	}
	return fmt.Sprintf("%d files, among them %s", len(sums), strings.Join(names, ", "))
}

// fetch downloads a part into the cache and gives its digest. What is in the cache already is taken where its
// digest is the wanted one.
func (s *Store) fetch(ctx context.Context, name string, p part, limit int64) (digest string, err error) {
	dst := s.cached(p)
	// Two specs may have one source; a second download of it at the same time would write into the first
	// one's file.
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
	return s.net.file(ctx, download{url: p.at, dst: dst, want: p.digest, max: limit, progress: progress})
}

// cached is where a part's download lies until its base is built.
func (s *Store) cached(p part) string {
	return filepath.Join(s.plan.Paths.Cache, "download-"+sha256Hex([]byte(p.at))[:32])
}

// collect puts a source's parts into a draft: fetched where they have to be, verified,
// the disk raw.
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

// local gives the path of a part, fetched where it has to be.
func (s *Store) local(ctx context.Context, name string, p part, limit int64) (string, error) {
	if !isURL(p.at) {
		return p.at, nil
	}
	_, err := s.fetch(ctx, name, p, limit)
	return s.cached(p), err
}

// release is called when a part has been taken: a download has served its turn, and a file
// of this host must be what it was when it was hashed.
func (s *Store) release(ctx context.Context, p part, local string) error {
	if isURL(p.at) {
		return os.Remove(local)
	}
	if p.sealed {
		return nil
	}
	digest, err := hashFile(ctx, local, s.plan.Paths.Cache, nil)
	if err == nil && digest != p.digest {
		err = fmt.Errorf("%s changed while it was read: is something writing it?", local)
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
		err = fmt.Errorf("%s is larger than %s, which no kernel or initrd is", src, bytesText(maxKernel))
	}
	return errors.Join(err, out.Close())
}

func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}
