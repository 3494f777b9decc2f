package image

import (
	"bytes"
	"context"
	"crypto/sha512"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/guest"
	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/seed"
)

// lab is a Plan with one image, its files, and a Store of it.
type lab struct {
	*Store
	t      *testing.T
	driver *fakeDriver
	img    *plan.Image
	dir    string
	phases []string
}

// newLab needs a file system that can clone. A fake plays the prebuilds.
func newLab(t *testing.T) *lab {
	t.Helper()
	return labIn(t, xfs(t, 512))
}

// labIn is a lab in a folder that need not support cloning, which is enough for bases.
func labIn(t *testing.T, dir string) *lab {
	t.Helper()
	l := &lab{t: t, dir: dir, driver: &fakeDriver{t: t}}
	at := func(names ...string) string { return filepath.Join(append([]string{dir}, names...)...) }
	for name, text := range map[string]string{
		"disk":   string(disk(2*mib, map[int]string{ext4Magic: "\x53\xef", mib: "content"})),
		"kernel": "old kernel", "initrd": "old initrd", "fleetingd": "the guest part",
	} {
		if err := os.WriteFile(at(name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run, err := os.MkdirTemp("", "img") // t.TempDir's are too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	p := &plan.Plan{
		Paths: plan.Paths{State: at("state"), Disks: at("disks"), Images: at("disks", "images"), Cache: at("state", "cache"), Run: run},
		Slots: []plan.Slot{{TAP: "fd0", Queues: 1}},
		Pools: []plan.Pool{{Image: "golden", CPUs: 2, Memory: 1 << 30, Disk: 64 * mib}, {Image: "golden", CPUs: 4, Memory: 2 << 30, Disk: 32 * mib}},
		Images: []plan.Image{{
			Name: "golden", User: "ci",
			Source: plan.Source{File: &plan.FileSource{Disk: at("disk"), Kernel: at("kernel"), Initrd: at("initrd")}},
			Prebuild: &plan.Prebuild{
				Steps:   []plan.Step{{Name: "run[0]: one", Command: "one"}, {Name: "run[1]: two", Command: "two"}},
				Timeout: plan.Duration(5 * time.Minute), // of work for milliseconds: the machine may be busy
				Seed:    seed.Seed{InstanceID: "prebuild", Hostname: "prebuild"},
			},
		}},
	}
	l.img = &p.Images[0]
	l.Store = l.open(p)
	return l
}

// open returns a Store of a Plan, as another process would have.
func (l *lab) open(p *plan.Plan) *Store {
	l.t.Helper()
	s, err := Open(p, Options{Log: slog.New(slog.DiscardHandler), Driver: l.driver, GuestBinary: filepath.Join(l.dir, "fleetingd"), Progress: func(e Progress) {
		l.phases = append(l.phases, string(e.Phase)+" "+e.Line)
	}})
	if err != nil {
		l.t.Fatal(err)
	}
	s.net = hasty()
	return s
}

func (l *lab) ensure() *Sealed {
	l.t.Helper()
	img, err := l.Ensure(l.t.Context(), l.img)
	if err != nil {
		l.t.Fatal(err)
	}
	return img
}

func (l *lab) write(name, text string) {
	l.t.Helper()
	if err := os.WriteFile(filepath.Join(l.dir, name), []byte(text), 0o644); err != nil {
		l.t.Fatal(err)
	}
}

func TestEnsure(t *testing.T) {
	l := newLab(t)
	img := l.ensure()
	if img.Cached || !img.Guest || img.User != "ci" || img.Size != 32*mib {
		t.Errorf("%+v", img)
	}
	if img.Cmdline != "root=/dev/vda rootflags=noinit_itable rw quiet" {
		t.Errorf("command line %q", img.Cmdline)
	}
	for path, want := range map[string]string{img.Kernel: "new kernel", img.Initrd: "new initrd"} {
		if b, err := os.ReadFile(path); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", path, b, err)
		}
	}
	for _, path := range []string{img.Disk, img.Kernel, img.Initrd} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o444 {
			t.Errorf("%s: %v, %v; want mode 0444", path, fi.Mode(), err)
		}
	}
	wantOnly(t, filepath.Dir(img.Disk), "disk.raw", "initrd", "kernel", "manifest.json")
	if cfg := l.driver.started[0]; cfg.CPUs != 4 || cfg.Memory != 2<<30 || cfg.Net.TAP != "fd0" || cfg.Cmdline != img.Cmdline {
		t.Errorf("the VM was %+v", cfg)
	}
	for _, want := range []string{"prebuild run[0]: one: did one", "prebuild run[1]: two: did two"} {
		if !slices.Contains(l.phases, want) {
			t.Errorf("the progress has no %q: %q", want, l.phases)
		}
	}

	// The second start builds nothing, not even in another process.
	again, err := l.open(l.plan).Ensure(t.Context(), l.img)
	if err != nil || !again.Cached || again.Digest != img.Digest || len(l.driver.started) != 1 {
		t.Errorf("%+v, %v, %d VMs", again, err, len(l.driver.started))
	}
	// Another build slot does not cause a build either.
	l.img.Prebuild.Seed.Network = &seed.Network{MTU: 1400}
	if again := l.ensure(); !again.Cached {
		t.Error("another network built another image")
	}
	dst := filepath.Join(l.dir, "clone")
	if err := l.Clone(t.Context(), img, dst, 64*mib); err != nil {
		t.Fatal(err)
	}
}

