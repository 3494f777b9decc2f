package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/visible"
)

// KindPackage is the kind of the door that NewPackages returns.
const KindPackage Kind = "package"

// HasApt reports whether this host's packages are Debian's, so that NewPackages can install them.
func HasApt() bool {
	for _, tool := range []string{"apt-get", "dpkg-query"} {
		if _, err := exec.LookPath(tool); err != nil {
			return false
		}
	}
	return true
}

// Deb is a package file elsewhere.
type Deb struct{ URL, SHA256 string }

// Fetch downloads a file of at most max bytes to path, if it has this SHA-256 digest (in hex).
type Fetch func(ctx context.Context, url, sha256, path string, max int64) error

// maxDeb bounds a package file or a program that is downloaded, in bytes.
const maxDeb = 512 << 20

// Packages is the door to Debian's packages. A package that is installed has the State {"installed": "yes"}. Recommended packages are not
// installed along, nothing that is installed is removed for it, and configuration files of others stay as they are. With a package go
// those that were installed for its sake, unless something else needs them by then.
type Packages struct {
	debs  map[string]Deb // packages that come as a file
	fetch Fetch
	// folder is where the door keeps its notes and the files that it downloads.
	folder  string
	root    string // "" but in tests
	updated bool   // the lists of packages are fresh
}

// NewPackages returns the door. folder is the door's own, below the state folder; debs are the packages that come as files.
func NewPackages(folder string, debs map[string]Deb, fetch Fetch) *Packages {
	return &Packages{debs: debs, fetch: fetch, folder: folder}
}

// packageNotes are what the door must remember: the packages that apt installed along with each.
type packageNotes struct {
	Along map[string][]string `json:"along,omitempty"`
}

func (d *Packages) notes() string { return filepath.Join(d.folder, "packages.json") }

// Read returns which of the packages are installed.
func (d *Packages) Read(ctx context.Context, names []string) (map[string]State, error) {
	installed, err := d.installed(ctx)
	if err != nil {
		return nil, err
	}
	found := make(map[string]State, len(names))
	for _, name := range names {
		found[name] = nil
		if installed[name] {
			found[name] = State{"installed": "yes"}
		}
	}
	return found, nil
}

func (d *Packages) installed(ctx context.Context) (map[string]bool, error) {
	out, err := d.run(ctx, "dpkg-query", "--show", "--showformat", `${Package} ${db:Status-Status}\n`)
	if err != nil {
		return nil, err
	}
	installed := map[string]bool{}
	for line := range strings.Lines(out) {
		if name, status, _ := strings.Cut(strings.TrimSpace(line), " "); status == "installed" {
			installed[name] = true
		}
	}
	return installed, nil
}

// Write installs a package, or removes it for nil. It does not stop half-way when ctx ends: dpkg must not be interrupted.
func (d *Packages) Write(ctx context.Context, name string, want State) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return named(KindPackage, name, d.write(context.WithoutCancel(ctx), name, want))
}

func (d *Packages) write(ctx context.Context, name string, want State) error {
	if err := onlyKeys(want, "installed"); err != nil {
		return err
	}
	if err := d.repair(ctx); err != nil {
		return err
	}
	installed, err := d.installed(ctx)
	switch {
	case err != nil:
		return err
	case want == nil:
		return d.remove(ctx, name, installed)
	case installed[name]:
		return nil
	}
	return d.install(ctx, name)
}

// repair finishes what a killed dpkg left half-way, without which apt-get does nothing.
func (d *Packages) repair(ctx context.Context) error {
	out, err := d.run(ctx, "dpkg", "--audit")
	if err != nil || strings.TrimSpace(out) == "" {
		return err
	}
	_, err = d.run(ctx, "dpkg", "--force-confdef", "--force-confold", "--configure", "-a")
	return err
}

func (d *Packages) install(ctx context.Context, name string) error {
	what := name
	if deb, ok := d.debs[name]; ok {
		what = filepath.Join(d.folder, name+"-"+deb.SHA256+".deb")
		if err := os.MkdirAll(d.folder, 0o755); err != nil {
			return err
		}
		if err := d.fetch(ctx, deb.URL, deb.SHA256, what, maxDeb); err != nil {
			return err
		}
	}
	// One source that does not answer must not stop the rest; if it matters, the install fails, and says both.
	stale := d.update(ctx)
	change, err := d.simulate(ctx, "install", what)
	if err != nil {
		return errors.Join(err, stale)
	}
	if len(change.gone) > 0 {
		return fmt.Errorf("apt would remove %s for it; install it by hand: apt-get install %s", strings.Join(change.gone, ", "), what)
	}
	if err := d.note(name, change.new); err != nil {
		return err
	}
	if _, err := d.run(ctx, "apt-get", slices.Concat(installOptions, []string{"--yes", "install", what})...); err != nil {
		return errors.Join(err, stale)
	}
	return nil
}

