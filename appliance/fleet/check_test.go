package fleet

import (
	"errors"
	"net"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// TestCheckLinks uses real interfaces, in a network namespace of its own.
func TestCheckLinks(t *testing.T) {
	need.Root(t)
	// The thread stays in that namespace: it is not unlocked, so it ends with the test.
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	p := testPlan("/x", 3)
	slots := p.Slots[:2]
	err = checkLinks(p, slots)
	if err == nil || !strings.Contains(err.Error(), "2 of the pool's 2 TAPs do not exist (the first is fltest0)") {
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
	if err == nil || !strings.Contains(err.Error(), "1 of the pool's 3 interfaces are not TAPs that uid 0 may open (the first is fltest2)") {
		t.Errorf("a veth: %v", err)
	}
}

// TestInitRoutes: Init logs what keeps jobs from the internet, and fails if the host cannot reach its workers.
func TestInitRoutes(t *testing.T) {
	h := newHost(t, 1)
	var asked []string
	routes := func(trouble string, err error) func(*plan.Plan, []plan.Slot) ([]string, error) {
		return func(_ *plan.Plan, slots []plan.Slot) ([]string, error) {
			for _, s := range slots {
				asked = append(asked, s.TAP)
			}
			return []string{trouble}, err
		}
	}
	g := h.group()
	g.opts.Routes = routes("link eth0 is a port of br0", errors.New("TAP fltest0 is not reached: table 52"))
	_, err := g.Init(t.Context(), h.logger(), provider.Settings{})
	if err == nil || !strings.Contains(err.Error(), "TAP fltest0 is not reached: table 52") {
		t.Errorf("Init without a way to the worker: %v", err)
	}
	h.shutdown(g)
	g = h.group()
	g.opts.Routes = routes("link eth0 is a port of br0", nil)
	h.init(g)
	if !strings.Contains(h.log.String(), "link eth0 is a port of br0") {
		t.Errorf("the log does not name the trouble:\n%s", h.log)
	}
	if !slices.Equal(asked, []string{"fltest0", "fltest0"}) { // without the slot for prebuilds
		t.Errorf("asked about %q", asked)
	}
}
