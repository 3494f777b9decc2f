package hostlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// ErrConnection is wrapped by Run's error if the connection closed before the command ended: the host is off, or
// rebooting.
var ErrConnection = errors.New("the connection to the host was lost")

// control is the socket of the shared SSH connection, relative to Dir: a cache folder may be too deep for
// sun_path's 108 bytes.
const control = "ssh"

// connect opens the connection that all commands share.
func (l *Lab) connect(ctx context.Context) error {
	l.disconnect()
	var said bytes.Buffer
	cmd := l.ssh("-o", "ControlMaster=yes", "-N", "root@hostlab")
	cmd.Stdout, cmd.Stderr = &said, &said
	p, err := spawn(cmd)
	if err != nil {
		return fmt.Errorf("hostlab: start ssh (packaging/deps.sh installs it): %w", err)
	}
	l.mu.Lock()
	l.master = p
	l.mu.Unlock()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := os.Stat(filepath.Join(l.Dir, control)); err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("hostlab: ssh to the host: %w: %s", p.err, strings.TrimSpace(said.String()))
		case <-ctx.Done():
			l.disconnect()
			return fmt.Errorf("hostlab: ssh to the host: %w: %s", ctx.Err(), strings.TrimSpace(said.String()))
		case <-tick.C:
		}
	}
}

func (l *Lab) disconnect() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.master != nil {
		l.master.kill()
		l.master = nil
	}
	// A killed master leaves its socket behind, and the next one would refuse to listen there.
	os.Remove(filepath.Join(l.Dir, control))
}

// connected reports whether the shared connection is up.
func (l *Lab) connected() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.master != nil && l.master.running()
}

// ssh returns the client with options that make it non-interactive and ignore all configuration.
func (l *Lab) ssh(args ...string) *exec.Cmd {
	cmd := exec.Command("ssh", append([]string{
		"-F", "none", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR",
		"-o", "HostName=127.0.0.1", "-o", fmt.Sprintf("Port=%d", l.port), "-o", "HostKeyAlias=hostlab",
		"-o", "IdentityFile=" + l.base.path("id_ed25519"), "-o", "IdentitiesOnly=yes",
		"-o", "UserKnownHostsFile=" + l.base.path("known_hosts"), "-o", "StrictHostKeyChecking=yes",
		// AES is a helper call to the emulator, but ChaCha is emulated instruction by instruction.
		"-o", "Ciphers=aes128-ctr", "-o", "MACs=umac-64@openssh.com",
		// A host whose power was cut sends no FIN.
		"-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=12",
		"-o", "ControlPath=" + control,
	}, args...)...)
	cmd.Dir = l.Dir
	return cmd
}

// Result is the outcome of a command.
type Result struct {
	Stdout, Stderr string
	ExitCode       int
}

// Cmd returns a command to run as root in the lab, not yet started, for callers that stream its input or output. The
// arguments reach the program unchanged. Its exit code is the program's; 255 can also be a lost connection. Killing
// it only kills the local end.
func (l *Lab) Cmd(argv ...string) *exec.Cmd {
	quoted := make([]string, len(argv))
	for i, a := range argv {
		quoted[i] = quote(a)
	}
	cmd := l.ssh("-o", "ControlMaster=no", "root@hostlab", "--", strings.Join(quoted, " "))
	// The shared connection also holds the pipes: without this, Wait of a killed cmd would wait for the remote program.
	cmd.WaitDelay = 2 * time.Second
	return cmd
}

