package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"time"

	"gitlab.com/gitlab-org/fleeting/fleeting/connector"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
)

// How long `run` waits for a worker that says nothing. A worker is asked for a sign of life every keepaliveInterval, whatever its
// job does, so one that has sent no byte for workerSilence has missed five.
const (
	keepaliveInterval = 10 * time.Second
	workerSilence     = time.Minute
	dialTimeout       = 2 * time.Minute // to open the session, with all retries: the worker's sshd was there a moment ago
)

// workerSession runs a command on a worker over SSH. Unlike the connector alone, it does not wait for good for a worker that has
// fallen silent: the connector sends keepalives, but waits for their answers without a limit.
type workerSession struct {
	dial      func(ctx context.Context, network, address string) (net.Conn, error)
	keepalive time.Duration
	silence   time.Duration
	silent    atomic.Bool // the current connection was given up
}

func newWorkerSession() *workerSession {
	return &workerSession{dial: (&net.Dialer{}).DialContext, keepalive: keepaliveInterval, silence: workerSilence}
}

func (s *workerSession) run(ctx context.Context, info provider.ConnectInfo, o connector.RunOptions) error {
	info.Keepalive, info.Timeout = s.keepalive, dialTimeout
	err := connector.Run(ctx, info, connector.ConnectorOptions{RunOptions: o, DialOptions: connector.DialOptions{DialFn: s.open}})
	if err != nil && s.silent.Load() && ctx.Err() == nil {
		return fmt.Errorf("the worker has not answered for %v: its guest hangs, or a network, a VPN or a firewall that the job set up in it "+
			"has cut it off. With console = true in its pool, the end of the guest's console is kept (workers/POOL/console below state_dir): %w",
			s.silence, err)
	}
	return err
}

func (s *workerSession) open(ctx context.Context, network, address string) (net.Conn, error) {
	conn, err := s.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	s.silent.Store(false)
	return &watchedConn{conn, s}, nil
}

// watchedConn closes itself when nothing was read for the session's silence. SSH always has a reader: bytes that nobody wants yet
// wait in its channels and not in the socket.
type watchedConn struct {
	net.Conn
	session *workerSession
}

func (c *watchedConn) Read(p []byte) (int, error) {
	if err := c.Conn.SetReadDeadline(time.Now().Add(c.session.silence)); err != nil {
		return 0, err
	}
	n, err := c.Conn.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		c.session.silent.Store(true)
		c.Conn.Close() // ends a write that waits too
	}
	return n, err
}

// SetDeadline leaves the read deadline to Read. The connector sets one while it dials, and then takes it away from under a Read that
// is waiting; it also closes a connection that it dials for too long.
func (c *watchedConn) SetDeadline(t time.Time) error { return c.SetWriteDeadline(t) }

func (c *watchedConn) SetReadDeadline(time.Time) error { return nil }
