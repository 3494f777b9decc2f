package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// Up twice is up once, down twice is down once, and down leaves the host as it was.
func TestNetworkTwice(t *testing.T) {
	for name, six := range map[string]bool{"IPv4": false, "IPv6": true} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			p := l.plan(4, six)
			l.sh(l.host, "echo 1 > /proc/sys/net/ipv4/conf/lan0/forwarding; echo 1 > /proc/sys/net/ipv6/conf/lan0/forwarding")
			before := l.state()
			l.up(p)
			first := l.state()
			l.up(p)
			if diff := cmp.Diff(first, l.state()); diff != "" {
				t.Errorf("the second up changed:\n%s", diff)
			}
			if got := l.check(p); len(got) != 0 {
				t.Errorf("after up the network differs: %q", got)
			}
			w := l.worker(p, 0)
			l.serve(l.internet, server, 80)
			l.reaches(w.NsHandle, "tcp", server, 80, hostWAN)
			l.down(p)
			l.down(p)
			if diff := cmp.Diff(before, l.state()); diff != "" {
				t.Errorf("up and down left:\n%s", diff)
			}
			if _, err := os.Stat(notesPath(p)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the notes are still there: %v", err)
			}
			err := l.in(l.host, func() error {
				flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
				for _, f := range flows {
					if f.Forward.SrcIP.Equal(net.IP(p.Slots[0].Address.AsSlice())) {
						t.Errorf("connection tracking still knows %v", f)
					}
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// A host that has its default route from a router advertisement keeps it while it becomes a router itself.
func TestAdvertisedRouteStays(t *testing.T) {
	l := newLab(t)
	p := l.plan(1, true)
	l.sh(l.host, "ip -6 route del default; echo 1 > /proc/sys/net/ipv6/conf/eno1/accept_ra")
	advertise := func() {
		from := strings.Fields(l.sh(l.internet, "ip -6 -o addr show dev wan scope link"))[3]
		body := []byte{64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0} // a router for 1,800 s (RFC 4861, 4.2)
		link := strings.TrimSpace(l.sh(l.internet, "ip -o link show wan | sed 's/.*ether //; s/ .*//'"))
		l.wire(l.internet, "wan", frame("33:33:00:00:00:01", link, unix.ETH_P_IPV6,
			icmp6(netip.MustParsePrefix(from).Addr().String(), "ff02::1", 134, body)))
	}
	route := func() bool { return strings.Contains(l.sh(l.host, "ip -6 route show default"), "proto ra") }
	l.wait("the host's default route", func() bool { advertise(); return route() })
	l.up(p)
	if !route() {
		t.Error("up took the host's default route")
	}
	l.sh(l.host, "ip -6 route flush default")
	l.wait("the host to take advertisements still", func() bool { advertise(); return route() })
	l.down(p)
	if !route() {
		t.Error("down took the host's default route")
	}
}

// faulty fails its nth change, once.
type faulty struct {
	door
	left int
	what string
}

var errInjected = errors.New("injected")

func (f *faulty) fails(what string) error {
	if f.left--; f.left == 0 {
		f.what = what
		return fmt.Errorf("%s: %w", what, errInjected)
	}
	return nil
}

func (f *faulty) makeTAPs(ctx context.Context, taps []tap) error {
	// The last of them fails: those before are there already.
	if err := f.fails("make TAPs"); err != nil {
		broken := append([]tap{}, taps...)
		broken[len(broken)-1].Slot.Address = netip.Addr{}
		return errors.Join(err, f.door.makeTAPs(ctx, broken))
	}
	return f.door.makeTAPs(ctx, taps)
}

func (f *faulty) repairTAPs(r []repair) error {
	if err := f.fails("mend TAPs"); err != nil { // half of them are
		return errors.Join(err, f.door.repairTAPs(r[:len(r)/2]))
	}
	return f.door.repairTAPs(r)
}

func (f *faulty) deleteTAPs(t []tap) error {
	if err := f.fails("delete TAPs"); err != nil {
		return err
	}
	return f.door.deleteTAPs(t)
}

func (f *faulty) addAddress(a netip.Addr) error {
	if err := f.fails("add " + a.String()); err != nil {
		return err
	}
	return f.door.addAddress(a)
}

func (f *faulty) deleteAddress(a netip.Addr) error {
	if err := f.fails("delete " + a.String()); err != nil {
		return err
	}
	return f.door.deleteAddress(a)
}

func (f *faulty) addRule(p policy) error {
	if err := f.fails("add rule " + p.String()); err != nil {
		return err
	}
	return f.door.addRule(p)
}

func (f *faulty) deleteRule(p policy) error {
	if err := f.fails("delete rule " + p.String()); err != nil {
		return err
	}
	return f.door.deleteRule(p)
}

func (f *faulty) writeSysctl(s setting) error {
	if err := f.fails("write " + s.path); err != nil {
		return err
	}
	return f.door.writeSysctl(s)
}

func (f *faulty) load(r plan.Ruleset, slots []plan.Slot) error {
	if err := f.fails("load"); err != nil {
		return err
	}
	return f.door.load(r, slots)
}

// upWithFault brings p up with the nth change failing. What failed is "" where there is no nth.
func (l *lab) upWithFault(p *plan.Plan, n int) (what string, err error) {
	err = l.in(l.host, func() error {
		if err := os.MkdirAll(notesDir(p), 0o755); err != nil {
			return err
		}
		k, err := openKernel()
		if err != nil {
			return err
		}
		defer k.close()
		d := &faulty{door: k, left: n}
		err = work(p, owner, d, func(n *network) error { return n.up(l.Context()) })
		what = d.what
		return err
	})
	return what, err
}

// A first up that fails, wherever it does, leaves nothing.
func TestFailedUpLeavesNothing(t *testing.T) {
	l := newLab(t)
	p := l.plan(3, true)
	before := l.state()
	for n := 1; ; n++ {
		what, err := l.upWithFault(p, n)
		if what == "" {
			if err != nil || n < 5 {
				t.Errorf("after %d faults: %v", n-1, err)
			}
			break
		}
		if !errors.Is(err, errInjected) {
			t.Errorf("%s fails: %v", what, err)
		}
		if diff := cmp.Diff(before, l.state()); diff != "" {
			t.Fatalf("%s fails, and it leaves:\n%s", what, diff)
		}
		if _, err := os.Stat(notesPath(p)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s fails, and the notes stay: %v", what, err)
		}
	}
}

// changed is another plan for the same host: a slot less and one more, other rules, MTU, gateway.
func changed(l *lab, p *plan.Plan) *plan.Plan {
	q := *p
	q.Slots = append([]plan.Slot{}, p.Slots...)
	last := len(q.Slots) - 1
	q.Slots[last].TAP = "fleet77"
	q.Slots[0].Address, q.Slots[1].Address = q.Slots[1].Address, q.Slots[0].Address // each other's
	q.Network.MTU = 1400
	q.Network.Gateway = netip.MustParseAddr("172.16.120.200")
	q.Network.Egress = []plan.Egress{{Name: "nothing", Action: "deny"}}
	rules(&q)
	return &q
}

// A plan that takes the place of another is either there or, where that failed, the other still is.
func TestChangedPlan(t *testing.T) {
	l := newLab(t)
	p := l.plan(4, true)
	before := l.state()
	l.up(p)
	q := changed(l, p)
	for n := 1; ; n++ {
		what, err := l.upWithFault(q, n)
		if what == "" {
			if err != nil || n < 5 {
				t.Fatalf("after %d faults: %v", n-1, err)
			}
			break
		}
		if !errors.Is(err, errInjected) {
			t.Errorf("%s fails: %v", what, err)
		}
		if got := l.check(p); len(got) != 0 {
			t.Fatalf("%s fails, and of the former plan's network differs: %q", what, got)
		}
	}
	if got := l.check(q); len(got) != 0 {
		t.Errorf("the network differs: %q", got)
	}
	out := l.sh(l.host, "ip -br link; ip addr show lo; ip route; ip neigh")
	if strings.Contains(out, "fleet3") || strings.Contains(out, "172.16.120.1 ") {
		t.Errorf("something of the former plan is left:\n%s", out)
	}
	l.down(q)
	if diff := cmp.Diff(before, l.state()); diff != "" {
		t.Errorf("down left:\n%s", diff)
	}
}

// What belongs to others is refused before anything is changed, and the error says what to do.
func TestUpRefuses(t *testing.T) {
	for _, c := range []struct {
		name, prepare string
		change        func(*plan.Plan)
		want          []string
	}{
		{name: "no egress interface", change: func(p *plan.Plan) { p.EgressInterface = "eno7" },
			want: []string{`egress_interface "eno7" does not exist`, "br0", "eno1", "lan0"}},
		{name: "a bridge of a TAP's name", prepare: "ip link add fleet1 type bridge",
			want: []string{"TAP fleet1", "a bridge link of this name exists and is not ours"}},
		{name: "a TAP of a TAP's name", prepare: "ip tuntap add fleet1 mode tap vnet_hdr user 54321 group 54321",
			want: []string{"TAP fleet1", "not ours"}},
		{name: "a table of our name", prepare: "nft 'add table inet fleetingd; add chain inet fleetingd prerouting'",
			want: []string{"table inet fleetingd", "not made by fleetingd", "nft delete table inet fleetingd"}},
		{name: "the LAN's addresses", change: func(p *plan.Plan) { p.Network.Subnet = netip.MustParsePrefix("10.20.0.0/16") },
			want: []string{"10.20.0.0/16", "overlaps route 10.20.0.0/24 on lan0 in table main"}},
		{name: "a route inside the subnet", prepare: "ip route add 172.16.120.128/25 via 10.20.0.15",
			want: []string{"172.16.120.0/24", "172.16.120.128/25", "lan0"}},
		{name: "ARP is not answered", prepare: "echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore",
			want: []string{"arp_ignore is 1", "172.16.120.1"}},
		{name: "no IPv6 on the host", prepare: "echo 1 > /proc/sys/net/ipv6/conf/lo/disable_ipv6",
			want: []string{"subnet6", "no IPv6"}},
		{name: "lo is down", prepare: "ip link set lo down", want: []string{"link lo is down", "ip link set lo up"}},
		{name: "several at once", prepare: "nft add table arp fleetingd; ip link set lo down",
			want: []string{"table arp fleetingd", "link lo is down"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			p := l.plan(3, true)
			if c.prepare != "" {
				l.sh(l.host, c.prepare)
			}
			if c.change != nil {
				c.change(p)
			}
			before := l.state()
			err := l.in(l.host, func() error { return NetworkUp(t.Context(), p, owner) })
			wantError(t, err, c.want...)
			if err := l.in(l.host, func() error { return NetworkDown(t.Context(), p) }); err != nil {
				t.Errorf("down: %v", err) // and it touches nothing of theirs
			}
			if diff := cmp.Diff(before, l.state()); diff != "" {
				t.Errorf("it changed:\n%s", diff)
			}
		})
	}
}

// A route that holds the subnet, over a router, is a VPN's or a default route: it may.
func TestUpTakesAWiderRoute(t *testing.T) {
	l := newLab(t)
	p := l.plan(1, false)
	l.sh(l.host, "ip route add 172.16.0.0/12 via 10.20.0.15")
	l.up(p)
}

// The network of one plan is not another's to change or to take down.
func TestTwoPlans(t *testing.T) {
	l := newLab(t)
	p := l.plan(2, false)
	l.up(p)
	q := l.plan(2, false)
	q.Paths.State, q.Paths.Run = "/srv/other", p.Paths.Run // as compile has it
	before := l.state()
	err := l.in(l.host, func() error { return NetworkUp(t.Context(), q, owner) })
	wantError(t, err, "network of another plan is up", "state_dir /var/lib/lab: TAP fleet0 and 1 more", "network down --all")
	err = l.in(l.host, func() error { return NetworkDown(t.Context(), q) })
	wantError(t, err, "this plan's network is not up, but another plan's is", "/var/lib/lab", "network down --all")
	if diff := cmp.Diff(before, l.state()); diff != "" {
		t.Errorf("it changed:\n%s", diff)
	}
	l.down(p) // what there is to put back is still known
	if out := l.sh(l.host, "cat /proc/sys/net/ipv4/ip_forward; ip addr show lo"); !strings.HasPrefix(out, "0\n") || strings.Contains(out, "172.16.120.1/") {
		t.Errorf("its own down left:\n%s", out)
	}
}

// What is up goes without its plan, and without the notes too, but for the settings that only they know.
func TestDownAll(t *testing.T) {
	for _, c := range []struct{ name, lose string }{
		{name: "all is there"},
		{name: "no notes", lose: "notes"},
		{name: "no TAPs", lose: "for i in 0 1 2; do ip link del fleet$i; done"},
		{name: "no rules", lose: "nft flush ruleset; ip rule del priority 70; ip -6 rule del priority 70"},
		{name: "another's links and tables", lose: "ip link add fleet9 type veth peer name x; nft add table inet other; nft add table ip fleetingd"},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newLab(t)
			p := l.plan(3, true)
			l.sh(l.host, "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
			if strings.HasPrefix(c.lose, "ip link add") {
				l.sh(l.host, c.lose)
			}
			before := l.state()
			l.up(p)
			switch {
			case c.lose == "notes":
				if err := os.Remove(notesPath(p)); err != nil {
					t.Fatal(err)
				}
			case !strings.HasPrefix(c.lose, "ip link add"):
				l.sh(l.host, c.lose)
			}
			for _, want := range []map[string][]string{{p.Paths.State: {"fleet0", "fleet1", "fleet2"}}, {}} { // the second time there is nothing
				if strings.HasPrefix(c.lose, "for") {
					want = map[string][]string{}
				}
				var got map[string][]string
				err := l.in(l.host, func() (err error) { got, err = NetworkDownAll(t.Context(), p.Paths.Run); return err })
				if err != nil || !cmp.Equal(got, want) {
					t.Errorf("down says %v, %v, want %v", got, err, want)
				}
				if diff := cmp.Diff(before, l.state()); diff != "" {
					t.Errorf("down left:\n%s", diff)
				}
			}
			if _, err := os.Stat(notesPath(p)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the notes stay: %v", err)
			}
		})
	}
}

// A running VM's TAP is not taken from it; what can be changed under it is.
func TestTAPInUse(t *testing.T) {
	l := newLab(t)
	p := l.plan(3, false)
	l.up(p)
	w := l.worker(p, 1)
	l.serve(l.internet, server, 80)
	l.reaches(w.NsHandle, "tcp", server, 80, hostWAN)
	before := l.state()

	q := *p
	q.Slots = append([]plan.Slot{}, p.Slots...)
	q.Slots[1].Queues = 1
	err := l.in(l.host, func() error { return NetworkUp(t.Context(), &q, owner) })
	wantError(t, err, "TAP fleet1", "number of queues", "a running VM has it open")
	q.Slots = p.Slots[:1]
	err = l.in(l.host, func() error { return NetworkUp(t.Context(), &q, owner) })
	wantError(t, err, "TAP fleet1", "no longer in the plan", "a running VM has it open")
	if diff := cmp.Diff(before, l.state()); diff != "" {
		t.Errorf("it changed:\n%s", diff)
	}

	q = *p
	q.Slots = append([]plan.Slot{}, p.Slots...)
	q.Slots[0].Queues, q.Slots[2].Queues = 4, 4 // nobody has these open: they are made anew
	q.Network.MTU = 1400
	l.up(&q)
	if got := l.check(&q); len(got) != 0 {
		t.Errorf("the network differs: %q", got)
	}
	l.reaches(w.NsHandle, "tcp", server, 80, hostWAN)
	l.reaches(l.worker(&q, 2).NsHandle, "tcp", server, 80, hostWAN)
}

// The owner opens its TAPs without a right in the world, and with the flags that they were made with; nobody else does.
func TestOwnerOpensItsTAPs(t *testing.T) {
	l := newLab(t)
	p := l.plan(2, false)
	l.up(p)
	// Where udev made it, everybody may open it.
	dir, err := os.MkdirTemp("", "fleetingd-tun")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	device := filepath.Join(dir, "tun")
	err = errors.Join(os.Chmod(dir, 0o755), unix.Mknod(device, unix.S_IFCHR, int(unix.Mkdev(10, 200))), os.Chmod(device, 0o666))
	if err != nil {
		t.Fatal(err)
	}
	const flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR
	open := func(uid, gid uintptr, name string, flags uint16) error {
		return l.in(l.host, func() error {
			// The system calls themselves: they change this thread, which ends with the function.
			for _, call := range [][4]uintptr{{unix.SYS_SETGROUPS}, {unix.SYS_SETRESGID, gid, gid, gid}, {unix.SYS_SETRESUID, uid, uid, uid}} {
				if _, _, errno := unix.RawSyscall(call[0], call[1], call[2], call[3]); errno != 0 {
					return fmt.Errorf("become %d:%d: %w", uid, gid, errno)
				}
			}
			status, err := os.ReadFile("/proc/thread-self/status")
			if err != nil || !strings.Contains(string(status), "CapEff:\t0000000000000000") {
				return fmt.Errorf("this thread still has capabilities (%w):\n%s", err, status)
			}
			f, err := openTAP(device, name, flags)
			if err != nil {
				return err
			}
			return f.Close()
		})
	}
	if err := open(54321, 54321, "fleet0", flags); err != nil {
		t.Errorf("its owner cannot open fleet0: %v", err)
	}
	if err := open(54321, 54321, "fleet1", flags|unix.IFF_MULTI_QUEUE); err != nil {
		t.Errorf("its owner cannot open fleet1: %v", err)
	}
	if err := open(54321, 54321, "fleet1", flags); !errors.Is(err, unix.EINVAL) {
		t.Errorf("fleet1 opened without IFF_MULTI_QUEUE: %v", err)
	}
	if err := open(54322, 54321, "fleet0", flags); !errors.Is(err, unix.EPERM) {
		t.Errorf("fleet0 opened by another user: %v", err)
	}
	if err := open(54321, 54322, "fleet0", flags); !errors.Is(err, unix.EPERM) {
		t.Errorf("fleet0 opened without the group: %v", err)
	}
	if err := open(54321, 54321, "fleet7", flags); !errors.Is(err, unix.EPERM) {
		t.Errorf("the owner made a link: %v", err)
	}
}

func TestNotes(t *testing.T) {
	p := &plan.Plan{Paths: plan.Paths{Run: filepath.Join(t.TempDir(), "run")}}
	if err := os.Mkdir(notesDir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(notesPath(p), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	read := func() error { _, err := readNotes(p); return err }

	write(`{"boot":`)
	wantError(t, read(), "network.json", "damaged", "remove it")
	write(`{"boot":"` + boot + `","sysctls":[{"path":"net/ipv4/../../kernel/core_pattern","value":"1"}]}`)
	wantError(t, read(), "network.json", "not written by fleetingd", "core_pattern")
	write(`{"boot":"` + boot + `","sysctls":[{"path":"net/ipv4/ip_forward","value":"1; rm"}]}`)
	wantError(t, read(), "not written by fleetingd")
	write(`{"boot":"earlier","addresses":["10.0.0.1"]}`)
	if n, err := readNotes(p); err != nil || len(n.Addresses) != 0 || n.Boot != boot {
		t.Errorf("the notes of another boot are read as %+v, %v", n, err)
	}
	want := &notes{Boot: boot, Sysctls: []noted{{"net/ipv6/conf/eth0.5/forwarding", "0"}}}
	if err := writeNotes(p, want); err != nil {
		t.Fatal(err)
	}
	if n, err := readNotes(p); err != nil || !cmp.Equal(n, want) {
		t.Errorf("written %+v, read %+v, %v", want, n, err)
	}
	if os.Getuid() == 0 {
		if err := os.Chown(notesPath(p), 54321, 54321); err != nil {
			t.Fatal(err)
		}
		wantError(t, read(), "belongs to uid 54321")
	}
	if err := os.Remove(notesPath(p)); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/etc/hostname", notesPath(p)); err != nil {
		t.Fatal(err)
	}
	wantError(t, read(), "network.json")
}

// TestNetworkScale brings up and takes down what the design promises, and logs how long that takes.
func TestNetworkScale(t *testing.T) {
	need.Slow(t)
	few := map[bool]int{} // the rules of ten slots
	for _, slots := range []int{10, 1000, 4000} {
		for _, six := range []bool{false, true} {
			l := newLab(t)
			p := l.plan(slots, six)
			start := time.Now()
			l.up(p)
			up := time.Since(start)
			start = time.Now()
			l.up(p)
			again := time.Since(start)
			rules := strings.Count(l.sh(l.host, "nft -s list ruleset | grep comment"), "\n")
			start = time.Now()
			l.down(p)
			t.Logf("%d slots, IPv6 %v: up %v, again %v, down %v, %d rules", slots, six, up, again, time.Since(start), rules)
			if slots == 10 {
				few[six] = rules
			}
			if rules != few[six] || rules == 0 {
				t.Errorf("%d slots, IPv6 %v: %d rules, and %d for ten", slots, six, rules, few[six])
			}
		}
	}
}

func BenchmarkNetwork(b *testing.B) {
	for _, slots := range []int{64, 1000} {
		b.Run(fmt.Sprint(slots), func(b *testing.B) {
			l := newLab(b)
			p := l.plan(slots, false)
			for b.Loop() {
				l.up(p)
				l.down(p)
			}
		})
	}
}
