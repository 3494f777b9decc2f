package host

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// Comments of the rules that refuse: each test says which of them it meant.
const (
	byWorker  = "another worker"
	byPrivate = "private, link-local, metadata, multicast"
	byHost    = "the host itself"
	bySender  = "a worker with an address that is not its own"
	byARP     = "any other ARP from a worker"
	byAnswer  = "fleetingd: workers may ask, not answer"
	byInbound = "from elsewhere to a worker: only answers"
	byOther   = "through another interface"
	byGlobal  = "all but global unicast"
)

// TestPackets sends real packets between namespaces.
func TestPackets(t *testing.T) {
	l := newLab(t)
	p := l.plan(3, false)
	p.Network.Egress = []plan.Egress{
		{Name: "no-admin", Action: "deny", To: []netip.Prefix{netip.MustParsePrefix(lanStore + "/32")},
			Ports: []plan.PortRange{{Protocol: "tcp", First: 9001, Last: 9001}}},
		{Name: "store", Action: "allow", To: []netip.Prefix{netip.MustParsePrefix(lanStore + "/32")},
			Ports: []plan.PortRange{{Protocol: "tcp", First: 443, Last: 443}, {Protocol: "tcp", First: 9000, Last: 9002}}},
		{Name: "no-smtp", Action: "deny", Ports: []plan.PortRange{{Protocol: "tcp", First: 25, Last: 25}}},
		{Name: "https", Action: "allow", Ports: []plan.PortRange{{Protocol: "tcp", First: 443, Last: 443}}},
		{Name: "cache-on-the-host", Action: "allow", To: []netip.Prefix{netip.MustParsePrefix(hostLAN + "/32")},
			Ports: []plan.PortRange{{Protocol: "tcp", First: 5000, Last: 5000}}},
	}
	p.Network.DNS = append(p.Network.DNS, netip.MustParseAddr(lanOther))
	rules(p)
	l.up(p)
	one, two := l.worker(p, 0), l.worker(p, 1)
	for _, port := range []int{22, 25, 80, 443} {
		l.serve(l.internet, server, port)
	}
	l.serve(l.internet, metadata, 80)
	for _, port := range []int{22, 443, 9000, 9001} {
		l.serve(l.lan, lanStore, port)
	}
	l.serve(l.lan, lanOther, 443)
	l.serve(l.lan, lanOther, 53)
	l.serve(l.host, "0.0.0.0", 22)
	l.serve(l.host, "0.0.0.0", 5000)
	l.serve(one.NsHandle, "0.0.0.0", 22)
	l.serve(two.NsHandle, "0.0.0.0", 22)
	l.serve(l.neighbour, neighbour, 80)

	t.Run("the internet, masqueraded", func(t *testing.T) {
		l := l.with(t)
		for _, w := range []worker{one, two} {
			l.reaches(w.NsHandle, "tcp", server, 80, hostWAN)
			l.reaches(w.NsHandle, "udp", server, 80, hostWAN)
		}
	})
	t.Run("another worker", func(t *testing.T) {
		l := l.with(t)
		l.refused(one.NsHandle, "tcp", two.slot.Address.String(), 22, byWorker)
		l.refused(one.NsHandle, "udp", two.slot.Address.String(), 22, byWorker)
		l.refused(one.NsHandle, "tcp", "172.16.120.77", 22, byWorker) // no worker, and no way out either
	})
	t.Run("the host", func(t *testing.T) {
		l := l.with(t)
		for _, a := range []string{"172.16.120.1", hostWAN, hostLAN, "192.168.77.1"} {
			l.refused(one.NsHandle, "tcp", a, 22, byHost)
			l.refused(one.NsHandle, "udp", a, 22, byHost)
		}
		l.reaches(one.NsHandle, "tcp", hostLAN, 5000, one.slot.Address.String()) // its very address is allowed
		l.refused(one.NsHandle, "tcp", hostWAN, 5000, byHost)
		l.refused(one.NsHandle, "tcp", hostWAN, 443, byHost) // "allow https" means elsewhere
	})
	t.Run("private, link-local and metadata addresses", func(t *testing.T) {
		l := l.with(t)
		l.refused(one.NsHandle, "tcp", metadata, 80, byPrivate)
		l.refused(one.NsHandle, "tcp", lanOther, 443, byPrivate)
		l.refused(one.NsHandle, "tcp", neighbour, 80, byPrivate)
		l.refused(one.NsHandle, "udp", "100.64.0.1", 80, byPrivate)
		l.dropped(byHost, func() {
			l.send(one, frame("ff:ff:ff:ff:ff:ff", p.Network.GuestMAC, unix.ETH_P_IP, udp4(one.slot.Address.String(), "255.255.255.255")))
		})
	})
	t.Run("egress blocks, the first match", func(t *testing.T) {
		l := l.with(t)
		l.reaches(one.NsHandle, "tcp", lanStore, 443, hostLAN) // masqueraded there, too
		l.reaches(one.NsHandle, "tcp", lanStore, 9000, hostLAN)
		l.refused(one.NsHandle, "tcp", lanStore, 9001, "egress no-admin")
		l.refused(one.NsHandle, "tcp", lanStore, 22, byPrivate)
		l.refused(one.NsHandle, "tcp", server, 25, "egress no-smtp")
		l.reaches(one.NsHandle, "tcp", server, 443, hostWAN)
	})
	t.Run("a private resolver of the spec", func(t *testing.T) {
		l := l.with(t)
		l.reaches(one.NsHandle, "udp", lanOther, 53, hostLAN)
		l.reaches(one.NsHandle, "tcp", lanOther, 53, hostLAN)
		l.refused(one.NsHandle, "tcp", lanStore, 53, byPrivate)
	})
	t.Run("another interface than egress_interface", func(t *testing.T) {
		l := l.with(t)
		l.sh(l.host, "ip route add 8.8.8.8/32 via "+lanOther)
		defer l.sh(l.host, "ip route del 8.8.8.8/32")
		l.refused(one.NsHandle, "tcp", "8.8.8.8", 80, byOther)
		l.refused(one.NsHandle, "tcp", "8.8.8.8", 443, byOther)
	})
	t.Run("the host reaches its workers, nobody else does", func(t *testing.T) {
		l := l.with(t)
		l.reaches(l.host, "tcp", one.slot.Address.String(), 22, "172.16.120.1")
		l.reaches(l.host, "tcp", two.slot.Address.String(), 22, "172.16.120.1")
		for _, ns := range []netns.NsHandle{l.internet, l.lan, l.neighbour} {
			l.dropped(byInbound, func() { l.knock(ns, one.slot.Address.String(), 22) })
		}
	})
	t.Run("forged senders", func(t *testing.T) { forged(l.with(t), p, one, two) })
	t.Run("path MTU and other errors", func(t *testing.T) { pathErrors(l.with(t), one) })
	t.Run("neighbours are as before", func(t *testing.T) {
		l := l.with(t)
		l.reaches(l.internet, "tcp", neighbour, 80, "198.51.100.1")
		l.reaches(l.neighbour, "tcp", hostLAN, 22, neighbour)
		l.reaches(l.lan, "tcp", neighbour, 80, lanStore)
		l.reaches(l.neighbour, "tcp", server, 80, neighbour) // not masqueraded: it is none of ours
		l.reaches(l.internet, "tcp", hostWAN, 22, "198.51.100.1")
	})
	t.Run("no IPv6", func(t *testing.T) {
		l := l.with(t)
		out := l.sh(l.host, "ip -6 addr show dev fleet0; ip -6 route show dev fleet0; cat /proc/sys/net/ipv6/conf/fleet0/disable_ipv6")
		if out != "1\n" {
			t.Errorf("a TAP has IPv6:\n%s", out)
		}
		// The kernel takes none from such a link, and were it otherwise, the rules would not.
		l.sh(l.host, "echo 0 > /proc/sys/net/ipv6/conf/fleet0/disable_ipv6")
		defer l.sh(l.host, "echo 1 > /proc/sys/net/ipv6/conf/fleet0/disable_ipv6")
		l.dropped(bySender, func() {
			l.send(one, frame("33:33:00:00:00:01", p.Network.GuestMAC, unix.ETH_P_IPV6,
				icmp6("fe80::fd:ff:fe00:2", "ff02::1", 135, make([]byte, 20))))
		})
	})
	if got := l.check(p); len(got) != 0 {
		t.Errorf("after all of this the network differs: %q", got)
	}
}

