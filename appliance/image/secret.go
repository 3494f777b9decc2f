package image

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/guest"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// minMasked is the length of the shortest line of a secret that is masked in the steps' output, in bytes. Shorter ones would mostly match
// text that is not secret.
const minMasked = 6

// guestSteps returns the steps as the guest receives them, with their secrets, and a mask that removes those from the guest's output.
func (b *prebuild) guestSteps() ([]guest.Step, *strings.Replacer, error) {
	var m masker
	read := func(from string) (string, error) {
		if b.opts.Secrets == nil {
			return "", errors.New("this command reads no secrets")
		}
		value, err := b.opts.Secrets(from)
		m.add(value)
		return value, err
	}
	var errs []error
	steps := make([]guest.Step, 0, len(b.img.Prebuild.Steps))
	for _, s := range b.img.Prebuild.Steps {
		step := guest.Step{Name: s.Name, Command: s.Command, Packages: s.Packages}
		if f := s.File; f != nil {
			step.File = &guest.File{Path: f.Path, Content: f.Content, Mode: f.Mode}
			for _, piece := range f.Secret {
				text, err := plan.Text{piece}.Read(read)
				if err != nil {
					errs = append(errs, unreadable(s, err))
				}
				if piece.Op != "" {
					m.add(text) // the base64 form of a secret is just as secret
				}
				step.File.Content += text
			}
		}
		steps = append(steps, step)
	}
	return steps, m.replacer(), errors.Join(errs...)
}

// masker collects the lines of secrets.
type masker []string

func (m *masker) add(secret string) {
	for line := range strings.Lines(secret) {
		if line = strings.TrimSpace(line); len(line) >= minMasked {
			*m = append(*m, line)
		}
	}
}

func (m masker) replacer() *strings.Replacer {
	// The longest come first: if one is the beginning of another, the rest of that must not remain.
	slices.SortFunc(m, func(a, b string) int { return cmp.Compare(len(b), len(a)) })
	var pairs []string
	for _, line := range m {
		pairs = append(pairs, line, "***")
	}
	return strings.NewReplacer(pairs...)
}

// unreadable names the step whose secret cannot be read, and the cure for the usual reason.
func unreadable(s plan.Step, err error) error {
	cure := ""
	if errors.Is(err, fs.ErrPermission) {
		cure = fmt.Sprintf(" (prebuilds run as uid %d: let its group read the file, with chgrp and chmod g+r)", os.Getuid())
	}
	return fmt.Errorf("step %q: %w%s", s.Name, err, cure)
}
