package hostlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
)

// The lab has its own QEMU, unpacked next to its base image and never installed. Up to 10.1, QEMU's emulation of SVM writes a
// CPU's pending interrupts back at each exit of a nested guest without a lock (do_vmexit in target/i386/tcg/system/svm_helper.c:
// interrupt_request &= ~CPU_INTERRUPT_VIRQ), so an interrupt that came meanwhile was lost: a timer, and the nested guest slept
// forever; or another CPU's call, and a runnable task was on no run queue. Since 10.2 it is atomic. Debian 12 and 13 have 10.0.
const (
	emulatorSuite = suite + "-backports"
	oldestMajor   = 10
	oldestMinor   = 2
)

// emulator returns the folder of that QEMU.
func (b base) emulator() string { return b.path("qemu") }

// qemu returns one of its commands. It runs with its own loader and libraries, because this machine's may be older.
func (b base) qemu(args ...string) *exec.Cmd {
	usr := filepath.Join(b.emulator(), "usr")
	return exec.Command(filepath.Join(usr, "lib64/ld-linux-x86-64.so.2"), append([]string{
		"--library-path", filepath.Join(usr, "lib/x86_64-linux-gnu"),
		filepath.Join(usr, "bin/qemu-system-x86_64"),
		"-L", filepath.Join(usr, "share/qemu"), "-L", filepath.Join(usr, "share/seabios"),
	}, args...)...)
}

// qemuVersion returns QEMU's version line, such as "QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)…".
func (b base) qemuVersion() (string, error) {
	out, err := b.qemu("--version").Output()
	if err != nil {
		return "", fmt.Errorf("hostlab: the lab's own QEMU in %s does not run (remove %s to unpack it again): %w", b.emulator(), b.dir, err)
	}
	return string(out), nil
}

var versionOfQEMU = regexp.MustCompile(`version (\d+)\.(\d+)`)

// newEnough checks that a QEMU does not lose interrupts.
func newEnough(version string) error {
	m := versionOfQEMU.FindStringSubmatch(version)
	if m == nil {
		return fmt.Errorf("hostlab: QEMU's version is %q", version)
	}
	major, err1 := strconv.Atoi(m[1])
	minor, err2 := strconv.Atoi(m[2])
	if err := errors.Join(err1, err2); err != nil {
		return fmt.Errorf("hostlab: QEMU's version is %q: %w", version, err)
	}
	if major < oldestMajor || major == oldestMajor && minor < oldestMinor {
		return fmt.Errorf("hostlab: %s has QEMU %d.%d, which loses interrupts of hosts with nested guests; it has to be %d.%d",
			emulatorSuite, major, minor, oldestMajor, oldestMinor)
	}
	return nil
}

// unpackQEMU unpacks that QEMU and all its dependencies into the base's folder.
func unpackQEMU(ctx context.Context, b base, log io.Writer) error {
	mirror, err := mirror(ctx)
	if err != nil {
		return err
	}
	source := func(suite string) string { return fmt.Sprintf("deb %s %s main", mirror, suite) }
	err = mmdebstrap(ctx, b.dir, log, "--variant=extract", "--include=qemu-system-x86", "--architectures=amd64",
		"--aptopt=APT::Default-Release \""+emulatorSuite+"\"", suite, b.emulator(), source(suite), source(emulatorSuite))
	if err != nil {
		return err
	}
	// Nothing uses the device nodes of this root.
	if err := os.RemoveAll(filepath.Join(b.emulator(), "dev")); err != nil {
		return fmt.Errorf("hostlab: %w", err)
	}
	version, err := b.qemuVersion()
	if err != nil {
		return err
	}
	return newEnough(version)
}
