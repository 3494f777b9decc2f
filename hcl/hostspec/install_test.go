package hostspec_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

const restOfSpec = `
image "a" {
  ubuntu {
    release = "noble"
  }
}
pool "a" {
  image         = image.a
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  start         = "cold"
  max_instances = 1
}
`

func loadInstall(install string) (*hostspec.Install, string) {
	src := "host \"h\" {\n  egress_interface = \"eno1\"\n" + install + "\n}\n" + restOfSpec
	res, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: []byte(src)})
	if diags.HasErrors() {
		var all []string
		for _, d := range diags {
			all = append(all, d.Error())
		}
		return nil, strings.Join(all, "\n")
	}
	return &res.Host.Install, ""
}

func TestInstall(t *testing.T) {
	got, fault := loadInstall(`
install {
  package "gitlab-runner" {
    apt     = "https://packages.example.com/runner trixie main extra"
    key     = "f640 3F65 44A3 8863 DAA0  B6E0 3F01 618A 5131 2F3F"
    key_url = "https://packages.example.com/key.asc"
  }
  package "flat" {
    apt     = "file:///srv/repo ./"
    key     = "F6403F6544A38863DAA0B6E03F01618A51312F3F"
    key_url = "http://127.0.0.1/key"
  }
  package "cloud-hypervisor" {
    file   = "https://example.com/ch"
    sha256 = "` + strings.Repeat("A", 64) + `"
  }
}`)
	if fault != "" {
		t.Fatal(fault)
	}
	const key = "F6403F6544A38863DAA0B6E03F01618A51312F3F"
	want := []hostspec.Package{
		{Name: "gitlab-runner", Key: key, KeyURL: "https://packages.example.com/key.asc",
			Apt: hostspec.AptRepository{URL: "https://packages.example.com/runner", Suite: "trixie", Components: []string{"main", "extra"}}},
		{Name: "flat", Key: key, KeyURL: "http://127.0.0.1/key",
			Apt: hostspec.AptRepository{URL: "file:///srv/repo", Suite: "./", Components: []string{}}},
		{Name: "cloud-hypervisor", File: "https://example.com/ch", SHA256: strings.Repeat("A", 64)},
	}
	for i, p := range got.Packages {
		p.Range = want[i].Range
		if diff := cmp.Diff(want[i], *p); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
	}
	if off, fault := loadInstall("install = false"); fault != "" || !off.Off {
		t.Errorf("install = false: %+v, %s", off, fault)
	}
	if on, fault := loadInstall("install = true"); fault != "" || on.Off {
		t.Errorf("install = true: %+v, %s", on, fault)
	}
	for install, off := range map[string]bool{`"install": false`: true, `"install": {"package": {"xy": {"file": "https://e.com/x.deb", "sha256": "` + strings.Repeat("0", 64) + `"}}}`: false} {
		src := `{"host": {"h": {"egress_interface": "eno1", ` + install + `}}, "image": {"a": {"ubuntu": {"release": "noble"}}},
			"pool": {"a": {"image": "${image.a}", "cpus": 1, "memory": "1GiB", "disk": "5GiB", "start": "cold", "max_instances": 1}}}`
		res, diags := hostspec.Load(hostspec.Options{Path: "host.hcl.json", Source: []byte(src)})
		if diags.HasErrors() || res.Host.Install.Off != off || (len(res.Host.Install.Packages) == 1) == off {
			t.Errorf("%s: %v", install, diags)
		}
	}
}

func TestInstallFindings(t *testing.T) {
	const apt = `apt = "https://p.example.com/r trixie main"`
	const key, keyURL = `key = "F6403F6544A38863DAA0B6E03F01618A51312F3F"`, `key_url = "https://p.example.com/k"`
	sum := `sha256 = "` + strings.Repeat("0", 64) + `"`
	for _, c := range []struct{ inside, want string }{
		{"", `The package "p1" has no source`},
		{apt + "\n" + key, `the package "p1" needs key_url`},
		{apt + "\n" + keyURL, `the package "p1" needs key`},
		{apt + "\n" + key + "\n" + keyURL + "\n" + sum, "sha256 belongs to a package with file"},
		{apt + "\nfile = \"https://e.com/x\"\n" + sum, "not both"},
		{`file = "https://e.com/x"`, "needs sha256"},
		{"file = \"ftp://e.com/x\"\n" + sum, "is not a valid URL"},
		{"file = \"https://e.com/x\"\nsha256 = \"abc\"", "is not a SHA-256 digest"},
		{"file = \"https://e.com/x\"\n" + sum + "\n" + key, "key belongs to a package with apt"},
		{`apt = "https://p.example.com/r trixie"`, "needs a component after the suite"},
		{`apt = "https://p.example.com/r ./ main"`, "needs a component after the suite"},
		{`apt = "https://u:hunter2@p.example.com/r"`, `is written as "URL SUITE COMPONENT"`},
		{`apt = "ftp://p.example.com/r trixie main"`, "must start with https://"},
		{`apt = "https://p.example.com/r 'trixie main"`, "is not the name of a suite"},
		{`apt = "https://p.example.com/r trixie [x]"`, "is not the name of a component"},
		{"apt = \"https://u:hunter2@p.example.com/r trixie main\"\n" + key + "\n" + keyURL, "it can have no password"},
		{apt + "\nkey = \"5131 2F3F\"\n" + keyURL, "40 hexadecimal digits"},
		{"aptt = 1", "aptt"},
	} {
		_, got := loadInstall("install {\n  package \"p1\" {\n" + c.inside + "\n  }\n}")
		if !strings.Contains(got, c.want) || strings.Contains(got, "hunter2") {
			t.Errorf("%s\n%s; want %q", c.inside, got, c.want)
		}
	}
	if _, got := loadInstall("install {\n package \"-o\" {\n" + apt + "\n" + key + "\n" + keyURL + "\n}\n}"); !strings.Contains(got, "is not the name of a package") {
		t.Error(got)
	}
	if _, got := loadInstall("install = false\ninstall {\n}"); !strings.Contains(got, "both as an attribute and as a block") {
		t.Error(got)
	}
	if _, got := loadInstall(`install = "no"`); !strings.Contains(got, "install must be a boolean") {
		t.Error(got)
	}
}
