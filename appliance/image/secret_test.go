package image

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// TestPrebuildSecrets: a secret reaches the guest over the channel and appears nowhere else: on no disk of the VM, in no kept file, output
// or digest.
func TestPrebuildSecrets(t *testing.T) {
	l := newLab(t)
	const canary = "glpat-CANARY0123456789"
	secret := canary + "\nsecond line of CANARY"
	l.driver.canary = canary
	l.img.Prebuild.Steps = append([]plan.Step{
		{Name: "file[0]: /etc/netrc", File: &plan.StepFile{Path: "/etc/netrc", Mode: "0600", Secret: plan.Text{
			{Literal: "password "}, {From: "file:/run/secrets/x"}, {Literal: "\n"},
			{Op: "base64encode", Of: plan.Text{{Literal: "u:"}, {From: "file:/run/secrets/x"}}}, {Literal: "\n"},
		}}},
		{Name: "file[1]: /etc/motd", File: &plan.StepFile{Path: "/etc/motd", Mode: "0644", Content: "hello\n"}},
	}, l.img.Prebuild.Steps...)
	value, err := "", error(&fs.PathError{Op: "open", Path: "/run/secrets/x", Err: fs.ErrPermission})
	l.opts.Secrets = func(from string) (string, error) {
		if from != "file:/run/secrets/x" {
			return "", fmt.Errorf("asked for %q", from)
		}
		return value, err
	}

	// An unreadable secret does not cost a boot.
	_, got := l.Ensure(t.Context(), l.img)
	wantError(t, got, `step "file[0]: /etc/netrc"`, "/run/secrets/x: permission denied", "chgrp and chmod g+r")
	if len(l.driver.started) > 0 {
		t.Error("a VM was started for it")
	}

	value, err = secret, nil
	l.driver.failStep = "two"
	_, got = l.Ensure(t.Context(), l.img)
	wantError(t, got, "run[1]: two")
	if strings.Contains(fmt.Sprintf("%+v", got), "CANARY") {
		t.Errorf("the error shows the secret: %v", got)
	}
	l.driver.failStep = ""
	first := l.ensure()
	encoded := base64.StdEncoding.EncodeToString([]byte("u:" + secret))
	if want := "password " + secret + "\n" + encoded + "\n"; !slices.Equal(l.driver.files[len(l.driver.files)-2:], []string{want, "hello\n"}) {
		t.Errorf("the guest got %q", l.driver.files)
	}
	shown := strings.Join(l.phases, "\n")
	if strings.Contains(shown, "CANARY") || strings.Contains(shown, encoded) || !strings.Contains(shown, "did password ***") {
		t.Errorf("the output shows the secret, or nothing: %s", shown)
	}
	nowhere(t, l.dir, "CANARY")
	nowhere(t, l.plan.Paths.Run, "CANARY")

	// Another value gives the same image: the digest, which is public, does not depend on it. It is not even read.
	err = errors.New("it is gone")
	if again := l.ensure(); !again.Cached || again.Digest != first.Digest {
		t.Error("the secret's value is part of the digest")
	}
	l.img.Prebuild.Steps[0].File.Secret[1].From = "file:/run/secrets/y"
	_, got = l.Ensure(t.Context(), l.img)
	wantError(t, got, `asked for "file:/run/secrets/y"`)
}

func TestMask(t *testing.T) {
	var m masker
	for _, secret := range []string{"abcdef", "abcdefgh\n  second line \r\n\nx\n", ""} {
		m.add(secret)
	}
	if got, want := m.replacer().Replace("abcdefgh abcdef abc second line x"), "*** *** abc *** x"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// nowhere finds text in files.
func nowhere(t *testing.T, dir, text string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		if bytes.Contains(b, []byte(text)) {
			t.Errorf("%s holds %s", path, text)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
