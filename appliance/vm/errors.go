package vm

import "errors"

// ErrNotRunning is Adopt's answer where no VM runs.
var ErrNotRunning = errors.New("no VM is running there")

// ErrPoweredOff is in VM.Exit where the guest ended the VM itself, in order.
var ErrPoweredOff = errors.New("the guest powered off")
