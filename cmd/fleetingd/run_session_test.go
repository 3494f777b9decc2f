package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"io"
	"net"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"gitlab.com/gitlab-org/fleeting/fleeting/connector"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
	"golang.org/x/crypto/ssh"

	"github.com/fleetingd/fleetingd/appliance/need"
)

// sshWorker is a worker's sshd: it answers keepalives, and commands do what job says.
type sshWorker struct {
	t      *testing.T
	config *ssh.ServerConfig
	info   provider.ConnectInfo
	job    func(stdout io.Writer) (code uint32)
}

func newSSHWorker(t *testing.T, job func(stdout io.Writer) uint32) *sshWorker {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	w := &sshWorker{t: t, job: job, config: &ssh.ServerConfig{
		PublicKeyCallback: func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil },
	}}
	w.config.AddHostKey(signer)
	w.info.Username, w.info.Key = "ci", pem.EncodeToMemory(block)
	w.info.InternalAddr = "192.0.2.2"
	return w
}

// serve is one connection. It ends with it.
func (w *sshWorker) serve(conn net.Conn) {
	defer conn.Close()
	_, channels, requests, err := ssh.NewServerConn(conn, w.config)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(requests) // it answers those that want an answer
	for c := range channels {
		channel, requests, err := c.Accept()
		if err != nil {
			return
		}
		go func() {
			for r := range requests {
				_ = r.Reply(true, nil) // a broken connection is noticed by the client
				if r.Type == "exec" {
					code := w.job(channel)
					_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{code}))
					channel.Close()
				}
			}
		}()
	}
}

// cable is one end of a connection with a buffer, as a socket has. Once it is cut, it takes what is written and delivers nothing,
// without a sign to either end.
type cable struct {
	net.Conn
	cut    <-chan struct{}
	out    chan []byte
	closed chan struct{}
	once   *sync.Once
}

func newCable(conn net.Conn, cut <-chan struct{}) cable {
	c := cable{conn, cut, make(chan []byte, 64), make(chan struct{}), new(sync.Once)}
	go func() {
		for {
			select {
			case b := <-c.out:
				select {
				case <-cut:
				default:
					_, _ = conn.Write(b) // the other end may be closed
				}
			case <-c.closed:
				return
			}
		}
	}()
	return c
}

func (c cable) Write(p []byte) (int, error) {
	select {
	case c.out <- bytes.Clone(p):
		return len(p), nil
	case <-c.closed:
		return 0, net.ErrClosed
	}
}

func (c cable) Close() error {
	c.once.Do(func() { close(c.closed) })
	select {
	case <-c.cut: // nor does the other end learn of this
		return c.SetReadDeadline(time.Unix(1, 0))
	default:
		return c.Conn.Close()
	}
}

// TestSilentWorker: whenever a worker falls silent, run gives it up after a bounded time, with an error that says so; one whose
// job says nothing for hours it does not.
func TestSilentWorker(t *testing.T) {
	hours := func(io.Writer) uint32 {
		time.Sleep(3 * time.Hour)
		return 7
	}
	for _, c := range []struct {
		name   string
		cut    time.Duration // after the start; 0: never
		refuse bool          // no connection comes about
		job    func(io.Writer) uint32
		want   string
		within time.Duration
	}{
		{"a quiet job", 0, false, hours, "exit code: 7", 3*time.Hour + time.Second},
		{"in a job", 30 * time.Minute, false, hours, "has not answered for 1m0s", 30*time.Minute + workerSilence + keepaliveInterval},
		{"in a job's output", 30 * time.Minute, false, func(out io.Writer) uint32 {
			for {
				time.Sleep(time.Second)
				if _, err := io.WriteString(out, "line\n"); err != nil {
					return 1
				}
			}
		}, "has not answered for 1m0s", 30*time.Minute + workerSilence + keepaliveInterval},
		{"in the handshake", 1, false, hours, "has not answered for 1m0s", dialTimeout + 5*time.Second},
		{"nobody there", 0, true, hours, "i/o timeout", dialTimeout + 5*time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newSSHWorker(t, c.job)
				cut := make(chan struct{})
				if c.cut > 0 {
					time.AfterFunc(c.cut, func() { close(cut) })
				}
				s := newWorkerSession()
				var servers sync.WaitGroup
				var ends []net.Conn
				s.dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
					if c.refuse {
						<-ctx.Done()
						return nil, &net.OpError{Op: "dial", Net: "tcp", Err: timeoutError{}}
					}
					here, there := net.Pipe()
					ends = append(ends, here, there)
					if c.cut == 1 {
						<-cut
					}
					servers.Go(func() { w.serve(newCable(there, cut)) })
					return newCable(here, cut), nil
				}
				start := time.Now()
				err := s.run(t.Context(), w.info, connector.RunOptions{Command: "x", Stdout: io.Discard})
				if took := time.Since(start); took > c.within || c.cut > 0 && took < c.cut {
					t.Errorf("it ended after %v, want %v at most", took, c.within)
				}
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want … %s …", err, c.want)
				}
				for _, e := range ends {
					e.Close()
				}
				servers.Wait()
				time.Sleep(4 * time.Hour) // what is left of the connector and of jobs ends
			})
		})
	}
}

