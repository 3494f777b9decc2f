package hostspec

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"time"
)

var sizeUnits = map[string]int64{"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}

var number = regexp.MustCompile(`^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z%]*)\s*$`)

// parseSize reads "8GiB" as bytes. Only binary units are taken: 8GB is 7 % less than
// what most who write it want.
func parseSize(s string) (int64, error) {
	m := number.FindStringSubmatch(s)
	if m == nil {
		return 0, errors.New(`a size is a whole number and a unit, such as "8GiB" or "512MiB"`)
	}
	num, unit := m[1], m[2]
	mult, ok := sizeUnits[unit]
	switch {
	case !ok && unit == "":
		return 0, fmt.Errorf("the unit is missing: write %q or %q", num+"GiB", num+"MiB")
	case !ok:
		return 0, fmt.Errorf("the units are KiB, MiB, GiB and TiB (powers of 1024): write %q", num+guessSizeUnit(unit))
	case s != num+unit:
		return 0, fmt.Errorf("a size has no space before its unit: write %q", num+unit)
	case strings.Contains(num, "."):
		return 0, fmt.Errorf("a size is a whole number: write %s", wholeSize(num, unit))
	}
	n, err := strconv.ParseInt(num, 10, 64)
	if err != nil || n > math.MaxInt64/mult {
		return 0, errors.New("the number is too large")
	}
	return n * mult, nil
}

func guessSizeUnit(unit string) string {
	switch strings.ToUpper(unit[:1]) {
	case "K":
		return "KiB"
	case "M":
		return "MiB"
	case "T":
		return "TiB"
	default:
		return "GiB"
	}
}

// wholeSize is "1.5GiB" as "1536MiB", where the next smaller unit makes it whole.
func wholeSize(num, unit string) string {
	smaller := map[string]string{"TiB": "GiB", "GiB": "MiB", "MiB": "KiB"}[unit]
	f, err := strconv.ParseFloat(num, 64)
	if err != nil || smaller == "" || f > 1e6 {
		return `"8GiB", for example`
	}
	return fmt.Sprintf("%q", strconv.FormatInt(int64(math.Round(f*1024)), 10)+smaller)
}

// parseDuration reads "30m", "24h" or "1h30m"; "0s" is zero.
func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err == nil && d >= 0 && (d == 0) == (s == "0s" || isZeroDuration(s)) && s != "0" {
		return d, nil
	}
	m := number.FindStringSubmatch(s)
	switch {
	case err == nil && d < 0:
		return 0, errors.New("a duration cannot be negative")
	case m == nil:
		return 0, errors.New(`a duration is numbers with units, such as "30s", "5m", "24h" or "1h30m"`)
	case m[2] == "":
		return 0, fmt.Errorf("the unit is missing: write %q or %q", m[1]+"s", m[1]+"m")
	}
	return 0, fmt.Errorf("the units are s, m and h: write %s", guessDuration(m[1], m[2]))
}

func isZeroDuration(s string) bool { return strings.Trim(s, "0hmsnuµ.") == "" && s != "0" }

func guessDuration(num, unit string) string {
	hours := map[byte]int64{'d': 24, 'D': 24, 'w': 168, 'W': 168}
	if h := hours[unit[0]]; h != 0 {
		if n, err := strconv.ParseInt(num, 10, 32); err == nil {
			return fmt.Sprintf("\"%dh\"", n*h)
		}
	}
	switch unit[0] {
	case 'h', 'H':
		return fmt.Sprintf("%q", num+"h")
	case 'm', 'M':
		return fmt.Sprintf("%q", num+"m")
	case 's', 'S':
		return fmt.Sprintf("%q", num+"s")
	}
	return `"30m", for example`
}

// parsePercent reads "400%" as 400.
func parsePercent(s string) (int, error) {
	num, ok := strings.CutSuffix(s, "%")
	n, err := strconv.Atoi(num)
	switch {
	case !ok && err == nil && n > 0 && n <= 64:
		return 0, fmt.Errorf("the %% sign is missing: write %q for %d CPUs", strconv.Itoa(n*100)+"%", n)
	case !ok && err == nil:
		return 0, fmt.Errorf("the %% sign is missing: write %q", num+"%")
	case err != nil || n < 0 || strings.HasPrefix(num, "+"):
		return 0, errors.New(`a quota is a whole number of percent, 100% being one CPU: write "400%" for four CPUs`)
	}
	return n, nil
}

