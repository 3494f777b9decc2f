package convert_test

import (
	"flag"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/hcl/convert"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

var update = flag.Bool("update", false, "write the specs that the configs become")

// TestConfigs: each config.toml, written after a shape that is found in public repositories, becomes a spec that validates and compiles,
// holds no secret, and gives a config.toml that means the same.
func TestConfigs(t *testing.T) {
	files, err := filepath.Glob("testdata/configs/*.toml")
	if err != nil || len(files) < 12 {
		t.Fatal(len(files), "configs", err)
	}
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".toml")
		t.Run(name, func(t *testing.T) {
			src, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			res, err := convert.Convert(src, convert.Options{Name: "config.toml", SpecName: "host.hcl", Machine: "ci-01", EgressInterface: "eno1"})
			if err != nil {
				t.Fatal(err)
			}
			golden := strings.TrimSuffix(file, ".toml") + ".hcl"
			if *update {
				if err := os.WriteFile(golden, res.Spec, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(res.Spec)); diff != "" {
				t.Errorf("another spec than before (-update writes it)\n%s", diff)
			}
			if strings.Contains(string(res.Spec), "CANARY") {
				t.Errorf("the spec holds a secret\n%s", res.Spec)
			}
			sameMeaning(t, src, res)
		})
	}
}

// A rule is about a key of the source that config.toml does not have after the conversion, or one that it has in addition. In its path,
// a number of a list is *.
type rule struct{ path, why string }

// leftOut are the keys that only a comment of the spec has.
var leftOut = []rule{
	{"metrics_server", "listen_address is its name today; an empty one says nothing"},
	{"unknown_switch", "GitLab Runner does not know it"},
	{"log_level", "GitLab Runner refuses this value"},
	{"listen_address", "GitLab Runner refuses a number"},
	{"runners/*/token_obtained_at", "GitLab Runner notes it down itself"},
	{"runners/*/token_expires_at", "GitLab Runner notes it down itself"},
	{"runners/*/tags", "no key of config.toml, but an option of register"},
	{"runners/*/build_dir", "no key of config.toml"},
	{"runners/*/plugin", "no key of this table, but of autoscaler"},
	{"runners/*/instance_ready_command", "no key of this table, but of autoscaler"},
	{"runners/*/delete_instances_on_shutdown", "no key of this table, but of autoscaler"},
	{"runners/*/feature_flags/FF_NO_SUCH_FLAG", "no feature flag"},
	{"runners/*/docker/cpus", "GitLab Runner refuses a number"},
	{"runners/*/docker/host", "the daemon is the one in the job's VM"},
	{"runners/*/docker/image", "the instance executor has no containers"},
	{"runners/*/cache/AccessKey", "a key of s3 since GitLab Runner 11.3, which ignores it here"},
	{"runners/*/cache/SecretKey", "a key of s3 since GitLab Runner 11.3, which ignores it here"},
	{"runners/*/cache/BucketName", "a key of s3 since GitLab Runner 11.3, which ignores it here"},
	{"runners/*/cache/ServerAddress", "a key of s3 since GitLab Runner 11.3, which ignores it here"},
	{"runners/*/cache/Insecure", "a key of s3 since GitLab Runner 11.3, which ignores it here"},
	{"runners/*/machine/MachineDriver", "no cloud is asked for machines"},
	{"runners/*/machine/MachineName", "workers are named after their pool"},
	{"runners/*/machine/MachineOptions", "no cloud is asked for machines; size and registries are in pool and image"},
	{"runners/*/machine/MachineOptions/*", "docker+machine wants a list"},
	{"runners/*/machine/MaxGrowthRate", "VMs are cloned on the host"},
	{"runners/*/machine/MaxBuilds", "docker+machine wants a number"},
	{"runners/*/machine/IdleColour", "docker+machine does not know it"},
	{"runners/*/machine/IdleCount", "a policy wants no negative number"},
	{"runners/*/machine/OffPeakIdleCount", "without periods it says nothing"},
	{"runners/*/machine/autoscaling/*/*", "the policy's periods or timezone cannot be read"},
	{"runners/*/autoscaler/instance_ready_command", "a worker is running only once it is ready"},
	{"runners/*/autoscaler/connector_config/key_path", "each worker has a key of its own"},
	{"runners/*/autoscaler/policy/*/preemtive_mode", "GitLab Runner does not know it"},
	{"runners/*/autoscaler/plugin_config/*", "it is another plugin's"},
}

