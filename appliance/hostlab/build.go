package hostlab

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// recipe is the recipe of the base image; its digest is the image's name in the cache.
//
//go:embed recipe
var recipe embed.FS

const (
	suite    = "trixie" // Linux 6.12: landlock ABI 3 and cgroup v2
	diskSize = 40 << 30 // sparse: room for guest images, not a cost
	// mke2fsOptions do everything now: otherwise ("lazy") a kernel thread does the rest in the lab, emulated.
	mke2fsOptions = "lazy_itable_init=0,lazy_journal_init=0,nodiscard"
)

// base is a folder of the cache with a built base image.
type base struct{ dir string }

func (b base) path(name string) string { return filepath.Join(b.dir, name) }
func (b base) disk() string            { return b.path("disk.raw") }
func (b base) kernel() string          { return b.path("vmlinuz") }
func (b base) initrd() string          { return b.path("initrd") }

// recipeDigest returns a name for a base image that depends on everything except Debian's own packages: their
// updates do not rebuild a cached image.
func recipeDigest() (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, suite, diskSize, mke2fsOptions, emulatorSuite)
	err := fs.WalkDir(recipe, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := recipe.ReadFile(path)
		fmt.Fprintf(h, "%s %d\n%s", path, len(b), b)
		return err
	})
	return hex.EncodeToString(h.Sum(nil))[:16], err
}

// buildOnce returns the base image from the cache, and builds it first if it is missing.
func buildOnce(ctx context.Context, cache string, log io.Writer) (base, error) {
	digest, err := recipeDigest()
	if err != nil {
		return base{}, err
	}
	b := base{filepath.Join(cache, "base-"+digest)}
	return b, makeOnce(ctx, cache, b.dir, func(tmp string) error {
		if os.Getuid() != 0 {
			return errors.New("hostlab: the base image is not built yet, which needs root (mmdebstrap): run it as root once")
		}
		fmt.Fprintf(log, "hostlab: building the base image in %s from Debian's packages, once; it takes minutes\n", b.dir)
		start := time.Now()
		if err := build(ctx, base{tmp}, log); err != nil {
			return err
		}
		fmt.Fprintf(log, "hostlab: built in %s\n", time.Since(start).Round(time.Second))
		return prune(cache, base{tmp})
	})
}

// makeOnce creates the folder dir of the cache unless it exists: fill writes to a temporary folder, which is then renamed. If several
// processes want it, one works and the others wait.
func makeOnce(ctx context.Context, cache, dir string, fill func(tmp string) error) error {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return fmt.Errorf("hostlab: %w", err)
	}
	lock, err := waitLock(ctx, filepath.Join(cache, "build.lock"))
	if err != nil {
		return fmt.Errorf("hostlab: waiting for another builder: %w", err)
	}
	defer lock.Close()
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	tmp := dir + ".new"
	if err := os.RemoveAll(tmp); err != nil { // left by a process that was killed
		return fmt.Errorf("hostlab: %w", err)
	}
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return fmt.Errorf("hostlab: %w", err)
	}
	if err := fill(tmp); err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	if err := os.Rename(tmp, dir); err != nil {
		return fmt.Errorf("hostlab: %w", err)
	}
	return nil
}

