// Package guest is fleetingd inside the VM (`fleetingd guest`) and the host's
// end of the channel to it. The channel carries bounded, versioned JSON lines
// and needs no network. The guest obeys the host; all that it says is
// hostile input to the host.
package guest

import (
	"context"
	"io"
	"log/slog"
	"net"
	"time"
)

// Port is the vsock port and PortName the virtio-serial port of the channel.
const (
	Port     = 7071
	PortName = "dev.fleetingd.guest"
)

// Dial opens a stream to the guest (vm.VM.Channel).
type Dial func(ctx context.Context) (net.Conn, error)

// Options of a Session; zero values are the defaults.
type Options struct {
	Log *slog.Logger
	// Silence is how long a guest that has work to do may say nothing, heartbeats included (default 60 s).
	Silence time.Duration
}

// Step is one prebuild step as it is sent to the guest. Exactly one of Command,
// Packages and File is set.
type Step struct {
	Name     string   `json:"name"`
	Command  string   `json:"command,omitempty"`
	Packages []string `json:"packages,omitempty"`
	File     *File    `json:"file,omitempty"`
}

// File is a file that a Step writes.
type File struct {
	Path    string `json:"path"`
	Content string `json:"content"`
	Mode    string `json:"mode"`
}

// StepError is a prebuild step that failed in the guest.
type StepError struct {
	Step string
	Code int      // exit code, or -1 where it did not run
	Tail []string // its last lines of output, escaped for a terminal
}

// Ready is what a guest says when jobs may come.
type Ready struct {
	BootID   string
	Version  string // the guest part's version
	Took     time.Duration
	Hostname string
}

// Host end, in host.go:
//
//	func NewSession(dial Dial, opts Options) *Session
//	func (s *Session) WaitReady(ctx context.Context) (Ready, error)
//	func (s *Session) Prebuild(ctx context.Context, steps []Step, out io.Writer) error  // streams "name: line"; *StepError on failure
//	func (s *Session) Seal(ctx context.Context) error   // clean identity, install the unit, export kernel and initrd, sync, power off
//	func (s *Session) Close() error
//
// Guest end, in run.go: func Main(ctx context.Context, args GuestOptions) error
var _ io.Writer
