package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// Addresses of the lab. The internet's are global, so that the rules take them for what they stand for.
const (
	server    = "93.184.216.34"
	server6   = "2606:4700::34"
	metadata  = "169.254.169.254"
	hostWAN   = "198.51.100.2"
	hostWAN6  = "2001:db8:1::2"
	hostLAN   = "10.20.0.1"
	lanStore  = "10.20.0.15"
	lanOther  = "10.20.0.16"
	neighbour = "192.168.77.2"
)

// lab is a host in a network namespace, and around it, in their own: the internet behind eno1, a LAN behind lan0, and a
// neighbour of the workers' on a bridge. The machine's own namespace is never touched.
type lab struct {
	testing.TB
	host, internet, lan, neighbour netns.NsHandle
}

func newLab(t testing.TB) *lab {
	t.Helper()
	need.Root(t)
	need.Tools(t, "ip", "nft")
	l := &lab{TB: t}
	for _, ns := range []*netns.NsHandle{&l.host, &l.internet, &l.lan, &l.neighbour} {
		*ns = l.namespace()
	}
	l.veth(l.host, "eno1", l.internet, "wan")
	l.veth(l.host, "lan0", l.lan, "lan")
	l.veth(l.host, "veth0", l.neighbour, "eth0")
	l.sh(l.host, `
		# The kernel answers each peer with a few errors a second only, and these tests ask for many.
		echo 0 > /proc/sys/net/ipv4/icmp_ratelimit; echo 0 > /proc/sys/net/ipv6/icmp/ratelimit
		ip addr add 198.51.100.2/24 dev eno1; ip -6 addr add 2001:db8:1::2/64 dev eno1 nodad
		ip addr add 10.20.0.1/24 dev lan0
		ip link add br0 type bridge; ip link set br0 up; ip link set veth0 master br0
		ip addr add 192.168.77.1/24 dev br0
		ip route add default via 198.51.100.1; ip -6 route add default via 2001:db8:1::1`)
	l.sh(l.internet, `
		ip addr add 198.51.100.1/24 dev wan; ip -6 addr add 2001:db8:1::1/64 dev wan nodad
		ip addr add 93.184.216.34/32 dev lo; ip addr add 169.254.169.254/32 dev lo
		ip -6 addr add 2606:4700::34/128 dev lo nodad
		ip route add 172.16.120.0/24 via 198.51.100.2; ip route add 192.168.77.0/24 via 198.51.100.2`)
	l.sh(l.lan, `ip addr add 10.20.0.15/24 dev lan; ip addr add 10.20.0.16/24 dev lan; ip route add default via 10.20.0.1`)
	l.sh(l.neighbour, `ip addr add 192.168.77.2/24 dev eth0; ip route add default via 192.168.77.1`)
	// The kernel gives a link its multicast route when it has seen the other end come up, and calls its addresses tentative for
	// a while: a test would take either for a change.
	l.sh(l.host, `
		for dev in eno1 lan0 veth0 br0; do
			for try in $(seq 1000); do
				! ip -6 route show table local dev $dev | grep -q ^multicast || continue 2
				sleep 0.01
			done
			echo "$dev has no multicast route"; ip -6 route show table local; exit 1
		done
		for try in $(seq 1000); do
			[ -n "$(ip -6 addr show tentative)" ] || exit 0
			sleep 0.01
		done
		ip -6 addr; exit 1`)
	return l
}

// namespace is a new one, with lo up.
func (l *lab) namespace() netns.NsHandle {
	l.Helper()
	made := make(chan netns.NsHandle)
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		ns, err := netns.New()
		if err != nil {
			failed <- err
			return
		}
		made <- ns
	}()
	select {
	case err := <-failed:
		l.Fatalf("network namespace: %v", err)
		return netns.None()
	case ns := <-made:
		l.Cleanup(func() { ns.Close() })
		l.sh(ns, "echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad; ip link set lo up")
		return ns
	}
}

// in runs f on a thread in a namespace.
func (l *lab) in(ns netns.NsHandle, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := netns.Set(ns)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

func (l *lab) try(ns netns.NsHandle, script string) (string, error) {
	var out []byte
	err := l.in(ns, func() error {
		var err error
		out, err = exec.Command("sh", "-euc", script).CombinedOutput()
		return err
	})
	return string(out), err
}

func (l *lab) sh(ns netns.NsHandle, script string) string {
	l.Helper()
	out, err := l.try(ns, script)
	if err != nil {
		l.Fatalf("%s\n%s%v", script, out, err)
	}
	return out
}

func (l *lab) veth(a netns.NsHandle, nameA string, b netns.NsHandle, nameB string) {
	l.Helper()
	err := l.in(a, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = nameA
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: nameB, PeerNamespace: netlink.NsFd(b)})
	})
	if err != nil {
		l.Fatalf("veth %s: %v", nameA, err)
	}
	l.sh(a, "ip link set "+nameA+" up")
	l.sh(b, "ip link set "+nameB+" up")
}

