package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// debianKeyring is where the package debian-archive-keyring installs it, on the host and in the guest.
const debianKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// debianRecipe is part of the digest. It is increased when this file's code makes a different disk from the same packages.
const debianRecipe = 1

// debianPackages are what a guest needs to boot, to be configured, to be reached, and to fetch more.
var debianPackages = []string{
	"systemd", "systemd-sysv", "systemd-resolved", "udev", "dbus", "kmod", "zstd",
	"cloud-init", "netplan.io", "iproute2", "openssh-server", "sudo",
	"e2fsprogs", // resize2fs: the file system grows with the disk
	"debian-archive-keyring", "ca-certificates", "curl",
}

// debianKernels are the kernel packages, by architecture; those made for virtual machines if there are any.
var debianKernels = map[string]string{
	"amd64": "linux-image-cloud-amd64", "arm64": "linux-image-cloud-arm64", "riscv64": "linux-image-riscv64",
}

// debianInputs are what a base is built from. InRelease names the digest of every package list, and those name every package, so the
// same inputs mean the same packages.
type debianInputs struct {
	Format   int          `json:"format"`
	Recipe   int          `json:"recipe"`
	Suite    string       `json:"suite"`
	Arch     string       `json:"arch"`
	Packages []string     `json:"packages"`
	Repos    []debianRepo `json:"repos"`
}

// debianRepo is one line of sources.list.
type debianRepo struct {
	URI       string `json:"uri"`
	Suite     string `json:"suite"`
	InRelease string `json:"inrelease"` // SHA-256
	date      time.Time
}

func (r debianRepo) String() string {
	return fmt.Sprintf("deb [signed-by=%s] %s %s main", debianKeyring, r.URI, r.Suite)
}

// resolveDebian finds the mirrors of a suite, its updates and its security updates, and the state that each is in.
func resolveDebian(ctx context.Context, f *fetcher, src *plan.DebianSource) (*debianInputs, error) {
	in := &debianInputs{Format: formatVersion, Recipe: debianRecipe, Suite: src.Suite, Arch: src.Arch}
	in.Packages = append(slices.Clone(debianPackages), debianKernels[src.Arch])
	in.Packages = append(in.Packages, src.Packages...)
	slices.Sort(in.Packages)
	in.Packages = slices.Compact(in.Packages)

	mirrors, security := []string{src.Mirror}, []string{}
	if src.Mirror == "" {
		var err error
		if mirrors, security, err = hostMirrors(ctx); err != nil {
			return nil, err
		}
	}
	main, err := findSuite(ctx, f, mirrors, src.Suite)
	if err != nil {
		return nil, err
	}
	in.Repos = append(in.Repos, main)
	// Not every mirror has these: urgent fixes that are no security updates.
	updates, err := findSuite(ctx, f, []string{main.URI}, src.Suite+"-updates")
	if err == nil {
		in.Repos = append(in.Repos, updates)
	} else if !errors.Is(err, errNoSuite) {
		return nil, err
	}
	switch {
	case src.SecurityMirror == plan.NoSecurityMirror || slices.Contains(rollingSuites, src.Suite):
		return in, nil
	case src.SecurityMirror != "":
		security = []string{src.SecurityMirror}
	default:
		security = append(security, main.URI+"-security")
	}
	repo, err := findSuite(ctx, f, security, src.Suite+"-security")
	if errors.Is(err, errNoSuite) {
		err = fmt.Errorf(`%w. The image would have no security updates. Name their mirror with security_mirror = "https://…" in the image's `+
			`debian block, or write security_mirror = %q to build it without them`, err, plan.NoSecurityMirror)
	}
	if err != nil {
		return nil, err
	}
	in.Repos = append(in.Repos, repo)
	return in, nil
}

// rollingSuites have no security updates of their own: fixes go into the suite itself.
var rollingSuites = []string{"sid", "unstable"}

// errNoSuite means that every mirror answered and none has the suite.
var errNoSuite = errors.New("no mirror has it")

