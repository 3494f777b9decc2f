package hostspec

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// quotedCure is a value that a message says to write.
var quotedCure = regexp.MustCompile(`(?:write|or|such as|and) ("(?:[^"\\]|\\.)*")`)

// TestCuresAreTaken: what a message says to write in place of a value is itself a value.
func TestCuresAreTaken(t *testing.T) {
	sizes := []string{"8 GiB", "8", "8GB", "8gb", "8 gb", "1.5GiB", "0.5TiB", "8G", "8g", "8Gi", "8 M", "1e3GiB", "8KB", "8TB", " 8GiB", "8GiB ", "8 GiB.", "08GiB", "1,5GiB", "8GiBs"}
	durations := []string{"5", "5 m", "5min", "5 minutes", "1d", "2w", "1h 30m", "90", "1 hour", "1.5d", "30sec", "-5m", "5M", "5m.", "300s ", "1y", "24hours"}
	percents := []string{"400", "4", "400 %", "4.5", "%400", "400percent", "0", "100 %", "4 CPUs", "400%%"}
	prefixes := []string{"10.0.0.5", "10.0.0.5/24", "fd00::1", "fd00::1/64", "gitlab.example.com", "10.0.0.0/33", "::ffff:10.0.0.0/120", "10.0.0/24", "10.0.0.0 /24", "fe80::1%eth0"}
	ports := []string{"443", "443/tcp", "tcp:443", "TCP/443", "tcp 443", "http", "sctp/9000", "tcp/9001-9000", "tcp/0", "tcp/70000", "9000-9001", "icmp", "tcp/443-", "udp/53,54"}
	var periods []string
	days := []string{"0", "1", "3", "5", "6", "7", "sun", "mon", "wed", "fri", "sat", "SAT"}
	for _, from := range days {
		for _, to := range days {
			for _, step := range []string{"", "/2"} {
				periods = append(periods, "* * * * "+from+"-"+to+step, "* 8-18 * * mon,"+from+"-"+to+step)
			}
		}
	}
	for _, hours := range []string{"22-6", "23-0", "18-8/2", "24", "8-24", "*/0", "8-"} {
		periods = append(periods, "* "+hours+" * * *")
	}
	periods = append(periods, "* * 31-1 * *", "* * * dec-jan *", "* * * 12-1 *", "50-10 * * * *", "@daily", "* * *", "* * * * * *", "* * * * monday", "* * * * +1")

	for what, c := range map[string]struct {
		parse func(string) error
		odd   []string
	}{
		"size":     {func(s string) error { _, err := parseSize(s); return err }, sizes},
		"duration": {func(s string) error { _, err := parseDuration(s); return err }, durations},
		"percent":  {func(s string) error { _, err := parsePercent(s); return err }, percents},
		"prefix":   {func(s string) error { _, err := parsePrefix(s); return err }, prefixes},
		"ports":    {func(s string) error { _, err := parsePorts(s); return err }, ports},
		"mode":     {func(s string) error { _, err := parseMode(s); return err }, []string{"u+x", "0o755", "999", "7", "rwxr-xr-x", "00644"}},
		"period":   {func(s string) error { _, err := parsePeriod(s); return err }, periods},
	} {
		cures := 0
		for _, odd := range c.odd {
			err := c.parse(odd)
			if err == nil {
				continue
			}
			for _, m := range quotedCure.FindAllStringSubmatch(err.Error(), -1) {
				var cure string
				if _, err := fmt.Sscanf(m[1], "%q", &cure); err != nil {
					t.Errorf("%s %q: %v", what, odd, err)
				}
				if what == "period" && !strings.Contains(cure, " ") { // of one field
					fields := strings.Fields(odd)
					for i, f := range fields {
						for item := range strings.SplitSeq(f, ",") {
							if strings.Contains(err.Error(), fmt.Sprintf("%q runs backwards", item)) {
								fields[i] = strings.Replace(f, item, cure, 1)
							}
						}
					}
					cure = strings.Join(fields, " ")
				}
				cures++
				if got := c.parse(cure); got != nil {
					t.Errorf("%s %q: %v\nand its cure %q: %v", what, odd, err, cure, got)
				}
				if strings.ContainsAny(cure, "0123456789") && regexp.MustCompile(`[0-9]-[a-z]|[a-z]-[0-9]`).MatchString(cure) && what == "period" &&
					!regexp.MustCompile(`(?i)[0-9]-[a-z]|[a-z]-[0-9]`).MatchString(odd) {
					t.Errorf("period %q: the cure %q mixes names and numbers", odd, cure)
				}
			}
		}
		if cures == 0 {
			t.Errorf("%s: no message had a cure", what)
		}
	}
}

// TestBackwardsWeek: the cure of a range of days that runs backwards means the days that were meant.
func TestBackwardsWeek(t *testing.T) {
	day := cronFields[4]
	names := []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat", "sun"}
	for from := range 8 {
		for to := range 8 {
			for _, named := range []bool{false, true} {
				a, b := fmt.Sprint(from), fmt.Sprint(to)
				if named {
					a, b = names[from], names[to]
				}
				_, err := day.parse(a + "-" + b)
				if err == nil {
					continue
				}
				m := quotedCure.FindStringSubmatch(err.Error())
				if m == nil {
					t.Errorf("%s-%s: no cure in %v", a, b, err)
					continue
				}
				p, err := parsePeriod("* * * * " + strings.Trim(m[1], `"`))
				if err != nil {
					t.Errorf("%s-%s: %v", a, b, err)
					continue
				}
				var want uint64
				for d := from % 7; ; d = (d + 1) % 7 {
					want |= 1 << d
					if d == to%7 {
						break
					}
				}
				if p.weekdays != want {
					t.Errorf("%s-%s: the cure %s means %07b, and %07b was meant", a, b, m[1], p.weekdays, want)
				}
			}
		}
	}
}

func TestWithoutStop(t *testing.T) {
	for detail, want := range map[string]string{
		`cpus must be a number. Write, for example: cpus = 4.`:                            `cpus must be a number. Write, for example: cpus = 4`,
		`Write environment = ["FOO=bar"].`:                                                `Write environment = ["FOO=bar"]`,
		`Write, for example, subnet = "10.0.0.0/24".`:                                     `Write, for example, subnet = "10.0.0.0/24".`,
		`Write subnet = "10.7.0.0/26", or lower max_instances.`:                           `Write subnet = "10.7.0.0/26", or lower max_instances.`,
		`Write settings = { docker = { image = "x" } }.`:                                  `Write settings = { docker = { image = "x" } }`,
		`Choose another name.`:                                                            `Choose another name.`,
		`Write refresh = "24h", or "0s" to turn it off.`:                                  `Write refresh = "24h", or "0s" to turn it off.`,
		`Omit it, or write user = "gitlab" in the image block.`:                           `Omit it, or write user = "gitlab" in the image block.`,
		`"x" is not a URL: it must start with https://. Write, for example, "https://y".`: `"x" is not a URL: it must start with https://. Write, for example, "https://y".`,
	} {
		if got := withoutStop(detail); got != want {
			t.Errorf("%s\ngives %s", detail, got)
		}
	}
}
