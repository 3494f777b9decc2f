package hostlab

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestRunDirs(t *testing.T) {
	cache := t.TempDir()
	held, lock, err := newRunDir(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	left, dead, err := newRunDir(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	dead.Close() // as the kernel does when its process ends
	next, lock2, err := newRunDir(t.Context(), cache)
	if err != nil {
		t.Fatal(err)
	}
	defer lock2.Close()
	for dir, want := range map[string]bool{held: true, left: false, next: true} {
		if _, err := os.Stat(dir); (err == nil) != want {
			t.Errorf("%s: there: %t, want %t", dir, err == nil, want)
		}
	}
}

func TestWaitLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	first, err := waitLock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tryLock(path); !errors.Is(err, syscall.EWOULDBLOCK) {
		t.Errorf("a second holder: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := waitLock(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("waiting in vain: %v", err)
	}
	first.Close()
	second, err := waitLock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
	if _, err := waitLock(t.Context(), filepath.Join(path, "x")); err == nil {
		t.Error("a lock in no folder is no error")
	}
}

func TestPrune(t *testing.T) {
	cache := t.TempDir()
	for _, d := range []string{"base-old", "base-new", "booted-old", "labs"} {
		if err := os.Mkdir(filepath.Join(cache, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := prune(cache, base{filepath.Join(cache, "base-new")}); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(cache, "*"))
	if err != nil || len(left) != 2 || filepath.Base(left[0]) != "base-new" || filepath.Base(left[1]) != "labs" {
		t.Errorf("left are %q, %v", left, err)
	}
}

func TestQuote(t *testing.T) {
	for in, want := range map[string]string{"": "''", "a b": "'a b'", "it's": `'it'\''s'`} {
		if got := quote(in); got != want {
			t.Errorf("%q became %s, want %s", in, got, want)
		}
	}
}

func TestTail(t *testing.T) {
	for _, c := range []struct {
		n        int
		in, want string
	}{{2, "a\nb\nc\n\n", "b\nc"}, {0, "a\nb\n", "a\nb"}, {5, "a", "a"}, {1, "", ""}} {
		if got := tail(c.in, c.n); got != c.want {
			t.Errorf("the last %d lines of %q are %q, want %q", c.n, c.in, got, c.want)
		}
	}
}

func TestNewEnough(t *testing.T) {
	for version, want := range map[string]string{
		"QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)":   "",
		"QEMU emulator version 10.2.0":                                  "",
		"QEMU emulator version 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)": "has QEMU 10.0, which loses interrupts",
		"QEMU emulator version 9.2.1":                                   "has QEMU 9.2",
		"":                                                              `version is ""`,
		"version 99999999999999999999.1":                                "out of range",
	} {
		err := newEnough(version)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", version, err, want)
		}
	}
}

// TestRecipe: all packages are named, in order, once.
func TestRecipe(t *testing.T) {
	all, err := packages()
	if err != nil || len(all) < 20 {
		t.Fatalf("packages are %q, %v", all, err)
	}
	for i := range all[1:] {
		if strings.Compare(all[i], all[i+1]) >= 0 {
			t.Errorf("recipe/packages is not sorted at %q, %q", all[i], all[i+1])
		}
	}
	first, err := recipeDigest()
	if err != nil {
		t.Fatal(err)
	}
	if second, _ := recipeDigest(); first != second {
		t.Errorf("the recipe's digest is %s and %s", first, second)
	}
}

func TestMakeOnce(t *testing.T) {
	cache := filepath.Join(t.TempDir(), "cache")
	dir := filepath.Join(cache, "base-x")
	left := dir + ".new"
	if err := os.MkdirAll(filepath.Join(left, "of a killed process"), 0o755); err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	if err := makeOnce(t.Context(), cache, dir, func(string) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("the error is %v, want %v", err, broken)
	}
	for _, path := range []string{dir, left} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("after a failure %s exists (%v)", path, err)
		}
	}
	var filled atomic.Int32
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			err := makeOnce(t.Context(), cache, dir, func(tmp string) error {
				filled.Add(1)
				return os.WriteFile(filepath.Join(tmp, "disk"), []byte("x"), 0o644)
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	entries, err := os.ReadDir(dir)
	if n := filled.Load(); n != 1 || err != nil || len(entries) != 1 {
		t.Errorf("filled %d times, with %v, %v", n, entries, err)
	}
}
