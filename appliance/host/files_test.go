package host

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	needs "github.com/fleetingd/fleetingd/appliance/need"
)

// accountsTree is a tree with the users root and fleet (uid 990).
func accountsTree(t *testing.T) (root string) {
	t.Helper()
	root = t.TempDir()
	for name, text := range map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\nfleet:x:990:991::/var/lib/fleet:/usr/sbin/nologin\nalias:x:990:991::/:/bin/sh\n",
		"etc/group":  "root:x:0:\nfleet:x:991:\n",
	} {
		at := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func readOne(t *testing.T, d Door, name string) State {
	t.Helper()
	found, err := d.Read(t.Context(), []string{name})
	if err != nil {
		t.Fatal(err)
	}
	return found[name]
}

func writeOne(t *testing.T, d Door, name string, want State) {
	t.Helper()
	if err := d.Write(t.Context(), name, want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, readOne(t, d, name)); diff != "" {
		t.Fatalf("%s is not what was written (-want +have)\n%s", name, diff)
	}
}

func TestFiles(t *testing.T) {
	needs.Root(t)
	root := accountsTree(t)
	d := NewTree(root, "/var/lib/x/notes.json").Files()
	before := tree(t, root)
	const name = "/etc/new/deep/x.conf"
	if s := readOne(t, d, name); s != nil {
		t.Errorf("a missing file is %v", s)
	}
	want := State{"content": "a\n", "mode": "0640", "owner": "fleet", "group": "991"}
	if err := d.Write(t.Context(), name, want); err != nil {
		t.Fatal(err)
	}
	want["group"] = "fleet" // what has a name is read by it
	writeOne(t, d, name, want)
	var st syscall.Stat_t
	if err := syscall.Stat(filepath.Join(root, name), &st); err != nil || st.Uid != 990 || st.Gid != 991 || st.Mode&0o7777 != 0o640 {
		t.Errorf("it has %d:%d, %o, %v", st.Uid, st.Gid, st.Mode, err)
	}
	old := time.Unix(1e9, 0)
	if err := os.Chtimes(filepath.Join(root, name), old, old); err != nil {
		t.Fatal(err)
	}
	writeOne(t, d, name, want)
	if fi, err := os.Stat(filepath.Join(root, name)); err != nil || !fi.ModTime().Equal(old) {
		t.Errorf("writing what is there touched it: %v, %v", fi.ModTime(), err)
	}
	writeOne(t, d, name, State{"base64": "/w==", "mode": "4755", "owner": "root", "group": "12345"})
	writeOne(t, d, "/etc/new/other", State{"content": "", "mode": "0000", "owner": "root", "group": "root"})
	writeOne(t, d, name, nil)
	if _, err := os.Stat(filepath.Join(root, "etc/new/deep")); err == nil {
		t.Error("the folder that was made for the file stayed")
	}
	writeOne(t, d, "/etc/new/other", nil)
	writeOne(t, d, "/etc/new/other", nil)
	if err := os.RemoveAll(filepath.Join(root, "var")); err != nil { // the notes' folder
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, tree(t, root)); diff != "" {
		t.Errorf("after all was removed (-before +after)\n%s", diff)
	}
}

// A folder that was there, or that somebody else uses by now, stays.
func TestFilesLeaveFolders(t *testing.T) {
	needs.Root(t)
	root := accountsTree(t)
	d := NewTree(root, "/notes.json").Files()
	if err := os.MkdirAll(filepath.Join(root, "etc/theirs"), 0o755); err != nil {
		t.Fatal(err)
	}
	want := State{"content": "", "mode": "0644", "owner": "root", "group": "root"}
	for _, name := range []string{"/etc/theirs/x", "/etc/ours/x"} {
		writeOne(t, d, name, want)
	}
	if err := os.WriteFile(filepath.Join(root, "etc/ours/theirs"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"/etc/theirs/x", "/etc/ours/x"} {
		writeOne(t, d, name, nil)
	}
	for _, stays := range []string{"etc/theirs", "etc/ours/theirs"} {
		if _, err := os.Stat(filepath.Join(root, stays)); err != nil {
			t.Error(err)
		}
	}
}

func TestFilesRefuse(t *testing.T) {
	needs.Root(t)
	plain := State{"content": "x", "mode": "0644", "owner": "root", "group": "root"}
	for _, c := range []struct {
		name, prepare, path string
		want                State
		read                bool // Read refuses it, too
		err                 string
	}{
		{"link in its place", "ln -s /dev/null etc/x", "/etc/x", plain, true, "symbolic link to /dev/null, which fleetingd neither follows nor replaces; remove it"},
		{"link on the way", "mkdir else; ln -s ../else etc/dir", "/etc/dir/x", plain, true, "/etc/dir is a symbolic link to ../else"},
		{"absolute link on the way", "ln -s /tmp etc/dir", "/etc/dir/x", plain, true, "/etc/dir is a symbolic link to /tmp"},
		{"folder in its place", "mkdir etc/x", "/etc/x", plain, true, "something else than a regular file"},
		{"pipe in its place", "mkfifo etc/x", "/etc/x", plain, true, "something else than a regular file"},
		{"file on the way", "touch etc/dir", "/etc/dir/x", plain, true, "/etc/dir is not a folder"},
		{"somebody else's folder", "mkdir etc/dir; chown 4711 etc/dir", "/etc/dir/x", plain, false, "belongs to uid 4711"},
		{"open folder", "mkdir etc/dir; chmod 777 etc/dir", "/etc/dir/x", plain, false, "chmod go-w /etc/dir"},
		{"folder of a group", "mkdir etc/dir; chmod 2775 etc/dir; chgrp 50 etc/dir", "/etc/dir/x", plain, false, "chmod go-w /etc/dir"},
		{"bad mode", "", "/etc/x", State{"content": "", "mode": "rw", "owner": "root", "group": "root"}, false, `mode "rw" is not octal`},
		{"no content", "", "/etc/x", State{"mode": "0644", "owner": "root", "group": "root"}, false, "one of content and base64"},
		{"unknown key", "", "/etc/x", State{"content": "", "mode": "0644", "owner": "root", "group": "root", "acl": "x"}, false, `unknown key "acl"`},
		{"relative", "", "etc/x", plain, true, "not a clean absolute path"},
		{"above", "", "/etc/../../x", plain, true, "not a clean absolute path"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := accountsTree(t)
			cmd := exec.Command("sh", "-euc", c.prepare)
			cmd.Dir = root
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			before := tree(t, root)
			d := NewTree(root, "/notes.json").Files()
			err := d.Write(t.Context(), c.path, c.want)
			if err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(err.Error(), "file "+c.path) {
				t.Errorf("Write: %v; want %q", err, c.err)
			}
			if _, err := d.Read(t.Context(), []string{c.path}); (err != nil) != c.read || c.read && !strings.Contains(err.Error(), c.err) {
				t.Errorf("Read: %v; want %q", err, c.err)
			}
			if diff := cmp.Diff(before, tree(t, root)); diff != "" {
				t.Errorf("it changed something (-before +after)\n%s", diff)
			}
		})
	}
	// Their owner's own folder is good enough for a file, and so is a sticky one.
	root := accountsTree(t)
	for dir, mode := range map[string]os.FileMode{"own": 0o700, "tmp": 0o777 | os.ModeSticky} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(root, dir), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(filepath.Join(root, "own"), 990, 991); err != nil {
		t.Fatal(err)
	}
	d := NewTree(root, "/notes.json").Files()
	writeOne(t, d, "/own/x", State{"content": "", "mode": "0600", "owner": "fleet", "group": "fleet"})
	writeOne(t, d, "/tmp/x", plain)
	if err := d.Write(t.Context(), "/own/y", plain); err == nil {
		t.Error("root's file was written to somebody else's folder")
	}
}

func TestFilesUnknownOwner(t *testing.T) {
	needs.Root(t)
	live := NewTree("/", filepath.Join(t.TempDir(), "notes.json")).Files()
	err := live.Write(t.Context(), filepath.Join(t.TempDir(), "x"), State{"content": "", "mode": "0600", "owner": "nosuchuser", "group": "root"})
	if err == nil || !strings.Contains(err.Error(), `there is no user "nosuchuser" on this host`) {
		t.Error(err)
	}
	// In another tree systemd-sysusers makes it at the first boot: it is recorded.
	root := accountsTree(t)
	d := NewTree(root, "/notes.json").Files()
	writeOne(t, d, "/etc/x", State{"content": "", "mode": "0600", "owner": "later", "group": "later"})
	recorded(t, root, map[string]string{"/etc/x": "later:later"})
	writeOne(t, d, "/etc/x", State{"content": "", "mode": "0600", "owner": "fleet", "group": "fleet"})
	if _, err := os.Stat(filepath.Join(root, "notes.json")); err == nil {
		t.Error("an owner that was set is still recorded")
	}
}

func recorded(t *testing.T, root string, want map[string]string) {
	t.Helper()
	var n treeNotes
	b, err := os.ReadFile(filepath.Join(root, "notes.json"))
	if err == nil {
		err = json.Unmarshal(b, &n)
	}
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, n.Owners); diff != "" {
		t.Errorf("recorded owners (-want +have)\n%s", diff)
	}
}

