package guest

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"

	"github.com/fleetingd/fleetingd/seed"
)

// tree creates a root directory: a name that ends in / is a folder, "-> x" a link, anything else a file's content.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if to, ok := strings.CutPrefix(content, "-> "); ok {
			err = os.Symlink(to, p)
		} else if strings.HasSuffix(name, "/") {
			err = os.MkdirAll(p, 0o755)
		} else {
			err = os.WriteFile(p, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// listing returns, in the format of tree, the names below root that keep accepts.
func listing(t *testing.T, root string) map[string]string {
	t.Helper()
	files := map[string]string{}
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		if d.Type()&fs.ModeSymlink != 0 {
			to, err := os.Readlink(p)
			files[name] = "-> " + to
			return err
		}
		data, err := os.ReadFile(p)
		files[name] = string(data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func testSeed() seed.Seed {
	return seed.Seed{
		InstanceID: "i1", Hostname: "w1",
		Network:    &seed.Network{DNS: []netip.Addr{netip.MustParseAddr("1.1.1.3"), netip.MustParseAddr("fd00::53")}},
		Users:      []seed.User{{Name: "ci", AuthorizedKeys: []string{"ssh-ed25519 AAAA new", "ssh-ed25519 BBBB new"}}},
		WriteFiles: []seed.File{{Path: "/etc/deep/er/file", Content: "x", Mode: "0600"}},
	}
}

func noRun(name string, args ...string) error { return errors.New("ran " + name) }

func TestApplyIdentity(t *testing.T) {
	passwd := "root:x:0:0::/root:/bin/sh\nci:x:" + itoa(os.Getuid()) + ":" + itoa(os.Getgid()) + "::/home/ci:/bin/bash\n"
	root := tree(t, map[string]string{
		"etc/passwd":                   passwd,
		"etc/hostname":                 "prebuild\n",
		"etc/hosts":                    "127.0.0.1 localhost\n127.0.1.1 prebuild\n::1 ip6-localhost",
		"etc/resolv.conf":              "-> ../run/systemd/resolve/stub-resolv.conf",
		"home/ci/.ssh/authorized_keys": "ssh-ed25519 OLD\n",
	})
	id := identity{root: root, run: noRun}
	if err := id.apply(testSeed()); err != nil {
		t.Fatal(err)
	}
	got := listing(t, root)
	key, pub := got["etc/ssh/ssh_host_ed25519_key"], got["etc/ssh/ssh_host_ed25519_key.pub"]
	signer, err := ssh.ParsePrivateKey([]byte(key))
	if err != nil || string(ssh.MarshalAuthorizedKey(signer.PublicKey())) != pub {
		t.Errorf("the host key and its public half: %v\n%s", err, pub)
	}
	delete(got, "etc/ssh/ssh_host_ed25519_key")
	delete(got, "etc/ssh/ssh_host_ed25519_key.pub")
	want := map[string]string{
		"etc/passwd":                   passwd,
		"etc/hostname":                 "w1\n",
		"etc/hosts":                    "127.0.0.1 localhost\n::1 ip6-localhost\n127.0.1.1 w1\n",
		"etc/resolv.conf":              "-> ../run/systemd/resolve/stub-resolv.conf",
		"etc/deep/er/file":             "x",
		"home/ci/.ssh/authorized_keys": "ssh-ed25519 AAAA new\nssh-ed25519 BBBB new\n",
		"run/systemd/resolved.conf.d/50-fleetingd.conf": "# by fleetingd guest, from the worker's seed\n[Resolve]\nDNS=1.1.1.3 fd00::53\nLLMNR=no\nMulticastDNS=no\n",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(- want, + got):\n%s", d)
	}
	for name, mode := range map[string]os.FileMode{
		"etc/ssh/ssh_host_ed25519_key": 0o600, "etc/ssh/ssh_host_ed25519_key.pub": 0o644, "etc/deep/er/file": 0o600,
		"home/ci/.ssh/authorized_keys": 0o600, "home/ci/.ssh": os.ModeDir | 0o700,
	} {
		if i, err := os.Stat(filepath.Join(root, name)); err != nil || i.Mode() != mode {
			t.Errorf("%s: %v, %v", name, i.Mode(), err)
		}
	}
	// The second time, as after a reboot of the worker, changes nothing, not even its host key.
	before := listing(t, root)
	if err := id.apply(testSeed()); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(before, listing(t, root)); d != "" {
		t.Errorf("the second time (- before, + after):\n%s", d)
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

func TestApplyMakesUser(t *testing.T) {
	root := tree(t, map[string]string{"etc/passwd": "root:x:0:0::/root:/bin/sh\n", "etc/resolv.conf": "-> /run/nm/resolv.conf"})
	var ran string
	id := identity{root: root, run: func(name string, args ...string) error {
		ran = name + " " + strings.Join(args, " ")
		return os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("ci:x:"+itoa(os.Getuid())+":"+itoa(os.Getgid())+"::/home/ci:\n"), 0o644)
	}}
	if err := id.apply(testSeed()); err != nil {
		t.Fatal(err)
	}
	got := listing(t, root)
	if ran != "useradd --create-home --shell /bin/bash --user-group -- ci" || got["etc/sudoers.d/90-fleetingd"] != "ci ALL=(ALL) NOPASSWD:ALL\n" {
		t.Errorf("ran %q, sudoers %q", ran, got["etc/sudoers.d/90-fleetingd"])
	}
	// Without systemd-resolved, the link to another manager's file becomes a file.
	if got["etc/resolv.conf"] != "nameserver 1.1.1.3\nnameserver fd00::53\n" {
		t.Errorf("resolv.conf %q", got["etc/resolv.conf"])
	}
}

// TestApplyFollowsNoLink: the home folder belongs to a user who may have run code in the prebuild.
func TestApplyFollowsNoLink(t *testing.T) {
	for name, link := range map[string]string{
		"folder": "home/ci/.ssh", "file": "home/ci/.ssh/authorized_keys",
	} {
		t.Run(name, func(t *testing.T) {
			root := tree(t, map[string]string{
				"etc/passwd": "ci:x:" + itoa(os.Getuid()) + ":" + itoa(os.Getgid()) + "::/home/ci:\n",
				"victim/":    "", "victim/authorized_keys": "untouched",
			})
			target := filepath.Join(root, "victim")
			if name == "file" {
				target = filepath.Join(target, "authorized_keys")
			}
			if err := os.MkdirAll(filepath.Dir(filepath.Join(root, link)), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(target, filepath.Join(root, link)); err != nil {
				t.Fatal(err)
			}
			err := identity{root: root, run: noRun}.apply(testSeed())
			if name == "folder" && err == nil {
				t.Error("a .ssh that leads out of the home folder was taken")
			}
			if name == "file" && err != nil {
				t.Error(err)
			}
			if got := listing(t, root)["victim/authorized_keys"]; got != "untouched" {
				t.Errorf("the link's target now holds %q", got)
			}
		})
	}
}

func TestHostKeysOfConfig(t *testing.T) {
	root := tree(t, map[string]string{
		"etc/ssh/sshd_config": "# HostKey /etc/ssh/no\nHostKey /etc/ssh/ssh_host_ecdsa_key\nhostkey \"/etc/keys/ssh_host_ed25519_key\"\n" +
			"Port 2222\nMatch User x\nHostKey /etc/ssh/matched\n",
		"etc/ssh/sshd_config.d/a.conf": "ListenAddress 10.0.0.1\nListenAddress 0.0.0.0\nListenAddress [fd00::1]:23\n",
	})
	if err := (identity{root: root}).hostKeys(rand.Reader); err != nil {
		t.Fatal(err)
	}
	got := listing(t, root)
	for name, kind := range map[string]string{
		"etc/ssh/ssh_host_ecdsa_key.pub": "ecdsa-sha2-nistp256 ", "etc/keys/ssh_host_ed25519_key.pub": "ssh-ed25519 ",
	} {
		if !strings.HasPrefix(got[name], kind) {
			t.Errorf("%s is %q", name, got[name])
		}
	}
	if len(got) != 6 {
		t.Errorf("there are more keys than sshd_config asks for: %d files", len(got))
	}
	want := []string{"127.0.0.1:2222", "10.0.0.1:2222", "[fd00::1]:23"}
	if d := cmp.Diff(want, sshAddresses(root)); d != "" {
		t.Errorf("sshd's addresses (- want, + got):\n%s", d)
	}
}

func TestFindSeed(t *testing.T) {
	sys, dev := t.TempDir(), t.TempDir()
	for _, d := range []string{"loop0", "vda", "vdb"} {
		if err := os.Mkdir(filepath.Join(sys, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	want := testSeed()
	want.Network = nil
	for name, err := range map[string]error{
		"loop0": want.ISOFile(filepath.Join(dev, "loop0"), 0o600),
		"vda":   os.WriteFile(filepath.Join(dev, "vda"), make([]byte, 1<<20), 0o600),
		"vdb":   want.ISOFile(filepath.Join(dev, "vdb"), 0o600),
	} {
		if err != nil {
			t.Fatal(name, err)
		}
	}
	got, disk, err := findSeed(t.Context(), sys, dev)
	if err != nil || disk != "vdb" {
		t.Fatal(disk, err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
