package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/hashicorp/hcl/v2"
	"github.com/urfave/cli/v2"

	"github.com/fleetingd/fleetingd/appliance/compile"
	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

func compileCommand() *cli.Command {
	return &cli.Command{
		Name:      "compile",
		Usage:     "write the files of a host to a folder, without looking at any host",
		ArgsUsage: "HOST",
		Description: "Compiles HOST and writes its files below DIR: etc/fleetingd/plan.json, the firewall as text, systemd units, sysctl.d,\n" +
			"etc/gitlab-runner/config.toml, and the seeds that VMs boot with. It needs no root and changes nothing but DIR.\n" +
			"The same spec (and --former) always gives the same bytes. An existing DIR is replaced, but only if it was written by compile.\n" +
			"-o - prints only plan.json.",
		Flags: append(specFlags(),
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "write the tree to `DIR`, or plan.json to standard output with -"},
			&cli.BoolFlag{Name: "with-secrets", Usage: "read the secrets and put them into the files, which then have mode 0600"},
			&cli.StringFlag{Name: "former", Usage: "the plan.json of the host as it is, `FILE`: what it has, too, keeps its slots"},
			&cli.StringFlag{Name: "bin-dir", Usage: "`DIR` where fleetingd is installed on the host (default: /usr/bin)"},
		),
		Action: compileTree,
	}
}

func compileTree(c *cli.Context) error {
	out := c.String("output")
	switch {
	case c.NArg() != 1:
		return usageError{fmt.Errorf("compile takes one spec; got %d: fleetingd compile HOST.hcl -o DIR", c.NArg())}
	case out == "":
		return usageError{errors.New("compile: missing -o DIR, or -o - to print only plan.json")}
	case out == "-" && c.Bool("with-secrets"):
		return usageError{errors.New("compile: --with-secrets has no effect with -o -: a plan never holds a secret")}
	}
	options := compile.Options{BinDir: c.String("bin-dir")}
	if former := c.String("former"); former != "" {
		var err error
		if options.Former, err = state.ReadPlan(former); err != nil {
			return fmt.Errorf("--former: %w", err)
		}
	}
	host, p, err := compileSpec(c, options)
	if err != nil {
		return err
	}
	if out == "-" {
		text, err := p.JSON()
		if err != nil {
			return err
		}
		_, err = c.App.Writer.Write(text)
		return err
	}
	var read func(from string) (string, error)
	if c.Bool("with-secrets") {
		if read, err = readSecrets(c, host, p, " Without --with-secrets it is not needed."); err != nil {
			return err
		}
	}
	tree, err := p.Tree(read)
	if err != nil {
		return err
	}
	if err := replaceTree(out, tree); err != nil {
		return fmt.Errorf("compile: %w", err)
	}
	digest, err := p.Digest()
	if err != nil {
		return err
	}
	fmt.Fprintf(c.App.Writer, "%s: %s of host %s, plan %.12s\n", filepath.Clean(out), count(len(tree), "file"), p.Host, digest)
	return nil
}

// compileSpec loads and compiles the spec that the command line names, and prints its
// diagnostics. If there are errors, it returns errDiagnosed.
func compileSpec(c *cli.Context, o compile.Options) (*hostspec.Result, *plan.Plan, error) {
	res, err := loadSpec(c)
	if err != nil {
		return nil, nil, err
	}
	p, diags := compile.Compile(res.Host, o)
	printDiagnostics(c.App.ErrWriter, res.Files, diags)
	if diags.HasErrors() {
		return nil, nil, errDiagnosed
	}
	return res, p, nil
}

// readSecrets reads all secrets in config.toml, so that it can report all that cannot be read at once, and returns their values
// by place.
func readSecrets(c *cli.Context, res *hostspec.Result, p *plan.Plan, hint string) (func(from string) (string, error), error) {
	values := map[string]string{}
	read := func(from string) (string, error) {
		value, ok := values[from]
		if !ok {
			return "", errors.New("the spec does not refer to it")
		}
		return value, nil
	}
	var diags hcl.Diagnostics
	cannot := func(at hcl.Range, what string, err error) {
		diags = append(diags, &hcl.Diagnostic{
			Severity: hcl.DiagError, Summary: "Cannot read secret", Subject: &at,
			Detail: fmt.Sprintf("%s: %s.%s", what, err, hint),
		})
	}
	for what, s := range res.Host.GitLabRunnerSecrets() {
		value, err := s.Read()
		if err != nil {
			cannot(res.Host.Range, fmt.Sprintf("Host %q, %s", res.Host.Name, what), err)
			continue
		}
		values[s.From] = value
	}
	for i, r := range res.Host.Runners {
		fail := func(what string, err error) { cannot(r.Range, fmt.Sprintf("Runner %q, %s", r.Name, what), err) }
		found := len(diags)
		for what, s := range r.Secrets() {
			value, err := s.Read()
			if err != nil {
				fail(what, err)
				continue
			}
			values[s.From] = value
		}
		if len(diags) > found {
			continue
		}
		token, err := p.Runners[i].Token.Read(read)
		if err == nil {
			err = hostspec.CheckToken(token)
		}
		if err != nil {
			fail("token", err)
		}
	}
	if len(diags) > 0 {
		printDiagnostics(c.App.ErrWriter, res.Files, diags)
		return nil, errDiagnosed
	}
	return read, nil
}
