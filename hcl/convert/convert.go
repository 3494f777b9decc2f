// Package convert turns GitLab Runner's config.toml into a host spec that does the same: that of a docker+machine runner, of the
// predecessor's plugin, or of another executor whose jobs can run in a VM. What has no place in a spec stands in it as a comment. Secrets
// never do: the spec refers to the files that they belong into. It is pure: text in, text out.
package convert

import (
	"errors"
	"fmt"
	"strings"

	"github.com/BurntSushi/toml"
	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclwrite"

	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

// DefaultSecretsDir is where a spec looks for secrets unless Options name another folder.
const DefaultSecretsDir = "/run/secrets"

// Options of Convert.
type Options struct {
	// Name is what messages and comments call the source: "config.toml".
	Name string
	// SpecName is what diagnostics call the result: "host.hcl".
	SpecName string
	// Machine becomes the host block's label if it can be one.
	Machine string
	// EgressInterface is for a source that does not name one. If both are empty, the spec has an example.
	EgressInterface string
	// Arch is this machine's GOARCH. The predecessor's images have it; elsewhere the source does not say what its machines are.
	Arch string
	// SecretsDir is the absolute path of the folder that the spec's secrets are read from. If it is set, the caller writes Result.Secrets
	// there, and the spec's comments say so.
	SecretsDir string
}

// Result is what Convert made of a config.toml.
type Result struct {
	Spec    []byte
	Secrets []Secret
	// Runners is how many runner blocks the spec has, Left how many keys or tables of the source are only comments in it.
	Runners, Left int
	// Warnings are what validate says about the spec. Their ranges are in Files.
	Warnings hcl.Diagnostics
	Files    map[string]*hcl.File
}

// Secret is a value of the source, and the file that the spec reads it from.
type Secret struct {
	Path string
	// Value must not be shown or logged.
	Value string
}

// Convert makes a spec of the text of a config.toml. The spec is valid. Errors name the line of a syntax error, or the runner and its key;
// they hold no secret.
func Convert(src []byte, o Options) (*Result, error) {
	var doc map[string]any
	if _, err := toml.Decode(string(src), &doc); err != nil {
		return nil, syntaxError(err, string(src), o.Name)
	}
	dropped := map[string]string{}
	for {
		c := &converter{opts: o, dropped: dropped, labels: map[string]bool{}}
		if err := c.convert(doc); err != nil {
			return nil, fmt.Errorf("%s: %w", o.Name, c.maskError(err))
		}
		text := hclwrite.Format([]byte(strings.Join(c.out.lines, "\n") + "\n"))
		res, diags := hostspec.Load(hostspec.Options{Path: o.SpecName, Source: text, AnyHost: true})
		again, err := c.drop(diags)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", o.Name, c.maskError(err))
		}
		if again {
			continue // each round leaves out one more place of a source that has a limited number of them
		}
		return &Result{Spec: text, Secrets: c.secrets, Runners: c.runners, Left: c.left, Warnings: diags, Files: res.Files}, nil
	}
}

// syntaxError is an error of the TOML parser, without what it quotes of the source: that may be a secret.
func syntaxError(err error, src, name string) error {
	var pe toml.ParseError
	if !errors.As(err, &pe) {
		return fmt.Errorf("%s is not valid TOML", name)
	}
	message := quotedText.ReplaceAllStringFunc(pe.Message, func(quoted string) string {
		if len([]rune(quoted)) <= len(`"\n"`) {
			return quoted // a character
		}
		return `"…"`
	})
	if strings.Contains(pe.Message, "Key '") { // the parser's words for a key, which is no secret
		message = pe.Message
	}
	// Its Line is already the next one where a line's end is what is wrong.
	line := 1 + strings.Count(src[:min(max(pe.Position.Start, 0), len(src))], "\n")
	return fmt.Errorf("%s:%d: not valid TOML: %s", name, line, mask(message))
}

// converter is one attempt at a spec.
type converter struct {
	opts    Options
	dropped map[string]string // why the spec cannot have the values at these places of the source
	out     writer
	secrets []Secret
	// secretFiles are the files of all secrets, also of those that the source leaves empty; secretPrefix is what their names begin with.
	secretFiles  []string
	secretPrefix string
	labels       map[string]bool // of the runners and pools
	runners      int
	left         int // places of the source that are only comments
}

// drop notes the places of the source that validate refuses or has no use for, so that the next attempt makes comments of them. It reports
// whether there are any. Errors about a place that a spec cannot do without are returned.
func (c *converter) drop(diags hcl.Diagnostics) (bool, error) {
	again := false
	var errs []error
	for _, d := range diags {
		tag := tag{}
		if d.Subject != nil {
			tag = c.out.tagOf(d.Subject.Start.Line)
		}
		useless := d.Severity == hcl.DiagError || d.Summary == "Unknown setting" || d.Summary == "A setting without effect" || d.Summary == "Folder is not kept"
		switch {
		case !useless:
		case tag.place != "" && c.dropped[tag.place] == "":
			c.dropped[tag.place] = d.Detail
			again = true
		case d.Severity == hcl.DiagError && tag.needed != "":
			errs = append(errs, fmt.Errorf("%s: %s", tag.needed, mask(d.Detail)))
		case d.Severity == hcl.DiagError:
			errs = append(errs, fmt.Errorf("%s: %s", d.Summary, mask(d.Detail)))
		}
	}
	if again {
		return true, nil
	}
	return false, errors.Join(errs...)
}

// convert writes the whole spec.
func (c *converter) convert(doc map[string]any) error {
	global := newTable(place{}, doc)
	runners, err := c.readRunners(global)
	if err != nil {
		return err
	}
	if err := c.shareHost(runners); err != nil {
		return err
	}
	c.header()
	c.host(global, runners)
	c.images(runners)
	for _, r := range runners {
		if r.cannot == "" {
			c.runners++
			c.pool(r)
			c.runner(r)
		}
	}
	for _, r := range runners {
		if r.cannot != "" {
			c.out.line("")
			c.leave("[[runners]]", "", r.all, r.cannot)
		}
	}
	return nil
}

func (c *converter) header() {
	c.out.note("Written by fleetingd convert from " + c.opts.Name + ". Settings that a spec has no place for are in comments where they would be. " +
		"Read each of them: jobs may depend on it.")
	c.out.note("")
	if c.opts.SecretsDir != "" {
		c.out.note("It holds no secrets. fleetingd convert has written each one to the file named below, with mode 0600.")
	} else {
		c.out.note("It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at once:")
		c.out.line("#   fleetingd convert " + oneLine(c.opts.Name) + " --secrets-dir /etc/fleetingd/secrets -o " + oneLine(c.opts.SpecName))
	}
}

// leave makes a comment of a value that the spec does not have.
// It stood under a header of the source, and under a key there; without a key, the value is what the table has.
func (c *converter) leave(header, key string, value any, why string) {
	c.left++
	c.out.left(header, tomlText(key, value), why)
}
