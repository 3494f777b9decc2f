// Command shell gives a person a shell in a throw-away Debian host, with the files named on the command line copied to
// /usr/local/bin. The host is removed when they leave it. `make hostlab` runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"syscall"
	"time"

	"github.com/fleetingd/fleetingd/appliance/hostlab"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() (err error) {
	memory := flag.Int64("memory", 4, "memory in GiB")
	cpus := flag.Int("cpus", 2, "number of CPUs")
	disk := flag.Int64("disk", 0, "GiB of a blank second disk, /dev/vdb; 0 for none")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: shell [flags] [program…]  (programs are copied to the lab's /usr/local/bin)")
		flag.PrintDefaults()
	}
	flag.Parse()
	opts := hostlab.Options{Memory: *memory << 30, CPUs: *cpus, Files: map[string]string{}, Log: os.Stderr}
	if *disk > 0 {
		opts.Disks = []int64{*disk << 30}
	}
	for _, file := range flag.Args() {
		opts.Files[path.Join("/usr/local/bin", filepath.Base(file))] = file
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	start := time.Now()
	lab, err := hostlab.Start(ctx, opts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close()) }()
	fmt.Fprintf(os.Stderr, "hostlab: up in %s; console in %s/console.log; leaving the shell removes it\n",
		time.Since(start).Round(100*time.Millisecond), lab.Dir)
	return lab.Shell()
}
