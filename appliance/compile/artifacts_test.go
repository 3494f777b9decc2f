package compile_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"

	"github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// TestUnitsVerify lets systemd read the units, next to those of a host.
func TestUnitsVerify(t *testing.T) {
	need.Tools(t, "systemd-analyze")
	golden(t, func(t *testing.T, _, _ string, p *plan.Plan) {
		dir := t.TempDir()
		var units []string
		for _, f := range p.Files {
			name, ok := strings.CutPrefix(f.Path, "/etc/systemd/system/")
			if !ok {
				continue
			}
			// verify checks that the programs exist, which are not installed here.
			text := replaceAll(f.Content, "/usr/bin/gitlab-runner", "/bin/true", "/usr/bin/fleetingd", "/bin/true",
				"/usr/sbin/mkfs.xfs", "/bin/true", "/usr/bin/systemd-tmpfiles", "/bin/true",
				// systemd before 254 does not know it, logs that and continues.
				"DelegateSubgroup=", "X-DelegateSubgroup=")
			write(t, filepath.Join(dir, name), text)
			if !strings.Contains(name, "/") {
				units = append(units, filepath.Join(dir, name))
			}
		}
		if len(p.Runners) > 0 {
			// As `gitlab-runner install` writes it.
			unit := filepath.Join(dir, "gitlab-runner.service")
			write(t, unit, "[Unit]\nDescription=GitLab Runner\nAfter=network.target\n\n[Service]\n"+
				"ExecStart=/bin/true \"run\" \"--user\" \"gitlab-runner\"\nRestart=always\nRestartSec=120\n\n[Install]\nWantedBy=multi-user.target\n")
			units = append(units, unit)
		}
		cmd := exec.CommandContext(t.Context(), "systemd-analyze", append([]string{"verify", "--man=no"}, units...)...)
		cmd.Env = append(os.Environ(), "SYSTEMD_UNIT_PATH="+dir+":")
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("systemd-analyze verify: %v\n%s", err, out)
		}
		for _, u := range p.Units {
			if u.Enable && u.Name != "gitlab-runner.service" && !strings.Contains(content(t, p, "/etc/systemd/system/"+u.Name), "[Install]") {
				t.Errorf("%s is to be enabled and has no [Install]", u.Name)
			}
		}
	})
}

// TestMountUnitName compares the mount unit's name with the one that systemd requires for its path.
func TestMountUnitName(t *testing.T) {
	need.Tools(t, "systemd-escape")
	h := host(1)
	h.Disks.Backing, h.Disks.Size, h.StateDir = "xfs-image", 1<<30, "/srv/ci-runners/a_b"
	p := compiled(t, h)
	out, err := exec.CommandContext(t.Context(), "systemd-escape", "--path", "--suffix=mount", p.Paths.Disks).Output()
	if err != nil {
		t.Fatal(err)
	}
	want := strings.TrimSpace(string(out))
	if !slices.ContainsFunc(p.Units, func(u plan.Unit) bool { return u.Name == want && u.Enable }) {
		t.Errorf("no unit %s is to be enabled: %v", want, p.Units)
	}
}

// TestSettingsLoad lets tmpfiles and sysusers read their files, below a folder.
func TestSettingsLoad(t *testing.T) {
	need.Root(t)
	need.Tools(t, "systemd-tmpfiles", "systemd-sysusers")
	golden(t, func(t *testing.T, _, _ string, p *plan.Plan) {
		root := t.TempDir()
		write(t, filepath.Join(root, "etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n")
		write(t, filepath.Join(root, "etc/group"), "root:x:0:\n")
		for _, tool := range []struct{ name, file string }{
			{"systemd-sysusers", "/etc/sysusers.d/fleetingd.conf"},
			{"systemd-tmpfiles", "/etc/tmpfiles.d/fleetingd.conf"},
		} {
			write(t, filepath.Join(root, tool.file), content(t, p, tool.file))
			args := []string{"--root=" + root, filepath.Base(tool.file)}
			if tool.name == "systemd-tmpfiles" {
				args = append([]string{"--create"}, args...)
			}
			if out, err := exec.CommandContext(t.Context(), tool.name, args...).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", tool.name, err, out)
			}
		}
		for _, dir := range []string{p.Paths.Clones, p.Paths.Images, p.Paths.Workers, p.Paths.Cache, p.Paths.Run} {
			info, err := os.Stat(filepath.Join(root, dir))
			if err != nil || info.Mode() != os.ModeDir|0o750 {
				t.Errorf("%s: %v, %v", dir, info, err)
			}
		}
		passwd, err := os.ReadFile(filepath.Join(root, "etc/passwd"))
		if err != nil || !strings.Contains(string(passwd), p.Paths.State+"/runner:/usr/sbin/nologin") {
			t.Errorf("the user's line is not right: %s, %v", passwd, err)
		}
	})
}

