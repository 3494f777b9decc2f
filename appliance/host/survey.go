package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/netrange"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// Survey is what a machine has to offer, as far as a spec for it depends on that.
type Survey struct {
	Name         string // of the machine
	Arch         string // GOARCH
	Distribution string // "Debian GNU/Linux 13 (trixie)"; "" if it does not say
	Egress       string // the interface of the default route; "" without one
	CPUs         int
	Memory       int64 // bytes
	Free         int64 // bytes that may be written below the state folder
	// Backing is what the disks block needs: "directory" if files below the state folder can be cloned, "xfs-image" if not, "auto" if
	// only root can tell.
	Backing string
	// NoKVM says why /dev/kvm runs no guest; "" if it does, or if only root can tell.
	NoKVM string
	// CloudHypervisor and QEMU are the programs' paths; "" where they are not installed.
	CloudHypervisor, QEMU string
}

// Look surveys this machine for workers that live below stateDir. It changes nothing.
func Look(ctx context.Context, stateDir string, probes Probes) (Survey, error) {
	return realMachine().survey(ctx, stateDir, probes)
}

// FreeSubnet returns a network with a prefix length of bits that no route of this machine overlaps and that no common software takes by
// default, and whether there is one.
func FreeSubnet(bits int) (netip.Prefix, bool) { return realMachine().freeSubnet(plan.Plan{}, bits) }

// DefaultInterface returns the interface that this machine's packets to the internet leave by, or "" without a default route.
func DefaultInterface() (string, error) { return realMachine().defaultInterface() }

// qemuNames are QEMU's programs by GOARCH.
var qemuNames = map[string]string{"amd64": "qemu-system-x86_64", "arm64": "qemu-system-aarch64", "riscv64": "qemu-system-riscv64"}

var prettyName = regexp.MustCompile(`(?m)^PRETTY_NAME=(.*)$`)

func (m machine) survey(ctx context.Context, stateDir string, probes Probes) (Survey, error) {
	s := Survey{Arch: m.arch, CPUs: runtime.NumCPU()}
	var err error
	if s.Name, err = os.Hostname(); err != nil {
		return s, fmt.Errorf("this machine's name: %w", err)
	}
	if s.Memory, err = m.memory(); err != nil {
		return s, fmt.Errorf("this machine's memory: %w", err)
	}
	// os-release(5): a value may be in quotes. A machine without the file has no name for its distribution.
	if b, err := m.readFile("/etc/os-release"); err == nil {
		if found := prettyName.FindSubmatch(b); found != nil {
			s.Distribution = string(found[1])
			if text, err := strconv.Unquote(s.Distribution); err == nil {
				s.Distribution = text
			}
		}
	}
	if s.Egress, err = m.defaultInterface(); err != nil {
		return s, err
	}
	there, err := m.existing(stateDir)
	if err != nil {
		return s, err
	}
	if s.Free, err = m.space(there); err != nil {
		return s, err
	}
	disks, err := m.existing(filepath.Join(stateDir, "disks"))
	if err != nil {
		return s, err
	}
	switch err := probes.CanClone(disks); {
	case err == nil:
		s.Backing = "directory"
	case errors.Is(err, fs.ErrPermission):
		s.Backing = "auto"
	default:
		s.Backing = "xfs-image"
	}
	if err := probes.KVM(ctx); err != nil && !errors.Is(err, fs.ErrPermission) {
		s.NoKVM = strings.Join(strings.Fields(err.Error()), " ")
	}
	s.CloudHypervisor = m.program("cloud-hypervisor")
	s.QEMU = m.program(qemuNames[m.arch])
	return s, nil
}

func (m machine) program(name string) string {
	path, err := m.lookPath(name)
	if name == "" || err != nil {
		return ""
	}
	return path
}

func (m machine) defaultInterface() (string, error) {
	subnet := netrange.Workers
	h, err := m.network(&plan.Plan{Network: plan.Network{Subnet: subnet, Gateway: subnet.Addr().Next()}})
	if err != nil {
		return "", err
	}
	for _, dst := range []netip.Addr{internet4[0], internet6[0]} {
		if links := h.outLinks(h.lookup(flow{dst: dst, in: loopback}).route); len(links) > 0 {
			return links[0], nil
		}
	}
	return "", nil
}
