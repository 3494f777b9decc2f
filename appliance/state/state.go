// Package state keeps what must survive a crash: files that are written whole or
// not at all, and locks. It does not know what the files hold.
package state

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// WriteFile writes a file whole or not at all: temporary file in the same folder, chmod,
// fsync, rename, fsync of the folder. The mode is not subject to the umask.
func WriteFile(path string, data []byte, mode os.FileMode) error {
	dir := filepath.Dir(path)
	// Without WithTempDir, renameio may use $TMPDIR.
	f, err := renameio.NewPendingFile(path, renameio.WithTempDir(dir), renameio.WithStaticPermissions(mode), renameio.WithExistingPermissions())
	if err != nil {
		return err
	}
	defer f.Cleanup()
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return err
	}
	return SyncFolder(dir)
}

// SyncFolder flushes a folder: otherwise a power cut may undo a rename in it.
func SyncFolder(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// ErrLocked is TryLock's error if another process holds the lock.
var ErrLocked = errors.New("locked by another process")

// Lock is an flock(2) on a file. The kernel releases it when the process ends.
type Lock struct{ f *os.File }

// TryLock takes the lock at path, or returns ErrLocked at once. It creates the file if necessary.
func TryLock(path string) (*Lock, error) { return tryLock(path, unix.LOCK_EX) }

func tryLock(path string, how int) (*Lock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%s: %w", path, ErrLocked)
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return &Lock{f}, nil
}

// Share lets others hold the lock, too, each by TryShare. It fails with ErrLocked if another process took the lock in between.
func (l *Lock) Share() error { return l.convert(unix.LOCK_SH) }

// Upgrade makes a shared lock one that nobody else holds. It fails with ErrLocked if others share it; then it may be lost, and the only
// thing left to do with it is Unlock (flock(2): a conversion is not atomic).
func (l *Lock) Upgrade() error { return l.convert(unix.LOCK_EX) }

func (l *Lock) convert(how int) error {
	err := unix.Flock(int(l.f.Fd()), how|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("%s: %w", l.f.Name(), ErrLocked)
	}
	return err
}

// TryShare takes a shared lock at path, or returns ErrLocked at once if another process holds it exclusively.
func TryShare(path string) (*Lock, error) { return tryLock(path, unix.LOCK_SH) }

// WaitLock takes the lock at path, or gives up when ctx ends. flock has no
// timeout, so it tries again every 50 ms.
func WaitLock(ctx context.Context, path string) (*Lock, error) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		l, err := TryLock(path)
		if !errors.Is(err, ErrLocked) {
			return l, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w: %w", err, ctx.Err())
		case <-tick.C:
		}
	}
}

// Unlock releases the lock. The file stays: removing it would let two
// processes lock two different files of the same name.
func (l *Lock) Unlock() error { return l.f.Close() }

// Tail returns the end of a file, at most n bytes. The file may be growing.
func Tail(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	return io.ReadAll(io.NewSectionReader(f, max(0, st.Size()-n), n))
}
