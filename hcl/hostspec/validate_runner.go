package hostspec

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	_ "time/tzdata" // the same zones on every machine, also where none are installed

	"github.com/hashicorp/hcl/v2"
)

func (l *loader) validateRunners(s *spec) {
	var pools []string
	size := map[string]int{}
	for _, p := range s.pools {
		pools = append(pools, p.Name)
		size[p.Name] = p.MaxInstances
	}
	users := map[string]*Runner{}
	for _, r := range s.runners {
		l.validateRunner(r)
		if !l.ok(r, "pool") {
			continue
		}
		if !slices.Contains(pools, r.Pool) {
			l.unknownReference(l.at(r, "pool"), "pool", r.Pool, pools)
			continue
		}
		if first := users[r.Pool]; first != nil {
			l.errorf(l.at(r, "pool"), "Pool used twice", "The runner %q at %s has the pool %q already. Each runner counts on having all of its pool's workers: "+
				"give this one a pool of its own.", first.Name, first.Range, r.Pool)
		} else {
			users[r.Pool] = r
		}
		for _, p := range r.Policies {
			if most := size[r.Pool] * r.CapacityPerInstance; l.ok(p, "idle_count") && most > 0 && p.IdleCount > most {
				l.warnf(l.at(p, "idle_count"), "More idle than there are", "idle_count is %d, and the pool %q has room for %d.", p.IdleCount, r.Pool, most)
			}
		}
	}
}

func (l *loader) validateRunner(r *Runner) {
	l.checkURL(r, "url", r.URL)
	l.oneOf(r, "executor", r.Executor, "instance", "docker-autoscaler")
	l.inRange(r, "capacity_per_instance", r.CapacityPerInstance, 1, 1024, "")
	l.inRange(r, "max_use_count", r.MaxUseCount, 0, 1<<30, ", 0 being without end")
	l.checkSettings(r)
	for _, p := range r.Policies {
		l.validatePolicy(p)
	}
}

func (l *loader) validatePolicy(p *Policy) {
	if l.ok(p, "periods") && len(p.Periods) == 0 {
		l.errorf(l.at(p, "periods"), "Invalid periods", "An empty list matches no time. Leave periods away for always.")
	}
	for i, period := range p.Periods {
		if err := checkPeriod(period); err != nil {
			l.errorf(l.atElem(p, "periods", i), "Invalid periods", "%s: %v.", quote(period), err)
		}
	}
	l.checkTimezone(p)
	l.inRange(p, "idle_count", p.IdleCount, 0, 1<<20, "")
	if l.ok(p, "scale_factor") && !(p.ScaleFactor >= 0 && p.ScaleFactor <= 1000) {
		l.errorf(l.at(p, "scale_factor"), "Invalid scale_factor", "scale_factor is %g, and may be 0 (off) to 1000.", p.ScaleFactor)
	}
	l.inRange(p, "scale_factor_limit", p.ScaleFactorLimit, 0, 1<<20, ", 0 being no limit")
}

func (l *loader) checkTimezone(p *Policy) {
	if !l.ok(p, "timezone") {
		return
	}
	_, err := time.LoadLocation(p.Timezone)
	if err == nil && p.Timezone != "" && p.Timezone != "Local" {
		return
	}
	cure := `Write a name from the IANA list, such as "Europe/Berlin" or "UTC"; leave it away for the host's own`
	if s := titleZone(p.Timezone); s != p.Timezone {
		if _, err := time.LoadLocation(s); err == nil {
			cure = fmt.Sprintf("Did you mean %q", s)
		}
	}
	l.errorf(l.at(p, "timezone"), "Invalid timezone", "%s is no time zone. %s.", quote(p.Timezone), cure)
}

// titleZone is "europe/berlin" or "Europe/new york" as the list writes it.
func titleZone(s string) string {
	if len(s) > 64 {
		return s
	}
	if strings.EqualFold(s, "utc") {
		return "UTC"
	}
	b := []byte(strings.ReplaceAll(strings.ToLower(s), " ", "_"))
	for i := range b {
		if i == 0 || b[i-1] == '/' || b[i-1] == '_' {
			b[i] = strings.ToUpper(string(b[i]))[0]
		}
	}
	return string(b)
}

// ours are the keys of a [[runners]] section that the spec has its own words for.
var ours = map[string]string{
	"name":     "it is the runner block's label",
	"url":      "write url = … in the runner block",
	"token":    "write token = … in the runner block",
	"executor": "write executor = … in the runner block",
	// GitLab writes these three down when a runner is registered.
	"id":                "GitLab Runner finds it out by the token",
	"token_obtained_at": "it belongs to a registration, and the token is given here",
	"token_expires_at":  "it belongs to a registration, and the token is given here",
	// With it the section would not be what the spec says.
	"machine": "it belongs to the docker+machine executor; pools take its place",
}

// oursAutoscaler are the same of its autoscaler table. The others there may be set.
var oursAutoscaler = map[string]string{
	"plugin":                "fleetingd is the plugin",
	"plugin_config":         "fleetingd writes it",
	"capacity_per_instance": "write capacity_per_instance = … in the runner block",
	"max_use_count":         "write max_use_count = … in the runner block",
	"max_instances":         "write max_instances = … in the pool block",
	"policy":                "write policy { … } blocks in the runner block",
}

