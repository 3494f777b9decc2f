package vm_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/hostlab"
	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/vm/vmtest"
)

// The conformance test, run in a throw-away host with a KVM that runs guests and with all cgroup controllers on v2.
func TestConformanceInLab(t *testing.T) {
	need.VM(t)
	binary := need.CloudHypervisor(t)
	kernel, initrd := vmtest.Guest(t)
	test := filepath.Join(t.TempDir(), "vm.test")
	build := exec.Command("go", "test", "-c", "-o", test, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", build, err, out)
	}
	lab := hostlab.ForTest(t, hostlab.Options{Files: map[string]string{
		"/root/vm.test": test, "/root/kernel": kernel, "/root/initrd": initrd, "/usr/local/bin/cloud-hypervisor": binary,
	}})
	out, err := lab.Sh(t.Context(), "modprobe -a kvm_amd tun; cd /root; chmod 755 vm.test /usr/local/bin/cloud-hypervisor; "+
		"FLEETINGD_TEST=full FLEETINGD_VMTEST_KERNEL=/root/kernel FLEETINGD_VMTEST_INITRD=/root/initrd "+
		"./vm.test -test.v -test.run '^(TestConformanceCloudHypervisor|TestProbeKVM|TestCloudHypervisorReal.*)$' 2>&1")
	t.Logf("in the lab:\n%s", out)
	if err != nil {
		t.Fatal(err)
	}
	// It is skipped if KVM runs no guests, which must not happen here.
	if !strings.Contains(out, "--- PASS: TestConformanceCloudHypervisor") {
		t.Error("the conformance test did not run in the lab")
	}
}
