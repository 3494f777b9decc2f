package convert

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/v2"

	"github.com/fleetingd/fleetingd/appliance/netrange"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// readPredecessor reads a plugin_config with the predecessor's keys.
func (r *runner) readPredecessor() error {
	keys := map[string]any{}
	for _, key := range hostspec.PredecessorKeys {
		if v, ok := r.plugin.rest[key]; ok {
			keys[key] = v
			r.plugin.take(key)
		}
	}
	if len(keys) == 0 {
		return nil
	}
	p, diags := hostspec.ParsePredecessor(keys)
	if diags.HasErrors() {
		return diagError(diags)
	}
	r.predecessor = &p
	r.size = size{cpus: p.CPUs, memory: p.MemoryMiB, disk: p.DiskGiB, from: "vm_num_cpu_cores and vm_memory_mb", diskFrom: "vm_disk_size_gb", console: p.Console}
	return nil
}

func diagError(diags hcl.Diagnostics) error {
	var texts []string
	for _, d := range diags {
		texts = append(texts, mask(strings.TrimSuffix(d.Detail, ".")))
	}
	return fmt.Errorf("%s", strings.Join(texts, "; "))
}

// shareHost finds runners of the predecessor that want different hosts.
func (c *converter) shareHost(runners []*runner) error {
	var first *runner
	for _, r := range runners {
		switch p := r.predecessor; {
		case p == nil:
		case first == nil:
			first = r
		case p.EgressInterface != first.predecessor.EgressInterface:
			return fmt.Errorf("%s has egress_interface %q and %s has %q; a host has one. Convert them apart", first.name(),
				mask(first.predecessor.EgressInterface), r.name(), mask(p.EgressInterface))
		default:
			// They share one subnet and one folder here, which a comment says.
			if p.StateDir != first.predecessor.StateDir {
				r.notes = append(r.notes, func() { c.otherHost(r, "vm_disk_directory", p.StateDir, "All runners of a host share its state_dir.") })
			}
			if p.Subnet != first.predecessor.Subnet {
				r.notes = append(r.notes, func() { c.otherHost(r, "vm_subnet", p.Subnet, "All runners of a host share its subnet.") })
			}
		}
	}
	return nil
}

func (c *converter) otherHost(r *runner, key string, value any, why string) {
	c.leave(r.plugin.at.to(key).table(), key, value, why)
}

// host writes the host block.
func (c *converter) host(global *table, runners []*runner) {
	var old *runner
	for _, r := range runners {
		if r.predecessor != nil && old == nil {
			old = r
		}
	}
	c.out.line("")
	c.out.line("host " + literal(hostspec.HostLabel(c.opts.Machine)) + " {")
	egress, why := c.opts.EgressInterface, "the interface of the default route (ip route show default)"
	switch {
	case old != nil:
		egress, why = old.predecessor.EgressInterface, ""
	case egress == "":
		egress, why = "eno1", "unknown: write the interface of the default route (ip route show default)"
	}
	t := tag{needed: "egress_interface"}
	if old != nil {
		t.needed = old.name() + ", egress_interface"
	}
	c.out.tagged(t, "egress_interface = "+literal(egress)+comment(why))
	if old != nil {
		c.stateDir(old)
	}
	c.subnet(old, runners)
	c.global(global)
	c.out.line("}")
}

func (c *converter) stateDir(r *runner) {
	at := r.plugin.at.to("vm_disk_directory")
	dir := r.predecessor.StateDir
	if c.isDropped(at) {
		c.leave(at.table(), at.key(), dir, c.dropped[at.id()])
		return
	}
	c.out.tagged(tag{place: at.id()}, "state_dir = "+literal(dir))
}

// subnet writes the network block where the default is not what is needed.
func (c *converter) subnet(old *runner, runners []*runner) {
	places := int64(len(runners)) // the images' own
	for _, r := range runners {
		if r.cannot == "" {
			places += r.maxInstances
		}
	}
	if old != nil {
		at := old.plugin.at.to("vm_subnet")
		if !c.isDropped(at) {
			c.out.line("")
			c.out.line("network {")
			c.out.tagged(tag{place: at.id()}, "subnet = "+literal(old.predecessor.Subnet))
			c.out.line("}")
			return
		}
		c.out.line("")
		c.leave(at.table(), at.key(), old.predecessor.Subnet, c.dropped[at.id()])
	}
	bits := netrange.Workers.Bits()
	for bits > 12 && int64(1)<<(32-bits)-2 < places {
		bits--
	}
	if bits == netrange.Workers.Bits() {
		return
	}
	if free, ok := netrange.Free(bits, func(netip.Prefix) bool { return false }); ok {
		c.out.line("")
		c.out.line("network {")
		c.out.line("subnet = " + literal(free.String()) + comment("one address per worker"))
		c.out.line("}")
	}
}

