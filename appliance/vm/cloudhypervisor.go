package vm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/landlockabi"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
)

// Names in the VMM's private folder; the event pipe is in Config.Dir.
const (
	chSocket      = "api.sock"
	chVsockSocket = "vsock"
	chEventPipe   = "events"
)

// chGuestSocket is the socket that Cloud Hypervisor connects to when its guest connects to plan.GuestVsock on the host.
var chGuestSocket = fmt.Sprintf("%s_%d", chVsockSocket, plan.GuestVsock)

var chFiles = []string{chEventPipe}

// chOldest is the first version with the fixes of image format autodetection (50.1, 51.0) and of a use after free in virtio-block (51.2).
var chOldest = []int{51, 2}

// chBootDeadline limits vm.create and vm.boot, which load the kernel and start the vCPUs.
const chBootDeadline = 30 * time.Second

// chCID is the guest's vsock address. All guests may have the same, because their sockets are files.
const chCID = 3

type cloudHypervisor struct {
	plan   plan.Hypervisor
	log    *slog.Logger
	kvm    func() error // computed once
	groups *cgroups
	jailer *jailer
}

var _ Driver = (*cloudHypervisor)(nil)

func newCloudHypervisor(h plan.Hypervisor, log *slog.Logger) *cloudHypervisor {
	if h.Binary == "" {
		h.Binary = "cloud-hypervisor"
	}
	return &cloudHypervisor{
		plan: h, log: log, groups: newCgroups(log),
		kvm:    sync.OnceValue(func() error { return ProbeKVM(context.Background()) }),
		jailer: &jailer{on: h.Sandbox, log: log},
	}
}

func (c *cloudHypervisor) Name() string { return "cloud-hypervisor" }

var chVersionLine = regexp.MustCompile(`^(?:cloud-hypervisor )?v?(\d{1,4}\.\d{1,4}(?:\.\d{1,4})?)`)

// chVersion parses the first line of --version, or the answer to vmm.ping, and refuses versions that are too old.
func chVersion(text string) (string, error) {
	m := chVersionLine.FindStringSubmatch(text)
	if m == nil {
		first, _, _ := strings.Cut(text, "\n")
		return "", fmt.Errorf("not Cloud Hypervisor's version: %.80q", first)
	}
	if older(m[1], chOldest) {
		return "", fmt.Errorf("version %s is too old; %d.%d or newer is required: older versions let a guest read host files "+
			"(image format autodetection) and have a use after free in virtio-block", m[1], chOldest[0], chOldest[1])
	}
	return m[1], nil
}

func (c *cloudHypervisor) Probe(ctx context.Context) (Info, error) {
	binary, err := c.binary()
	if err != nil {
		return Info{}, err
	}
	version, err := versionOf(ctx, binary, chVersion)
	if err != nil {
		return Info{}, err
	}
	info := Info{Binary: binary, Version: "v" + version}
	if err := c.kvm(); err != nil {
		return info, fmt.Errorf("hypervisor \"cloud-hypervisor\" needs KVM: %w", err)
	}
	info.Accel = "kvm"
	return info, nil
}

func (c *cloudHypervisor) binary() (string, error) {
	path, err := exec.LookPath(c.plan.Binary)
	if err != nil {
		return "", fmt.Errorf("hypervisor \"cloud-hypervisor\": %w; install a release from "+
			"https://github.com/cloud-hypervisor/cloud-hypervisor/releases, or set binary", err)
	}
	return filepath.Abs(path)
}

