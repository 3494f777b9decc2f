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

// All VMMs of a host run as one user, which may read the runner's config.toml, the other workers' disks and keys, and connect to
// their sockets. So whichever hypervisor it is, we shut each VMM in before it executes its first instruction: by landlock
// (landlock(7)) to its own files and its program, and by a seccomp filter to Unix sockets. The VMM may do more of its own kind above
// that. What each kernel can do is in packaging/docs/security.md.

// jail is what a VMM may reach beside its program and the devices that every VMM needs.
type jail struct {
	private string   // its folder for sockets
	read    []string // files
	write   []string // files, which it may read, too
}

// Rights to files and folders.
const (
	readFile  = landlock.AccessFSSet(ll.AccessFSReadFile)
	readTree  = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSReadDir)
	execFile  = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSExecute)
	writeFile = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSWriteFile | ll.AccessFSTruncate)
	useDevice = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSWriteFile | ll.AccessFSIoctlDev)
	ownFolder = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSWriteFile | ll.AccessFSTruncate | ll.AccessFSReadDir | ll.AccessFSMakeReg |
		ll.AccessFSMakeSock | ll.AccessFSRemoveFile | ll.AccessFSResolveUnix)
)

// libraries is where programs and their libraries, modules and firmware lie. There are no secrets there, and no worker's files.
var libraries = []string{
	"/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/local/lib", "/nix/store", "/gnu/store",
	"/usr/share/qemu", "/usr/share/seabios", "/usr/share/vgabios", "/usr/share/OVMF", "/usr/share/AAVMF", "/usr/share/edk2",
	"/usr/share/opensbi", "/usr/local/share/qemu",
}

// rules are landlock's, for a program.
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
		// How many CPUs, how much memory, which pages: nothing of other processes.
		landlock.PathAccess(readFile, "/proc/cpuinfo", "/proc/meminfo", "/proc/filesystems").IgnoreIfMissing(),
		landlock.PathAccess(readTree, "/sys/devices/system", "/sys/kernel/mm").IgnoreIfMissing(),
	}
	// A program that was unpacked somewhere has its libraries and firmware beside it: bin/../lib, bin/../share.
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

// interpreter is the program's dynamic loader, which the kernel executes (elf(5), PT_INTERP); "" for a static program.
func interpreter(program string) (string, error) {
	f, err := elf.Open(program)
	if err != nil {
		// A script, as a wrapper on NixOS is: what it executes cannot be told from here.
		return "", fmt.Errorf("it is not an ELF program, so it cannot be confined: name the program itself as the hypervisor's binary, "+
			"or write sandbox = false: %w", err)
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

// jailer makes jails, or not, as the spec says, and says once what the kernel cannot do.
type jailer struct {
	on   bool
	log  *slog.Logger
	once sync.Once
}

// ruleset is a jail that a thread can shut itself in. fd is -1 where the kernel has no landlock.
type ruleset struct {
	fd    int
	flags uint32
}

// lock makes the ruleset of a jail; nil where the spec says sandbox = false.
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
		k.log.Warn("VMMs run without landlock: a VMM that was taken over could read other workers' files; boot Linux 6.2 or later, with landlock in its lsm= list")
	case abi < landlockabi.Files:
		k.log.Warn("landlock cannot keep a VMM from truncating files: that takes Linux 6.2", "abi", abi)
	case abi < landlockabi.Scopes:
		k.log.Info("landlock cannot keep a VMM from sending signals to processes of its user: that takes Linux 6.12", "abi", abi)
	}
}

func (r *ruleset) close() {
	if r != nil && r.fd >= 0 {
		unix.Close(r.fd)
	}
}

// enter shuts the calling thread in, and with it what it starts from now on. The thread must be locked, and end with its goroutine.
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

// auditArch is the value of seccomp_data.arch for the native system calls (linux/audit.h).
var auditArch = map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64, "riscv64": unix.AUDIT_ARCH_RISCV64}

// onlyUnixSockets has socket(2) fail with EACCES for all families but AF_UNIX on this thread. A VMM gets its network as an open TAP;
// landlock forbids TCP from Linux 6.7 on, and UDP only lately. System calls of another ABI (i386, x32) fail as well.
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
	// The offsets are seccomp_data's: nr 0, arch 4, args[0] 16 (its low half on little-endian machines).
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
// does not ask it about connect(2), so another VMM must not be able to guess where the sockets of this one are.
const (
	privatePrefix  = "s"
	privateLetters = 13 // of rand.Text, 5 bits each: each guess is a system call. More would leave no room for the sockets' names
)

// makePrivate makes that folder.
func makePrivate(dir string) (string, error) {
	path := filepath.Join(dir, privatePrefix+rand.Text()[:privateLetters])
	return path, os.Mkdir(path, 0o700)
}

// findPrivate finds that folder again; "" where there is none.
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