// global writes the gitlab_runner block.
func (c *converter) global(t *table) {
	if v, ok := t.rest["metrics_server"].(string); ok && t.rest["listen_address"] == nil {
		t.take("metrics_server")
		t.rest["listen_address"] = v
	}
	c.secretPrefix = "gitlab-runner"
	var attrs, rest []string
	for _, key := range t.keys() {
		switch {
		case isEmpty(t.rest[key]), t.rest[key] == "":
		case attrName(key) != key:
			rest = append(rest, key) // a block has no such attribute
		default:
			attrs = append(attrs, key)
		}
	}
	if len(attrs) > 0 {
		c.out.line("")
		c.out.line("gitlab_runner {")
		for _, key := range attrs {
			c.attr(place{key}, key, t.rest[key])
		}
		c.out.line("}")
	}
	for _, key := range rest {
		c.leave("", key, t.rest[key], "GitLab Runner has no such key.")
	}
}

// image is an image block to be. Two runners that need the same share one.
type image struct {
	name     string
	packages []string
	run      []string
	daemon   string // daemon.json
	// secretRun are the numbers of the run steps that hold a secret.
	secretRun []int
}

func (i image) same(o image) bool {
	return slices.Equal(i.packages, o.packages) && slices.Equal(i.run, o.run) && i.daemon == o.daemon
}

// readImage settles what the workers' image has.
func (r *runner) readImage() {
	options := newTable(r.machine.at, r.machine.rest).texts("MachineOptions")
	if r.predecessor == nil {
		// Some plugins name a size as a driver does.
		for _, key := range []string{"server_type", "instance_type", "machine_type", "flavor_name"} {
			if v, ok := r.plugin.rest[key].(string); ok {
				options = append(options, "plugin-"+strings.ReplaceAll(key, "_", "-")+"="+v)
			}
		}
		r.size = sizeOf(options)
	}
	switch {
	case r.predecessor != nil:
		r.image = image{name: "ubuntu", packages: []string{"ca-certificates", "curl"}, run: slices.Concat(hostspec.UbuntuCommands, r.predecessor.Run)}
		for i, cmd := range r.image.run {
			if looksSecret(cmd) {
				r.image.secretRun = append(r.image.secretRun, i)
			}
		}
	case r.executor == "docker-autoscaler":
		r.image = image{name: "docker", packages: []string{"docker.io"}, run: []string{"usermod -aG docker ubuntu"}, daemon: daemonJSON(options)}
	default:
		r.image = image{name: "ubuntu", packages: []string{"ca-certificates", "curl", "git"}, run: slices.Clone(hostspec.UbuntuCommands)}
	}
}

// daemonJSON is Docker's configuration for the registries that a driver's options name.
func daemonJSON(options []string) string {
	var mirrors, insecure []string
	for _, o := range options {
		key, value, _ := strings.Cut(o, "=")
		switch {
		case value == "" || looksSecret(value):
		case key == "engine-registry-mirror":
			mirrors = append(mirrors, value)
		case key == "engine-insecure-registry":
			insecure = append(insecure, value)
		}
	}
	var items []string
	if mirrors != nil {
		items = append(items, "registry-mirrors = "+textList(mirrors))
	}
	if insecure != nil {
		items = append(items, "insecure-registries = "+textList(insecure))
	}
	if items == nil {
		return ""
	}
	return "jsonencode({ " + strings.Join(items, ", ") + " })"
}

// images writes the image blocks, and gives each runner the name of its own.
func (c *converter) images(runners []*runner) {
	var all []image
	names := map[string]bool{}
	for _, r := range runners {
		if r.cannot != "" {
			continue
		}
		if i := slices.IndexFunc(all, r.image.same); i >= 0 {
			r.image.name = all[i].name
			continue
		}
		name := r.image.name
		for n := 2; names[r.image.name]; n++ {
			r.image.name = name + "-" + strconv.Itoa(n)
		}
		names[r.image.name] = true
		all = append(all, r.image)
		c.image(r)
	}
}

