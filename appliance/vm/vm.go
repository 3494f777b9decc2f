// Package vm starts and ends virtual machines: the Driver contract and its two
// implementations. It knows nothing about firewall, links, images or fleeting:
// it is handed existing disks and existing TAPs.
package vm

import (
	"context"
	"net"
)

// Driver runs VMs with one hypervisor. Its methods may be called concurrently.
type Driver interface {
	// Name is the driver's name in the spec: "qemu", "cloud-hypervisor".
	Name() string

	// Probe returns what Start would run. If Start could never succeed (no binary, an old
	// version, no KVM), it MUST fail with the reason and what to do. If only KVM is missing,
	// Info holds the binary and its version besides the error.
	Probe(ctx context.Context) (Info, error)

	// Start creates and boots a VM; it returns once the VMM runs the guest, not
	// once the guest is up. If it fails, or ctx ends first, it MUST leave no
	// process, socket or cgroup behind. The VMM outlives this process.
	Start(ctx context.Context, cfg Config) (VM, error)

	// Adopt finds the VM that an earlier process started in dir. If there is
	// none, it removes what is left in dir and returns ErrNotRunning. It MUST
	// NOT mistake another process with a reused pid for the VMM.
	Adopt(ctx context.Context, dir string) (VM, error)
}

// Info is the result of Probe.
type Info struct {
	Binary  string // absolute path
	Version string // "10.0.2", "v53.0"
	Accel   string // the accelerator in use: "kvm" or "tcg"
}

// VM is a running or ended virtual machine. Its methods may be called
// concurrently.
type VM interface {
	// PID is the VMM's process id.
	PID() int

	// Done is closed as soon as the VMM has exited, for whatever reason.
	Done() <-chan struct{}

	// Exit returns nil while the VMM runs, and then why it ended, for people
	// ("signal: killed", "guest powered off", with the end of the VMM's output).
	// It is never nil after Done.
	Exit() error

	// Channel opens the host's end of the guest channel. It blocks until there is a
	// stream (which does not mean that the guest uses it), ctx ends, or the VM
	// has ended. There is one stream at a time: a new one closes the last.
	Channel(ctx context.Context) (net.Conn, error)

	// Stop ends the VM: with the power button and, when ctx or the driver's own
	// deadline runs out, with SIGTERM and then SIGKILL. It returns once no
	// process is left and the VM's files in Dir are removed (the console log stays).
	// Stopping an ended VM succeeds.
	Stop(ctx context.Context) error

	// Kill is Stop without asking the guest.
	Kill() error
}

// Config describes a VM. Paths are absolute.
type Config struct {
	ID      string // names the VM in process lists and logs
	Dir     string // private to this VM, created empty by the caller; its path is at most 80 bytes long
	CPUs    int
	Memory  int64 // bytes
	Kernel  string
	Initrd  string // may be empty
	Cmdline string
	Disks   []Disk // in this order; the first is the root disk
	Net     *Net   // nil: no network
	Console string // file for the guest's console; "" for none
	Limits  Limits
	// Cgroup is the cgroup v2 folder that the VMM is started in, and which is removed with the VM. It is usually "": then the driver
	// creates one with the limits if a subtree is delegated to this process, and otherwise logs a warning once.
	Cgroup string
}

// Disk is a raw disk.
type Disk struct {
	Path     string
	ReadOnly bool
	Serial   string // the guest sees it as /dev/disk/by-id/virtio-SERIAL; at most 20 bytes
}

// Net is the VM's only interface, on an existing TAP that the caller may open.
type Net struct {
	TAP    string
	MAC    string // the guest's
	Queues int    // RX/TX pairs; above 1, the TAP must have IFF_MULTI_QUEUE
}

// Limits apply to each VM; 0 means no limit. The VMM enforces those of disk and network, the cgroup all except the network's.
type Limits struct {
	CPUQuotaPercent int // 400 is four CPUs
	DiskIOPS        int
	NetworkMbps     int // 10^6 bit/s, each direction
	Connections     int // conntrack entries, enforced by the host's firewall
}
