package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

func TestFlagsFirst(t *testing.T) {
	commands := []*cli.Command{
		{Name: "run", Flags: []cli.Flag{&cli.StringFlag{Name: "pool"}, &cli.IntFlag{Name: "n"}, &cli.BoolFlag{Name: "keep", Aliases: []string{"k"}}}},
		{Name: "network", Subcommands: []*cli.Command{{Name: "up", Flags: []cli.Flag{&cli.StringFlag{Name: "plan"}}}}},
	}
	for in, want := range map[string]string{
		"x":                                      "x",
		"x nope --pool a b":                      "x nope --pool a b",
		"x run HOST --pool a -n 3 -- echo --n 4": "x run --pool a -n 3 HOST -- echo --n 4",
		"x run HOST --keep -- sh -c x":           "x run --keep HOST -- sh -c x",
		"x run -k HOST --pool=a":                 "x run -k --pool=a HOST",
		"x run --pool a HOST":                    "x run --pool a HOST",
		"x run - --keep":                         "x run --keep -",
		"x run HOST --unknown v":                 "x run --unknown HOST v",
		"x run HOST --pool":                      "x run --pool",
		"x run HOST --pool -- a":                 "x run --pool",
		"x network up --plan p":                  "x network up --plan p",
		"x network up a --plan p b":              "x network up --plan p a b",
	} {
		if got := flagsFirst(strings.Fields(in), commands); !slices.Equal(got, strings.Fields(want)) {
			t.Errorf("%q becomes %q, want %q", in, got, want)
		}
	}
}
