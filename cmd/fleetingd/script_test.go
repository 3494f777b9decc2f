package main

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/fleetingd/fleetingd/appliance/need"
)

func TestMain(m *testing.M) {
	if os.Getenv(asUserEnv) != "" {
		// testscript copies the test binary, which an ordinary user may not read.
		os.Exit(m.Run())
	}
	testscript.Main(m, map[string]func(){
		"fleetingd": main,
		pluginName:  main,
	})
}

// TestScripts runs the commands as people do: testdata/script/*.txtar hold the input,
// the command lines and what is to come out
// (https://pkg.go.dev/github.com/rogpeppe/go-internal/testscript). Beside testscript's own
// commands there are
//
//	exits CODE program args…   runs a program that must exit with CODE
//	repeat COUNT TEXT > FILE   writes TEXT, in which \n is a line's end, over and over
//
// and the conditions [root] and [full] (FLEETINGD_TEST=full).
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") != "",
		Cmds:                map[string]func(*testscript.TestScript, bool, []string){"exits": exits, "repeat": repeat},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Getuid() == 0, nil
			case "full":
				return need.Full(), nil
			}
			return false, errors.New("unknown condition: " + cond)
		},
	})
}

// exits is exec with an exact exit code: scripts distinguish 1, a failure, from 2, wrong
// usage.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE program args…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

func repeat(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 4 || args[2] != ">" {
		ts.Fatalf("usage: repeat COUNT TEXT > FILE")
	}
	n, err := strconv.Atoi(args[0])
	ts.Check(err)
	text := strings.Repeat(strings.ReplaceAll(args[1], `\n`, "\n"), n)
	ts.Check(os.WriteFile(ts.MkAbs(args[3]), []byte(text), 0o644))
}
