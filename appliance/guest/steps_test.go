package guest

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/seed"
)

func TestRunCommand(t *testing.T) {
	for script, want := range map[string]struct {
		code int
		out  []string
		err  string
	}{
		"echo one; echo two >&2; printf three":   {out: []string{"one", "two", "three"}},
		"exit 42":                                {code: 42},
		"kill -9 $$":                             {code: -1, err: "signal: killed"},
		"cat; echo end":                          {out: []string{"end"}}, // stdin is empty, not the host's
		`printf '10%%\r20%%\r\rdone\n'`:          {out: []string{"10%", "20%", "done"}},
		`printf '\377\n'`:                        {out: []string{"?"}},
		"echo $HOME $DEBIAN_FRONTEND $FLEETINGD": {out: []string{"/root noninteractive"}},
	} {
		var out []string
		r := runCommand(t.Context(), func(l string) { out = append(out, l) }, "/bin/sh", "-c", script)
		if r.code != want.code || !cmp.Equal(out, want.out) || (r.err == nil) != (want.err == "") || r.err != nil && !strings.Contains(r.err.Error(), want.err) {
			t.Errorf("%q: code %d, %v, %q", script, r.code, r.err, out)
		}
	}
	if r := runCommand(t.Context(), nil, "/no/such/program"); r.code != -1 || !errors.Is(r.err, os.ErrNotExist) {
		t.Errorf("%+v", r)
	}
}

// TestRunCommandEnds: with all that it started.
func TestRunCommandEnds(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	pids := make(chan string, 1)
	r := runCommand(ctx, func(l string) {
		pids <- l
		cancel(errSessionOver)
	}, "/bin/sh", "-c", "sleep 1000 & echo $!; wait")
	if r.code != -1 || !errors.Is(r.err, errSessionOver) {
		t.Errorf("%+v", r)
	}
	child := "/proc/" + <-pids
	for end := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		state, err := os.ReadFile(child + "/stat")
		if err != nil || strings.Contains(string(state), ") Z ") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the step's child lives: %s", state)
		}
	}
}

func TestRunStepFile(t *testing.T) {
	p := filepath.Join(t.TempDir(), "a/b")
	if r := runStep(t.Context(), Step{File: &File{Path: p, Content: "x", Mode: "4750"}}, nil); r.code != 0 || r.err != nil {
		t.Fatalf("%+v", r)
	}
	if i, err := os.Stat(p); err != nil || i.Mode() != os.ModeSetuid|0o750 {
		t.Errorf("%v, %v", i.Mode(), err)
	}
	for want, f := range map[string]File{
		"not absolute": {Path: "x", Mode: "0644"}, `mode "rw" is not octal`: {Path: "/x", Mode: "rw"}, "not a directory": {Path: p + "/c", Mode: "0644"},
	} {
		if r := runStep(t.Context(), Step{File: &f}, nil); r.code != 1 || r.err == nil || !strings.Contains(r.err.Error(), want) {
			t.Errorf("%+v gave %+v", f, r)
		}
	}
	if r := runStep(t.Context(), Step{Name: "of the future"}, nil); r.code != -1 || r.err == nil {
		t.Errorf("%+v", r)
	}
}

func TestFindPort(t *testing.T) {
	class := tree(t, map[string]string{"vport1p1/name": "org.qemu.guest_agent.0\n", "vport2p7/name": PortName + "\n"})
	if dev, err := findPort(class); err != nil || dev != "/dev/vport2p7" {
		t.Errorf("%q, %v", dev, err)
	}
	if _, err := findPort(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestApplyNetwork on a real interface, in a namespace of the test's own.
func TestApplyNetwork(t *testing.T) {
	need.Root(t)
	runtime.LockOSThread() // and never unlocked: the thread ends with the namespace
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("skipped: no network namespaces here: %v", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "eth0"
	attrs.HardwareAddr = []byte{2, 0xfe, 0, 0, 0, 2}
	veth := netlink.NewVeth(attrs)
	veth.PeerName = "peer0"
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	peer, err := netlink.LinkByName("peer0")
	if err == nil {
		err = netlink.LinkSetUp(peer)
	}
	if err != nil {
		t.Fatal(err)
	}
	n := &seed.Network{
		MAC: "02:FE:00:00:00:02", MTU: 1400, Addresses: []netip.Addr{netip.MustParseAddr("172.16.0.9"), netip.MustParseAddr("fd00::9")},
		Gateways: []netip.Addr{netip.MustParseAddr("172.16.0.1"), netip.MustParseAddr("fd00::1")},
	}
	// /proc/sys is the thread's own namespace's.
	for range 2 { // the second time changes nothing
		if err := applyNetwork(t.Context(), n, "/proc/thread-self/root/proc/sys"); err != nil {
			t.Fatal(err)
		}
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if link.Attrs().MTU != 1400 {
		t.Errorf("MTU %d", link.Attrs().MTU)
	}
	for _, c := range []struct {
		family    int
		addr, gw  string
		tentative bool
	}{{netlink.FAMILY_V4, "172.16.0.9/32", "172.16.0.1", false}, {netlink.FAMILY_V6, "fd00::9/128", "fd00::1", false}} {
		addrs, err := netlink.AddrList(link, c.family)
		if err != nil || !hasAddr(addrs, c.addr) {
			t.Errorf("%v, %v: no %s that is usable at once", addrs, err, c.addr)
		}
		routes, err := netlink.RouteListFiltered(c.family, &netlink.Route{Dst: nil}, netlink.RT_FILTER_DST)
		if err != nil || len(routes) != 1 || routes[0].Gw.String() != c.gw || routes[0].Flags&int(netlink.FLAG_ONLINK) == 0 {
			t.Errorf("default route %v, %v", routes, err)
		}
	}
	n.Addresses, n.Gateways = n.Addresses[:1], n.Gateways[:1]
	if err := applyNetwork(t.Context(), n, "/proc/thread-self/root/proc/sys"); err != nil {
		t.Fatal(err)
	}
	if addrs, err := netlink.AddrList(link, netlink.FAMILY_V6); err != nil || len(addrs) != 0 {
		t.Errorf("a worker without IPv6 has %v, %v", addrs, err)
	}
}

func hasAddr(addrs []netlink.Addr, want string) bool {
	for _, a := range addrs {
		if a.IPNet.String() == want && a.Flags&unix.IFA_F_TENTATIVE == 0 {
			return true
		}
	}
	return false
}
