package image

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

const inRelease = "Origin: Debian\nLabel: Debian\nDate: Sat, 21 Nov 2026 09:15:44 UTC\n"

// mirror serves InRelease files, by their path without its last part. "broken" answers 500.
func mirror(t *testing.T, suites map[string]string) string {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, ok := suites[strings.TrimSuffix(r.URL.Path, "/InRelease")]
		switch {
		case text == "broken":
			w.WriteHeader(http.StatusInternalServerError)
		case !ok:
			http.NotFound(w, r)
		default:
			fmt.Fprint(w, text)
		}
	}))
	t.Cleanup(srv.Close)
	return srv.URL + "/debian"
}

// apt puts a stand-in for apt-get into PATH that prints these index targets: origin, label and URI.
func apt(t *testing.T, targets ...string) {
	t.Helper()
	dir := t.TempDir()
	text := strings.ReplaceAll(strings.Join(targets, "\n"), "|", "\t")
	script := "#!/bin/sh\ncat <<'END'\n" + text + "\nEND\n"
	if err := os.WriteFile(filepath.Join(dir, "apt-get"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// TestHostMirrors: the mirrors are those of apt, in whatever form its sources name them. If it has none, the error says what to write.
func TestHostMirrors(t *testing.T) {
	list := filepath.Join(t.TempDir(), "debian.list")
	if err := os.WriteFile(list, []byte("# ours\nhttps://one.example.com/debian\tpriority:1\nhttps://two.example.com/debian/\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		targets          []string
		debian, security []string
	}{
		"a mirror, by three suites": {
			[]string{"Debian|Debian|http://m.example.com/debian/", "Debian|Debian|http://m.example.com/debian/", "Debian|Debian|http://m.example.com/debian"},
			[]string{"http://m.example.com/debian"}, nil},
		"security beside it": {
			[]string{"Debian|Debian|http://m.example.com/debian/", "Debian|Debian-Security|http://s.example.com/debian-security/"},
			[]string{"http://m.example.com/debian"}, []string{"http://s.example.com/debian-security"}},
		"a repository manager's paths": {
			[]string{"Debian|Debian|https://a.example.com/api/deb-remote/", "Debian|Debian-Security|https://a.example.com/api/sec-remote/"},
			[]string{"https://a.example.com/api/deb-remote"}, []string{"https://a.example.com/api/sec-remote"}},
		"a cloud image's list": {[]string{"Debian|Debian|mirror+file:" + list},
			[]string{"https://one.example.com/debian", "https://two.example.com/debian"}, nil},
		"a list that is gone": {[]string{"Debian|Debian|mirror+file:/none", "Debian|Debian|http://m.example.com/debian"},
			[]string{"http://m.example.com/debian"}, nil},
		"a disc": {[]string{"Debian|Debian|cdrom:[Debian 13]/", "Debian|Debian|http://m.example.com/debian"},
			[]string{"http://m.example.com/debian"}, nil},
		"vendors with a folder of that name": {
			[]string{"Docker|Docker CE|https://vendor.example.com/linux/debian", "gitlab-runner|gitlab-runner|https://packages.example.com/runner/gitlab-runner/debian/",
				"Debian|Debian|http://m.example.com/debian"},
			[]string{"http://m.example.com/debian"}, nil},
		"only vendors":         {[]string{"Docker|Docker CE|https://vendor.example.com/linux/debian", "||https://private.example.com/debian"}, nil, nil},
		"only backports":       {[]string{"Debian Backports|Debian Backports|http://m.example.com/debian"}, nil, nil},
		"another distribution": {[]string{"Ubuntu|Ubuntu|http://m.example.com/ubuntu/"}, nil, nil},
		"nothing":              {nil, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			apt(t, c.targets...)
			debian, security, err := hostMirrors(t.Context())
			if c.debian == nil {
				wantError(t, err, "names no Debian mirror", `mirror = "https://`)
				return
			}
			if err != nil || !slices.Equal(debian, c.debian) || !slices.Equal(security, c.security) {
				t.Errorf("%q, %q, %v", debian, security, err)
			}
		})
	}
}

func TestResolveDebian(t *testing.T) {
	suites := map[string]string{"/debian/dists/trixie": inRelease, "/debian-security/dists/trixie-security": inRelease}
	src := &plan.DebianSource{Suite: "trixie", Arch: "amd64", Packages: []string{"git", "curl"}, Mirror: mirror(t, suites)}
	resolve := func() *debianInputs {
		t.Helper()
		in, err := resolveDebian(t.Context(), hasty(), src)
		if err != nil {
			t.Fatal(err)
		}
		return in
	}
	in := resolve()
	if len(in.Repos) != 2 || in.Repos[0].date.Unix() != 1795252544 || !strings.HasSuffix(in.Repos[1].String(), "/debian-security trixie-security main") {
		t.Errorf("%+v", in.Repos)
	}
	if n := slices.Index(in.Packages, "curl"); n < 0 || in.Packages[n+1] == "curl" || !slices.Contains(in.Packages, "linux-image-cloud-amd64") {
		t.Errorf("%q", in.Packages)
	}
	before, _, err := digestOf(in)
	if err != nil {
		t.Fatal(err)
	}
	// Changes in any of the suites give another disk.
	suites["/debian/dists/trixie-updates"] = inRelease
	if in = resolve(); len(in.Repos) != 3 {
		t.Errorf("%v", in.Repos)
	}
	if after, _, err := digestOf(in); err != nil || after == before {
		t.Errorf("the same digest with other packages, %v", err)
	}
	src.Suite = "sarge"
	_, err = resolveDebian(t.Context(), hasty(), src)
	wantError(t, err, `"sarge"`, "no mirror has it", "404")
	src.Mirror = "http://me:hunter2@m.example.com/debian"
	_, err = resolveDebian(t.Context(), hasty(), src)
	wantError(t, err, "http://me:xxxxx@m.example.com/debian", "needs a password")
	src.Mirror = "ftp://old.example.com/debian"
	_, err = resolveDebian(t.Context(), hasty(), src)
	wantError(t, err, "ftp://old.example.com/debian", "http://")
}

// A mirror that is not Debian's is an error.
func TestResolveDebianOfOthers(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"a vendor":     {"Origin: Docker\nLabel: Docker CE\nSuite: trixie\nDate: Sat, 21 Nov 2026 09:15:44 UTC\n", `its Origin is "Docker"`},
		"a web page":   {"<!doctype html><title>Welcome</title>", "it has no Origin"},
		"an empty one": {"", "it has no Origin"},
		"no date":      {"Origin: Debian\n", "not a release file"},
	} {
		t.Run(name, func(t *testing.T) {
			suites := map[string]string{"/debian/dists/trixie": c.text, "/debian-security/dists/trixie-security": inRelease}
			src := &plan.DebianSource{Suite: "trixie", Arch: "amd64", Mirror: mirror(t, suites)}
			_, err := resolveDebian(t.Context(), hasty(), src)
			wantError(t, err, src.Mirror+"/dists/trixie/InRelease", c.want)
			// The same for the security updates.
			suites["/debian/dists/trixie"], suites["/debian-security/dists/trixie-security"] = inRelease, c.text
			_, err = resolveDebian(t.Context(), hasty(), src)
			wantError(t, err, src.Mirror+"-security/dists/trixie-security/InRelease", c.want)
		})
	}
}

// TestDebianSecurity: an image has its security updates, unless the spec says that it has none. They are never left out because a mirror
// does not answer, or does not have them.
func TestDebianSecurity(t *testing.T) {
	const security = "/debian-security/dists/trixie-security"
	full := mirror(t, map[string]string{"/debian/dists/trixie": inRelease, security: inRelease})
	bare := mirror(t, map[string]string{"/debian/dists/trixie": inRelease, "/debian/dists/sid": inRelease})
	broken := mirror(t, map[string]string{"/debian/dists/trixie": inRelease, security: "broken"})
	for name, c := range map[string]struct {
		src  plan.DebianSource
		apt  []string
		want []string // in the error; nil: it has the security updates
		none bool     // it has none, and that is right
		down bool     // the error is one of a server that may answer later
	}{
		"beside the mirror":             {src: plan.DebianSource{Mirror: full}},
		"beside the mirror, not there":  {src: plan.DebianSource{Mirror: bare}, want: []string{"no security updates", "security_mirror", `"none"`, "404"}},
		"beside the mirror, broken":     {src: plan.DebianSource{Mirror: broken}, want: []string{"trixie-security", "500"}, down: true},
		"another mirror":                {src: plan.DebianSource{Mirror: bare, SecurityMirror: full + "-security"}},
		"another mirror, broken":        {src: plan.DebianSource{Mirror: full, SecurityMirror: broken + "-security"}, want: []string{"500"}, down: true},
		"another mirror, not there":     {src: plan.DebianSource{Mirror: full, SecurityMirror: bare}, want: []string{"no security updates", bare}},
		"none":                          {src: plan.DebianSource{Mirror: bare, SecurityMirror: "none"}, none: true},
		"a suite that has none":         {src: plan.DebianSource{Suite: "sid", Mirror: bare}, none: true},
		"apt's":                         {apt: []string{"Debian|Debian|" + bare, "Debian|Debian-Security|" + full + "-security"}},
		"apt's, broken":                 {apt: []string{"Debian|Debian|" + bare, "Debian|Debian-Security|" + broken + "-security"}, want: []string{"500", "404"}, down: true},
		"apt's, broken, a sibling":      {apt: []string{"Debian|Debian|" + full, "Debian|Debian-Security|" + broken + "-security"}},
		"apt's, not there":              {apt: []string{"Debian|Debian|" + bare, "Debian|Debian-Security|" + bare + "-security"}, want: []string{"no security updates", "404"}},
		"apt has none, a sibling":       {apt: []string{"Debian|Debian|" + full}},
		"apt has none, and no sibling":  {apt: []string{"Debian|Debian|" + bare}, want: []string{"no security updates", "404"}},
		"apt has none, none is needed":  {src: plan.DebianSource{SecurityMirror: "none"}, apt: []string{"Debian|Debian|" + bare}, none: true},
		"apt has none, the spec has it": {src: plan.DebianSource{SecurityMirror: full + "-security"}, apt: []string{"Debian|Debian|" + bare}},
	} {
		t.Run(name, func(t *testing.T) {
			apt(t, c.apt...)
			c.src.Arch = "amd64"
			if c.src.Suite == "" {
				c.src.Suite = "trixie"
			}
			in, err := resolveDebian(t.Context(), hasty(), &c.src)
			if c.want != nil {
				wantError(t, err, c.want...)
				if isUnreachable(err) != c.down {
					t.Errorf("a server that may answer later: %v; %v", !c.down, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if has := in.Repos[len(in.Repos)-1].Suite == c.src.Suite+"-security"; has == c.none {
				t.Errorf("%v", in.Repos)
			}
		})
	}
}

func TestCheckDebian(t *testing.T) {
	need.Root(t)
	need.Tools(t, "mmdebstrap", "mke2fs")
	wantError(t, checkDebian(&plan.DebianSource{Arch: "riscv64"}, "amd64"), "riscv64", "amd64")
	t.Setenv("PATH", t.TempDir())
	wantError(t, checkDebian(&plan.DebianSource{Arch: "amd64"}, "amd64"), "apt-get install mmdebstrap")
}

// A Store never builds from packages, whoever opens it: it uses what a Builder made, and its error says how to run one.
func TestDebianIsBuiltApart(t *testing.T) {
	dir := t.TempDir()
	img := &plan.Image{Name: "d", Source: plan.Source{Debian: &plan.DebianSource{Suite: "trixie", Arch: "amd64"}}}
	s, err := Open(&plan.Plan{Paths: plan.Paths{State: dir, Images: dir + "/images", Cache: dir + "/cache"}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	wantOnly(t, dir)
	_, err = s.Ensure(t.Context(), img)
	wantError(t, err, `image "d"`, "only root", "mmdebstrap", "refresh --root-part")
}

// Not even root writes where another user could have planted a link. Reading is allowed.
func TestAnothersFolder(t *testing.T) {
	need.Root(t)
	l := labIn(t, t.TempDir())
	if err := errors.Join(os.MkdirAll(l.plan.Paths.Images, 0o755), os.Chown(l.plan.Paths.Images, 65534, 65534)); err != nil {
		t.Fatal(err)
	}
	_, err := l.open(l.plan).Ensure(t.Context(), l.img)
	wantError(t, err, l.plan.Paths.Images, "belongs to another user")
	wantOnly(t, l.plan.Paths.Images)
	if _, err := l.open(l.plan).Prune(t.Context(), nil); err == nil {
		t.Error("pruned in another user's folder")
	}
	if _, err := l.open(l.plan).List(t.Context()); err != nil {
		t.Error(err)
	}
}

// An interrupted build leaves no process, no mount and no file.
func TestDebianCancelled(t *testing.T) {
	need.Root(t)
	need.Slow(t)
	need.Tools(t, "mmdebstrap", "mke2fs")
	dir := t.TempDir()
	p := &plan.Plan{Paths: plan.Paths{State: dir, Images: dir + "/images", Cache: dir + "/cache"}}
	ctx, cancel := context.WithCancelCause(t.Context())
	b := NewBuilder(p, Options{Progress: func(e Progress) {
		if strings.Contains(e.Line, "installing essential packages") {
			cancel(errors.New("interrupted"))
		}
	}})
	img := &plan.Image{Name: "d", Source: plan.Source{Debian: &plan.DebianSource{Suite: "trixie", Arch: b.arch}}}
	_, err := b.Build(ctx, img, false)
	wantError(t, err, "interrupted")
	wantOnly(t, filepath.Join(dir, "debian", kindBase))
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), dir) {
		t.Errorf("something is mounted below %s still (%v)", dir, err)
	}
}

// standIn puts a program named mmdebstrap into PATH, and returns a Builder that uses it and an image. $root is the new system's folder.
// The mirror serves suites.
func standIn(t *testing.T, script string, suites map[string]string, line func(string)) (*Builder, *plan.Image, *plan.Plan) {
	t.Helper()
	need.Root(t)
	need.Tools(t, "mmdebstrap", "mke2fs", "unshare")
	dir, programs := t.TempDir(), t.TempDir()
	script = `#!/bin/sh
for root; do case $root in */root) break; esac; done
` + script
	if err := os.WriteFile(filepath.Join(programs, "mmdebstrap"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", programs+":"+os.Getenv("PATH"))
	t.Setenv("TMPDIR", t.TempDir())
	p := &plan.Plan{Paths: plan.Paths{State: dir, Images: dir + "/images", Cache: dir + "/cache"}}
	b := NewBuilder(p, Options{Log: slog.New(slog.DiscardHandler), Progress: func(e Progress) {
		if e.Line != "" && line != nil {
			line(e.Line)
		}
	}})
	b.net = hasty()
	src := &plan.DebianSource{Suite: "trixie", Arch: b.arch, SecurityMirror: "none", Mirror: mirror(t, suites)}
	p.Images = []plan.Image{{Name: "d", Source: plan.Source{Debian: src}}}
	return b, &p.Images[0], p
}

// hungBuild is a Builder whose mmdebstrap starts a process in a session of its own, which keeps the output's pipe and a file of the
// returned name open, says "it hangs", and never ends.
func hungBuild(t *testing.T, line func(string)) (b *Builder, img *plan.Image, hung string) {
	t.Helper()
	hung = filepath.Join(t.TempDir(), "hung")
	if err := os.WriteFile(hung, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("HUNG", hung)
	t.Cleanup(func() {
		for _, pid := range holders(t, hung) {
			exec.Command("kill", "-KILL", pid).Run()
		}
	})
	b, img, _ = standIn(t, `mkdir -p "$root/proc"; mount -t proc proc "$root/proc"
trap "" TERM INT HUP
setsid sh -c 'trap "" TERM INT HUP; exec sleep 100000 <$0' "$HUNG" &
echo it hangs
wait
`, map[string]string{"/debian/dists/trixie": inRelease}, line)
	return b, img, hung
}

// holders returns the processes that have a file open.
func holders(t *testing.T, path string) (pids []string) {
	t.Helper()
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if to, err := os.Readlink(l); err == nil && to == path {
			pids = append(pids, strings.Split(l, "/")[2])
		}
	}
	return pids
}

// A build that hangs ends at its limit, with everything that it started, mounted and wrote.
func TestDebianHangs(t *testing.T) {
	hangs := false
	b, img, hung := hungBuild(t, func(line string) { hangs = hangs || line == "it hangs" })
	for b.limit = time.Second; !hangs; b.limit *= 2 { // until the stand-in has come so far, on a busy machine too
		if b.limit > 5*time.Minute {
			t.Fatal("the stand-in never started")
		}
		start := time.Now()
		_, err := b.Build(t.Context(), img, false)
		wantError(t, err, `image "d"`, "mmdebstrap did not finish within "+b.limit.String())
		if took := time.Since(start); took > b.limit+time.Minute {
			t.Errorf("took %v with a limit of %v", took, b.limit)
		}
	}
	if pids := holders(t, hung); len(pids) > 0 {
		t.Errorf("still running: %v", pids)
	}
	wantOnly(t, b.shelf.folder(kindBase, ""))
	wantOnly(t, os.Getenv("TMPDIR"))
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(mounts), b.shelf.dir) {
		t.Errorf("something is still mounted below %s (%v)", b.shelf.dir, err)
	}
}

// A build that starts while a file system is mounted from a loop device does not keep that device busy once the host has unmounted it.
func TestDebianLeavesLoopDevices(t *testing.T) {
	need.Root(t)
	need.Tools(t, "nsenter", "losetup", "mke2fs")
	started := make(chan struct{})
	var once sync.Once
	b, img, hung := hungBuild(t, func(line string) {
		if line == "it hangs" {
			once.Do(func() { close(started) })
		}
	})
	dir := t.TempDir()
	disk, at := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	script := `truncate -s 16M "$0" && mke2fs -q -F "$0" && mkdir "$1" && mount --make-rshared / && mount -o loop "$0" "$1"`
	ctx, cancel := context.WithCancelCause(t.Context())
	ns := make(chan string, 1)
	ended := make(chan error, 1)
	go func() {
		// The build's host, as far as mounts go. systemd makes all mounts shared. The thread is not unlocked: it ends with its namespace.
		runtime.LockOSThread()
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
			ended <- err
			return
		}
		if out, err := exec.Command("sh", "-c", script, disk, at).CombinedOutput(); err != nil {
			ended <- fmt.Errorf("%w: %s", err, out)
			return
		}
		ns <- fmt.Sprintf("/proc/self/task/%d/ns/mnt", unix.Gettid())
		_, err := b.Build(ctx, img, false)
		ended <- err
	}()
	select {
	case <-started:
	case err := <-ended:
		t.Fatal(err)
	case <-time.After(5 * time.Minute):
		t.Fatal("the stand-in never started")
	}
	loops := func() string {
		out, err := exec.Command("losetup", "-j", disk).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(out))
	}
	if loops() == "" {
		t.Fatal("there is no loop device")
	}
	host, err := os.Open(strings.Replace(<-ns, "self", fmt.Sprint(os.Getpid()), 1))
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	umount := exec.Command("nsenter", "--mount=/proc/self/fd/3", "umount", at)
	umount.ExtraFiles = []*os.File{host}
	if out, err := umount.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for end := time.Now().Add(10 * time.Second); loops() != ""; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Errorf("the build keeps the loop device busy: %s", loops())
			break
		}
	}
	if pids := holders(t, hung); len(pids) == 0 {
		t.Error("the build had ended before")
	}
	cancel(errors.New("interrupted"))
	wantError(t, <-ended, "interrupted")
}

// If root's part of a refresh fails, the Store continues with the existing base, and reports the failure until a refresh succeeds.
func TestRefreshDebian(t *testing.T) {
	suites := map[string]string{"/debian/dists/trixie": inRelease}
	b, img, p := standIn(t, `[ ! -e "$TMPDIR/fail" ] || { echo no space; exit 1; }
mkdir -p "$root/boot"; echo kernel >"$root/boot/vmlinuz-1"; echo initrd >"$root/boot/initrd.img-1"
`, suites, nil)
	fail := filepath.Join(os.Getenv("TMPDIR"), "fail")
	s, err := Open(p, Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	s.net = hasty()
	// As in the unit: the Store's user must be able to read what root makes.
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	if _, err := b.Build(t.Context(), img, false); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"", "refs", kindBase, notesFolder} {
		if fi, err := os.Stat(filepath.Join(b.shelf.dir, dir)); err != nil || fi.Mode().Perm() != 0o755 {
			t.Errorf("%s: %v, %v", dir, fi.Mode(), err)
		}
	}
	refresh := func() string {
		t.Helper()
		sealed, err := s.Refresh(t.Context(), img)
		if err != nil {
			t.Fatal(err)
		}
		return sealed.Digest
	}
	first := refresh()
	if err := s.CheckAge(t.Context(), img); err != nil {
		t.Error(err)
	}

	// A new version that cannot be built.
	suites["/debian/dists/trixie"] += "Version: 13.2\n"
	if err := os.WriteFile(fail, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = b.Build(t.Context(), img, true)
	wantError(t, err, `image "d": mmdebstrap trixie from http://`, "exit status 1", "no space")
	if now := refresh(); now != first {
		t.Errorf("%s, was %s", now, first)
	}
	wantError(t, s.CheckAge(t.Context(), img), `image "d"`, "failed or was interrupted", "--root-part", time.Now().UTC().Format(time.DateOnly))

	// A missing answer is not a failure at first.
	suites["/debian/dists/trixie"] = "broken"
	if _, err := b.Build(t.Context(), img, true); err != nil {
		t.Error(err)
	}
	if err := s.CheckAge(t.Context(), img); err != nil {
		t.Error(err)
	}

	suites["/debian/dists/trixie"] = inRelease + "Version: 13.2\n"
	if err := os.Remove(fail); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Build(t.Context(), img, true); err != nil {
		t.Error(err)
	}
	if now := refresh(); now == first {
		t.Error("nothing new")
	}
	if err := s.CheckAge(t.Context(), img); err != nil {
		t.Error(err)
	}

	// Notes of images that the Plan no longer has are removed.
	if err := os.WriteFile(b.shelf.notePath(strings.Repeat("0", 64)), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Prune(t.Context()); err != nil {
		t.Error(err)
	}
	wantOnly(t, b.shelf.notePath(""))
}