func (c *cloudHypervisor) Start(ctx context.Context, cfg Config) (VM, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if strings.ContainsAny(cfg.Dir, `,"[`) {
		return nil, fmt.Errorf("VM %s: its folder %s contains a character that Cloud Hypervisor's options cannot contain", cfg.ID, cfg.Dir)
	}
	binary, err := c.binary()
	if err != nil {
		return nil, err
	}
	if err := c.kvm(); err != nil {
		return nil, fmt.Errorf("hypervisor \"cloud-hypervisor\" needs KVM: %w", err)
	}
	var taps []*os.File
	if cfg.Net != nil {
		if taps, err = openTAP(cfg.Net, netPairs(cfg)); err != nil {
			return nil, fmt.Errorf("VM %s: %w", cfg.ID, err)
		}
		defer closeAll(taps)
	}
	v, err := c.launch(binary, cfg)
	if err != nil {
		return nil, err
	}
	// Cloud Hypervisor requires this ABI.
	abi, _ := landlockabi.Version() // an error was logged by the jailer
	own := c.plan.Sandbox && abi >= landlockabi.Files
	if err := v.boot(ctx, chVMConfig(cfg, v.private, own), chNetConfig(cfg), taps); err != nil {
		return nil, v.abandon(ctx, err)
	}
	return v, nil
}

// launch starts the process. It listens for events and for the guest's connections from the beginning.
func (c *cloudHypervisor) launch(binary string, cfg Config) (_ *chVM, err error) {
	private, err := makePrivate(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", cfg.ID, err)
	}
	v := &chVM{api: chAPI{filepath.Join(private, chSocket)}, turn: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			v.closeAll()
			err = errors.Join(err, removeFiles(cfg.Dir, chFiles), os.RemoveAll(private))
		}
	}()
	pipe, err := v.listen(cfg.Dir, private)
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", cfg.ID, err)
	}
	defer pipe.Close()
	v.process, err = start(launch{
		cfg: cfg, driver: c.Name(), binary: binary, files: chFiles, log: c.log, groups: c.groups, extra: []*os.File{pipe},
		private: private, jailer: c.jailer,
		args: []string{
			"--api-socket", "path=" + filepath.Join(private, chSocket),
			"--event-monitor", "fd=3", // the first after stdin, stdout and stderr
			"--seccomp", fmt.Sprint(c.plan.Sandbox),
		},
	})
	if err != nil {
		return nil, err
	}
	v.watch()
	return v, nil
}

func (c *cloudHypervisor) Adopt(ctx context.Context, dir string) (VM, error) {
	p, err := adopt(dir, c.Name(), chFiles, c.log)
	if err != nil {
		return nil, err
	}
	v := &chVM{process: p, api: chAPI{filepath.Join(p.private, chSocket)}, turn: make(chan struct{}, 1)}
	if err := v.reopen(dir, p.private); err != nil {
		// It can still be watched and stopped.
		p.log.Warn("adopted a VM without its guest channel", "error", err)
	}
	v.watch()
	ctx, cancel := context.WithTimeout(ctx, controlDeadline)
	defer cancel()
	if err := v.api.get(ctx, "vmm.ping", nil); err != nil && !p.ended() {
		p.log.Warn("adopted a VM whose VMM does not answer", "pid", p.record.PID, "error", err)
	}
	return v, nil
}

// netPairs returns the number of queue pairs. It is 1 with a bandwidth limit, which Cloud Hypervisor applies to each pair separately.
func netPairs(cfg Config) int {
	if cfg.Limits.NetworkMbps > 0 {
		return 1
	}
	return cfg.Net.Queues
}

