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

// stamp identifies a version of a file. Only someone who may write the file anyway can change its content and keep its stamp.
type stamp struct {
	Dev    uint64 `json:"dev"`
	Inode  uint64 `json:"inode"`
	Size   int64  `json:"size"`
	MTime  int64  `json:"mtime"` // nanoseconds since 1970
	CTime  int64  `json:"ctime"`
	Digest string `json:"digest,omitempty"` // only in the cache
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

// hashFile returns the SHA-256 of a file. It caches the digest below cache, together with the file's stamp, so that 10 GB need not be read
// at every start. If cache is "" it caches nothing.
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
		return "", errors.Join(err, fmt.Errorf("%s changed while it was read; is something writing to it?", path))
	}
	before.Digest = hex.EncodeToString(digest.Sum(nil))
	// Not in a missing folder, or one of another user: a user who only looks at images leaves nothing there.
	if kept != "" && ownFolder(filepath.Dir(kept)) {
		b, err := json.Marshal(before)
		if err := errors.Join(err, state.WriteFile(kept, b, 0o600)); err != nil {
			return "", fmt.Errorf("cache the digest of %s: %w", path, err)
		}
	}
	return before.Digest, nil
}

// keptDigest returns the cached digest of a file with this stamp, or "".
func keptDigest(path string, now stamp) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "" // not cached, or not readable for this user: hash the file itself
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

// allocated returns the bytes that a sparse file occupies. st_blocks counts units of 512 bytes on every file system (stat(2)).
func allocated(fi os.FileInfo) int64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return st.Blocks * 512
	}
	return fi.Size()
}

// ownFolder reports whether a folder exists and belongs to this process's user.
func ownFolder(dir string) bool {
	fi, err := os.Stat(dir)
	if err != nil {
		return false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}
