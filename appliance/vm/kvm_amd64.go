package vm

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The x86 ioctls of linux/kvm.h and asm/kvm.h, whose numbers encode the size of their struct.
const (
	kvmSetUserMemoryRegion = 0x4020AE46
	kvmGetSregs            = 0x8138AE83
	kvmSetSregs            = 0x4138AE84
	kvmSetRegs             = 0x4090AE82
	kvmGetSupportedCPUID   = 0xC008AE05
	kvmSetCPUID2           = 0x4008AE90
	kvmExitIO              = 2
)

// The layout of the guest's 64 KiB.
const (
	kvmMemory = 0x10000
	kvmCode   = 0x1000
	kvmPML4   = 0x2000
	kvmPDPT   = 0x3000
	kvmPD     = 0x4000
)

// The guest counts down from 4 million in 64-bit mode, then writes 'K' to port 0xe9. Counting distinguishes a CPU that
// runs guests from one that interprets them, at about a microsecond per instruction.
var kvmProgram = []byte{
	0xb9, 0x00, 0x09, 0x3d, 0x00, // mov ecx, 4000000
	0xff, 0xc9, // l: dec ecx
	0x75, 0xfc, // jnz l
	0xb0, 'K', // mov al, 'K'
	0xe6, 0xe9, // out 0xe9, al
	0xf4, // hlt
}

// kvmRegion is struct kvm_userspace_memory_region.
type kvmRegion struct {
	slot, flags              uint32
	guest, size, hostAddress uint64
}

// kvmGuest runs kvmProgram and checks its output.
func kvmGuest(dev int) error {
	mem, err := unix.Mmap(-1, 0, kvmMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("memory for a test guest: %w", err)
	}
	defer unix.Munmap(mem)
	copy(mem[kvmCode:], kvmProgram)
	// One 2 MiB page maps everything: present|write, and page size in the last level (AMD64 APM vol. 2, 5.3).
	binary.LittleEndian.PutUint64(mem[kvmPML4:], kvmPDPT|0x3)
	binary.LittleEndian.PutUint64(mem[kvmPDPT:], kvmPD|0x3)
	binary.LittleEndian.PutUint64(mem[kvmPD:], 0x83)

	vm, vcpu, err := kvmNewVM(dev, func(vm int) error {
		region := kvmRegion{size: kvmMemory, hostAddress: uint64(uintptr(unsafe.Pointer(&mem[0])))}
		if _, err := ioctl(vm, kvmSetUserMemoryRegion, uintptr(unsafe.Pointer(&region))); err != nil {
			return fmt.Errorf("/dev/kvm: KVM_SET_USER_MEMORY_REGION: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	defer unix.Close(vm)
	defer unix.Close(vcpu)
	if err := kvmCPUID(dev, vcpu); err != nil {
		return err
	}
	if err := kvmLongMode(vcpu); err != nil {
		return err
	}
	size, err := ioctl(dev, kvmGetVCPUMmapSize, 0)
	if err != nil {
		return fmt.Errorf("/dev/kvm: KVM_GET_VCPU_MMAP_SIZE: %w", err)
	}
	run, err := unix.Mmap(vcpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("/dev/kvm: map the vCPU: %w", err)
	}
	defer unix.Munmap(run)
	if _, err := ioctl(vcpu, kvmRun, 0); err != nil {
		return fmt.Errorf("/dev/kvm: KVM_RUN: %w", err)
	}
	return kvmVerdict(run)
}

// kvmCPUID gives the vCPU every feature that KVM supports: a vCPU without CPUID has no 64-bit mode, and since about
// Linux 6.12 KVM refuses to enable it.
func kvmCPUID(dev, vcpu int) error {
	// struct kvm_cpuid2: nent, padding, then entries of 40 bytes; the kernel returns at most KVM_MAX_CPUID_ENTRIES.
	const entries = 256
	var cpuid [8 + 40*entries]byte
	binary.LittleEndian.PutUint32(cpuid[:], entries)
	if _, err := ioctl(dev, kvmGetSupportedCPUID, uintptr(unsafe.Pointer(&cpuid))); err != nil {
		return fmt.Errorf("/dev/kvm: KVM_GET_SUPPORTED_CPUID: %w", err)
	}
	if _, err := ioctl(vcpu, kvmSetCPUID2, uintptr(unsafe.Pointer(&cpuid))); err != nil {
		return fmt.Errorf("/dev/kvm: KVM_SET_CPUID2: %w", err)
	}
	return nil
}

// kvmLongMode puts the vCPU into 64-bit mode with paging, at the program's first instruction. The offsets
// are those of struct kvm_sregs and kvm_regs (asm/kvm.h).
func kvmLongMode(vcpu int) error {
	var sregs [312]byte
	if _, err := ioctl(vcpu, kvmGetSregs, uintptr(unsafe.Pointer(&sregs))); err != nil {
		return fmt.Errorf("/dev/kvm: KVM_GET_SREGS: %w", err)
	}
	segment := func(at int, selector uint16, kind, db, l byte) {
		s := sregs[at : at+24] // base, limit, selector, type, present, dpl, db, s, l, g, avl
		clear(s)
		binary.LittleEndian.PutUint32(s[8:], 0xffffffff)
		binary.LittleEndian.PutUint16(s[12:], selector)
		s[14], s[15], s[17], s[18], s[19], s[20] = kind, 1, db, 1, l, 1
	}
	segment(0, 8, 11, 0, 1) // cs: execute, read, accessed; 64-bit
	for i := 1; i < 6; i++ {
		segment(24*i, 16, 3, 1, 0) // ds, es, fs, gs, ss: read, write, accessed
	}
	const cr = 24*8 + 2*16 // after eight segments and two descriptor tables
	put := func(i int, v uint64) { binary.LittleEndian.PutUint64(sregs[cr+8*i:], v) }
	put(0, 0x80010033) // cr0: PG, WP, NE, ET, MP, PE
	put(2, kvmPML4)    // cr3
	put(3, 0x20)       // cr4: PAE
	put(5, 0x500)      // efer: LME, LMA
	if _, err := ioctl(vcpu, kvmSetSregs, uintptr(unsafe.Pointer(&sregs))); err != nil {
		return fmt.Errorf("/dev/kvm: KVM_SET_SREGS (64-bit mode): %w", err)
	}
	var regs [18]uint64
	regs[16], regs[17] = kvmCode, 2 // rip; rflags with the bit that is always set
	if _, err := ioctl(vcpu, kvmSetRegs, uintptr(unsafe.Pointer(&regs))); err != nil {
		return fmt.Errorf("/dev/kvm: KVM_SET_REGS: %w", err)
	}
	return nil
}

// kvmVerdict reads struct kvm_run: exit_reason is at 8 and, for an I/O exit, direction, size, port, count and the
// offset of the data start at 32.
func kvmVerdict(run []byte) error {
	reason := binary.LittleEndian.Uint32(run[8:])
	if reason != kvmExitIO {
		return fmt.Errorf("/dev/kvm: the test guest ended with exit reason %d instead of its output: "+
			"this KVM does not run 64-bit guests", reason)
	}
	port := binary.LittleEndian.Uint16(run[34:])
	at := binary.LittleEndian.Uint64(run[40:])
	if port != 0xe9 || at >= uint64(len(run)) || run[at] != 'K' {
		return fmt.Errorf("/dev/kvm: the test guest wrote to port %#x, instead of 'K' to port 0xe9", port)
	}
	return nil
}
