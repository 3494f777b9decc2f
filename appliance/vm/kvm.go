package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// kvmAPIVersion is the only version since Linux 2.6.22 (KVM_API_VERSION).
const kvmAPIVersion = 12

// The ioctls of /dev/kvm that are the same on every architecture (linux/kvm.h:
// KVMIO is 0xAE, and none of them encodes a size).
const (
	kvmGetAPIVersion   = 0xAE00
	kvmCreateVM        = 0xAE01
	kvmGetVCPUMmapSize = 0xAE04
	kvmCreateVCPU      = 0xAE41
	kvmRun             = 0xAE80
)

// kvmDeadline limits ProbeKVM. The guest takes 2 ms on bare metal and 30 ms under
// an emulated CPU; a KVM that interprets every instruction needs 4 s.
const kvmDeadline = 1500 * time.Millisecond

// ProbeKVM runs a guest of a few instructions through /dev/kvm. It returns nil
// if that works, and otherwise why not and what to do. Opening the device proves
// little: some clouds offer a KVM that creates VMs but cannot run them (kvm_pvm
// interprets an ordinary kernel instruction by instruction, which looks like a
// hang). On amd64 the guest counts in 64-bit mode and reports over an I/O port;
// elsewhere only a VM and a vCPU are created.
//
// It never blocks longer than two seconds: a vCPU that does not return is
// interrupted, and abandoned if even that does not help.
func ProbeKVM(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, kvmDeadline)
	defer cancel()
	dev, err := openKVM()
	if err != nil {
		return err
	}
	tid := make(chan int, 1)
	result := make(chan error, 1)
	go func() {
		// The thread stays locked, so that a signal meant for the vCPU reaches no other goroutine
		// and the thread ends with this one.
		runtime.LockOSThread()
		defer dev.Close()
		tid <- unix.Gettid()
		result <- kvmGuest(int(dev.Fd()))
	}()
	thread := <-tid
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
	}
	// A signal makes KVM_RUN return EINTR. SIGURG is the one that the Go runtime itself sends and ignores.
	giveUp := time.NewTimer(500 * time.Millisecond)
	defer giveUp.Stop()
	kick := time.NewTicker(10 * time.Millisecond)
	defer kick.Stop()
	for {
		select {
		case err := <-result:
			if err == nil {
				return nil
			}
			return errKVMHangs
		case <-kick.C:
			// Fails only if the thread has just ended, and then there is a result.
			_ = unix.Tgkill(os.Getpid(), thread, unix.SIGURG)
		case <-giveUp.C:
			return errKVMHangs
		}
	}
}

var errKVMHangs = errors.New("/dev/kvm opens, but a guest of a few instructions did not finish within " +
	kvmDeadline.String() + ": this machine cannot run VMs with KVM (nested virtualization is off, or KVM only " +
	"interprets instructions); use a machine with hardware virtualization, or hypervisor \"qemu\" with accel = \"tcg\"")

func openKVM() (*os.File, error) {
	// Not os.OpenFile, which would register the descriptor with the poller. KVM does not support that.
	fd, err := unix.Open("/dev/kvm", unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case err == nil:
		return os.NewFile(uintptr(fd), "/dev/kvm"), nil
	case errors.Is(err, unix.ENOENT):
		return nil, errors.New("/dev/kvm does not exist: load kvm_intel or kvm_amd (modprobe), and enable virtualization in " +
			"the firmware, or nested virtualization in the hypervisor above")
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("uid %d may not open /dev/kvm: add the user to the group kvm (usermod -aG kvm USER)",
			os.Getuid())
	default:
		return nil, fmt.Errorf("open /dev/kvm: %w", err)
	}
}

// kvmNewVM creates a VM and one vCPU; between is called before the vCPU is created.
func kvmNewVM(dev int, between func(vm int) error) (vm, vcpu int, err error) {
	version, err := ioctl(dev, kvmGetAPIVersion, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("/dev/kvm: KVM_GET_API_VERSION: %w", err)
	}
	if version != kvmAPIVersion {
		return -1, -1, fmt.Errorf("/dev/kvm has KVM API version %d, not %d", version, kvmAPIVersion)
	}
	vm, err = ioctl(dev, kvmCreateVM, 0)
	if err != nil {
		return -1, -1, fmt.Errorf("/dev/kvm: KVM_CREATE_VM: %w", err)
	}
	if err := between(vm); err != nil {
		unix.Close(vm)
		return -1, -1, err
	}
	vcpu, err = ioctl(vm, kvmCreateVCPU, 0)
	if err != nil {
		unix.Close(vm)
		return -1, -1, fmt.Errorf("/dev/kvm: KVM_CREATE_VCPU: %w", err)
	}
	return vm, vcpu, nil
}

func ioctl(fd int, req, arg uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), req, arg)
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}
