package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/landlockabi"
	"github.com/fleetingd/fleetingd/appliance/need"
)

// What a VMM that was taken over tries. The attacker is this test binary, started by the drivers' own start() instead of a VMM and
// as the same user as all its targets.
const (
	jailEnv   = "FLEETINGD_TEST_JAIL"   // run TestJail again, as nobody
	targetArg = "fleetingd-test-attack" // os.Args[1] of the attacker
)

// targets are what the attacker attacks.
type targets struct {
	Own, Private         string // its own disk, its folder
	Config, Disk, Record string // files that its user may read and write
	Folder               string
	Socket, Abstract     string
	TCP, UDP             string
	Victim               int // a process of its user
	Kernel               string
}

// attempts are the attacks, by name; they return the kernel's error.
var attempts = []struct {
	name    string
	allowed bool // must succeed: otherwise the jail would keep a VMM from its work, and the denials would prove nothing
	abi     int  // the landlock ABI since which it is denied; 0: denied by something else
	do      func(targets) error
}{
	{"read its own disk", true, 0, func(t targets) error { return readOne(t.Own) }},
	{"write its own disk", true, 0, func(t targets) error { return writeOne(t.Own) }},
	{"read its kernel", true, 0, func(t targets) error { return readOne(t.Kernel) }},
	{"make a socket in its folder", true, 0, func(t targets) error {
		l, err := net.Listen("unix", filepath.Join(t.Private, "x"))
		if err == nil {
			l.Close()
		}
		return err
	}},
	{"write its kernel", false, 1, func(t targets) error { return writeOne(t.Kernel) }},
	{"read config.toml", false, 1, func(t targets) error { return readOne(t.Config) }},
	{"read another worker's disk", false, 1, func(t targets) error { return readOne(t.Disk) }},
	{"write another worker's disk", false, 1, func(t targets) error { return writeOne(t.Disk) }},
	{"truncate another worker's disk", false, landlockabi.Files, func(t targets) error { return os.Truncate(t.Disk, 0) }},
	{"write a worker's record", false, 1, func(t targets) error { return writeOne(t.Record) }},
	{"list the workers", false, 1, func(t targets) error { _, err := os.ReadDir(t.Folder); return err }},
	{"make a file there", false, 1, func(t targets) error { return os.WriteFile(filepath.Join(t.Folder, "new"), nil, 0o600) }},
	{"remove a file there", false, 1, func(t targets) error { return os.Remove(t.Disk) }},
	{"link a file to its folder", false, 1, func(t targets) error { return os.Link(t.Config, filepath.Join(t.Private, "stolen")) }},
	{"move a file to its folder", false, 1, func(t targets) error { return os.Rename(t.Disk, filepath.Join(t.Private, "stolen")) }},
	{"list the sockets of the host", false, 1, func(targets) error { return readOne("/proc/self/net/unix") }},
	{"connect to an abstract socket", false, landlockabi.Scopes, func(t targets) error { return dial("unix", t.Abstract) }},
	// Before ABI 9 nothing forbids this to a process that knows the path. The folders of the sockets of VMMs and the plugin have random
	// names, and cannot be listed: see privatePrefix.
	{"connect to a socket whose path it knows", false, 9, func(t targets) error { return dial("unix", t.Socket) }},
	{"connect by TCP", false, 0, func(t targets) error { return dial("tcp", t.TCP) }},
	{"send by UDP", false, 0, func(t targets) error { return dial("udp", t.UDP) }},
	{"listen on TCP", false, 0, func(targets) error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err == nil {
			l.Close()
		}
		return err
	}},
	{"open a raw socket", false, 0, func(targets) error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}},
	{"talk to the kernel's routing", false, 0, func(targets) error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}},
	{"kill a process of its user", false, landlockabi.Scopes, func(t targets) error { return unix.Kill(t.Victim, unix.SIGTERM) }},
	{"trace it", false, 1, func(t targets) error { return unix.PtraceSeize(t.Victim) }},
	{"read its memory", false, 1, func(t targets) error {
		b := make([]byte, 1)
		local := []unix.Iovec{{Base: &b[0], Len: 1}}
		_, err := unix.ProcessVMReadv(t.Victim, local, []unix.RemoteIovec{{Base: 0x1000, Len: 1}}, 0)
		return err
	}},
	{"open its memory", false, 1, func(t targets) error { return readOne(fmt.Sprintf("/proc/%d/mem", t.Victim)) }},
	{"read its environment", false, 1, func(t targets) error { return readOne(fmt.Sprintf("/proc/%d/environ", t.Victim)) }},
	{"enter its root", false, 1, func(t targets) error { return readOne(fmt.Sprintf("/proc/%d/root%s", t.Victim, t.Config)) }},
	{"take its descriptors", false, 1, func(t targets) error {
		fd, err := unix.PidfdOpen(t.Victim, 0)
		if err != nil {
			return nil // it may see the process, but not this way
		}
		_, err = unix.PidfdGetfd(fd, 0, 0)
		return err
	}},
	{"execute a shell", false, 1, func(targets) error { return exec.Command("/bin/sh", "-c", "exit 0").Run() }},
	{"open the host's memory", false, 1, func(targets) error { return readOne("/dev/mem") }},
	{"open a terminal", false, 1, func(targets) error { return writeOne("/dev/ptmx") }},
	{"open a TAP", false, 1, func(targets) error { return writeOne("/dev/net/tun") }},
	{"gain privileges again", false, 0, func(targets) error {
		v, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
		if err == nil && v == 1 {
			return unix.EPERM
		}
		return err
	}},
}

