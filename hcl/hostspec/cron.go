package hostspec

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// cronField is one field of a period: its bounds, and names for its numbers.
type cronField struct {
	name        string
	least, most int
	names       []string // the first is for least
}

var cronFields = []cronField{
	{"minute", 0, 59, nil},
	{"hour", 0, 23, nil},
	{"day of the month", 1, 31, nil},
	{"month", 1, 12, []string{"jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"}},
	{"day of the week", 0, 7, []string{"sun", "mon", "tue", "wed", "thu", "fri", "sat"}},
}

// checkPeriod checks a period as GitLab Runner takes it: the five fields of
// crontab(5), with lists, ranges, steps and names.
func checkPeriod(period string) error {
	fields := strings.Fields(period)
	if strings.HasPrefix(period, "@") {
		return errors.New(`a period is five fields, not an @word: write "* 8-18 * * mon-fri", for example`)
	}
	if len(fields) != len(cronFields) {
		return fmt.Errorf("a period has the 5 fields minute, hour, day of the month, month and day of the week, and this has %d: "+
			`write "* 8-18 * * mon-fri", for example`, len(fields))
	}
	for i, f := range cronFields {
		for _, item := range strings.Split(fields[i], ",") {
			if err := f.check(item); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f cronField) check(item string) error {
	span, step, stepped := strings.Cut(item, "/")
	if stepped {
		if n, err := strconv.Atoi(step); err != nil || n < 1 || n > f.most {
			return fmt.Errorf("the step %s of the %s is no number from 1 to %d", quote(step), f.name, f.most)
		}
	}
	if span == "*" {
		return nil
	}
	from, to, ranged := strings.Cut(span, "-")
	first, err := f.number(from)
	if err != nil || !ranged {
		return err
	}
	last, err := f.number(to)
	if err != nil {
		return err
	}
	if last < first {
		return fmt.Errorf("the %s %s runs backwards: write it as two, such as \"%s-%d,%d-%s\"", f.name, span, from, f.most, f.least, to)
	}
	return nil
}

func (f cronField) number(s string) (int, error) {
	for i, name := range f.names {
		if strings.EqualFold(s, name) {
			return f.least + i, nil
		}
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < f.least || n > f.most || strings.HasPrefix(s, "+") {
		names := ""
		if f.names != nil {
			names = fmt.Sprintf(" or a name from %s to %s", f.names[0], f.names[len(f.names)-1])
		}
		return 0, fmt.Errorf("the %s %s is no number from %d to %d%s%s", f.name, quote(s), f.least, f.most, names, didYouMean(strings.ToLower(s), f.names))
	}
	return n, nil
}
