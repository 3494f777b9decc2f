package vm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/visible"
)

// Names in the VMM's private folder.
const (
	qmpSocket   = "qmp.sock"
	guestSocket = "guest.sock" // the host's end of the virtio-serial port
)

// qemuOldest is the first release with everything that is used here.
var qemuOldest = []int{7, 2}

// Deadlines of the control socket: QEMU is ready in 0.2 s on an idle machine, and answers in microseconds.
const (
	startDeadline   = 60 * time.Second
	controlDeadline = 2 * time.Second
)

// tcgBuffer is the buffer for translated code, in bytes. QEMU's default of 1 GiB is more than the memory of many a guest.
const tcgBuffer = 512 << 20

// qemuTarget holds what differs between architectures.
type qemuTarget struct {
	binary, machine, console string
}

// q35 without devices that guests here never use. Not microvm: its firmware starts the kernel
// half a second sooner, but under emulation two of four boots of a Debian kernel hung.
var qemuTargets = map[string]qemuTarget{
	"amd64":   {"qemu-system-x86_64", "q35,smm=off,vmport=off,sata=off,smbus=off", "ttyS0"},
	"arm64":   {"qemu-system-aarch64", "virt,gic-version=max", "ttyAMA0"},
	"riscv64": {"qemu-system-riscv64", "virt", "ttyS0"},
}

type qemu struct {
	plan   plan.Hypervisor
	target qemuTarget
	log    *slog.Logger
	groups *cgroups
	jailer *jailer
	// kvm is computed once: the answer does not change, and every Start needs it.
	kvm     func() error
	unruled sync.Once // warns about network_mbps
}

var _ Driver = (*qemu)(nil)

func newQEMU(h plan.Hypervisor, log *slog.Logger) (*qemu, error) {
	target, ok := qemuTargets[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("hypervisor \"qemu\": unsupported architecture %s", runtime.GOARCH)
	}
	if h.Binary == "" || h.Binary == "qemu" {
		h.Binary = target.binary
	}
	switch h.Accel {
	case "":
		h.Accel = "auto"
	case "auto", "kvm", "tcg":
	default:
		return nil, fmt.Errorf("hypervisor \"qemu\": accel must be \"auto\", \"kvm\" or \"tcg\"; got %q", h.Accel)
	}
	// Not the context of one caller: the answer is for all callers.
	kvm := sync.OnceValue(func() error { return ProbeKVM(context.Background()) })
	return &qemu{plan: h, target: target, log: log, groups: newCgroups(log), jailer: &jailer{on: h.Sandbox, log: log}, kvm: kvm}, nil
}

func (q *qemu) Name() string { return "qemu" }

// accel returns "kvm" or "tcg".
func (q *qemu) accel() (string, error) {
	if q.plan.Accel == "tcg" {
		return "tcg", nil
	}
	err := q.kvm()
	if err == nil {
		return "kvm", nil
	}
	if q.plan.Accel == "kvm" {
		return "", fmt.Errorf("accel = \"kvm\": %w", err)
	}
	return "tcg", nil
}

func (q *qemu) Probe(ctx context.Context) (Info, error) {
	binary, err := exec.LookPath(q.plan.Binary)
	if err != nil {
		return Info{}, fmt.Errorf("hypervisor \"qemu\": %w; install it (Debian, Ubuntu: apt install qemu-system) or set binary", err)
	}
	if binary, err = filepath.Abs(binary); err != nil {
		return Info{}, err
	}
	version, err := versionOf(ctx, binary, qemuVersion)
	if err != nil {
		return Info{}, err
	}
	if older(version, qemuOldest) {
		return Info{}, fmt.Errorf("%s is version %s; %d.%d or newer is required", binary, version, qemuOldest[0], qemuOldest[1])
	}
	info := Info{Binary: binary, Version: version}
	info.Accel, err = q.accel()
	return info, err
}

var qemuVersionLine = regexp.MustCompile(`^QEMU emulator version (\d{1,4}\.\d{1,4}(?:\.\d{1,4})?)`)