// changed are the keys that mean the same with another value.
var changed = []rule{
	{"concurrent", "what the pools add up to, where the source does not say"},
	{"runners/*/name", "a block's label has fewer characters; names are for people"},
	{"runners/*/executor", "docker+machine, docker and shell become their forms in VMs"},
	{"runners/*/limit", "no limit is what the pool has room for"},
	{"runners/*/environment", "one without an equals sign is no variable"},
	{"runners/*/autoscaler/max_instances", "a host has room for no more"},
	{"runners/*/autoscaler/plugin", "fleetingd is the plugin"},
	{"runners/*/autoscaler/connector_config/username", "the image's user is the connector's"},
	{"runners/*/autoscaler/connector_config/use_external_addr", "a worker has one address"},
	{"runners/*/autoscaler/state_storage/dir", "fleetingd has a folder for it"},
}

// added are the keys that the source does not have.
var added = []rule{
	{"concurrent", "see changed"},
	{"runners/*/limit", "what the pool has room for"},
	{"runners/*/request_concurrency", "several requests at once, so that a long poll holds no job up"},
	{"runners/*/docker/image", "a job without an image needs one"},
	{"runners/*/autoscaler/capacity_per_instance", "1, the default"},
	{"runners/*/autoscaler/max_instances", "docker+machine has limit and concurrent; see sameNumbers"},
	{"runners/*/autoscaler/max_use_count", "docker+machine has MaxBuilds; see sameNumbers"},
	{"runners/*/autoscaler/plugin", "fleetingd is the plugin"},
	{"runners/*/autoscaler/plugin_config/plan", "fleetingd is the plugin"},
	{"runners/*/autoscaler/plugin_config/pool", "fleetingd is the plugin"},
	{"runners/*/autoscaler/connector_config/*", "how workers are reached"},
	{"runners/*/autoscaler/update_interval", "asking the plugin costs nothing"},
	{"runners/*/autoscaler/update_interval_when_expecting", "asking the plugin costs nothing"},
	{"runners/*/autoscaler/delete_instances_on_shutdown", "false, the default"},
	{"runners/*/autoscaler/state_storage/*", "a restarted runner finds its idle workers again"},
	{"runners/*/autoscaler/policy/*/periods", "always, the default"},
	{"runners/*/autoscaler/policy/*/preemptive_mode", "what GitLab Runner takes it for"},
	{"runners/*/autoscaler/policy/0/idle_count", "0, the default"},
}

func sameMeaning(t *testing.T, src []byte, res *convert.Result) {
	t.Helper()
	loaded, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: res.Spec})
	if diags.HasErrors() {
		t.Fatalf("the spec is not valid: %v\n%s", diags, res.Spec)
	}
	p, diags := compile.Compile(loaded.Host, compile.Options{})
	if diags.HasErrors() {
		t.Fatalf("the spec does not compile: %v", diags)
	}
	var before map[string]any
	if _, err := toml.Decode(string(src), &before); err != nil {
		t.Fatal(err)
	}
	after := runnerConfig(t, p, res)
	before["runners"] = slices.DeleteFunc(before["runners"].([]map[string]any), func(r map[string]any) bool { return r["executor"] == "kubernetes" })
	samePlan(t, before, p)
	expected := map[string]any{}
	flatten("", before, expected)
	for i, r := range before["runners"].([]map[string]any) {
		sameNumbers(t, before, r, after["runners"].([]map[string]any)[i])
		moveKeys(expected, fmt.Sprintf("runners/%d/", i), r)
	}
	got := map[string]any{}
	flatten("", after, got)
	comments := commentText(res.Spec)
	for _, at := range sortedKeys(expected) {
		want := expected[at]
		have, ok := got[at]
		switch {
		case ok && same(want, have), ok && isAllowed(changed, at):
		case ok:
			t.Errorf("%s was %v and is %v", at, want, have)
		case says(want) && !isAllowed(leftOut, at):
			t.Errorf("%s = %v got lost", at, want)
		case says(want) && !strings.Contains(comments, path.Base(at)) && !isIndex(path.Base(at)):
			t.Errorf("%s = %v is in no comment of the spec", at, want)
		}
	}
	for _, at := range sortedKeys(got) {
		if _, ok := expected[at]; !ok && !isAllowed(added, at) {
			t.Errorf("%s = %v came out of nowhere", at, got[at])
		}
	}
}

// runnerConfig is the config.toml that the spec gives, with its secrets.
func runnerConfig(t *testing.T, p *plan.Plan, res *convert.Result) map[string]any {
	t.Helper()
	values := map[string]string{}
	for _, s := range res.Secrets {
		values["file:"+s.Path] = s.Value
	}
	tree, err := p.Tree(func(from string) (string, error) {
		if v, ok := values[from]; ok {
			return v, nil
		}
		return "", fmt.Errorf("no secret %s", from)
	})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(tree, func(f plan.TreeFile) bool { return path.Base(f.Path) == "config.toml" })
	var config map[string]any
	if _, err := toml.Decode(string(tree[i].Data), &config); err != nil {
		t.Fatal(err)
	}
	return config
}

