package convert

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// readMachine turns [runners.machine] into policies and a size, and what it leaves into comments of the pool. The keys are described at
// https://docs.gitlab.com/runner/configuration/autoscale/.
func (r *runner) readMachine() {
	t := r.machine
	if len(t.rest) == 0 || r.was != "docker+machine" && r.was != "docker-ssh+machine" {
		return
	}
	base := map[string]any{}
	for _, key := range []string{"IdleCount", "IdleTime", "IdleScaleFactor", "IdleCountMin"} {
		if v, ok := t.rest[key]; ok {
			base[key] = v
			t.take(key)
		}
	}
	r.policies = append(r.policies, machinePolicy(t.at, base))
	periods := t.tables("autoscaling")
	for _, s := range periods {
		r.policies = append(r.policies, machinePolicy(s.at, s.rest))
	}
	if len(periods) == 0 {
		r.offPeak()
	}
}

// offPeak turns the older keys into a policy. GitLab Runner takes it where there are no autoscaling sections.
func (r *runner) offPeak() {
	t := r.machine
	list, ok := t.rest["OffPeakPeriods"].([]any)
	if !ok || len(list) == 0 {
		return
	}
	section := map[string]any{}
	for _, key := range []string{"Periods", "Timezone", "IdleCount", "IdleTime"} {
		if v, ok := t.rest["OffPeak"+key]; ok {
			section[key] = v
			t.take("OffPeak" + key)
		}
	}
	r.policies = append(r.policies, machinePolicy(t.at.to("OffPeak"), section))
}

// machinePolicy is the policy of a [[runners.machine.autoscaling]] section, or of [runners.machine] itself. With a factor, IdleCount is the
// most that are idle and IdleCountMin the least; a policy has these as scale_factor_limit and idle_count.
func machinePolicy(at place, section map[string]any) *policy {
	t := newTable(at, section)
	p := &policy{at: at, source: section}
	if periods := t.texts("Periods"); len(periods) > 0 {
		converted := make([]string, len(periods))
		for i, period := range periods {
			converted[i] = cronPeriod(period)
		}
		p.add("periods", textList(converted), at)
	}
	if zone := t.text("Timezone"); zone != "" {
		p.add("timezone", literal(zone), at)
	}
	idle, _ := t.number("IdleCount")
	least, hasLeast := t.number("IdleCountMin")
	if factor := number(t.rest["IdleScaleFactor"]); factor > 0 {
		t.take("IdleScaleFactor")
		if !hasLeast || least < 1 {
			least = 1
		}
		p.add("idle_count", literal(least), at.to("IdleCountMin"))
		p.add("scale_factor", literal(factor), at.to("IdleScaleFactor"))
		p.add("scale_factor_limit", literal(idle), at.to("IdleCount"))
	} else {
		t.take("IdleScaleFactor")
		p.add("idle_count", literal(idle), at.to("IdleCount"))
	}
	if seconds, ok := t.number("IdleTime"); ok && seconds >= 0 && seconds < 1<<31 {
		p.add("idle_time", literal(time.Duration(seconds)*time.Second), at.to("IdleTime"))
	} else if ok {
		p.without("IdleTime", "IdleTime must be a number of seconds, 0 or more.")
	}
	for _, key := range t.keys() {
		p.without(key, "GitLab Runner has no such key here, or not with this value.")
	}
	return p
}

func number(v any) float64 {
	switch n := v.(type) {
	case int64:
		return float64(n)
	case float64:
		return n
	}
	return 0
}

var sundayFirst = regexp.MustCompile(`(?i)\bsun-`)

// cronPeriod is a period of docker+machine, which begins with seconds and ends with a year, in the five fields of a policy. One that needs
// those, or is no such period, is returned as it is, and refused by validate.
func cronPeriod(period string) string {
	f := strings.Fields(period)
	any := func(s string) bool { return s == "*" || s == "?" || s == "*/1" }
	switch {
	case len(f) == 7 && (any(f[0]) || f[0] == "0-59") && any(f[6]):
		f = f[1:6]
	case len(f) == 6 && any(f[5]):
		f = f[:5]
	case len(f) != 5:
		return period
	}
	for i := range f {
		if f[i] == "?" {
			f[i] = "*"
		}
	}
	// A week begins with Sunday there, and with Monday in a policy, where 0 is Sunday, too.
	if sundayFirst.MatchString(f[4]) {
		f[4] = sundayFirst.ReplaceAllString(f[4], "0-")
		for n, day := range []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"} {
			f[4] = regexp.MustCompile(`(?i)\b`+day+`\b`).ReplaceAllString(f[4], strconv.Itoa(n))
		}
	}
	return strings.Join(f, " ")
}

