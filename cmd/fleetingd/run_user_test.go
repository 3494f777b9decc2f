package main

import (
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/need"
)

// TestChownTree: a tree is given away while its user exchanges a folder in it for a link to one of root's, again and again.
func TestChownTree(t *testing.T) {
	need.Root(t)
	dir, roots := t.TempDir(), t.TempDir()
	secret := filepath.Join(roots, "file")
	sub, link := filepath.Join(dir, "sub"), filepath.Join(dir, "link")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{secret, filepath.Join(sub, "file")} {
		if err := os.WriteFile(f, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(roots, link); err != nil {
		t.Fatal(err)
	}
	over, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-over:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, sub, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE)
			}
		}
	}()
	u := runtimeUser{UID: 61999, GID: 61999}
	for end := time.Now().Add(time.Second); time.Now().Before(end); {
		_ = chownTree(dir, u) // what it says of a tree that changes is not the question
	}
	close(over)
	<-ended
	owner := func(path string) uint32 {
		st, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		return st.Sys().(*syscall.Stat_t).Uid
	}
	if uid := owner(secret); uid != 0 {
		t.Errorf("a file of root's outside of the tree belongs to %d now", uid)
	}
	if err := chownTree(dir, u); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, sub, link} {
		if uid := owner(path); uid != 61999 {
			t.Errorf("%s belongs to %d", path, uid)
		}
	}
	if err := chownTree(filepath.Join(dir, "absent"), u); err != nil {
		t.Error(err)
	}
}

// TestWithoutSecrets: what runs as the runtime user does not inherit the secrets of the spec; every process of that user could read them.
func TestWithoutSecrets(t *testing.T) {
	environ := []string{"PATH=/bin", "S3_KEY=x", "S3_KEY_ID=y", "FLEETINGD_VAR_token=z", "FLEETINGD_HYPERVISOR=qemu", "EMPTY="}
	got := withoutSecrets(environ, []string{"S3_KEY", "UNSET"})
	if want := []string{"PATH=/bin", "S3_KEY_ID=y", "FLEETINGD_HYPERVISOR=qemu", "EMPTY="}; !slices.Equal(got, want) {
		t.Errorf("the environment is %q, want %q", got, want)
	}
	if len(environ) != 6 || environ[1] != "S3_KEY=x" {
		t.Errorf("the caller's own has changed: %q", environ)
	}
}
