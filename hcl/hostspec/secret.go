package hostspec

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"iter"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
)

// Expressions never evaluate to a secret. file() with an absolute path, env() and sensitive variables evaluate to a token
// instead: a word that only this loader can make, and that templates and functions carry along. Where an attribute takes
// secrets, its text is split at the tokens; everywhere else a token is a finding. Functions that need the text itself
// refuse tokens (see noSecrets), so a token is never cut, compared or rewritten.

// maxSecret is the size limit of a secret, in bytes: a bundle of certificates fits.
const maxSecret = maxFile

const secretForms = `Write token = file("/run/secrets/gitlab-token"), token = env("NAME"), or token = var.NAME ` +
	`with a variable that is set from outside`

// Secret is a reference to a secret, and its reader. The value is in no field:
// a Host can be printed.
type Secret struct {
	// From is "file:/run/secrets/x", "env:NAME", "var:name", or "spec:PLACE" for text of a file beside the spec.
	From string
	read func() (string, error)
}

// Read returns the secret without its final newline. It fails where the secret does not exist or is empty; the error
// names the place, never the value.
func (s Secret) Read() (string, error) {
	if s.read == nil {
		return "", errors.New("no secret was given")
	}
	return s.read()
}

// Text is text that holds secrets, in pieces. It never holds a secret's value.
type Text []Piece

// Piece is a part of a Text: a literal, a secret, or, with Op, what a function of the spec makes of the text Of.
type Piece struct {
	Literal string
	Secret  Secret
	Op      string // OpTrimSpace and so on
	Of      Text
}

// The functions that a secret can pass through. They are applied when the secret is read.
const (
	OpTrimSpace    = "trimspace"
	OpChomp        = "chomp"
	OpBase64Encode = "base64encode"
	OpJSONEncode   = "jsonencode" // the text within the quotes of a JSON string
)

// Secrets yields all secrets of the text, in their order.
func (t Text) Secrets() iter.Seq[Secret] {
	return func(yield func(Secret) bool) { t.each(yield) }
}

func (t Text) each(yield func(Secret) bool) bool {
	for _, p := range t {
		if p.Secret.From != "" && !yield(p.Secret) || !p.Of.each(yield) {
			return false
		}
	}
	return true
}

// Secrets yields the secrets of the runner's section in config.toml, each with where it stands: "token", "settings.environment.0".
func (r *Runner) Secrets() iter.Seq2[string, Secret] {
	return func(yield func(string, Secret) bool) {
		if eachSecret("token", r.Token, yield) {
			eachSecret("settings", r.Settings, yield)
		}
	}
}

// GitLabRunnerSecrets yields the secrets of the gitlab_runner block, each with where it stands.
func (h *Host) GitLabRunnerSecrets() iter.Seq2[string, Secret] {
	return func(yield func(string, Secret) bool) { eachSecret("gitlab_runner", h.GitLabRunner, yield) }
}

// PrebuildSecrets yields the secrets of the prebuilds' files.
func (h *Host) PrebuildSecrets() iter.Seq[Secret] {
	return func(yield func(Secret) bool) {
		for _, i := range h.Images {
			if i.Prebuild == nil {
				continue
			}
			for _, f := range i.Prebuild.Files {
				if !f.Secret.each(yield) {
					return
				}
			}
		}
	}
}

// SecretVariables are the names of the environment variables that hold secrets of this host.
func (h *Host) SecretVariables() []string {
	var names []string
	add := func(s Secret) {
		if name, ok := strings.CutPrefix(s.From, "env:"); ok && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	for _, s := range h.GitLabRunnerSecrets() {
		add(s)
	}
	for _, r := range h.Runners {
		for _, s := range r.Secrets() {
			add(s)
		}
	}
	for s := range h.PrebuildSecrets() {
		add(s)
	}
	return names
}

func eachSecret(at string, v any, yield func(string, Secret) bool) bool {
	switch v := v.(type) {
	case Text:
		for s := range v.Secrets() {
			if !yield(at, s) {
				return false
			}
		}
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(v)) {
			if !eachSecret(at+"."+key, v[key], yield) {
				return false
			}
		}
	case []any:
		for i := range v {
			if !eachSecret(at+"."+strconv.Itoa(i), v[i], yield) {
				return false
			}
		}
	}
	return true
}

// Marks of values that are not to be shown.
type (
	// tokenMark is on text that holds, or depends on, the token with this index.
	tokenMark int
	// hiddenMark is on what a sensitive variable says without a text: numbers, keys of a map.
	hiddenMark struct{}
	// fileMark is on text of a file beside the spec, by the path that the spec gives. Such text is part of the spec, and
	// may be used everywhere; settings keep it out of the plan all the same.
	fileMark string
)