// findSuite returns the first of the mirrors that has the suite.
func findSuite(ctx context.Context, f *fetcher, mirrors []string, suite string) (debianRepo, error) {
	var failed []error
	absent := 0
	for _, m := range mirrors {
		repo, err := suiteOf(ctx, f, strings.TrimSuffix(m, "/"), suite)
		if err == nil {
			return repo, nil
		}
		if e, ok := errors.AsType[*statusError](err); ok && e.code == http.StatusNotFound {
			absent++
		}
		failed = append(failed, err)
	}
	err := errors.Join(failed...)
	if absent == len(mirrors) {
		err = fmt.Errorf("%w: %w", errNoSuite, err)
	}
	return debianRepo{}, fmt.Errorf("find Debian's suite %q: %w", suite, err)
}

// suiteOf returns the state of a suite on one mirror. What other distributions and vendors keep under the same name is an error.
func suiteOf(ctx context.Context, f *fetcher, mirror, suite string) (debianRepo, error) {
	u, err := url.Parse(mirror)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") {
		return debianRepo{}, fmt.Errorf("mirror %q is not an http:// or https:// URL", redacted(mirror))
	}
	if u.User != nil {
		return debianRepo{}, fmt.Errorf("mirror %s needs a password, which every job could read in its guest's sources.list; "+
			"use a mirror without one", redacted(mirror))
	}
	at := mirror + "/dists/" + suite + "/InRelease"
	b, err := f.bytes(ctx, at, maxSums)
	if err != nil {
		return debianRepo{}, err
	}
	switch origin := releaseField(b, "Origin"); origin {
	case "Debian":
	case "":
		return debianRepo{}, fmt.Errorf("%s is not a release file: it has no Origin", redacted(at))
	default:
		return debianRepo{}, fmt.Errorf("%s is not Debian's: its Origin is %.80q", redacted(at), origin)
	}
	date, err := time.Parse(time.RFC1123, releaseField(b, "Date"))
	if err != nil {
		return debianRepo{}, fmt.Errorf("%s is not a release file: %w", redacted(at), err)
	}
	return debianRepo{URI: mirror, Suite: suite, InRelease: sha256Hex(b), date: date}, nil
}

// releaseField returns a field of an InRelease file, or "".
func releaseField(inRelease []byte, name string) string {
	for line := range bytes.Lines(inRelease) {
		if v, ok := bytes.CutPrefix(line, []byte(name+":")); ok {
			return strings.TrimSpace(string(v))
		}
	}
	return ""
}

// errNoMirror means that apt on this host names no Debian mirror: the host runs another distribution, has no apt, or apt has not
// fetched its lists.
var errNoMirror = errors.New("apt on this host names no Debian mirror; run apt-get update, or write a mirror into the image's debian block: " +
	`mirror = "https://mirror.example.com/debian"`)

// hostMirrors returns the Debian mirrors that apt on this host is configured with: those whose release files say that they are Debian's,
// whatever their path. Many vendors have a folder named debian.
func hostMirrors(ctx context.Context) (debian, security []string, err error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(ORIGIN)\t$(LABEL)\t$(REPO_URI)", "Created-By: Packages").Output()
	if err != nil {
		return nil, nil, fmt.Errorf("%w (apt-get indextargets: %w)", errNoMirror, err)
	}
	for source := range strings.Lines(string(out)) {
		fields := strings.Split(strings.TrimSpace(source), "\t")
		if len(fields) != 3 || fields[0] != "Debian" {
			continue
		}
		var list *[]string
		switch fields[1] {
		case "Debian":
			list = &debian
		case "Debian-Security":
			list = &security
		default:
			continue
		}
		for _, uri := range mirrorURIs(fields[2]) {
			uri = strings.TrimSuffix(uri, "/")
			if isURL(uri) && !slices.Contains(*list, uri) {
				*list = append(*list, uri)
			}
		}
	}
	if len(debian) == 0 {
		return nil, nil, errNoMirror
	}
	return debian, security, nil
}

// mirrorURIs returns the mirrors behind an apt source: the source itself, or for mirror+file: (apt-transport-mirror(1), which Debian's
// cloud images use) the first word of each line of that file.
func mirrorURIs(uri string) []string {
	file, ok := strings.CutPrefix(uri, "mirror+file:")
	if !ok {
		return []string{uri}
	}
	data, err := os.ReadFile(strings.TrimSuffix(file, "/"))
	if err != nil {
		return nil
	}
	var uris []string
	for line := range strings.Lines(string(data)) {
		if fields := strings.Fields(line); len(fields) > 0 && !strings.HasPrefix(fields[0], "#") {
			uris = append(uris, fields[0])
		}
	}
	return uris
}

