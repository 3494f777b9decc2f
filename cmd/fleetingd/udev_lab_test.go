package main

import (
	"context"
	"testing"
	"time"
)

// TestUdev: the network matches the plan even after udev has handled the new links. It sets a TAP's MAC address if it
// looked before "network up" set it, and then the kernel forgets the neighbour at the other end.
func TestUdev(t *testing.T) {
	lab := specLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	out, err := lab.Sh(ctx, `
		plan=/root/tree/etc/fleetingd/plan.json
		fleetingd compile /root/host.hcl -o /root/tree
		# Both speak netlink slowly, udev the more so: it has looked at the link when we set our address, and sets its own when we
		# would be done.
		timeout 60 strace -f -qq -e trace=sendto -e inject=sendto:delay_enter=3000000 -p $(pidof systemd-udevd) > /dev/null 2>&1 &
		until grep -q '^TracerPid:.[1-9]' /proc/$(pidof systemd-udevd)/status; do sleep 0.1; done
		timeout 60 strace -f -qq -o /dev/null -e trace=sendto -e inject=sendto:delay_enter=200000 fleetingd network up --plan $plan
		timeout 60 udevadm settle
		kill $!
		fleetingd network check --plan $plan
		ip -brief link show fleet0; ip neigh show nud permanent dev fleet0
	`)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(out)
}
