package convert

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// runner is a [[runners]] section while it is converted.
type runner struct {
	index    int
	at       place
	all      map[string]any // the section as it is
	t        *table
	label    string // of its blocks
	was      string // its executor in the source
	executor string
	cannot   string // why it cannot become a runner here
	url      string
	token    string

	maxInstances, capacity, maxUse int64
	maxInstancesNote, maxUseNote   string
	limit                          int64 // to be written, if not 0
	policies                       []*policy

	size        size
	machine     *table // [runners.machine]
	autoscaler  *table
	plugin      *table // its plugin_config
	predecessor *hostspec.Predecessor
	image       image
	notes       []func() // comments of the pool block
}

// policy is a policy block to be.
type policy struct {
	at      place
	source  map[string]any // what it was made of
	attrs   []policyAttr
	leave   []string // keys of the source that are comments
	reasons map[string]string
}

type policyAttr struct {
	name, value string
	at          place // what can be left out
}

// name is the runner in an error.
func (r *runner) name() string {
	if name, ok := r.all["name"].(string); ok && name != "" {
		return fmt.Sprintf("[[runners]] %d (%q)", r.index+1, mask(name))
	}
	return fmt.Sprintf("[[runners]] %d", r.index+1)
}

// executors are those that become another one here, and what to say about it.
var executors = map[string]struct{ becomes, note string }{
	"instance":           {"instance", ""},
	"docker-autoscaler":  {"docker-autoscaler", ""},
	"docker+machine":     {"docker-autoscaler", "Replaces docker+machine: each job runs in a container, in a VM on this host."},
	"docker-ssh+machine": {"docker-autoscaler", "Replaces docker-ssh+machine: each job runs in a container, in a VM on this host."},
	"docker":             {"docker-autoscaler", "Replaces docker: the container of each job now runs in a VM."},
	"shell":              {"instance", "Replaces shell: jobs run in the shell of a VM, and find the programs of its image instead of the host's."},
}

// readRunners takes the [[runners]] sections apart.
func (c *converter) readRunners(global *table) ([]*runner, error) {
	sections := global.tables("runners")
	if len(sections) == 0 {
		return nil, errors.New("it has no [[runners]] section, so there is nothing to convert; give it the config.toml of a registered runner")
	}
	concurrent := int64(1) // GitLab Runner's default
	if n, ok := global.rest["concurrent"].(int64); ok && n > 0 {
		concurrent = n
	}
	var runners []*runner
	var errs []error
	convertible := 0
	for i, t := range sections {
		r := &runner{index: i, at: t.at, all: t.rest, t: newTable(t.at, t.rest)}
		runners = append(runners, r)
		if err := c.readRunner(r, concurrent); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.name(), err))
		}
		if r.cannot == "" {
			convertible++
		}
	}
	if convertible == 0 && len(errs) == 0 {
		return nil, fmt.Errorf("none of its [[runners]] sections can be converted. %s", runners[0].cannot)
	}
	return runners, errors.Join(errs...)
}

func (c *converter) readRunner(r *runner, concurrent int64) error {
	r.was = r.t.text("executor")
	e, ok := executors[r.was]
	if !ok {
		r.cannot = fmt.Sprintf("fleetingd cannot run jobs of the executor %q. Keep this section in a separate GitLab Runner.", mask(r.was))
		return nil
	}
	r.executor = e.becomes
	r.label = c.label(r.t.text("name"), r.index)
	if r.url = r.t.text("url"); r.url == "" {
		return errors.New("it has no url; write the URL of its GitLab there, and convert again")
	}
	r.token = r.t.text("token")
	r.machine = r.t.sub("machine")
	r.autoscaler = r.t.sub("autoscaler")
	r.plugin = r.autoscaler.sub("plugin_config")
	if _, ok := r.plugin.rest["plan"]; ok {
		return errors.New("its plugin_config names a plan, so fleetingd wrote this file from a host.hcl; change that file")
	}
	if err := r.readPredecessor(); err != nil {
		return err
	}
	r.readMachine()
	r.readPolicies()
	r.readNumbers(concurrent)
	r.readImage()
	return nil
}

var notInLabel = regexp.MustCompile(`[^a-z0-9]+`)

// label is a name for the runner's blocks, after what it is called.
func (c *converter) label(name string, index int) string {
	const longest = 28 // of 32, with room for a number
	label := strings.Trim(notInLabel.ReplaceAllString(strings.ToLower(name), "-"), "-")
	label = strings.Trim(strings.TrimLeft(label, "0123456789-")[:min(longest, len(strings.TrimLeft(label, "0123456789-")))], "-")
	if label == "" || looksSecret(name) {
		label = "runner-" + strconv.Itoa(index+1)
	}
	free := label
	for n := 2; c.labels[free]; n++ {
		free = label + "-" + strconv.Itoa(n)
	}
	c.labels[free] = true
	return free
}

// mostInstances keeps a limit that stands for "as many as you like" from asking for more addresses than a host has use for.
const mostInstances = 1000

