package vm

import "errors"

// ErrNotRunning is Adopt's error if no VM is running.
var ErrNotRunning = errors.New("no VM is running there")

// ErrPoweredOff is wrapped by VM.Exit if the guest powered off.
var ErrPoweredOff = errors.New("the guest powered off")
