package hostspec

import (
	"fmt"
	"math/bits"
	"slices"
	"sync"
	"time"
)

// What policies cover is computed minute by minute on the UTC time line of 28 years, after which dates and weekdays
// fall together again (no year of them is 2100). The years are fixed: the same spec has the same findings on every day.
const (
	firstYear   = 2025
	days        = 28*365 + 7
	dayMinutes  = 24 * 60
	lineMinutes = days * dayMinutes
)

var lineStart = time.Date(firstYear, 1, 1, 0, 0, 0, 0, time.UTC)

// maxPeriods is the most periods of one runner that are compared.
const maxPeriods = 100

// minuteSet has a bit for each minute of a day or of the time line.
type minuteSet []uint64

func newMinuteSet(minutes int) minuteSet { return make(minuteSet, (minutes+63)/64) }

func (s minuteSet) fill(from, to int) {
	for m := from; m < to; {
		if m%64 == 0 && m+64 <= to {
			s[m/64] = ^uint64(0)
			m += 64
			continue
		}
		s[m/64] |= 1 << (m % 64)
		m++
	}
}

func (s minuteSet) add(o minuteSet) {
	for i := range s {
		s[i] |= o[i]
	}
}

func (s minuteSet) within(o minuteSet) bool {
	for i := range s {
		if s[i]&^o[i] != 0 {
			return false
		}
	}
	return true
}

func (s minuteSet) empty() bool {
	return !slices.ContainsFunc(s, func(w uint64) bool { return w != 0 })
}

func (s minuteSet) count() int {
	n := 0
	for _, w := range s {
		n += bits.OnesCount64(w)
	}
	return n
}

func (s minuteSet) has(minute int) bool { return s[minute/64]&(1<<(minute%64)) != 0 }

// addDay adds the minutes of a day that begins at a minute of the line, as far as they lie between from and to.
func (s minuteSet) addDay(day minuteSet, start, from, to int) {
	if start >= from && start+dayMinutes <= to {
		at, shift := start/64, start%64
		for i, w := range day {
			s[at+i] |= w << shift
			if high := w >> (64 - shift); high != 0 { // in Go, a shift by 64 gives 0
				s[at+i+1] |= high
			}
		}
		return
	}
	for m := max(start, from); m < min(start+dayMinutes, to); m++ {
		if day.has(m - start) {
			s.fill(m, m+1)
		}
	}
}

// date is a day of the calendar as bits of a period's sets.
type date struct{ day, month, weekday uint64 }

// calendar has the line's days, and one before and after them: a local day begins up to a day earlier or later.
var calendar = sync.OnceValue(func() []date {
	all := make([]date, days+2)
	for i := range all {
		t := lineStart.AddDate(0, 0, i-1)
		all[i] = date{1 << t.Day(), 1 << t.Month(), 1 << t.Weekday()}
	}
	return all
})

// times are a policy's periods on the time line.
type times struct {
	always  bool
	periods []period
	zone    *time.Location // nil: not known
}

// matches reports whether a period has a date. If a period restricts both day fields, crontab(5) wants one of
// them to match; other readers want both, which is what strict means.
func (p period) matches(d date, strict bool) bool {
	day, weekday := p.days&d.day != 0, p.weekdays&d.weekday != 0
	if p.anyDay || p.anyWeekday || strict {
		return p.months&d.month != 0 && day && weekday
	}
	return p.months&d.month != 0 && (day || weekday)
}

// sure reports whether both readings of the day fields are the same, and the zone is known.
func (t times) sure() bool {
	return t.always || t.zone != nil && !slices.ContainsFunc(t.periods, func(p period) bool { return !p.anyDay && !p.anyWeekday })
}

// line is the minutes at which a policy applies: all that might be, or with strict only those that are certain.
func (t times) line(strict bool) minuteSet {
	line := newMinuteSet(lineMinutes)
	if t.always || t.zone == nil && !strict {
		line.fill(0, lineMinutes)
	}
	if t.always || t.zone == nil {
		return line
	}
	masks := make([]minuteSet, len(t.periods))
	for i, p := range t.periods {
		masks[i] = newMinuteSet(dayMinutes)
		for m := range dayMinutes {
			if p.hours&(1<<(m/60)) != 0 && p.minutes&(1<<(m%60)) != 0 {
				masks[i].fill(m, m+1)
			}
		}
	}
	local, dates := newMinuteSet(dayMinutes), calendar()
	stretch := func(from, to, offset int) { // in minutes of the line; the zone is that far ahead of UTC
		for d := floorDay(from + offset); d <= floorDay(to-1+offset); d++ {
			clear(local)
			for i, p := range t.periods {
				if p.matches(dates[d+1], strict) {
					local.add(masks[i])
				}
			}
			line.addDay(local, d*dayMinutes-offset, from, to)
		}
	}
	offset := func(minute int) int {
		_, seconds := lineStart.Add(time.Duration(minute) * time.Minute).In(t.zone).Zone()
		return seconds / 60
	}
	// Clocks change at whole quarters of an hour, and not twice a day.
	const quarter = 15
	since, now := 0, offset(0)
	for at := 0; at < lineMinutes; at += dayMinutes {
		if offset(at+dayMinutes) == now {
			continue
		}
		change := at
		for offset(change) == now {
			change += quarter
		}
		stretch(since, change, now)
		since, now = change, offset(change)
	}
	stretch(since, lineMinutes, now)
	return line
}

