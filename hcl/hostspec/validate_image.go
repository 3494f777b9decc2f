package hostspec

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
)

var (
	userSyntax   = regexp.MustCompile(`^[a-z_][a-z0-9_-]{0,31}$`) // useradd's NAME_REGEX
	suiteSyntax  = regexp.MustCompile(`^[a-z][a-z0-9-]{0,63}$`)
	sha256Syntax = regexp.MustCompile(`^[0-9a-f]{64}$`)
	// A package, with apt's :arch, =version and /release. It must not be an option of apt's.
	packageSyntax = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+(:[a-z0-9]+)?([=/][A-Za-z0-9.+:~_-]+)?$`)
)

func (l *loader) validateImage(i *Image) {
	l.checkSources(i)
	if l.ok(i, "user") {
		switch {
		case !userSyntax.MatchString(i.User):
			l.errorf(l.at(i, "user"), "Invalid user", "%s is not a valid account name: use at most 32 lower-case letters, digits, - and _, beginning with a letter.", quote(i.User))
		case i.User == "root":
			l.errorf(l.at(i, "user"), "Invalid user", "cloud-init does not allow logins as root. Write another account; it may use sudo without a password.")
		}
	}
	if f := i.File; f != nil {
		l.checkPath(f, "disk", f.Disk)
		l.checkPath(f, "kernel", f.Kernel)
		l.checkPath(f, "initrd", f.Initrd)
		l.checkCmdline(f, f.Cmdline)
	}
	if u := i.URL; u != nil {
		l.validateURLSource(u)
	}
	if u := i.Ubuntu; u != nil {
		l.validateUbuntu(u)
	}
	if d := i.Debian; d != nil {
		l.checkSuite(d, "suite", d.Suite, debianSuites)
		l.checkURL(d, "mirror", d.Mirror)
		if d.SecurityMirror != "none" {
			l.checkURL(d, "security_mirror", d.SecurityMirror)
		}
		l.checkPackages(d, d.Packages)
		l.oneOf(d, "arch", d.Arch, "amd64", "arm64", "riscv64")
	}
	if i.Prebuild != nil {
		l.validatePrebuild(i.Prebuild)
	}
}

func (l *loader) checkSources(i *Image) {
	var have []string
	for _, s := range []struct {
		name string
		set  bool
	}{{"file", i.File != nil}, {"url", i.URL != nil}, {"ubuntu", i.Ubuntu != nil}, {"debian", i.Debian != nil}} {
		if s.set {
			have = append(have, s.name)
		}
	}
	switch len(have) {
	case 1:
	case 0:
		l.errorf(&i.Range, "No source", "The image %q has no source. Add one of these blocks: file, url, ubuntu, debian. For example:\n\n"+
			"ubuntu {\n  release = \"noble\"\n}", i.Name)
	default:
		l.errorf(&i.Range, "More than one source", "The image %q has the sources %s. Keep one, and move the other to an image block of its own.", i.Name, quotedList(have))
	}
}

// checkPath checks a path on the host.
func (l *loader) checkPath(owner any, name, value string) {
	if !l.ok(owner, name) {
		return
	}
	if !path.IsAbs(value) || strings.ContainsAny(value, "\n\x00") || strings.HasSuffix(value, "/") {
		l.errorf(l.at(owner, name), "Invalid "+name, "%s is not the absolute path of a file. Write, for example, \"/srv/images/%s\".",
			quote(value), strings.TrimLeft(path.Base("/"+strings.ReplaceAll(value, "\n", "")), "/"))
	}
}

func (l *loader) checkCmdline(owner any, value string) {
	// COMMAND_LINE_SIZE is 2048 on x86 and arm64, 1024 on riscv64.
	const most = 1024
	if !l.ok(owner, "cmdline") {
		return
	}
	if len(value) > most || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		l.errorf(l.at(owner, "cmdline"), "Invalid cmdline", "A kernel command line must be one line of at most %d bytes.", most)
	}
}

func (l *loader) validateURLSource(u *URLSource) {
	for _, a := range []struct{ name, value string }{
		{"disk", u.Disk}, {"kernel", u.Kernel}, {"initrd", u.Initrd}, {"sha256sums", u.SHA256Sums},
	} {
		l.checkURL(u, a.name, a.value)
	}
	l.checkCmdline(u, u.Cmdline)
	if l.ok(u, "sha256") && !sha256Syntax.MatchString(u.SHA256) {
		cure := "Write 64 hexadecimal digits, as sha256sum prints them"
		if lower := strings.ToLower(u.SHA256); sha256Syntax.MatchString(lower) {
			cure = "Write it in lower case: " + quote(lower)
		}
		l.errorf(l.at(u, "sha256"), "Invalid sha256", "%s is not a SHA-256 checksum. %s.", quote(u.SHA256), cure)
	}
	if sums, err := parseURL(u.SHA256Sums); err == nil && u.SHA256 == "" && sums.Scheme == "http" && !loopback(sums.Hostname()) {
		l.warnf(l.at(u, "disk"), "Checksums without protection", "SHA256SUMS comes from %s over http, so anyone who can change the image on its way can change the checksums too. "+
			"Write https, or the disk's sha256 here.", sums.Hostname())
	}
}

// CheckURL returns what is wrong with the URL of a server, or nil.
func CheckURL(text string) error {
	_, err := parseURL(text)
	return err
}

// CheckPackage returns what is wrong with the name of a package, or nil. Whether there is such a package, only its archive knows.
func CheckPackage(name string) error {
	if !packageSyntax.MatchString(name) {
		return fmt.Errorf("%s is not the name of a Debian package", quote(name))
	}
	return nil
}

func loopback(host string) bool {
	a, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && a.IsLoopback()
}

// parseURL takes http and https URLs with a host.
func parseURL(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return nil, errors.New("it cannot be read as a URL")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("it must start with https:// or http://")
	case u.Hostname() == "":
		return nil, errors.New("it names no host")
	case u.Port() != "" && !isPort(u.Port()):
		return nil, errors.New("port numbers go from 1 to 65535")
	case u.User != nil:
		return nil, errors.New("it holds a user or password, which everyone who can read the plan could read")
	}
	return u, nil
}

func isPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

func (l *loader) checkURL(owner any, name, value string) {
	if !l.ok(owner, name) {
		return
	}
	if _, err := parseURL(value); err != nil {
		shown := quote(value)
		if u, e := url.Parse(value); e == nil && u.User != nil {
			shown = quote(u.Redacted())
			l.masks = append(l.masks, *l.at(owner, name))
		}
		if u, e := url.Parse(value); e == nil && u.Scheme == "file" {
			l.errorf(l.at(owner, name), "Invalid "+name, "%s is a file on this host. %s", shown, fileCure(owner, name, u.Path))
			return
		}
		l.errorf(l.at(owner, name), "Invalid "+name, "%s is not a valid URL: %v. Write, for example, %q.", shown, err, exampleURL(owner, name))
	}
}

// fileCure says what to write for a file:// URL.
func fileCure(owner any, name, path string) string {
	if _, ok := owner.(*URLSource); !ok || name == "sha256sums" {
		return fmt.Sprintf("Write a URL of a server, such as %q.", exampleURL(owner, name))
	}
	return fmt.Sprintf("Write a file block in place of the url block:\n\nfile {\n  %s = %q\n}", name, path)
}

func exampleURL(owner any, name string) string {
	switch owner.(type) {
	case *URLSource:
		return "https://images.example.com/" + map[string]string{"disk": "golden.qcow2", "kernel": "vmlinuz", "initrd": "initrd.img", "sha256sums": "SHA256SUMS"}[name]
	case *Runner:
		return "https://gitlab.example.com"
	}
	return "https://mirror.example.com/" + name
}

// ubuntuReleases are the long-term releases by their numbers, which people know better.
var ubuntuReleases = map[string]string{"20.04": "focal", "22.04": "jammy", "24.04": "noble", "26.04": "resolute"}

var debianSuites = map[string]string{"11": "bullseye", "12": "bookworm", "13": "trixie", "14": "forky"}

func (l *loader) validateUbuntu(u *UbuntuSource) {
	l.checkSuite(u, "release", u.Release, ubuntuReleases)
	l.checkURL(u, "mirror", u.Mirror)
	l.oneOf(u, "arch", u.Arch, "amd64", "arm64", "riscv64")
}

// checkSuite checks a code name and translates numbers. A name that is not known
// here may still be right: it is the mirror that knows.
func (l *loader) checkSuite(owner any, name, value string, byNumber map[string]string) {
	if !l.ok(owner, name) {
		return
	}
	if code := byNumber[value]; code != "" {
		l.errorf(l.at(owner, name), "Invalid "+name, "Write the code name of %s: %s = %q.", quote(value), name, code)
	} else if !suiteSyntax.MatchString(value) {
		l.errorf(l.at(owner, name), "Invalid "+name, "%s is not a code name. Write one in lower case, such as %q.", quote(value), lastOf(byNumber))
	}
}

// lastOf is a stable example of a release.
func lastOf(byNumber map[string]string) string {
	for _, n := range []string{"24.04", "13"} {
		if code := byNumber[n]; code != "" {
			return code
		}
	}
	return ""
}

// packageCure says what was meant.
func packageCure(p string) string {
	words := strings.Fields(strings.ToLower(p))
	for _, word := range words {
		if !packageSyntax.MatchString(word) {
			return `Write each package as its own string, such as ["git", "podman"].`
		}
	}
	if len(words) == 0 {
		return "Omit it."
	}
	return "Write " + strings.Join(quoteAll(words), ", ") + "."
}

func quoteAll(words []string) []string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = strconv.Quote(w)
	}
	return quoted
}

func (l *loader) checkPackages(owner any, packages []string) {
	seen := map[string]bool{}
	for i, p := range packages {
		at := l.atElem(owner, "packages", i)
		if !packageSyntax.MatchString(p) {
			l.errorf(at, "Invalid packages", "%s is not the name of a Debian package. %s", quote(p), packageCure(p))
		} else if seen[p] {
			l.warnf(at, "Named twice", "The package %s is in the list twice.", p)
		}
		seen[p] = true
	}
}

func (l *loader) validatePrebuild(p *Prebuild) {
	l.checkPackages(p, p.Packages)
	for i, cmd := range p.Run {
		if strings.TrimSpace(cmd) == "" || strings.Contains(cmd, "\x00") {
			l.errorf(l.atElem(p, "run", i), "Invalid run", "Command %d is empty or holds a NUL. Write a shell script, or remove it.", i)
		} else if err := cmp.Or(checkInterpreter(cmd), checkLines(cmd)); err != nil {
			l.errorf(l.atElem(p, "run", i), "Invalid run", "Command %d %v.", i, err)
		}
	}
	if l.ok(p, "timeout") && (p.Timeout < time.Second || p.Timeout > 24*time.Hour) {
		l.errorf(l.at(p, "timeout"), "Invalid timeout", "A prebuild's timeout must be between 1s and 24h; got %s.", p.Timeout)
	}
	seen := map[string]hcl.Range{}
	for _, f := range p.Files {
		at := l.at(f, "label")
		if !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" || strings.ContainsAny(f.Path, "\n\x00") {
			l.errorf(at, "Invalid path", "%s is not the clean, absolute path of a file in the guest. Write, for example, file \"/etc/motd\".", quote(f.Path))
			continue
		}
		if err := checkInterpreter(f.Content); err != nil {
			l.errorf(l.at(f, "content"), "Invalid content", "The content of %s %v.", f.Path, err)
		}
		if first, ok := seen[f.Path]; ok {
			l.errorf(at, "Duplicate file", "%s is already written at %s.", f.Path, first)
		}
		seen[f.Path] = *at
	}
}
