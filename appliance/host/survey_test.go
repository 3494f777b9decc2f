package host

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"runtime"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

func TestSurvey(t *testing.T) {
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	healthySurvey := Survey{
		Name: name, Arch: "amd64", Distribution: "Debian GNU/Linux 13 (trixie)", Egress: "eno1", CPUs: runtime.NumCPU(), Memory: 32 << 30,
		Free: 200 << 30, Backing: "directory", CloudHypervisor: "/usr/bin/cloud-hypervisor", QEMU: "/usr/bin/qemu-system-x86_64",
	}
	for _, tt := range []struct {
		name   string
		broken func(d *doctor)
		want   func(s *Survey)
	}{
		{"healthy", func(*doctor) {}, func(*Survey) {}},
		{"no os-release", func(d *doctor) { withFile(d, "/etc/os-release", nil) }, func(s *Survey) { s.Distribution = "" }},
		{"os-release without quotes", func(d *doctor) { withFile(d, "/etc/os-release", []byte("ID=x\nPRETTY_NAME=Alpine\n")) }, func(s *Survey) { s.Distribution = "Alpine" }},
		{"no default route", func(d *doctor) {
			d.machine.network = func(*plan.Plan) (*have, error) {
				h := network1("10.0.2.0/24")
				h.routes = h.routes[1:]
				return h, nil
			}
		}, func(s *Survey) { s.Egress = "" }},
		{"ext4", func(d *doctor) { d.probes.CanClone = func(string) error { return errors.New("no reflinks") } }, func(s *Survey) { s.Backing = "xfs-image" }},
		{"not root", func(d *doctor) {
			d.probes.CanClone = func(string) error { return fs.ErrPermission }
			d.probes.KVM = func(context.Context) error { return fs.ErrPermission }
		}, func(s *Survey) { s.Backing = "auto" }},
		{"no KVM", func(d *doctor) {
			d.probes.KVM = func(context.Context) error { return errors.New("open /dev/kvm:\nno such file") }
		},
			func(s *Survey) { s.NoKVM = "open /dev/kvm: no such file" }},
		{"nothing installed", func(d *doctor) { withoutProgram(d, "cloud-hypervisor", "qemu-system-x86_64") },
			func(s *Survey) { s.CloudHypervisor, s.QEMU = "", "" }},
	} {
		d := healthy()
		withFile(d, "/etc/os-release", []byte("NAME=\"Debian GNU/Linux\"\nPRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\n"))
		tt.broken(d)
		want := healthySurvey
		tt.want(&want)
		got, err := d.machine.survey(t.Context(), "/var/lib/fleetingd", d.probes)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got)\n%s", tt.name, diff)
		}
	}
}

// TestSurveyErrors: what a spec cannot be written without.
func TestSurveyErrors(t *testing.T) {
	fault := errors.New("a fault")
	for name, broken := range map[string]func(d *doctor){
		"memory":    func(d *doctor) { withFile(d, "/proc/meminfo", []byte("MemFree: 1 kB\n")) },
		"no memory": func(d *doctor) { withFile(d, "/proc/meminfo", nil) },
		"network":   func(d *doctor) { d.machine.network = func(*plan.Plan) (*have, error) { return nil, fault } },
		"space":     func(d *doctor) { d.machine.space = func(string) (int64, error) { return 0, fault } },
		"folder":    func(d *doctor) { d.machine.stat = func(string) (fs.FileInfo, error) { return nil, fault } },
	} {
		d := healthy()
		broken(d)
		if s, err := d.machine.survey(t.Context(), "/var/lib/fleetingd", d.probes); err == nil {
			t.Errorf("%s: %+v", name, s)
		}
	}
}

// TestLook looks at the machine that the test runs on.
func TestLook(t *testing.T) {
	s, err := Look(t.Context(), "/var/lib/fleetingd", Probes{
		KVM:      func(context.Context) error { return nil },
		CanClone: func(string) error { return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	if s.Name == "" || s.Arch != runtime.GOARCH || s.CPUs < 1 || s.Memory < 1<<20 || s.Free < 0 || s.Backing != "directory" {
		t.Errorf("%+v", s)
	}
	if p, ok := FreeSubnet(22); ok && (p.Bits() != 22 || !p.Addr().IsPrivate()) {
		t.Errorf("%v is free", p)
	}
}
