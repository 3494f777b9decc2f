package plan

import "path"

// Folder is a folder that has to exist on the host.
type Folder struct {
	Path, Mode, Owner, Group string
	// Mounted means that it is on the disks' file system, and can only be created once that is mounted.
	Mounted bool
}

// ConfigFolder holds GitLab Runner's config.toml, its system id and the tokens that it has renewed.
const ConfigFolder = "/etc/gitlab-runner"

// RunnerFolder returns the home and working directory of the runtime user.
func (p *Plan) RunnerFolder() string { return path.Join(p.Paths.State, "runner") }

// Folders returns the host's folders, parents first. systemd-tmpfiles creates them at boot.
func (p *Plan) Folders() []Folder {
	own := func(path, mode string) Folder { return Folder{Path: path, Mode: mode, Owner: p.User, Group: p.User} }
	mounted := func(f Folder) Folder { f.Mounted = true; return f }
	return []Folder{
		{Path: path.Dir(Path), Mode: "0755", Owner: "root", Group: "root"},
		own(ConfigFolder, "0700"),
		own(p.Paths.Run, "0750"),
		// The state folder belongs to root: otherwise the user could replace the disks' image.
		{Path: p.Paths.State, Mode: "0755", Owner: "root", Group: "root"},
		mounted(own(p.Paths.Disks, "0750")),
		mounted(own(p.Paths.Images, "0750")),
		mounted(own(p.Paths.Clones, "0750")),
		own(p.Paths.Workers, "0750"),
		own(p.Paths.Cache, "0750"),
		own(p.RunnerFolder(), "0700"),
	}
}

// Account is a system user.
type Account struct {
	Name, Comment, Home, Shell string
	Groups                     []string // supplementary groups
}

// Account returns the runtime user. systemd-sysusers creates it at boot if it is missing.
func (p *Plan) Account() Account {
	return Account{Name: p.User, Comment: "fleetingd runner and VMs", Home: p.RunnerFolder(), Shell: "/usr/sbin/nologin", Groups: []string{"kvm"}}
}