// Each input of an image changes its digest.
func TestEnsureBuildsAnew(t *testing.T) {
	l := newLab(t)
	seen := map[string]string{l.ensure().Digest: "the first"}
	for _, c := range []struct {
		name   string
		change func()
	}{
		{"another step", func() { l.img.Prebuild.Steps[1].Command = "three" }},
		{"another guest part", func() { l.write("fleetingd", "a later guest part") }},
		{"another disk", func() { l.write("disk", string(disk(2*mib, map[int]string{ext4Magic: "\x53\xef", mib: "contenT"}))) }},
		{"another kernel", func() { l.write("kernel", "k2") }},
		{"another user", func() { l.img.User = "debian" }},
		{"another size", func() { l.plan.Pools[1].Disk = 48 * mib }},
		{"another command line", func() { l.img.Source.File.Cmdline = "root=/dev/vda1" }},
	} {
		c.change()
		img := l.ensure()
		if other, ok := seen[img.Digest]; ok || img.Cached {
			t.Errorf("%s: the same image as %s", c.name, other)
		}
		seen[img.Digest] = c.name
	}
}

func TestUnprebuilt(t *testing.T) {
	need.Tools(t, "qemu-img")
	l := labIn(t, t.TempDir())
	l.img.Prebuild = nil
	img := l.ensure()
	if img.Guest || img.Cached || img.User != "ci" || img.Size != 2*mib {
		t.Errorf("%+v", img)
	}
	if again := l.ensure(); !again.Cached || again.Disk != img.Disk {
		t.Errorf("%+v", again)
	}
}

// A failed prebuild says why, and leaves nothing.
func TestPrebuildFails(t *testing.T) {
	l := newLab(t)
	for _, c := range []struct {
		name string
		set  func(*fakeDriver)
		want []string
	}{
		{"start", func(d *fakeDriver) { d.startErr = errors.New("no TAP fd0") }, []string{"no TAP fd0"}},
		{"a step", func(d *fakeDriver) { d.failStep = "two" }, []string{"run[1]: two", "7"}},
		{"the VMM dies", func(d *fakeDriver) { d.dies = true }, []string{"signal: killed", "last words"}},
		{"sealing", func(d *fakeDriver) { d.badSeal = "the disk is full" }, []string{"the disk is full"}},
		{"silence", func(d *fakeDriver) { d.silent = true }, []string{"timeout of 300ms", "last words"}},
		{"no power-off", func(d *fakeDriver) { d.noOff = true }, []string{"timeout of 300ms"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l.driver = &fakeDriver{t: t}
			c.set(l.driver)
			l.img.Prebuild.Timeout = plan.Duration(5 * time.Minute)
			if l.driver.silent || l.driver.noOff {
				l.img.Prebuild.Timeout = plan.Duration(300 * time.Millisecond)
			}
			_, err := l.open(l.plan).Ensure(t.Context(), l.img)
			wantError(t, err, append(c.want, `image "golden"`, "prebuild")...)
			if strings.Contains(err.Error(), "\x1b") {
				t.Error("what the guest wrote is not escaped")
			}
			step, ok := errors.AsType[*guest.StepError](err)
			if ok != (l.driver.failStep != "") || ok && !slices.Equal(step.Tail, []string{"did two"}) {
				t.Errorf("a *guest.StepError: %v, %+v", ok, step)
			}
			l.driver.wantNothingLeft(l.Store)
		})
	}
	l.driver = &fakeDriver{t: t, noExport: true}
	l.img.Prebuild.Timeout = plan.Duration(5 * time.Minute) // the last case's is too short for a busy machine
	img, err := l.open(l.plan).Ensure(t.Context(), l.img)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(img.Kernel); err != nil || string(b) != "old kernel" {
		t.Errorf("with no export the kernel is %q, %v; want the base's", b, err)
	}
}

