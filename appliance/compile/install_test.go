package compile

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

func compileInstall(t *testing.T, inHost string) *plan.Plan {
	t.Helper()
	res, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: []byte("host \"h\" {\n  egress_interface = \"eno1\"\n" + inHost + "\n}\n" + `
image "a" {
  ubuntu {
    release = "noble"
  }
}
image "b" {
  debian {
    suite = "trixie"
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
pool "b" {
  image         = image.b
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  start         = "cold"
  max_instances = 1
}
`)})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	p, diags := Compile(res.Host, Options{})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	return p
}

func TestInstall(t *testing.T) {
	if p := compileInstall(t, "install = false"); p.Install != nil {
		t.Errorf("install = false: %+v", p.Install)
	}
	sum := strings.Repeat("0", 64)
	p := compileInstall(t, `disks {
  backing = "directory"
}
hypervisor "qemu" {
  binary = "qemu-system-aarch64"
}
install {
  package "gitlab-runner" {
    apt     = "https://e.com/runner trixie main"
    key     = "F6403F6544A38863DAA0B6E03F01618A51312F3F"
    key_url = "https://e.com/key"
  }
  package "qemu-utils" {
    file   = "https://e.com/qemu.deb"
    sha256 = "`+sum+`"
  }
  package "tool" {
    file   = "https://e.com/tool"
    sha256 = "`+sum+`"
  }
}`)
	want := &plan.Install{
		Packages: []string{"debian-archive-keyring", "e2fsprogs", "gitlab-runner", "mmdebstrap", "qemu-system-arm", "qemu-utils"},
		Sources: []plan.AptSource{{Package: "gitlab-runner", URL: "https://e.com/runner", Suite: "trixie", Components: []string{"main"},
			Fingerprint: "F6403F6544A38863DAA0B6E03F01618A51312F3F", KeyURL: "https://e.com/key"}},
		Debs:     []plan.Download{{Package: "qemu-utils", URL: "https://e.com/qemu.deb", SHA256: sum}},
		Programs: []plan.Download{{Package: "tool", URL: "https://e.com/tool", SHA256: sum}},
	}
	if diff := cmp.Diff(want, p.Install); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	for name, line := range map[string]string{"gitlab-runner": "host.hcl:10", "tool": "host.hcl:19", "mmdebstrap": "host.hcl:31"} {
		if got := p.Origin(plan.KindPackage, name); got != line {
			t.Errorf("%s comes from %s, not %s", name, got, line)
		}
	}
	b, err := p.JSON()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := plan.Parse(b); err != nil {
		t.Error(err)
	}
}
