package plan

import (
	"fmt"
	"path"
	"regexp"
	"strings"
)

// Install lists what apply installs on a host with Debian packages.
type Install struct {
	Packages []string    `json:"packages"`           // Debian names, sorted, including those of Sources and Debs
	Sources  []AptSource `json:"sources,omitempty"`  // repositories of some of the Packages
	Debs     []Download  `json:"debs,omitempty"`     // those of the Packages that are downloaded as files
	Programs []Download  `json:"programs,omitempty"` // single files, installed at their ProgramPath
}

// AptSource is a package repository and the key that signs it. Its files are named after Package.
type AptSource struct {
	Package     string   `json:"package"` // the package that it is for
	URL         string   `json:"url"`
	Suite       string   `json:"suite"`
	Components  []string `json:"components,omitempty"` // none if the suite is a path that ends in "/"
	Fingerprint string   `json:"fingerprint"`          // of the key, in upper-case hex
	KeyURL      string   `json:"key_url"`
}

// Download is a file to be downloaded.
type Download struct {
	Package string `json:"package"`
	URL     string `json:"url"`
	SHA256  string `json:"sha256"` // hex
}

// ProgramPath returns where a program of Install is installed on the host.
func (d Download) ProgramPath() string { return path.Join("/usr/local/bin", d.Package) }

// KeyPath returns the path of the source's key on the host.
func (s AptSource) KeyPath() string { return "/etc/apt/keyrings/fleetingd-" + s.Package + ".asc" }

// File returns the source as a file for apt (sources.list(5), deb822 style).
func (s AptSource) File() File {
	var b strings.Builder
	fmt.Fprintf(&b, "# Written by fleetingd for the package %s. Change the spec and apply it again: changes made here are reported as drift.\n", s.Package)
	fmt.Fprintf(&b, "Types: deb\nURIs: %s\nSuites: %s\n", s.URL, s.Suite)
	if len(s.Components) > 0 {
		fmt.Fprintf(&b, "Components: %s\n", strings.Join(s.Components, " "))
	}
	fmt.Fprintf(&b, "Signed-By: %s\n", s.KeyPath())
	return File{
		Path: "/etc/apt/sources.list.d/fleetingd-" + s.Package + ".sources",
		Mode: "0644", Owner: "root", Group: "root", Content: b.String(),
	}
}

var (
	packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+$`)
	oneWord     = regexp.MustCompile(`^[!-~]+$`)
	hexKey      = regexp.MustCompile(`^([0-9A-F]{40}|[0-9A-F]{64})$`)
	hexSHA256   = regexp.MustCompile(`^[0-9a-f]{64}$`)
)

func (p *Plan) checkInstall(f *findings) {
	if p.Install == nil {
		return
	}
	for i, name := range p.Install.Packages {
		f.unless(packageName.MatchString(name), "install.packages[%d]: %q is not the name of a package", i, name)
	}
	for i, s := range p.Install.Sources {
		f.unless(packageName.MatchString(s.Package), "install.sources[%d]: %q is not the name of a package", i, s.Package)
		// Each becomes a line, or a part of one, in a file that apt reads.
		for _, word := range append([]string{s.URL, s.Suite, s.KeyURL}, s.Components...) {
			f.unless(oneWord.MatchString(word), "install.sources[%d]: %q is not one word", i, word)
		}
		f.unless(hexKey.MatchString(s.Fingerprint), "install.sources[%d]: %q is not a fingerprint", i, s.Fingerprint)
	}
	for _, list := range [][]Download{p.Install.Debs, p.Install.Programs} {
		for i, d := range list {
			f.unless(packageName.MatchString(d.Package), "install[%d]: %q is not the name of a package", i, d.Package)
			f.unless(hexSHA256.MatchString(d.SHA256) && oneWord.MatchString(d.URL), "install[%d]: %q with the digest %q is not a download", i, d.URL, d.SHA256)
		}
	}
}
