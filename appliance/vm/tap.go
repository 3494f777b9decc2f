package vm

import (
	"cmp"
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TUNVariable names another node than /dev/net/tun for opening TAPs, if it is in the environment: on a host where that is closed,
// `fleetingd run` creates a node for its user instead of opening it to everybody.
const TUNVariable = "FLEETINGD_TUN"

// TUN returns the device node for opening TAPs.
func TUN() string { return cmp.Or(os.Getenv(TUNVariable), "/dev/net/tun") }

// openTAP opens an existing TAP, with one descriptor for each of the pairs; the TAP may have more. Its owner needs
// no capability for that, but the flags must be those that it was created with.
func openTAP(n *Net, pairs int) ([]*os.File, error) {
	// Checked first, because TUNSETIFF by root would create a missing interface.
	link, err := netlink.LinkByName(n.TAP)
	if err != nil {
		return nil, fmt.Errorf("TAP %s: %w; create it with: fleetingd network up --plan FILE", n.TAP, err)
	}
	// The kernel refuses a second user of a single-queue TAP, but lets anyone join a multi-queue one and
	// distributes the packets between them.
	if tap, ok := link.(*netlink.Tuntap); ok && tap.Queues > 0 {
		return nil, tapError(n, unix.EBUSY)
	}
	var files []*os.File
	for range pairs {
		f, err := openQueue(n)
		if err != nil {
			closeAll(files)
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

func openQueue(n *Net) (*os.File, error) {
	tun := TUN()
	fd, err := unix.Open(tun, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		cure := "load its module with: modprobe tun"
		if errors.Is(err, unix.EACCES) {
			cure = "restore the mode that udev sets: chmod 0666 /dev/net/tun"
		}
		return nil, fmt.Errorf("open %s: %w; %s", tun, err, cure)
	}
	req, err := unix.NewIfreq(n.TAP)
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("TAP name %q: %w", n.TAP, err)
	}
	// No packet information, but the virtio header, as both VMMs expect.
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if n.Queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	req.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		unix.Close(fd)
		return nil, tapError(n, err)
	}
	return os.NewFile(uintptr(fd), "tap:"+n.TAP), nil
}

func tapError(n *Net, err error) error {
	why := "see `ip -d link show " + n.TAP + "`"
	switch {
	case errors.Is(err, unix.EBUSY):
		why = "another process, perhaps an earlier VM, has it open"
	case errors.Is(err, unix.EPERM):
		why = fmt.Sprintf("it does not belong to uid %d: fleetingd network up creates it for the plan's user", os.Getuid())
	case errors.Is(err, unix.EINVAL):
		why = fmt.Sprintf("it was created with other flags; %d queue pairs require IFF_NO_PI, IFF_VNET_HDR and, above one pair, "+
			"IFF_MULTI_QUEUE: fleetingd network up creates it with these", n.Queues)
	}
	return fmt.Errorf("open TAP %s: %w: %s", n.TAP, err, why)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
