package host

import (
	"strings"
	"testing"

	needs "github.com/fleetingd/fleetingd/appliance/need"
)

func TestSysctls(t *testing.T) {
	needs.Root(t)
	needs.Tools(t, "ip")
	l := &lab{TB: t}
	ns := l.namespace()
	l.veth(ns, "one", l.namespace(), "other")
	l.veth(ns, "two", l.namespace(), "other")
	l.sh(ns, "echo 1 > /proc/sys/net/ipv4/conf/two/forwarding")
	d := Sysctls()
	if err := l.in(ns, func() error {
		before := readOne(t, d, ipForward)
		if before["value"] != "0" || before["forwarding"] != "two" {
			t.Errorf("before: %v", before)
		}
		for range 2 {
			writeOne(t, d, ipForward, State{"value": "1"})
		}
		if s := readOne(t, d, "net/ipv4/conf/one/forwarding"); s["value"] != "1" {
			t.Errorf("one: %v", s)
		}
		for range 2 { // as if the first had crashed half-way
			writeOne(t, d, ipForward, before)
			if s := readOne(t, d, "net.ipv4.conf.one.forwarding"); s["value"] != "0" {
				t.Errorf("one: %v", s)
			}
			if err := new(kernel).writeSysctl(setting{"net/ipv4/conf/two/forwarding", "0"}); err != nil {
				t.Error(err)
			}
		}
		writeOne(t, d, "net.ipv4.ip_local_port_range", State{"value": "2000 3000"})
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func TestSysctlsRefuse(t *testing.T) {
	needs.Root(t)
	l := &lab{TB: t}
	ns := l.namespace()
	d := Sysctls()
	if err := l.in(ns, func() error {
		if s := readOne(t, d, "net.no.such"); s != nil {
			t.Errorf("a missing setting is %v", s)
		}
		for _, c := range []struct {
			name string
			want State
			err  string
		}{
			{"net.no.such", State{"value": "1"}, "sysctl net.no.such: this kernel has no such setting"},
			{ipForward, nil, "cannot be removed"},
			{"net.ipv4.ip_local_port_range", State{"value": "words"}, "invalid argument"},
			{"../../etc/passwd", State{"value": "1"}, "not the name of a kernel setting"},
			{"/etc/passwd", State{"value": "1"}, "not the name of a kernel setting"},
			{"..", State{"value": "1"}, "not the name of a kernel setting"},
		} {
			if err := d.Write(t.Context(), c.name, c.want); err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: %v; want %q", c.name, err, c.err)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
