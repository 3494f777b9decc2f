package image

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// mirror serves InRelease files: of a suite, "main", "updates" and "security".
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

// TestHostMirrors: the mirrors are apt's own, in whatever form its sources have them; where it has none, the error says what to write.
func TestHostMirrors(t *testing.T) {
	dir := t.TempDir()
	list := filepath.Join(dir, "debian.list")
	if err := os.WriteFile(list, []byte("# ours\nhttps://one.example.com/debian\tpriority:1\nhttps://two.example.com/debian/\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	for name, c := range map[string]struct {
		targets          string // what apt-get indextargets prints
		debian, security []string
	}{
		"a mirror, by three suites": {"http://m.example.com/debian/\nhttp://m.example.com/debian/\nhttp://m.example.com/debian\n",
			[]string{"http://m.example.com/debian"}, nil},
		"security beside it": {"http://m.example.com/debian/\nhttp://s.example.com/debian-security/\n",
			[]string{"http://m.example.com/debian"}, []string{"http://s.example.com/debian-security"}},
		"a cloud image's list": {"mirror+file:" + list + "\n", []string{"https://one.example.com/debian", "https://two.example.com/debian"}, nil},
		"a list that is gone":  {"mirror+file:/none\nhttp://m.example.com/debian\n", []string{"http://m.example.com/debian"}, nil},
		"another distribution": {"http://m.example.com/ubuntu/\n", nil, nil},
		"nothing":              {"", nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			script := "#!/bin/sh\nprintf '%s' '" + c.targets + "'\n"
			if err := os.WriteFile(filepath.Join(dir, "apt-get"), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
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
	suites := map[string]string{"/debian/dists/trixie": "Origin: Debian\nDate: Sat, 21 Nov 2026 09:15:44 UTC\n"}
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
	if len(in.Repos) != 1 || in.Repos[0].date.Unix() != 1795252544 {
		t.Errorf("%+v", in.Repos)
	}
	if n := slices.Index(in.Packages, "curl"); n < 0 || in.Packages[n+1] == "curl" || !slices.Contains(in.Packages, "linux-image-cloud-amd64") {
		t.Errorf("%q", in.Packages)
	}
	before, _, err := digestOf(in)
	if err != nil {
		t.Fatal(err)
	}
	// A mirror's siblings are found, and news in one of them make another disk.
	suites["/debian/dists/trixie-updates"], suites["/debian-security/dists/trixie-security"] = "u", "s"
	in = resolve()
	if len(in.Repos) != 3 || !strings.HasSuffix(in.Repos[2].String(), "/debian-security trixie-security main") {
		t.Errorf("%v", in.Repos)
	}
	if after, _, err := digestOf(in); err != nil || after == before {
		t.Errorf("the same digest with other packages, %v", err)
	}
	// Security updates that cannot be had are no reason to do without.
	suites["/debian-security/dists/trixie-security"] = "broken"
	_, err = resolveDebian(t.Context(), hasty(), src)
	wantError(t, err, "trixie-security", "500")
	src.Suite = "sarge"
	_, err = resolveDebian(t.Context(), hasty(), src)
	wantError(t, err, `"sarge"`, "no such suite", "404")
	src.Mirror = "ftp://old.example.com/debian"
	_, err = resolveDebian(t.Context(), hasty(), src)
	wantError(t, err, "ftp://old.example.com/debian", "http://")
}

func TestCheckDebian(t *testing.T) {
	need.Root(t)
	need.Tools(t, "mmdebstrap", "mke2fs")
	wantError(t, checkDebian(&plan.DebianSource{Arch: "riscv64"}, "amd64"), "riscv64", "amd64")
	t.Setenv("PATH", t.TempDir())
	wantError(t, checkDebian(&plan.DebianSource{Arch: "amd64"}, "amd64"), "apt-get install mmdebstrap")
}

// A Store builds nothing from packages, whoever it is opened by: it takes what a Builder made, and says who makes it.
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

// Nobody writes where another user could have put a link, not even root; reading is no matter.
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

// A build that is cut off leaves no process, no mount and no file.
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