// moveKeys gives the keys that have another place after the conversion that place.
func moveKeys(m map[string]any, prefix string, runner map[string]any) {
	for old, today := range map[string]string{"pre_clone_script": "pre_get_sources_script"} {
		if v, ok := m[prefix+old]; ok {
			delete(m, prefix+old)
			m[prefix+today] = v
		}
	}
	for _, key := range hostspec.PredecessorKeys {
		delete(m, prefix+"autoscaler/plugin_config/"+key) // samePlan compares them
	}
	if prefix == "runners/0/" && m["metrics_server"] != "" {
		if v, ok := m["metrics_server"]; ok {
			delete(m, "metrics_server")
			m["listen_address"] = v
		}
	}
	machine, ok := runner["machine"].(map[string]any)
	if !ok || runner["executor"] != "docker+machine" {
		return
	}
	sections := []map[string]any{machine}
	if more, ok := machine["autoscaling"].([]map[string]any); ok {
		sections = append(sections, more...)
	} else if machine["OffPeakPeriods"] != nil {
		sections = append(sections, map[string]any{"Periods": machine["OffPeakPeriods"], "Timezone": machine["OffPeakTimezone"],
			"IdleCount": machine["OffPeakIdleCount"], "IdleTime": machine["OffPeakIdleTime"]})
		for _, key := range []string{"Periods", "Timezone", "IdleCount", "IdleTime"} {
			delete(m, prefix+"machine/OffPeak"+key)
		}
	}
	if _, ok := machine["MaxBuilds"].(int64); ok {
		delete(m, prefix+"machine/MaxBuilds") // sameNumbers compares it
	}
	n := 0
	for i, s := range sections {
		if !readable(s) {
			continue // leftOut
		}
		from := prefix + "machine/"
		if i > 0 {
			from = fmt.Sprintf("%sautoscaling/%d/", from, i-1)
		}
		to := fmt.Sprintf("%sautoscaler/policy/%d/", prefix, n)
		n++
		for _, key := range []string{"IdleCount", "IdleCountMin", "IdleScaleFactor", "IdleTime", "Periods", "Timezone"} {
			if v, _ := s[key].(int64); v >= 0 { // else leftOut
				delete(m, from+key)
			}
		}
		factor, _ := s["IdleScaleFactor"].(float64)
		idle, _ := s["IdleCount"].(int64)
		if factor > 0 {
			m[to+"scale_factor"], m[to+"scale_factor_limit"] = factor, idle
			if idle, _ = s["IdleCountMin"].(int64); idle == 0 {
				idle = 1
			}
		}
		if idle >= 0 {
			m[to+"idle_count"] = idle
		}
		if seconds, _ := s["IdleTime"].(int64); seconds > 0 {
			m[to+"idle_time"] = (time.Duration(seconds) * time.Second).String()
		}
		if zone, _ := s["Timezone"].(string); zone != "" {
			m[to+"timezone"] = zone
		}
		if periods, ok := s["Periods"].([]any); ok {
			five := make([]any, len(periods))
			for i, p := range periods {
				f := strings.Fields(p.(string))
				five[i] = strings.ReplaceAll(strings.Join(f[1:6], " "), "sun-thu", "0-4")
			}
			m[to+"periods"] = five
		}
	}
}

// readable reports a section whose periods and zone a policy can have. The odd ones are in odd.toml.
func readable(s map[string]any) bool {
	periods, _ := s["Periods"].([]any)
	for _, p := range periods {
		if f := strings.Fields(p.(string)); len(f) != 7 || f[0] != "*" || f[6] != "*" {
			return false
		}
	}
	return s["Timezone"] != "europe/berlin"
}

// sameNumbers compares how many machines there may be, and how many jobs each runs.
func sameNumbers(t *testing.T, config, before, after map[string]any) {
	t.Helper()
	scaler := after["autoscaler"].(map[string]any)
	number := func(m map[string]any, key string) int64 { n, _ := m[key].(int64); return n }
	machine, ok := before["machine"].(map[string]any)
	if !ok || before["executor"] != "docker+machine" {
		return // the source has the same keys
	}
	idle := number(machine, "IdleCount")
	more, _ := machine["autoscaling"].([]map[string]any)
	for _, s := range more {
		idle = max(idle, number(s, "IdleCount"))
	}
	most := number(config, "concurrent") + max(idle, 0)
	if limit := number(before, "limit"); limit > 0 {
		most = min(most, limit)
	}
	if got := scaler["max_instances"]; got != min(most, 1000) {
		t.Errorf("max_instances is %v, want %d", got, most)
	}
	if got := scaler["max_use_count"]; got != number(machine, "MaxBuilds") {
		t.Errorf("max_use_count is %v", got)
	}
	if got := after["executor"]; got != "docker-autoscaler" {
		t.Errorf("executor is %v", got)
	}
}

