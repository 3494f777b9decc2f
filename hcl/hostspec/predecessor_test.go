package hostspec

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
)

// documented are the keys as the predecessor's README shows them.
func documented() map[string]any {
	return map[string]any{
		"egress_interface": "eth0", "vm_disk_directory": "/tmp/fleetingd", "vm_subnet": "172.16.120.",
		"vm_num_cpu_cores": json.Number("8"), "vm_memory_mb": json.Number("16384"), "vm_disk_size_gb": json.Number("30"),
		"vm_prebuild_cloudinit_extra_cmds": []any{
			`su - ubuntu -c "whoami"`,
			`"echo \"{ \\\"features\\\": { \\\"buildkit\\\": true } }\" | tee -a /etc/docker/daemon.json"`,
			`'echo it''s ${HOME} %{ if }'`,
		},
		"vm_enable_virtio_console": false,
	}
}

func TestFromPredecessor(t *testing.T) {
	h, diags := FromPredecessor(documented(), PredecessorOptions{Machine: "Metal-01", Arch: "arm64"})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	pool, img := h.Pools[0], h.Images[0]
	if h.Name != "metal-01" || h.EgressInterface != "eth0" || h.StateDir != "/tmp/fleetingd" ||
		h.Network.Subnet.String() != "172.16.120.0/24" || h.Hypervisor.Driver != "cloud-hypervisor" || h.Refresh == 0 {
		t.Errorf("host %+v", h)
	}
	if pool.CPUs != 8 || pool.Memory != 16<<30 || pool.Disk != 30<<30 || pool.Console || pool.Start != "cold" || pool.MaxInstances < 63 {
		t.Errorf("pool %+v", pool)
	}
	if img.Ubuntu == nil || img.Ubuntu.Release != "noble" || img.Ubuntu.Arch != "arm64" || img.User != "ubuntu" {
		t.Errorf("image %+v", img)
	}
	run := img.Prebuild.Run
	// As cloud-init ran them: under sh, without -e.
	want := []string{"#!/bin/sh\n" + `su - ubuntu -c "whoami"`, "#!/bin/sh\n" + `echo "{ \"features\": { \"buildkit\": true } }" | tee -a /etc/docker/daemon.json`, "#!/bin/sh\n" + `echo it's ${HOME} %{ if }`}
	if len(run) < 3 || !slices.Equal(run[len(run)-3:], want) {
		t.Errorf("run %q", run)
	}
	if !strings.Contains(strings.Join(run, "\n"), "install gitlab-runner") {
		t.Error("gitlab-runner is not installed")
	}
}

func TestFromPredecessorOwnImage(t *testing.T) {
	keys := documented()
	delete(keys, "vm_prebuild_cloudinit_extra_cmds")
	keys["vm_enable_virtio_console"] = true
	keys["vm_num_cpu_cores"] = int64(2)   // as TOML has it
	keys["vm_memory_mb"] = float64(512)   // as JSON has it
	keys["vm_disk_directory"] = "/srv/x/" // as people write it
	h, diags := FromPredecessor(keys, PredecessorOptions{Machine: "!", Environ: []string{
		"FLEETINGD_IMAGE_URL=http://127.0.0.1:8080/a/disk.img", "FLEETINGD_KERNEL_URL=http://127.0.0.1:8080/a/vmlinuz", "FLEETINGD_HYPERVISOR=qemu",
	}})
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	u, pre := h.Images[0].URL, h.Images[0].Prebuild
	if u == nil || u.Disk != "http://127.0.0.1:8080/a/disk.img" || u.Kernel != "http://127.0.0.1:8080/a/vmlinuz" || u.Initrd != "" ||
		u.SHA256Sums != "http://127.0.0.1:8080/a/SHA256SUMS" {
		t.Errorf("source %+v", u)
	}
	// The prebuild is there with no steps, too: it brings the guest part in.
	if pre == nil || len(pre.Run) != 0 || len(pre.Packages) != 0 {
		t.Errorf("prebuild %+v", pre)
	}
	if h.Hypervisor.Driver != "qemu" || h.Name != "localhost" || h.StateDir != "/srv/x" || !h.Pools[0].Console || h.Pools[0].CPUs != 2 || h.Pools[0].Memory != 512<<20 {
		t.Errorf("host %+v, pool %+v", h, h.Pools[0])
	}
}

