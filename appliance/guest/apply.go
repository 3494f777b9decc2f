package guest

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/seed"
)

// seedPatience is how long the seed's disk may take to appear.
const seedPatience = 30 * time.Second

// applySeed replaces cloud-init: it applies the same seed, without Python, in tens of
// milliseconds, before sshd and the resolver start. An image may keep cloud-init instead (keepCloudInit).
func applySeed(ctx context.Context, log *slog.Logger) error {
	if err := writableRoot(); err != nil {
		return err
	}
	s, disk, err := findSeed(ctx, "/sys/block", "/dev")
	if err != nil {
		return err
	}
	log.Info("seed found", "disk", disk, "instance", s.InstanceID)
	// This makes the worker's keys unique even if the kernel's entropy so far is the same in all clones. It is not credited, because it is
	// not secret.
	sum := sha512.Sum512([]byte(s.InstanceID + s.Hostname))
	if err := os.WriteFile("/dev/urandom", sum[:], 0); err != nil {
		return fmt.Errorf("mix the seed into the kernel's entropy: %w", err)
	}
	if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
		return fmt.Errorf("set the host name %q: %w", s.Hostname, err)
	}
	id := identity{root: "/", run: run}
	if err := errors.Join(id.apply(s), applyNetwork(ctx, s.Network, "/proc/sys")); err != nil {
		return err
	}
	for _, c := range s.RunCmd {
		if len(c) == 0 {
			continue
		}
		r := runCommand(ctx, func(l string) { log.Info(l, "command", c[0]) }, c[0], c[1:]...)
		if r.code != 0 || r.err != nil {
			return fmt.Errorf("the seed's command %q failed: %w", c, r.problem())
		}
	}
	return nil
}

// writableRoot remounts the root writable if the kernel command line of the image says "ro". systemd-remount-fs.service does the
// same, but waiting for it would cost half a second.
func writableRoot() error {
	var st unix.Statfs_t
	if err := unix.Statfs("/", &st); err != nil {
		return fmt.Errorf("statfs /: %w", err)
	}
	if st.Flags&unix.ST_RDONLY == 0 {
		return nil
	}
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT, ""); err != nil {
		return fmt.Errorf("make the root file system writable: %w", err)
	}
	return nil
}

// findSeed reads the seed from the disk that holds it.
func findSeed(ctx context.Context, sys, dev string) (seed.Seed, string, error) {
	ctx, cancel := context.WithTimeout(ctx, seedPatience)
	defer cancel()
	for {
		disks, err := os.ReadDir(sys)
		if err != nil {
			return seed.Seed{}, "", err
		}
		var broken error
		for _, d := range disks {
			if strings.HasPrefix(d.Name(), "loop") || strings.HasPrefix(d.Name(), "ram") {
				continue
			}
			s, err := readSeed(filepath.Join(dev, d.Name()))
			switch {
			case err == nil:
				return s, d.Name(), nil
			case !errors.Is(err, seed.ErrNotSeed):
				broken = errors.Join(broken, fmt.Errorf("%s: %w", d.Name(), err))
			}
		}
		if !pause(ctx, 10*time.Millisecond) {
			return seed.Seed{}, "", errors.Join(fmt.Errorf("no disk with a seed (an ISO image labelled %q that fleetingd wrote) "+
				"appeared in %v: the worker's seed is not attached", seed.Label, seedPatience), broken)
		}
	}
}

func readSeed(dev string) (seed.Seed, error) {
	f, err := os.Open(dev)
	if err != nil {
		return seed.Seed{}, err
	}
	defer f.Close()
	return seed.ReadISO(f)
}

// identity writes a machine's identity into its files.
type identity struct {
	root string
	run  func(name string, args ...string) error // a program of the machine itself
}

func (id identity) path(p string) string { return filepath.Join(id.root, p) }

// apply does what cloud-init would do with the same seed.
func (id identity) apply(s seed.Seed) error {
	if err := id.hostname(s.Hostname); err != nil {
		return err
	}
	if err := id.hostKeys(rand.Reader); err != nil {
		return err
	}
	for _, u := range s.Users {
		if err := id.user(u); err != nil {
			return fmt.Errorf("user %s: %w", u.Name, err)
		}
	}
	for _, f := range s.WriteFiles {
		mode, err := strconv.ParseUint(f.Mode, 8, 32)
		if err != nil {
			return fmt.Errorf("the seed's file %s: mode %q is not octal", f.Path, f.Mode)
		}
		p := id.path(f.Path)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
		if err := writeFile(p, []byte(f.Content), unixMode(mode)); err != nil {
			return err
		}
	}
	if s.Network != nil {
		return id.resolver(s.Network)
	}
	return nil
}

// hostname writes the name to where it is found without DNS, like cloud-init's
// manage_etc_hosts "localhost": otherwise sudo and others wait for a name server that does not know the name.
func (id identity) hostname(name string) error {
	if name == "" {
		return nil
	}
	if err := writeFile(id.path("etc/hostname"), []byte(name+"\n"), 0o644); err != nil {
		return err
	}
	hosts := id.path("etc/hosts")
	old, err := os.ReadFile(hosts)
	if errors.Is(err, fs.ErrNotExist) {
		old, err = []byte("127.0.0.1 localhost\n::1 localhost\n"), nil
	}
	if err != nil {
		return err
	}
	var b strings.Builder
	for l := range strings.Lines(string(old)) {
		if w := strings.Fields(l); len(w) == 0 || w[0] != "127.0.1.1" {
			b.WriteString(strings.TrimSuffix(l, "\n") + "\n")
		}
	}
	b.WriteString("127.0.1.1 " + name + "\n")
	return writeFile(hosts, []byte(b.String()), 0o644)
}