// Who is not root can write a tree all the same: owners are recorded, for whoever packs it.
func TestFilesNotRoot(t *testing.T) {
	const asked = "FLEETINGD_TEST_NOT_ROOT"
	if root := os.Getenv(asked); root != "" {
		// Reading a host's state takes no root, though the notes are root's.
		if s := readOne(t, NewTree(root, "/rootsnotes.json").Files(), "/etc/passwd"); s["owner"] != "nobody" && s["owner"] != "65534" {
			t.Errorf("passwd is %v", s)
		}
		tr := NewTree(root, "/notes.json")
		writeOne(t, tr.Folders(), "/var/lib/x", State{"mode": "0700", "owner": "fleet", "group": "fleet"})
		writeOne(t, tr.Files(), "/etc/deep/x", State{"content": "", "mode": "0600", "owner": "fleet", "group": "root"})
		recorded(t, root, map[string]string{"/etc/deep/x": "fleet:root", "/var/lib/x": "fleet:fleet"})
		writeOne(t, tr.Files(), "/etc/deep/x", nil)
		writeOne(t, tr.Folders(), "/var/lib/x", nil)
		return
	}
	needs.Root(t)
	root := accountsTree(t)
	if out, err := exec.Command("chown", "-R", "65534:65534", root).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for dir := root; dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "rootsnotes.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	exe := filepath.Join(filepath.Dir(root), "test")
	if out, err := exec.Command("cp", os.Args[0], exe).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	before := tree(t, root)
	cmd := exec.Command(exe, "-test.run=^TestFilesNotRoot$")
	cmd.Dir, cmd.Env = "/", append(os.Environ(), asked+"="+root)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if diff := cmp.Diff(before, tree(t, root)); diff != "" {
		t.Errorf("after all was removed (-before +after)\n%s", diff)
	}
}

