package vm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"time"
)

// acceptor accepts the guest's connections on a Unix socket and keeps the newest until it is asked for. A
// guest that connects over and over costs no more than two descriptors.
type acceptor struct {
	listener *net.UnixListener
	newest   chan net.Conn // has room for one
}

// accept listens at path, and replaces a socket that an ended process left there.
func accept(path string) (*acceptor, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	a := &acceptor{listener: l, newest: make(chan net.Conn, 1)}
	go a.run()
	return a, nil
}

func (a *acceptor) run() {
	defer a.drop()
	for {
		conn, err := a.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // perhaps out of descriptors, which may get better
			time.Sleep(100 * time.Millisecond)
			continue
		}
		a.drop()
		a.newest <- conn // does not block: only this goroutine sends
	}
}

// drop closes a connection that was not asked for.
func (a *acceptor) drop() {
	select {
	case conn := <-a.newest:
		conn.Close()
	default:
	}
}

// next waits for a connection.
func (a *acceptor) next(ctx context.Context, done <-chan struct{}) (net.Conn, error) {
	select {
	case conn := <-a.newest:
		return conn, nil
	case <-done:
		return nil, errors.New("the VM has ended")
	case <-ctx.Done():
		return nil, fmt.Errorf("the guest has not connected: %w", context.Cause(ctx))
	}
}

func (a *acceptor) close() { _ = a.listener.Close() }