// update has apt read what the repositories have, once.
func (d *Packages) update(ctx context.Context) error {
	if d.updated {
		return nil
	}
	// By default apt goes on with old lists where a signature is wrong or a server does not answer, and calls that success.
	_, err := d.run(ctx, "apt-get", "-o", "APT::Update::Error-Mode=any", "--quiet", "update")
	d.updated = err == nil
	return err
}

// installOptions have apt ask nothing, and add nothing that nobody asked for.
var installOptions = []string{"--quiet", "--no-install-recommends", "-o", "DPkg::Options::=--force-confdef", "-o", "DPkg::Options::=--force-confold"}

// note remembers what is installed along with a package, before it is.
func (d *Packages) note(name string, with []string) error {
	var n packageNotes
	if err := readJSON(d.notes(), &n); err != nil {
		return err
	}
	along := slices.Concat(n.Along[name], with) // after a crash, some of it is installed already
	slices.Sort(along)
	along = slices.DeleteFunc(slices.Compact(along), func(p string) bool { return p == name })
	if n.Along == nil {
		n.Along = map[string][]string{}
	}
	n.Along[name] = along
	return writeJSON(d.notes(), n, false)
}

func (d *Packages) remove(ctx context.Context, name string, installed map[string]bool) error {
	var n packageNotes
	if err := readJSON(d.notes(), &n); err != nil {
		return err
	}
	out, err := d.run(ctx, "apt-mark", "showauto")
	if err != nil {
		return err
	}
	automatic := strings.Fields(out)
	with := slices.DeleteFunc(slices.Clone(n.Along[name]), func(p string) bool { return !installed[p] || !slices.Contains(automatic, p) })
	if installed[name] {
		with = append(with, name)
	}
	if len(with) > 0 {
		if with, err = d.removable(ctx, name, with); err != nil {
			return err
		}
		if _, err := d.run(ctx, "apt-get", slices.Concat([]string{"--quiet", "--yes", "purge"}, with)...); err != nil {
			return err
		}
	}
	delete(n.Along, name)
	return writeJSON(d.notes(), n, len(n.Along) == 0)
}

// removable is as much of the packages as goes without taking any other along.
func (d *Packages) removable(ctx context.Context, name string, packages []string) ([]string, error) {
	for _, try := range [][]string{packages, {name}} {
		change, err := d.simulate(ctx, "purge", try...)
		if err != nil {
			return nil, err
		}
		others := slices.DeleteFunc(change.gone, func(p string) bool { return slices.Contains(packages, p) })
		if len(others) == 0 {
			return try, nil
		}
		if len(try) == 1 {
			return nil, fmt.Errorf("%s would have to go with it; remove it by hand: apt-get purge %s", strings.Join(others, ", "), name)
		}
	}
	return nil, nil
}

// aptChange is what apt-get would do.
type aptChange struct{ new, gone []string }

// simulate reads `apt-get --simulate`: "Inst NAME (…", "Inst NAME [OLD] (…" for an upgrade, "Remv NAME [OLD]", "Purg NAME [OLD]".
func (d *Packages) simulate(ctx context.Context, verb string, names ...string) (aptChange, error) {
	out, err := d.run(ctx, "apt-get", slices.Concat(installOptions, []string{"--simulate", verb}, names)...)
	if err != nil {
		return aptChange{}, err
	}
	var c aptChange
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		name, _, _ := strings.Cut(f[1], ":") // of a foreign architecture
		switch {
		case f[0] == "Inst" && (len(f) < 3 || !strings.HasPrefix(f[2], "[")):
			c.new = append(c.new, name)
		case f[0] == "Remv", f[0] == "Purg":
			c.gone = append(c.gone, name)
		}
	}
	return c, nil
}

// run runs one of Debian's tools and returns its standard output.
func (d *Packages) run(ctx context.Context, name string, args ...string) (string, error) {
	isApt := strings.HasPrefix(name, "apt-")
	var options []string
	switch {
	case isApt && d.root != "":
		options = []string{"-o", "Dir=" + d.root, "-o", "DPkg::Options::=--root=" + d.root, "-o", "APT::Sandbox::User=root"}
	case d.root != "":
		options = []string{"--root=" + d.root}
	}
	if isApt {
		options = append(options, "-o", "DPkg::Lock::Timeout=300") // unattended-upgrades may be at work
	}
	cmd := exec.CommandContext(ctx, name, append(options, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive", "NEEDRESTART_SUSPEND=1", "APT_LISTCHANGES_FRONTEND=none")
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		// apt tells on one what is wrong, and on the other why.
		said := append(visible.LastLines(out.String(), 5), visible.LastLines(errs.String(), 10)...)
		return "", fmt.Errorf("%s %s: %w:\n%s", name, strings.Join(withoutOptions(args), " "), err, strings.Join(said, "\n"))
	}
	return out.String(), nil
}

// withoutOptions is what somebody would type.
func withoutOptions(args []string) []string {
	return slices.DeleteFunc(slices.Clone(args), func(a string) bool {
		return slices.Contains(installOptions, a) || strings.HasPrefix(a, "APT::")
	})
}