// with is the lab for a subtest.
// TestConnectionLimit: a worker that opens connections without end is refused further ones, and neither the host nor another worker
// notices. A pool with another limit has its own.
func TestConnectionLimit(t *testing.T) {
	l := newLab(t)
	p := l.plan(3, false)
	const few, more = 20, 50
	p.Slots[0].Connections, p.Slots[1].Connections, p.Slots[2].Connections = few, few, more
	rules(p)
	l.up(p)
	if diff := l.check(p); len(diff) > 0 {
		t.Errorf("it differs from the plan as soon as it is up: %v", diff)
	}
	greedy, other, rich := l.worker(p, 0), l.worker(p, 1), l.worker(p, 2)
	l.serve(l.internet, server, 80)
	for _, c := range []struct {
		worker
		limit int
	}{{greedy, few}, {rich, more}} {
		// Each port is a connection of its own, and the entry of a UDP one stays for half a minute.
		const all = 3 * more
		before := l.counter(tooMany)
		if err := l.in(c.NsHandle, func() error {
			s, err := net.ListenUDP("udp4", nil)
			if err != nil {
				return err
			}
			defer s.Close()
			for port := range all {
				to := &net.UDPAddr{IP: net.ParseIP(server), Port: 1000 + port}
				if _, err := s.WriteTo([]byte("x"), to); err != nil && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.ECONNREFUSED) {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		l.wait("the rest is refused", func() bool { return l.counter(tooMany)-before >= all-c.limit })
		if let := all - (l.counter(tooMany) - before); let < c.limit-1 || let > c.limit+1 {
			t.Errorf("of %d connections %d were let out, want %d", all, let, c.limit)
		}
		l.refused(c.NsHandle, "tcp", server, 80, tooMany)
	}
	l.reaches(other.NsHandle, "tcp", server, 80, hostWAN)
	l.reaches(other.NsHandle, "udp", server, 80, hostWAN)
	if _, err := l.call(l.host, "tcp", server, 80); err != nil {
		t.Errorf("the host itself: %v", err)
	}
	// What rules have counted is no difference from the plan.
	if diff := l.check(p); len(diff) > 0 {
		t.Errorf("it differs from the plan: %v", diff)
	}
}

// tooMany is that rule's comment.
const tooMany = "more connections than its pool allows"

func (l *lab) with(t *testing.T) *lab {
	sub := *l
	sub.TB = t
	return &sub
}

func forged(l *lab, p *plan.Plan, one, two worker) {
	gw, mac := p.Network.HostMAC, p.Network.GuestMAC
	own, other := one.slot.Address.String(), two.slot.Address.String()
	send := func(f []byte) func() { return func() { l.send(one, f) } }

	l.dropped(bySender, send(frame(gw, "02:00:00:00:00:99", unix.ETH_P_IP, udp4(own, server))))
	l.dropped(bySender, send(frame(gw, mac, unix.ETH_P_IP, udp4(other, server))))
	l.dropped(bySender, send(frame(gw, mac, unix.ETH_P_IP, udp4("172.16.120.1", server))))
	l.dropped(bySender, send(frame(gw, mac, unix.ETH_P_IP, udp4("0.0.0.0", "255.255.255.255"))))
	l.dropped(bySender, send(frame(gw, mac, unix.ETH_P_IP, udp4(neighbour, server))))

	const all = "ff:ff:ff:ff:ff:ff"
	l.dropped(byARP, send(frame(all, mac, unix.ETH_P_ARP, arp(1, mac, other, "172.16.120.1"))))
	l.dropped(byARP, send(frame(all, mac, unix.ETH_P_ARP, arp(1, "02:00:00:00:00:99", own, "172.16.120.1"))))
	l.dropped(byAnswer, send(frame(all, mac, unix.ETH_P_ARP, arp(2, mac, own, "172.16.120.1"))))
	l.dropped(byARP, send(frame(all, mac, unix.ETH_P_ARP, arp(1, mac, own, hostLAN)))) // would tell of the host's addresses
	if got := l.sh(l.host, "ip neigh show "+own); !strings.Contains(got, mac) || !strings.Contains(got, "PERMANENT") {
		l.Errorf("the host's neighbour entry of the worker is %q", got)
	}
	l.sh(one.NsHandle, "ip neigh flush dev eth0") // and after all of that the gateway still answers
	l.reaches(one.NsHandle, "tcp", server, 80, hostWAN)
}

func pathErrors(l *lab, one worker) {
	_, err := l.call(one.NsHandle, "udp", server, 4444) // nobody listens there
	wantError(l, err, "connection refused")

	l.sh(l.host, "ip link set eno1 mtu 1300")
	defer l.sh(l.host, "ip link set eno1 mtu 1500")
	var mtu int
	err = l.in(one.NsHandle, func() error {
		c, err := net.Dial("udp", server+":80")
		if err != nil {
			return err
		}
		defer c.Close()
		raw, err := c.(*net.UDPConn).SyscallConn()
		if err != nil {
			return err
		}
		l.wait("an MTU of 1300", func() bool {
			_, _ = c.Write(make([]byte, 1400)) // EMSGSIZE, once it is known
			err = raw.Control(func(fd uintptr) { mtu, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU) })
			return mtu == 1300
		})
		return err
	})
	if err != nil {
		l.Error(err)
	}
}

func TestPackets6(t *testing.T) {
	l := newLab(t)
	p := l.plan(2, true)
	p.Network.Egress = []plan.Egress{{Name: "no-smtp", Action: "deny", Ports: []plan.PortRange{{Protocol: "tcp", First: 25, Last: 25}}}}
	rules(p)
	l.up(p)
	one, two := l.worker(p, 0), l.worker(p, 1)
	l.serve(l.internet, server6, 80)
	l.serve(l.internet, server6, 25)
	l.serve(l.internet, server, 80)
	l.serve(l.host, "::", 22)
	l.serve(one.NsHandle, "::", 22)
	l.serve(two.NsHandle, "::", 22)
	own, other := one.slot.Address6.String(), two.slot.Address6.String()
	const linkLocalOfGuest = "fe80::fd:ff:fe00:2"
	mac := p.Network.GuestMAC

	t.Run("the internet, masqueraded", func(t *testing.T) {
		l := l.with(t)
		l.reaches(one.NsHandle, "tcp", server6, 80, hostWAN6)
		l.reaches(two.NsHandle, "udp", server6, 80, hostWAN6)
		l.reaches(one.NsHandle, "tcp", server, 80, hostWAN)
		l.refused(one.NsHandle, "tcp", server6, 25, "egress no-smtp")
	})
	t.Run("workers, the host, what is not global", func(t *testing.T) {
		l := l.with(t)
		l.refused(one.NsHandle, "tcp", other, 22, byWorker)
		l.refused(one.NsHandle, "tcp", "fd7e:1ee7::1", 22, byHost)
		l.refused(one.NsHandle, "tcp", hostWAN6, 22, byHost)
		for _, a := range []string{"fd00::1", "64:ff9b::a00:1", "2002:a00:1::1", "2001:db8:1::1"} {
			l.refused(one.NsHandle, "tcp", a, 80, byGlobal)
		}
	})
	t.Run("the host reaches its workers", func(t *testing.T) {
		l := l.with(t)
		l.reaches(l.host, "tcp", own, 22, "fd7e:1ee7::1")
		l.sh(l.internet, "ip -6 route add fd7e:1ee7::/64 via "+hostWAN6)
		l.dropped(byInbound, func() { l.knock(l.internet, own, 22) })
	})
	t.Run("neighbour discovery", func(t *testing.T) {
		l := l.with(t)
		// The guest's kernel asks from its own address first, and again from its link-local one to see that the gateway lives.
		l.sh(one.NsHandle, "ip -6 neigh flush dev eth0")
		l.reaches(one.NsHandle, "tcp", server6, 80, hostWAN6)
		l.sh(one.NsHandle, "ip -6 neigh change fd7e:1ee7::1 lladdr "+compile.HostMAC+" dev eth0 nud probe")
		l.wait("the gateway to answer a probe", func() bool {
			return strings.Contains(l.sh(one.NsHandle, "ip -6 neigh show fd7e:1ee7::1"), "REACHABLE")
		})
		if out := l.sh(one.NsHandle, "ip -6 neigh show fd7e:1ee7::1"); !strings.Contains(out, compile.HostMAC+" router") {
			t.Errorf("the gateway is known as %q", out)
		}
	})
	t.Run("forged senders", func(t *testing.T) {
		l := l.with(t)
		const all = "33:33:00:00:00:01"
		six := func(p []byte) func() { return func() { l.send(one, frame(all, mac, unix.ETH_P_IPV6, p)) } }
		asked := append(make([]byte, 4), ipOf("fd7e:1ee7::1")...)
		l.dropped(bySender, six(icmp6(other, "ff02::1", 135, asked)))
		l.dropped(bySender, six(icmp6("fe80::1234", "ff02::1", 135, asked)))
		l.dropped(bySender, six(icmp6(linkLocalOfGuest, "ff02::1", 134, make([]byte, 12)))) // a router advertisement
		l.dropped(bySender, six(icmp6(linkLocalOfGuest, "ff02::1", 137, make([]byte, 36)))) // a redirect
		l.dropped(byHost, six(icmp6(own, "ff02::1", 134, make([]byte, 12))))
		l.dropped(bySender, six(icmp6("fd00::1", server6, 128, make([]byte, 4))))
		l.dropped(bySender, func() {
			l.send(one, frame(p.Network.HostMAC, "02:00:00:00:00:99", unix.ETH_P_IPV6, icmp6(own, server6, 128, make([]byte, 4))))
		})
		if out := l.sh(l.host, "ip -6 neigh show "+own); !strings.Contains(out, "PERMANENT") {
			t.Errorf("the host's neighbour entry of the worker is %q", out)
		}
	})
	if got := l.check(p); len(got) != 0 {
		t.Errorf("after all of this the network differs: %q", got)
	}
}
