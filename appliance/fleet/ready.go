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

// waitReady waits until a worker accepts jobs: until its guest part says that it is ready or, in an image without
// one, until its user can log in with the worker's key.
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

// sshPause is the time between two login attempts, sshPatience the time limit of each.
const (
	sshPause    = 200 * time.Millisecond
	sshPatience = 10 * time.Second
)

// waitSSH tries to log in until it succeeds. An open port or sshd's banner is not enough: both come before the user's key.
func waitSSH(ctx context.Context, addr, user string, key []byte) error {
	signer, err := ssh.ParsePrivateKey(key)
	if err != nil {
		return err
	}
	cfg := &ssh.ClientConfig{
		User: user,
		Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)},
		// The guest generates its host key at boot. The TAP vouches for it: no other machine can answer at this address.
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
	// The handshake takes no context, so the end of ctx closes the connection.
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	c, chans, reqs, err := ssh.NewClientConn(conn, addr, cfg)
	if err != nil {
		conn.Close()
		return err
	}
	return ssh.NewClient(c, chans, reqs).Close()
}
