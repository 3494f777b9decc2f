package guest

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// waitLogin waits until a user can log in: sshd greets, and pam_nologin admits users other than root (systemd removes
// /run/nologin late in the boot, perhaps after sshd has started).
func waitLogin(ctx context.Context, root string) error {
	addrs := sshAddresses(root)
	start := time.Now()
	var last error
	for {
		last = nil
		for _, f := range []string{"run/nologin", "etc/nologin"} {
			if _, err := os.Stat(filepath.Join(root, f)); err == nil {
				last = fmt.Errorf("/%s exists, so users cannot log in", f)
			}
		}
		if last == nil {
			if last = greets(ctx, addrs); last == nil {
				return nil
			}
		}
		// This wastes at most a twentieth of the wait, and does not slow down the boot of a slow machine with frequent checks.
		if !pause(ctx, min(max(time.Since(start)/20, 5*time.Millisecond), 200*time.Millisecond)) {
			return fmt.Errorf("nobody can log in yet: %w", last)
		}
	}
}

// greets looks for an SSH banner (RFC 4253, 4.2) at the addresses.
func greets(ctx context.Context, addrs []string) error {
	var last error
	for _, a := range addrs {
		d := net.Dialer{Timeout: 5 * time.Second}
		conn, err := d.DialContext(ctx, "tcp", a)
		if err != nil {
			last = err
			continue
		}
		err = conn.SetDeadline(time.Now().Add(30 * time.Second)) // an emulated sshd starts slowly
		if err == nil {
			var b []byte
			b, err = bufio.NewReaderSize(conn, 256).ReadSlice('\n')
			if err == nil && !strings.HasPrefix(string(b), "SSH-") {
				err = fmt.Errorf("%s says %q", a, b)
			}
		}
		conn.Close()
		if err == nil {
			return nil
		}
		last = fmt.Errorf("sshd at %s: %w", a, err)
	}
	return last
}

// sshAddresses returns where sshd is configured to listen, loopback first.
func sshAddresses(root string) []string {
	ports := sshdSetting(root, "port")
	if len(ports) == 0 {
		ports = []string{"22"}
	}
	var addrs []string
	for _, p := range ports {
		addrs = append(addrs, net.JoinHostPort("127.0.0.1", p))
	}
	for _, l := range sshdSetting(root, "listenaddress") {
		host, port, err := net.SplitHostPort(l)
		if err != nil {
			host, port = strings.Trim(l, "[]"), ports[0]
		}
		if ip := net.ParseIP(host); ip != nil && !ip.IsUnspecified() {
			addrs = append(addrs, net.JoinHostPort(host, port))
		}
	}
	return slices.Compact(addrs)
}

// sshdSetting returns the values of one keyword in sshd_config(5) and in the files that distributions include from
// it. It skips Match blocks, which hold no host-wide settings.
func sshdSetting(root, keyword string) []string {
	files, _ := filepath.Glob(filepath.Join(root, "etc/ssh/sshd_config.d/*.conf")) // the pattern is valid
	files = append(files, filepath.Join(root, "etc/ssh/sshd_config"))
	var values []string
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			continue // no sshd_config: the defaults apply
		}
		for l := range strings.Lines(string(data)) {
			w := strings.Fields(strings.Replace(l, "=", " ", 1))
			if len(w) > 0 && strings.EqualFold(w[0], "match") {
				break
			}
			if len(w) > 1 && strings.EqualFold(w[0], keyword) {
				values = append(values, strings.Trim(w[1], `"`))
			}
		}
	}
	return values
}
