package host

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
	"github.com/ProtonMail/go-crypto/openpgp/clearsign"
	"github.com/google/go-cmp/cmp"

	needs "github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// repository is a signed apt repository on the loopback, and a root that apt and dpkg work on in the place of this machine's.
type repository struct {
	*testing.T
	dir, root string
	key       *openpgp.Entity
	server    *httptest.Server
	published int
}

func newRepository(t *testing.T) *repository {
	t.Helper()
	needs.Root(t)
	needs.Tools(t, "apt-get", "apt-mark", "dpkg", "dpkg-deb", "dpkg-query", "gpgv")
	key, err := openpgp.NewEntity("a vendor", "", "vendor@example.com", nil)
	if err != nil {
		t.Fatal(err)
	}
	r := &repository{T: t, dir: t.TempDir(), root: t.TempDir(), key: key}
	r.server = httptest.NewServer(http.FileServer(http.Dir(r.dir)))
	t.Cleanup(r.server.Close)
	for _, dir := range []string{"etc/apt/apt.conf.d", "etc/apt/preferences.d", "etc/apt/sources.list.d", "etc/apt/trusted.gpg.d", "etc/apt/keyrings",
		"var/lib/dpkg/info", "var/lib/dpkg/updates", "var/lib/apt/lists/partial", "var/cache/apt/archives/partial", "var/log/apt", "usr/share"} {
		if err := os.MkdirAll(filepath.Join(r.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.put(filepath.Join(r.root, "var/lib/dpkg/status"), nil)
	return r
}

func (r *repository) put(file string, data []byte) {
	r.Helper()
	if err := os.WriteFile(file, data, 0o644); err != nil {
		r.Fatal(err)
	}
}

// deb builds a package with one file; fields are more of its control file.
func (r *repository) deb(name, version string, fields ...string) (file string) {
	r.Helper()
	at := filepath.Join(r.TempDir(), "deb")
	for _, dir := range []string{"DEBIAN", "opt"} {
		if err := os.MkdirAll(filepath.Join(at, dir), 0o755); err != nil {
			r.Fatal(err)
		}
	}
	control := append([]string{"Package: " + name, "Version: " + version, "Architecture: all", "Maintainer: lab <lab@example.com>", "Description: lab"}, fields...)
	r.put(filepath.Join(at, "DEBIAN/control"), []byte(strings.Join(control, "\n")+"\n"))
	r.put(filepath.Join(at, "opt", name), []byte(version))
	file = filepath.Join(r.dir, name+"_"+version+"_all.deb")
	if out, err := exec.Command("dpkg-deb", "--root-owner-group", "--build", at, file).CombinedOutput(); err != nil {
		r.Fatalf("%v: %s", err, out)
	}
	return file
}

// publish writes the repository's indices (wiki.debian.org/DebianRepository/Format), signed by a key.
func (r *repository) publish(by *openpgp.Entity) {
	r.Helper()
	debs, err := filepath.Glob(filepath.Join(r.dir, "*.deb"))
	if err != nil {
		r.Fatal(err)
	}
	var packages bytes.Buffer
	for _, deb := range debs {
		control, err := exec.Command("dpkg-deb", "--field", deb).Output()
		data, err1 := os.ReadFile(deb)
		if err := errors.Join(err, err1); err != nil {
			r.Fatal(err)
		}
		fmt.Fprintf(&packages, "%sFilename: ./%s\nSize: %d\nSHA256: %x\n\n", control, filepath.Base(deb), len(data), sha256.Sum256(data))
	}
	r.put(filepath.Join(r.dir, "Packages"), packages.Bytes())
	release := fmt.Sprintf("Origin: lab\nSuite: lab\nArchitectures: all amd64 arm64\nDate: %s\nSHA256:\n %x %d Packages\n",
		time.Now().UTC().Format(time.RFC1123), sha256.Sum256(packages.Bytes()), packages.Len())
	var signed bytes.Buffer
	w, err := clearsign.Encode(&signed, by.PrivateKey, nil)
	if err != nil {
		r.Fatal(err)
	}
	if _, err := w.Write([]byte(release)); err != nil {
		r.Fatal(err)
	}
	if err := w.Close(); err != nil {
		r.Fatal(err)
	}
	r.put(filepath.Join(r.dir, "InRelease"), signed.Bytes())
	// HTTP's time of the last change is in seconds: apt would take two within one second for the same.
	r.published++
	newer := time.Now().Add(time.Duration(r.published) * time.Minute)
	for _, name := range []string{"InRelease", "Packages"} {
		if err := os.Chtimes(filepath.Join(r.dir, name), newer, newer); err != nil {
			r.Fatal(err)
		}
	}
	var public bytes.Buffer
	a, err := armor.Encode(&public, openpgp.PublicKeyType, nil)
	if err == nil {
		err = errors.Join(r.key.Serialize(a), a.Close())
	}
	if err != nil {
		r.Fatal(err)
	}
	r.put(filepath.Join(r.dir, "key.asc"), public.Bytes())
}

// source has apt know the repository, by the doors that apply uses.
func (r *repository) source() {
	r.Helper()
	tr := NewTree(r.root, "/notes.json")
	s := plan.AptSource{Package: "lab", URL: r.server.URL, Suite: "./", Fingerprint: fingerprint(r.key), KeyURL: r.server.URL + "/key.asc"}
	writeOne(r.T, tr.AptKeys(get), s.KeyPath(), State{"fingerprint": s.Fingerprint, "url": s.KeyURL})
	f := s.File()
	// apt looks for the key on this machine, whatever its Dir is.
	text := strings.Replace(f.Content, "Signed-By: ", "Signed-By: "+r.root, 1)
	writeOne(r.T, tr.Files(), f.Path, State{"content": text, "mode": f.Mode, "owner": f.Owner, "group": f.Group})
}

func (r *repository) door(debs map[string]Deb) *Packages {
	d := NewPackages(filepath.Join(r.root, "state"), debs, fetchOver(r.T))
	d.root = r.root
	return d
}

func get(ctx context.Context, url string, limit int64) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, errors.New(resp.Status)
	}
	var b bytes.Buffer
	_, err = b.ReadFrom(http.MaxBytesReader(nil, resp.Body, limit))
	return b.Bytes(), err
}

// fetchOver stands in for image.Download, which has tests of its own and is beyond this package.
func fetchOver(t *testing.T) Fetch {
	return func(ctx context.Context, url, sum, path string, limit int64) error {
		data, err := get(ctx, url, limit)
		if err == nil && digest(data) != sum {
			err = fmt.Errorf("%s has the digest %s", url, digest(data))
		}
		if err != nil {
			return err
		}
		t.Logf("fetched %s", url)
		return os.WriteFile(path, data, 0o644)
	}
}

// installed is all of dpkg's list.
func (r *repository) installed() string {
	r.Helper()
	out, err := exec.Command("dpkg-query", "--root="+r.root, "--show", "--showformat", `${Package} ${db:Status-Status}\n`).CombinedOutput()
	if err != nil {
		r.Fatalf("%v: %s", err, out)
	}
	return string(out)
}

var yes = State{"installed": "yes"}

func TestPackages(t *testing.T) {
	r := newRepository(t)
	r.deb("theirs", "1")
	r.deb("lib", "1")
	r.deb("shared", "1")
	r.deb("extra", "1")
	r.deb("tool", "1", "Depends: lib, shared, theirs", "Recommends: extra")
	r.deb("other", "1", "Depends: shared")
	r.publish(r.key)
	r.source()
	if out, err := exec.Command("dpkg", "--root="+r.root, "--install", filepath.Join(r.dir, "theirs_1_all.deb")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	before := r.installed()
	d := r.door(nil)
	if s := readOne(t, d, "tool"); s != nil {
		t.Errorf("tool is %v before", s)
	}
	for range 2 {
		writeOne(t, d, "tool", yes)
	}
	if got, want := r.installed(), "lib installed\nshared installed\ntheirs installed\ntool installed\n"; got != want {
		t.Errorf("installed:\n%s", cmp.Diff(want, got))
	}
	writeOne(t, d, "theirs", yes) // there already: nothing to do
	for range 2 {
		writeOne(t, r.door(nil), "tool", nil) // another process
	}
	if diff := cmp.Diff(before, r.installed()); diff != "" {
		t.Errorf("after the removal (-before +after)\n%s", diff)
	}

	// What somebody installs later keeps what it needs.
	writeOne(t, d, "tool", yes)
	if out, err := r.apt("--yes", "install", "other"); err != nil {
		t.Fatal(out)
	}
	writeOne(t, d, "tool", nil)
	if got := r.installed(); !strings.Contains(got, "other installed\n") || !strings.Contains(got, "shared installed\n") || strings.Contains(got, "tool") {
		t.Errorf("installed:\n%s", got)
	}
	writeOne(t, d, "lib", yes)
	r.deb("needy", "1", "Depends: lib")
	r.publish(r.key)
	if out, err := r.apt("update"); err != nil {
		t.Fatal(out)
	}
	if out, err := r.apt("--yes", "install", "needy"); err != nil {
		t.Fatal(out)
	}
	if err := d.Write(t.Context(), "lib", nil); err == nil || !strings.Contains(err.Error(), "needy would have to go with it") {
		t.Error(err)
	}
}

// apt is what an administrator types.
func (r *repository) apt(args ...string) (string, error) {
	return r.door(nil).run(r.Context(), "apt-get", args...)
}

func TestPackagesFail(t *testing.T) {
	r := newRepository(t)
	r.deb("good", "1")
	r.deb("clash", "1", "Conflicts: theirs")
	r.deb("theirs", "1")
	r.deb("broken", "1", "Depends: nosuchpackage")
	r.publish(r.key)
	r.source()
	if out, err := exec.Command("dpkg", "--root="+r.root, "--install", filepath.Join(r.dir, "theirs_1_all.deb")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	before := r.installed()
	for name, want := range map[string]string{
		"missing": "Unable to locate package missing",
		"clash":   "apt would remove theirs for it",
		"broken":  "nosuchpackage",
	} {
		if err := r.door(nil).Write(t.Context(), name, yes); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "package "+name) {
			t.Errorf("%s: %v; want %q", name, err, want)
		}
	}
	// Signed by somebody else: apt tells, and nothing is installed from it.
	other, err := openpgp.NewEntity("somebody", "", "else@example.com", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.deb("evil", "1")
	r.publish(other)
	if err := r.door(nil).Write(t.Context(), "evil", yes); err == nil || !strings.Contains(err.Error(), "NO_PUBKEY") {
		t.Errorf("a repository that somebody else signed: %v", err)
	}
	if diff := cmp.Diff(before, r.installed()); diff != "" {
		t.Errorf("something was installed (-before +after)\n%s", diff)
	}
}

// A dpkg that was killed half-way leaves a host on which apt-get refuses everything.
func TestPackagesInterrupted(t *testing.T) {
	r := newRepository(t)
	r.deb("tool", "1")
	r.deb("half", "1")
	r.publish(r.key)
	r.source()
	if out, err := exec.Command("dpkg", "--root="+r.root, "--unpack", filepath.Join(r.dir, "half_1_all.deb")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d := r.door(nil)
	writeOne(t, d, "half", yes)
	writeOne(t, d, "tool", yes)
	writeOne(t, d, "tool", nil)
	writeOne(t, d, "half", nil)
}

func TestPackagesFromFile(t *testing.T) {
	r := newRepository(t)
	r.deb("lib", "1")
	r.publish(r.key)
	r.source()
	data, err := os.ReadFile(r.deb("tool", "2", "Depends: lib"))
	if err != nil {
		t.Fatal(err)
	}
	d := r.door(map[string]Deb{"tool": {URL: r.server.URL + "/tool_2_all.deb", SHA256: digest(data)}, "bad": {URL: r.server.URL + "/tool_2_all.deb", SHA256: "00"}})
	writeOne(t, d, "tool", yes)
	if got := r.installed(); got != "lib installed\ntool installed\n" {
		t.Errorf("installed:\n%s", got)
	}
	writeOne(t, d, "tool", nil)
	if got := r.installed(); got != "" {
		t.Errorf("left:\n%s", got)
	}
	if err := d.Write(t.Context(), "bad", yes); err == nil || !strings.Contains(err.Error(), "has the digest") {
		t.Error(err)
	}
}

func TestAptKeys(t *testing.T) {
	r := newRepository(t)
	r.publish(r.key)
	tr := NewTree(r.root, "/notes.json")
	d := tr.AptKeys(get)
	const name = "/etc/apt/keyrings/x.asc"
	want := State{"fingerprint": fingerprint(r.key), "url": r.server.URL + "/key.asc"}
	if s := readOne(t, d, name); s != nil {
		t.Errorf("a missing key is %v", s)
	}
	// More keys at the URL than the one that is pinned do not get in.
	other, err := openpgp.NewEntity("somebody", "", "else@example.com", nil)
	if err != nil {
		t.Fatal(err)
	}
	var ring bytes.Buffer
	if err := errors.Join(other.Serialize(&ring), r.key.Serialize(&ring)); err != nil {
		t.Fatal(err)
	}
	r.put(filepath.Join(r.dir, "key.asc"), ring.Bytes())
	for range 2 {
		writeOne(t, d, name, want)
	}
	r.put(filepath.Join(r.root, name), ring.Bytes())
	if s := readOne(t, d, name); !strings.Contains(s["fingerprint"], fingerprint(other)) {
		t.Errorf("a key that somebody added is not seen: %v", s)
	}
	writeOne(t, d, name, want)
	r.put(filepath.Join(r.root, name), []byte("garbage"))
	if s := readOne(t, d, name); !strings.HasPrefix(s["fingerprint"], "none: ") {
		t.Errorf("garbage reads %v", s)
	}
	for url, fault := range map[string]string{
		"/key.asc":  "has no key with the fingerprint " + strings.Repeat("A", 40) + ", but ",
		"/Packages": "has no OpenPGP keys", "/nosuch": "404",
	} {
		err := d.Write(t.Context(), name, State{"fingerprint": strings.Repeat("A", 40), "url": r.server.URL + url})
		if err == nil || !strings.Contains(err.Error(), fault) {
			t.Errorf("%s: %v; want %q", url, err, fault)
		}
	}
	writeOne(t, d, name, nil)
}

func TestPrograms(t *testing.T) {
	needs.Root(t)
	root, served := accountsTree(t), t.TempDir()
	server := httptest.NewServer(http.FileServer(http.Dir(served)))
	defer server.Close()
	urls := map[string]string{}
	for name, text := range map[string]string{"v1": "#!/bin/sh\necho 1\n", "v2": "#!/bin/sh\necho 2\n"} {
		if err := os.WriteFile(filepath.Join(served, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		urls[digest([]byte(text))] = server.URL + "/" + name
	}
	state := func(text string) State {
		return State{"sha256": digest([]byte(text)), "mode": "0755", "owner": "root", "group": "root"}
	}
	d := NewTree(root, "/notes.json").Programs(filepath.Join(root, "kept"), urls, fetchOver(t))
	const name = "/usr/local/bin/cloud-hypervisor"
	if s := readOne(t, d, name); s != nil {
		t.Errorf("a missing program is %v", s)
	}
	theirs := "#!/bin/sh\necho theirs\n"
	if err := os.MkdirAll(filepath.Join(root, "usr/local/bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, name), []byte(theirs), 0o755); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		writeOne(t, d, name, state("#!/bin/sh\necho 1\n"))
	}
	writeOne(t, d, name, state("#!/bin/sh\necho 2\n"))
	server.Close() // from here on, all is put back without a network
	if out, err := exec.Command(filepath.Join(root, name)).Output(); err != nil || string(out) != "2\n" {
		t.Errorf("%q, %v", out, err)
	}
	for _, text := range []string{"#!/bin/sh\necho 1\n", theirs} {
		writeOne(t, d, name, state(text))
	}
	if err := d.Write(t.Context(), name, state("never seen")); err == nil || !strings.Contains(err.Error(), "the plan names no URL for it") {
		t.Error(err)
	}
	if err := d.Write(t.Context(), name, State{"sha256": "../../etc/passwd", "mode": "0755", "owner": "root", "group": "root"}); err == nil {
		t.Error("a path was taken for a digest")
	}
	writeOne(t, d, name, nil)
	writeOne(t, d, name, state(theirs))
}