func (c *converter) image(r *runner) {
	i := r.image
	c.secretPrefix = "image-" + i.name
	c.out.line("")
	if r.predecessor == nil {
		c.out.note("Add to packages and run what else the machines of " + c.opts.Name + " had.")
	}
	c.out.line("image " + literal(i.name) + " {")
	c.out.line("ubuntu {")
	c.out.line(`release = "noble"`)
	if r.predecessor != nil && c.opts.Arch != "" && c.opts.Arch != "amd64" {
		c.out.tagged(tag{needed: "arch"}, "arch = "+literal(c.opts.Arch))
	}
	c.out.line("}")
	c.out.line("")
	c.out.line("prebuild {")
	c.out.line("packages = " + textList(i.packages))
	c.out.line("run = [")
	for n, cmd := range i.run {
		if slices.Contains(i.secretRun, n) {
			c.out.line(literal("sh "+secretStep(n)+" && rm "+secretStep(n)) + ", # contains a secret")
			continue
		}
		c.out.tagged(tag{needed: fmt.Sprintf("%s, command %d", r.name(), n+1)}, literal(cmd)+",")
	}
	c.out.line("]")
	for _, n := range i.secretRun {
		c.out.line("file " + literal(secretStep(n)) + " { # read when the image is built; every job can read what the step leaves in the image")
		c.out.line("content = " + c.secret("step-"+strconv.Itoa(n+1), i.run[n]))
		c.out.line(`mode = "0600"`)
		c.out.line("}")
	}
	if i.daemon != "" {
		c.out.line(`file "/etc/docker/daemon.json" {`)
		c.out.line("content = " + i.daemon)
		c.out.line("}")
	}
	c.out.line("}")
	c.out.line("}")
}

// secretStep is where a prebuild keeps a step that holds a secret until it has run.
func secretStep(n int) string { return "/root/fleetingd-step-" + strconv.Itoa(n+1) }

// What a worker gets where the source does not say.
const (
	defaultCPUs   = 2
	defaultMemory = 4 << 10 // MiB
	defaultDisk   = 30      // GiB
)

// pool writes the pool block, and the comments on what the source says about machines.
func (c *converter) pool(r *runner) {
	s := r.size
	needed := func(key string) tag { return tag{needed: r.name() + ", " + key} }
	from := s.from
	if s.cpus == 0 || s.memory == 0 {
		from = "not in config.toml: set what jobs need"
	}
	if s.cpus == 0 {
		s.cpus = defaultCPUs
	}
	if s.memory == 0 {
		s.memory = defaultMemory
	}
	diskFrom := s.diskFrom
	if s.disk == 0 {
		s.disk, diskFrom = defaultDisk, "not in config.toml: set what jobs need"
	}
	c.out.line("")
	c.out.line("pool " + literal(r.label) + " {")
	c.out.line("image = image." + r.image.name)
	c.out.tagged(needed("cpus"), "cpus = "+literal(s.cpus)+comment(oneLine(from)))
	c.out.tagged(needed("memory"), "memory = "+literal(memory(s.memory)))
	c.out.tagged(needed("disk"), "disk = "+literal(strconv.FormatInt(s.disk, 10)+"GiB")+comment(oneLine(diskFrom)))
	c.out.line(`start = "cold"`)
	if s.console {
		c.out.line("console = true")
	}
	c.out.tagged(needed("max_instances"), "max_instances = "+literal(r.maxInstances)+comment(r.maxInstancesNote))
	for _, note := range r.notes {
		note()
	}
	c.machineComments(r)
	switch plugin := r.plugin.rest; {
	case len(plugin) == 0:
	case r.predecessor != nil:
		c.leave("[runners.autoscaler.plugin_config]", "", plugin, "The predecessor's plugin has no such key.")
	default:
		c.leave("[runners.autoscaler.plugin_config]", "", plugin, "This configures another plugin.")
	}
	c.out.line("}")
}

// memory is a number of MiB as a spec has it.
func memory(mib int64) string {
	if mib%1024 == 0 {
		return strconv.FormatInt(mib/1024, 10) + "GiB"
	}
	return strconv.FormatInt(mib, 10) + "MiB"
}