func TestPrebuildCancelled(t *testing.T) {
	l := newLab(t)
	l.driver.silent = true
	ctx, cancel := context.WithCancelCause(t.Context())
	s := l.open(l.plan)
	s.opts.Progress = func(e Progress) {
		if e.Phase == PhasePrebuild {
			cancel(errors.New("interrupted"))
		}
	}
	_, err := s.Ensure(ctx, l.img)
	wantError(t, err, "interrupted")
	l.driver.wantNothingLeft(l.Store)
}

// The VM of a fleetingd that was killed is ended, and its remains do not disturb the next build.
func TestPrebuildAfterACrash(t *testing.T) {
	l := newLab(t)
	left := &fakeVM{driver: l.driver, done: make(chan struct{})}
	l.driver.left, l.driver.running = left, 1
	if err := os.MkdirAll(filepath.Join(l.plan.Paths.Run, "prebuild-fd0"), 0o700); err != nil {
		t.Fatal(err)
	}
	l.ensure()
	if left.Exit() == nil || l.driver.running != 0 || l.driver.adopted != 1 {
		t.Errorf("the old VM: %v; %d run", left.Exit(), l.driver.running)
	}
}

// The same if no other prebuild follows.
func TestEndPrebuilds(t *testing.T) {
	l := labIn(t, t.TempDir())
	if err := l.own(); err != nil {
		t.Fatal(err)
	}
	left := &fakeVM{driver: l.driver, done: make(chan struct{})}
	l.driver.left, l.driver.running = left, 1
	dir := filepath.Join(l.plan.Paths.Run, "prebuild-fd0")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := l.shelf.lock(t.Context(), "slot-fd0")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.EndPrebuilds(t.Context()); err != nil || l.driver.running != 1 {
		t.Errorf("while a prebuild is under way: %d run, %v", l.driver.running, err)
	}
	if err := lock.Unlock(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // twice is once
		if err := l.EndPrebuilds(t.Context()); err != nil || l.driver.running != 0 || left.Exit() == nil {
			t.Errorf("%d run, %v", l.driver.running, err)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestDiskTooSmall(t *testing.T) {
	l := newLab(t)
	l.plan.Pools[1].Disk = mib
	_, err := l.Ensure(t.Context(), l.img)
	wantError(t, err, "2 MiB", "1 MiB", "larger")
	l.driver.wantNothingLeft(l.Store)
}

// If many callers want one image at the same time, one of them builds it, across processes.
func TestEnsureTogether(t *testing.T) {
	l := newLab(t)
	var wg sync.WaitGroup
	for range 8 {
		s := l.open(l.plan)
		s.opts.Progress = nil
		wg.Go(func() {
			if _, err := s.Ensure(t.Context(), l.img); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(l.driver.started); n != 1 {
		t.Errorf("%d prebuilds", n)
	}
}

// An image that was damaged on the disk is rebuilt instead of used.
func TestDamaged(t *testing.T) {
	l := newLab(t)
	img := l.ensure()
	dir := filepath.Dir(img.Disk)
	for name, damage := range map[string]func() error{
		"manifest cut":     func() error { return os.Truncate(filepath.Join(dir, manifestFile), 20) },
		"manifest gone":    func() error { return os.Remove(filepath.Join(dir, manifestFile)) },
		"disk cut":         func() error { return os.Truncate(img.Disk, mib) },
		"kernel gone":      func() error { return os.Remove(img.Kernel) },
		"another's digest": func() error { return os.WriteFile(filepath.Join(dir, manifestFile), []byte(`{"format":2}`), 0o444) },
		"no folder":        func() error { return os.RemoveAll(dir) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := damage(); err != nil {
				t.Fatal(err)
			}
			before := len(l.driver.started)
			if again := l.ensure(); again.Cached || again.Digest != img.Digest || len(l.driver.started) != before+1 {
				t.Errorf("%+v", again)
			}
			if again := l.ensure(); !again.Cached {
				t.Error("it is still damaged")
			}
		})
	}
}

// webLab serves the lab's files and their SHA256SUMS.
func webLab(t *testing.T) (l *lab, files map[string]string) {
	t.Helper()
	need.Tools(t, "qemu-img")
	l = labIn(t, t.TempDir())
	l.img.Prebuild = nil
	files = map[string]string{"/kernel": "web kernel", "/disk.img": string(disk(mib, map[int]string{ext4Magic: "\x53\xef"}))}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, ok := files[r.URL.Path]
		if r.URL.Path == "/SHA256SUMS" && !ok {
			for name, text := range files {
				w.Write([]byte(digest([]byte(text)) + "  " + name[1:] + "\n"))
			}
			return
		}
		if !ok {
			http.NotFound(w, r)
			return
		}
		w.Write([]byte(text))
	}))
	t.Cleanup(srv.Close)
	l.img.Source = plan.Source{URL: &plan.URLSource{Disk: srv.URL + "/disk.img", Kernel: srv.URL + "/kernel"}}
	return l, files
}

func TestURL(t *testing.T) {
	l, files := webLab(t)
	img := l.ensure()
	if b, err := os.ReadFile(img.Kernel); err != nil || string(b) != "web kernel" {
		t.Errorf("%q, %v", b, err)
	}
	wantOnly(t, l.plan.Paths.Cache)
	// Without the server the image is still there. Only a refresh asks the server.
	was := files["/kernel"]
	delete(files, "/kernel")
	if again := l.ensure(); !again.Cached {
		t.Error("built again")
	}
	if _, err := l.Refresh(t.Context(), l.img); err == nil {
		t.Error("a refresh did not ask")
	}
	files["/kernel"] = was
	if same, err := l.Refresh(t.Context(), l.img); err != nil || !same.Cached || same.Digest != img.Digest {
		t.Errorf("%+v, %v", same, err)
	}
	files["/kernel"] = "newer kernel"
	newer, err := l.Refresh(t.Context(), l.img)
	if err != nil || newer.Cached || newer.Digest == img.Digest {
		t.Fatalf("%+v, %v", newer, err)
	}
	if now := l.ensure(); !now.Cached || now.Digest != newer.Digest {
		t.Errorf("after the refresh: %+v", now)
	}

	// The old one is removed once it is not in use.
	removed, err := l.Prune(t.Context(), func(d string) bool { return d == img.Digest })
	if err != nil || len(removed) != 0 {
		t.Errorf("in use, and removed: %v, %v", removed, err)
	}
	items, err := l.List(t.Context())
	if err != nil || len(items) != 2 {
		t.Errorf("%+v, %v", items, err)
	}
	removed, err = l.Prune(t.Context(), nil)
	if err != nil || !slices.Equal(removed, []string{img.Digest}) {
		t.Errorf("removed %v, %v; want the old one", removed, err)
	}
	if now := l.ensure(); !now.Cached {
		t.Error("the one in use was removed")
	}
}

// TestRefreshWithoutAnswer: if there is a base, a refresh does not fail because the source does not answer, but it does if the source answers
// with an error.
func TestRefreshWithoutAnswer(t *testing.T) {
	l, files := webLab(t)
	for name, c := range map[string]struct {
		fails bool
	}{
		"the server is down":                  {false},
		"the server does not have it anymore": {true},
	} {
		t.Run(name, func(t *testing.T) {
			img := l.ensure()
			if c.fails {
				was := files["/kernel"]
				delete(files, "/kernel")
				defer func() { files["/kernel"] = was }()
				_, err := l.Refresh(t.Context(), l.img)
				wantError(t, err, "has no digest for", "/kernel", `write sha256 = "…"`)
				return
			}
			l.net.client.Transport = down{}
			defer func() { l.net.client.Transport = http.DefaultTransport }()
			same, err := l.Refresh(t.Context(), l.img)
			if err != nil || !same.Cached || same.Digest != img.Digest {
				t.Errorf("%+v, %v; want the image that is there", same, err)
			}
		})
	}
	// Without a base it is an error, which names what did not answer.
	l2, _ := webLab(t)
	l2.net.client.Transport = down{}
	_, err := l2.Ensure(t.Context(), l2.img)
	wantError(t, err, "SHA256SUMS", "no route to host", "tried 3 times")
}

// Prune removes downloads that were not resumed for a week, and no others.
func TestPruneDownloads(t *testing.T) {
	l, _ := webLab(t)
	l.ensure()
	cache := l.plan.Paths.Cache
	week := time.Now().Add(-8 * 24 * time.Hour)
	for name, then := range map[string]time.Time{
		"download-0.part": week, "download-0.part.validator": week, "download-1": week, "download-2.part": week, "download-3.part": time.Now(),
		"sha512-0": week,
	} {
		path := filepath.Join(cache, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, then, then)); err != nil {
			t.Fatal(err)
		}
	}
	lock, err := l.shelf.lock(t.Context(), "download-2") // another process resumes it now
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Unlock()
	if _, err := l.Prune(t.Context(), nil); err != nil {
		t.Error(err)
	}
	wantOnly(t, cache, "download-2.part", "download-3.part", "sha512-0")
}

// TestCheckAge: a source may be silent for a while, but not for ever without notice.
func TestCheckAge(t *testing.T) {
	l, _ := webLab(t)
	img := l.ensure()
	age := func(d time.Duration) {
		t.Helper()
		spec, err := l.baseSpec(t.Context(), l.img)
		then := unix.NsecToTimespec(time.Now().Add(-d).UnixNano())
		err = errors.Join(err, unix.UtimesNanoAt(unix.AT_FDCWD, l.shelf.refPath(spec), []unix.Timespec{then, then}, unix.AT_SYMLINK_NOFOLLOW))
		if err != nil {
			t.Fatal(err)
		}
	}
	const day = 24 * time.Hour
	l.net.client.Transport = down{}
	for _, c := range []struct {
		age, interval time.Duration
		fails         bool
	}{{0, day, false}, {6 * day, day, false}, {8 * day, day, true}, {8 * day, 0, true}, {8 * day, 3 * day, false}, {10 * day, 3 * day, true}} {
		l.plan.Refresh = plan.Duration(c.interval)
		age(c.age)
		if same, err := l.Refresh(t.Context(), l.img); err != nil || same.Digest != img.Digest {
			t.Errorf("%v: %+v, %v", c.age, same, err)
		}
		err := l.CheckAge(t.Context(), l.img)
		if c.fails {
			since := time.Now().Add(-c.age).UTC().Format(time.DateOnly)
			wantError(t, err, `image "golden"`, "has not answered for", fmt.Sprintf("%d days", c.age/day), since)
		} else if err != nil {
			t.Errorf("%v at an interval of %v: %v", c.age, c.interval, err)
		}
	}
	// An answer counts even if it brings nothing new.
	l.net.client.Transport = http.DefaultTransport
	if same, err := l.Refresh(t.Context(), l.img); err != nil || !same.Cached {
		t.Errorf("%+v, %v", same, err)
	}
	if err := l.CheckAge(t.Context(), l.img); err != nil {
		t.Error(err)
	}
}

// down is a network on which no host can be reached.
type down struct{}

func (down) RoundTrip(*http.Request) (*http.Response, error) {
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.EHOSTUNREACH)}
}

