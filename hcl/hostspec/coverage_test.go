package hostspec

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// policiesOf is a runner whose policies are written as "ZONE: PERIOD; PERIOD": "" is a policy without periods.
func policiesOf(policies ...string) *Runner {
	r := &Runner{Name: "a"}
	for i, text := range policies {
		p := &Policy{}
		p.Range.Filename, p.Range.Start.Line = "host.hcl", i+1
		if zone, periods, ok := strings.Cut(text, ": "); ok {
			p.Timezone, p.Periods = zone, strings.Split(periods, "; ")
		}
		r.Policies = append(r.Policies, p)
	}
	return r
}

func TestCoverage(t *testing.T) {
	const (
		never = "This policy never applies"
		gap   = "No policy of runner"
	)
	work := "Europe/Berlin: * 8-18 * * mon-fri"
	for _, tt := range []struct {
		name     string
		policies []string
		want     []string // a part of each finding, in the order of the policies from the last
	}{
		{name: "none"},
		{name: "always", policies: []string{""}},
		{name: "exception last", policies: []string{"", work}},
		{name: "shadowed", policies: []string{work, ""}, want: []string{never + ": GitLab Runner takes the last policy that matches, and the one at host.hcl:2 matches"}},
		{name: "shadowed by stars", policies: []string{work, "UTC: * * * * *"}, want: []string{never}},
		{name: "shadowed by all written out", policies: []string{work, "UTC: 0-59 0-23 1-31 jan-dec mon-sun"}, want: []string{never}},
		{name: "shadowed by */1", policies: []string{work, "Asia/Tokyo: */1 */1 * * 0-6"}, want: []string{never}},
		{name: "twice the same", policies: []string{"", work, work}, want: []string{never + ": GitLab Runner takes the last policy that matches, and the one at host.hcl:3"}},
		{name: "inside a longer one", policies: []string{"", "UTC: * 9-11 * * tue", "UTC: * 8-18 * * mon-fri"}, want: []string{never}},
		{name: "inside two together", policies: []string{"", "UTC: * 8-18 * * *", "UTC: * 0-12 * * *", "UTC: * 13-23 * * *"},
			want: []string{never + ": GitLab Runner takes the last policy that matches, and the later ones together match", never}},
		{name: "one minute is left", policies: []string{"", "UTC: * 8-9 * * *", "UTC: * 8 * * *; 0-58 9 * * *"}},
		{name: "the same hours in another zone", policies: []string{"", "UTC: * 8 * * *", "Europe/Berlin: * 9-10 * * *"}, want: []string{never}},
		{name: "the same hours in winter only", policies: []string{"", "UTC: * 8 * * *", "Europe/Berlin: * 9 * * *"}},
		{name: "a zone of half hours", policies: []string{"", "UTC: 30-59 3 * * *", "Asia/Kolkata: * 9 * * *"}, want: []string{never}},
		{name: "across midnight", policies: []string{"", "Asia/Tokyo: * 0-8 * * mon", "UTC: * 15-23 * * sun"}, want: []string{never}},
		{name: "across the month's end", policies: []string{"", "Asia/Tokyo: * 0-8 1 * *", "UTC: * 15-23 28-31 * *"}, want: []string{never}},
		{name: "across the month's end, short months", policies: []string{"", "Asia/Tokyo: * 0-8 1 * *", "UTC: * 15-23 30-31 * *"}},
		{name: "the host's zone beside another", policies: []string{"", ": * 8 * * *", "UTC: * 0-22 * * *"}},
		{name: "the host's zone twice", policies: []string{"", ": * 8 * * *", ": * 0-22 * * *"}, want: []string{never}},
		{name: "the host's zone under all", policies: []string{": * 8 * * *", "UTC: * 9 * * *", ""}, want: []string{never, never}},
		{name: "february 30", policies: []string{"", "UTC: * * 30 2 *"}, want: []string{"No date matches"}},
		{name: "february 29", policies: []string{"", "UTC: * * 29 2 *"}},
		{name: "either day field, as crontab(5) reads it", policies: []string{"", "UTC: * * 13 * fri", "UTC: * * * * fri"}},
		{name: "both day fields, as others read it", policies: []string{"", "UTC: * * 1 * fri", "UTC: * * 1 * fri; * * * * fri; * * 1 * *"}, want: []string{never}},

		{name: "gap", policies: []string{work}, want: []string{gap + ` "a" applies for some 113 of 168 hours a week, such as from Wednesday 19:00 to Thursday 08:00 (Europe/Berlin).`}},
		{name: "weekend only", policies: []string{": * * * * sat-sun"}, want: []string{"for some 120 of 168 hours a week, such as from Monday 00:00 to Saturday 00:00 (the host's time zone)"}},
		{name: "night and day", policies: []string{"UTC: * 8-18 * * *", "UTC: * 0-7,19-23 * * *"}},
		{name: "a minute", policies: []string{"UTC: * 0-22 * * *; 0-58 23 * * *"}, want: []string{"such as from 2025-01-01 23:59 to 2025-01-02 00:00 (UTC)"}},
		{name: "summer time", policies: []string{"UTC: * 8-18 * * *", "Europe/Berlin: * 0-8,20-23 * * *"}, want: []string{gap}},
		{name: "leap days", policies: []string{"UTC: * * 1-28 2 *; * * 1-31 1,3-12 *"}, want: []string{"now and then, such as from 2028-02-29 00:00 to 2028-03-01 00:00"}},
		{name: "the host's zone may fill it", policies: []string{": * 8 * * *", "UTC: * 0-22 * * *"}},
		{name: "not readable", policies: []string{"UTC: * * *", ""}},
		{name: "shadow and gap", policies: []string{"UTC: * 9 * * *", "UTC: * 8-9 * * *"}, want: []string{never, gap}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := &loader{attrs: map[attrKey]attrInfo{}}
			l.checkCoverage(policiesOf(tt.policies...))
			var got []string
			for _, d := range l.diags {
				got = append(got, d.Detail)
			}
			if !slices.EqualFunc(got, tt.want, strings.Contains) {
				t.Errorf("found:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
		})
	}
}

// TestLine compares the time line with what a clock in the zone shows, at random minutes.
func TestLine(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	number := func(least, most int) string {
		switch n := least + rnd.IntN(most-least+1); rnd.IntN(5) {
		case 0:
			return "*"
		case 1:
			return fmt.Sprintf("%d-%d", n, n+rnd.IntN(most-n+1))
		case 2:
			return fmt.Sprintf("%d-%d/%d", least, n, 1+rnd.IntN(3))
		case 3:
			return fmt.Sprintf("%d,%d", n, least+rnd.IntN(most-least+1))
		default:
			return fmt.Sprintf("*/%d", 1+rnd.IntN(4))
		}
	}
	for _, zone := range []string{"UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe", "Pacific/Kiritimati", "Pacific/Pago_Pago", "Africa/Casablanca"} {
		loc, err := time.LoadLocation(zone)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Join([]string{number(0, 59), number(0, 23), number(1, 31), number(1, 12), number(0, 7)}, " ")
		p, err := parsePeriod(text)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		for _, strict := range []bool{false, true} {
			line := times{periods: []period{p}, zone: loc}.line(strict)
			for range 20_000 {
				minute := rnd.IntN(lineMinutes)
				at := lineStart.Add(time.Duration(minute) * time.Minute).In(loc)
				want := p.hours&(1<<at.Hour()) != 0 && p.minutes&(1<<at.Minute()) != 0 &&
					p.matches(date{1 << at.Day(), 1 << at.Month(), 1 << at.Weekday()}, strict)
				if line.has(minute) != want {
					t.Fatalf("%q in %s at %s: %v, want %v", text, zone, at, line.has(minute), want)
				}
			}
		}
	}
}

func BenchmarkCoverage(b *testing.B) {
	for b.Loop() {
		l := &loader{attrs: map[attrKey]attrInfo{}}
		l.checkCoverage(policiesOf("", "Europe/Berlin: * 8-18 * * mon-fri", "UTC: */2 * * * *"))
	}
}