// parsePrefix reads "10.0.0.0/24". Bits after the prefix are refused: 10.0.0.15/24
// is either a typo or meant as one address.
func parsePrefix(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.Prefix{}, fmt.Errorf("the prefix length is missing: write %q for this one address", fmt.Sprintf("%s/%d", a.WithZone(""), a.BitLen()))
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		if host, _, _ := strings.Cut(s, "/"); hostSyntax.MatchString(strings.ToLower(host)) && strings.ContainsFunc(host, isLetter) {
			return netip.Prefix{}, errors.New(`egress rules match addresses and do not resolve names: write the name's addresses, such as "203.0.113.7/32"`)
		}
		return netip.Prefix{}, errors.New(`a network is written as "10.0.0.0/24" or "fd00::/64"`)
	case p.Addr().Is4In6():
		return netip.Prefix{}, errors.New("an IPv4 network is written without ::ffff:")
	case p != p.Masked():
		return netip.Prefix{}, fmt.Errorf("%s lies within %s: write %q for the network, or %q for the one address",
			p.Addr(), p.Masked(), p.Masked(), fmt.Sprintf("%s/%d", p.Addr(), p.Addr().BitLen()))
	}
	return p, nil
}

var portSyntax = regexp.MustCompile(`^([a-z]+)/([0-9]{1,5})(?:-([0-9]{1,5}))?$`)

func isLetter(r rune) bool { return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' }

// parsePorts reads "tcp/443" or "udp/5000-5010".
func parsePorts(s string) (PortRange, error) {
	m := portSyntax.FindStringSubmatch(s)
	if m == nil {
		return PortRange{}, fmt.Errorf(`a port is written as "tcp/443", a range as "tcp/9000-9001"%s`, guessPort(s))
	}
	if m[1] != "tcp" && m[1] != "udp" {
		return PortRange{}, fmt.Errorf("ports are tcp or udp, not %s: write %q, or omit ports for every protocol", m[1], "tcp/"+m[2])
	}
	first, _ := strconv.Atoi(m[2])
	last := first
	if m[3] != "" {
		last, _ = strconv.Atoi(m[3])
	}
	switch {
	case first < 1 || last > 65535 || first > 65535:
		return PortRange{}, errors.New("port numbers go from 1 to 65535")
	case last < first:
		return PortRange{}, fmt.Errorf("the range runs backwards: write \"%s/%d-%d\"", m[1], last, first)
	}
	return PortRange{Protocol: m[1], First: uint16(first), Last: uint16(last)}, nil
}

// services are names that people write for ports.
var services = map[string]string{
	"dns": "udp/53", "domain": "udp/53", "ftp": "tcp/21", "git": "tcp/9418", "http": "tcp/80", "https": "tcp/443", "ldap": "tcp/389", "ldaps": "tcp/636",
	"ntp": "udp/123", "smtp": "tcp/25", "ssh": "tcp/22",
}

// guessPort is what 443, 443/tcp, tcp:443, https or tcp/80,443 was meant to be.
func guessPort(s string) string {
	s = strings.ToLower(s)
	if port := services[s]; port != "" {
		return fmt.Sprintf(": write %q", port)
	}
	if strings.HasPrefix(s, "icmp") {
		return ": ICMP has none. Omit ports for every protocol"
	}
	proto := "tcp"
	var ports []string
	for _, f := range strings.FieldsFunc(s, func(r rune) bool { return strings.ContainsRune("/:, ", r) }) {
		switch {
		case f == "tcp" || f == "udp":
			proto = f
		case strings.Trim(f, "0123456789-") == "":
			ports = append(ports, f)
		default:
			return ""
		}
	}
	for i, port := range ports {
		if ports[i] = fmt.Sprintf("%q", proto+"/"+port); !portSyntax.MatchString(proto + "/" + port) {
			return ""
		}
	}
	if len(ports) == 0 {
		return ""
	}
	return ": write " + strings.Join(ports, ", ")
}

// formatSize is bytes as they are written in a spec.
func formatSize(n int64) string {
	for _, unit := range []string{"TiB", "GiB", "MiB", "KiB"} {
		if m := sizeUnits[unit]; n >= m && n%m == 0 {
			return strconv.FormatInt(n/m, 10) + unit
		}
	}
	return strconv.FormatInt(n, 10) + " bytes"
}
