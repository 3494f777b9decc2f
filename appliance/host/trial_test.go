package host

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// trial is owner, for a while.
var trial = Options{UID: owner.UID, GID: owner.GID, Trial: true}

func (l *lab) tryUp(p *plan.Plan) error {
	l.Helper()
	return l.in(l.host, func() error { return NetworkUp(l.Context(), p, trial) })
}

func (l *lab) leave(p *plan.Plan) {
	l.Helper()
	if err := l.in(l.host, func() error { return NetworkLeave(l.Context(), p) }); err != nil {
		l.Fatal(err)
	}
}

// TestTrialIsAGuest: a trial's workers reach what they may without the host's forwarding being turned on, and the host is afterwards
// as it was.
func TestTrialIsAGuest(t *testing.T) {
	l := newLab(t)
	p := l.plan(2, false)
	p.Network.Egress = []plan.Egress{{Name: "store", Action: "allow", To: []netip.Prefix{netip.MustParsePrefix(lanStore + "/32")}}}
	rules(p)
	before := l.state()
	if err := l.tryUp(p); err != nil {
		t.Fatal(err)
	}
	const switches = "cd /proc/sys/net/ipv4; cat ip_forward conf/default/forwarding conf/br0/forwarding conf/eno1/forwarding conf/lan0/forwarding conf/fleet0/forwarding"
	if got, want := l.sh(l.host, switches), "0\n0\n0\n1\n1\n1\n"; got != want {
		t.Errorf("%s:\n%swant\n%s", switches, got, want)
	}
	one := l.worker(p, 0)
	l.serve(l.internet, server, 80)
	l.serve(l.lan, lanStore, 443)
	l.reaches(one.NsHandle, "tcp", server, 80, hostWAN)
	l.reaches(one.NsHandle, "tcp", lanStore, 443, hostLAN)
	if err := l.tryUp(p); err != nil { // a second run
		t.Errorf("again: %v", err)
	}
	l.leave(p)
	if diff := cmp.Diff(before, l.state()); diff != "" {
		t.Errorf("it left:\n%s", diff)
	}
	l.leave(p)
}

// TestTrialBesideOthers: what somebody else turned on or took over during a trial is theirs when it ends.
func TestTrialBesideOthers(t *testing.T) {
	l := newLab(t)
	p := l.plan(2, false)
	before := l.state()

	// Docker, say, starts during the trial and turns the host's forwarding on.
	if err := l.tryUp(p); err != nil {
		t.Fatal(err)
	}
	l.sh(l.host, "echo 1 > /proc/sys/net/ipv4/ip_forward")
	l.leave(p)
	if out := l.sh(l.host, "cd /proc/sys/net/ipv4; cat ip_forward conf/eno1/forwarding conf/br0/forwarding"); out != "1\n1\n1\n" {
		t.Errorf("the end of the trial turned off others' forwarding:\n%s", out)
	}
	l.sh(l.host, "echo 0 > /proc/sys/net/ipv4/ip_forward")
	if diff := cmp.Diff(before, l.state()); diff != "" {
		t.Errorf("it left:\n%s", diff)
	}

	// The host's own network comes up during the trial: it stays.
	if err := l.tryUp(p); err != nil {
		t.Fatal(err)
	}
	l.up(p)
	up := l.state()
	l.leave(p)
	if diff := cmp.Diff(up, l.state()); diff != "" {
		t.Errorf("the end of the trial changed the host's own network:\n%s", diff)
	}
	if found := l.check(p); len(found) > 0 {
		t.Errorf("check: %v", found)
	}

	// A trial uses the host's own network as it is, and changes nothing of it.
	if err := l.tryUp(p); err != nil {
		t.Error(err)
	}
	l.leave(p)
	err := l.tryUp(changed(l, p))
	wantError(t, err, "it is up for good, and differs from this plan", "network down --all")
	if diff := cmp.Diff(up, l.state()); diff != "" {
		t.Errorf("a trial changed the host's own network:\n%s", diff)
	}
	l.down(p)
	if diff := cmp.Diff(before, l.state()); diff != "" {
		t.Errorf("down left:\n%s", diff)
	}
}

// TestTrialFails: a trial that cannot come up leaves the host as it was.
func TestTrialFails(t *testing.T) {
	l := newLab(t)
	p := l.plan(2, false)
	l.sh(l.host, "ip link add fleet1 type bridge")
	before := l.state()
	if err := l.tryUp(p); err == nil || !strings.Contains(err.Error(), "fleet1") {
		t.Errorf("up: %v", err)
	}
	l.leave(p)
	if diff := cmp.Diff(before, l.state()); diff != "" {
		t.Errorf("it left:\n%s", diff)
	}
}
