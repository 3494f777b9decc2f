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

// How often the runner asks the plugin what has become of its instances. Its defaults are 1 min and 2 s, made for cloud
// APIs; our Update costs microseconds, and the interval is a part of every job's wait.
const (
	updateInterval              = time.Second
	updateIntervalWhenExpecting = 100 * time.Millisecond
)

// maxRequests caps a runner's job requests under way. With one (the runner's default) a request that GitLab
// holds open for its long poll of 50 s keeps the next job waiting.
const maxRequests = 4

// readyCommand is for an image with no guest part, which is called running when it answers over SSH. Exit
// code 2 is cloud-init's "degraded": done, with warnings.
const readyCommand = "cloud-init status --wait || test $? -eq 2"

// table is a TOML table.
type table = map[string]any

// config adds config.toml. Its tables are maps: the encoder sorts their keys, and a runner's settings are merged in.
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
			c.fail(c.host.Range, "Cannot write config.toml", "The settings of GitLab Runner hold the text %q, which stands for a secret there. Write something else.",
				s.Placeholder)
			return
		}
	}
	file.Content = fmt.Sprintf("# Written by fleetingd for host %q. Change the spec and apply it again: changes made here are drift.\n\n%s",
		c.host.Name, text)
	c.add(c.host.Range, file)
}

// planText is a text of the spec as the Plan has it.
func planText(t hostspec.Text) plan.Text {
	var text plan.Text
	for _, p := range t {
		text = append(text, plan.Piece{Literal: p.Literal, From: p.Secret.From, Op: p.Op, Of: planText(p.Of)})
	}
	return text
}

// hold is a text with placeholders for its secrets, which the file then has. Place is where it stands: "runner.small.token".
func hold(file *plan.File, place string, t hostspec.Text) string {
	// Whatever a key of the settings is called, the placeholder is a plain word in TOML.
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

// withPlaceholders is a copy of a settings value, in which text that holds secrets has placeholders.
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

// runner is one [[runners]] section.
func (c *compiler) runner(r *hostspec.Runner, pool *plan.Pool, token string) table {
	jobs := pool.MaxInstances * r.CapacityPerInstance
	t := table{
		"name": r.Name, "url": r.URL, "token": token, "executor": r.Executor,
		"limit":               jobs,
		"request_concurrency": min(jobs, maxRequests),
		"autoscaler":          c.autoscaler(r, pool),
	}
	if r.Executor == "docker-autoscaler" {
		// The section must be there, and a job without an image needs one.
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
		// A restarted runner finds its idle workers again. One that had a job is not used again: that job is gone.
		"state_storage": table{
			"enabled": true, "dir": path.Join(c.runnerDir(), "state"), "keep_instance_with_acquisitions": false,
		},
		// A restart of the runner, for a new version of it, ends no worker that waits for a job.
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
	switch { // a disk that somebody made does not say what it is for: the plugin does, in ConnectInfo
	case image.Source.Ubuntu != nil:
		t["arch"] = image.Source.Ubuntu.Arch
	case image.Source.Debian != nil:
		t["arch"] = image.Source.Debian.Arch
	}
	return t
}

// policies are the policy blocks; with none there is one that keeps nothing idle, which is what the
// runner would do, written out.
func policies(blocks []*hostspec.Policy) []table {
	if len(blocks) == 0 {
		blocks = []*hostspec.Policy{{}}
	}
	all := make([]table, 0, len(blocks))
	for _, b := range blocks {
		t := table{
			"periods":    []string{"* * * * *"},
			"idle_count": b.IdleCount,
			// Left out, the runner takes it for idle_count > 0 and its schema check complains.
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

// merge puts the spec's settings into a table, each by its own name and at its own place; a value of ours (an
// interval, the docker executor's image) gives way. hostspec has refused those that the spec says elsewhere, and
// whatever is a table in one and a value in the other.
func merge(into, settings table) {
	for key, value := range settings {
		ours, haveTable := into[key].(table)
		theirs, isTable := value.(table)
		switch {
		case haveTable && isTable:
			merge(ours, theirs)
		case isTable:
			own := table{} // the spec's own map stays as it is
			into[key] = own
			merge(own, theirs)
		default:
			into[key] = value
		}
	}
}