func qemuVersion(out string) (string, error) {
	m := qemuVersionLine.FindStringSubmatch(out)
	if m == nil {
		first, _, _ := strings.Cut(out, "\n")
		return "", fmt.Errorf("not QEMU's answer: %.80q", first)
	}
	return m[1], nil
}

// older reports whether a dotted version, all parts of which are numbers, is older than the oldest supported one.
func older(version string, oldest []int) bool {
	parts := strings.Split(version, ".")
	for i, want := range oldest {
		have := 0
		if i < len(parts) {
			have, _ = strconv.Atoi(parts[i]) // only digits, as matched before
		}
		if have != want {
			return have < want
		}
	}
	return false
}

func (q *qemu) Start(ctx context.Context, cfg Config) (VM, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := cfg.check(); err != nil {
		return nil, err
	}
	binary, err := exec.LookPath(q.plan.Binary)
	if err != nil {
		return nil, fmt.Errorf("hypervisor \"qemu\": %w", err)
	}
	accel, err := q.accel()
	if err != nil {
		return nil, err
	}
	if cfg.Limits.NetworkMbps > 0 {
		q.unruled.Do(func() {
			q.log.Warn("network_mbps is not enforced: QEMU cannot limit a TAP that it is handed; " +
				"hypervisor \"cloud-hypervisor\" can")
		})
	}
	if binary, err = filepath.Abs(binary); err != nil {
		return nil, err
	}
	l := launch{cfg: cfg, driver: q.Name(), binary: binary, log: q.log, groups: q.groups, jailer: q.jailer}
	if cfg.Net != nil {
		if l.extra, err = openTAP(cfg.Net, cfg.Net.Queues); err != nil {
			return nil, fmt.Errorf("VM %s: %w", cfg.ID, err)
		}
		defer closeAll(l.extra)
	}
	if l.private, err = makePrivate(cfg.Dir); err != nil {
		return nil, fmt.Errorf("VM %s: %w", cfg.ID, err)
	}
	if l.args, err = q.args(cfg, l.private, accel); err != nil {
		return nil, errors.Join(err, os.RemoveAll(l.private))
	}
	if accel == "tcg" {
		l.memory = tcgBuffer
	}
	p, err := start(l)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(l.private))
	}
	v := newQEMUVM(p)
	p.watch(v.drain)
	if err := v.boot(ctx); err != nil {
		return nil, p.abandon(ctx, err)
	}
	return v, nil
}

func (q *qemu) Adopt(ctx context.Context, dir string) (VM, error) {
	p, err := adopt(dir, q.Name(), nil, q.log)
	if err != nil {
		return nil, err
	}
	v := newQEMUVM(p)
	p.watch(v.drain)
	ctx, cancel := context.WithTimeout(ctx, controlDeadline)
	defer cancel()
	if err := v.connect(ctx); err != nil && !p.ended() {
		// It can still be watched and killed; only the power button and events are unavailable.
		p.log.Warn("adopted a VM whose QEMU does not answer", "pid", p.record.PID, "error", err)
	}
	return v, nil
}

