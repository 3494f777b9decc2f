package compile

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// How often the runner polls the plugin for its instances. Its defaults, 1 min and 2 s, are made for cloud
// APIs; Update takes microseconds, and every job waits for a part of the interval.
const (
	updateInterval              = time.Second
	updateIntervalWhenExpecting = 100 * time.Millisecond
)

// maxRequests caps a runner's concurrent job requests. With the runner's default of one, the next job waits while
// GitLab holds a request open for its long poll of 50 s.
const maxRequests = 4

// readyCommand is for an image without the guest part, whose workers count as running once SSH answers. Exit
// code 2 is cloud-init's "degraded": done, with warnings.
const readyCommand = "cloud-init status --wait || test $? -eq 2"

// table is a TOML table.
type table = map[string]any

// config adds config.toml. Its tables are maps, so that a runner's settings can be merged in; the encoder sorts the keys.
func (c *compiler) config() {
	jobs := 0
	file := plan.File{Path: configPath, Mode: "0600", Owner: c.plan.User, Group: c.plan.User}
	var runners []table
	for _, r := range c.host.Runners {
		pool, err := c.plan.Pool(r.Pool)
		if err != nil {
			c.fail(r.Range, "Unknown pool", "Runner %q: %s.", r.Name, err)
			continue
		}
		section := c.runner(r, pool, hold(&file, "runner."+r.Name+".token", r.Token))
		settings, _ := withPlaceholders(&file, "runner."+r.Name, r.Settings).(table)
		merge(section, settings)
		runners = append(runners, section)
		jobs += pool.MaxInstances * r.CapacityPerInstance
		c.plan.Runners = append(c.plan.Runners, plan.Runner{Name: r.Name, Pool: r.Pool, Token: planText(r.Token)})
		c.from(r.Range, plan.KindRunner, r.Name)
	}
	top := table{"concurrent": max(jobs, 1), "runners": runners}
	global, _ := withPlaceholders(&file, "gitlab_runner", c.host.GitLabRunner).(table)
	merge(top, global)
	text, err := encode(top)
	if err != nil {
		c.fail(c.host.Range, "Cannot write config.toml", "%s.", err)
		return
	}
	for _, s := range file.Secrets {
		if strings.Count(text, s.Placeholder) != 1 {
			c.fail(c.host.Range, "Cannot write config.toml", "The settings of GitLab Runner contain the text %q, which is the placeholder of a secret. Use another text.",
				s.Placeholder)
			return
		}
	}
	file.Content = fmt.Sprintf("# Written by fleetingd for host %q. Change the spec and apply it again: changes made here are reported as drift.\n\n%s",
		c.host.Name, text)
	c.add(c.host.Range, file)
}

// planText converts a text of the spec to the Plan's type.
func planText(t hostspec.Text) plan.Text {
	var text plan.Text
	for _, p := range t {
		text = append(text, plan.Piece{Literal: p.Literal, From: p.Secret.From, Op: p.Op, Of: planText(p.Of)})
	}
	return text
}

// hold returns a text with placeholders for its secrets, which it adds to the file. place identifies the text, such as "runner.small.token".
func hold(file *plan.File, place string, t hostspec.Text) string {
	// The placeholder must be a plain word in TOML, whatever a key of the settings is called.
	place = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r) {
			return r
		}
		return '_'
	}, place)
	var b strings.Builder
	for _, p := range planText(t) {
		if p.From == "" && p.Op == "" {
			b.WriteString(p.Literal)
			continue
		}
		s := plan.FileSecret{Placeholder: "@SECRET:" + place + "@", Secret: p}
		for n := 2; slices.ContainsFunc(file.Secrets, func(o plan.FileSecret) bool { return o.Placeholder == s.Placeholder }); n++ {
			s.Placeholder = fmt.Sprintf("@SECRET:%s:%d@", place, n)
		}
		file.Secrets = append(file.Secrets, s)
		b.WriteString(s.Placeholder)
	}
	return b.String()
}

// withPlaceholders returns a copy of a settings value in which secrets are replaced by placeholders.
func withPlaceholders(file *plan.File, place string, v any) any {
	switch v := v.(type) {
	case hostspec.Text:
		return hold(file, place, v)
	case table:
		out := make(table, len(v))
		for _, key := range slices.Sorted(maps.Keys(v)) {
			out[key] = withPlaceholders(file, place+"."+key, v[key])
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = withPlaceholders(file, fmt.Sprintf("%s.%d", place, i), v[i])
		}
		return out
	}
	return v
}

