package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/hostlab"
	"github.com/fleetingd/fleetingd/appliance/need"
)

const applySpec = `
host "hostlab" {
  egress_interface = "eth0"
  install          = false
  disks {
    backing = "xfs-image"
    size    = "2GiB"
  }
  network { subnet = "172.16.67.0/24" }
  hypervisor "qemu" {}
}
image "golden" {
  file {
    disk   = "/srv/golden.qcow2"
    kernel = "/srv/vmlinuz"
  }
  prebuild { run = ["true"] }
  user = "ci"
}
pool "small" {
  image         = image.golden
  cpus          = 1
  memory        = "1GiB"
  disk          = "5GiB"
  start         = "cold"
  max_instances = 3
}
runner "small" {
  pool  = pool.small
  url   = "https://gitlab.example.com"
  token = file("/run/secrets/gitlab-token")
}
`

// inventory is a host as it was found: all files with their digests but for what a running system writes by itself, the kernel's network,
// its settings, and systemd's units. Whether a boot waited for the network is not a question of what is on the host by now.
const inventory = `
find / -xdev \( -path /var/log -o -path /var/lib/systemd -o -path /var/cache -o -path /var/tmp -o -path /tmp -o -path /root/inventory \
	-o -path /etc/.pwd.lock -o -name '*-' -path '/etc/*' \) -prune -o -printf '%M %u %g %p %l\n' | sort
find /etc /usr/local /root /srv -xdev -type f ! -name '*-' ! -path /root/inventory -exec sha256sum {} + | sort -k2
nft list ruleset
ip -j -p addr | grep -v lft; ip route show table all; ip rule; ip -br link
systemctl list-unit-files --no-pager
systemctl list-units --no-pager --plain --no-legend --type=service,timer,mount --state=active | awk '{print $1}' | grep -v wait-online
sysctl -a 2>/dev/null | grep -E '^net\.ipv[46]\.(conf|ip_)' | grep -v stable_secret
`