// prune removes what other recipes left in the cache: gigabytes that nothing here will use again.
func prune(cache string, keep base) error {
	var errs []error
	for _, pattern := range []string{"base-*", "booted-*"} {
		old, err := filepath.Glob(filepath.Join(cache, pattern))
		errs = append(errs, err)
		for _, dir := range old {
			if dir != keep.dir {
				errs = append(errs, os.RemoveAll(dir))
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("hostlab: remove old images: %w", err)
	}
	return nil
}

func build(ctx context.Context, b base, log io.Writer) error {
	if err := unpackRecipe(b.dir); err != nil {
		return fmt.Errorf("hostlab: %w", err)
	}
	if err := makeKeys(ctx, b); err != nil {
		return err
	}
	packages, err := packages()
	if err != nil {
		return err
	}
	mirror, err := mirror(ctx)
	if err != nil {
		return err
	}
	root := b.path("root")
	err = mmdebstrap(ctx, b.dir, log, "--variant=minbase", "--include="+strings.Join(packages, ","),
		"--essential-hook=cp -a --no-preserve=ownership recipe/files/. \"$1\"",
		"--customize-hook=recipe/setup.sh \"$1\" . recipe",
		suite, root, mirror)
	if err != nil {
		return err
	}
	if err := unpackQEMU(ctx, b, log); err != nil {
		return err
	}
	f, err := os.Create(b.disk())
	if err != nil {
		return fmt.Errorf("hostlab: %w", err)
	}
	if err := errors.Join(f.Truncate(diskSize), f.Close()); err != nil {
		return fmt.Errorf("hostlab: %w", err)
	}
	// Few inodes, because their tables are written now.
	if err := run(ctx, "mke2fs", "-q", "-t", "ext4", "-i", "65536", "-E", mke2fsOptions, "-d", root, b.disk()); err != nil {
		return err
	}
	if err := os.Chmod(b.disk(), 0o444); err != nil { // each lab writes to an overlay
		return fmt.Errorf("hostlab: %w", err)
	}
	return errors.Join(os.RemoveAll(root), os.RemoveAll(b.path("recipe")))
}

// mmdebstrap makes a root file system from Debian's packages, working in dir.
func mmdebstrap(ctx context.Context, dir string, log io.Writer, args ...string) error {
	cmd := exec.CommandContext(ctx, "mmdebstrap", append([]string{"--mode=root", "--components=main"}, args...)...)
	cmd.Dir = dir
	// In its own process group: if only mmdebstrap were killed, apt and dpkg would continue.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	said := &lastLines{to: log}
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("hostlab: mmdebstrap: %w\n%s", err, tail(said.String(), 30))
	}
	return nil
}

func unpackRecipe(dir string) error {
	if err := os.CopyFS(dir, recipe); err != nil {
		return err
	}
	// embed keeps no modes.
	for _, f := range []string{"setup.sh", "init"} {
		if err := os.Chmod(filepath.Join(dir, "recipe", f), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// makeKeys generates the keys of the host and of its user. They are part of the cached image.
func makeKeys(ctx context.Context, b base) error {
	for _, name := range []string{"id_ed25519", "host_ed25519"} {
		if err := run(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "hostlab", "-f", b.path(name)); err != nil {
			return err
		}
	}
	pub, err := os.ReadFile(b.path("host_ed25519.pub"))
	if err != nil {
		return fmt.Errorf("hostlab: %w", err)
	}
	return os.WriteFile(b.path("known_hosts"), append([]byte("hostlab "), pub...), 0o644)
}

func packages() ([]string, error) {
	b, err := recipe.ReadFile("recipe/packages")
	return strings.Fields(string(b)), err
}

// MirrorVariable names the environment variable with the Debian mirror to build from, for machines whose apt has none.
const MirrorVariable = "HOSTLAB_MIRROR"

// mirror returns the Debian mirror that apt on this machine uses, which may be the only one that it can reach.
func mirror(ctx context.Context) (string, error) {
	if m := os.Getenv(MirrorVariable); m != "" {
		return m, nil
	}
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN)",
		"Created-By: Packages").Output()
	if err == nil {
		for line := range strings.Lines(string(out)) {
			uri, origin, _ := strings.Cut(strings.TrimSpace(line), " ")
			if origin == "Debian" && strings.HasSuffix(strings.TrimSuffix(uri, "/"), "/debian") {
				return uri, nil
			}
		}
	}
	return "", fmt.Errorf("hostlab: apt on this machine has no Debian mirror; set %s=https://mirror.example.com/debian", MirrorVariable)
}

// lastLines passes on what is written, and keeps the end for an error.
type lastLines struct {
	to   io.Writer
	said []byte
}

func (w *lastLines) Write(p []byte) (int, error) {
	w.said = append(w.said, p...)
	if over := len(w.said) - 64<<10; over > 0 {
		w.said = w.said[over:]
	}
	return w.to.Write(p)
}

func (w *lastLines) String() string { return string(w.said) }

// newRunDir creates a lab's private folder and locks it. It removes folders without a lock, which belong to processes
// that were killed.
func newRunDir(ctx context.Context, cache string) (string, *os.File, error) {
	labs := filepath.Join(cache, "labs")
	if err := os.MkdirAll(labs, 0o700); err != nil {
		return "", nil, fmt.Errorf("hostlab: %w", err)
	}
	// Otherwise another process could remove a folder between its creation and its locking.
	sweep, err := waitLock(ctx, filepath.Join(cache, "labs.lock"))
	if err != nil {
		return "", nil, fmt.Errorf("hostlab: %w", err)
	}
	defer sweep.Close()
	old, err := os.ReadDir(labs)
	if err != nil {
		return "", nil, fmt.Errorf("hostlab: %w", err)
	}
	for _, d := range old {
		dir := filepath.Join(labs, d.Name())
		if lock, err := tryLock(dir); err == nil {
			os.RemoveAll(dir)
			lock.Close()
		}
	}
	dir, err := os.MkdirTemp(labs, "")
	if err != nil {
		return "", nil, fmt.Errorf("hostlab: %w", err)
	}
	lock, err := tryLock(dir)
	if err != nil {
		return "", nil, fmt.Errorf("hostlab: %w", err)
	}
	return dir, lock, nil
}

// tryLock takes the flock(2) of a file or folder, or fails at once. The lock ends when the file is closed or the process ends.
func tryLock(path string) (*os.File, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	}
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return f, nil
}

func waitLock(ctx context.Context, path string) (*os.File, error) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		f, err := tryLock(path)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return f, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-tick.C:
		}
	}
}

// defaultCache returns the git-ignored .cache of the source tree around the working folder, which need.Cache uses, too.
func defaultCache() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("hostlab: %w", err)
	}
	for up := ""; dir != up; up, dir = dir, filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return filepath.Join(dir, ".cache"), nil
		}
	}
	return "", errors.New("hostlab: no go.mod above the working folder: set Options.Cache")
}