// chVMConfig returns the body of vm.create, without the network: vm.create ignores descriptors.
func chVMConfig(cfg Config, private string, landlock bool) chConfig {
	out := chConfig{
		Payload: chPayload{Kernel: cfg.Kernel, Initramfs: cfg.Initrd, Cmdline: kernelCommandLine(&cfg, "hvc0")},
		CPUs:    chCPUs{Boot: cfg.CPUs, Max: cfg.CPUs},
		Memory:  chMemory{Size: cfg.Memory},
		RNG:     chRNG{Source: "/dev/urandom"},
		// Never inflated: it returns pages that the guest has freed to the host.
		Balloon: chBalloon{DeflateOnOOM: true, FreePageReporting: true},
		Serial:  chConsole{Mode: "Off"},
		Console: chConsole{Mode: "Off"},
		Vsock:   chVsock{CID: chCID, Socket: filepath.Join(private, chVsockSocket)},
		// Cloud Hypervisor derives its rules from the paths in this configuration, which include all that it opens later, at a reboot.
		Landlock: landlock,
	}
	if cfg.Console != "" {
		out.Console = chConsole{Mode: "File", File: cfg.Console}
	}
	group := ""
	if n := cfg.Limits.DiskIOPS; n > 0 { // one group, because the limit is per worker, not per disk
		group = "disks"
		out.RateLimitGroups = []chRateGroup{{ID: group, Limiter: chRateLimiter{Ops: &chTokens{Size: int64(n), Refill: 1000}}}}
	}
	for i, d := range cfg.Disks {
		queues := cfg.CPUs // a queue is a thread; disks that are only read at boot get one
		if d.ReadOnly {
			queues = 1
		}
		out.Disks = append(out.Disks, chDisk{
			ID: fmt.Sprintf("disk%d", i), Path: d.Path, ReadOnly: d.ReadOnly, ImageType: "Raw", Queues: queues,
			Serial: d.Serial, RateLimitGroup: group,
		})
	}
	return out
}

// chNetConfig returns the body of vm.add-net, or nil without a network.
func chNetConfig(cfg Config) *chNet {
	if cfg.Net == nil {
		return nil
	}
	n := &chNet{ID: "net0", MAC: cfg.Net.MAC, Queues: 2 * netPairs(cfg)}
	if mbps := cfg.Limits.NetworkMbps; mbps > 0 {
		// Refilled with a tenth of a second's bytes: often enough to be smooth, and more than one packet from 6 Mbit/s upwards.
		n.Limiter = &chRateLimiter{Bandwidth: &chTokens{Size: int64(mbps) * 1_000_000 / 8 / 10, Refill: 100}}
	}
	return n
}

// chVM is a VM of the cloud-hypervisor driver.
type chVM struct {
	*process
	api    chAPI
	guests *acceptor
	events *os.File      // the read end of the event pipe
	heard  chan struct{} // closed once all events have been read

	turn    chan struct{} // held by Channel; unlike a mutex, waiting for it can be cancelled
	channel net.Conn
	mu      sync.Mutex
	byeSeen bool // the VMM announced that it is ending
}

var _ VM = (*chVM)(nil)

// listen creates the event pipe and the guest's socket, and returns the pipe's end for the VMM. The pipe has a name, so
// that a later process can continue reading. It is opened for reading and writing, so that the VMM's writes neither
// fail nor block while nobody reads.
func (v *chVM) listen(dir, private string) (*os.File, error) {
	path := filepath.Join(dir, chEventPipe)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, fmt.Errorf("make pipe %s: %w", path, err)
	}
	pipe, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := v.reopen(dir, private); err != nil {
		pipe.Close()
		return nil, err
	}
	return pipe, nil
}

func (v *chVM) reopen(dir, private string) (err error) {
	if v.guests, err = accept(filepath.Join(private, chGuestSocket)); err != nil {
		return err
	}
	v.events, err = os.OpenFile(filepath.Join(dir, chEventPipe), os.O_RDONLY|unix.O_NONBLOCK, 0)
	return err
}

// closeAll closes everything that listen has opened, even if listen failed halfway.
func (v *chVM) closeAll() {
	if v.guests != nil {
		v.guests.close()
	}
	if v.events != nil {
		v.events.Close()
	}
}

func (v *chVM) watch() {
	v.heard = make(chan struct{})
	go func() {
		defer close(v.heard)
		if v.events != nil {
			readEvents(v.events, v.event)
		}
	}()
	v.process.watch(v.lastEvents)
}