// readNumbers settles how many workers there may be, and for how many jobs.
func (r *runner) readNumbers(concurrent int64) {
	t := r.autoscaler
	r.capacity, r.maxUse = 1, 0
	const mostJobs = 1 << 20 // more is no number of jobs
	if n, ok := t.number("capacity_per_instance"); ok && n > 0 {
		r.capacity = min(n, mostJobs)
	}
	limit, _ := r.t.number("limit")
	jobs := min(concurrent, mostJobs)
	concurrent = jobs
	if limit > 0 {
		jobs = min(limit, concurrent+r.mostIdle())
	} else {
		jobs += r.mostIdle()
	}
	what := "limit and concurrent"
	r.maxInstances = (jobs + r.capacity - 1) / r.capacity
	if n, ok := t.number("max_instances"); ok && n > 0 {
		r.maxInstances, what = n, "max_instances"
	}
	if r.maxInstances > mostInstances {
		r.maxInstancesNote = fmt.Sprintf("%s in config.toml would allow %d", what, r.maxInstances)
		r.maxInstances = mostInstances
	}
	if limit > 0 && limit != r.maxInstances*r.capacity {
		r.limit = limit
	}
	switch n, ok := t.number("max_use_count"); {
	case ok:
		r.maxUse = max(n, 0)
	case r.was == "docker+machine" || r.was == "docker-ssh+machine":
		if n, ok := r.machine.number("MaxBuilds"); ok {
			r.maxUse = max(n, 0)
		}
	case r.was == "docker" || r.was == "shell":
		r.maxUse = 1
	}
	if r.maxUse == 0 {
		r.maxUseNote = "no limit, as in config.toml; 1 gives each job a fresh VM"
	}
}

// mostIdle is how many machines docker+machine keeps beside those that run jobs, at most.
func (r *runner) mostIdle() int64 {
	most := int64(0)
	if r.was != "docker+machine" && r.was != "docker-ssh+machine" {
		return 0
	}
	for _, p := range r.policies {
		for _, key := range []string{"IdleCount", "OffPeakIdleCount"} {
			if n, ok := p.source[key].(int64); ok {
				most = max(most, min(n, mostInstances))
			}
		}
	}
	return most
}

// readPolicies turns [[runners.autoscaler.policy]] sections into policies.
func (r *runner) readPolicies() {
	for _, t := range r.autoscaler.tables("policy") {
		p := &policy{at: t.at, source: t.rest}
		for _, key := range t.keys() {
			at := t.at.to(key)
			switch v := t.rest[key].(type) {
			case []any:
				if texts := newTable(t.at, t.rest).texts(key); key == "periods" && texts != nil {
					p.add(key, textList(texts), t.at)
					continue
				}
			case string:
				switch {
				case key == "timezone" && v == "":
					continue
				case key == "timezone":
					p.add(key, literal(v), t.at)
					continue
				case key == "idle_time":
					p.add(key, durationText(v), at)
					continue
				}
			case int64:
				if key == "idle_time" { // GitLab Runner reads a bare number as nanoseconds
					p.add(key, literal(time.Duration(v)), at)
					continue
				}
				if slices.Contains(policyKeys, key) {
					p.add(key, literal(v), at)
					continue
				}
			case float64, bool:
				if slices.Contains(policyKeys, key) && expressible(v) {
					p.add(key, literal(v), at)
					continue
				}
			}
			p.without(key, "GitLab Runner has no such key in a policy, or not with this value.")
		}
		r.policies = append(r.policies, p)
	}
}

var policyKeys = []string{"idle_count", "scale_factor", "scale_factor_limit", "preemptive_mode"}

func durationText(s string) string {
	if d, err := time.ParseDuration(s); err == nil {
		return literal(d)
	}
	return literal(s)
}