// plan is a host's with so many slots, IPv6 or not, every second TAP with two queues.
func (l *lab) plan(slots int, six bool) *plan.Plan {
	p := &plan.Plan{Version: plan.Version, Host: "lab", EgressInterface: "eno1", User: "nobody",
		Paths: plan.Paths{State: "/var/lib/lab", Run: filepath.Join(l.TempDir(), "run")}}
	p.Network = plan.Network{
		Subnet: netip.MustParsePrefix("172.16.120.0/24"), Gateway: netip.MustParseAddr("172.16.120.1"),
		DNS: []netip.Addr{netip.MustParseAddr("1.1.1.3")}, MTU: 1500, HostMAC: compile.HostMAC, GuestMAC: compile.GuestMAC,
	}
	if slots > 250 {
		p.Network.Subnet = netip.MustParsePrefix("172.16.0.0/16")
		p.Network.Gateway = netip.MustParseAddr("172.16.0.1")
	}
	a, a6 := p.Network.Gateway, netip.MustParseAddr("fd7e:1ee7::1")
	if six {
		subnet6, gateway6 := netip.MustParsePrefix("fd7e:1ee7::/64"), a6
		p.Network.Subnet6, p.Network.Gateway6 = &subnet6, &gateway6
	}
	for i := range slots {
		a, a6 = a.Next(), a6.Next()
		s := plan.Slot{Index: i, TAP: fmt.Sprintf("fleet%d", i), Address: a, Queues: 1 + i%2, Connections: 4096}
		if six {
			own := a6
			s.Address6 = &own
		}
		p.Slots = append(p.Slots, s)
	}
	rules(p)
	return p
}

// rules makes the plan's ruleset anew.
func rules(p *plan.Plan) {
	var limits []int
	for _, s := range p.Slots {
		limits = append(limits, s.Connections)
	}
	slices.Sort(limits)
	p.Network.Ruleset = compile.Ruleset(p.EgressInterface, p.Network, slices.Compact(limits)...)
}

// owner is somebody without rights.
var owner = Options{UID: 54321, GID: 54321}

func (l *lab) up(p *plan.Plan) {
	l.Helper()
	if err := l.in(l.host, func() error { return NetworkUp(l.Context(), p, owner) }); err != nil {
		l.Fatal(err)
	}
}

func (l *lab) down(p *plan.Plan) {
	l.Helper()
	if err := l.in(l.host, func() error { return NetworkDown(l.Context(), p) }); err != nil {
		l.Fatal(err)
	}
}

func (l *lab) check(p *plan.Plan) []string {
	l.Helper()
	var found []string
	err := l.in(l.host, func() error {
		differences, err := NetworkCheck(l.Context(), p, owner)
		for _, d := range differences {
			found = append(found, d.String())
		}
		return err
	})
	if err != nil {
		l.Fatal(err)
	}
	return found
}

// state is all of the host's network, as text.
func (l *lab) state() string {
	l.Helper()
	return l.sh(l.host, `
		ip -d link | sed 's/[a-z]*_timer *[0-9.]*//g'; ip addr; ip -4 route show table all; ip -6 route show table all
		ip rule; ip -6 rule; ip neigh | grep -v -e STALE -e REACHABLE -e DELAY -e PROBE -e FAILED -e INCOMPLETE || true
		ip neigh show proxy; nft -s list ruleset
		for f in /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv?/conf/*/forwarding /proc/sys/net/ipv6/conf/*/accept_ra; do
			echo $f $(cat $f)
		done`)
}

// worker is a machine at the other end of a slot's TAP: its frames go by descriptor, as a VM's do.
type worker struct {
	netns.NsHandle
	slot plan.Slot
}

