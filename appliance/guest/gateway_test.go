package guest

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/kdomanski/iso9660"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"go.yaml.in/yaml/v3"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/seed"
)

// TestDockerTakesTheGateway: a bridge in the worker takes the gateway's range, or its very address. Connections between the host and the
// worker still work, so does the worker's route to the outside, and the bridge works for its containers. It tests a worker that the guest
// part sets up, and one that cloud-init sets up with the commands of its seed.
func TestDockerTakesTheGateway(t *testing.T) {
	need.Root(t)
	need.Tools(t, "ip")
	type addrs struct{ worker, gateway, internet string }
	four := addrs{"172.17.0.2", "172.17.0.1", "192.0.2.1"}
	six := addrs{"fd00:17::2", "fd00:17::1", "2001:db8::1"}
	for _, way := range []string{"guest part", "cloud-init"} {
		for _, c := range []struct {
			name   string
			addrs  addrs
			bridge string // and its network
			also   string // what else the job does
		}{
			{"covers the gateway", four, "172.17.5.1/16", ""},
			{"is the gateway", four, "172.17.0.1/16", ""},
			{"is closer than a bridge's network", four, "172.17.0.3/29", ""},
			{"comes with a VPN, as wg-quick sets it up", four, "172.17.0.1/16", "ip route add default dev docker0 table 51820; " +
				"ip rule add not fwmark 51820 table 51820; ip rule add table main suppress_prefixlength 0"},
			{"covers the IPv6 gateway", six, "fd00:17::5/64", ""},
			{"is the IPv6 gateway", six, "fd00:17::1/64", ""},
		} {
			t.Run(way+"/"+c.name, func(t *testing.T) {
				t.Parallel()
				l := newGateLab(t, c.addrs.worker, c.addrs.gateway, c.addrs.internet)
				l.setUp(way == "cloud-init")
				work := l.listen(l.guest, c.addrs.worker)
				out := l.listen(l.host, c.addrs.internet)
				open := l.dial(l.host, work)
				l.ping(open, "before the bridge")

				l.ip(l.guest, "link add docker0 type bridge", "link set docker0 up")
				l.ip(l.guest, "addr add "+c.bridge+" dev docker0"+nodad(c.bridge))
				l.sh(l.guest, c.also)

				l.ping(open, "an open connection")
				l.ping(l.dial(l.host, work), "a new connection to the worker")
				if !strings.Contains(c.also, "51820") { // otherwise everything that the worker sends goes into the VPN
					l.ping(l.dial(l.guest, out), "the worker's way out")
				}
				if c.name == "is closer than a bridge's network" {
					return // its range has no room for containers
				}
				l.container(c.bridge)
				l.ping(l.dial(l.box, l.listen(l.guest, strings.Split(c.bridge, "/")[0])), "a container to its bridge")
			})
		}
	}
}

func nodad(addr string) string {
	if strings.Contains(addr, ":") {
		return " nodad"
	}
	return ""
}

// gateLab is a host, a worker on a link to it, and a container in the worker, each in a network namespace.
type gateLab struct {
	t                         *testing.T
	host, guest, box          netns.NsHandle
	worker, gateway, internet string
	family                    string
}

func newGateLab(t *testing.T, worker, gateway, internet string) *gateLab {
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	l := &gateLab{t: t, worker: worker, gateway: gateway, internet: internet, family: "-4"}
	if strings.Contains(worker, ":") {
		l.family = "-6"
	}
	for _, ns := range []*netns.NsHandle{&l.host, &l.box, &l.guest} {
		h, err := netns.New()
		if err != nil {
			t.Skipf("skipped: no network namespaces here: %v", err)
		}
		*ns = h
		t.Cleanup(func() { h.Close() })
	}
	return l
}

// in runs a function in a namespace.
func (l *gateLab) in(ns netns.NsHandle) {
	l.t.Helper()
	if err := netns.Set(ns); err != nil {
		l.t.Fatal(err)
	}
}

func (l *gateLab) ip(ns netns.NsHandle, commands ...string) {
	l.t.Helper()
	l.in(ns)
	for _, c := range commands {
		if out, err := exec.Command("ip", strings.Fields(l.family+" "+c)...).CombinedOutput(); err != nil {
			l.t.Fatalf("ip %s: %v: %s", c, err, out)
		}
	}
}

func (l *gateLab) sh(ns netns.NsHandle, script string) {
	l.t.Helper()
	l.in(ns)
	if out, err := exec.Command("/bin/sh", "-c", script).CombinedOutput(); err != nil {
		l.t.Fatalf("%s: %v: %s", script, err, out)
	}
}

const procSys = "/proc/thread-self/root/proc/sys" // of this thread's namespace

func (l *gateLab) sysctl(ns netns.NsHandle, name, value string) {
	l.t.Helper()
	l.in(ns)
	if err := os.WriteFile(procSys+"/net/"+name, []byte(value), 0); err != nil {
		l.t.Fatal(err)
	}
}