// TestSHA512List: with a list that has no SHA-256, each file is fetched once, and not again at each refresh.
func TestSHA512List(t *testing.T) {
	l, files := webLab(t)
	asked := map[string]int{}
	l.net.client.Transport = watched{func(r *http.Request) { asked[r.URL.Path]++ }}
	var list strings.Builder
	for name, text := range files {
		fmt.Fprintf(&list, "SHA512 (%s) = %x\n", name[1:], sha512.Sum512([]byte(text)))
	}
	files["/SHA256SUMS"] = list.String()
	img := l.ensure()
	for range 2 {
		again, err := l.Refresh(t.Context(), l.img)
		if err != nil || !again.Cached || again.Digest != img.Digest {
			t.Errorf("%+v, %v", again, err)
		}
	}
	if asked["/disk.img"] != 1 || asked["/kernel"] != 1 || asked["/SHA256SUMS"] != 3 {
		t.Errorf("asked %v", asked)
	}
}

type watched struct{ see func(*http.Request) }

func (w watched) RoundTrip(r *http.Request) (*http.Response, error) {
	w.see(r)
	return http.DefaultTransport.RoundTrip(r)
}

// TestPruneWhileBuilding: Prune does not take an image that is finished while it works for an unused one.
func TestPruneWhileBuilding(t *testing.T) {
	l, files := webLab(t)
	l.ensure()
	if err := l.shelf.point(digest([]byte("an old spec")), kindBase, digest([]byte("gone"))); err != nil {
		t.Fatal(err)
	}
	files["/kernel"] = "newer kernel"
	var newer *Sealed
	built := make(chan error, 1)
	var once sync.Once
	_, err := l.Prune(t.Context(), func(string) bool {
		once.Do(func() {
			go func() {
				var err error
				newer, err = l.open(l.plan).Refresh(t.Context(), l.img)
				built <- err
			}()
			select { // it is kept out, or it is done before Prune goes on
			case err := <-built:
				built <- err
			case <-time.After(time.Second):
			}
		})
		return false
	})
	if err := errors.Join(err, <-built); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(newer.Kernel); err != nil {
		t.Errorf("the new image was removed: %v", err)
	}

	// While a build is in progress nothing is removed.
	spec, err := l.baseSpec(t.Context(), l.img)
	if err != nil {
		t.Fatal(err)
	}
	lock, err := l.shelf.lock(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	files["/kernel"] = "newest kernel"
	if removed, err := l.Prune(t.Context(), nil); err != nil || len(removed) > 0 {
		t.Errorf("removed %v, %v", removed, err)
	}
	if err := lock.Unlock(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Refresh(t.Context(), l.img); err != nil {
		t.Fatal(err)
	}
	if removed, err := l.Prune(t.Context(), nil); err != nil || len(removed) != 2 || !slices.Contains(removed, newer.Digest) {
		t.Errorf("removed %v, %v; want the first and %s", removed, err, newer.Digest)
	}
}

func TestURLMismatch(t *testing.T) {
	l, files := webLab(t)
	bad := digest([]byte("x"))
	files["/SHA256SUMS"] = bad + "  disk.img\n" + digest([]byte(files["/kernel"])) + "  kernel\n"
	_, err := l.Ensure(t.Context(), l.img)
	wantError(t, err, "disk.img", bad, digest([]byte(files["/disk.img"])))
	wantOnly(t, filepath.Join(l.plan.Paths.Images, kindBase))
	if entries, err := os.ReadDir(l.plan.Paths.Cache); err != nil || slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		fi, _ := e.Info()
		return fi.Size() > 1000
	}) {
		t.Errorf("the bad disk is in the cache: %v, %v", entries, err)
	}

	l.img.Source.URL.SHA256 = bad
	_, err = l.Ensure(t.Context(), l.img)
	wantError(t, err, bad)
	files["/SHA256SUMS"] = bad + "  other.img\n"
	l.img.Source.URL.SHA256 = ""
	_, err = l.Ensure(t.Context(), l.img)
	wantError(t, err, "has no digest for", "other.img")
}