// args returns QEMU's command line. It holds no secret, because anyone on the host can read it.
func (q *qemu) args(cfg Config, private, accel string) ([]string, error) {
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none",
		"-name", comma("fleetingd-" + cfg.ID),
		"-machine", q.target.machine,
		"-smp", strconv.Itoa(cfg.CPUs),
		"-m", fmt.Sprintf("size=%dk", cfg.Memory>>10),
		"-kernel", cfg.Kernel,
		"-append", kernelCommandLine(&cfg, q.target.console),
		"-chardev", "socket,id=qmp,server=on,wait=off,path=" + comma(filepath.Join(private, qmpSocket)),
		"-mon", "chardev=qmp,mode=control",
	}
	if accel == "kvm" {
		args = append(args, "-accel", "kvm", "-cpu", "host")
	} else {
		args = append(args, "-accel", fmt.Sprintf("tcg,thread=multi,tb-size=%d", tcgBuffer>>20), "-cpu", "max")
	}
	if cfg.Initrd != "" {
		args = append(args, "-initrd", cfg.Initrd)
	}
	if cfg.Console != "" {
		// Appending, so that a log survives a second start and can be trimmed while it is written.
		args = append(args, "-chardev", "file,id=console,append=on,path="+comma(cfg.Console), "-serial", "chardev:console")
	}
	if q.plan.Sandbox {
		args = append(args, "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	}
	devices, err := q.devices(cfg, private)
	return append(args, devices...), err
}

// devices returns the options for disks, network, guest channel, entropy and balloon.
func (q *qemu) devices(cfg Config, private string) ([]string, error) {
	var args []string
	object := func(option string, value map[string]any) error {
		data, err := json.Marshal(value)
		args = append(args, option, string(data))
		return err
	}
	var errs []error
	if cfg.Limits.DiskIOPS > 0 { // one group, because the limit is per worker, not per disk
		errs = append(errs, object("-object", map[string]any{
			"qom-type": "throttle-group", "id": "limit", "limits": map[string]any{"iops-total": cfg.Limits.DiskIOPS},
		}))
	}
	for i, d := range cfg.Disks {
		errs = append(errs, object("-blockdev", qemuDisk(i, d, cfg.Limits.DiskIOPS > 0)))
		errs = append(errs, object("-device", map[string]any{
			"driver": "virtio-blk-pci", "drive": fmt.Sprintf("disk%d", i), "serial": d.Serial,
			// A full host disk becomes an I/O error in the guest. By default QEMU would silently pause the VM.
			"werror": "report", "rerror": "report",
		}))
	}
	if n := cfg.Net; n != nil {
		fds := make([]string, n.Queues)
		for i := range fds {
			fds[i] = strconv.Itoa(3 + i) // after stdin, stdout and stderr
		}
		// No vhost: it needs /dev/vhost-net, which the runtime user may not have.
		if n.Queues == 1 {
			args = append(args, "-netdev", "tap,id=net,vhost=off,fd="+fds[0])
		} else {
			args = append(args, "-netdev", "tap,id=net,vhost=off,fds="+strings.Join(fds, ":"))
		}
		net := map[string]any{
			"driver": "virtio-net-pci", "netdev": "net", "mac": n.MAC,
			"romfile": "", // no network boot, which saves a second in the firmware
		}
		if n.Queues > 1 {
			net["mq"], net["vectors"] = true, 2*n.Queues+2 // one vector per queue, one for control, one for configuration
		}
		errs = append(errs, object("-device", net))
	}
	args = append(args, "-chardev", "socket,id=guest,server=on,wait=off,path="+comma(filepath.Join(private, guestSocket)))
	errs = append(errs,
		object("-device", map[string]any{"driver": "virtio-serial-pci", "id": "serial"}),
		object("-device", map[string]any{
			"driver": "virtserialport", "bus": "serial.0", "chardev": "guest", "name": plan.GuestPort,
		}),
		object("-object", map[string]any{"qom-type": "rng-builtin", "id": "rng"}),
		object("-device", map[string]any{"driver": "virtio-rng-pci", "rng": "rng"}),
		// Never inflated: it returns pages that the guest has freed to the host.
		object("-device", map[string]any{"driver": "virtio-balloon-pci", "free-page-reporting": true}),
	)
	return args, errors.Join(errs...)
}

// qemuDisk returns one -blockdev: the file, as raw without autodetection (a guest could write a
// qcow2 header that names any host file), behind the throttle if limited.
//
// It uses the host's page cache: most disks are clones that live for minutes, and O_DIRECT fails on
// tmpfs. discard=unmap returns what the guest trims to the file system. locking=on
// keeps two VMs from writing to a disk; readers may share it.
func qemuDisk(i int, d Disk, limited bool) map[string]any {
	name := fmt.Sprintf("disk%d", i)
	file := map[string]any{
		"driver": "file", "filename": d.Path, "locking": "on", "aio": "threads",
	}
	raw := map[string]any{
		"driver": "raw", "file": file, "read-only": d.ReadOnly, "discard": "unmap",
		"cache": map[string]any{"direct": false, "no-flush": false},
	}
	if !limited {
		raw["node-name"] = name
		return raw
	}
	return map[string]any{
		"driver": "throttle", "node-name": name, "throttle-group": "limit", "file": raw,
		"read-only": d.ReadOnly, "discard": "unmap",
	}
}

// comma escapes a value of QEMU's key=value options.
func comma(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// qemuVM is a VM of the qemu driver.
type qemuVM struct {
	*process

	mu  sync.Mutex
	qmp *qmp // nil if QEMU could not be reached

	channelMu sync.Mutex
	channel   net.Conn
}

var _ VM = (*qemuVM)(nil)

func newQEMUVM(p *process) *qemuVM { return &qemuVM{process: p} }

// boot returns once QEMU reports that the guest is running.
func (v *qemuVM) boot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startDeadline)
	defer cancel()
	if err := v.connect(ctx); err != nil {
		return err
	}
	var status struct {
		Status string `json:"status"`
	}
	if err := v.qmp.execute(ctx, "query-status", &status); err != nil {
		return err
	}
	if status.Status != "running" {
		return fmt.Errorf("QEMU is up, but its guest is %q", status.Status)
	}
	return v.running()
}