// samePlan compares what the predecessor's plugin_config says with the Plan.
func samePlan(t *testing.T, config map[string]any, p *plan.Plan) {
	t.Helper()
	first := true
	for i, r := range config["runners"].([]map[string]any) {
		scaler, _ := r["autoscaler"].(map[string]any)
		keys, _ := scaler["plugin_config"].(map[string]any)
		if keys["vm_subnet"] == nil {
			continue
		}
		pool := p.Pools[i]
		number := func(key string) int64 { return keys[key].(int64) }
		if int64(pool.CPUs) != number("vm_num_cpu_cores") || pool.Memory != number("vm_memory_mb")<<20 || pool.Disk != number("vm_disk_size_gb")<<30 {
			t.Errorf("pool %+v of %v", pool, keys)
		}
		if console, _ := keys["vm_enable_virtio_console"].(bool); console != pool.Console {
			t.Errorf("console is %v", pool.Console)
		}
		image, err := p.Image(pool.Image)
		if err != nil {
			t.Fatal(err)
		}
		commands, _ := keys["vm_prebuild_cloudinit_extra_cmds"].([]any)
		if steps := len(image.Prebuild.Steps); steps < len(commands)+len(hostspec.UbuntuCommands) {
			t.Errorf("%d steps for %d commands", steps, len(commands))
		}
		if first && (p.EgressInterface != keys["egress_interface"] || p.Network.Subnet.String() != keys["vm_subnet"].(string)+"0/24") {
			t.Errorf("egress %s, subnet %s", p.EgressInterface, p.Network.Subnet)
		}
		if dir := keys["vm_disk_directory"].(string); first && !strings.HasPrefix(dir, "/tmp/") && p.Paths.State != dir {
			t.Errorf("state is %s", p.Paths.State)
		}
		first = false // the others share the first one's host
	}
}

// flatten gives each value that is no table by its path.
func flatten(prefix string, v any, into map[string]any) {
	switch v := v.(type) {
	case map[string]any:
		for key, e := range v {
			flatten(path.Join(prefix, strings.ReplaceAll(key, "/", "|")), e, into)
		}
	case []map[string]any:
		for i, e := range v {
			flatten(path.Join(prefix, fmt.Sprint(i)), e, into)
		}
	case []any:
		if len(v) == 0 {
			into[prefix] = v
			return
		}
		if _, inline := v[0].(map[string]any); !inline {
			into[prefix] = v
			return
		}
		for i, e := range v {
			flatten(path.Join(prefix, fmt.Sprint(i)), e, into)
		}
	default:
		into[prefix] = v
	}
}

// says reports a value that is not the one that GitLab Runner takes without it.
func says(v any) bool {
	list, isList := v.([]any)
	return v != "" && v != false && v != int64(0) && (!isList || len(list) > 0)
}

func same(a, b any) bool {
	if as, ok := a.(string); ok {
		bs, _ := b.(string)
		x, errX := time.ParseDuration(as)
		y, errY := time.ParseDuration(bs)
		return as == bs || errX == nil && errY == nil && x == y
	}
	if n, ok := a.(int64); ok {
		if s, ok := b.(string); ok { // nanoseconds
			d, err := time.ParseDuration(s)
			return err == nil && int64(d) == n
		}
	}
	return cmp.Equal(a, b)
}

func isAllowed(rules []rule, at string) bool {
	return slices.ContainsFunc(rules, func(r rule) bool {
		ok, err := path.Match(r.path, at)
		return err == nil && ok
	})
}

// commentText is all comments of a spec.
func commentText(spec []byte) string {
	var b strings.Builder
	for line := range strings.Lines(string(spec)) {
		if _, comment, ok := strings.Cut(line, "#"); ok {
			b.WriteString(comment)
		}
	}
	return b.String()
}

func isIndex(s string) bool { return strings.Trim(s, "0123456789") == "" }

func sortedKeys(m map[string]any) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// TestRulesAreUsed: a rule that no config needs is gone with it.
func TestRulesAreUsed(t *testing.T) {
	files, err := filepath.Glob("testdata/configs/*.toml")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]any{}
	for _, file := range files {
		var config map[string]any
		if _, err := toml.DecodeFile(file, &config); err != nil {
			t.Fatal(err)
		}
		flat := map[string]any{}
		flatten("", config, flat)
		for at := range flat {
			all[at] = nil
		}
	}
	for _, r := range slices.Concat(leftOut, changed) {
		if !slices.ContainsFunc(sortedKeys(all), func(at string) bool { return isAllowed([]rule{r}, at) }) {
			t.Errorf("no config has %s", r.path)
		}
	}
}
