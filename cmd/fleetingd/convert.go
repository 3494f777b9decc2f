package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"

	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/hcl/convert"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

func convertCommand() *cli.Command {
	return &cli.Command{
		Name:      "convert",
		Usage:     "turn GitLab Runner's config.toml into a host spec that does the same",
		ArgsUsage: "CONFIG",
		Description: "Reads CONFIG (/etc/gitlab-runner/config.toml, or - for standard input): of runners with the executors docker+machine, docker, shell,\n" +
			"docker-autoscaler or instance, or of the predecessor's plugin. The spec is valid. What has no place in it stands in its comments.\n" +
			"Tokens and keys are not in the spec: it reads each from a file, which --secrets-dir writes. Nothing on the host is changed.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "write the spec to `FILE`, or to standard output with -", Value: "-"},
			&cli.StringFlag{Name: "secrets-dir", Usage: "write each secret to a file of mode 0600 in `DIR`, from which the spec reads it"},
			&cli.StringFlag{Name: "egress-interface", Usage: "where the workers' traffic leaves the host: `NAME` (default: what the predecessor's plugin_config says, or this machine's default route)"},
			&cli.BoolFlag{Name: "force", Usage: "overwrite the spec and the secrets if they exist"},
		},
		Action: convertConfig,
	}
}

func convertConfig(c *cli.Context) error {
	if c.NArg() != 1 {
		return usageError{fmt.Errorf("convert takes one config.toml; got %d: fleetingd convert config.toml -o host.hcl", c.NArg())}
	}
	out := c.String("output")
	if out == "" {
		return usageError{errors.New("convert: missing -o FILE, or -o - for standard output")}
	}
	o := convert.Options{Name: c.Args().First(), SpecName: out, EgressInterface: c.String("egress-interface"), Arch: runtime.GOARCH}
	if out == "-" {
		o.SpecName = "host.hcl"
	}
	if name, err := os.Hostname(); err == nil {
		o.Machine = name
	}
	if o.EgressInterface == "" {
		// Without an answer the spec says that it has none.
		o.EgressInterface, _ = host.DefaultInterface()
	}
	if dir := c.String("secrets-dir"); dir != "" {
		var err error
		if o.SecretsDir, err = filepath.Abs(dir); err != nil {
			return err
		}
	}
	src, err := readConfig(c, &o)
	if err != nil {
		return err
	}
	res, err := convert.Convert(src, o)
	if err != nil {
		return err
	}
	if err := writeConverted(c, out, o.SecretsDir, res); err != nil {
		return fmt.Errorf("convert: %w", err)
	}
	reportConverted(c, out, o, res)
	return nil
}

func readConfig(c *cli.Context, o *convert.Options) ([]byte, error) {
	if o.Name == "-" {
		o.Name = "config.toml" // as its reader calls it
		return readStdin(c)
	}
	src, err := hostspec.ReadSource(o.Name)
	if errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("convert: cannot read %s: %w; it holds tokens, so run this as root", o.Name, err)
	}
	if err != nil {
		return nil, fmt.Errorf("convert: cannot read %s: %w", o.Name, err)
	}
	return src, nil
}

// writeConverted writes the secrets, then the spec. It looks first whether all of them can be written.
func writeConverted(c *cli.Context, out, secretsDir string, res *convert.Result) error {
	force := c.Bool("force")
	if out != "-" && !force {
		if err := mustNotExist(out); err != nil {
			return err
		}
	}
	if secretsDir != "" {
		if err := writeSecrets(secretsDir, res.Secrets, force); err != nil {
			return err
		}
	}
	if out == "-" {
		_, err := c.App.Writer.Write(res.Spec)
		return err
	}
	return writeFile(out, res.Spec, 0o644, force)
}

func writeSecrets(dir string, secrets []convert.Secret, force bool) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	var missing []convert.Secret
	for _, s := range secrets {
		have, err := os.ReadFile(s.Path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			missing = append(missing, s)
		case err != nil:
			return err
		case bytes.Equal(have, secretFile(s)):
			// An earlier run has written it.
		case !force:
			return fmt.Errorf("%s exists and has another value; name another folder, or overwrite it with --force", s.Path)
		default:
			missing = append(missing, s)
		}
	}
	for _, s := range missing {
		if err := writeFile(s.Path, secretFile(s), 0o600, force); err != nil {
			return err
		}
	}
	return nil
}

// secretFile is what is in a secret's file. Whoever reads it takes one final newline off.
func secretFile(s convert.Secret) []byte { return []byte(s.Value + "\n") }

// mustNotExist is an error if there is anything at a path.
func mustNotExist(path string) error {
	_, err := os.Lstat(path)
	switch {
	case err == nil:
		return fmt.Errorf("%s exists; write to another file, or overwrite it with --force", path)
	case errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return err
}

// writeFile writes a file whole or not at all. An existing one is an error unless it is forced.
func writeFile(path string, data []byte, mode os.FileMode, force bool) error {
	if force {
		return state.WriteFile(path, data, mode)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if errors.Is(err, fs.ErrExist) {
		return mustNotExist(path)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// reportConverted says what came of it, and what is left to do.
func reportConverted(c *cli.Context, out string, o convert.Options, res *convert.Result) {
	w := c.App.Writer
	if out == "-" {
		w = c.App.ErrWriter // the spec is on standard output
	}
	printDiagnostics(c.App.ErrWriter, res.Files, res.Warnings)
	say := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format+"\n", args...) }
	say("%s: %s", o.SpecName, count(res.Runners, "runner"))
	if res.Left > 0 {
		say("%s of %s could not be carried over; comments in the spec say why", count(res.Left, "setting"), o.Name)
	}
	switch {
	case o.SecretsDir != "":
		say("%s in %s", count(len(res.Secrets), "secret"), o.SecretsDir)
	case len(res.Secrets) > 0:
		say("Put %s into %s; the spec names a file for each.", count(len(res.Secrets), "secret"), convert.DefaultSecretsDir)
	}
	say("Read the comments, and check the pools' sizes. Then: fleetingd doctor %[1]s, and fleetingd apply %[1]s", o.SpecName)
}
