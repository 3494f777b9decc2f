package vm

import "errors"

// ErrNotRunning is Adopt's answer where no VM runs.
var ErrNotRunning = errors.New("no VM is running there")
