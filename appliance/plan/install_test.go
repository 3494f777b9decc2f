package plan

import (
	"strings"
	"testing"
)

func TestAptSourceFile(t *testing.T) {
	s := AptSource{Package: "gitlab-runner", URL: "https://packages.example.com/runner", Suite: "trixie", Components: []string{"main", "extra"}}
	want := `Types: deb
URIs: https://packages.example.com/runner
Suites: trixie
Components: main extra
Signed-By: /etc/apt/keyrings/fleetingd-gitlab-runner.asc
`
	if got := s.File(); !strings.HasSuffix(got.Content, "drift.\n"+want) || got.Path != "/etc/apt/sources.list.d/fleetingd-gitlab-runner.sources" {
		t.Errorf("%s:\n%s", got.Path, got.Content)
	}
	s.Suite, s.Components = "./", nil
	if got := s.File(); strings.Contains(got.Content, "Components") {
		t.Errorf("a flat repository has no components:\n%s", got.Content)
	}
}

// A plan.json may come from anybody: only single words from it may get into a line of apt's files.
func TestCheckInstall(t *testing.T) {
	fine := func() *Install {
		return &Install{
			Packages: []string{"gitlab-runner"},
			Sources: []AptSource{{Package: "gitlab-runner", URL: "https://e.com", Suite: "./", Fingerprint: strings.Repeat("A", 40),
				KeyURL: "https://e.com/key"}},
			Programs: []Download{{Package: "cloud-hypervisor", URL: "https://e.com/ch", SHA256: strings.Repeat("a", 64)}},
		}
	}
	check := func(in *Install) string {
		var f findings
		(&Plan{Install: in}).checkInstall(&f)
		if len(f) == 0 {
			return ""
		}
		return f[0].Error()
	}
	if got := check(fine()) + check(nil); got != "" {
		t.Error(got)
	}
	for want, spoil := range map[string]func(*Install){
		`"--yes" is not the name of a package`:   func(in *Install) { in.Packages[0] = "--yes" },
		`"../x" is not the name of a package`:    func(in *Install) { in.Sources[0].Package = "../x" },
		`is not one word`:                        func(in *Install) { in.Sources[0].URL = "https://e.com\nTrusted: yes" },
		`"main Trusted" is not one word`:         func(in *Install) { in.Sources[0].Components = []string{"main Trusted"} },
		`is not a fingerprint`:                   func(in *Install) { in.Sources[0].Fingerprint = "AAAA" },
		`is not a download`:                      func(in *Install) { in.Programs[0].SHA256 = "../../x" },
		`"a/../b" is not the name of a package`:  func(in *Install) { in.Programs[0].Package = "a/../b" },
		`"/etc/x.deb" is not the name of a pack`: func(in *Install) { in.Debs = []Download{{Package: "/etc/x.deb"}} },
	} {
		in := fine()
		spoil(in)
		if got := check(in); !strings.Contains(got, want) {
			t.Errorf("%q; want %q", got, want)
		}
	}
}
