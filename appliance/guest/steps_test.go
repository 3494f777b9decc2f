package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
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

// TestRunScript: how a step fails, wherever the failure is in its text, and how it can use another language.
func TestRunScript(t *testing.T) {
	need.Tools(t, "bash")
	for script, want := range map[string]struct {
		code int
		out  string // of the last line
		err  string
	}{
		"echo one; echo two":                              {out: "two"},
		"false\necho after":                               {code: 1},
		"set -x\nfalse\ntrue":                             {code: 1, out: "+ false"},
		"(exit 7); echo after":                            {code: 7},
		"no-such-curl -fsSL https://x.invalid | sh":       {code: 127, out: "command not found"},
		"false | true; echo after":                        {code: 1},
		"x=$(false; echo inner); echo after $x":           {code: 1},
		"f() { false; echo f; }; f; echo after":           {code: 1},
		"false || echo caught":                            {out: "caught"},
		"if false; then :; fi; ! true; echo after":        {out: "after"},
		"set +e; false; echo after":                       {out: "after"},
		"set +o pipefail; false | cat; echo after":        {out: "after"},
		"yes | head -n1 >/dev/null; echo after":           {code: 141, err: "SIGPIPE"},
		"cat; read -r x || echo no input":                 {out: "no input"},
		"sh -c 'kill -9 $$'; echo after":                  {code: 137, err: "signal 9 (killed)"},
		"kill -15 $$":                                     {code: -1, err: "signal: terminated"},
		"exit 3 # no newline":                             {code: 3},
		"cat <<'EOF'\n$HOME\nEOF\n":                       {out: "$HOME"},
		"#!/bin/sh\nfalse\necho after":                    {out: "after"}, // not made strict
		"#!/bin/sh -e\nfalse\necho after":                 {code: 1},
		"#! \t/bin/cat  \t\nit is data":                   {out: "it is data"},
		"#!/usr/bin/env -S sed -n 2p\nthe second":         {out: "the second"},
		"#!/bin/bash\r\ntrue":                             {code: 1, err: `"#!/bin/bash\r"`},
		"#!bash\ntrue":                                    {code: 1, err: "absolute path"},
		"#!\ntrue":                                        {code: 1, err: "absolute path"},
		"#!/no/such/python\ntrue":                         {code: -1, err: "no such file"},
		"#!/bin/sh":                                       {},
		"echo " + strings.Repeat("x", 200<<10) + "|wc -c": {out: fmt.Sprint(200<<10 + 1)},
	} {
		last := ""
		r := runStep(t.Context(), Step{Command: script}, func(l string) { last = l })
		if r.code != want.code || !strings.Contains(last, want.out) || want.out == "" && strings.Contains(last, "after") ||
			(r.err == nil) != (want.err == "") || r.err != nil && !strings.Contains(r.err.Error(), want.err) {
			t.Errorf("%.60q: code %d, %v, last line %.60q; want %+v", script, r.code, r.err, last, want)
		}
	}
	if left, err := filepath.Glob(filepath.Join(os.TempDir(), "fleetingd-*", "step")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestNoBash: an image with only a POSIX shell.
func TestNoBash(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	pipefail := exec.Command("/bin/sh", "-e", "-o", "pipefail", "-c", ":").Run() == nil
	for script, code := range map[string]int{"false\necho after": 1, "echo a | cat": 0, "false || true": 0} {
		var out []string
		r := runStep(t.Context(), Step{Command: script}, func(l string) { out = append(out, l) })
		warned := slices.Contains(out, noPipefail)
		if r.code != code || r.err != nil || slices.Contains(out, "after") || warned != (!pipefail && strings.Contains(script, "|")) {
			t.Errorf("%q: code %d, %v, %q", script, r.code, r.err, out)
		}
	}
}

// TestBackground: a daemon that a step starts keeps its output open; that must neither delay the step's end, nor kill the daemon when it
// writes.
func TestBackground(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	var out []string
	r := runStep(t.Context(), Step{Command: "{ cat " + fifo + "; echo late; echo alive > " + dir + "/alive; } & echo started"},
		func(l string) { out = append(out, l) })
	if r.code != 0 || r.err != nil || !cmp.Equal(out, []string{"started"}) {
		t.Fatalf("%+v, %q", r, out)
	}
	if err := os.WriteFile(fifo, []byte("x\n"), 0); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		if text, _ := os.ReadFile(dir + "/alive"); string(text) == "alive\n" {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the daemon died when it wrote")
		}
	}
	if len(out) != 1 {
		t.Errorf("said after the step's end: %q", out)
	}
}

// TestAptInstall uses programs that act like apt-get.
func TestAptInstall(t *testing.T) {
	const failing = "echo 'Err:1 http://mirror.invalid stable InRelease'; echo '  Temporary failure resolving mirror.invalid'"
	for _, c := range []struct {
		name, update, install string
		code                  int
		log                   []string // the arguments of apt-get
	}{
		{"works", "echo 'Get:1 http://mirror.invalid stable InRelease'", "true", 0, []string{"update", "install jq -x"}},
		{"offline", failing, "echo 'E: Unable to locate package jq'; exit 100", 100, []string{"update", "install --no-download jq -x"}},
		{"offline, and the resolver is slow", "echo 'Ign:1 http://mirror.invalid stable InRelease'; sleep 1000", "exit 100", 100, []string{"update", "install --no-download jq -x"}},
		{"slow, and it works", "echo 'Get:1 http://mirror.invalid stable InRelease'; sleep 3", "true", 0, []string{"update", "install jq -x"}},
		{"slow to begin with", "sleep 3; echo 'Get:1 http://mirror.invalid stable InRelease'", "true", 0, []string{"update", "install jq -x"}},
		{"offline, installed already", failing, "true", 0, []string{"update", "install --no-download jq -x"}},
		{"one of two mirrors", failing + "; echo 'Hit:2 http://other.invalid stable InRelease'", "true", 0, []string{"update", "install jq -x"}},
		{"update fails", "exit 100", "true", 100, []string{"update"}},
		{"locked once", "[ -e locked ] || { touch locked; echo 'E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7'; exit 100; }",
			"true", 0, []string{"update", "update", "install jq -x"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			text := fmt.Sprintf("#!/bin/sh\ncd %s\nsaid=\nfor a; do case $a in update|install|jq|-x|--no-download) said=\"$said $a\" ;; esac; done\n"+
				"echo $said >> log\ncase $said in *update) %s ;; *) %s ;; esac\n", dir, c.update, c.install)
			apt := filepath.Join(dir, "apt-get")
			if err := os.WriteFile(apt, []byte(text), 0o700); err != nil {
				t.Fatal(err)
			}
			t.Parallel() // only from here on: another case's child must not inherit a program that is being written (ETXTBSY)
			var said []string
			r := aptInstall(t.Context(), apt, 2*time.Second, []string{"jq", "-x"}, func(l string) { said = append(said, l) })
			if strings.Contains(c.name, "resolver") && !strings.Contains(networkHint(said), "names do not resolve") {
				t.Errorf("the host cannot tell why: %q", said)
			}
			log, err := os.ReadFile(filepath.Join(dir, "log"))
			if r.code != c.code || err != nil || strings.TrimSpace(string(log)) != strings.Join(c.log, "\n") {
				t.Errorf("%+v, %v; asked %q", r, err, log)
			}
		})
	}
}

// TestRunCommandEnds: a command ends with everything that it has started.
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
	class := tree(t, map[string]string{"vport1p1/name": "org.qemu.guest_agent.0\n", "vport2p7/name": plan.GuestPort + "\n"})
	if dev, err := findPort(class); err != nil || dev != "/dev/vport2p7" {
		t.Errorf("%q, %v", dev, err)
	}
	if _, err := findPort(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

// TestApplyNetwork uses a real interface, in its own network namespace.
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

// TestTextCrosses: a step's text comes over the channel and onto the guest's disk as the host has it: files, scripts, and what an
// interpreter reads.
func TestTextCrosses(t *testing.T) {
	dir := t.TempDir()
	s, _, _ := pair(t, modePrebuild, func(ctx context.Context, c command, say func(string)) result { return runStep(ctx, *c.step, say) })
	for i, text := range []string{
		"", "\n", "a", "a\r\nb\r\n", "  blanks \t\n\n", "a\x00b\x01\x1b[31m\x7f", "\ufeffa\u200b\u2028\u2029b\ufffd", "u\u0308ber Ångström 日本語 🚀",
		`"'\n<>&$(id) ${x} %{y} \u0041`, "{\"type\":\"bye\"}\n{}", strings.Repeat("ü\n", 200<<10),
	} {
		file, script := filepath.Join(dir, fmt.Sprint("file", i)), filepath.Join(dir, fmt.Sprint("script", i))
		if err := os.Mkdir(script, 0o755); err != nil {
			t.Fatal(err)
		}
		command := "#!/bin/cp --target-directory=" + script + "\n" + text
		if err := s.Prebuild(t.Context(), []Step{
			{Name: "file", File: &File{Path: file, Content: text, Mode: "0640"}}, {Name: "run", Command: command},
		}, io.Discard); err != nil {
			t.Errorf("%.40q: %v", text, err)
			continue
		}
		for path, want := range map[string]string{file: text, filepath.Join(script, "step"): command} {
			if got, err := os.ReadFile(path); err != nil || string(got) != want {
				t.Errorf("%.40q arrived as %.80q, %v", want, got, err)
			}
		}
	}
}
