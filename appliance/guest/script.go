package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// A run step is a script. If it starts with "#!", the program on that line runs it, as with execve(2). Otherwise
// the first of these shells that the image has runs it: all of them stop at the first command that fails (set -e),
// and in all but the last a pipeline fails if any of its commands does (pipefail).
var shells = [][]string{
	{"bash", "-O", "inherit_errexit", "-e", "-o", "pipefail"}, // -e counts within $( ) too: since 4.4
	{"bash", "-e", "-o", "pipefail"},
	{"/bin/sh", "-e", "-o", "pipefail"}, // busybox; dash since 0.5.13, which no stable Debian or Ubuntu has yet
	{"/bin/sh", "-e"},
}

// noPipefail is reported once per step if it matters.
const noPipefail = "warning: this image has no bash, and its sh has no pipefail: in a pipeline only the last command's failure is noticed"

func runScript(ctx context.Context, text string, say func(string)) result {
	words, err := interpreter(text)
	if err != nil {
		return result{code: 1, err: err}
	}
	if words == nil {
		words = findShell(ctx)
		if len(words) == len(shells[len(shells)-1]) && strings.Contains(text, "|") {
			say(noPipefail)
		}
	}
	// A file, since arguments are limited to 128 KiB. It is world-readable: `#!/usr/bin/sudo -u …` runs it as another user.
	dir, err := os.MkdirTemp("", "fleetingd-")
	if err != nil {
		return result{code: -1, err: err}
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "step")
	if err := errors.Join(os.Chmod(dir, 0o755), writeFile(path, []byte(text), 0o755)); err != nil {
		return result{code: -1, err: err}
	}
	return runCommand(ctx, say, words[0], append(words[1:], path)...)
}

// findShell returns the first of shells that works here.
func findShell(ctx context.Context) []string {
	last := len(shells) - 1
	for _, words := range shells[:last] {
		if onPath(words[0]) && runCommand(ctx, func(string) {}, words[0], append(words[1:len(words):len(words)], "-c", ":")...).code == 0 {
			return words
		}
	}
	return shells[last]
}

// interpreter returns the program of a script's first line, if that starts with "#!", and its optional argument: everything
// after the first blanks, as on Linux (execve(2), "Interpreter scripts").
func interpreter(text string) ([]string, error) {
	line, ok := strings.CutPrefix(text, "#!")
	if !ok {
		return nil, nil
	}
	line, _, _ = strings.Cut(line, "\n")
	line = strings.Trim(line, " \t")
	program, arg := line, ""
	if i := strings.IndexAny(line, " \t"); i >= 0 {
		program, arg = line[:i], strings.TrimLeft(line[i:], " \t")
	}
	if !filepath.IsAbs(program) || strings.HasSuffix(line, "\r") {
		return nil, fmt.Errorf("its first line, %q, must name an interpreter by its absolute path, as in #!/bin/sh or "+
			"#!/usr/bin/env python3, and end in a plain newline", "#!"+line)
	}
	if arg == "" {
		return []string{program}, nil
	}
	return []string{program, arg}, nil
}
