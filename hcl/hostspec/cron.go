package hostspec

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/suggest"
)

// cronField is one field of a period: its bounds, and names for its numbers.
type cronField struct {
	name        string
	least, most int
	names       []string // the first is for first
	first       int
}

// Days of the week are numbered 1 to 7 or mon to sun; 0 is Sunday too
// (https://docs.gitlab.com/runner/configuration/advanced-configuration/#periods-syntax).
var cronFields = []cronField{
	{name: "minute", most: 59},
	{name: "hour", most: 23},
	{name: "day of the month", least: 1, most: 31},
	{name: "month", least: 1, most: 12, first: 1,
		names: []string{"jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"}},
	{name: "day of the week", most: 7, first: 1, names: []string{"mon", "tue", "wed", "thu", "fri", "sat", "sun"}},
}

// period is a period as sets: bit n is for number n. Sunday is bit 0.
type period struct {
	minutes, hours, days, months, weekdays uint64
	anyDay, anyWeekday                     bool // the field has a *
}

// parsePeriod reads a period as GitLab Runner takes it: the five fields of
// crontab(5), with lists, ranges, steps and names.
func parsePeriod(text string) (period, error) {
	fields := strings.Fields(text)
	if strings.HasPrefix(text, "@") {
		return period{}, errors.New(`a period is five fields, not an @word: write "* 8-18 * * mon-fri", for example`)
	}
	if len(fields) != len(cronFields) {
		return period{}, fmt.Errorf("a period has 5 fields (minute, hour, day of the month, month, day of the week); this has %d: "+
			`write "* 8-18 * * mon-fri", for example`, len(fields))
	}
	var sets [5]uint64
	var stars [5]bool
	for i, f := range cronFields {
		for _, item := range strings.Split(fields[i], ",") {
			set, err := f.parse(item)
			if err != nil {
				return period{}, err
			}
			sets[i] |= set
			stars[i] = stars[i] || item == "*"
		}
	}
	const sunday = 1<<0 | 1<<7
	if sets[4]&sunday != 0 {
		sets[4] = sets[4]&^sunday | 1<<0
	}
	return period{minutes: sets[0], hours: sets[1], days: sets[2], months: sets[3], weekdays: sets[4], anyDay: stars[2], anyWeekday: stars[4]}, nil
}

func (f cronField) parse(item string) (uint64, error) {
	span, step, stepped := strings.Cut(item, "/")
	every := 1
	if stepped {
		n, err := strconv.Atoi(step)
		if err != nil || n < 1 || n > f.most {
			return 0, fmt.Errorf("the step %s of the %s must be a number from 1 to %d", quote(step), f.name, f.most)
		}
		every = n
	}
	first, last := f.least, f.most
	if span != "*" {
		from, to, ranged := strings.Cut(span, "-")
		var err error
		if first, err = f.number(from); err != nil {
			return 0, err
		}
		switch {
		case ranged:
			if last, err = f.number(to); err != nil {
				return 0, err
			}
			if last < first {
				return 0, fmt.Errorf("the %s %s runs backwards: write %q", f.name, quote(item), f.forwards(from, to, strings.TrimPrefix(item, span)))
			}
		case !stepped:
			last = first
		}
	}
	var set uint64
	for n := first; n <= last; n += every {
		set |= 1 << n
	}
	return set, nil
}

// forwards is a range that runs backwards as two that do not.
func (f cronField) forwards(from, to, step string) string {
	top, bottom := strconv.Itoa(f.most), strconv.Itoa(f.least)
	if f.names != nil {
		bottom = strconv.Itoa(f.first)
		if _, err := strconv.Atoi(from); err != nil {
			top, bottom = f.names[len(f.names)-1], f.names[0]
		}
	}
	end := func(s string) int {
		n, _ := f.number(s) // read before
		return n
	}
	part := func(from, to string) string {
		if end(from) == end(to) {
			return from
		}
		return from + "-" + to + step
	}
	if f.first+len(f.names)-1 == f.most && end(to) < f.first { // a week that ends with 0
		return part(from, top)
	}
	return part(from, top) + "," + part(bottom, to)
}

func (f cronField) number(s string) (int, error) {
	for i, name := range f.names {
		if strings.EqualFold(s, name) {
			return f.first + i, nil
		}
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < f.least || n > f.most || strings.HasPrefix(s, "+") {
		names := ""
		if f.names != nil {
			names = fmt.Sprintf(" or a name from %s to %s", f.names[0], f.names[len(f.names)-1])
		}
		return 0, fmt.Errorf("the %s %s must be a number from %d to %d%s%s", f.name, quote(s), f.least, f.most, names, suggest.DidYouMean(strings.ToLower(s), f.names))
	}
	return n, nil
}