func isSecretMark(m any) bool {
	switch m.(type) {
	case tokenMark, hiddenMark:
		return true
	}
	return false
}

// holdsSecret reports whether a value, or anything within, stands for a secret or depends on one.
func holdsSecret(v cty.Value) bool {
	_, paths := v.UnmarkDeepWithPaths()
	for _, p := range paths {
		for m := range p.Marks {
			if isSecretMark(m) {
				return true
			}
		}
	}
	return false
}

// tokens are the stand-ins of one load.
type tokens struct {
	prefix string
	syntax *regexp.Regexp
	pieces []Piece
	index  map[string]int // of a secret, by its From
	bad    map[string]error
}

// newTokens makes tokens that nobody can write into a spec or a variable.
func newTokens() tokens {
	prefix := "@secret:" + rand.Text() + ":"
	return tokens{
		prefix: prefix, syntax: regexp.MustCompile(regexp.QuoteMeta(prefix) + `([0-9]+)@`),
		index: map[string]int{}, bad: map[string]error{},
	}
}

// of gives the token of a secret.
func (t *tokens) of(s Secret) cty.Value {
	i, ok := t.index[s.From]
	if !ok {
		i = len(t.pieces)
		t.index[s.From] = i
		t.pieces = append(t.pieces, Piece{Secret: s})
	}
	return t.value(i)
}

// refuse has everything that uses the token of a secret fail with err.
func (t *tokens) refuse(from string, err error) { t.bad[from] = err }

func (t *tokens) value(i int) cty.Value {
	return cty.StringVal(t.prefix + strconv.Itoa(i) + "@").Mark(tokenMark(i))
}

// apply gives the token of a function's result; text is the function's argument.
func (t *tokens) apply(op, text string) cty.Value {
	of := t.split(text)
	key := fmt.Sprintf("%s(%s)", op, text)
	i, ok := t.index[key]
	if !ok {
		i = len(t.pieces)
		t.index[key] = i
		t.pieces = append(t.pieces, Piece{Op: op, Of: of})
	}
	return t.value(i)
}

// others are the marks of a text without those of the tokens in it.
func (t *tokens) others(marks cty.ValueMarks, text string) cty.ValueMarks {
	rest := maps.Clone(marks)
	for _, m := range t.syntax.FindAllStringSubmatch(text, -1) {
		if i, err := strconv.Atoi(m[1]); err == nil {
			delete(rest, tokenMark(i))
		}
	}
	return rest
}

// anyIn reports whether a value without marks has a token in a text or a key.
func (t *tokens) anyIn(bare cty.Value) bool {
	found := false
	_ = cty.Walk(bare, func(_ cty.Path, v cty.Value) (bool, error) {
		found = found || v.Type() == cty.String && v.IsKnown() && !v.IsNull() && t.holds(v.AsString()) || t.inKey(v)
		return !found, nil
	})
	return found
}

// inKey reports whether a key of a map, or the name of an object's attribute, holds a token.
func (t *tokens) inKey(v cty.Value) bool {
	if typ := v.Type(); !typ.IsMapType() && !typ.IsObjectType() || !v.IsKnown() || v.IsNull() {
		return false
	}
	for key := range v.AsValueMap() {
		if t.holds(key) {
			return true
		}
	}
	return false
}

// split cuts text at its tokens.
func (t *tokens) split(text string) Text {
	var pieces Text
	at := 0
	for _, m := range t.syntax.FindAllStringSubmatchIndex(text, -1) {
		i, err := strconv.Atoi(text[m[2]:m[3]])
		if err != nil || i >= len(t.pieces) {
			continue
		}
		if m[0] > at {
			pieces = append(pieces, Piece{Literal: text[at:m[0]]})
		}
		pieces = append(pieces, t.pieces[i])
		at = m[1]
	}
	if at < len(text) {
		pieces = append(pieces, Piece{Literal: text[at:]})
	}
	return pieces
}

// holds reports whether there is a token in a text.
func (t *tokens) holds(text string) bool { return t.syntax.MatchString(text) }

// scrub replaces tokens in messages. A library may have cut one off.
func (t *tokens) scrub(text string) string {
	text = t.syntax.ReplaceAllString(text, "(a secret)")
	if i := strings.Index(text, t.prefix); i >= 0 {
		text = text[:i] + "(a secret)…"
	}
	return text
}

