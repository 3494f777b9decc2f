package fleet

import (
	"net"
	"runtime"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/fleetingd/fleetingd/appliance/need"
)

// TestCheckLinks asks the kernel about real interfaces, in a namespace of their own.
func TestCheckLinks(t *testing.T) {
	need.Root(t)
	// The thread is in the wrong namespace afterwards: it is not unlocked, and so ends with the test.
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	p := testPlan("/x", 3)
	slots := p.Slots[:2]
	err = checkLinks(p, slots)
	if err == nil || !strings.Contains(err.Error(), "2 of the pool's 2 TAPs do not exist (fltest0 is the first)") {
		t.Errorf("no TAPs: %v", err)
	}
	for _, s := range slots {
		tap := &netlink.Tuntap{LinkAttrs: netlink.NewLinkAttrs(), Mode: netlink.TUNTAP_MODE_TAP,
			Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR | netlink.TUNTAP_ONE_QUEUE, Owner: 1234, Group: 1234}
		tap.Name = s.TAP
		if err := netlink.LinkAdd(tap); err != nil {
			t.Fatal(err)
		}
	}
	if err := checkLinks(p, slots); err != nil {
		t.Errorf("two TAPs, as root: %v", err)
	}
	link, err := netlink.LinkByName(slots[0].TAP)
	if err != nil {
		t.Fatal(err)
	}
	if !mayOpen(link, 1234) || mayOpen(link, 1235) {
		t.Errorf("the owner's uid is not what tells: %+v", link)
	}
	veth := netlink.NewVeth(netlink.NewLinkAttrs())
	veth.Name, veth.PeerName, veth.HardwareAddr = p.Slots[2].TAP, "peer", net.HardwareAddr{2, 0, 0, 0, 0, 1}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	err = checkLinks(p, p.Slots[:3])
	if err == nil || !strings.Contains(err.Error(), "1 of the pool's 3 interfaces are no TAPs that uid 0 may open (fltest2 is the first)") {
		t.Errorf("a veth: %v", err)
	}
}