type timeoutError struct{}

func (timeoutError) Error() string   { return "i/o timeout" }
func (timeoutError) Timeout() bool   { return true }
func (timeoutError) Temporary() bool { return true }

// TestSilentWorkerNetwork: the real thing. A network that the job makes takes the worker's way back to the host, as Docker's can in an image
// that does not prevent it: no packet comes back any more, not even TCP's own.
func TestSilentWorkerNetwork(t *testing.T) {
	need.Root(t)
	need.Tools(t, "ip")
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	ip := func(commands ...string) {
		for _, c := range commands {
			if out, err := exec.Command("ip", strings.Fields(c)...).CombinedOutput(); err != nil {
				t.Errorf("ip %s: %v: %s", c, err, out)
			}
		}
	}
	guest, err := netns.New()
	if err != nil {
		t.Skipf("skipped: no network namespaces here: %v", err)
	}
	defer guest.Close()
	ip("link set lo up", "link add eth0 type veth peer name tap0", "addr add 172.17.0.2/32 dev eth0", "link set eth0 up",
		"route add default via 172.17.0.1 dev eth0 onlink")
	began := make(chan struct{})
	over := make(chan struct{})
	defer close(over)
	w := newSSHWorker(t, func(io.Writer) uint32 {
		close(began)
		<-over
		return 0
	})
	w.info.InternalAddr = "172.17.0.2"
	ln, err := net.Listen("tcp", "172.17.0.2:22")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			go w.serve(conn)
		}
	}()
	tap, err := netlink.LinkByName("tap0")
	if err != nil {
		t.Fatal(err)
	}
	host, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	if err := netns.Set(guest); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetNsFd(tap, int(host)); err != nil {
		t.Fatal(err)
	}
	if err := netns.Set(host); err != nil {
		t.Fatal(err)
	}
	ip("link set lo up", "addr add 172.17.0.1/32 dev lo", "link set tap0 up", "route add 172.17.0.2/32 dev tap0 src 172.17.0.1")

	s := newWorkerSession()
	s.keepalive, s.silence = 100*time.Millisecond, 3*time.Second
	conn, err := net.DialTimeout("tcp", "172.17.0.2:22", 30*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	s.dial = func(context.Context, string, string) (net.Conn, error) { return conn, nil } // made in this thread's namespace
	ended := make(chan error, 1)
	go func() {
		ended <- s.run(t.Context(), w.info, connector.RunOptions{Command: "docker run", Stdout: io.Discard})
	}()
	select {
	case <-began:
	case err := <-ended:
		t.Fatalf("the job did not start: %v", err)
	}
	if err := netns.Set(guest); err != nil {
		t.Fatal(err)
	}
	ip("link add docker0 type bridge", "addr add 172.17.0.1/16 dev docker0", "link set docker0 up")
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), "the worker has not answered for 3s") {
			t.Errorf("got %v", err)
		}
	case <-time.After(time.Minute):
		t.Error("it waits for a session that is dead")
	}
}
