package hostspec

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"1KiB": 1 << 10, "512MiB": 512 << 20, "8GiB": 8 << 30, "2TiB": 2 << 40, "0GiB": 0} {
		if n, err := parseSize(s); err != nil || n != want {
			t.Errorf("%q is %d, %v", s, n, err)
		}
	}
	for s, want := range map[string]string{
		"8": `"8GiB"`, "8GB": `"8GiB"`, "8g": `"8GiB"`, "8 GiB": `"8GiB"`, "512M": `"512MiB"`, "4kb": `"4KiB"`, "1TB": `"1TiB"`,
		"1.5GiB": `"1536MiB"`, "": "such as", "GiB": "such as", "-1GiB": "such as", "9000000TiB": "", "9999999TiB": "too large",
	} {
		n, err := parseSize(s)
		if want == "" {
			continue
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is %d, %v; want %s", s, n, err, want)
		}
	}
}

func TestParseDuration(t *testing.T) {
	for s, want := range map[string]time.Duration{"0s": 0, "0m": 0, "30m": 30 * time.Minute, "1h30m": 90 * time.Minute, "100ms": 100 * time.Millisecond} {
		if d, err := parseDuration(s); err != nil || d != want {
			t.Errorf("%q is %v, %v", s, d, err)
		}
	}
	for s, want := range map[string]string{
		"": "such as", "0": `"0s"`, "30": `"30s" or "30m"`, "1d": `"24h"`, "2 w": `"336h"`, "5min": `"5m"`, "10 sec": `"10s"`,
		"1hour": `"1h"`, "-1s": "negative", "1x": `"30m"`,
	} {
		if d, err := parseDuration(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is %v, %v; want %s", s, d, err, want)
		}
	}
}

func TestParsePercent(t *testing.T) {
	if n, err := parsePercent("400%"); err != nil || n != 400 {
		t.Error(n, err)
	}
	for s, want := range map[string]string{"4": `"400%" for 4 CPUs`, "400": `"400%"`, "4.5%": "whole number", "": "whole number", "-1%": "whole number", "+1%": "whole number"} {
		if n, err := parsePercent(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is %d, %v; want %s", s, n, err, want)
		}
	}
}

func TestPeriods(t *testing.T) {
	for _, s := range []string{"* * * * *", "*/5 8-18 * * mon-fri", "0,30 0-23/2 1-31 JAN-dec 0-7", "59 23 31 12 sun", "* * * * sat-sun", "* * * * 5-7",
		"* * * * mon-sun", "* * * * 0-6"} {
		if _, err := parsePeriod(s); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{"", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8", "*/0 * * * *",
		"1- * * * *", "-1 * * * *", "a * * * *", "* * * * mon-", ", * * * *", "+1 * * * *", "@hourly"} {
		if _, err := parsePeriod(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
}

// TestBackwards: a range that runs backwards is an error that says how to write it, and what it says is taken.
func TestBackwards(t *testing.T) {
	for s, want := range map[string]string{
		"* 18-8 * * *":        "18-23,0-8",
		"* 22-0 * * *":        "22-23,0",
		"50-10/5 * * * *":     "50-59/5,0-10/5",
		"59-1 * * * *":        "59,0-1",
		"* * 25-5 * *":        "25-31,1-5",
		"* * * nov-feb *":     "nov-dec,jan-feb",
		"* * * dec-jan *":     "dec,jan",
		"* * * 11-2 *":        "11-12,1-2",
		"* * * * fri-mon":     "fri-sun,mon",
		"* * * * sun-thu":     "sun,mon-thu",
		"* * * * 6-2":         "6-7,1-2",
		"* * * * 6-0":         "6-7",
		"* * * * fri-0":       "fri-sun",
		"* * * * mon,sat-tue": "sat-sun,mon-tue",
	} {
		_, err := parsePeriod(s)
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("write %q", want)) {
			t.Errorf("%q: %v, want %s", s, err, want)
		}
		fields := strings.Fields(s)
		for i, f := range fields {
			if strings.Contains(f, "-") {
				fields[i] = want
			}
		}
		if _, err := parsePeriod(strings.Join(fields, " ")); err != nil {
			t.Errorf("%q: what was to be written is refused: %v", s, err)
		}
	}
}