func (l *lab) worker(p *plan.Plan, slot int) worker {
	l.Helper()
	s := p.Slots[slot]
	w := worker{l.namespace(), s}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	hostFlags := flags
	if s.Queues > 1 {
		hostFlags |= unix.IFF_MULTI_QUEUE
	}
	hostEnd := l.open(l.host, s.TAP, hostFlags)
	guestEnd := l.open(w.NsHandle, "eth0", flags)
	go pump(hostEnd, guestEnd)
	go pump(guestEnd, hostEnd)
	l.sh(w.NsHandle, fmt.Sprintf(`
		ip link set eth0 address %s; ip link set eth0 up mtu %d; ip addr add %s/32 dev eth0
		ip route add default via %s dev eth0 onlink`, p.Network.GuestMAC, p.Network.MTU, s.Address, p.Network.Gateway))
	if s.Address6 != nil {
		l.sh(w.NsHandle, fmt.Sprintf(`ip -6 addr add %s/128 dev eth0 nodad; ip -6 route add default via %s dev eth0 onlink`,
			s.Address6, p.Network.Gateway6))
	}
	return w
}

func (l *lab) open(ns netns.NsHandle, name string, flags uint16) *os.File {
	l.Helper()
	var f *os.File
	if err := l.in(ns, func() (err error) { f, err = openTAP("/dev/net/tun", name, flags); return err }); err != nil {
		l.Fatalf("open TAP %s: %v", name, err)
	}
	l.Cleanup(func() { f.Close() })
	return f
}

func openTAP(device, name string, flags uint16) (*os.File, error) {
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// pump copies frames until an end is closed.
func pump(to io.Writer, from io.Reader) {
	frame := make([]byte, 1<<16)
	for {
		n, err := from.Read(frame)
		if err != nil {
			return
		}
		if _, err := to.Write(frame[:n]); err != nil && !errors.Is(err, unix.EIO) { // EIO: that link is down
			return
		}
	}
}

// serve answers TCP and UDP on an address with the address that it sees as the caller's.
func (l *lab) serve(ns netns.NsHandle, addr string, port int) {
	l.Helper()
	at := netip.AddrPortFrom(netip.MustParseAddr(addr), uint16(port)).String()
	var tcp net.Listener
	var udp net.PacketConn
	err := l.in(ns, func() (err error) {
		if tcp, err = net.Listen("tcp", at); err != nil {
			return err
		}
		udp, err = net.ListenPacket("udp", at)
		return err
	})
	if err != nil {
		l.Fatalf("serve %s: %v", at, err)
	}
	l.Cleanup(func() { tcp.Close(); udp.Close() })
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(c, host(c.RemoteAddr()))
			c.Close()
		}
	}()
	go func() {
		b := make([]byte, 2048)
		for {
			_, from, err := udp.ReadFrom(b)
			if err != nil {
				return
			}
			udp.WriteTo([]byte(host(from)), from)
		}
	}()
}

func host(a net.Addr) string { return netip.MustParseAddrPort(a.String()).Addr().Unmap().String() }

// patience is how long a test waits for a packet that is to come; none has to come later.
const patience = 10 * time.Second

// call connects and returns what the server says, which is the address it saw.
func (l *lab) call(ns netns.NsHandle, network, addr string, port int) (string, error) {
	var seen string
	err := l.in(ns, func() error {
		c, err := net.DialTimeout(network, netip.AddrPortFrom(netip.MustParseAddr(addr), uint16(port)).String(), patience)
		if err != nil {
			return err
		}
		defer c.Close()
		if network == "udp" {
			if _, err := c.Write([]byte("hello")); err != nil {
				return err
			}
		}
		if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
			return err
		}
		b := make([]byte, 100)
		n, err := c.Read(b)
		seen = string(b[:n])
		return err
	})
	return seen, err
}

// knock sends a TCP SYN, and no answer may come: where one does, it comes at once.
func (l *lab) knock(ns netns.NsHandle, addr string, port int) {
	l.Helper()
	a := netip.MustParseAddr(addr)
	err := l.in(ns, func() error {
		family, to := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: port, Addr: [4]byte(a.AsSlice()[:4])})
		if a.Is6() {
			family, to = unix.AF_INET6, &unix.SockaddrInet6{Port: port, Addr: a.As16()}
		}
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		l.Cleanup(func() { unix.Close(fd) })
		if err := unix.Connect(fd, to); !errors.Is(err, unix.EINPROGRESS) {
			return fmt.Errorf("connect to %s: %w", addr, err)
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 200)
		if n > 0 {
			return fmt.Errorf("%s port %d answers", addr, port)
		}
		return err
	})
	if err != nil {
		l.Error(err)
	}
}

// reaches wants an answer, and the caller to be seen as who.
func (l *lab) reaches(ns netns.NsHandle, network, addr string, port int, who string) {
	l.Helper()
	seen, err := l.call(ns, network, addr, port)
	if err != nil {
		l.Errorf("%s %s port %d: %v", network, addr, port, err)
	} else if seen != who {
		l.Errorf("%s %s port %d was called by %s, want %s", network, addr, port, seen, who)
	}
}