// A cloud image whose lists are signed by the test's key.
func TestUbuntu(t *testing.T) {
	l, files := webLab(t)
	key := newKey(t, nil)
	l.ubuntuKeys = armored(t, key)
	base := strings.TrimSuffix(l.img.Source.URL.Disk, "/disk.img")
	image := files["/disk.img"]
	clear(files)
	publish := func() {
		sums := map[string]string{}
		for _, f := range []struct{ folder, name, text string }{
			{"/noble/current/", "noble-server-cloudimg-amd64.img", image},
			{"/noble/current/unpacked/", "noble-server-cloudimg-amd64-vmlinuz-generic", "a kernel"},
			{"/noble/current/unpacked/", "noble-server-cloudimg-amd64-initrd-generic", "an initrd"},
		} {
			files[f.folder+f.name] = f.text
			sums[f.folder] += digest([]byte(f.text)) + " *" + f.name + "\n"
		}
		for folder, text := range sums {
			files[folder+"SHA256SUMS"] = text
			files[folder+"SHA256SUMS.gpg"] = string(sign(t, key, []byte(text), nil))
		}
	}
	publish()
	l.img.Source = plan.Source{Ubuntu: &plan.UbuntuSource{Release: "noble", Mirror: base, Arch: "amd64"}}
	img := l.ensure()
	if b, err := os.ReadFile(img.Initrd); err != nil || string(b) != "an initrd" {
		t.Errorf("%q, %v", b, err)
	}

	sums := "/noble/current/unpacked/SHA256SUMS"
	for name, c := range map[string]struct {
		spoil func()
		want  string
	}{
		"unsigned":         {func() { delete(files, sums+".gpg") }, "cannot be verified"},
		"changed":          {func() { files[sums] = strings.Replace(files[sums], "a", "b", 1) }, "not valid"},
		"another's key":    {func() { files[sums+".gpg"] = string(sign(t, newKey(t, nil), []byte(files[sums]), nil)) }, "not by a trusted key"},
		"another's kernel": {func() { files["/noble/current/unpacked/noble-server-cloudimg-amd64-vmlinuz-generic"] = "evil" }, "SHA-256"},
	} {
		t.Run(name, func(t *testing.T) {
			publish()
			c.spoil()
			if name == "another's kernel" {
				if err := os.RemoveAll(filepath.Join(l.plan.Paths.Images, kindBase)); err != nil {
					t.Fatal(err)
				}
				if err := os.Mkdir(filepath.Join(l.plan.Paths.Images, kindBase), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			_, err := l.Refresh(t.Context(), l.img)
			wantError(t, err, c.want)
		})
	}
}

func TestHashFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "big")
	reads := 0
	hash := func() string {
		t.Helper()
		d, err := hashFile(t.Context(), path, dir, func(int64, int64) { reads++ })
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if hash() != digest(content) || reads == 0 {
		t.Error("not the file's digest")
	}
	reads = 0
	if hash() != digest(content) || reads != 0 {
		t.Error("the file was read again")
	}
	// Same size and modification time, other content: the change time differs.
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	other := bytes.ToUpper(content)
	if err := errors.Join(os.WriteFile(path, other, 0o600), os.Chtimes(path, fi.ModTime(), fi.ModTime())); err != nil {
		t.Fatal(err)
	}
	if hash() != digest(other) {
		t.Error("a changed file has its old digest")
	}
	kept, err := filepath.Glob(filepath.Join(dir, "digest-*"))
	if err != nil || len(kept) != 1 {
		t.Fatal(kept, err)
	}
	for _, garbage := range []string{"", "{", `{"digest":"x"}`, "\x00"} {
		if err := os.WriteFile(kept[0], []byte(garbage), 0o600); err != nil {
			t.Fatal(err)
		}
		if hash() != digest(other) {
			t.Errorf("a cache of %q was believed", garbage)
		}
	}
	if _, err := hashFile(t.Context(), dir, "", nil); err == nil {
		t.Error("a folder has a digest")
	}
}