// aptProxy returns the proxy that apt on this host is configured with, or "".
func aptProxy(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "apt-config", "dump", "--format", "%v", "Acquire::http::Proxy").Output()
	if err != nil || strings.TrimSpace(string(out)) == "DIRECT" {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// withProxy returns a fetcher that uses this proxy for http:// URLs if the environment names none.
func (f *fetcher) withProxy(proxy string) *fetcher {
	u, err := url.Parse(proxy)
	if proxy == "" || err != nil {
		return f
	}
	transport := f.client.Transport.(*http.Transport).Clone()
	transport.Proxy = func(r *http.Request) (*url.URL, error) {
		if fromEnv, err := http.ProxyFromEnvironment(r); fromEnv != nil || err != nil || r.URL.Scheme == "https" {
			return fromEnv, err
		}
		return u, nil
	}
	other := *f
	other.client = &http.Client{Transport: transport, CheckRedirect: f.client.CheckRedirect}
	return &other
}

// debianBuilder builds a disk from packages.
type debianBuilder struct {
	inputs *debianInputs
	digest string
	proxy  string
	line   func(string)
	limit  time.Duration // of the bootstrap
}

// bootstrapLimit is how long mmdebstrap may take. A few minutes are usual; on a slow line or with many packages it may be an hour.
const bootstrapLimit = 90 * time.Minute

// build puts disk, kernel and initrd into a draft, and nothing else.
func (b *debianBuilder) build(ctx context.Context, d *draft) (cmdlineArgs string, err error) {
	root := d.path("root")
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	// apt fetches as its own user, _apt, who needs access.
	if err := os.Chmod(d.dir, 0o711); err != nil {
		return "", err
	}
	if err := b.bootstrap(ctx, root); err != nil {
		return "", err
	}
	for _, f := range []struct{ pattern, name string }{{"vmlinu*-*", kernelFile}, {"initrd.img-*", initrdFile}} {
		found, err := filepath.Glob(filepath.Join(root, "boot", f.pattern))
		if err != nil || len(found) == 0 {
			return "", errors.Join(err, fmt.Errorf("the packages contain no /boot/%s", f.pattern))
		}
		slices.Sort(found)
		if err := copyFile(found[len(found)-1], d.path(f.name)); err != nil {
			return "", err
		}
	}
	if err := b.makeDisk(ctx, root, d.path(diskFile)); err != nil {
		return "", err
	}
	return cmdline("root=/dev/vda" + rootFlags("ext4")), nil
}

// bootstrap installs the packages below root, which does not exist yet.
func (b *debianBuilder) bootstrap(ctx context.Context, root string) error {
	hooks, err := os.MkdirTemp("", "fleetingd-debian-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(hooks)
	early, late := filepath.Join(hooks, "before-packages"), filepath.Join(hooks, "after-packages")
	err = errors.Join(os.WriteFile(early, []byte(beforePackages), 0o700), os.WriteFile(late, []byte(afterPackages), 0o700))
	if err != nil {
		return err
	}
	args := []string{
		"--mode=root", "--format=directory", "--variant=minbase",
		"--architectures=" + b.inputs.Arch,
		"--include=" + strings.Join(b.inputs.Packages, ","),
		// Without fsync after each file: a disk that is lost while it is built can be built again. The setting stays in the guest,
		// whose disk is as expendable.
		"--dpkgopt=force-unsafe-io",
		"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-include=/usr/share/doc/*/copyright",
		"--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/info/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-include=/usr/share/locale/locale.alias",
		`--aptopt=Acquire::Languages "none"`,
		"--essential-hook=" + early + ` "$1"`,
		"--customize-hook=" + late + ` "$1"`,
		b.inputs.Suite, root,
	}
	for _, r := range b.inputs.Repos {
		args = append(args, r.String())
	}
	ctx, cancel := context.WithTimeoutCause(ctx, b.limit, fmt.Errorf("mmdebstrap did not finish within %v", b.limit))
	defer cancel()
	// In namespaces of its own, so that everything it mounts and starts ends with it, even after kill -9. Mounts are slaves of the
	// host's: what the host unmounts meanwhile (the disks' file system, with its loop device) goes here too.
	args = append([]string{"--mount", "--propagation", "slave", "--", "mmdebstrap"}, args...)
	cmd := exec.CommandContext(ctx, "unshare", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	epoch := strconv.FormatInt(b.inputs.Repos[0].date.Unix(), 10)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "SOURCE_DATE_EPOCH="+epoch)
	if b.proxy != "" && os.Getenv("http_proxy") == "" {
		cmd.Env = append(cmd.Env, "http_proxy="+b.proxy)
	}
	return runCommand(ctx, cmd, fmt.Sprintf("mmdebstrap %s from %s", b.inputs.Suite, b.inputs.Repos[0].URI), b.line)
}

// beforePackages runs once apt works in the new system, before the packages are installed. It configures the initrd, which the kernel's
// package makes.
const beforePackages = `#!/bin/sh -e
# An initrd for a virtual machine, with virtio and ext4 only: a third of the size, and of the time to make and to unpack it.
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
echo 'MODULES=list' >"$1/etc/initramfs-tools/conf.d/fleetingd"
printf '%s\n' virtio_pci virtio_mmio virtio_blk ext4 >"$1/usr/share/initramfs-tools/modules.d/fleetingd"
`

// afterPackages puts the new system into the state that every guest starts from.
const afterPackages = `#!/bin/sh -e
echo localhost >"$1/etc/hostname"
rm -f "$1"/etc/ssh/ssh_host_*_key*
# Only NoCloud, which fleetingd uses: probing for other clouds takes seconds.
echo 'datasource_list: [ NoCloud, None ]' >"$1/etc/cloud/cloud.cfg.d/90_fleetingd.cfg"
# Housekeeping for machines that run longer than a job.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
	e2scrub_reap.service fstrim.timer; do
	rm -f "$1"/etc/systemd/system/*.wants/"$unit"
done
`

// makeDisk makes an ext4 file system from a folder. It has no partition table, so that nothing has to grow a partition.
func (b *debianBuilder) makeDisk(ctx context.Context, root, disk string) error {
	used, err := folderSize(root)
	if err != nil {
		return err
	}
	const gib = 1 << 30
	size := (used + used/2 + gib/2 + gib - 1) / gib * gib // room for what the guest writes before it grows the disk
	// The UUID comes from the digest instead of being random, so that the same inputs give the same disk.
	uuid := fmt.Sprintf("%s-%s-%s-%s-%s", b.digest[:8], b.digest[8:12], b.digest[12:16], b.digest[16:20], b.digest[20:32])
	return command(ctx, b.line, "mke2fs", "-q", "-F", "-t", "ext4", "-T", "default", "-m", "0", "-J", "size=64",
		"-L", "fleetingd-root", "-U", uuid, "-E", "root_owner=0:0,lazy_itable_init=1,hash_seed="+uuid, "-d", root, disk,
		strconv.FormatInt(size>>10, 10)+"k")
}

// folderSize returns the space that a folder's files occupy on a disk with 4 KiB blocks.
func folderSize(dir string) (int64, error) {
	var n int64
	err := filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		n += (fi.Size() + 4095) &^ 4095
		return nil
	})
	return n, err
}

// checkDebian returns an error if this host lacks something to build from packages.
func checkDebian(src *plan.DebianSource, arch string) error {
	if src.Arch != arch {
		return fmt.Errorf("a `debian` source for %s can only be built on a host of that architecture; this one is %s", src.Arch, arch)
	}
	for _, need := range []struct{ program, pkg string }{{"mmdebstrap", "mmdebstrap"}, {"mke2fs", "e2fsprogs"}, {"unshare", "util-linux"}} {
		if _, err := exec.LookPath(need.program); err != nil {
			return fmt.Errorf("its `debian` source is built with %s, which is not installed: apt-get install %s",
				need.program, need.pkg)
		}
	}
	if _, err := os.Stat(debianKeyring); err != nil {
		return fmt.Errorf("without Debian's keys its packages cannot be verified: "+
			"apt-get install debian-archive-keyring (%w)", err)
	}
	return nil
}
