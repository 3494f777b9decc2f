package main

import (
	_ "embed"
	"io"

	"github.com/urfave/cli/v2"
)

// licenses holds the licences of fleetingd, of Go and of every module that is linked into the binaries. TestLicenses writes it
// from the build's own list of modules, and fails if it is outdated.
//
//go:embed licenses.txt
var licenses string

func licensesCommand() *cli.Command {
	return &cli.Command{
		Name:  "licenses",
		Usage: "print the licence of fleetingd and of everything it is built from",
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usageErrorf("licenses takes no arguments; got %q", c.Args().First())
			}
			_, err := io.WriteString(c.App.Writer, licenses)
			return err
		},
	}
}
