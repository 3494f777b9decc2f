package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// fakeCHEnv turns this test binary into a Cloud Hypervisor: its API according to OpenAPI, without a VM behind it, and with a
// fault. Its value is "FAULT CALL VERSION LOGFILE".
const fakeCHEnv = "FLEETINGD_FAKE_CH"

func TestMain(m *testing.M) {
	if spec := os.Getenv(fakeCHEnv); spec != "" {
		fake := &fakeCH{}
		if _, err := fmt.Sscan(spec, &fake.fault, &fake.call, &fake.version, &fake.logFile); err != nil {
			fmt.Fprintln(os.Stderr, "fake:", err)
			os.Exit(2)
		}
		os.Exit(fake.main(os.Args[1:]))
	}
	if len(os.Args) > 2 && os.Args[1] == targetArg {
		attack(os.Args[2])
	}
	os.Exit(m.Run())
}

type fakeCH struct {
	fault, call, version, logFile string
	events                        *os.File
	created, booted               bool
	nets                          int
}

func (f *fakeCH) main(args []string) int {
	if slices.Contains(args, "--version") {
		fmt.Println("cloud-hypervisor " + f.version)
		return 0
	}
	if f.fault == "die" && f.call == "start" {
		fmt.Fprintln(os.Stderr, "fake: cannot start \x1b[31mat all")
		return 1
	}
	if f.fault == "hang" && f.call == "start" {
		select {}
	}
	if f.fault == "deaf" {
		signal.Ignore(unix.SIGTERM)
	}
	socket, ok := strings.CutPrefix(args[1], "path=")
	if !ok || args[0] != "--api-socket" || args[2] != "--event-monitor" || args[3] != "fd=3" {
		fmt.Fprintf(os.Stderr, "fake: unknown options %q\n", args) // as strict as the real one
		return 1
	}
	f.events = os.NewFile(3, "events")
	l, err := net.Listen("unix", socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, "fake:", err)
		return 1
	}
	for { // one at a time, like the real one
		conn, err := l.Accept()
		if err != nil {
			return 1
		}
		f.serve(conn.(*net.UnixConn))
		conn.Close()
	}
}

// fdReader keeps the descriptors that arrive with the data.
type fdReader struct {
	conn *net.UnixConn
	fds  []int
}

