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

// minMasked is the length of the shortest line of a secret that is taken out of the steps' output, in bytes: what is
// shorter would mostly be found where there is no secret.
const minMasked = 6

// guestSteps gives the steps as the guest gets them, with their secrets, and a mask that takes those out of the guest's output.
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
					m.add(text) // what base64encode makes of a secret is no less secret
				}
				step.File.Content += text
			}
		}
		steps = append(steps, step)
	}
	return steps, m.replacer(), errors.Join(errs...)
}

// masker gathers the lines of secrets.
type masker []string

func (m *masker) add(secret string) {
	for line := range strings.Lines(secret) {
		if line = strings.TrimSpace(line); len(line) >= minMasked {
			*m = append(*m, line)
		}
	}
}

func (m masker) replacer() *strings.Replacer {
	// The longest first: of two that begin alike, nothing of the longer one may stay.
	slices.SortFunc(m, func(a, b string) int { return cmp.Compare(len(b), len(a)) })
	var pairs []string
	for _, line := range m {
		pairs = append(pairs, line, "***")
	}
	return strings.NewReplacer(pairs...)
}

// unreadable names the step whose secret cannot be read, and a cure for the usual reason.
func unreadable(s plan.Step, err error) error {
	cure := ""
	if errors.Is(err, fs.ErrPermission) {
		cure = fmt.Sprintf(" (prebuilds run as uid %d: let its group read the file, with chgrp and chmod g+r)", os.Getuid())
	}
	return fmt.Errorf("step %q: %w%s", s.Name, err, cure)
}
