package convert

import (
	"regexp"
	"strconv"
	"strings"
)

// size is what a worker is given; 0 is not known. Memory is in MiB, disk in GiB.
type size struct {
	cpus, memory, disk int64
	from, diskFrom     string // the option that says so
	console            bool
}

// isSizeOption reports an option of a driver whose value names a size of machines.
func isSizeOption(key string) bool {
	for _, suffix := range []string{"-instance-type", "-machine-type", "-server-type", "-flavor-name", "digitalocean-size", "azure-size"} {
		if strings.HasSuffix(key, suffix) {
			return true
		}
	}
	return false
}

// sizeOf reads the size from a driver's options.
func sizeOf(options []string) size {
	var s size
	for _, o := range options {
		key, value, _ := strings.Cut(strings.TrimSpace(o), "=")
		key, value = strings.ToLower(key), strings.TrimSpace(value)
		n, err := strconv.ParseInt(value, 10, 32)
		whole := err == nil && n > 0
		switch {
		case isSizeOption(key):
			if m, ok := machineSize(value); ok {
				s.cpus, s.memory, s.from = m.cpus, m.memory, strings.TrimPrefix(o, "plugin-")
			}
		case !whole:
		case strings.HasSuffix(key, "-cpu-count"):
			s.cpus, s.from = n, "the driver's options"
		case key == "virtualbox-memory" || strings.HasSuffix(key, "-memory-size"):
			s.memory, s.from = n, "the driver's options"
		case key == "virtualbox-disk-size" || key == "vmwarevsphere-disk-size": // in MB
			s.disk, s.diskFrom = (n+1023)/1024, key+"="+value
		case key == "amazonec2-root-size" || strings.HasSuffix(key, "-disk-size") || strings.HasSuffix(key, "-volume-size"):
			s.disk, s.diskFrom = n, key+"="+value
		}
	}
	return s
}

var (
	awsType       = regexp.MustCompile(`^([a-z]+)(\d+)[a-z-]*\.(nano|micro|small|medium|large|(\d*)xlarge)$`)
	googleType    = regexp.MustCompile(`^([a-z]\d[a-z]?)-(standard|highmem|highcpu)-(\d+)(-lssd)?$`)
	googleCustom  = regexp.MustCompile(`^(?:[a-z]\d[a-z]?-)?custom-(\d+)-(\d+)(-ext)?$`)
	digitalOcean  = regexp.MustCompile(`^(?:s|g|gd|m|c2|so)-(\d+)vcpu-(\d+)gb`)
	azureStandard = regexp.MustCompile(`^Standard_([A-Z])[A-Z]*(\d+)[a-z]*(_v\d+)?$`)
)

// named are sizes whose names do not say what they are: CPUs, and memory in GiB.
var named = map[string][2]int64{
	"f1-micro": {1, 1}, "g1-small": {1, 2}, "e2-micro": {2, 1}, "e2-small": {2, 2}, "e2-medium": {2, 4},
	"cx11": {1, 2}, "cx21": {2, 4}, "cx31": {2, 8}, "cx41": {4, 16}, "cx51": {8, 32},
	"cx22": {2, 4}, "cx32": {4, 8}, "cx42": {8, 16}, "cx52": {16, 32}, "cx23": {2, 4}, "cx33": {4, 8}, "cx43": {8, 16}, "cx53": {16, 32},
	"cpx12": {1, 2}, "cpx22": {2, 4}, "cpx32": {4, 8}, "cpx42": {8, 16}, "cpx52": {12, 24}, "cpx62": {16, 32},
	"cpx11": {2, 2}, "cpx21": {3, 4}, "cpx31": {4, 8}, "cpx41": {8, 16}, "cpx51": {16, 32},
	"cax11": {2, 4}, "cax21": {4, 8}, "cax31": {8, 16}, "cax41": {16, 32},
	"ccx13": {2, 8}, "ccx23": {4, 16}, "ccx33": {8, 32}, "ccx43": {16, 64}, "ccx53": {32, 128},
	"m1.tiny": {1, 1}, "m1.small": {1, 2}, "m1.medium": {2, 4}, "m1.large": {4, 8}, "m1.xlarge": {8, 16}, // OpenStack's
}

// machineSize is the size that a cloud gives a name to: exactly that, or a little more where the cloud's is odd.
func machineSize(name string) (size, bool) {
	if n, ok := named[strings.ToLower(name)]; ok {
		return size{cpus: n[0], memory: n[1] << 10}, true
	}
	num := func(s string) int64 { n, _ := strconv.ParseInt(s, 10, 16); return n }
	var s size
	if m := awsType.FindStringSubmatch(name); m != nil {
		s = awsSize(m[1], m[3], num(m[4]))
	} else if m := googleType.FindStringSubmatch(name); m != nil {
		perCPU := map[string]int64{"standard": 4, "highmem": 8, "highcpu": 1}[m[2]]
		if m[2] == "highcpu" && strings.HasPrefix(m[1], "c") {
			perCPU = 2
		}
		s = size{cpus: num(m[3]), memory: num(m[3]) * perCPU << 10}
	} else if m := googleCustom.FindStringSubmatch(name); m != nil {
		memory, _ := strconv.ParseInt(m[2], 10, 32)
		s = size{cpus: num(m[1]), memory: memory}
	} else if m := digitalOcean.FindStringSubmatch(name); m != nil {
		s = size{cpus: num(m[1]), memory: num(m[2]) << 10}
	} else if m := azureStandard.FindStringSubmatch(name); m != nil {
		perCPU := map[string]int64{"B": 4, "D": 4, "E": 8, "F": 2}[m[1]]
		s = size{cpus: num(m[2]), memory: num(m[2]) * perCPU << 10}
	}
	return s, s.cpus > 0 && s.memory > 0 && s.cpus <= 254
}

// awsSize is a type of EC2: in most families a size has a number of CPUs, and the family an amount of memory for each.
func awsSize(family, name string, times int64) size {
	perCPU := map[string]int64{"c": 2, "m": 4, "t": 4, "r": 8, "i": 8, "x": 16}[family]
	cpus := map[string]int64{"medium": 1, "large": 2, "xlarge": 4}[name]
	if times > 0 {
		cpus = 4 * times
	}
	if family == "t" { // burstable
		switch name {
		case "nano", "micro":
			return size{cpus: 2, memory: 1 << 10}
		case "small":
			return size{cpus: 2, memory: 2 << 10}
		case "medium":
			return size{cpus: 2, memory: 4 << 10}
		}
	}
	return size{cpus: cpus, memory: cpus * perCPU << 10}
}