func TestFromPredecessorErrors(t *testing.T) {
	tests := map[string]struct {
		change func(map[string]any)
		env    []string
		want   []string
	}{
		"nothing": {change: func(k map[string]any) { clear(k) }, want: []string{
			`needs egress_interface. Write, for example: egress_interface = "eth0"`, "needs vm_disk_directory", "needs vm_subnet",
			"needs vm_num_cpu_cores. Write, for example: vm_num_cpu_cores = 8", "needs vm_memory_mb", "needs vm_disk_size_gb",
		}},
		"typo":               {change: func(k map[string]any) { k["vm_memory_md"] = 1 }, want: []string{`no key "vm_memory_md" (did you mean "vm_memory_mb"?)`}},
		"number as text":     {change: func(k map[string]any) { k["vm_memory_mb"] = "16384" }, want: []string{`vm_memory_mb must be a whole number such as 16384; got the string "16384"`}},
		"fraction":           {change: func(k map[string]any) { k["vm_num_cpu_cores"] = 1.5 }, want: []string{"vm_num_cpu_cores must be a whole number such as 8; got the number 1.5"}},
		"zero":               {change: func(k map[string]any) { k["vm_num_cpu_cores"] = json.Number("0") }, want: []string{"vm_num_cpu_cores must be 1 or more, such as 8; got 0"}},
		"huge":               {change: func(k map[string]any) { k["vm_disk_size_gb"] = json.Number("9e99") }, want: []string{`got the number "9e99"`}},
		"too large":          {change: func(k map[string]any) { k["vm_disk_size_gb"] = json.Number("9223372036854775807") }, want: []string{"vm_disk_size_gb: "}},
		"null":               {change: func(k map[string]any) { k["egress_interface"] = nil }, want: []string{"egress_interface must be a string such as \"eth0\"; got null"}},
		"empty":              {change: func(k map[string]any) { k["egress_interface"] = "" }, want: []string{"egress_interface is empty"}},
		"bad interface":      {change: func(k map[string]any) { k["egress_interface"] = "eth0; reboot" }, want: []string{"egress_interface: Invalid egress_interface"}},
		"relative directory": {change: func(k map[string]any) { k["vm_disk_directory"] = "disks" }, want: []string{"vm_disk_directory: Invalid state_dir"}},
		"subnet as CIDR":     {change: func(k map[string]any) { k["vm_subnet"] = "172.16.120.0/22" }, want: []string{`got "172.16.120.0/22"`, `such as "172.16.120."`}},
		"subnet of nonsense": {change: func(k map[string]any) { k["vm_subnet"] = "999.16.120." }, want: []string{"vm_subnet: "}},
		"commands as text":   {change: func(k map[string]any) { k["vm_prebuild_cloudinit_extra_cmds"] = "reboot" }, want: []string{`vm_prebuild_cloudinit_extra_cmds must be a list`}},
		"command no text":    {change: func(k map[string]any) { k["vm_prebuild_cloudinit_extra_cmds"] = []any{"a", true} }, want: []string{"vm_prebuild_cloudinit_extra_cmds[1] must be a string; got the boolean true"}},
		"console as text":    {change: func(k map[string]any) { k["vm_enable_virtio_console"] = "yes" }, want: []string{`vm_enable_virtio_console must be true or false; got the string "yes"`}},
		"no kernel":          {env: []string{"FLEETINGD_IMAGE_URL=https://x/y"}, want: []string{"FLEETINGD_IMAGE_URL is set, and FLEETINGD_KERNEL_URL is not"}},
		"no image":           {env: []string{"FLEETINGD_KERNEL_URL=https://x/y"}, want: []string{"need FLEETINGD_IMAGE_URL, which is not set"}},
		"bad URL":            {env: []string{"FLEETINGD_IMAGE_URL=/etc/x", "FLEETINGD_KERNEL_URL=https://x/y"}, want: []string{"FLEETINGD_IMAGE_URL: "}},
		"bad hypervisor":     {env: []string{"FLEETINGD_HYPERVISOR=qemu-kvm"}, want: []string{"FLEETINGD_HYPERVISOR: "}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			keys := documented()
			if tt.change != nil {
				tt.change(keys)
			}
			h, diags := FromPredecessor(keys, PredecessorOptions{Environ: tt.env})
			if h != nil || !diags.HasErrors() {
				t.Fatalf("no error: %+v", h)
			}
			for _, want := range tt.want {
				if !slices.ContainsFunc(diags, func(d *hcl.Diagnostic) bool { return strings.Contains(d.Error(), want) }) {
					t.Errorf("%q is not among %v", want, diags)
				}
			}
		})
	}
}

// FuzzPredecessor: no keys may panic, and what is accepted is one whole pool.
func FuzzPredecessor(f *testing.F) {
	seed, err := json.Marshal(documented())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed, "", "")
	f.Add([]byte(`{"vm_subnet":"1.2.3.","vm_memory_mb":1e3}`), "http://h/d", "qemu")
	f.Add([]byte(`{"egress_interface":"a\"}\n","vm_prebuild_cloudinit_extra_cmds":["${x}","%{","\u0000"," ' "]}`), "${", "\n")
	f.Fuzz(func(t *testing.T, data []byte, url, hypervisor string) {
		var keys map[string]any
		if json.Unmarshal(data, &keys) != nil {
			t.Skip()
		}
		env := []string{"FLEETINGD_HYPERVISOR=" + hypervisor}
		if url != "" {
			env = append(env, "FLEETINGD_IMAGE_URL="+url, "FLEETINGD_KERNEL_URL="+url)
		}
		h, diags := FromPredecessor(keys, PredecessorOptions{Machine: url, Arch: "amd64", Environ: env})
		if (h == nil) != diags.HasErrors() {
			t.Fatalf("host %v, findings %v", h, diags)
		}
		if h == nil {
			return
		}
		if len(h.Pools) != 1 || len(h.Images) != 1 || h.Pools[0].CPUs < 1 {
			t.Fatalf("%+v", h)
		}
		commands, _ := keys["vm_prebuild_cloudinit_extra_cmds"].([]any)
		if n := len(h.Images[0].Prebuild.Run); n < len(commands) {
			t.Fatalf("%d of %d commands", n, len(commands))
		}
	})
}
