// Package guest is fleetingd inside the VM (`fleetingd guest`) and the host's
// end of the channel to it. The channel carries bounded, versioned JSON lines
// (protocol.go) and needs no network. The guest obeys the host; the host treats
// everything the guest says as hostile input.
//
// The host's end is Session and ReadExport, the guest's end is Main. The guest's end changes the machine it runs on.
// It never listens on anything that a job could reach.
package guest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"time"
)

// ExportSerial is the serial number of the empty raw disk that a prebuild VM gets for Seal:
// the guest writes the image's kernel and initrd onto it. ExportSize is large enough for any.
const (
	ExportSerial = "fleetingd-out"
	ExportSize   = maxExport
)

// Dial opens a stream to the guest (vm.VM.Channel).
type Dial func(ctx context.Context) (net.Conn, error)

// Options configures a Session; zero values are the defaults.
type Options struct {
	Log *slog.Logger
	// Silence is how long a guest with work to do may send nothing, not even a heartbeat (default 60 s).
	Silence time.Duration
}

// Step is one prebuild step, as sent to the guest. Exactly one of Command,
// Packages and File is set.
type Step struct {
	Name     string   `json:"name"`
	Command  string   `json:"command,omitempty"`
	Packages []string `json:"packages,omitempty"`
	File     *File    `json:"file,omitempty"`
}

// File is the file a Step writes.
type File struct {
	Path    string `json:"path"`
	Content string `json:"content"`
	Mode    string `json:"mode"` // octal, "0644"
}

// StepError is the error of a prebuild step that failed or timed out.
type StepError struct {
	Step   string
	Code   int      // exit code, or -1 if it did not run, did not end, or was killed
	Reason string   // adds to the exit code, escaped; may be empty
	Hint   string   // where to look further; may be empty
	Tail   []string // the last lines of output, escaped for a terminal

	err error // why it was abandoned
}

// Error returns one line; callers show the Tail themselves.
func (e *StepError) Error() string {
	text := fmt.Sprintf("prebuild step %q failed", e.Step)
	switch {
	case e.err != nil:
		text = fmt.Sprintf("prebuild step %q did not finish", e.Step)
	case e.Code >= 0:
		text += fmt.Sprintf(" with exit code %d", e.Code)
	}
	if e.Reason != "" {
		text += ": " + e.Reason
	}
	if e.Hint != "" {
		text += " (" + e.Hint + ")"
	}
	return text
}

// Unwrap returns the reason why the step was abandoned, or nil.
func (e *StepError) Unwrap() error { return e.err }

// Ready is what a guest reports once it accepts jobs.
type Ready struct {
	BootID   string
	Version  string        // version of the guest part
	Took     time.Duration // from the kernel's start, by the guest's clock
	Hostname string
}

// Export describes what Seal wrote to the ExportSerial disk.
type Export struct {
	Bytes  int64  // length of the tar stream that ReadExport reads; 0: none
	Kernel string // the kernel's version as uname -r prints it, or ""
	Reason string // why there is no export
}
