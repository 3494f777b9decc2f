package hostspec

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
)

// maxSecret is the longest secret, in bytes: far more than any token has.
const maxSecret = 64 << 10

const secretForms = `Write token = file("/run/secrets/gitlab-token"), token = env("NAME"), or token = var.NAME ` +
	`with a variable that is set from outside`

// secret is an attribute that says where a secret is. It is not read here: a spec
// can be checked where its secrets are not.
func (s *section) secret(name string, to *Secret) {
	a := s.content.Attributes[name]
	if a == nil {
		return
	}
	s.l.attrs[attrKey{s.owner, name}] = attrInfo{rng: a.Expr.Range()}
	got, err := s.l.secretRef(a.Expr)
	switch {
	case errors.Is(err, errFound):
	case err != nil:
		s.fail(a, nil, "%v", err)
	default:
		*to = got
		s.done(a)
	}
}

// errFound stands for findings that are in the diagnostics already.
var errFound = errors.New("found")

func (l *loader) secretRef(expr hcl.Expression) (Secret, error) {
	native := unwrap(expr)
	for {
		// Secret.Read takes the final newline off, so these change nothing.
		call, ok := native.(*hclsyntax.FunctionCallExpr)
		if !ok || len(call.Args) != 1 || call.Name != "trimspace" && call.Name != "chomp" {
			break
		}
		native = unwrap(call.Args[0])
	}
	switch e := native.(type) {
	case *hclsyntax.FunctionCallExpr:
		if len(e.Args) == 1 && !e.ExpandFinal {
			switch e.Name {
			case "file":
				return l.secretFile(e.Args[0])
			case "env":
				return l.secretEnv(e.Args[0])
			}
		}
	case *hclsyntax.ScopeTraversalExpr:
		if name, ok := member(e.Traversal, "var"); ok {
			return l.secretVariable(name, e)
		}
	}
	l.masks = append(l.masks, expr.Range())
	if isLiteral(native) {
		return Secret{}, fmt.Errorf("a secret in the spec could be read by all who can read the spec, its repository and its plan. %s", secretForms)
	}
	return Secret{}, fmt.Errorf("a secret is only referred to, so that it is in no plan, state or log. %s", secretForms)
}

func isLiteral(e hclsyntax.Expression) bool {
	if e == nil { // a plain string in JSON
		return true
	}
	if _, call := e.(*hclsyntax.FunctionCallExpr); call {
		return false
	}
	return len(e.Variables()) == 0
}

// secretArg is the text that file() or env() is called with.
func (l *loader) secretArg(arg hcl.Expression) (string, error) {
	val, ok := l.eval(arg)
	if !ok {
		return "", errFound
	}
	text, err := convert.Convert(val, cty.String)
	if err != nil || text.IsNull() || text.IsMarked() || text.AsString() == "" {
		return "", errors.New(secretForms)
	}
	return text.AsString(), nil
}

func (l *loader) secretFile(arg hcl.Expression) (Secret, error) {
	path, err := l.secretArg(arg)
	if err != nil {
		return Secret{}, err
	}
	if !filepath.IsAbs(path) {
		return Secret{}, fmt.Errorf("the token's file is read when the spec is applied, on the host, so its path must be absolute: "+
			"write file(%q), for example", "/run/secrets/"+filepath.Base(path))
	}
	path = filepath.Clean(path)
	return Secret{From: "file:" + path, read: func() (string, error) {
		b, err := readRegular(path, maxSecret)
		if err != nil {
			return "", fmt.Errorf("cannot read the secret in %s: %w", path, err)
		}
		return trimSecret(string(b), path)
	}}, nil
}

func (l *loader) secretEnv(arg hcl.Expression) (Secret, error) {
	name, err := l.secretArg(arg)
	if err != nil {
		return Secret{}, err
	}
	if strings.ContainsAny(name, "=\x00") {
		return Secret{}, fmt.Errorf("%s is no name of an environment variable", quote(name))
	}
	value, ok := l.env[name]
	return Secret{From: "env:" + name, read: func() (string, error) {
		if !ok {
			return "", fmt.Errorf("the environment has no %s, which the spec names as a secret: set it", name)
		}
		return trimSecret(value, "the environment's "+name)
	}}, nil
}

// secretVariable is var.NAME, or an element of it such as var.NAME["key"].
func (l *loader) secretVariable(name string, e *hclsyntax.ScopeTraversalExpr) (Secret, error) {
	v := l.scope.vars[name]
	if v != nil && v.setAt != nil {
		l.masks = append(l.masks, *v.setAt)
	}
	val, ok := l.eval(e)
	if !ok {
		return Secret{}, errFound
	}
	if v.byDefault && !val.IsNull() {
		return Secret{}, fmt.Errorf("the variable %q has its default, and a secret there could be read by all who can read the spec. "+
			"Leave the default away, and set the variable with %s%s or --var-file", name, envVarPrefix, name)
	}
	val, _ = val.Unmark()
	text, err := convert.Convert(val, cty.String)
	if err != nil {
		return Secret{}, fmt.Errorf("the variable %q holds no text here. Set it with %s%s or --var-file", name, envVarPrefix, name)
	}
	from := "var:" + name
	for _, step := range e.Traversal[2:] {
		switch step := step.(type) {
		case hcl.TraverseAttr:
			from += "." + step.Name
		case hcl.TraverseIndex:
			key, err := convert.Convert(step.Key, cty.String)
			if err != nil {
				return Secret{}, errors.New(secretForms)
			}
			from += "." + key.AsString()
		}
	}
	if text.IsNull() { // default = null: the spec can be checked without it
		return Secret{From: from, read: func() (string, error) {
			return "", fmt.Errorf("the variable %q, which the spec names as a secret, is not set: set it with %s%s or --var-file", name, envVarPrefix, name)
		}}, nil
	}
	secret := text.AsString()
	return Secret{From: from, read: func() (string, error) {
		return trimSecret(secret, "the variable "+name)
	}}, nil
}

func trimSecret(s, where string) (string, error) {
	s = strings.TrimSuffix(strings.TrimSuffix(s, "\n"), "\r")
	switch {
	case s == "":
		return "", fmt.Errorf("the secret in %s is empty", where)
	case strings.ContainsAny(s, "\n\r\x00"):
		return "", fmt.Errorf("the secret in %s has more than one line", where)
	}
	return s, nil
}

// maskSecrets overwrites literal secrets in the sources that snippets are shown from.
func (l *loader) maskSecrets() {
	for _, r := range l.masks {
		f := l.files[r.Filename]
		if f == nil || r.Start.Byte < 0 || r.End.Byte > len(f.Bytes) || r.Start.Byte > r.End.Byte {
			continue
		}
		masked := bytes.Clone(f.Bytes)
		for i := r.Start.Byte; i < r.End.Byte; i++ {
			if masked[i] != '\n' {
				masked[i] = '*'
			}
		}
		l.files[r.Filename] = &hcl.File{Body: f.Body, Bytes: masked, Nav: f.Nav}
	}
}