func (v *chVM) event(e chEvent) {
	switch e.Source + "." + e.Event {
	case "vm.rebooting":
		v.rebooted()
	case "vmm.shutdown":
		v.mu.Lock()
		v.byeSeen = true
		v.mu.Unlock()
	}
}

// lastEvents is called once the process has ended, which closes the write end of the pipe.
func (v *chVM) lastEvents() {
	late := time.NewTimer(time.Second)
	defer late.Stop()
	select {
	case <-v.heard:
	case <-late.C:
	}
	v.closeAll()
	<-v.heard
	v.mu.Lock()
	bye := v.byeSeen
	v.mu.Unlock()
	// It exits with status 0 both when the guest powers off and when a vCPU breaks. The event tells the same as the status, and
	// is needed if another process received that: events can be lost when the pipe is full, or to another reader.
	inOrder := bye
	if v.cmd != nil {
		inOrder = v.cmd.ProcessState.Success()
	}
	if inOrder && !chBroke(filepath.Join(v.dir, logFile)) {
		v.note(ErrPoweredOff)
	}
}

var chVCPUError = regexp.MustCompile(`<vcpu\d+> ERROR:`)

// chBroke reports whether a vCPU thread reports an error at the end of the log.
func chBroke(path string) bool {
	tail, err := state.Tail(path, 16<<10)
	return err == nil && chVCPUError.Match(tail)
}

// boot creates and boots the VM: vm.create, vm.add-net with the TAP, vm.boot.
func (v *chVM) boot(ctx context.Context, config chConfig, net *chNet, taps []*os.File) error {
	conn, err := v.dial(ctx, chSocket)
	if err != nil {
		return err
	}
	conn.Close()
	var ping chPing
	if err := v.timed(ctx, startDeadline, func(ctx context.Context) error {
		return v.api.get(ctx, "vmm.ping", &ping)
	}); err != nil {
		return err
	}
	if _, err := chVersion(ping.BuildVersion); err != nil {
		return fmt.Errorf("%s: %w", v.record.Binary, err)
	}
	steps := []func(context.Context) error{
		func(ctx context.Context) error { return v.api.put(ctx, "vm.create", config) },
		func(ctx context.Context) error {
			if net == nil {
				return nil
			}
			return v.api.put(ctx, "vm.add-net", net, taps...)
		},
		func(ctx context.Context) error { return v.api.put(ctx, "vm.boot", nil) },
	}
	for _, step := range steps {
		if err := v.timed(ctx, chBootDeadline, step); err != nil {
			return err
		}
	}
	return v.running()
}

// timed makes a call with its own deadline. If the VMM ends during the call, the call fails with its connection.
func (v *chVM) timed(ctx context.Context, d time.Duration, call func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return call(ctx)
}

func (v *chVM) PID() int { return v.record.PID }

func (v *chVM) Done() <-chan struct{} { return v.done }

func (v *chVM) Exit() error { return v.exitError() }

func (v *chVM) Stop(ctx context.Context) error {
	return v.stop(ctx, func(ctx context.Context) error {
		return v.timed(ctx, controlDeadline, func(ctx context.Context) error { return v.api.put(ctx, "vm.power-button", nil) })
	})
}

func (v *chVM) Kill() error { return v.kill() }

// Channel waits until the guest connects.
func (v *chVM) Channel(ctx context.Context) (net.Conn, error) {
	fail := func(err error) (net.Conn, error) {
		return nil, fmt.Errorf("guest channel of VM %s: %w", v.record.ID, err)
	}
	if v.guests == nil {
		return fail(errors.New("its socket could not be opened when the VM was adopted"))
	}
	select {
	case v.turn <- struct{}{}:
		defer func() { <-v.turn }()
	case <-ctx.Done():
		return fail(context.Cause(ctx))
	}
	if v.channel != nil {
		v.channel.Close()
		v.channel = nil
	}
	conn, err := v.guests.next(ctx, v.done)
	if err != nil {
		return fail(err)
	}
	v.channel = conn
	return conn, nil
}
