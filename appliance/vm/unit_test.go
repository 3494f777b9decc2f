package vm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

func TestOpen(t *testing.T) {
	for _, c := range []struct {
		h    plan.Hypervisor
		want string // in the error
	}{
		{plan.Hypervisor{Driver: "qemu"}, ""},
		{plan.Hypervisor{Driver: "cloud-hypervisor"}, ""},
		{plan.Hypervisor{Driver: "qemu", Accel: "hax"}, `accel must be "auto", "kvm" or "tcg"; got "hax"`},
		{plan.Hypervisor{Driver: "xen"}, `unknown hypervisor "xen"`},
	} {
		d, err := Open(c.h, slog.New(slog.DiscardHandler))
		if c.want == "" && (err != nil || d.Name() != c.h.Driver) {
			t.Errorf("%+v: %v", c.h, err)
		}
		if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%+v: %v", c.h, err)
		}
	}
}

func TestProbeNoBinary(t *testing.T) {
	for _, name := range []string{"qemu", "cloud-hypervisor"} {
		d, err := Open(plan.Hypervisor{Driver: name, Binary: "/no/such/vmm", Accel: "tcg"}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.Probe(t.Context()); err == nil || !strings.Contains(err.Error(), "install") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestQEMUVersion(t *testing.T) {
	for out, want := range map[string]string{
		"QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright": "10.0.2",
		"QEMU emulator version 7.2.0":                                    "7.2.0",
		"bash: not found":                                                "",
		"QEMU emulator version x":                                        "",
	} {
		if got, err := qemuVersion(out); got != want || (err == nil) != (want != "") {
			t.Errorf("%q is %q, %v", out, got, err)
		}
	}
}

func TestOlder(t *testing.T) {
	for version, want := range map[string]bool{
		"7.1": true, "6.9.9": true, "7": true, "7.2": false, "7.2.5": false, "8.0": false, "10.0.2": false, "7.10": false,
	} {
		if older(version, []int{7, 2}) != want {
			t.Errorf("older(%s, 7.2) is not %v", version, want)
		}
	}
}

func TestKernelCommandLine(t *testing.T) {
	for _, c := range []struct{ line, console, want string }{
		{"root=/dev/vda1 ro", "", "root=/dev/vda1 ro panic=-1"},
		{"root=/dev/vda1", "/c", "root=/dev/vda1 console=hvc0 panic=-1"},
		{"console=ttyS0 panic=5 x=\"a  b\"", "/c", "console=ttyS0 panic=5 x=\"a  b\""},
		{"", "", "panic=-1"},
	} {
		if got := kernelCommandLine(&Config{Cmdline: c.line, Console: c.console}, "hvc0"); got != c.want {
			t.Errorf("%q with console %q is %q", c.line, c.console, got)
		}
	}
}

// No path can add an option to QEMU's command line.
func TestQEMUArgsEscape(t *testing.T) {
	q, err := newQEMU(plan.Hypervisor{Accel: "tcg", Sandbox: true}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Skip(err)
	}
	const evil = `/a,readonly=off,x="y`
	args, err := q.args(Config{
		ID: "a,b", Dir: evil, CPUs: 4, Memory: 1 << 30, Kernel: "/k", Console: evil, Net: &Net{TAP: "t", MAC: testMAC, Queues: 4},
		Disks: []Disk{{Path: evil, Serial: evil[:5]}}, Limits: Limits{DiskIOPS: 7},
	}, evil, "tcg")
	if err != nil {
		t.Fatal(err)
	}
	joined := strings.Join(args, "\n")
	for _, want := range []string{
		"path=/a,,readonly=off,,x=\"y/qmp.sock", "fleetingd-a,,b", `"filename":"/a,readonly=off,x=\"y"`, "fds=3:4:5:6",
		`"iops-total":7`, `"vectors":10`, "-sandbox\non,", `"driver":"raw"`,
	} {
		if !strings.Contains(joined, want) {
			t.Errorf("no %s in\n%s", want, joined)
		}
	}
	for i, arg := range args {
		if strings.HasPrefix(arg, "{") && !json.Valid([]byte(arg)) {
			t.Errorf("argument %d is no JSON: %s", i, arg)
		}
	}
}

func TestReboots(t *testing.T) {
	begin := time.Now()
	var r reboots
	at := func(d time.Duration) (bool, error) { return r.add(begin.Add(d)) }
	for i := range rebootLimit - 1 {
		counted, err := at(time.Duration(i) * 3 * time.Minute)
		if again, err := at(time.Duration(i)*3*time.Minute + rebootOnce/2); again || err != nil {
			t.Error("one reboot seen twice was counted twice")
		}
		if !counted || err != nil {
			t.Errorf("reboot %d: %v, %v", i, counted, err)
		}
	}
	// Slow enough reboots may continue forever, in bounded memory.
	for i := range 100 {
		if _, err := at(time.Duration(i+5) * 5 * time.Minute); err != nil {
			t.Fatalf("one reboot in five minutes: %v", err)
		}
	}
	if len(r.at) > rebootLimit {
		t.Errorf("%d reboots are remembered", len(r.at))
	}
	r = reboots{}
	var err error
	for i := 0; i < 50 && err == nil; i++ {
		_, err = at(time.Duration(i) * 100 * time.Millisecond)
	}
	if err == nil || !strings.Contains(err.Error(), "in a loop") {
		t.Errorf("ten a second: %v", err)
	}
}

func TestLastWords(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for text, want := range map[string]string{
		"":                              "",
		"one\n":                         "one",
		"1\n2\n3\n4\n5\n6\r\n\n":        "2 | 3 | 4 | 5 | 6",
		"\x1b]0;evil\a bell \xff":       `\x1b]0;evil\a bell \xff`,
		"\x00\x00\x00tail":              "tail",
		strings.Repeat("x", 5000) + "y": strings.Repeat("x", 2047) + "y",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := lastWords(path); got != want {
			t.Errorf("%.20q ends with %.40q, not %.40q", text, got, want)
		}
	}
	if got := lastWords(path + "-not"); got != "" {
		t.Errorf("no log ends with %q", got)
	}
}

// A growing log is cut while it is written, in either way.
func TestTrimFile(t *testing.T) {
	for _, flag := range []int{os.O_APPEND, 0} {
		path := filepath.Join(shortDir(t), "log")
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|flag, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		chunk := bytes.Repeat([]byte("console\n"), 64<<10/8)
		const keep = 256 << 10
		for range 100 {
			if _, err := f.Write(chunk); err != nil {
				t.Fatal(err)
			}
			if err := trimFile(path, keep); errors.Is(err, unix.EOPNOTSUPP) {
				t.Skip("this file system has no holes")
			} else if err != nil {
				t.Fatal(err)
			}
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if used := st.Blocks * 512; used > 3*keep || st.Size != 100*64<<10 {
			t.Errorf("%d bytes of %d are used", used, st.Size)
		}
		if got := lastWords(path); !strings.HasSuffix(got, "console | console") {
			t.Errorf("it ends with %.80q", got)
		}
	}
}

func TestAcceptor(t *testing.T) {
	path := filepath.Join(shortDir(t), "sock")
	if err := os.WriteFile(path, []byte("stale"), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := accept(path)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	// A guest that connects over and over: only the newest connection is kept.
	before := len(descriptors(t))
	var last net.Conn
	for i := range 50 {
		if last, err = net.Dial("unix", path); err != nil {
			t.Fatal(err)
		}
		defer last.Close()
		if _, err := fmt.Fprintf(last, "%02d", i); err != nil && !errors.Is(err, syscall.EPIPE) {
			t.Fatal(err)
		}
	}
	until(t, "newest connection", func() bool {
		conn, err := a.next(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		said := make([]byte, 2)
		_, err = io.ReadFull(conn, said)
		return err == nil && string(said) == "49"
	})
	// The test's own 50 ends, and none of the other ends.
	until(t, "end of the older connections", func() bool { return len(descriptors(t)) <= before+50 })
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := a.next(ctx, nil); err == nil {
		t.Error("a connection from nobody")
	}
	ended := make(chan struct{})
	close(ended)
	if _, err := a.next(t.Context(), ended); err == nil {
		t.Error("a connection from an ended VM")
	}
}

// qmpServer is QEMU's side of a QMP connection, for faults.
func qmpServer(t *testing.T, answer func(command string, id uint64) string) (*qmp, chan string, error) {
	t.Helper()
	here, there := net.Pipe()
	t.Cleanup(func() { there.Close() })
	events := make(chan string, 1000)
	go func() {
		fmt.Fprintln(there, `{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": ["oob"]}}`)
		in := json.NewDecoder(there)
		for {
			var c struct {
				Execute string
				ID      uint64
			}
			if in.Decode(&c) != nil {
				return
			}
			if _, err := io.WriteString(there, answer(c.Execute, c.ID)); err != nil {
				return
			}
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	q, err := newQMP(ctx, here, func(name string, data qmpEventData) { events <- name + " " + data.Reason })
	if err == nil {
		t.Cleanup(q.close)
	}
	return q, events, err
}

func TestQMP(t *testing.T) {
	ok := func(id uint64) string { return fmt.Sprintf("{\"return\": {}, \"id\": %d}\r\n", id) }
	event := `{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}}` + "\n"
	q, events, err := qmpServer(t, func(command string, id uint64) string {
		switch command {
		case "query-status":
			return strings.Repeat(event, 100) + fmt.Sprintf(`{"return": {"status": "running", "running": true}, "id": %d}`+"\n", id)
		case "quit":
			return fmt.Sprintf(`{"id": %d, "error": {"class": "GenericError", "desc": "not now"}}`+"\n", id)
		}
		return ok(id)
	})
	if err != nil {
		t.Fatal(err)
	}
	var status struct{ Status string }
	if err := q.execute(t.Context(), "query-status", &status); err != nil || status.Status != "running" {
		t.Errorf("status %q, %v", status.Status, err)
	}
	if len(events) != 100 || <-events != "SHUTDOWN guest-shutdown" {
		t.Errorf("%d events", len(events))
	}
	if err := q.execute(t.Context(), "quit", nil); err == nil || !strings.Contains(err.Error(), "not now") {
		t.Errorf("quit: %v", err)
	}

	for what, c := range map[string]struct {
		answer func(id uint64) string
		want   string
	}{
		"silence":  {func(uint64) string { return "" }, "no answer"},
		"garbage":  {func(uint64) string { return "HTTP/1.1 400 Bad Request\n" }, "QMP: invalid character"},
		"nothing":  {func(uint64) string { return "{}\n" }, "not a greeting"},
		"endless":  {func(uint64) string { return strings.Repeat("x", qmpLine+1) }, "too long"},
		"other id": {func(id uint64) string { return ok(id + 7) }, "no answer"},
	} {
		_, _, err := qmpServer(t, func(_ string, id uint64) string { return c.answer(id) })
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A record of another process must never be taken for the VMM's: that would kill the wrong process.
func TestAdoptStranger(t *testing.T) {
	bootID, err := readBootID()
	if err != nil {
		t.Fatal(err)
	}
	start, err := startTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	good := record{Version: 1, Driver: "qemu", ID: "x", PID: os.Getpid(), StartTime: start, BootID: bootID, Running: true}
	log := slog.New(slog.DiscardHandler)
	for what, change := range map[string]func(*record){
		"another start time": func(r *record) { r.StartTime++ },
		"another boot":       func(r *record) { r.BootID = "0000" },
		"no such pid":        func(r *record) { r.PID = 1 << 22 },
		"never ran":          func(r *record) { r.Running, r.StartTime = false, 1 },
	} {
		dir := shortDir(t)
		r := good
		change(&r)
		data, _ := json.Marshal(r)
		for name, text := range map[string]string{recordFile: string(data), logFile: "words", "disk.raw": "kept"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := adopt(dir, "qemu", nil, log); !errors.Is(err, ErrNotRunning) {
			t.Errorf("%s: %v", what, err)
		}
		if entries, _ := os.ReadDir(dir); len(entries) != 1 || entries[0].Name() != "disk.raw" {
			t.Errorf("%s: %v is left", what, entries)
		}
	}
	// What cannot be parsed is not removed.
	for what, text := range map[string]string{
		"garbage": "{", "a later version": `{"version":2,"pid":99}`, "pid 1": `{"version":1,"pid":1}`,
		"another driver": fmt.Sprintf(`{"version":1,"driver":"cloud-hypervisor","pid":%d}`, os.Getpid()),
	} {
		dir := shortDir(t)
		if err := os.WriteFile(filepath.Join(dir, recordFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := adopt(dir, "qemu", nil, log); err == nil || errors.Is(err, ErrNotRunning) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := os.Stat(filepath.Join(dir, recordFile)); err != nil {
			t.Errorf("%s: the record was removed", what)
		}
	}
}

// TestAdoptUnrecorded has a VMM whose starter was killed before it wrote the record: that VMM is killed, and nothing else is.
func TestAdoptUnrecorded(t *testing.T) {
	dir, other := shortDir(t), shortDir(t)
	begin := func(dir string) *exec.Cmd {
		cmd := exec.Command("sleep", "60")
		cmd.Env = []string{folderVariable + "=" + dir}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		return cmd
	}
	orphan, neighbour := begin(dir), begin(other)
	if _, err := adopt(dir, "qemu", nil, slog.New(slog.DiscardHandler)); !errors.Is(err, ErrNotRunning) {
		t.Errorf("adopt: %v", err)
	}
	if err := orphan.Wait(); err == nil || err.Error() != "signal: killed" {
		t.Errorf("the VMM ended by: %v", err)
	}
	if err := neighbour.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("its neighbour: %v", err)
	}
	if pid, err := findByFolder(other); pid != neighbour.Process.Pid || err != nil {
		t.Errorf("found %d, %v; want %d", pid, err, neighbour.Process.Pid)
	}
}

func TestBlockDevice(t *testing.T) {
	device, err := blockDevice("/proc/self/stat")
	if err != nil || device != "" {
		t.Errorf("/proc is on %q, %v", device, err)
	}
	device, err = blockDevice(t.TempDir())
	t.Logf("%s is on %q", t.TempDir(), device)
	if err != nil {
		t.Error(err)
	}
	if device != "" {
		if _, err := os.Stat("/sys/dev/block/" + device + "/partition"); err == nil {
			t.Errorf("%s is a partition", device)
		}
	}
}

func TestParseCgroup(t *testing.T) {
	for data, want := range map[string]string{
		"0::/system.slice/gitlab-runner.service/runner\n": "/system.slice/gitlab-runner.service/runner",
		"9:name=systemd:/\n4:memory:/x\n0::/\n":           "/",
		"4:memory:/x\n":                                   "", "": "", "0::": "", "0::relative": "",
	} {
		if got, err := parseCgroup(data); got != want || (err == nil) != (want != "") {
			t.Errorf("%q is %q, %v", data, got, err)
		}
	}
}

func FuzzParseQMP(f *testing.F) {
	f.Add([]byte(`{"return": {}, "id": 1}`))
	f.Add([]byte(`{"event": "RESET", "data": {"guest": true}}`))
	f.Add([]byte(`{"QMP": {}}`))
	f.Add([]byte(`{"error": {"class": "x", "desc": "y"}, "id": 18446744073709551615}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, line []byte) {
		m, err := parseQMP(line)
		if err == nil && m.Greeting == nil && m.Return == nil && m.Error == nil && m.Event == "" {
			t.Errorf("%q is a message of nothing", line)
		}
	})
}

func FuzzParseRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"driver":"qemu","id":"x","pid":4711,"start_time":99,"boot_id":"b","running":true}`))
	f.Add([]byte(`{"version":1,"pid":-1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if r, err := parseRecord(data); err == nil && r.PID <= 1 {
			t.Errorf("%q gives pid %d", data, r.PID)
		}
	})
}

func FuzzParseStartTime(f *testing.F) {
	f.Add([]byte("1 (a) b) (c) S 0 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 9"))
	f.Add([]byte(")"))
	f.Fuzz(func(t *testing.T, stat []byte) { parseStartTime(stat) })
}

// Whatever the VMM's pipe delivers, in whatever pieces, a complete event after a blank line is seen.
func FuzzReadEvents(f *testing.F) {
	f.Add([]byte("{\n \"source\": \"vm\",\n \"event\": \"booted\"\n}\n\n"), uint64(1))
	f.Add([]byte("{\"half\": \n\n\x00\xff"), uint64(2))
	f.Add(bytes.Repeat([]byte("x"), chEventBytes+10), uint64(3))
	f.Add([]byte("\r\n\r\n[]"), uint64(4))
	f.Fuzz(func(t *testing.T, noise []byte, seed uint64) {
		text := append(append([]byte(nil), noise...), "\n\n{\"source\":\"vmm\",\n\"event\":\"last\"}\n\n"...)
		last := chEvent{}
		readEvents(&piecemeal{text, rand.New(rand.NewPCG(seed, 0))}, func(e chEvent) { last = e })
		if last != (chEvent{"vmm", "last"}) {
			t.Errorf("after %.40q the last event is %+v", noise, last)
		}
	})
}

type piecemeal struct {
	rest []byte
	rand *rand.Rand
}

func (p *piecemeal) Read(b []byte) (int, error) {
	if len(p.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(b[:min(len(b), 1+p.rand.IntN(100))], p.rest)
	p.rest = p.rest[n:]
	return n, nil
}

func FuzzErrorChain(f *testing.F) {
	f.Add([]byte(`["Error from API","The VM could not boot"]`))
	f.Add([]byte("plain\x1b[2J text\nand more"))
	f.Add([]byte(strings.Repeat("é\n", 1000)))
	f.Fuzz(func(t *testing.T, body []byte) {
		text := (&chError{Call: "vm.boot", Status: 500, Chain: chChain(body)}).Error()
		if len(text) > 20*3*500+100 || strings.ContainsFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }) {
			t.Errorf("%.60q gives %.60q", body, text)
		}
	})
}

func FuzzVersions(f *testing.F) {
	f.Add("cloud-hypervisor v53.0.0\nMigration")
	f.Add("QEMU emulator version 10.0.2 (Debian)")
	f.Fuzz(func(t *testing.T, text string) {
		chVersion(text)
		qemuVersion(text)
	})
}