// setUp does what the network unit does on a host, and what a worker's boot does.
func (l *gateLab) setUp(cloudInit bool) {
	t := l.t
	t.Helper()
	length := "/32"
	if l.family == "-6" {
		length = "/128"
	}
	l.ip(l.host, "link set lo up", "link add tap0 type veth peer name eth0 address 02:fe:00:00:00:02", "link set tap0 up")
	eth0, err := netlink.LinkByName("eth0")
	if err == nil {
		err = netlink.LinkSetNsFd(eth0, int(l.guest))
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{l.gateway, l.internet} {
		l.ip(l.host, "addr add "+a+length+" dev lo"+nodad(a))
	}
	if l.family == "-6" { // the gateway is on lo, and tap0 has to answer for it
		for name, value := range map[string]string{"forwarding": "1", "proxy_ndp": "1"} {
			l.sysctl(l.host, "ipv6/conf/tap0/"+name, value)
		}
		l.sysctl(l.host, "ipv6/neigh/tap0/proxy_delay", "0")
		l.ip(l.host, "neigh add proxy "+l.gateway+" dev tap0")
	}
	l.ip(l.host, "route add "+l.worker+length+" dev tap0 src "+l.gateway, "neigh add "+l.worker+" lladdr 02:fe:00:00:00:02 dev tap0 nud permanent")

	l.ip(l.guest, "link set lo up")
	n := &seed.Network{MAC: "02:FE:00:00:00:02", MTU: 1500,
		Addresses: []netip.Addr{netip.MustParseAddr(l.worker)}, Gateways: []netip.Addr{netip.MustParseAddr(l.gateway)}}
	if l.family == "-4" {
		l.sysctl(l.guest, "ipv4/conf/all/rp_filter", "1") // the strictest
	}
	if !cloudInit {
		for range 2 { // the second time changes nothing
			if err := applyNetwork(t.Context(), n, procSys); err != nil {
				t.Fatal(err)
			}
		}
		l.rules()
		return
	}
	l.ip(l.guest, "addr add "+l.worker+length+" dev eth0"+nodad(l.worker), "link set eth0 up", "route add default via "+l.gateway+" dev eth0 onlink")
	commands := bootCommands(t, seed.Seed{InstanceID: "w-1", Hostname: "w-1", Network: n})
	for _, argv := range append(commands, commands...) {
		if out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput(); err != nil || len(out) > 0 {
			t.Fatalf("%q: %v: %s", argv, err, out)
		}
	}
	l.rules()
}

// rules checks that there is one rule for local addresses, and that it is the first.
func (l *gateLab) rules() {
	l.t.Helper()
	out, err := exec.Command("ip", l.family, "rule").Output()
	if err != nil {
		l.t.Fatal(err)
	}
	if !strings.HasPrefix(string(out), "0:\tnot from "+l.worker+" to "+l.gateway+" iif lo lookup local") || strings.Count(string(out), "lookup local") != 1 {
		l.t.Errorf("rules:\n%s", out)
	}
}

// bootCommands returns the commands that cloud-init runs at each boot of a seed's guest.
func bootCommands(t *testing.T, s seed.Seed) [][]string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "seed.iso")
	if err := s.ISOFile(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := iso9660.OpenImage(f)
	if err != nil {
		t.Fatal(err)
	}
	root, err := img.RootDir()
	if err != nil {
		t.Fatal(err)
	}
	files, err := root.GetChildren()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		var config struct {
			BootCmd [][]string `yaml:"bootcmd"`
		}
		if f.Name() == seed.UserData {
			text, err := io.ReadAll(f.Reader())
			if err == nil {
				err = yaml.Unmarshal(text, &config)
			}
			if err != nil || len(config.BootCmd) == 0 {
				t.Fatalf("%v: no bootcmd in %s", err, text)
			}
			return config.BootCmd
		}
	}
	t.Fatal("the seed has no user-data")
	return nil
}

// container is a namespace on the worker's bridge.
func (l *gateLab) container(bridge string) {
	l.t.Helper()
	_, length, _ := strings.Cut(bridge, "/")
	addr := "172.17.0.77"
	if l.family != "-4" {
		addr = "fd00:17::77"
	}
	l.ip(l.guest, "link add veth0 type veth peer name box0", "link set veth0 master docker0", "link set veth0 up")
	box0, err := netlink.LinkByName("box0")
	if err == nil {
		err = netlink.LinkSetNsFd(box0, int(l.box))
	}
	if err != nil {
		l.t.Fatal(err)
	}
	l.ip(l.box, "addr add "+addr+"/"+length+" dev box0"+nodad(addr), "link set box0 up")
}

// listen answers each byte in a namespace, and returns its address.
func (l *gateLab) listen(ns netns.NsHandle, addr string) string {
	l.t.Helper()
	l.in(ns)
	ln, err := net.Listen("tcp", net.JoinHostPort(addr, "0"))
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			l.t.Cleanup(func() { c.Close() })
			go func() { _, _ = io.Copy(c, c) }() // until either end closes
		}
	}()
	return ln.Addr().String()
}

func (l *gateLab) dial(ns netns.NsHandle, addr string) net.Conn {
	l.t.Helper()
	l.in(ns)
	// Neighbours are not found immediately while a link or a bridge's port comes up.
	for end := time.Now().Add(20 * time.Second); ; runtime.Gosched() {
		c, err := net.DialTimeout("tcp", addr, 10*time.Second)
		if err == nil {
			l.t.Cleanup(func() { c.Close() })
			return c
		}
		if !errors.Is(err, unix.EHOSTUNREACH) || time.Now().After(end) {
			l.t.Fatal(err)
		}
	}
}

func (l *gateLab) ping(c net.Conn, what string) {
	l.t.Helper()
	answer := make([]byte, 4)
	err := c.SetDeadline(time.Now().Add(10 * time.Second))
	if err == nil {
		_, err = c.Write([]byte("ping"))
	}
	if err == nil {
		_, err = io.ReadFull(c, answer)
	}
	if err != nil || string(answer) != "ping" {
		l.t.Errorf("%s: %q, %v", what, answer, err)
	}
}