// machineReasons are about the keys of [runners.machine] that have no place in a spec.
var machineReasons = map[string]string{
	"MachineDriver":          "Workers are VMs on this host; no cloud is involved.",
	"MachineName":            "Workers are named after their pool.",
	"MaxGrowthRate":          "Workers are cloned on this host, as many at once as needed. To slow that down, write autoscaler = { scale_throttle = { limit = …, burst = … } } in settings.",
	"MachineOptionsWithName": "Workers are VMs on this host, named after their pool.",
	"MaxBuilds":              "MaxBuilds must be a whole number.",
}

// machineComments writes what is left of [runners.machine].
func (c *converter) machineComments(r *runner) {
	t := r.machine
	c.machineOptions(r)
	for _, key := range t.keys() {
		v := t.rest[key]
		why := machineReasons[key]
		switch {
		case isEmpty(v), v == "", v == int64(0) && strings.HasPrefix(key, "OffPeak"):
			continue
		case r.was != "docker+machine" && r.was != "docker-ssh+machine":
			why = "The executor " + r.was + " does not use it."
		case strings.HasPrefix(key, "OffPeak"):
			why = "GitLab Runner ignores it, or this value."
		case why == "":
			why = "GitLab Runner has no such key there."
		}
		c.leave(t.at.to(key).table(), key, v, why)
	}
}

// machineOptions lists the options of the driver, each with what stands in for it.
func (c *converter) machineOptions(r *runner) {
	options := r.machine.texts("MachineOptions")
	if len(options) == 0 {
		return
	}
	c.left++
	c.out.line("# [runners.machine] MachineOptions, and what stands in for them:")
	var order []string
	groups := map[string][]string{}
	for _, o := range options {
		instead := standIn(strings.Cut(o, "="))
		if groups[instead] == nil {
			order = append(order, instead)
		}
		groups[instead] = append(groups[instead], masked("", o).(string))
	}
	for _, instead := range order {
		c.out.wrapped("#   ", "#   ", strings.Join(groups[instead], ", "))
		c.out.wrapped("#     -> ", "#        ", instead)
	}
}

// standIns are what stands in for an option whose name contains one of the words. The first that fits counts.
var standIns = []struct {
	words   []string
	instead string
}{
	{[]string{"engine-registry-mirror", "engine-insecure-registry"}, "/etc/docker/daemon.json in the image's prebuild"},
	{[]string{"engine-install-url"}, "the package docker.io in the image's prebuild"},
	{[]string{"engine-env", "engine-opt", "engine-label", "engine-storage"}, "not converted: write it to /etc/docker/daemon.json in the image's prebuild"},
	{[]string{"swarm"}, "nothing: workers form no swarm"},
	{[]string{"disk", "root", "volume", "ebs", "device-name"}, "disk of the pool; all disks are on this host"},
	{[]string{"instance-type", "machine-type", "server-type", "flavor", "size", "cpu", "memory"}, "cpus and memory of the pool"},
	{[]string{"userdata", "user-data", "boot2docker", "additional-key"}, "run, packages and file in the image's prebuild"},
	{[]string{"ssh", "keypair", "key-pair", "keypath", "private-key-file", "use-existing-key"}, "nothing: each worker has an SSH key of its own, and the user of its image"},
	{[]string{"secret", "access-key", "token", "password", "credential", "api-key", "auth", "project", "scopes", "service-account", "iam", "tenant",
		"domain", "subscription", "client-id", "username", "user-id", "subscription", "identity"}, "nothing: no cloud is involved"},
	{[]string{"ami", "image", "os", "template"}, "the image block"},
	{[]string{"security-group", "sec-groups", "open-port", "firewall"}, "egress blocks in network; nothing reaches a worker from outside"},
	{[]string{"spot", "preemptible", "price", "block-duration", "billing"}, "nothing: a worker costs no money"},
	{[]string{"region", "zone", "vpc", "subnet", "network", "net-", "private", "internal", "public", "ip-", "endpoint", "location", "placement", "availability"},
		"nothing: workers are on this host, in the subnet of network"},
	{[]string{"tag", "label", "name", "monitoring", "backups", "timeout", "retries", "backoff", "metadata"}, "nothing: it only concerns cloud machines"},
}

func standIn(key, value string, _ bool) string {
	key = strings.ToLower(key)
	if _, ok := machineSize(value); ok && isSizeOption(key) {
		return "cpus and memory of the pool"
	}
	// A driver's name is no word of its options: there is a zone in amazonec2.
	if driver, rest, ok := strings.Cut(key, "-"); ok && driver != "engine" && driver != "swarm" {
		key = rest
	}
	for _, s := range standIns {
		if slices.ContainsFunc(s.words, func(w string) bool { return strings.Contains(key, w) }) {
			return s.instead
		}
	}
	return "nothing"
}