// account checks that a value that depends on secrets holds them as they are: each token that left its mark is in a
// text of the value, and no key, number or size depends on a secret.
func (t *tokens) account(v cty.Value) error {
	bare, paths := v.UnmarkDeepWithPaths()
	found := map[int]bool{}
	var bad error
	_ = cty.Walk(bare, func(_ cty.Path, v cty.Value) (bool, error) {
		if t.inKey(v) {
			bad = errors.New("a secret cannot be a map key")
		}
		if v.Type() == cty.String && v.IsKnown() && !v.IsNull() {
			for _, m := range t.syntax.FindAllStringSubmatch(v.AsString(), -1) {
				if i, err := strconv.Atoi(m[1]); err == nil && i < len(t.pieces) {
					found[i] = true
				}
			}
		}
		return true, nil
	})
	if bad != nil {
		return bad
	}
	for i := range found {
		for s := range (Text{t.pieces[i]}).Secrets() {
			if err := t.bad[s.From]; err != nil {
				return err
			}
		}
	}
	for _, p := range paths {
		for m := range p.Marks {
			switch m := m.(type) {
			case hiddenMark:
				if e, err := p.Path.Apply(bare); err == nil && e.Type() == cty.String && t.holds(e.AsString()) {
					continue // an element of a sensitive map
				}
				return errors.New("only text can be kept secret: declare the sensitive variable as a string, or as an object type with " +
					"string attributes. Numbers, booleans and map keys cannot be secret")
			case tokenMark:
				if !found[int(m)] {
					return errors.New("the value depends on a secret but does not contain it. A secret is read only when it is written, so " +
						"nothing can depend on what it is. Use an ordinary variable for the decision")
				}
			}
		}
	}
	return nil
}

// secret decodes an attribute that says where a secret is. It is not read here: a spec
// can be checked where its secrets are not.
func (s *section) secret(name string, to *Text) {
	a := s.content.Attributes[name]
	if a == nil {
		return
	}
	s.l.attrs[attrKey{s.owner, name}] = attrInfo{rng: a.Expr.Range()}
	got, err := s.l.secretText(a.Expr)
	switch {
	case errors.Is(err, errFound):
	case err != nil:
		s.fail(a, nil, "%v", err)
	default:
		*to = got
		s.done(a)
	}
}

// CheckToken finds what no GitLab token has. Its error does not show the token.
func CheckToken(token string) error {
	for _, r := range token {
		switch {
		case r == '\n' || r == '\r':
			return errors.New("the token has more than one line")
		case unicode.IsSpace(r):
			return errors.New("the token has a blank in or around it")
		case r == '"' || r == '\\' || !unicode.IsPrint(r):
			return errors.New("the token has a quote, a backslash or a control character, which no GitLab token has")
		}
	}
	return nil
}

// errFound stands for findings that are in the diagnostics already.
var errFound = errors.New("found")

// secretText evaluates an expression that must be a secret. Any variable that was set from outside may hold one.
func (l *loader) secretText(expr hcl.Expression) (Text, error) {
	if err := l.relativeFile(expr); err != nil {
		return nil, err
	}
	for _, t := range expr.Variables() {
		if name, ok := member(t, "var"); ok && l.scope.vars[name] != nil && l.scope.vars[name].setAt != nil {
			l.masks = append(l.masks, *l.scope.vars[name].setAt)
		}
	}
	val, ok := l.evalIn(expr, l.scope.secretCtx())
	if !ok {
		l.masks = append(l.masks, expr.Range())
		return nil, errFound
	}
	if err := l.tokens.account(val); err != nil {
		return nil, err
	}
	val, _ = val.UnmarkDeep()
	text, err := convert.Convert(val, cty.String)
	if err != nil || text.IsNull() || !l.tokens.holds(text.AsString()) {
		l.masks = append(l.masks, expr.Range())
		if isLiteral(unwrap(expr)) {
			return nil, fmt.Errorf("everyone who can read the spec, its repository or its plan could read a secret that is written in it. %s", secretForms)
		}
		return nil, fmt.Errorf("a secret is only referred to, so that it is in no plan, state or log. %s", secretForms)
	}
	return l.tokens.split(text.AsString()), nil
}

