package hostspec

import (
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
	for _, s := range []string{"* * * * *", "*/5 8-18 * * mon-fri", "0,30 0-23/2 1-31 JAN-dec 0-7", "59 23 31 12 sun"} {
		if err := checkPeriod(s); err != nil {
			t.Errorf("%q: %v", s, err)
		}
	}
	for _, s := range []string{"", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 8", "*/0 * * * *",
		"1- * * * *", "-1 * * * *", "a * * * *", "* * * * mon-", ", * * * *", "+1 * * * *", "@hourly"} {
		if err := checkPeriod(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
}
