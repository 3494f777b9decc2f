package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// Names of the programs that run without privileges.
var vmmNames = []string{"cloud-hypervisor", "qemu-system-x86_64"}

// noPrivileges fails the test unless the plugin and a VMM of this user are running without privileges, and prints what
// they have. A VMM's threads have to be under seccomp, except the main thread of Cloud Hypervisor, which
// filters each of the others.
func noPrivileges(t *testing.T) {
	t.Helper()
	plugin, err := filepath.EvalSymlinks(os.Getenv("FLEETINGD_TEST_PLUGIN"))
	if err != nil {
		t.Fatal(err)
	}
	plugins := processes(t, filepath.Base(plugin))
	if len(plugins) == 0 {
		t.Errorf("no process %s of this user", plugin)
	}
	for _, p := range plugins {
		p.unprivileged(t)
	}
	vmms := 0
	for _, name := range vmmNames {
		for _, p := range processes(t, name) {
			vmms++
			p.unprivileged(t)
			if p.status["NoNewPrivs"] != "1" {
				t.Errorf("%s: NoNewPrivs is %s", p, p.status["NoNewPrivs"])
			}
			p.confined(t)
			p.limited(t)
		}
	}
	if vmms == 0 {
		t.Errorf("no VMM of this user among %q", vmmNames)
	}
}

// process is a process in /proc, with its proc_pid_status(5).
type process struct {
	pid    int
	name   string
	dir    string
	status map[string]string
}

func (p process) String() string { return p.name + " " + strconv.Itoa(p.pid) }

// processes finds this user's processes by the base name of their program.
func processes(t *testing.T, name string) []process {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var found []process
	for _, dir := range dirs {
		exe, err := os.Readlink(filepath.Join(dir, "exe"))
		if err != nil || filepath.Base(exe) != name {
			continue // a kernel thread, another user's, or it has ended
		}
		status, err := procStatus(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if uid, _, _ := strings.Cut(status["Uid"], "\t"); uid != strconv.Itoa(os.Getuid()) {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(dir)) // the pattern is of digits
		found = append(found, process{pid, name, dir, status})
	}
	return found
}

func procStatus(dir string) (map[string]string, error) {
	text, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return nil, err
	}
	status := map[string]string{}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		status[key] = strings.TrimSpace(value)
	}
	return status, nil
}

// unprivileged prints and checks the sets of capabilities.
func (p process) unprivileged(t *testing.T) {
	t.Helper()
	s := p.status
	t.Logf("%s: uid %s, groups %s, CapEff %s, CapPrm %s, NoNewPrivs %s, Seccomp %s",
		p, s["Uid"], s["Groups"], s["CapEff"], s["CapPrm"], s["NoNewPrivs"], s["Seccomp"])
	for _, set := range []string{"CapEff", "CapPrm", "CapAmb"} {
		if strings.Trim(s[set], "0") != "" {
			t.Errorf("%s: %s is %s", p, set, s[set])
		}
	}
}

// confined prints and checks the seccomp mode of each thread. If a unit's SystemCallFilter= applies to all of them, a
// thread's own filters are those that it has in addition to the main thread's.
func (p process) confined(t *testing.T) {
	t.Helper()
	tasks, err := filepath.Glob(filepath.Join(p.dir, "task/*"))
	if err != nil {
		t.Fatal(err)
	}
	filters := func(s map[string]string) int {
		n, err := strconv.Atoi(s["Seccomp_filters"])
		if err != nil {
			t.Fatalf("%s: Seccomp_filters: %v", p, err)
		}
		return n
	}
	main := filters(p.status)
	for _, task := range tasks {
		s, err := procStatus(task)
		if errors.Is(err, fs.ErrNotExist) || err == nil && filepath.Base(task) == strconv.Itoa(p.pid) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: thread %s: Seccomp %s, %d filters (the main thread has %d)", p, s["Name"], s["Seccomp"], filters(s), main)
		const filtered = "2" // SECCOMP_MODE_FILTER
		if s["Seccomp"] != filtered || p.name == "cloud-hypervisor" && filters(s) <= main {
			t.Errorf("%s: thread %s has no seccomp filter of its own", p, s["Name"])
		}
	}
}

// limited prints the kernel's limits of a VMM, if it has its own cgroup.
func (p process) limited(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(p.dir, "cgroup"))
	if err != nil {
		t.Fatal(err)
	}
	_, path, found := strings.Cut(string(text), "0::")
	path = filepath.Join("/sys/fs/cgroup", strings.TrimSpace(path))
	if !found || !strings.HasPrefix(filepath.Base(path), "vm-") {
		return // nothing is delegated to the plugin
	}
	for _, name := range []string{"cpu.max", "memory.max", "io.max", "pids.max"} {
		limit, err := os.ReadFile(filepath.Join(path, name))
		t.Logf("%s: %s: %s: %s", p, filepath.Base(path), name, strings.TrimSpace(string(limit)))
		if err != nil {
			t.Error(err)
		}
	}
}
