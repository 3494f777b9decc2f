package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// udevPatience is how long udev may take for a new link; for all of them it is that and a tenth of a second for each.
const udevPatience = 30 * time.Second

// udev is where systemd-udevd keeps its socket and its database (sd_device_get_is_initialized(3)).
const (
	udevControl  = "/run/udev/control"
	udevDatabase = "/run/udev/data"
)

// waitUdev waits until udev has done what it does to new links, where it is told of them. One of that is to give a TAP
// a MAC address, made of its name and the machine's id (MACAddressPolicy= in systemd.link(5); Debian and others ship it set in
// 99-default.link). It may have decided so before the link got ours, and with every new MAC address the kernel forgets a link's
// neighbours, the permanent ones too (neigh_changeaddr): then no packet would find its worker.
func waitUdev(ctx context.Context, index []int) error {
	if !udevIsTold() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, udevPatience+time.Duration(len(index))*100*time.Millisecond)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for _, i := range index {
		for {
			_, err := os.Stat(fmt.Sprintf("%s/n%d", udevDatabase, i))
			if err == nil {
				break
			}
			if !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("udev's database: %w", err)
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
				return fmt.Errorf("udev has not finished with the link number %d yet, and might change it later "+
					"(what it is at: udevadm settle; journalctl -u systemd-udevd): %w", i, ctx.Err())
			}
		}
	}
	return nil
}

// udevIsTold reports whether udev runs and hears of links of this thread's network namespace: the kernel tells it of its
// own alone. That is the namespace of the first process, also where we may not look at that one's.
func udevIsTold() bool {
	if err := unix.Access(udevControl, unix.F_OK); err != nil {
		return false
	}
	own, err := os.Readlink("/proc/thread-self/ns/net")
	first, err1 := os.Readlink("/proc/1/ns/net")
	return err != nil || err1 != nil || own == first
}
