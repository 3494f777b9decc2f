// Package vm starts and ends virtual machines: the Driver contract and its two
// implementations. It never touches firewall, links, images or fleeting: it is
// handed disks that exist and TAPs that exist.
package vm

import (
	"context"
	"net"
)

// Driver runs VMs with one hypervisor. All methods may be called at the same time.
type Driver interface {
	// Name is the driver's name in the spec: "qemu", "cloud-hypervisor".
	Name() string

	// Probe says what would run here. It MUST fail, with the reason and the cure,
	// where Start could never succeed (no binary, too old a version, no KVM). Where it is only
	// KVM that lacks, Info has the binary and its version beside the error.
	Probe(ctx context.Context) (Info, error)

	// Start makes a VM and boots it; it returns when the VMM runs the guest, not
	// when the guest is up. When it fails, or when ctx ends first, it MUST leave
	// no process, socket or cgroup behind. The VMM is not tied to
	// the life of this process: it goes on when the plugin ends.
	Start(ctx context.Context, cfg Config) (VM, error)

	// Adopt finds the VM that an earlier process started in dir. It returns
	// ErrNotRunning where there is none, after removing what is left of it in
	// dir. It MUST NOT mistake another process with a reused pid for the VMM.
	Adopt(ctx context.Context, dir string) (VM, error)
}

// Info is what Probe found.
type Info struct {
	Binary  string // absolute path
	Version string // "10.0.2", "v53.0"
	Accel   string // what would be used: "kvm" or "tcg"
}

// VM is one running (or ended) virtual machine. All methods may be called at
// the same time.
type VM interface {
	// PID is the VMM's process id.
	PID() int

	// Done is closed as soon as the VMM has exited, whatever the reason.
	Done() <-chan struct{}

	// Exit is why the VMM ended, for people ("signal: killed", "guest powered
	// off", with the VMM's last words), and nil while it runs. It is never nil
	// after Done.
	Exit() error

	// Channel opens the host's end of the guest channel. It blocks until there is a
	// stream (which does not mean that the guest speaks on it), ctx ends, or the
	// VM is gone. There is one stream at a time: a new one ends the last.
	Channel(ctx context.Context) (net.Conn, error)

	// Stop ends the VM: the power button, and when ctx (or the driver's own
	// deadline) runs out SIGTERM, then SIGKILL. It returns once no
	// process is left and the VM's files in Dir are removed (the console log stays).
	// Stopping an ended VM is a success.
	Stop(ctx context.Context) error

	// Kill is Stop without asking the guest.
	Kill() error
}

// Config is what a VM is made of. Paths are absolute.
type Config struct {
	ID      string // names the VM in process lists and logs
	Dir     string // private to this VM, made by the caller, empty; its path is at most 80 bytes
	CPUs    int
	Memory  int64 // bytes
	Kernel  string
	Initrd  string // may be empty
	Cmdline string
	Disks   []Disk // in this order; the first is the root disk
	Net     *Net   // nil: no network
	Console string // file that gets the guest's console; "" for none
	Limits  Limits
	// Cgroup is the cgroup v2 folder that the VMM is started in, which goes with the VM. "" is the usual: the driver makes
	// one with the limits where a subtree was delegated to this process, and where none was says so once.
	Cgroup string
}

// Disk is a raw disk.
type Disk struct {
	Path     string
	ReadOnly bool
	Serial   string // the guest finds it as /dev/disk/by-id/virtio-SERIAL; at most 20 bytes
}

// Net is the VM's one interface, on a TAP that exists and that the caller may open.
type Net struct {
	TAP    string
	MAC    string // the guest's
	Queues int    // RX/TX pairs; the TAP was made with IFF_MULTI_QUEUE when above 1
}

// Limits are per VM; 0 is no limit. The VMM keeps to those of disk and network, the cgroup to all but the network's.
type Limits struct {
	CPUQuotaPercent int // 400 is four CPUs
	DiskIOPS        int
	NetworkMbps     int // 10^6 bit/s, each direction
	Connections     int // conntrack entries; the host's firewall keeps to it
}
