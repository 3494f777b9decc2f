package guest

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/mdlayher/vsock"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// openChannel opens the guest's end of the channel: the virtio-serial port
// named plan.GuestPort, or else a vsock connection to the host. It tries until ctx ends, because the driver may be
// loaded later. If the host does not listen, it slows down to one try every 10 s, so that an idle worker stays idle.
func openChannel(ctx context.Context) (io.ReadWriteCloser, error) {
	wait := 5 * time.Millisecond
	for {
		conn, err := tryChannel()
		if err == nil {
			return conn, nil
		}
		if !pause(ctx, wait) {
			return nil, err
		}
		limit := 10 * time.Second
		if errors.Is(err, errNoDevice) {
			limit = time.Second
		}
		wait = min(2*wait, limit)
	}
}

var errNoDevice = errors.New("found neither a virtio-serial port " + plan.GuestPort + " nor a vsock device")

func tryChannel() (io.ReadWriteCloser, error) {
	if dev, err := findPort("/sys/class/virtio-ports"); err == nil {
		return openPort(dev)
	}
	if _, err := os.Stat("/dev/vsock"); err != nil {
		return nil, errNoDevice
	}
	return vsock.Dial(vsock.Host, plan.GuestVsock, nil)
}

// findPort finds the port's device by its name in sysfs: udev may create the link in /dev/virtio-ports later, or never.
func findPort(class string) (string, error) {
	names, err := filepath.Glob(filepath.Join(class, "*", "name"))
	if err != nil {
		return "", err
	}
	for _, p := range names {
		if b, err := os.ReadFile(p); err == nil && strings.TrimSpace(string(b)) == plan.GuestPort {
			return filepath.Join("/dev", filepath.Base(filepath.Dir(p))), nil
		}
	}
	return "", os.ErrNotExist
}

// port is a virtio-serial port. While no host is connected, its driver answers a
// read with 0 bytes and a poll with a hang-up, over and over. Waiting without spinning
// relies on an edge-triggered poller: the driver wakes its waiters when a host connects.
type port struct {
	f  *os.File
	rc syscall.RawConn
}

func openPort(dev string) (*port, error) {
	f, err := os.OpenFile(dev, os.O_RDWR|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	rc, err := f.SyscallConn()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &port{f, rc}, nil
}

func (p *port) Close() error { return p.f.Close() }

func (p *port) Read(b []byte) (n int, err error) {
	perr := p.rc.Read(func(fd uintptr) bool {
		n, err = retry(func() (int, error) { return syscall.Read(int(fd), b) })
		return n > 0 || (err != nil && !errors.Is(err, syscall.EAGAIN))
	})
	return max(n, 0), errors.Join(perr, err)
}

func (p *port) Write(b []byte) (int, error) {
	var done int
	var err error
	perr := p.rc.Write(func(fd uintptr) bool {
		for done < len(b) {
			var n int
			n, err = retry(func() (int, error) { return syscall.Write(int(fd), b[done:]) })
			if err != nil {
				return !errors.Is(err, syscall.EAGAIN)
			}
			done += n
		}
		return true
	})
	return done, errors.Join(perr, err)
}

func retry(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, syscall.EINTR) {
			return n, err
		}
	}
}