// relativeFile refuses file("relative/path") as the whole of a secret: it would be part of the spec and of its repository.
func (l *loader) relativeFile(expr hcl.Expression) error {
	native := unwrap(expr)
	for {
		call, ok := native.(*hclsyntax.FunctionCallExpr)
		if !ok || len(call.Args) != 1 || call.ExpandFinal {
			return nil
		}
		switch call.Name {
		case "trimspace", "chomp":
			native = unwrap(call.Args[0])
			continue
		case "file":
		default:
			return nil
		}
		val, diags := l.value(call.Args[0], l.scope.ctx)
		if diags.HasErrors() || val.IsMarked() || val.Type() != cty.String || !val.IsKnown() || val.IsNull() || val.AsString() == "" {
			return nil
		}
		if path := val.AsString(); !filepath.IsAbs(path) {
			return fmt.Errorf("the token's file is read when the spec is applied, on the host, so its path must be absolute: "+
				"write file(%q), for example", "/run/secrets/"+filepath.Base(path))
		}
		return nil
	}
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

// fileSecret is file() with an absolute path.
func fileSecret(path string) Secret {
	path = filepath.Clean(path)
	return Secret{From: "file:" + path, read: func() (string, error) {
		b, err := readRegular(path, maxSecret)
		if err != nil {
			return "", fmt.Errorf("cannot read the secret in %s: %w", path, err)
		}
		return trimSecret(string(b), path)
	}}
}

// ReadSecret reads the secret of a prebuild by its place, without a spec: on the host, where the image is built. A variable
// is then looked for in the environment alone. Env is "NAME=value" lines as os.Environ gives them.
func ReadSecret(from string, env []string) (string, error) {
	kind, place, _ := strings.Cut(from, ":")
	switch kind {
	case "file":
		return fileSecret(place).Read()
	case "env":
		return envSecret(environ(env), place).Read()
	case "var":
		name := envVarPrefix + place
		value, ok := environ(env)[name]
		if !ok {
			return "", fmt.Errorf("the spec takes it from the variable %q, which is not known when images are built on the host: "+
				"set %s in the environment of gitlab-runner.service and fleetingd-refresh.service, or write file(\"/run/secrets/…\") in the spec", place, name)
		}
		return trimSecret(value, "the environment's "+name)
	}
	return "", fmt.Errorf("a secret from %q can only be read with the spec", from)
}

// envSecret is env().
func envSecret(env map[string]string, name string) Secret {
	value, ok := env[name]
	return Secret{From: "env:" + name, read: func() (string, error) {
		if !ok {
			return "", fmt.Errorf("the environment has no %s, which the spec names as a secret: set it", name)
		}
		return trimSecret(value, "the environment's "+name)
	}}
}

// hide replaces all text of a variable's value by tokens, and everything else by unknown values: after it nothing of
// a sensitive variable can come out of an expression. From is "var:name", and gets longer with each step into the value.
func (l *loader) hide(v *variable, val cty.Value, from string) cty.Value {
	t := val.Type()
	switch {
	case t == cty.String, t == cty.DynamicPseudoType && val.IsKnown() && val.IsNull():
		if !val.IsKnown() {
			return val
		}
		return l.hideText(v, val, from)
	case !val.IsKnown(), val.IsNull():
		return val
	case t.IsPrimitiveType():
		return cty.UnknownVal(t).Mark(hiddenMark{})
	case t.IsObjectType():
		elems := map[string]cty.Value{}
		for name, e := range val.AsValueMap() {
			elems[name] = l.hide(v, e, from+"."+name)
		}
		if v.typ.HasDynamicTypes() { // the names come from the value
			return cty.ObjectVal(elems).Mark(hiddenMark{})
		}
		return cty.ObjectVal(elems)
	case t.IsMapType():
		elems := map[string]cty.Value{}
		for name, e := range val.AsValueMap() {
			elems[name] = l.hide(v, e, from+"."+name)
		}
		if len(elems) == 0 {
			return val.Mark(hiddenMark{})
		}
		return cty.MapVal(elems).Mark(hiddenMark{})
	case val.LengthInt() == 0:
		return val
	}
	var elems []cty.Value
	for i, e := range val.AsValueSlice() {
		elems = append(elems, l.hide(v, e, from+"."+strconv.Itoa(i)))
	}
	switch {
	case t.IsListType():
		return cty.ListVal(elems)
	case t.IsSetType():
		return cty.SetVal(elems)
	}
	return cty.TupleVal(elems)
}

func (l *loader) hideText(v *variable, val cty.Value, from string) cty.Value {
	if val.IsNull() { // default = null: the spec can be checked without it
		return l.tokens.of(Secret{From: from, read: func() (string, error) {
			return "", fmt.Errorf("the variable %q, which the spec names as a secret, is not set: set it with %s%s or --var-file",
				v.name, envVarPrefix, v.name)
		}})
	}
	if v.byDefault {
		l.tokens.refuse(from, fmt.Errorf("the variable %q is not set, and everyone who can read the spec can read its default. "+
			"Omit the default, and set the variable with %s%s or --var-file", v.name, envVarPrefix, v.name))
	}
	secret := val.AsString()
	return l.tokens.of(Secret{From: from, read: func() (string, error) {
		return trimSecret(secret, "the variable "+v.name)
	}})
}

// secretCtx is what the expression of a secret is evaluated in: there all variables are sensitive.
func (s *scope) secretCtx() *hcl.EvalContext {
	vars := maps.Clone(s.ctx.Variables)
	vars["var"] = s.hidden
	return &hcl.EvalContext{Variables: vars, Functions: s.ctx.Functions}
}

// trimSecret takes one final newline off, which editors and echo add.
func trimSecret(s, where string) (string, error) {
	s = strings.TrimSuffix(strings.TrimSuffix(s, "\n"), "\r")
	switch {
	case s == "":
		return "", fmt.Errorf("the secret in %s is empty", where)
	case len(s) > maxSecret:
		return "", fmt.Errorf("the secret in %s is larger than %d KiB", where, maxSecret>>10)
	case !utf8.ValidString(s) || strings.ContainsRune(s, 0):
		return "", fmt.Errorf("the secret in %s is not text in UTF-8", where)
	}
	return s, nil
}

// misplaced is why an attribute cannot have a value that holds a secret.
func misplaced(name string) string {
	return fmt.Sprintf("the value comes from a secret (env(), file() with an absolute path, or a sensitive variable), and %s is written to the "+
		"plan, which is not secret. Secrets can be used in a runner's token and settings, in gitlab_runner, and in the content of a prebuild's file. For a value that "+
		"is not secret, use an ordinary variable (set it with %sNAME), or a file whose path is relative to the spec", name, envVarPrefix)
}

// decides finds an operator or condition that works on a secret, as far as it is written out: the token
// that it would see says nothing of the secret.
func (l *loader) decides(expr hcl.Expression) bool {
	root, ok := expr.(hclsyntax.Expression)
	if !ok {
		root = unwrap(expr)
	}
	if root == nil {
		return false
	}
	var at *hcl.Range
	_ = hclsyntax.VisitAll(root, func(n hclsyntax.Node) hcl.Diagnostics {
		var operands []hclsyntax.Expression
		switch n := n.(type) {
		case *hclsyntax.ConditionalExpr:
			operands = []hclsyntax.Expression{n.Condition}
		case *hclsyntax.BinaryOpExpr:
			operands = []hclsyntax.Expression{n.LHS, n.RHS}
		case *hclsyntax.UnaryOpExpr:
			operands = []hclsyntax.Expression{n.Val}
		case *hclsyntax.FunctionCallExpr:
			if n.Name == "try" || n.Name == "can" {
				operands = n.Args
			}
		}
		for _, e := range operands {
			if at == nil && l.mentionsSecret(e) {
				at = e.Range().Ptr()
			}
		}
		return nil
	})
	if at == nil {
		return false
	}
	l.errorf(at, "Condition depends on a secret", "A secret is read only when it is written, after this expression has been evaluated. "+
		"Use an ordinary variable for the decision.")
	return true
}

// mentionsSecret reports whether an expression refers to a secret.
func (l *loader) mentionsSecret(expr hcl.Expression) bool {
	for _, t := range expr.Variables() {
		if name, ok := member(t, "var"); ok {
			if v := l.scope.vars[name]; v != nil && v.sensitive {
				return true
			}
			continue
		}
		if name, ok := member(t, "local"); ok {
			if loc := l.scope.locals[name]; loc != nil && holdsSecret(loc.value) {
				return true
			}
			continue
		}
		if len(t) == 1 && t.RootName() == "var" {
			return true // all of them at once
		}
	}
	root, ok := expr.(hclsyntax.Expression)
	if !ok {
		root = unwrap(expr)
	}
	if root == nil {
		return false
	}
	found := false
	_ = hclsyntax.VisitAll(root, func(n hclsyntax.Node) hcl.Diagnostics {
		call, ok := n.(*hclsyntax.FunctionCallExpr)
		switch {
		case !ok:
		case call.Name == "env":
			found = true
		case call.Name == "file" && len(call.Args) == 1:
			path, diags := l.value(call.Args[0], l.scope.ctx)
			path, _ = path.UnmarkDeep()
			if !diags.HasErrors() && path.Type() == cty.String && path.IsKnown() && !path.IsNull() && filepath.IsAbs(path.AsString()) {
				found = true
			}
		}
		return nil
	})
	return found
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
