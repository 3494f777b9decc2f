package image

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/fleetingd/fleetingd/appliance/state"
)

// Download fetches a file of at most max bytes to path, if it has this SHA-256 digest (in hex). What is at path with that digest is left as it
// is. An interrupted download goes on at the next call.
func Download(ctx context.Context, url, sha256, path string, max int64) error {
	want, err := parseChecksum(sha256)
	if err != nil || len(want) != sha256Digits {
		return fmt.Errorf("%s: %.80q is not a SHA-256 digest: 64 hex digits", redacted(url), sha256)
	}
	if have, err := hashFile(ctx, path, "", nil); err == nil && have == string(want) {
		return nil
	}
	if _, err := newFetcher().file(ctx, download{url: url, dst: path, want: want, max: max}); err != nil {
		return err
	}
	if err := os.Chmod(path, 0o644); err != nil {
		return err
	}
	return state.SyncFolder(filepath.Dir(path))
}

// Get fetches at most max bytes.
func Get(ctx context.Context, url string, max int64) ([]byte, error) {
	return newFetcher().bytes(ctx, url, max)
}