// refused wants an error at once, from the rule with that comment.
func (l *lab) refused(ns netns.NsHandle, network, addr string, port int, comment string) {
	l.Helper()
	before := l.counter(comment)
	seen, err := l.call(ns, network, addr, port)
	if err == nil {
		l.Errorf("%s %s port %d answered %q, and must not be reached", network, addr, port, seen)
		return
	}
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		l.Errorf("%s %s port %d: %v: it was dropped, and a job would wait for nothing", network, addr, port, err)
	}
	if l.counter(comment) == before {
		l.Errorf("%s %s port %d: %v, but not by the rule %q", network, addr, port, err, comment)
	}
}

// dropped does something and waits until the rule with that comment has counted it.
func (l *lab) dropped(comment string, do func()) {
	l.Helper()
	before := l.counter(comment)
	do()
	l.wait("the rule "+comment+" to count", func() bool { return l.counter(comment) > before })
}

func (l *lab) wait(what string, ok func() bool) {
	l.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(patience); !ok(); {
		select {
		case <-tick.C:
		case <-end:
			l.Fatalf("waited %v for %s", patience, what)
		}
	}
}

// counter is what all rules of that comment have counted.
func (l *lab) counter(comment string) int {
	l.Helper()
	var list struct {
		Nftables []struct {
			Rule *struct {
				Comment string
				Expr    []struct{ Counter *struct{ Packets int } }
			}
		}
	}
	if err := json.Unmarshal([]byte(l.sh(l.host, "nft -j list ruleset")), &list); err != nil {
		l.Fatal(err)
	}
	n, found := 0, false
	for _, o := range list.Nftables {
		if o.Rule == nil || o.Rule.Comment != comment {
			continue
		}
		for _, e := range o.Rule.Expr {
			if e.Counter != nil {
				n, found = n+e.Counter.Packets, true
			}
		}
	}
	if !found {
		l.Fatalf("no rule %q counts", comment)
	}
	return n
}

// send puts a frame on a worker's wire.
func (l *lab) send(w worker, frame []byte) {
	l.Helper()
	l.wire(w.NsHandle, "eth0", frame)
}

// wire puts a frame on the wire of a link.
func (l *lab) wire(ns netns.NsHandle, name string, frame []byte) {
	l.Helper()
	err := l.in(ns, func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: link.Attrs().Index})
	})
	if err != nil {
		l.Fatalf("send a frame: %v", err)
	}
}

// frame is an Ethernet frame.
func frame(to, from string, etherType uint16, payload ...[]byte) []byte {
	f := slices.Concat(macOf(to), macOf(from), []byte{byte(etherType >> 8), byte(etherType)})
	return append(f, slices.Concat(payload...)...)
}

func macOf(s string) []byte {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

func ipOf(s string) []byte { return netip.MustParseAddr(s).AsSlice() }

// arp is an ARP packet (RFC 826): operation 1 asks, 2 answers.
func arp(operation byte, senderMAC, sender, target string) []byte {
	return slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, operation}, macOf(senderMAC), ipOf(sender), make([]byte, 6), ipOf(target))
}

// udp4 is an IPv4 packet with a UDP datagram to port 9.
func udp4(from, to string) []byte {
	h := slices.Concat([]byte{0x45, 0, 0, 28, 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, ipOf(from), ipOf(to))
	sum := checksum(h)
	h[10], h[11] = byte(sum>>8), byte(sum)
	return append(h, 0x30, 0x39, 0, 9, 0, 8, 0, 0) // a checksum of 0 is none
}

// icmp6 is an IPv6 packet with an ICMPv6 message.
func icmp6(from, to string, kind byte, body []byte) []byte {
	m := append([]byte{kind, 0, 0, 0}, body...)
	pseudo := slices.Concat(ipOf(from), ipOf(to), []byte{0, 0, 0, byte(len(m)), 0, 0, 0, unix.IPPROTO_ICMPV6}, m)
	sum := checksum(pseudo)
	m[2], m[3] = byte(sum>>8), byte(sum)
	return slices.Concat([]byte{0x60, 0, 0, 0, 0, byte(len(m)), unix.IPPROTO_ICMPV6, 255}, ipOf(from), ipOf(to), m)
}

// checksum is RFC 1071's.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// wantError checks that an error says each of words.
func wantError(t testing.TB, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want one that says %q", words)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the error does not say %q: %v", w, err)
		}
	}
}