func textList(texts []string) string {
	quoted := make([]string, len(texts))
	for i, s := range texts {
		quoted[i] = literal(s)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

func (p *policy) add(name, value string, at place) {
	p.attrs = append(p.attrs, policyAttr{name, value, at})
}

func (p *policy) without(key, why string) {
	p.leave = append(p.leave, key)
	if p.reasons == nil {
		p.reasons = map[string]string{}
	}
	p.reasons[key] = why
}

// policy writes a policy block. A policy without its periods would hold at other times, so with those the whole goes.
func (c *converter) policy(p *policy) {
	if c.isDropped(p.at) {
		c.leave("["+strings.Join(slices.DeleteFunc(slices.Clone(p.at), isIndex), ".")+"]", "", p.source, c.dropped[p.at.id()])
		return
	}
	c.out.line("policy {")
	for _, a := range p.attrs {
		if c.isDropped(a.at) {
			c.leave(a.at.table(), a.at.key(), p.source[a.at.key()], c.dropped[a.at.id()])
			continue
		}
		c.out.tagged(tag{place: a.at.id()}, a.name+" = "+a.value)
	}
	for _, key := range p.leave {
		c.leave(p.at.to(key).table(), key, p.source[key], p.reasons[key])
	}
	c.out.line("}")
}

func isIndex(step string) bool {
	_, err := strconv.Atoi(step)
	return err == nil
}

// runner writes the runner block.
func (c *converter) runner(r *runner) {
	c.secretPrefix = r.label
	needed := func(key string) tag { return tag{needed: r.name() + ", " + key} }
	c.out.line("")
	if name, _ := r.all["name"].(string); name != "" && name != r.label {
		c.out.note("Called " + strconv.Quote(name) + " in config.toml.")
	}
	c.out.line("runner " + literal(r.label) + " {")
	c.out.line("pool = pool." + r.label)
	c.out.tagged(needed("url"), "url = "+literal(r.url))
	token := "token = " + c.secret("token", r.token)
	if r.token == "" {
		token += " # config.toml has no token"
	}
	c.out.tagged(needed("token"), token)
	if note := executors[r.was].note; note != "" {
		c.out.note(note)
	}
	c.out.line("executor = " + literal(r.executor))
	c.out.line("")
	c.out.tagged(needed("capacity_per_instance"), "capacity_per_instance = "+literal(r.capacity))
	c.out.tagged(needed("max_use_count"), "max_use_count = "+literal(r.maxUse)+comment(r.maxUseNote))
	for _, p := range r.policies {
		c.out.line("")
		c.policy(p)
	}
	c.settings(r)
	c.out.line("}")
}

func comment(note string) string {
	if note == "" {
		return ""
	}
	return " # " + note
}

// renamed are settings that GitLab Runner has under another name today.
var renamed = map[string]string{"pre_clone_script": "pre_get_sources_script", "post_clone_script": "post_get_sources_script"}

// ownDocker are the settings of [runners.docker] that name a Docker daemon. Jobs use the one in their VM.
var ownDocker = []string{"host", "tls_cert_path"}

// settings writes what is left of the section by its own names.
func (c *converter) settings(r *runner) {
	settings := r.t.rest
	c.autoscalerSettings(r, settings)
	var notes []string
	for _, old := range slices.Sorted(maps.Keys(renamed)) {
		if v, ok := settings[old].(string); ok && settings[renamed[old]] == nil {
			delete(settings, old)
			settings[renamed[old]] = v
			notes = append(notes, "GitLab Runner has renamed "+old+" to "+renamed[old]+".")
		}
	}
	docker, ok := settings["docker"].(map[string]any)
	var daemon []string
	if ok {
		t := newTable(r.at.to("docker"), docker)
		settings["docker"] = t.rest
		for _, key := range ownDocker {
			if v, ok := t.rest[key].(string); ok {
				t.take(key)
				if v != "" {
					daemon = append(daemon, key)
				}
			}
		}
	}
	if r.limit > 0 {
		settings["limit"] = r.limit
	}
	for _, key := range sortedKeys(settings) {
		if isEmpty(settings[key]) {
			delete(settings, key)
		}
	}
	if len(settings) > 0 {
		c.out.line("")
		for _, n := range notes {
			c.out.note(n)
		}
		c.out.line("settings = {")
		c.attrs(r.at, settings)
		c.out.line("}")
	}
	for _, key := range daemon {
		c.leave("[runners.docker]", key, docker[key], "Jobs use the Docker daemon in their VM.")
	}
}

// autoscalerSettings moves what is left of [runners.autoscaler] to the settings, and comments on what fleetingd decides.
func (c *converter) autoscalerSettings(r *runner, settings map[string]any) {
	t := r.autoscaler
	leave := func(t *table, key, why string) {
		if v, ok := t.rest[key]; ok {
			t.take(key)
			c.leave(t.at.to(key).table(), key, v, why)
		}
	}
	if v := t.text("plugin"); v != "" && r.predecessor == nil {
		c.leave("[runners.autoscaler]", "plugin", v, "fleetingd is the plugin here: workers are VMs on this host.")
	}
	if v, ok := t.rest["instance_ready_command"].(string); ok && (v == "" || strings.HasPrefix(v, "cloud-init status --wait")) {
		leave(t, "instance_ready_command", "Not needed: a worker counts as running only once it is ready.")
	}
	leave(t, "vm_isolation", "Not needed: each job already has its own VM.")
	connector := t.sub("connector_config")
	own := map[string]any{"os": "linux", "protocol": "ssh", "use_external_addr": false, "username": "ubuntu", "protocol_port": int64(22)}
	carried := map[string]any{}
	for _, key := range connector.keys() {
		switch v := connector.take(key); {
		case key == "keepalive" || key == "timeout":
			carried[key] = v
		case v == own[key] || v == "" || v == false || v == int64(0):
		default:
			c.leave("[runners.autoscaler.connector_config]", key, v,
				"Workers are reached over SSH at their own address, as the image's user, each with its own key.")
		}
	}
	for _, key := range []string{"token_obtained_at", "token_expires_at"} {
		if v, ok := settings[key]; ok {
			delete(settings, key)
			c.leave("[[runners]]", key, v, "GitLab Runner records this itself when it renews a token.")
		}
	}
	if len(carried) > 0 {
		t.rest["connector_config"] = carried
	}
	storage := t.sub("state_storage")
	leave(storage, "dir", "fleetingd chooses this folder.")
	if len(storage.rest) > 0 {
		t.rest["state_storage"] = storage.rest
	}
	if len(t.rest) > 0 {
		settings["autoscaler"] = t.rest
	}
}
