// Command init is the guest of the drivers' tests: process 1 of a VM. It answers
// one-line commands over the guest channel.
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// The names of the channel, as in plan.GuestPort and plan.GuestVsock. Importing plan would make the initrd larger.
const (
	portName  = "dev.fleetingd.guest"
	vsockPort = 7071
	keyPower  = 116 // linux/input-event-codes.h
)

func main() {
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: this is process 1 of a test VM, nothing for a host")
		os.Exit(2)
	}
	if err := setUp(); err != nil {
		fmt.Println("vmtest:", err)
		halt(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	cmdline, _ := os.ReadFile("/proc/cmdline")
	fmt.Println("vmtest: up")
	flags := strings.Fields(string(cmdline))
	if slices.Contains(flags, "vmtest.reboot") {
		halt(unix.LINUX_REBOOT_CMD_RESTART)
	}
	if !slices.Contains(flags, "vmtest.deaf") {
		powerButtons()
	}
	for {
		if err := serve(); err != nil {
			fmt.Println("vmtest:", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func setUp() error {
	for dir, kind := range map[string]string{"/dev": "devtmpfs", "/proc": "proc", "/sys": "sysfs"} {
		if err := unix.Mount(kind, dir, kind, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	files, _ := filepath.Glob("/modules/*.ko")
	for _, path := range files { // sorted: in load order
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) {
			fmt.Printf("vmtest: %s: %v\n", path, err)
		}
	}
	// The console that the kernel opened may depend on a module that was loaded just now.
	if out, err := os.OpenFile("/dev/console", os.O_WRONLY, 0); err == nil {
		os.Stdout = out
	}
	return nil
}

// powerButtons powers off when any input device reports the power key.
func powerButtons() {
	inputs, _ := filepath.Glob("/dev/input/event*")
	for _, path := range inputs {
		go func() {
			f, err := os.Open(path)
			if err != nil {
				return
			}
			var event struct {
				Time       [2]int64
				Type, Code uint16
				Value      int32
			}
			for binary.Read(f, binary.NativeEndian, &event) == nil {
				if event.Code == keyPower {
					halt(unix.LINUX_REBOOT_CMD_POWER_OFF)
				}
			}
		}()
	}
}

// serve answers commands on one stream until it ends.
func serve() error {
	stream, err := channel()
	if err != nil {
		return err
	}
	defer stream.Close()
	in := bufio.NewScanner(stream)
	for in.Scan() {
		command, arg, _ := strings.Cut(in.Text(), " ")
		if _, err := fmt.Fprintln(stream, answer(command, arg)); err != nil {
			return err
		}
	}
	return in.Err()
}

// channel opens the virtio-serial port if there is one, and otherwise a vsock connection to the host.
func channel() (io.ReadWriteCloser, error) {
	names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
	for _, path := range names {
		name, _ := os.ReadFile(path)
		if strings.TrimSpace(string(name)) == portName {
			return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(path)), os.O_RDWR, 0)
		}
	}
	return vsock.Dial(vsock.Host, vsockPort, nil)
}

func answer(command, arg string) string {
	switch command {
	case "echo":
		return arg
	case "cpus":
		return fmt.Sprint(runtime.NumCPU())
	case "memory": // MiB
		var info unix.Sysinfo_t
		if err := unix.Sysinfo(&info); err != nil {
			return err.Error()
		}
		return fmt.Sprint(uint64(info.Totalram) * uint64(info.Unit) >> 20)
	case "cmdline":
		b, _ := os.ReadFile("/proc/cmdline")
		return strings.TrimSpace(string(b))
	case "boot":
		b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
		return strings.TrimSpace(string(b))
	case "disks":
		return disks()
	case "net":
		return network()
	case "write": // DEVICE TEXT
		dev, text, _ := strings.Cut(arg, " ")
		return write("/dev/"+dev, text)
	case "poweroff":
		halt(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reboot":
		halt(unix.LINUX_REBOOT_CMD_RESTART)
	case "panic":
		os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	}
	return "unknown command"
}

// disks returns "vda ro=0 serial=root sectors=65536 queues=2 text=…;…" for each virtio disk.
func disks() string {
	var all []string
	devs, _ := filepath.Glob("/sys/block/vd*")
	for _, dev := range devs {
		name := filepath.Base(dev)
		queues, _ := filepath.Glob(dev + "/mq/*")
		head := make([]byte, 16)
		if f, err := os.Open("/dev/" + name); err == nil {
			io.ReadFull(f, head)
			f.Close()
		}
		all = append(all, fmt.Sprintf("%s ro=%s serial=%s sectors=%s queues=%d text=%s", name, read(dev+"/ro"),
			read(dev+"/serial"), read(dev+"/size"), len(queues), bytes.TrimRight(head, "\x00")))
	}
	return strings.Join(all, ";")
}

// network returns "eth0 mac=… queues=…" for each interface except lo.
func network() string {
	var all []string
	devs, _ := filepath.Glob("/sys/class/net/*")
	for _, dev := range devs {
		if filepath.Base(dev) == "lo" {
			continue
		}
		queues, _ := filepath.Glob(dev + "/queues/rx-*")
		all = append(all, fmt.Sprintf("%s mac=%s queues=%d", filepath.Base(dev), read(dev+"/address"), len(queues)))
	}
	return strings.Join(all, ";")
}

func read(path string) string {
	b, _ := os.ReadFile(path)
	return strings.TrimSpace(string(b))
}

func write(dev, text string) string {
	f, err := os.OpenFile(dev, os.O_WRONLY|unix.O_SYNC, 0)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	block := make([]byte, 512)
	copy(block, text)
	if _, err := f.Write(block); err != nil {
		return err.Error()
	}
	return "ok"
}

func halt(how int) {
	unix.Sync()
	unix.Reboot(how)
	select {}
}
