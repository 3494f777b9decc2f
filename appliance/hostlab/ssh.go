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

// ErrConnection is what Run's error wraps when the connection went before the command ended: the host is off, or
// rebooting.
var ErrConnection = errors.New("the connection to the host is gone")

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
	// A killed master leaves its socket, and the next one would refuse to listen there.
	os.Remove(filepath.Join(l.Dir, control))
}

// connected reports whether the shared connection stands.
func (l *Lab) connected() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.master != nil && l.master.running()
}

// ssh is the client with all options that make it ask nobody and read no configuration.
func (l *Lab) ssh(args ...string) *exec.Cmd {
	cmd := exec.Command("ssh", append([]string{
		"-F", "none", "-o", "BatchMode=yes", "-o", "LogLevel=ERROR",
		"-o", "HostName=127.0.0.1", "-o", fmt.Sprintf("Port=%d", l.port), "-o", "HostKeyAlias=hostlab",
		"-o", "IdentityFile=" + l.base.path("id_ed25519"), "-o", "IdentitiesOnly=yes",
		"-o", "UserKnownHostsFile=" + l.base.path("known_hosts"), "-o", "StrictHostKeyChecking=yes",
		// AES is a helper call to the emulator, ChaCha is emulated instruction by instruction.
		"-o", "Ciphers=aes128-ctr", "-o", "MACs=umac-64@openssh.com",
		// A host whose power was cut sends no FIN.
		"-o", "ServerAliveInterval=10", "-o", "ServerAliveCountMax=12",
		"-o", "ControlPath=" + control,
	}, args...)...)
	cmd.Dir = l.Dir
	return cmd
}

// Result is how a command ended.
type Result struct {
	Stdout, Stderr string
	ExitCode       int
}

// Cmd is a command as root in the lab, not yet started, for who needs its input or its output as it comes. The
// arguments reach the program as they are. Its exit code is the program's; 255 may also be a lost connection. Killing
// it kills the local end only.
func (l *Lab) Cmd(argv ...string) *exec.Cmd {
	quoted := make([]string, len(argv))
	for i, a := range argv {
		quoted[i] = quote(a)
	}
	cmd := l.ssh("-o", "ControlMaster=no", "root@hostlab", "--", strings.Join(quoted, " "))
	// The shared connection holds our pipes too: without this, Wait of a killed cmd would wait for the remote program.
	cmd.WaitDelay = 2 * time.Second
	return cmd
}

// quote is for sshd, which hands the line to the account's shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// Run runs a command as root to its end. A command that fails is a Result; the error is for one that could not be run,
// or whose end is not known (ErrConnection, or ctx's).
func (l *Lab) Run(ctx context.Context, argv ...string) (Result, error) {
	var stdout, stderr bytes.Buffer
	cmd := l.Cmd(argv...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	code, err := l.wait(ctx, cmd)
	return Result{stdout.String(), stderr.String(), code}, err
}

// Sh runs a shell script as root, with -eu, and returns its output. Here a script that fails is an error, which says
// how and shows what it wrote.
func (l *Lab) Sh(ctx context.Context, script string) (string, error) {
	r, err := l.Run(ctx, "sh", "-euc", script)
	if err == nil && r.ExitCode != 0 {
		err = fmt.Errorf("hostlab: exit code %d from: %s\n%s%s", r.ExitCode, script, tail(r.Stdout, 30), tail(r.Stderr, 30))
	}
	return strings.TrimSuffix(r.Stdout, "\n"), err
}

// wait runs cmd and tells its exit code from a lost connection, for which ssh exits with 255, too.
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

// Copy copies a local file or folder into the lab, with its modes and holes, owned by root. A file replaces what is at
// remote, in one step; a folder's content is added to remote. Missing parents are made.
func (l *Lab) Copy(ctx context.Context, local, remote string) error {
	st, err := os.Stat(local)
	if err != nil {
		return fmt.Errorf("hostlab: copy: %w", err)
	}
	// A sparse disk image is to cost its content only: tar carries holes, SFTP does not.
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
	// Each end belongs to its child alone, or the other would never see it closed.
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
		return nil // how their last command ended is theirs to know
	}
	return err
}