func TestRulesetLoads(t *testing.T) {
	need.Root(t)
	need.Tools(t, "nft", "unshare")
	golden(t, func(t *testing.T, _, _ string, p *plan.Plan) {
		file := filepath.Join(t.TempDir(), "f.nft")
		write(t, file, content(t, p, "/etc/nftables.d/fleetingd.nft"))
		if out, err := exec.CommandContext(t.Context(), "unshare", "-n", "nft", "-c", "-f", file).CombinedOutput(); err != nil {
			t.Errorf("nft: %v\n%s", err, out)
		}
	})
}

// documented lists the keys of config.toml that GitLab Runner knows, as far as a spec without settings may use them:
// https://docs.gitlab.com/runner/configuration/advanced-configuration/, read in November 2026. [] is an array of tables.
var documented = []string{
	"concurrent", "log_level", "log_format", "check_interval", "sentry_dsn", "connection_max_age", "listen_address",
	"shutdown_timeout",

	"runners[].name", "runners[].url", "runners[].token", "runners[].tls-ca-file", "runners[].tls-cert-file",
	"runners[].tls-key-file", "runners[].limit", "runners[].executor", "runners[].shell", "runners[].builds_dir",
	"runners[].cache_dir", "runners[].environment", "runners[].request_concurrency", "runners[].strict_check_interval",
	"runners[].output_limit", "runners[].pre_get_sources_script", "runners[].post_get_sources_script",
	"runners[].pre_build_script", "runners[].post_build_script", "runners[].clone_url", "runners[].debug_trace_disabled",
	"runners[].clean_git_config", "runners[].referees", "runners[].unhealthy_requests_limit",
	"runners[].unhealthy_interval", "runners[].job_status_final_update_retry_limit",
	"session_server.listen_address", "session_server.advertise_address",
	"runners[].id", "runners[].feature_flags.FF_USE_FASTZIP", "runners[].cache.s3.SecretKey",
	"runners[].docker.image", "runners[].docker.privileged", "runners[].cache.Type", "runners[].cache.s3.BucketName",

	"runners[].autoscaler.capacity_per_instance", "runners[].autoscaler.max_use_count",
	"runners[].autoscaler.max_instances", "runners[].autoscaler.plugin",
	"runners[].autoscaler.delete_instances_on_shutdown", "runners[].autoscaler.instance_ready_command",
	"runners[].autoscaler.instance_acquire_timeout", "runners[].autoscaler.update_interval",
	"runners[].autoscaler.update_interval_when_expecting", "runners[].autoscaler.deletion_retry_interval",
	"runners[].autoscaler.shutdown_deletion_interval", "runners[].autoscaler.shutdown_deletion_retries",
	"runners[].autoscaler.failure_threshold", "runners[].autoscaler.log_internal_ip",
	"runners[].autoscaler.log_external_ip", "runners[].autoscaler.scale_throttle.limit",
	"runners[].autoscaler.scale_throttle.burst",

	"runners[].autoscaler.connector_config.os", "runners[].autoscaler.connector_config.arch",
	"runners[].autoscaler.connector_config.protocol", "runners[].autoscaler.connector_config.protocol_port",
	"runners[].autoscaler.connector_config.username", "runners[].autoscaler.connector_config.password",
	"runners[].autoscaler.connector_config.key_path", "runners[].autoscaler.connector_config.use_static_credentials",
	"runners[].autoscaler.connector_config.keepalive", "runners[].autoscaler.connector_config.timeout",
	"runners[].autoscaler.connector_config.use_external_addr",

	"runners[].autoscaler.state_storage.enabled", "runners[].autoscaler.state_storage.dir",
	"runners[].autoscaler.state_storage.keep_instance_with_acquisitions",

	"runners[].autoscaler.policy[].periods", "runners[].autoscaler.policy[].timezone",
	"runners[].autoscaler.policy[].idle_count", "runners[].autoscaler.policy[].idle_time",
	"runners[].autoscaler.policy[].scale_factor", "runners[].autoscaler.policy[].scale_factor_limit",
	"runners[].autoscaler.policy[].preemptive_mode",

	// The plugin's own keys, of which it refuses unknown ones.
	"runners[].autoscaler.plugin_config.plan", "runners[].autoscaler.plugin_config.pool",
}

