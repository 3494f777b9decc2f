package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/state"
)

// stamp is what changes when a file does. A file that keeps all of it and has other
// content was forged by someone who may write it anyhow.
type stamp struct {
	Dev    uint64 `json:"dev"`
	Inode  uint64 `json:"inode"`
	Size   int64  `json:"size"`
	MTime  int64  `json:"mtime"` // nanoseconds since 1970
	CTime  int64  `json:"ctime"`
	Digest string `json:"digest,omitempty"` // only as it is kept
}

func stampOf(f *os.File) (stamp, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return stamp{}, fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return stamp{}, fmt.Errorf("%s is not a regular file", f.Name())
	}
	return stamp{Dev: uint64(st.Dev), Inode: st.Ino, Size: st.Size, MTime: st.Mtim.Nano(), CTime: st.Ctim.Nano()}, nil
}

// hashFile gives the SHA-256 of a file. A digest is kept by the file's stamp below
// cache, so that 10 GB are not read at every start; "" keeps nothing.
func hashFile(ctx context.Context, path, cache string, progress func(done, total int64)) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	before, err := stampOf(f)
	if err != nil {
		return "", err
	}
	kept := ""
	if cache != "" {
		name := sha256.Sum256([]byte(path))
		kept = filepath.Join(cache, "digest-"+hex.EncodeToString(name[:8])+".json")
		if digest := keptDigest(kept, before); digest != "" {
			return digest, nil
		}
	}
	digest := sha256.New()
	buf := make([]byte, 1<<20)
	for done := int64(0); ; {
		n, err := f.Read(buf)
		digest.Write(buf[:n])
		if done += int64(n); progress != nil {
			progress(done, before.Size)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err = errors.Join(err, context.Cause(ctx)); err != nil {
			return "", fmt.Errorf("hash %s: %w", path, err)
		}
	}
	if after, err := stampOf(f); err != nil || after != before {
		return "", errors.Join(err, fmt.Errorf("%s changed while it was read: is something writing it?", path))
	}
	before.Digest = hex.EncodeToString(digest.Sum(nil))
	// Not in a folder that is missing, or somebody else's: who only looks at images leaves nothing there.
	if kept != "" && ownFolder(filepath.Dir(kept)) {
		b, err := json.Marshal(before)
		if err := errors.Join(err, state.WriteFile(kept, b, 0o600)); err != nil {
			return "", fmt.Errorf("keep the digest of %s: %w", path, err)
		}
	}
	return before.Digest, nil
}

// keptDigest is the digest that was kept for a file with this stamp, or "".
func keptDigest(path string, now stamp) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "" // never kept, or not readable for this user: read the file itself
	}
	var had stamp
	d := json.NewDecoder(bytes.NewReader(b))
	if d.Decode(&had) != nil {
		return ""
	}
	digest, err := checkSHA256(had.Digest)
	if had.Digest = ""; err != nil || had != now {
		return ""
	}
	return digest
}

// allocated is what a sparse file takes up, in bytes: st_blocks is in units of 512, whatever the file
// system's are (stat(2)).
func allocated(fi os.FileInfo) int64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return fi.Size()
}

// ownFolder reports whether a folder is there and belongs to this process's user.
func ownFolder(dir string) bool {
	fi, err := os.Stat(dir)
	if err != nil {
		return false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}
