package guest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// IsCommand reports whether this program was started inside a VM: as the guest part, or as /init of its initrd.
func IsCommand(args []string) bool {
	return isInit(args) || len(args) > 1 && args[1] == "guest"
}

func isInit(args []string) bool { return os.Getpid() == 1 && len(args) > 0 && args[0] == "/init" }

// Command runs `fleetingd guest [--prebuild]` and returns the exit code. It is not for people, so no help text mentions it.
func Command(args []string, version string) int {
	if isInit(args) {
		Init(args[1:])
		return 1
	}
	prebuild := len(args) == 3 && args[2] == "--prebuild"
	if !IsCommand(args) || len(args) > 2 && !prebuild {
		fmt.Fprintln(os.Stderr, "fleetingd: usage: fleetingd guest [--prebuild], inside a VM that fleetingd started")
		return 2
	}
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "fleetingd: the guest part runs as root, inside a VM that fleetingd started")
		return 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	// The journal puts the time before each line.
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
	if err := Main(ctx, MainOptions{Prebuild: prebuild, Version: version, Log: log}); err != nil {
		fmt.Fprintln(os.Stderr, "fleetingd: guest: "+err.Error())
		return 1
	}
	return 0
}
