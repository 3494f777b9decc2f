//go:build !amd64

package vm

import "golang.org/x/sys/unix"

// kvmGuest creates a VM and a vCPU, but runs no instruction: on arm64 and riscv64 there is
// no KVM that creates vCPUs and then interprets them.
func kvmGuest(dev int) error {
	vm, vcpu, err := kvmNewVM(dev, func(int) error { return nil })
	if err != nil {
		return err
	}
	unix.Close(vcpu)
	unix.Close(vm)
	return nil
}
