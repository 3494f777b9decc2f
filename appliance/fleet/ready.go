package fleet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
	"golang.org/x/crypto/ssh"

	"github.com/fleetingd/fleetingd/appliance/guest"
	"github.com/fleetingd/fleetingd/appliance/image"
)

// waitReady waits until a worker takes jobs: its guest part says so, or, in an image without
// one, its user can log in with the worker's key.
func waitReady(ctx context.Context, g *Group, w *worker, sealed *image.Sealed) error {
	if !sealed.Guest {
		return waitSSH(ctx, net.JoinHostPort(w.slot.Address.String(), strconv.Itoa(g.sshPort())), g.user(), w.key)
	}
	s := guest.NewSession(w.vm.Channel, guest.Options{Log: g.slog})
	_, err := s.WaitReady(ctx)
	return errors.Join(err, s.Close())
}

func (g *Group) sshPort() int {
	if g.settings.ProtocolPort != 0 {
		return g.settings.ProtocolPort
	}
	return provider.DefaultProtocolPorts[provider.ProtocolSSH]
}

// sshPause is between two attempts to log in, sshPatience how long one may take.
const (
	sshPause    = 200 * time.Millisecond
	sshPatience = 10 * time.Second
)

// waitSSH logs in until it works: an open port, or sshd's banner, would be there before the user's key is.
func waitSSH(ctx context.Context, addr, user string, key []byte) error {
	signer, err := ssh.ParsePrivateKey(key)
	if err != nil {
		return err
	}
	cfg := &ssh.ClientConfig{
		User: user,
		Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)},
		// The guest makes its host key at boot. What stands for it is the TAP: nothing else can answer at the address.
		HostKeyCallback: ssh.InsecureIgnoreHostKey(),
	}
	for {
		err := tryLogin(ctx, addr, cfg)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("log in as %s at %s: %w", user, addr, err)
		case <-time.After(sshPause):
		}
	}
}

func tryLogin(ctx context.Context, addr string, cfg *ssh.ClientConfig) error {
	ctx, cancel := context.WithTimeout(ctx, sshPatience)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	// The handshake knows no context: its end closes the connection.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	c, chans, reqs, err := ssh.NewClientConn(conn, addr, cfg)
	if err != nil {
		conn.Close()
		return err
	}
	return ssh.NewClient(c, chans, reqs).Close()
}