// connect waits for the control socket and opens it.
func (v *qemuVM) connect(ctx context.Context) error {
	conn, err := v.dial(ctx, qmpSocket)
	if err != nil {
		return err
	}
	q, err := newQMP(ctx, conn, v.event)
	if err != nil {
		return err
	}
	v.mu.Lock()
	v.qmp = q
	v.mu.Unlock()
	return nil
}

// event handles QEMU's events (qapi/run-state.json, qapi/block-core.json).
func (v *qemuVM) event(name string, data qmpEventData) {
	switch name {
	case "SHUTDOWN":
		switch data.Reason {
		case "guest-shutdown":
			v.note(ErrPoweredOff)
		case "guest-panic":
			v.note(errors.New("the guest's kernel panicked"))
		}
	case "RESET":
		if data.Guest {
			v.rebooted()
		}
	case "BLOCK_IO_ERROR":
		v.log.Warn("a disk of the guest has an I/O error: is the host's disk full?", "disk", visible.Text(data.Device))
	}
}

// drain waits for QEMU's last events: the socket closes when the process ends.
func (v *qemuVM) drain() {
	v.mu.Lock()
	q := v.qmp
	v.mu.Unlock()
	if q == nil {
		return
	}
	late := time.NewTimer(time.Second)
	defer late.Stop()
	select {
	case <-q.done:
	case <-late.C:
		q.conn.Close()
	}
}

func (v *qemuVM) PID() int { return v.record.PID }

func (v *qemuVM) Done() <-chan struct{} { return v.done }

func (v *qemuVM) Exit() error { return v.exitError() }

func (v *qemuVM) Stop(ctx context.Context) error {
	return v.stop(ctx, func(ctx context.Context) error {
		v.mu.Lock()
		q := v.qmp
		v.mu.Unlock()
		if q == nil {
			return errors.New("QEMU's control socket is not connected")
		}
		ctx, cancel := context.WithTimeout(ctx, controlDeadline)
		defer cancel()
		return q.execute(ctx, "system_powerdown", nil)
	})
}

func (v *qemuVM) Kill() error { return v.kill() }

// Channel connects to the virtio-serial port's socket. QEMU serves one connection at a time,
// and the next one once that has ended.
func (v *qemuVM) Channel(ctx context.Context) (net.Conn, error) {
	v.channelMu.Lock()
	defer v.channelMu.Unlock()
	if v.channel != nil {
		v.channel.Close()
		v.channel = nil
	}
	conn, err := v.dial(ctx, guestSocket)
	if err != nil {
		return nil, fmt.Errorf("guest channel of VM %s: %w", v.record.ID, err)
	}
	v.channel = conn
	return conn, nil
}
