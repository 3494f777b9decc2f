package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"gitlab.com/gitlab-org/fleeting/fleeting"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// base is the Debian base image of the lab's spec.
func (l *lab) base(r *hostRun) *image.Base {
	l.t.Helper()
	b, err := image.NewBuilder(r.plan, image.Options{}).Build(l.t.Context(), &r.plan.Images[0], false)
	if err != nil {
		l.t.Fatal(err)
	}
	return b
}

// TestPredecessor is the upstream suite once more: with the predecessor's keys, as root, on a host where nothing
// is set up, and with an image from a web server that SHA256SUMS speaks for.
func TestPredecessor(t *testing.T) {
	if provisioning(t) {
		return
	}
	l := newLab(t)
	b := l.base(l.imagesUp(l.spec))
	web := filepath.Join(l.dir, "web")
	if err := os.Mkdir(web, 0o755); err != nil {
		t.Fatal(err)
	}
	disk := filepath.Join(web, "disk.qcow2")
	if out, err := exec.Command("qemu-img", "convert", "-O", "qcow2", b.Disk, disk).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for from, to := range map[string]string{b.Kernel: "vmlinuz", b.Initrd: "initrd"} {
		if err := os.Symlink(from, filepath.Join(web, to)); err != nil {
			t.Fatal(err)
		}
	}
	var sums strings.Builder
	for _, name := range []string{"disk.qcow2", "vmlinuz", "initrd"} {
		fmt.Fprintf(&sums, "%s *%s\n", sha256File(t, filepath.Join(web, name)), name)
	}
	if err := os.WriteFile(filepath.Join(web, "SHA256SUMS"), []byte(sums.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	url := l.serve(web)

	keys := map[string]any{
		"egress_interface": "eth0", "vm_disk_directory": filepath.Join(l.dir, "vms"), "vm_subnet": "172.16.66.",
		"vm_num_cpu_cores": 1, "vm_memory_mb": 1024, "vm_disk_size_gb": 4,
		"vm_prebuild_cloudinit_extra_cmds": []string{"echo prebuilt > /etc/fleetingd-test"}, "vm_enable_virtio_console": true,
	}
	config, err := json.Marshal(keys)
	if err != nil {
		t.Fatal(err)
	}
	env := []string{
		"FLEETINGD_HYPERVISOR=qemu", "FLEETINGD_IMAGE_URL=" + url + "/disk.qcow2",
		"FLEETINGD_KERNEL_URL=" + url + "/vmlinuz", "FLEETINGD_INITRD_URL=" + url + "/initrd",
	}
	// The plugin brings the host up and leaves it so: its workers outlive it. Here they must not.
	t.Cleanup(func() {
		for _, e := range env {
			name, value, _ := strings.Cut(e, "=")
			t.Setenv(name, value)
		}
		var decoded map[string]any
		if err := json.Unmarshal(config, &decoded); err != nil {
			t.Fatal(err)
		}
		p, err := predecessorPlan(decoded)
		if err != nil {
			t.Fatal(err)
		}
		down := func() error { return host.NetworkDown(context.Background(), p) }
		if err := l.within(down); err != nil {
			t.Error(err)
		}
		if err := host.DisksDown(context.Background(), p); err != nil {
			t.Error(err)
		}
		if err := os.Remove(filepath.Join(p.Paths.Run, p.Pools[0].Name+".lock")); err != nil {
			t.Error(err)
		}
	})
	l.asUser(runtimeUser{}, append(env, "FLEETINGD_TEST_PROVISIONING="+string(config), "FLEETINGD_TEST_PLUGIN="+l.plug)...)
}

func sha256File(t *testing.T, path string) string {
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// serve is a web server on the namespace's loopback.
func (l *lab) serve(dir string) string {
	var ln net.Listener
	err := l.within(func() (err error) {
		ln, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	})
	if err != nil {
		l.t.Fatal(err)
	}
	srv := &http.Server{Handler: http.FileServer(http.Dir(dir))}
	l.t.Cleanup(func() { srv.Close() })
	go srv.Serve(ln)
	return "http://" + ln.Addr().String()
}

// TestFailingStep: a prebuild step that fails ends the run, is named, and shows its last lines. Secrets that only root can read reach
// the guest all the same. They are neither shown nor kept on the host, and no process of another user has them in its arguments or environment.
func TestFailingStep(t *testing.T) {
	l := newLab(t)
	// The package mirror is outside of the namespace.
	if err := l.within(l.imagesUp(l.spec).unwind); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(l.spec)
	if err != nil {
		t.Fatal(err)
	}
	broken := strings.Replace(string(text), `"echo prebuilt > /etc/fleetingd-test"`,
		`"test \"$(cat /etc/test-secret)\" = \"key=$(echo Q0FOQVJZLTA0Nw== | base64 -d)\"; test \"$(cat /etc/test-env)\" = \"$(echo Q0FOQVJZLTA0OA== | base64 -d)\"", "echo the cause of it >&2; cat /etc/test-secret; exit 42", "echo never"]
    file "/etc/test-secret" {
      content = "key=${file("`+l.dir+`/secret")}"
      mode    = "0600"
    }
    file "/etc/test-env" {
      content = env("FLEETINGD_TEST_SECRET")
    }
    packages = [`, 1)
	t.Setenv("FLEETINGD_TEST_SECRET", "CANARY-048")
	if err := os.WriteFile(filepath.Join(l.dir, "secret"), []byte("CANARY-047\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	spec := filepath.Join(l.dir, "broken.hcl")
	if err := os.WriteFile(spec, []byte(broken), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd, result := l.start(spec, "--", "true")
	ended := make(chan struct{})
	watched := make(chan map[string]bool)
	go func() { watched <- watchProcesses(t, "CANARY", ended) }()
	err = cmd.Wait()
	close(ended)
	seen := <-watched
	res := result(err)
	if res.code != 1 {
		t.Errorf("exit code %d", res.code)
	}
	// What was started by /proc/self/exe is called exe by kernels before 6.14; a name has 15 bytes.
	if !seen["fleetingd"] && !seen["exe"] || !seen["qemu-system-x86"] {
		t.Errorf("the processes of the runtime user were not seen: %v", seen)
	}
	for _, want := range []string{"run[1]", "42", "the cause of it", "key=***"} {
		if !strings.Contains(res.stderr, want) {
			t.Errorf("the error does not say %q", want)
		}
	}
	if strings.Contains(res.stdout+res.stderr, "CANARY") {
		t.Error("the secret is shown")
	}
	// The disks' file may still hold what the guest wrote: every job may read it there, too.
	if out, err := exec.Command("grep", "-rlF", "--exclude=disks.xfs", "CANARY-04", l.state).CombinedOutput(); len(out) > 0 {
		t.Errorf("the secret is in: %s (%v)", out, err)
	}
	l.nothingLeft()
}

// watchProcesses looks for text in the arguments and environment of all processes that are not root's, until ended, and gives the names of
// those processes.
func watchProcesses(t *testing.T, text string, ended <-chan struct{}) map[string]bool {
	seen := map[string]bool{}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		dirs, err := filepath.Glob("/proc/[0-9]*")
		if err != nil {
			t.Error(err)
		}
		for _, dir := range dirs {
			st, err := os.Stat(dir)
			if err != nil || st.Sys().(*syscall.Stat_t).Uid == 0 {
				continue
			}
			name, _ := os.ReadFile(filepath.Join(dir, "comm")) // it may have ended
			seen[strings.TrimSpace(string(name))] = true
			for _, file := range []string{"cmdline", "environ"} {
				if b, _ := os.ReadFile(filepath.Join(dir, file)); bytes.Contains(b, []byte(text)) {
					t.Errorf("the secret is in the %s of %s", file, name)
				}
			}
		}
		select {
		case <-ended:
			return seen
		case <-tick.C:
		}
	}
}

const silentConfig = "FLEETINGD_TEST_SILENT"

// TestSilentGuest: a guest that never answers is given up in time and shown as timed out; one whose VMM is
// killed is noticed at once; of neither is anything left.
func TestSilentGuest(t *testing.T) {
	if config := os.Getenv(silentConfig); config != "" {
		silentGuests(t, config)
		return
	}
	l := newLab(t)
	r := l.hostUp(l.spec)
	b := l.base(r)
	// A guest that does nothing, in an image that has no guest part.
	r.plan.Images[0].Source = plan.Source{File: &plan.FileSource{
		Disk: b.Disk, Kernel: b.Kernel, Initrd: b.Initrd, Cmdline: "root=/dev/vda ro init=/usr/bin/sleep infinity",
	}}
	r.plan.Images[0].Prebuild = nil
	r.plan.Pools[0].StartTimeout = plan.Duration(40 * time.Second)
	own, err := ownPlan(r.plan, r.own)
	if err != nil {
		t.Fatal(err)
	}
	text, err := own.JSON()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(r.req.Plan, text, 0o644); err != nil {
		t.Fatal(err)
	}
	config, err := json.Marshal(map[string]string{"plan": r.req.Plan, "pool": r.req.Pool})
	if err != nil {
		t.Fatal(err)
	}
	l.asUser(r.user, append(r.tunEnviron(), silentConfig+"="+string(config), "FLEETINGD_TEST_PLUGIN="+l.plug, "FLEETINGD_TEST_RUN="+r.plan.Paths.Run)...)
	for _, dir := range []string{r.plan.Paths.Workers, r.plan.Paths.Clones} {
		out, err := exec.Command("find", dir, "-mindepth", "2").CombinedOutput()
		if err != nil || len(out) > 0 {
			t.Errorf("left behind in %s: %s%v", dir, out, err)
		}
	}
}

func silentGuests(t *testing.T, config string) {
	plugin, err := fleeting.RunPlugin(os.Getenv("FLEETINGD_TEST_PLUGIN"), []byte(config),
		fleeting.WithPluginLogger(hclog.New(&hclog.LoggerOptions{Output: os.Stderr, Level: hclog.Info})))
	if err != nil {
		t.Fatal(err)
	}
	defer plugin.Kill()
	group, ctx := plugin.InstanceGroup(), t.Context()
	if _, err := group.Init(ctx, hclog.Default(), provider.Settings{}); err != nil {
		t.Fatal(err)
	}
	if n, err := group.Increase(ctx, 2); n != 2 || err != nil {
		t.Fatalf("Increase: %d, %v", n, err)
	}
	states := func() map[string]provider.State {
		all := map[string]provider.State{}
		if err := group.Update(ctx, func(id string, s provider.State) { all[id] = s }); err != nil {
			t.Fatal(err)
		}
		return all
	}
	killed := ""
	waitFor(t, time.Minute, "VMM to kill", func() bool {
		for id := range states() {
			var vmm struct {
				PID int `json:"pid"`
			}
			text, err := os.ReadFile(filepath.Join(os.Getenv("FLEETINGD_TEST_RUN"), id, "vm", "vmm.json"))
			if err == nil && json.Unmarshal(text, &vmm) == nil && vmm.PID > 1 {
				killed = id
				if err := syscall.Kill(vmm.PID, syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
				return true
			}
		}
		return false
	})
	waitFor(t, 10*time.Second, "notice of the killed VMM", func() bool {
		s := states()[killed]
		return s == provider.StateDeleting || s == provider.StateDeleted
	})
	err = group.Heartbeat(ctx, killed)
	if err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("the heartbeat of a worker whose VMM was killed: %v", err)
	}
	other := ""
	waitFor(t, 2*time.Minute, "timeout of the silent guest", func() bool {
		for id, s := range states() {
			if s == provider.StateTimeout {
				other = id
			}
		}
		return other != ""
	})
	if other == killed {
		t.Error("the killed worker timed out")
	}
	if err := group.Heartbeat(ctx, other); err == nil || !strings.Contains(err.Error(), "40s") {
		t.Errorf("the heartbeat of a worker that timed out: %v", err)
	}
	if err := group.Shutdown(ctx); err != nil {
		t.Error(err)
	}
}