func (r *fdReader) Read(p []byte) (int, error) {
	oob := make([]byte, 1024)
	n, oobn, _, _, err := r.conn.ReadMsgUnix(p, oob)
	if messages, merr := unix.ParseSocketControlMessage(oob[:oobn]); merr == nil {
		for _, m := range messages {
			if fds, ferr := unix.ParseUnixRights(&m); ferr == nil {
				r.fds = append(r.fds, fds...)
			}
		}
	}
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

func (f *fakeCH) serve(conn *net.UnixConn) {
	in := &fdReader{conn: conn}
	request, err := http.ReadRequest(bufio.NewReader(in))
	if err != nil {
		return
	}
	body, _ := io.ReadAll(request.Body)
	call := strings.TrimPrefix(request.URL.Path, "/api/v1/")
	f.note("%s %s %d %s", request.Method, call, len(in.fds), body)
	if f.call == call && f.misbehave(conn) {
		return
	}
	status, answer := f.handle(request.Method, call, body, in.fds)
	if status >= 400 {
		data, _ := json.Marshal(append([]string{"Error from API"}, answer...))
		answer = []string{string(data)}
	}
	text := strings.Join(answer, "")
	fmt.Fprintf(conn, "HTTP/1.1 %d \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n", status)
	if status != http.StatusNoContent {
		fmt.Fprintf(conn, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(text))
	}
	fmt.Fprintf(conn, "\r\n%s", text)
	if call == "vm.power-button" {
		f.shutdown()
	}
}

// misbehave injects the fault, and reports whether there is no answer after it.
func (f *fakeCH) misbehave(conn *net.UnixConn) bool {
	switch f.fault {
	case "die":
		fmt.Fprintln(os.Stderr, "fake: thread 'vmm' panicked at "+f.call)
		os.Exit(101)
	case "hang", "deaf":
		select {}
	case "close":
	case "garbage":
		fmt.Fprint(conn, "SSH-2.0-OpenSSH\r\n\x00\xff\r\n\r\n")
	case "endless":
		fmt.Fprint(conn, "HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n")
		for {
			if _, err := conn.Write(make([]byte, 1<<16)); err != nil {
				return true
			}
		}
	case "error":
		const chain = `["Error from API","The outer","The \u001b[2Jinner","No space left"]`
		fmt.Fprintf(conn, "HTTP/1.1 500 \r\nContent-Length: %d\r\n\r\n%s", len(chain), chain)
	case "plain":
		fmt.Fprint(conn, "HTTP/1.1 500 \r\nContent-Length: 14\r\n\r\nplain old text")
	case "flood":
		f.flood()
		return false
	case "broken-vcpu":
		fmt.Fprintln(os.Stderr, `cloud-hypervisor: 1.5s: <vcpu0> ERROR:vmm/src/cpu.rs:1460 -- VCPU generated error: VcpuRun("bad")`)
		return false
	default:
		return false
	}
	return true
}

// handle is the part of the API's state machine that the driver uses.
func (f *fakeCH) handle(method, call string, body []byte, fds []int) (int, []string) {
	if (call == "vmm.ping") != (method == http.MethodGet) {
		return http.StatusBadRequest, nil
	}
	switch call {
	case "vmm.ping":
		return 200, []string{fmt.Sprintf(`{"build_version":%q,"version":%q,"pid":%d,"features":["kvm","io_uring"]}`,
			f.version, strings.TrimPrefix(f.version, "v"), os.Getpid())}
	case "vm.create":
		var config struct {
			Payload struct{ Kernel string }
			CPUs    struct {
				Boot int `json:"boot_vcpus"`
				Max  int `json:"max_vcpus"`
			}
			Vsock struct {
				CID    int
				Socket string
			}
		}
		if err := json.Unmarshal(body, &config); err != nil || config.Payload.Kernel == "" || config.CPUs.Boot < 1 ||
			config.CPUs.Max < config.CPUs.Boot || config.Vsock.CID < 3 {
			return http.StatusBadRequest, []string{"Failed to deserialize JSON"}
		}
		f.created = true
	case "vm.add-net":
		var config struct {
			Queues int `json:"num_queues"`
		}
		if err := json.Unmarshal(body, &config); err != nil || !f.created || len(fds) == 0 || config.Queues != 2*len(fds) {
			return 500, []string{"The network device could not be added to the VM", "Number of queues to virtio_net does not match FDs"}
		}
		for _, fd := range fds {
			req, _ := unix.NewIfreq("")
			if err := unix.IoctlIfreq(fd, unix.TUNGETIFF, req); err != nil {
				return 500, []string{"not a TAP", err.Error()}
			}
			f.note("TAP %s %#x", req.Name(), req.Uint16()&^unix.IFF_PERSIST)
		}
		f.nets++
	case "vm.boot":
		if len(body) > 0 {
			return http.StatusBadRequest, nil
		}
		if !f.created {
			return 404, []string{"The VM could not boot", "VM config is missing"}
		}
		f.booted = true
		f.event("vm", "booted")
		if f.fault == "broken-vcpu" {
			f.shutdown()
		}
	case "vm.power-button":
		if !f.booted {
			return 500, []string{"Error triggering power button", "VM is not running"}
		}
	default:
		return 404, nil
	}
	return http.StatusNoContent, nil
}

func (f *fakeCH) shutdown() {
	for _, e := range []string{"vm shutdown", "vm deleted", "vmm shutdown"} {
		source, name, _ := strings.Cut(e, " ")
		f.event(source, name)
	}
	os.Exit(0)
}

func (f *fakeCH) event(source, name string) {
	fmt.Fprintf(f.events, "{\n  \"timestamp\": {\n    \"secs\": 1,\n    \"nanos\": 2\n  },\n  \"source\": %q,\n  \"event\": %q,\n"+
		"  \"properties\": null\n}\n\n", source, name)
}

// flood writes events that must not disturb the reader.
func (f *fakeCH) flood() {
	for range 2000 {
		f.event("vm", "resized")
	}
	fmt.Fprint(f.events, "{\"half\": \n\n\x00\xff garbage\n\n", strings.Repeat("x", 1<<20), "\n\n[1,2]\n\n")
}

func (f *fakeCH) note(format string, args ...any) {
	log, err := os.OpenFile(f.logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer log.Close()
	fmt.Fprintf(log, format+"\n", args...)
}

// fakeBench returns a driver whose binary is the fake.
type fakeBench struct {
	*cloudHypervisor
	dir, log string
	n        int
}

func newFakeBench(t *testing.T, fault, call, version string) *fakeBench {
	t.Helper()
	b := &fakeBench{dir: shortDir(t)}
	b.log = filepath.Join(b.dir, "calls")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(b.dir, "cloud-hypervisor")
	text := fmt.Sprintf("#!/bin/sh\n%s='%s %s %s %s' exec '%s' \"$@\"\n", fakeCHEnv, fault, call, version, b.log, self)
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	b.cloudHypervisor = newCloudHypervisor(plan.Hypervisor{Binary: script, Sandbox: true}, log)
	b.kvm = func() error { return nil }
	b.jailer.on = false // the fake is a script, and writes its calls elsewhere; TestJail tests a confined VMM
	return b
}

func (b *fakeBench) config(t *testing.T) Config {
	t.Helper()
	b.n++
	dir := filepath.Join(b.dir, fmt.Sprintf("v%d", b.n))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return Config{ID: "fake", Dir: dir, CPUs: 2, Memory: 1 << 30, Kernel: "/dev/null", Cmdline: "quiet"}
}

func (b *fakeBench) calls(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(b.log)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(data)
}

func TestFakeLife(t *testing.T) {
	for _, fault := range []string{"none", "flood"} {
		b := newFakeBench(t, fault, "vm.boot", "v51.2.0")
		noLeaks(t, b.dir)
		cfg := b.config(t)
		cfg.Limits.DiskIOPS = 100
		cfg.Disks = []Disk{{Path: "/disk", Serial: "root"}}
		v, err := b.Start(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		if adj, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", v.PID())); err != nil || strings.TrimSpace(string(adj)) != oomScoreAdj {
			t.Errorf("the kernel's score for it is raised by %q, %v; want %s", adj, err, oomScoreAdj)
		}
		again, err := b.Adopt(t.Context(), cfg.Dir)
		if err != nil || again.PID() != v.PID() {
			t.Fatalf("Adopt: %v", err)
		}
		if fault == "flood" { // two readers would share the events
			forgetEvents(again)
		}
		// Like the guest: connect to the host's port.
		conn, err := net.Dial("unix", filepath.Join(v.(*chVM).private, chGuestSocket))
		if err != nil {
			t.Fatal(err)
		}
		stream, err := again.Channel(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if n, err := stream.Read(make([]byte, 2)); n != 1 || err != nil {
			t.Errorf("through the channel came %d bytes, %v", n, err)
		}
		conn.Close()
		stream.Close()
		if err := again.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		wait(t, v)
		calls := b.calls(t)
		var names []string
		for line := range strings.Lines(calls) {
			names = append(names, strings.Join(strings.Fields(line)[:2], " "))
		}
		want := []string{"GET vmm.ping", "PUT vm.create", "PUT vm.boot", "GET vmm.ping", "PUT vm.power-button"}
		if !slices.Equal(names, want) {
			t.Errorf("calls %q", names)
		}
		for _, part := range []string{`"image_type":"Raw"`, `"nested":false`, `"free_page_reporting":true`, `"num_queues":2`,
			`"rate_limit_group":"disks"`, `"serial":{"mode":"Off"}`, `"console":{"mode":"Off"}`, `"cmdline":"quiet panic=-1"`} {
			if !strings.Contains(calls, part) {
				t.Errorf("vm.create has no %s:\n%s", part, calls)
			}
		}
		t.Logf("%s: %v", fault, v.Exit())
		if !errors.Is(v.Exit(), ErrPoweredOff) {
			t.Errorf("Exit: %v", v.Exit())
		}
		onlyConsole(t, cfg)
	}
}

func forgetEvents(v VM) { v.(*chVM).events.Close() }

func TestFakeVersions(t *testing.T) {
	for version, want := range map[string]string{
		"v50.0.0": "51.2 or newer", "v51.1.0": "51.2 or newer", "51.1": "51.2 or newer", "nonsense": "not Cloud Hypervisor",
		"v51.2.0": "", "v52.0.0": "", "v53.0.0": "", "v53.0-12-gabcdef-dirty": "", "v100.0.0": "",
	} {
		b := newFakeBench(t, "none", "none", version)
		_, probe := b.Probe(t.Context())
		cfg := b.config(t)
		v, start := b.Start(t.Context(), cfg)
		if start == nil {
			v.Kill()
		}
		for _, err := range []error{probe, start} {
			if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", version, err)
			}
		}
		if want != "" && strings.Contains(b.calls(t), "vm.create") {
			t.Errorf("%s: a VM was made", version)
		}
		onlyConsole(t, cfg)
	}
}

// If only KVM is missing, Info still names the VMM.
func TestFakeProbeWithoutKVM(t *testing.T) {
	b := newFakeBench(t, "none", "none", "v53.0.0")
	b.kvm = func() error { return errors.New("no /dev/kvm") }
	info, err := b.Probe(t.Context())
	if err == nil || !strings.Contains(err.Error(), "no /dev/kvm") || info.Version != "v53.0.0" || info.Binary == "" || info.Accel != "" {
		t.Errorf("%+v, %v", info, err)
	}
}

// A VMM that fails at any step of the start, in any way, leaves no process, socket or record.
func TestFakeFaults(t *testing.T) {
	for _, call := range []string{"start", "vmm.ping", "vm.create", "vm.boot"} {
		for fault, want := range map[string]string{
			"die": "panicked at " + call, "hang": "no answer", "close": "without an answer", "garbage": "malformed",
			"endless": call, "error": `The outer: The \x1b[2Jinner: No space left`, "plain": "plain old text",
		} {
			if call == "start" {
				want = map[string]string{"die": "cannot start at all", "hang": "connect to the VMM at"}[fault]
			}
			// Each call can fail by dying or hanging. Wrong answers are the same for all calls.
			if fault != "die" && fault != "hang" && call != "vm.create" {
				continue
			}
			t.Run(fault+" "+call, func(t *testing.T) {
				b := newFakeBench(t, fault, call, "v53.0.0")
				noLeaks(t, b.dir)
				cfg := b.config(t)
				patience := 20 * time.Second
				if fault == "hang" {
					patience = 500 * time.Millisecond
				}
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				begin := time.Now()
				v, err := b.Start(ctx, cfg)
				if err == nil {
					v.Kill()
					t.Fatal("it started")
				}
				t.Log(err)
				if !strings.Contains(err.Error(), want) || strings.ContainsRune(err.Error(), '\x1b') {
					t.Errorf("the error does not say %q: %q", want, err)
				}
				if took := time.Since(begin); took > 10*time.Second {
					t.Errorf("it took %v", took)
				}
				onlyConsole(t, cfg)
			})
		}
	}
}

// A vCPU that breaks also ends the VMM with status 0: that is not a power-off.
func TestFakeBrokenVCPU(t *testing.T) {
	b := newFakeBench(t, "broken-vcpu", "vm.boot", "v53.0.0")
	noLeaks(t, b.dir)
	cfg := b.config(t)
	v, err := b.Start(t.Context(), cfg)
	if err == nil {
		wait(t, v)
		err = v.Exit()
		defer v.Kill()
	}
	t.Log(err)
	if errors.Is(err, ErrPoweredOff) || !strings.Contains(err.Error(), "VCPU generated error") {
		t.Errorf("Exit: %v", err)
	}
}

// A VMM that neither answers nor reacts to SIGTERM.
func TestFakeDeaf(t *testing.T) {
	need.Slow(t)
	b := newFakeBench(t, "deaf", "vm.power-button", "v53.0.0")
	noLeaks(t, b.dir)
	cfg := b.config(t)
	v, err := b.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := v.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	took := time.Since(begin)
	t.Logf("after %v: %v", took.Round(time.Millisecond), v.Exit())
	if took < termGrace || took > controlDeadline+termGrace+2*time.Second || !strings.Contains(v.Exit().Error(), "signal: killed") {
		t.Errorf("Stop took %v: %v", took, v.Exit())
	}
	onlyConsole(t, cfg)
}

// The TAP is passed to the VMM as descriptors, and none of them stays open if vm.add-net fails.
func TestFakeNet(t *testing.T) {
	requireTUN(t)
	for fault, want := range map[string]string{"none": "", "error": "No space left", "die": "panicked", "hang": "no answer"} {
		b := newFakeBench(t, fault, "vm.add-net", "v53.0.0")
		cfg := b.config(t)
		noLeaks(t, b.dir)
		cfg.Net = &Net{TAP: testTAP, MAC: testMAC, Queues: 2}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		v, err := b.Start(ctx, cfg)
		cancel()
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Fatalf("%s: %v", fault, err)
		}
		if err == nil {
			const flags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE
			if got := strings.Count(b.calls(t), fmt.Sprintf("TAP %s %#x", testTAP, flags)); got != 2 {
				t.Errorf("%d queues of the TAP arrived:\n%s", got, b.calls(t))
			}
			limited := b.config(t)
			limited.Net, limited.Limits.NetworkMbps = cfg.Net, 100
			if _, err := b.Start(t.Context(), limited); err == nil || !strings.Contains(err.Error(), "has it open") {
				t.Errorf("a TAP in use: %v", err)
			}
			if err := v.Kill(); err != nil {
				t.Error(err)
			}
			// Each pair has its own limiter, so a limited VM gets one pair.
			v, err := b.Start(t.Context(), limited)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(b.calls(t), `"num_queues":2,"rate_limiter_config":{"bandwidth":{"size":1250000,"refill_time":100}}`) {
				t.Errorf("100 Mbit/s is not 1.25 MB in 100 ms on one pair:\n%s", b.calls(t))
			}
			if err := v.Kill(); err != nil {
				t.Error(err)
			}
		}
		onlyConsole(t, cfg)
	}
}

// requireTUN moves the test into a network namespace with the TAPs, or skips.
func requireTUN(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("skipped: making TAPs needs root")
	}
	runtime.LockOSThread() // never unlocked: the thread stays there
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Skipf("skipped: no network namespace can be made here: %v", err)
	}
	makeTAPs(t, 0, 0)
}
