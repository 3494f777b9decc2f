package hostspec

import (
	"fmt"
	"slices"
	"strings"
	"time"
	_ "time/tzdata" // the same zones on every machine, also where none are installed
)

func (l *loader) validateRunners(s *spec) {
	var pools []string
	size := map[string]int{}
	for _, p := range s.pools {
		pools = append(pools, p.Name)
		size[p.Name] = p.MaxInstances
	}
	users := map[string]*Runner{}
	imageUser := map[string]string{} // of each pool
	for _, p := range s.pools {
		for _, i := range s.images {
			if i.Name == p.Image {
				imageUser[p.Name] = i.User
			}
		}
	}
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
			l.errorf(l.at(r, "pool"), "Pool used twice", "Pool %q is already used by the runner %q at %s. A runner uses all workers of its pool, "+
				"so give this runner a pool of its own.", r.Pool, first.Name, first.Range)
		} else {
			users[r.Pool] = r
		}
		l.checkConnector(r, imageUser[r.Pool])
		for _, p := range r.Policies {
			if most := size[r.Pool] * r.CapacityPerInstance; l.ok(p, "idle_count") && most > 0 && p.IdleCount > most {
				l.warnf(l.at(p, "idle_count"), "idle_count too high", "idle_count is %d, but pool %q has room for %d jobs.", p.IdleCount, r.Pool, most)
			}
		}
	}
}

func (l *loader) validateRunner(r *Runner) {
	l.checkURL(r, "url", r.URL)
	l.oneOf(r, "executor", r.Executor, "instance", "docker-autoscaler")
	l.inRange(r, "capacity_per_instance", r.CapacityPerInstance, 1, 1024, "")
	l.inRange(r, "max_use_count", r.MaxUseCount, 0, 1<<30, " 0 means no limit.")
	l.checkSettings(r)
	for _, p := range r.Policies {
		l.validatePolicy(p)
	}
	l.checkCoverage(r)
}

func (l *loader) validatePolicy(p *Policy) {
	if l.ok(p, "periods") && len(p.Periods) == 0 {
		l.errorf(l.at(p, "periods"), "Invalid periods", "An empty list matches no time. Omit periods for a policy that always applies.")
	}
	for i, period := range p.Periods {
		if _, err := parsePeriod(period); err != nil {
			l.errorf(l.atElem(p, "periods", i), "Invalid periods", "%s: %v.", quote(period), err)
		}
	}
	l.checkTimezone(p)
	l.inRange(p, "idle_count", p.IdleCount, 0, 1<<20, "")
	if l.ok(p, "scale_factor") && !(p.ScaleFactor >= 0 && p.ScaleFactor <= 1000) {
		l.errorf(l.at(p, "scale_factor"), "Invalid scale_factor", "scale_factor must be between 0 (off) and 1000; got %g.", p.ScaleFactor)
	}
	l.inRange(p, "scale_factor_limit", p.ScaleFactorLimit, 0, 1<<20, " 0 means no limit.")
}

func (l *loader) checkTimezone(p *Policy) {
	if !l.ok(p, "timezone") {
		return
	}
	_, err := time.LoadLocation(p.Timezone)
	if err == nil && p.Timezone != "" && p.Timezone != "Local" {
		return
	}
	cure := `Write a name from the IANA list, such as "Europe/Berlin" or "UTC"; omit it for the host's own`
	if s := titleZone(p.Timezone); s != p.Timezone {
		if _, err := time.LoadLocation(s); err == nil {
			cure = fmt.Sprintf("Did you mean %q", s)
		}
	}
	l.errorf(l.at(p, "timezone"), "Invalid timezone", "%s is not a time zone. %s.", quote(p.Timezone), cure)
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
