package vm

import (
	"crypto/rand"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"unsafe"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/landlockabi"
)

// All VMMs of a host run as the same user, which can read the runner's config.toml and the other workers' disks and keys, and connect to
// their sockets. So every VMM is confined before it executes its first instruction, whichever hypervisor it is: landlock
// (landlock(7)) restricts it to its own files and its program, and a seccomp filter to Unix sockets. The VMM may confine itself further.
// packaging/docs/security.md lists what each kernel version enforces.

// jail lists what a VMM may access besides its program and the devices that every VMM needs.
type jail struct {
	private string   // the VMM's folder for sockets
	read    []string // files
	write   []string // files, which the VMM may read, too
}

// Access rights to files and folders.
const (
	readFile  = landlock.AccessFSSet(ll.AccessFSReadFile)
	readTree  = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSReadDir)
	execFile  = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSExecute)
	writeFile = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSWriteFile | ll.AccessFSTruncate)
	useDevice = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSWriteFile | ll.AccessFSIoctlDev)
	ownFolder = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSWriteFile | ll.AccessFSTruncate | ll.AccessFSReadDir | ll.AccessFSMakeReg |
		ll.AccessFSMakeSock | ll.AccessFSRemoveFile | ll.AccessFSResolveUnix)
)

// libraries are the folders of programs, libraries, modules and firmware. They hold no secrets and no workers' files.
var libraries = []string{
	"/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/local/lib", "/nix/store", "/gnu/store",
	"/usr/share/qemu", "/usr/share/seabios", "/usr/share/vgabios", "/usr/share/OVMF", "/usr/share/AAVMF", "/usr/share/edk2",
	"/usr/share/opensbi", "/usr/local/share/qemu",
}

// rules returns the landlock rules for a program.
func (j jail) rules(binary string) ([]landlock.Rule, error) {
	program, err := filepath.EvalSymlinks(binary)
	if err != nil {
		return nil, err
	}
	loader, err := interpreter(program)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", program, err)
	}
	rules := []landlock.Rule{
		landlock.PathAccess(execFile, program),
		landlock.PathAccess(ownFolder, j.private),
		landlock.PathAccess(useDevice, "/dev/kvm").IgnoreIfMissing(),
		landlock.PathAccess(writeFile, "/dev/null", "/dev/zero"),
		landlock.PathAccess(readFile, "/dev/urandom", "/dev/random"),
		landlock.PathAccess(readFile, "/etc/ld.so.cache", "/etc/ld.so.preload", "/etc/localtime").IgnoreIfMissing(),
		landlock.PathAccess(readTree, libraries...).IgnoreIfMissing(),
		// About CPUs, memory and pages; nothing about other processes.
		landlock.PathAccess(readFile, "/proc/cpuinfo", "/proc/meminfo", "/proc/filesystems").IgnoreIfMissing(),
		landlock.PathAccess(readTree, "/sys/devices/system", "/sys/kernel/mm").IgnoreIfMissing(),
	}
	// A program that was unpacked elsewhere has its libraries and firmware next to it: bin/../lib, bin/../share.
	if prefix := filepath.Dir(filepath.Dir(program)); prefix != "/" && prefix != "/usr" {
		rules = append(rules, landlock.PathAccess(readTree, filepath.Join(prefix, "lib"), filepath.Join(prefix, "share")).IgnoreIfMissing())
	}
	if loader != "" {
		rules = append(rules, landlock.PathAccess(execFile, loader))
	}
	if len(j.read) > 0 {
		rules = append(rules, landlock.PathAccess(readFile, j.read...))
	}
	if len(j.write) > 0 {
		rules = append(rules, landlock.PathAccess(writeFile, j.write...))
	}
	return rules, nil
}

