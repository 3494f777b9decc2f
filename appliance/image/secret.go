package image

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/guest"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

// minMasked is the length of the shortest line of a secret that is taken out of the steps' output, in bytes: what is
// shorter would mostly be found where there is no secret.
const minMasked = 6

// guestSteps gives the steps as the guest gets them, with their secrets, and a mask that takes those out of the guest's output.
func (b *prebuild) guestSteps() ([]guest.Step, *strings.Replacer, error) {
	var masked []string
	var errs []error
	read := func(from string) (string, error) {
		if b.opts.Secrets == nil {
			return "", errors.New("this command reads no secrets")
		}
		value, err := b.opts.Secrets(from)
		for line := range strings.Lines(value) {
			if line = strings.TrimSpace(line); len(line) >= minMasked {
				masked = append(masked, line, "***")
			}
		}
		return value, err
	}
	steps := make([]guest.Step, 0, len(b.img.Prebuild.Steps))
	for _, s := range b.img.Prebuild.Steps {
		step := guest.Step{Name: s.Name, Command: s.Command, Packages: s.Packages}
		if f := s.File; f != nil {
			content := f.Content
			if len(f.Secret) > 0 {
				var err error
				if content, err = f.Secret.Read(read); err != nil {
					errs = append(errs, unreadable(s, err))
				}
			}
			step.File = &guest.File{Path: f.Path, Content: content, Mode: f.Mode}
		}
		steps = append(steps, step)
	}
	return steps, strings.NewReplacer(masked...), errors.Join(errs...)
}

// unreadable names the step whose secret cannot be read, and a cure for the usual reason.
func unreadable(s plan.Step, err error) error {
	cure := ""
	if errors.Is(err, fs.ErrPermission) {
		cure = fmt.Sprintf(" (prebuilds run as uid %d: let its group read the file, with chgrp and chmod g+r)", os.Getuid())
	}
	return fmt.Errorf("step %q: %w%s", s.Name, err, cure)
}