func encode(t table) (string, error) {
	var b strings.Builder
	if err := toml.NewEncoder(&b).Encode(t); err != nil {
		return "", err
	}
	return b.String(), nil
}

// runner returns one [[runners]] section.
func (c *compiler) runner(r *hostspec.Runner, pool *plan.Pool, token string) table {
	jobs := pool.MaxInstances * r.CapacityPerInstance
	t := table{
		"name": r.Name, "url": r.URL, "token": token, "executor": r.Executor,
		"limit":               jobs,
		"request_concurrency": min(jobs, maxRequests),
		"autoscaler":          c.autoscaler(r, pool),
	}
	if r.Executor == "docker-autoscaler" {
		// The section is required, and so is an image for jobs that do not name one.
		t["docker"] = table{"image": "debian:stable-slim"}
	}
	return t
}

func (c *compiler) autoscaler(r *hostspec.Runner, pool *plan.Pool) table {
	image, _ := c.plan.Image(pool.Image) // hostspec resolved it
	t := table{
		"plugin":                         c.opts.bin("fleeting-plugin-fleetingd"),
		"plugin_config":                  table{"plan": plan.Path, "pool": r.Pool},
		"connector_config":               connector(image),
		"capacity_per_instance":          r.CapacityPerInstance,
		"max_use_count":                  r.MaxUseCount,
		"max_instances":                  pool.MaxInstances,
		"update_interval":                updateInterval.String(),
		"update_interval_when_expecting": updateIntervalWhenExpecting.String(),
		// A restarted runner finds its idle workers again. It does not reuse a worker that had a job, because that job is lost.
		"state_storage": table{
			"enabled": true, "dir": path.Join(c.plan.RunnerFolder(), "state"), "keep_instance_with_acquisitions": false,
		},
		// Restarting the runner, for example for an upgrade, keeps idle workers.
		"delete_instances_on_shutdown": false,
		"policy":                       policies(r.Policies),
	}
	if image != nil && image.Prebuild == nil {
		t["instance_ready_command"] = readyCommand
	}
	return t
}

func connector(image *plan.Image) table {
	t := table{"os": "linux", "protocol": "ssh", "use_external_addr": false, "keepalive": "30s", "timeout": "1m0s"}
	if image == nil {
		return t
	}
	t["username"] = image.User
	switch { // the system in a user's own disk is unknown: ConnectInfo tells the runner
	case image.Source.Ubuntu != nil:
		t["arch"] = image.Source.Ubuntu.Arch
	case image.Source.Debian != nil:
		t["arch"] = image.Source.Debian.Arch
	}
	return t
}

// policies returns the policy blocks or, without any, the runner's default written out, which keeps no worker
// idle.
func policies(blocks []*hostspec.Policy) []table {
	if len(blocks) == 0 {
		blocks = []*hostspec.Policy{{}}
	}
	all := make([]table, 0, len(blocks))
	for _, b := range blocks {
		t := table{
			"periods":    []string{"* * * * *"},
			"idle_count": b.IdleCount,
			// If it is omitted, the runner assumes true for idle_count > 0 but its schema check complains.
			"preemptive_mode": b.IdleCount > 0,
		}
		if len(b.Periods) > 0 {
			t["periods"] = b.Periods
		}
		if b.Timezone != "" {
			t["timezone"] = b.Timezone
		}
		if b.IdleTime > 0 {
			t["idle_time"] = b.IdleTime.String()
		}
		if b.ScaleFactor > 0 {
			t["scale_factor"] = b.ScaleFactor
		}
		if b.ScaleFactorLimit > 0 {
			t["scale_factor_limit"] = b.ScaleFactorLimit
		}
		if b.PreemptiveMode != nil {
			t["preemptive_mode"] = *b.PreemptiveMode
		}
		all = append(all, t)
	}
	return all
}

// merge puts the spec's settings into a table, by name and place; they replace values of this package (an
// interval, the docker executor's image). hostspec has refused settings that the spec has attributes for, and
// settings that are a table here and a value there.
func merge(into, settings table) {
	for key, value := range settings {
		ours, haveTable := into[key].(table)
		theirs, isTable := value.(table)
		switch {
		case haveTable && isTable:
			merge(ours, theirs)
		case isTable:
			own := table{} // the spec's own map must not change
			into[key] = own
			merge(own, theirs)
		default:
			into[key] = value
		}
	}
}