// autoscalerKeys are the others, from
// https://docs.gitlab.com/runner/configuration/advanced-configuration/#the-runnersautoscaler-section
var autoscalerKeys = []string{
	"connector_config", "delete_instances_on_shutdown", "deletion_retry_interval", "failure_threshold",
	"instance_acquire_timeout", "instance_ready_command", "log_external_ip", "log_internal_ip", "reservation_throttling",
	"scale_throttle", "shutdown_deletion_interval", "shutdown_deletion_retries", "state_storage", "update_interval",
	"update_interval_when_expecting", "vm_isolation",
}

// runnerKeys are the others, from
// https://docs.gitlab.com/runner/configuration/advanced-configuration/#the-runners-section
var runnerKeys = []string{
	"autoscaler", "builds_dir", "cache", "cache_dir", "clean_git_config", "clone_url", "custom_build_dir", "debug_trace_disabled", "docker",
	"environment", "feature_flags", "instance", "job_status_final_update_retry_limit", "labels", "limit", "monitoring", "output_limit",
	"post_build_script", "post_get_sources_script", "pre_build_script", "pre_get_sources_script", "referees", "request_concurrency",
	"shell", "strict_check_interval", "store", "tls-ca-file", "tls-cert-file", "tls-key-file", "unhealthy_interval",
	"unhealthy_requests_limit",
}

// tables are the keys of both that hold a table.
var tables = []string{
	"autoscaler", "cache", "custom_build_dir", "docker", "feature_flags", "instance", "monitoring", "referees",
	"autoscaler.connector_config", "autoscaler.scale_throttle", "autoscaler.state_storage", "autoscaler.vm_isolation",
}

// durations are the keys of both, and of the connector, that hold a duration.
var durations = []string{
	"unhealthy_interval", "autoscaler.deletion_retry_interval", "autoscaler.instance_acquire_timeout",
	"autoscaler.shutdown_deletion_interval", "autoscaler.update_interval", "autoscaler.update_interval_when_expecting",
	"autoscaler.connector_config.keepalive", "autoscaler.connector_config.timeout",
}

// checkSettings refuses what the spec says elsewhere, and warns of likely typos: GitLab
// Runner ignores a key that it does not know without a word.
func (l *loader) checkSettings(r *Runner) {
	if !l.ok(r, "settings") {
		return
	}
	l.checkKeys(r, "", r.Settings, ours, runnerKeys)
	if autoscaler, ok := r.Settings["autoscaler"].(map[string]any); ok {
		l.checkKeys(r, "autoscaler.", autoscaler, oursAutoscaler, autoscalerKeys)
	}
	for _, key := range tables {
		if v, ok := setting(r.Settings, key); ok {
			if _, is := v.(map[string]any); !is {
				l.errorf(l.settingAt(r, key), "Invalid settings", "%s is a table in GitLab Runner's config.toml. Write %s = { … }.",
					quote(key), key[strings.LastIndexByte(key, '.')+1:])
			}
		}
	}
	for _, key := range durations {
		v, _ := setting(r.Settings, key)
		switch v := v.(type) {
		case int64, float64:
			l.errorf(l.settingAt(r, key), "Invalid settings", "%s is a duration, and GitLab Runner takes a bare number for nanoseconds. Write \"%vs\".", quote(key), v)
		case string:
			if _, err := time.ParseDuration(v); err != nil {
				l.errorf(l.settingAt(r, key), "Invalid settings", "%s is a duration, and %s is none. Write \"30s\", for example.", quote(key), quote(v))
			}
		}
	}
}

// setting is the value at a place such as autoscaler.update_interval.
func setting(table map[string]any, place string) (any, bool) {
	key, rest, nested := strings.Cut(place, ".")
	v, ok := table[key]
	if !nested {
		return v, ok
	}
	inner, _ := v.(map[string]any)
	return setting(inner, rest)
}

// checkKeys is checkSettings for one table; prefix is its own key and a dot.
func (l *loader) checkKeys(r *Runner, prefix string, table map[string]any, ours map[string]string, known []string) {
	for _, key := range slices.Sorted(maps.Keys(table)) {
		at := l.settingAt(r, prefix+key)
		if cure, ok := ours[strings.ToLower(key)]; ok {
			l.errorf(at, "Invalid settings", "settings may not have %s: %s.", quote(prefix+key), cure)
			continue
		}
		if slices.Contains(known, key) {
			continue
		}
		if near := nearest(key, slices.Concat(known, slices.Collect(maps.Keys(ours)))); near != "" {
			l.warnf(at, "Unknown setting",
				"%s is no setting of GitLab Runner's that is known here; did you mean %q? It ignores unknown ones without a word.",
				quote(prefix+key), prefix+near)
		}
	}
}

// settingAt is the place of a key in settings, or of the nearest table that it is in.
func (l *loader) settingAt(r any, key string) *hcl.Range {
	for {
		if at, ok := l.attrs[attrKey{r, "settings." + key}]; ok {
			return &at.rng
		}
		dot := strings.LastIndexByte(key, '.')
		if dot < 0 {
			return l.at(r, "settings")
		}
		key = key[:dot]
	}
}