// TestConfigKeysAreKnown: GitLab Runner silently ignores unknown keys.
func TestConfigKeysAreKnown(t *testing.T) {
	golden(t, func(t *testing.T, _, _ string, p *plan.Plan) {
		if len(p.Runners) == 0 {
			return
		}
		var config map[string]any
		if _, err := toml.Decode(content(t, p, "/etc/gitlab-runner/config.toml"), &config); err != nil {
			t.Fatal(err)
		}
		for _, key := range keys("", config) {
			if !slices.Contains(documented, key) {
				t.Errorf("config.toml has %s, which GitLab Runner does not document", key)
			}
		}
		for _, r := range config["runners"].([]map[string]any) {
			for _, policy := range r["autoscaler"].(map[string]any)["policy"].([]map[string]any) {
				if _, ok := policy["preemptive_mode"]; !ok {
					t.Error("a policy without preemptive_mode: the runner logs a schema complaint")
				}
			}
		}
	})
}

// keys returns the paths of all values in a table.
func keys(at string, v any) []string {
	switch v := v.(type) {
	case map[string]any:
		var all []string
		for k, value := range v {
			all = append(all, keys(strings.TrimPrefix(at+"."+k, "."), value)...)
		}
		return all
	case []map[string]any:
		var all []string
		for _, value := range v {
			all = append(all, keys(at+"[]", value)...)
		}
		return all
	}
	return []string{at}
}

// TestConfigValues checks what golden files do not explain: that the numbers fit together.
func TestConfigValues(t *testing.T) {
	h := host(20)
	h.Runners[0].CapacityPerInstance = 3
	second, pool := *h.Runners[0], *h.Pools[0]
	second.Name, second.Pool, second.CapacityPerInstance = "s", "q", 1
	pool.Name, pool.MaxInstances = "q", 2
	h.Runners, h.Pools = append(h.Runners, &second), append(h.Pools, &pool)
	// Half of the runner's own default for a table.
	h.Runners[0].Settings = map[string]any{"limit": int64(7), "autoscaler": map[string]any{
		"state_storage": map[string]any{"dir": "/x"}, "scale_throttle": map[string]any{"limit": int64(5)},
	}}
	var c struct {
		Concurrent int
		Runners    []struct {
			Limit      int
			Autoscaler struct {
				StateStorage struct {
					Enabled bool
					Dir     string
				} `toml:"state_storage"`
				Throttle struct{ Limit int } `toml:"scale_throttle"`
			}
		}
	}
	if _, err := toml.Decode(content(t, compiled(t, h), "/etc/gitlab-runner/config.toml"), &c); err != nil {
		t.Fatal(err)
	}
	if c.Concurrent != 62 {
		t.Errorf("concurrent is %d, want 20·3+2", c.Concurrent)
	}
	if c.Runners[0].Limit != 7 || c.Runners[1].Limit != 2 {
		t.Errorf("the limits are %d and %d, want 7 (a setting) and 2 (the pool's)", c.Runners[0].Limit, c.Runners[1].Limit)
	}
	if s := c.Runners[0].Autoscaler; !s.StateStorage.Enabled || s.StateStorage.Dir != "/x" || s.Throttle.Limit != 5 {
		t.Errorf("settings of a table replace it whole: %+v", s)
	}
}

// TestSecretsFillIn puts a token into config.toml. Whatever its content, it stays one string.
func TestSecretsFillIn(t *testing.T) {
	p := compiled(t, host(1))
	for _, value := range []string{"glrt-@SECRET:runner.r.token@x", "glrt-\"\nconcurrent = 99 #", `glrt-\u0022`, "glrt-\x7f\x01\t\r\u0085é"} {
		tree, err := p.Tree(func(from string) (string, error) {
			if from != "file:/run/secrets/t" {
				return "", fmt.Errorf("no such secret %s", from)
			}
			return value, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		var config struct {
			Concurrent int
			Runners    []struct{ Token string }
		}
		for _, f := range tree {
			if f.Path == "/etc/gitlab-runner/config.toml" {
				if _, err := toml.Decode(string(f.Data), &config); err != nil {
					t.Fatal(err)
				}
				if f.Mode != 0o600 {
					t.Errorf("it has mode %o", f.Mode)
				}
			} else if strings.Contains(string(f.Data), "glrt-") {
				t.Errorf("the token is in %s", f.Path)
			}
		}
		if config.Runners[0].Token != value || config.Concurrent != 1 {
			t.Errorf("the token is %q, want %q; concurrent is %d", config.Runners[0].Token, value, config.Concurrent)
		}
	}
	_, err := p.Tree(func(string) (string, error) { return "glrt-\xff", nil })
	if err == nil || strings.Contains(err.Error(), "glrt-") {
		t.Errorf("a secret that is no text: %v", err)
	}
}

func content(t *testing.T, p *plan.Plan, path string) string {
	t.Helper()
	for _, f := range p.Files {
		if f.Path == path {
			return f.Content
		}
	}
	t.Fatalf("the plan has no file %s", path)
	return ""
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func replaceAll(s string, pairs ...string) string { return strings.NewReplacer(pairs...).Replace(s) }