// quote quotes an argument for the account's shell, to which sshd passes the line.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// Run runs a command as root to its end. A failed command is a Result; an error means that the command could not be run
// or its outcome is unknown (ErrConnection, or ctx's error).
func (l *Lab) Run(ctx context.Context, argv ...string) (Result, error) {
	var stdout, stderr bytes.Buffer
	cmd := l.Cmd(argv...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	code, err := l.wait(ctx, cmd)
	return Result{stdout.String(), stderr.String(), code}, err
}

// Sh runs a shell script as root, with -eu, and returns its output. A failed script is an error, which includes
// the exit code and the end of the output.
func (l *Lab) Sh(ctx context.Context, script string) (string, error) {
	r, err := l.Run(ctx, "sh", "-euc", script)
	if err == nil && r.ExitCode != 0 {
		err = fmt.Errorf("hostlab: exit code %d from: %s\n%s%s", r.ExitCode, script, tail(r.Stdout, 30), tail(r.Stderr, 30))
	}
	return strings.TrimSuffix(r.Stdout, "\n"), err
}

// wait runs cmd, and distinguishes exit code 255 of the program from a lost connection, for which ssh exits with 255, too.
func (l *Lab) wait(ctx context.Context, cmd *exec.Cmd) (int, error) {
	if !l.connected() {
		return -1, fmt.Errorf("hostlab: %w: the host is off, or was rebooted by other means than Reboot", ErrConnection)
	}
	if err := cmd.Start(); err != nil {
		return -1, fmt.Errorf("hostlab: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	err := cmd.Wait()
	stop()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case ctx.Err() != nil:
		return -1, fmt.Errorf("hostlab: %w", ctx.Err())
	case !errors.As(err, &exit) || exit.ExitCode() < 0:
		return -1, fmt.Errorf("hostlab: ssh: %w", err)
	case exit.ExitCode() == 255 && l.ssh("-O", "check", "root@hostlab").Run() != nil:
		return -1, fmt.Errorf("hostlab: %w", ErrConnection)
	}
	return exit.ExitCode(), nil
}

// Copy copies a local file or folder into the lab, with its modes and holes, owned by root. A file replaces remote
// atomically; a folder's content is added to remote. Missing parents are created.
func (l *Lab) Copy(ctx context.Context, local, remote string) error {
	st, err := os.Stat(local)
	if err != nil {
		return fmt.Errorf("hostlab: copy: %w", err)
	}
	// tar preserves the holes of a sparse disk image; SFTP does not.
	pack := []string{"--create", "--sparse", "--numeric-owner", "--owner=0", "--group=0"}
	unpack := `mkdir -p "$1" && exec tar -C "$1" -xf - --no-overwrite-dir`
	if st.IsDir() {
		pack = append(pack, "--directory="+local, ".")
	} else {
		pack = append(pack, "--dereference", "--directory="+filepath.Dir(local), "--", filepath.Base(local))
		unpack = `dir=$(dirname "$1") && mkdir -p "$dir" && new=$(mktemp -d "$dir/.hostlab.XXXXXX") &&
			tar -C "$new" -xf - && mv -T "$new/$2" "$1" && rmdir "$new"`
	}
	err = l.pipe(ctx, exec.Command("tar", pack...), l.Cmd("sh", "-c", unpack, "sh", remote, filepath.Base(local)))
	if err != nil {
		return fmt.Errorf("hostlab: copy %s to the lab's %s: %w", local, remote, err)
	}
	return nil
}

// Fetch copies a file or folder of the lab to the local path, which must not exist.
func (l *Lab) Fetch(ctx context.Context, remote, local string) error {
	if _, err := os.Lstat(local); err == nil {
		return fmt.Errorf("hostlab: fetch: %s exists", local)
	}
	dir, err := os.MkdirTemp(filepath.Dir(local), ".hostlab.")
	if err != nil {
		return fmt.Errorf("hostlab: fetch: %w", err)
	}
	defer os.RemoveAll(dir)
	remote = filepath.Clean(remote)
	pack := l.Cmd("tar", "--create", "--sparse", "--directory="+filepath.Dir(remote), "--", filepath.Base(remote))
	err = l.pipe(ctx, pack, exec.Command("tar", "--extract", "--no-same-owner", "--directory="+dir))
	if err == nil {
		err = os.Rename(filepath.Join(dir, filepath.Base(remote)), local)
	}
	if err != nil {
		return fmt.Errorf("hostlab: fetch the lab's %s: %w", remote, err)
	}
	return nil
}

// pipe runs from | to.
func (l *Lab) pipe(ctx context.Context, from, to *exec.Cmd) error {
	if !l.connected() {
		return ErrConnection
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	var said [2]bytes.Buffer
	from.Stdout, from.Stderr = w, &said[0]
	to.Stdin, to.Stderr = r, &said[1]
	err = from.Start()
	if err == nil {
		err = to.Start()
	}
	// Only the children may hold the ends of the pipe, or they would never see it closed.
	r.Close()
	w.Close()
	if err != nil {
		if from.Process != nil {
			from.Process.Kill()
			_ = from.Wait()
		}
		return err
	}
	stop := context.AfterFunc(ctx, func() { from.Process.Kill(); to.Process.Kill() })
	defer stop()
	err = errors.Join(explain(from, &said[0]), explain(to, &said[1]))
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func explain(cmd *exec.Cmd, said *bytes.Buffer) error {
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(said.String()))
	}
	return nil
}

// Shell gives a person a shell in the lab, on this process's terminal, and returns when they leave it.
func (l *Lab) Shell() error {
	cmd := l.ssh("-o", "ControlMaster=no", "-t", "root@hostlab")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil // the exit code of their last command does not matter
	}
	return err
}