// interpreter returns the program's dynamic loader, which the kernel executes (elf(5), PT_INTERP), or "" for a static program.
func interpreter(program string) (string, error) {
	f, err := elf.Open(program)
	if err != nil {
		// A script, such as a wrapper on NixOS: what it executes is unknown.
		return "", fmt.Errorf("it is not an ELF program, so it cannot be confined: set the hypervisor's binary to the program itself, "+
			"or set sandbox = false: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		path, err := io.ReadAll(io.LimitReader(p.Open(), 4096))
		if err != nil {
			return "", err
		}
		return strings.TrimRight(string(path), "\x00"), nil
	}
	return "", nil
}

// jailer confines VMMs if the spec asks for it, and logs once what the kernel cannot enforce.
type jailer struct {
	on   bool
	log  *slog.Logger
	once sync.Once
}

// ruleset is a jail that a thread can confine itself to. fd is -1 if the kernel lacks landlock.
type ruleset struct {
	fd    int
	flags uint32
}

// lock returns the ruleset of a jail, or nil if the spec has sandbox = false.
func (k *jailer) lock(j jail, binary string) (*ruleset, error) {
	if !k.on {
		return nil, nil
	}
	k.once.Do(k.tell)
	rules, err := j.rules(binary)
	if err != nil {
		return nil, fmt.Errorf("confine the VMM: %w", err)
	}
	fd, flags, err := landlock.V11.BestEffort().NewRulesetFD(rules...)
	if err != nil {
		return nil, fmt.Errorf("confine the VMM: %w", err)
	}
	return &ruleset{fd, flags}, nil
}

func (k *jailer) tell() {
	switch abi, err := landlockabi.Version(); {
	case err != nil:
		k.log.Warn("VMMs run without landlock: a VMM that was taken over could read other workers' files", "error", err)
	case abi == 0:
		k.log.Warn("VMMs run without landlock: a VMM that was taken over could read other workers' files; boot Linux 6.2 or later, " +
			"with landlock in its lsm= list")
	case abi < landlockabi.Files:
		k.log.Warn("landlock cannot keep VMMs from truncating files before Linux 6.2", "abi", abi)
	case abi < landlockabi.Scopes:
		k.log.Info("landlock cannot keep VMMs from sending signals to processes of their user before Linux 6.12", "abi", abi)
	}
}

func (r *ruleset) close() {
	if r != nil && r.fd >= 0 {
		unix.Close(r.fd)
	}
}

// enter confines the calling thread and its future children. The thread must be locked, and end with its goroutine.
func (r *ruleset) enter() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	if r == nil {
		return nil
	}
	if r.fd >= 0 {
		if err := ll.LandlockRestrictSelf(r.fd, r.flags); err != nil {
			return fmt.Errorf("landlock_restrict_self: %w", err)
		}
	}
	return onlyUnixSockets()
}

// auditArch is the value of seccomp_data.arch for native system calls (linux/audit.h).
var auditArch = map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64, "riscv64": unix.AUDIT_ARCH_RISCV64}

// onlyUnixSockets makes socket(2) fail with EACCES on this thread for all families except AF_UNIX. A VMM gets its network as an open TAP.
// landlock restricts TCP since Linux 6.7, and UDP only since recently. System calls of another ABI (i386, x32) fail as well.
func onlyUnixSockets() error {
	arch, ok := auditArch[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("no seccomp filter for %s", runtime.GOARCH)
	}
	const (
		load   = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal  = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		bits   = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		answer = unix.BPF_RET | unix.BPF_K
		deny   = unix.SECCOMP_RET_ERRNO | uint32(unix.EACCES)
		x32    = 0x40000000 // __X32_SYSCALL_BIT
	)
	// The offsets in seccomp_data: nr 0, arch 4, args[0] 16 (its low half on little-endian machines).
	program := []unix.SockFilter{
		{Code: load, K: 4},
		{Code: equal, K: arch, Jf: 6},
		{Code: load, K: 0},
		{Code: bits, K: x32, Jt: 4},
		{Code: equal, K: unix.SYS_SOCKET, Jf: 2},
		{Code: load, K: 16},
		{Code: equal, K: unix.AF_UNIX, Jf: 1},
		{Code: answer, K: unix.SECCOMP_RET_ALLOW},
		{Code: answer, K: deny},
	}
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	_, _, errno := unix.Syscall(unix.SYS_PRCTL, unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&fprog)))
	runtime.KeepAlive(program)
	if errno != 0 {
		return fmt.Errorf("seccomp filter: %w", errno)
	}
	return nil
}

// privatePrefix begins the name of a VMM's folder for sockets, below Config.Dir. The rest is random: before landlock's ABI 9 the kernel
// does not restrict connect(2), so other VMMs must not be able to guess the paths of the sockets.
const (
	privatePrefix  = "s"
	privateLetters = 13 // of rand.Text, 5 bits each. More would leave no room for the sockets' names
)

// makePrivate creates the folder for sockets.
func makePrivate(dir string) (string, error) {
	path := filepath.Join(dir, privatePrefix+rand.Text()[:privateLetters])
	return path, os.Mkdir(path, 0o700)
}

// findPrivate finds the folder for sockets again; it returns "" if there is none.
func findPrivate(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	for _, e := range entries {
		if e.IsDir() && strings.HasPrefix(e.Name(), privatePrefix) {
			return filepath.Join(dir, e.Name()), nil
		}
	}
	return "", nil
}