// floorDay is the number of the line's day that a minute is in: -1 for the day before.
func floorDay(minute int) int { return (minute+dayMinutes)/dayMinutes - 1 }

// policyTimes are the times of a runner's policies, or nil if they are not all valid.
func (l *loader) policyTimes(r *Runner) []times {
	all := make([]times, len(r.Policies))
	n := 0
	for i, p := range r.Policies {
		if l.given(p, "periods") && (!l.ok(p, "periods") || len(p.Periods) == 0) || l.given(p, "timezone") && !l.ok(p, "timezone") {
			return nil
		}
		zone, err := time.LoadLocation(p.Timezone)
		if err != nil {
			return nil
		}
		all[i] = times{zone: zone, always: len(p.Periods) == 0}
		if n += len(p.Periods); n > maxPeriods {
			return nil
		}
		for _, text := range p.Periods {
			period, err := parsePeriod(text)
			if err != nil {
				return nil
			}
			all[i].periods = append(all[i].periods, period)
			all[i].always = all[i].always || period.always()
		}
	}
	// Without a timezone it is the host's, which is not known here. Alone it is as good as any.
	zones := map[string]bool{}
	for i, p := range r.Policies {
		if !all[i].always {
			zones[p.Timezone] = true
		}
	}
	if len(zones) > 1 {
		for i, p := range r.Policies {
			if p.Timezone == "" {
				all[i].zone = nil
			}
		}
	}
	return all
}

func (p period) always() bool {
	return bits.OnesCount64(p.minutes) == 60 && bits.OnesCount64(p.hours) == 24 && bits.OnesCount64(p.months) == 12 &&
		bits.OnesCount64(p.days) == 31 && bits.OnesCount64(p.weekdays) == 7
}

// checkCoverage warns of policies that never apply, since GitLab Runner takes the last one that matches, and of times
// that have none.
func (l *loader) checkCoverage(r *Runner) {
	all := l.policyTimes(r)
	if len(all) == 0 || len(all) == 1 && all[0].always {
		return
	}
	later := newMinuteSet(lineMinutes) // certainly covered by the policies after this one
	any := newMinuteSet(lineMinutes)   // perhaps covered by some policy
	for i := len(all) - 1; i >= 0; i-- {
		line := all[i].line(false)
		any.add(line)
		switch p := r.Policies[i]; {
		case line.empty():
			l.warnf(l.at(p, "periods"), "Policy without effect", "No date matches these periods, so this policy never applies.")
		case line.within(later):
			l.warnf(&p.Range, "Policy without effect", "This policy never applies: GitLab Runner takes the last policy that matches, and %s. "+
				"Write the policy for the longest times first and exceptions after it, or remove this one.", coveredBy(r, all, i, line))
		}
		if !all[i].sure() {
			line = all[i].line(true)
		}
		later.add(line)
	}
	if gap := lineMinutes - any.count(); gap > 0 {
		l.warnf(l.at(r.Policies[0], "periods"), "Times without a policy", "No policy of runner %q applies %s. GitLab Runner then uses its own default, which keeps "+
			"no idle worker. If that is meant, say so with a policy without periods as the first one: policy { idle_count = 0 }", r.Name, gapText(r, all, any, gap))
	}
}

// coveredBy names the later policy that covers the i-th, or all of them.
func coveredBy(r *Runner, all []times, i int, line minuteSet) string {
	for j := i + 1; j < len(all); j++ {
		if line.within(all[j].line(true)) {
			return fmt.Sprintf("the one at %s:%d matches whenever this one does", r.Policies[j].Range.Filename, r.Policies[j].Range.Start.Line)
		}
	}
	return "the later ones together match whenever this one does"
}

// gapText says how long no policy applies, with an example.
func gapText(r *Runner, all []times, any minuteSet, gap int) string {
	// The first gap that the line shows from its beginning, or the one that it begins with.
	from := 0
	for m := 1; m < lineMinutes; m++ {
		if any.has(m-1) && !any.has(m) {
			from = m
			break
		}
	}
	to := from
	for to < lineMinutes && !any.has(to) {
		to++
	}
	zone, name := time.UTC, "the host's time zone"
	for i, p := range r.Policies {
		if !all[i].always && all[i].zone != nil {
			if zone = all[i].zone; p.Timezone != "" {
				name = p.Timezone
			}
			break
		}
	}
	layout, often := "Monday 15:04", fmt.Sprintf("for some %d of 168 hours a week, such as", gap*168/lineMinutes)
	if gap*168 < lineMinutes {
		layout, often = "2006-01-02 15:04", "now and then, such as"
	}
	at := func(minute int) string {
		return lineStart.Add(time.Duration(minute) * time.Minute).In(zone).Format(layout)
	}
	return fmt.Sprintf("%s from %s to %s (%s)", often, at(from), at(to), name)
}