// hostKeys creates the missing SSH host keys: seal removed those of the image. Every client of this decade supports
// Ed25519, whose keys take no time to generate; other keys are created only if the image's sshd_config names them.
func (id identity) hostKeys(random interface{ Read([]byte) (int, error) }) error {
	paths := sshdSetting(id.root, "hostkey")
	if len(paths) == 0 {
		paths = []string{"/etc/ssh/ssh_host_ed25519_key"}
	}
	for _, p := range paths {
		if _, err := os.Stat(id.path(p)); err == nil {
			continue // the worker has rebooted and keeps its identity
		}
		var key any
		var err error
		switch base := filepath.Base(p); {
		case strings.Contains(base, "ecdsa"):
			key, err = ecdsa.GenerateKey(elliptic.P256(), random)
		case strings.Contains(base, "rsa"):
			key, err = rsa.GenerateKey(random, 3072)
		default:
			_, key, err = ed25519.GenerateKey(random)
		}
		if err == nil {
			err = writeHostKey(id.path(p), key)
		}
		if err != nil {
			return fmt.Errorf("SSH host key %s: %w", p, err)
		}
	}
	return nil
}

func writeHostKey(path string, key any) error {
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		return err
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return errors.Join(
		writeFile(path, pem.EncodeToMemory(block), 0o600),
		writeFile(path+".pub", ssh.MarshalAuthorizedKey(signer.PublicKey()), 0o644))
}

// user creates the account unless the image has it, and lets it log in only with the seed's keys.
func (id identity) user(u seed.User) error {
	home, uid, gid, err := id.lookup(u.Name)
	if errors.Is(err, errNoUser) {
		if err := id.run("useradd", "--create-home", "--shell", "/bin/bash", "--user-group", "--", u.Name); err != nil {
			return err
		}
		sudo := u.Name + " ALL=(ALL) NOPASSWD:ALL\n"
		if err := os.MkdirAll(id.path("etc/sudoers.d"), 0o750); err != nil {
			return err
		}
		if err := writeFile(id.path("etc/sudoers.d/90-fleetingd"), []byte(sudo), 0o440); err != nil {
			return err
		}
		home, uid, gid, err = id.lookup(u.Name)
	}
	if err != nil {
		return err
	}
	// os.Root: the home folder belongs to the user; root must not follow links there.
	if err := os.MkdirAll(id.path(home), 0o755); err != nil {
		return err
	}
	r, err := os.OpenRoot(id.path(home))
	if err != nil {
		return err
	}
	defer r.Close()
	if err := r.Mkdir(".ssh", 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	const keys = ".ssh/authorized_keys"
	if err := r.Remove(keys); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := r.OpenFile(keys, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strings.Join(u.AuthorizedKeys, "\n") + "\n")
	return errors.Join(err, f.Chmod(0o600), f.Close(),
		r.Chmod(".ssh", 0o700), r.Lchown(".ssh", uid, gid), r.Lchown(keys, uid, gid))
}

var errNoUser = errors.New("no such user in /etc/passwd")

// lookup reads passwd(5) itself: the C library might use the network, which is not up yet.
func (id identity) lookup(name string) (home string, uid, gid int, err error) {
	f, err := os.Open(id.path("etc/passwd"))
	if err != nil {
		return "", 0, 0, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		w := strings.Split(s.Text(), ":")
		if len(w) != 7 || w[0] != name {
			continue
		}
		uid, uerr := strconv.Atoi(w[2])
		gid, gerr := strconv.Atoi(w[3])
		if !filepath.IsAbs(w[5]) || uerr != nil || gerr != nil {
			return "", 0, 0, fmt.Errorf("/etc/passwd: line %q", s.Text())
		}
		return w[5], uid, gid, nil
	}
	return "", 0, 0, errNoUser
}

// resolver configures the name servers: in systemd-resolved, which has not started yet, if the image uses it,
// otherwise in resolv.conf.
func (id identity) resolver(n *seed.Network) error {
	const resolved = "/systemd/resolve/"
	conf := id.path("etc/resolv.conf")
	if to, err := os.Readlink(conf); err == nil {
		if strings.Contains(to, resolved) {
			return id.resolvedConf(n)
		}
		// It points to a file that another network manager would write; none runs here.
		if err := os.Remove(conf); err != nil {
			return err
		}
	}
	var b strings.Builder
	for _, a := range n.DNS {
		fmt.Fprintf(&b, "nameserver %s\n", a)
	}
	return writeFile(conf, []byte(b.String()), 0o644)
}

func (id identity) resolvedConf(n *seed.Network) error {
	var dns []string
	for _, a := range n.DNS {
		dns = append(dns, a.String())
	}
	dir := id.path("run/systemd/resolved.conf.d") // gone at reboot, like the address
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// Nobody on a worker's link answers multicast queries, and no port of a worker except sshd's is open.
	text := "# by fleetingd guest, from the worker's seed\n[Resolve]\nDNS=" + strings.Join(dns, " ") +
		"\nLLMNR=no\nMulticastDNS=no\n"
	return writeFile(filepath.Join(dir, "50-fleetingd.conf"), []byte(text), 0o644)
}

// run runs a program of the machine and shows its output when it fails.
func run(name string, args ...string) error {
	var out []string
	r := runCommand(context.Background(), func(l string) { out = append(out, l) }, name, args...)
	if r.code == 0 && r.err == nil {
		return nil
	}
	out = out[max(0, len(out)-tailLines):]
	return fmt.Errorf("%q failed: %w: %s", slices.Concat([]string{name}, args), r.problem(), strings.Join(out, "; "))
}