func TestFolders(t *testing.T) {
	needs.Root(t)
	root := accountsTree(t)
	tr := NewTree(root, "/notes.json")
	d := tr.Folders()
	before := tree(t, root)
	const name = "/var/lib/fleet"
	if s := readOne(t, d, name); s != nil {
		t.Errorf("a missing folder is %v", s)
	}
	writeOne(t, d, name, State{"mode": "2750", "owner": "fleet", "group": "root"})
	writeOne(t, d, name, State{"mode": "0700", "owner": "root", "group": "fleet"})
	if err := d.Write(t.Context(), "/etc/passwd", State{"mode": "0700", "owner": "root", "group": "root"}); err == nil {
		t.Error("a file was taken for a folder")
	}
	if err := os.Symlink("/tmp", filepath.Join(root, "etc/link")); err != nil {
		t.Fatal(err)
	}
	if err := d.Write(t.Context(), "/etc/link", State{"mode": "0700", "owner": "root", "group": "root"}); err == nil {
		t.Error("a link was taken for a folder")
	}
	if err := d.Write(t.Context(), "/etc/link", nil); err == nil {
		t.Error("a link was removed as a folder")
	}
	if err := os.Remove(filepath.Join(root, "etc/link")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, name, "theirs"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Write(t.Context(), name, nil); err == nil || !strings.Contains(err.Error(), "it is not empty: it holds theirs") {
		t.Errorf("a folder with something in it: %v", err)
	}
	if err := os.Remove(filepath.Join(root, name, "theirs")); err != nil {
		t.Fatal(err)
	}
	writeOne(t, d, name, nil)
	writeOne(t, d, name, nil)
	if diff := cmp.Diff(before, tree(t, root)); diff != "" {
		t.Errorf("after all was removed (-before +after)\n%s", diff)
	}
}