func readOne(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.Read(make([]byte, 1))
	return err
}

func writeOne(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

func dial(network, addr string) error {
	c, err := net.DialTimeout(network, addr, time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Write([]byte("x"))
	return err
}

// attack is the attacker's main function. It writes its findings to standard output, which is the VMM's log.
func attack(spec string) {
	var t targets
	if err := json.Unmarshal([]byte(spec), &t); err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	time.AfterFunc(20*time.Second, func() { os.Exit(3) })
	found := map[string]string{}
	for _, a := range attempts {
		found[a.name] = ""
		if err := a.do(t); err != nil {
			found[a.name] = err.Error()
		}
	}
	json.NewEncoder(os.Stdout).Encode(found)
	os.Exit(0)
}

// TestJail: a VMM that was taken over can only reach its own worker's files.
func TestJail(t *testing.T) {
	if os.Getenv(jailEnv) == "" && os.Getuid() == 0 {
		jailAsNobody(t)
		return
	}
	if os.Getenv(jailEnv) == "" && need.Full() {
		t.Fatal("this test runs itself again as nobody, which takes root")
	}
	abi, err := landlockabi.Version()
	if err != nil {
		t.Fatal(err)
	}
	if abi == 0 {
		t.Skip("skipped: this kernel has no landlock")
	}
	dir := shortDir(t)
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"config.toml", "other.raw", "own.raw", "kernel", "vmm.json"} {
		if err := os.WriteFile(at(name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(at("vm"), 0o700); err != nil {
		t.Fatal(err)
	}
	var private string
	tg := targets{
		Own: at("own.raw"), Config: at("config.toml"), Disk: at("other.raw"), Record: at("vmm.json"), Folder: dir, Kernel: at("kernel"),
		Socket: at("sock"), Abstract: "@fleetingd-test-" + strconv.Itoa(os.Getpid()),
	}
	tg.TCP, tg.UDP = listenAll(t, tg.Abstract, tg.Socket)
	victim := exec.Command("sleep", "60")
	victim.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { victim.Process.Kill(); victim.Wait() })
	tg.Victim = victim.Process.Pid

	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := func(on bool) map[string]string {
		t.Helper()
		var err error
		if private, err = makePrivate(at("vm")); err != nil {
			t.Fatal(err)
		}
		tg.Private = private
		spec, err := json.Marshal(tg)
		if err != nil {
			t.Fatal(err)
		}
		log := slog.New(slog.NewTextHandler(t.Output(), nil))
		p, err := start(launch{
			cfg:    Config{ID: "jail", Dir: at("vm"), CPUs: 1, Memory: 1 << 30, Kernel: at("kernel"), Disks: []Disk{{Path: at("own.raw")}}},
			driver: "test", binary: self, args: []string{targetArg, string(spec)}, private: private, log: log, groups: newCgroups(log),
			jailer: &jailer{on: on, log: log},
		})
		if err != nil {
			t.Fatal(err)
		}
		p.watch(nil)
		<-p.done
		out, err := os.ReadFile(filepath.Join(at("vm"), logFile))
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]string{}
		if err := json.Unmarshal(out, &found); err != nil {
			t.Fatalf("%v\n%v\n%s", p.exitError(), err, out)
		}
		if err := p.kill(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(private); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the VMM's folder is left: %v", err)
		}
		return found
	}
	jailed := run(true)
	var table bytes.Buffer
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "attempt\tconfined")
	for _, a := range attempts {
		answer := jailed[a.name]
		if answer == "" {
			answer = "works"
		}
		fmt.Fprintf(w, "%s\t%s\n", a.name, answer)
		switch {
		case a.allowed && jailed[a.name] != "":
			t.Errorf("%s: %s", a.name, answer)
		case !a.allowed && jailed[a.name] == "" && a.abi <= abi:
			t.Errorf("%s works (landlock ABI %d)", a.name, abi)
		}
	}
	w.Flush()
	t.Logf("landlock ABI %d\n%s", abi, table.String())
	if err := unix.Kill(tg.Victim, 0); err != nil {
		t.Errorf("the victim: %v", err)
	}
	// Without the jail most attempts succeed: the test can fail.
	free := run(false)
	works := 0
	for _, a := range attempts {
		if !a.allowed && free[a.name] == "" {
			works++
		}
	}
	if works < 8 {
		t.Errorf("unconfined, only %d of the attempts work: the table proves nothing\n%v", works, free)
	}
}

// listenAll listens on everything that the attacker connects to.
func listenAll(t *testing.T, abstract, path string) (tcp, udp string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a, err := net.Listen("unix", abstract)
	if err != nil {
		t.Fatal(err)
	}
	p, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	u, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []net.Listener{l, a, p} {
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
	}
	t.Cleanup(func() { u.Close() })
	return l.Addr().String(), u.LocalAddr().String()
}

// jailAsNobody runs the test as an ordinary user, like VMMs: root's capabilities would hide the effects of the jail.
func jailAsNobody(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "fdjail")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	copied := filepath.Join(dir, "vm.test") // where nobody can read it
	data, err := os.ReadFile(self)
	if err := errors.Join(err, os.WriteFile(copied, data, 0o755), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(copied, "-test.run=^TestJail$", "-test.v", "-test.timeout=2m")
	cmd.Dir = dir
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "TMPDIR=") }), jailEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	t.Logf("as nobody:\n%s", out)
	if err != nil || !bytes.Contains(out, []byte("PASS: TestJail")) && !bytes.Contains(out, []byte("SKIP: TestJail")) {
		t.Error(err)
	}
}