// applyLab is a bare Debian with sshd, and the runner's package by the look of it: its unit and a program.
func applyLab(t *testing.T) *hostlab.Lab {
	t.Helper()
	need.VM(t)
	need.Tools(t, "go", "mmdebstrap", "mke2fs", "ssh", "tar")
	dir := t.TempDir()
	binary := filepath.Join(dir, "fleetingd")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	files := map[string]string{"/usr/bin/fleetingd": binary}
	for name, text := range map[string]string{
		"/root/host.hcl":                                applySpec,
		"/root/changed.hcl":                             strings.NewReplacer("max_instances = 3", "max_instances = 5", `"1GiB"`, `"2GiB"`).Replace(applySpec),
		"/usr/bin/gitlab-runner":                        "#!/bin/sh\ntrap 'exit 0' QUIT\nwhile :; do sleep 1 & wait; done\n",
		"/usr/lib/systemd/system/gitlab-runner.service": packagedRunner + "\n[Install]\nWantedBy=multi-user.target\n",
	} {
		files[name] = filepath.Join(dir, strings.ReplaceAll(name, "/", "_"))
		if err := os.WriteFile(files[name], []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	lab := hostlab.ForTest(t, hostlab.Options{Files: files})
	if _, err := lab.Sh(t.Context(), `
		chmod 755 /usr/bin/fleetingd /usr/bin/gitlab-runner; ln -s fleetingd /usr/bin/fleeting-plugin-fleetingd
		userdel --remove fleetingd 2>/dev/null
		mkdir -m 700 /run/secrets; echo glrt-of-nobody-at-all > /run/secrets/gitlab-token
		mkdir -p /etc/systemd/system/gitlab-runner.service.d; printf '[Service]\nNice=1\n' > /etc/systemd/system/gitlab-runner.service.d/50-admin.conf
		systemctl daemon-reload
		nft add table inet admins
	`); err != nil {
		t.Fatal(err)
	}
	return lab
}

// TestApplyInLab is the life of a host: applied, applied again, changed, taken back in every way, and left as it was found.
func TestApplyInLab(t *testing.T) {
	lab := applyLab(t)
	ctx, cancel := context.WithTimeout(t.Context(), 25*time.Minute)
	defer cancel()
	sh := func(script string) string {
		t.Helper()
		// With -e, a command after ! never fails.
		out, err := lab.Sh(ctx, "absent() { if \"$@\" >&2; then echo \"not expected: $*\" >&2; return 1; fi; }\n"+script)
		if err != nil {
			t.Error(err)
		}
		return out
	}
	fails := func(script, want string) {
		t.Helper()
		r, err := lab.Run(ctx, "sh", "-c", script)
		if err != nil {
			t.Fatal(err)
		}
		if r.ExitCode != 1 || !strings.Contains(r.Stderr, want) {
			t.Errorf("%s: exit code %d, want 1 and %q\n%s%s", script, r.ExitCode, want, r.Stdout, r.Stderr)
		}
	}
	found := sh(inventory)

	t.Log(sh("cd /root; fleetingd plan host.hcl; fleetingd plan -o saved.json host.hcl >/dev/null 2>&1"))
	if diff := cmp.Diff(found, sh("rm -f /root/saved.json;"+inventory)); diff != "" {
		t.Errorf("plan changed the host (-before +after)\n%s", diff)
	}
	t.Log(sh("cd /root; fleetingd apply --auto-approve host.hcl"))
	status := sh("s=$(date +%s%N); fleetingd status; echo in $(( ($(date +%s%N)-s)/1000000 )) ms")
	t.Log(status)
	for _, want := range []string{"generation 1", "drift  none", "gitlab-runner.service", "active, enabled", "3 free"} {
		if !strings.Contains(strings.Join(strings.Fields(status), " "), strings.Join(strings.Fields(want), " ")) {
			t.Errorf("status lacks %q", want)
		}
	}
	sh("test $(stat -c %U:%a /etc/gitlab-runner/config.toml) = fleetingd:600; grep -q glrt-of-nobody /etc/gitlab-runner/config.toml; " +
		"absent grep -r glrt-of-nobody /etc/fleetingd /var/lib/fleetingd-apply; findmnt -t xfs /var/lib/fleetingd/disks; ip link show fleet2; " +
		"test $(stat -c %U /var/lib/fleetingd/disks/images) = fleetingd")

	// A second apply does nothing at all.
	before := sh(inventory + "systemctl show gitlab-runner fleetingd-network -p ExecMainStartTimestampMonotonic")
	if out := sh("cd /root; s=$(date +%s%N); fleetingd apply --auto-approve host.hcl; echo in $(( ($(date +%s%N)-s)/1000000 )) ms"); !strings.Contains(out, "nothing to do") {
		t.Error(out)
	} else {
		t.Log(out)
	}
	if diff := cmp.Diff(before, sh(inventory+"systemctl show gitlab-runner fleetingd-network -p ExecMainStartTimestampMonotonic")); diff != "" {
		t.Errorf("the second apply changed something\n%s", diff)
	}

	// A change, and back.
	pid := sh("systemctl show gitlab-runner -p MainPID --value")
	t.Log(sh("cd /root; fleetingd apply --auto-approve changed.hcl; ip link show fleet4"))
	sh("fleetingd rollback --auto-approve; absent ip link show fleet4; fleetingd generations | grep -q '^\\* 1'")
	if now := sh("systemctl show gitlab-runner -p MainPID --value"); now != pid {
		t.Errorf("a change of pools restarted the runner: %s, then %s", pid, now)
	}

	// Somebody else's change is seen, and not overwritten unasked.
	sh("echo '# mine' >> /etc/sysctl.d/60-fleetingd.conf; fleetingd status | grep drift | grep -q 60-fleetingd.conf")
	fails("fleetingd apply --auto-approve /root/host.hcl", "changed by somebody else")
	sh("fleetingd apply --auto-approve --overwrite /root/host.hcl; absent grep mine /etc/sysctl.d/60-fleetingd.conf")

	// A step that fails takes all of it back.
	sh("chattr +i /etc/fleetingd/plan.json")
	fails("fleetingd apply --auto-approve /root/changed.hcl", "everything was undone: the host is as it was")
	sh("chattr -i /etc/fleetingd/plan.json; fleetingd plan --detailed-exitcode /root/host.hcl")

	// Nobody confirms; somebody does; the power goes while it waits.
	sh("fleetingd apply --auto-approve --confirm 3s /root/changed.hcl; ip link show fleet4; i=0; " +
		"while test -e /var/lib/fleetingd-apply/journal; do i=$((i+1)); test $i -lt 300; sleep 0.2; done; fleetingd plan --detailed-exitcode /root/host.hcl")
	sh("fleetingd apply --auto-approve --confirm 10m /root/changed.hcl")
	fails("fleetingd apply --auto-approve /root/host.hcl", "waits for its confirmation")
	sh("fleetingd confirm; fleetingd apply --auto-approve /root/host.hcl")
	sh("fleetingd apply --auto-approve --confirm 10m /root/changed.hcl; cat /proc/sys/kernel/random/boot_id")
	if err := lab.PowerCut(); err != nil {
		t.Fatal(err)
	}
	if err := lab.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	sh("mkdir -p -m 700 /run/secrets; echo glrt-of-nobody-at-all > /run/secrets/gitlab-token; nft add table inet admins; " +
		"i=0; while test -e /var/lib/fleetingd-apply/journal; do i=$((i+1)); test $i -lt 600; sleep 0.2; done; " +
		"fleetingd plan --detailed-exitcode /root/host.hcl")

	t.Log(sh("fleetingd destroy --auto-approve"))
	if diff := cmp.Diff(strings.Split(found, "\n"), strings.Split(sh(inventory), "\n")); diff != "" {
		t.Errorf("destroy does not leave the host as it was found (-found +left)\n%s", diff)
	}
}
