package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/need"
)

// bootSpec has one base image twice: booted unchanged, with its own initrd and with cloud-init applying the seed; and prebuilt.
// Everything else is the same.
const bootSpec = `
host "bench" {
  egress_interface = "eth0"
  state_dir        = %[1]q
  network {
    subnet = "172.16.68.0/24"
  }
  hypervisor %[2]s
}
image "plain" {
  file {
    disk   = "%[3]s/disk.raw"
    kernel = "%[3]s/kernel"
    initrd = "%[3]s/initrd"
  }
  user = "ci"
}
image "prebuilt" {
  file {
    disk   = "%[3]s/disk.raw"
    kernel = "%[3]s/kernel"
    initrd = "%[3]s/initrd"
  }
  prebuild {
    run = ["true"]
  }
  user = "ci"
}
pool "plain" {
  image         = image.plain
  cpus          = %[4]d
  memory        = "1GiB"
  disk          = "5GiB"
  start         = "cold"
  max_instances = 1
}
pool "prebuilt" {
  image         = image.prebuilt
  cpus          = %[4]d
  memory        = "1GiB"
  disk          = "5GiB"
  start         = "cold"
  max_instances = 1
}
`

// BenchmarkBoot compares a prebuilt image with its base image: it measures from the request for a worker until the end of its first
// SSH command, through the plugin, alternating. Metrics are medians of the rounds (-benchtime 5x means five). Cloud Hypervisor
// runs in a lab, whose KVM is emulated.
func BenchmarkBoot(b *testing.B) {
	l := newLab(b)
	base := l.baseFiles()
	b.Run("qemu", func(b *testing.B) {
		// The state is kept, so that the image is not built again for each length of the benchmark.
		spec := writeSpec(b, l.dir, fmt.Sprintf(bootSpec, filepath.Join(l.dir, "state"), "\"qemu\" {\n    accel = \"tcg\"\n  }", base, 2))
		bootRounds(b, func(pool string) string {
			res := l.run("--pool", pool, spec, "--", "true")
			if res.code != 0 {
				b.Fatalf("exit code %d", res.code)
			}
			return res.stderr
		})
	})
	b.Run("cloud-hypervisor", func(b *testing.B) {
		binary := need.CloudHypervisor(b)
		spec := writeSpec(b, l.dir, fmt.Sprintf(bootSpec, "/srv/fleetingd", `"cloud-hypervisor" {}`, "/srv/base", labCPUs))
		host := l.labHost(binary, base, map[string]string{"/root/host.hcl": spec})
		bootRounds(b, func(pool string) string {
			r, err := host.Run(b.Context(), "fleetingd", "run", "--timings", "--pool", pool, "/root/host.hcl", "--", "true")
			b.Logf("fleetingd run --pool %s: %s", pool, r.Stderr)
			if err != nil || r.ExitCode != 0 {
				b.Fatalf("exit code %d, %v", r.ExitCode, err)
			}
			return r.Stderr
		})
	})
}

func writeSpec(b *testing.B, dir, text string) string {
	b.Helper()
	path := filepath.Join(dir, strings.ReplaceAll(b.Name(), "/", "-")+".hcl")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		b.Fatal(err)
	}
	return path
}

// bootRounds boots a worker of each pool in turns; run returns the standard error of `fleetingd run --timings`.
func bootRounds(b *testing.B, run func(pool string) string) {
	pools := []string{"plain", "prebuilt"}
	for _, pool := range pools {
		run(pool) // makes the images, and has them in the page cache
	}
	seconds := map[string][]float64{}
	for b.Loop() {
		for _, pool := range pools {
			seconds[pool] = append(seconds[pool], firstCommand(b, run(pool)))
		}
	}
	median := func(pool string) float64 {
		s := slices.Sorted(slices.Values(seconds[pool]))
		return s[len(s)/2]
	}
	b.Logf("seconds to the first command: %v", seconds)
	b.ReportMetric(median("plain"), "s/plain")
	b.ReportMetric(median("prebuilt"), "s/prebuilt")
	b.ReportMetric(median("prebuilt")/median("plain"), "ratio")
	b.ReportMetric(0, "ns/op") // of a round, which are meaningless
}

// firstCommand returns the time from the request to the command's end, in seconds.
func firstCommand(b *testing.B, stderr string) float64 {
	b.Helper()
	for line := range strings.Lines(stderr) {
		var tm timings
		if json.Unmarshal([]byte(line), &tm) != nil {
			continue
		}
		sum, found := 0.0, 0
		for _, p := range tm.Phases {
			if p.Name == "ready" || p.Name == "command" {
				sum, found = sum+p.Seconds, found+1
			}
		}
		if found == 2 {
			return sum
		}
	}
	b.Fatalf("no timings of one worker in %q", stderr)
	return 0
}
