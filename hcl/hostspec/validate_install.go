package hostspec

import (
	"net/url"
	"regexp"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// debianName is the name of a package alone (deb-control(5)).
var debianName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)

func (l *loader) validateInstall(in *Install) {
	seen := map[string]hcl.Range{}
	for _, p := range in.Packages {
		if !debianName.MatchString(p.Name) {
			l.errorf(l.at(p, "label"), "Invalid name", "%s is not the name of a package, such as \"gitlab-runner\".", quote(p.Name))
		}
		if first, ok := seen[p.Name]; ok {
			l.errorf(l.at(p, "label"), "Duplicate name", "The package %q is already defined at %s. Keep one.", p.Name, first)
		}
		seen[p.Name] = p.Range
		l.validatePackage(p)
	}
}

func (l *loader) validatePackage(p *Package) {
	needs := func(name, because, example string) {
		if !l.given(p, name) {
			l.errorf(&p.Range, "Missing attribute", "With %s, the package %q needs %s. Write, for example: %s = %s", because, p.Name, name, name, example)
		}
	}
	without := func(name, because string) {
		if l.given(p, name) {
			l.errorf(l.at(p, name), "Invalid "+name, "%s belongs to a package with %s. Remove it.", name, because)
		}
	}
	switch apt, file := l.given(p, "apt"), l.given(p, "file"); {
	case apt && file:
		l.errorf(l.at(p, "file"), "Two sources", "The package %q comes from an apt repository or as a file, not both. Keep apt or file.", p.Name)
	case apt:
		if u, err := url.Parse(p.Apt.URL); l.ok(p, "apt") && err == nil && u.User != nil {
			l.masks = append(l.masks, *l.at(p, "apt"))
			l.errorf(l.at(p, "apt"), "Invalid apt", "The URL of a repository is written to a file that everybody can read, so it can have no password. "+
				"Write the password to a file in /etc/apt/auth.conf.d (apt_auth.conf(5)).")
		}
		needs("key", "apt", `"F6403F6544A38863DAA0B6E03F01618A51312F3F"`)
		needs("key_url", "apt", `"https://packages.example.com/runner/key.asc"`)
		without("sha256", "file")
		l.checkURL(p, "key_url", p.KeyURL)
	case file:
		needs("sha256", "file", "\"…\", as sha256sum prints it")
		without("key", "apt")
		without("key_url", "apt")
		l.checkURL(p, "file", p.File)
		if l.ok(p, "sha256") && !sha256Syntax.MatchString(strings.ToLower(p.SHA256)) {
			l.errorf(l.at(p, "sha256"), "Invalid sha256", "%s is not a SHA-256 digest. Write 64 hexadecimal digits, as sha256sum prints them.", quote(p.SHA256))
		}
	default:
		l.errorf(&p.Range, "No source", "The package %q has no source. Write, for example:\n\napt     = \"https://packages.example.com/runner trixie main\"\n"+
			"key     = \"F6403F6544A38863DAA0B6E03F01618A51312F3F\"\nkey_url = \"https://packages.example.com/runner/key.asc\"", p.Name)
	}
}
