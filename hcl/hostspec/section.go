package hostspec

import (
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
)

// attrSpec is an attribute that a block may have. The example is what messages
// tell people to write.
type attrSpec struct {
	name, example string
	required      bool
}

// attrKey is an attribute of a decoded block, owner being the pointer to its
// struct. The name "" is the block itself, "label" its label.
type attrKey struct {
	owner any
	name  string
}

// attrInfo says where an attribute is, and whether its value could be used.
type attrInfo struct {
	rng   hcl.Range
	ok    bool
	elems []hcl.Range    // of a list's elements
	expr  hcl.Expression // of a setting
}

// at is the place to point to for an attribute: its value, or its block where it is not there.
func (l *loader) at(owner any, name string) *hcl.Range {
	if a, ok := l.attrs[attrKey{owner, name}]; ok {
		return &a.rng
	}
	if a, ok := l.attrs[attrKey{owner, ""}]; ok {
		return &a.rng
	}
	return nil
}

// atElem is at for the i-th element of a list.
func (l *loader) atElem(owner any, name string, i int) *hcl.Range {
	if a := l.attrs[attrKey{owner, name}]; i < len(a.elems) {
		return &a.elems[i]
	}
	return l.at(owner, name)
}

// ok reports whether an attribute was given a value that could be used.
func (l *loader) ok(owner any, name string) bool { return l.attrs[attrKey{owner, name}].ok }

// section is one block while it is decoded.
type section struct {
	l       *loader
	owner   any
	what    string // `pool "small"`
	content *hcl.BodyContent
	attrs   []attrSpec
}

// open reads a block by its attributes and the blocks within.
func (l *loader) open(b *hcl.Block, owner any, attrs []attrSpec, blocks ...hcl.BlockHeaderSchema) *section {
	s := &section{l: l, owner: owner, what: blockName(b), attrs: attrs}
	if l.opened != nil {
		l.opened(b, attrs, blocks)
	}
	content, diags := b.Body.Content(schemaOf(attrs, blocks...))
	l.diags = append(l.diags, explain(diags, s.what, attrs, blocks)...)
	s.content = content
	l.attrs[attrKey{owner, ""}] = attrInfo{rng: b.DefRange, ok: true}
	if len(b.LabelRanges) > 0 {
		l.attrs[attrKey{owner, "label"}] = attrInfo{rng: b.LabelRanges[0], ok: true}
	}
	for _, a := range attrs {
		if a.required && content.Attributes[a.name] == nil {
			l.errorf(&b.DefRange, "Missing attribute", "%s needs %s. Write, for example: %s = %s", s.what, a.name, a.name, a.example)
		}
	}
	return s
}

func schemaOf(attrs []attrSpec, blocks ...hcl.BlockHeaderSchema) *hcl.BodySchema {
	schema := &hcl.BodySchema{Blocks: blocks}
	for _, a := range attrs {
		schema.Attributes = append(schema.Attributes, hcl.AttributeSchema{Name: a.name})
	}
	return schema
}

// labelExamples are labels of the blocks that have one.
var labelExamples = map[string]string{
	"variable": "gitlab_url", "host": "metal-01", "image": "ubuntu", "pool": "small", "runner": "small",
	"egress": "artifact-store", "hypervisor": "qemu", "file": "/etc/motd", "package": "gitlab-runner",
}

// blockExample is how a block begins: `egress "artifact-store" {`.
func blockExample(b hcl.BlockHeaderSchema) string {
	if len(b.LabelNames) == 0 {
		return b.Type + " {"
	}
	return fmt.Sprintf("%s %q {", b.Type, labelExamples[b.Type])
}

// explain adds to HCL's findings about unknown names which ones are known, and to those about labels what to write.
func explain(diags hcl.Diagnostics, what string, attrs []attrSpec, blocks []hcl.BlockHeaderSchema) hcl.Diagnostics {
	var names []string
	for _, a := range attrs {
		names = append(names, a.name)
	}
	for _, b := range blocks {
		names = append(names, blockExample(b)+" }")
	}
	for _, d := range diags {
		unknown := d.Summary == "Unsupported argument" || d.Summary == "Unsupported block type" || d.Summary == "Extraneous JSON object property"
		if unknown && !strings.Contains(d.Detail, "Did you mean") {
			d.Detail += fmt.Sprintf(" %s may have: %s.", what, strings.Join(names, ", "))
		}
		for _, b := range blocks {
			if d.Summary == "Extraneous label for "+b.Type || len(b.LabelNames) > 0 && d.Summary == "Missing "+b.LabelNames[0]+" for "+b.Type {
				d.Detail += " Write, for example: " + blockExample(b)
			}
		}
	}
	return diags
}

func blockName(b *hcl.Block) string {
	name := b.Type
	for _, label := range b.Labels {
		name += " " + quote(label)
	}
	return name
}

// one is the only block of a type, or nil; more than one is a finding.
func (s *section) one(typ string) *hcl.Block {
	blocks := s.content.Blocks.OfType(typ)
	if len(blocks) == 0 {
		return nil
	}
	for _, b := range blocks[1:] {
		s.l.errorf(&b.DefRange, "Duplicate block", "%s already has a %s block at %s; only one is allowed.", s.what, typ, blocks[0].DefRange)
	}
	return blocks[0]
}

// fail says that an attribute's value is of no use, and what would be.
func (s *section) fail(a *hcl.Attribute, at *hcl.Range, format string, args ...any) {
	if at == nil {
		at = a.Expr.Range().Ptr()
	}
	text := fmt.Sprintf(format, args...)
	if !strings.HasPrefix(text, a.Name+" ") {
		text = capital(text)
	}
	s.l.errorf(at, "Invalid "+a.Name, "%s.", text)
}

func (s *section) example(name string) string {
	i := slices.IndexFunc(s.attrs, func(a attrSpec) bool { return a.name == name })
	return name + " = " + s.attrs[i].example
}

// value evaluates an attribute that is written to the plan; nil where it is not given, is null, or is of no use.
func (s *section) value(name string) (*hcl.Attribute, *cty.Value) {
	a, v := s.valueWithSecrets(name)
	if v == nil {
		return a, nil
	}
	bare, _ := v.UnmarkDeep()
	if holdsSecret(*v) || s.l.tokens.anyIn(bare) {
		s.fail(a, nil, "%s", misplaced(name))
		return a, nil
	}
	return a, &bare
}

// valueWithSecrets is value for an attribute that takes secrets: the value has its marks.
func (s *section) valueWithSecrets(name string) (*hcl.Attribute, *cty.Value) {
	a := s.content.Attributes[name]
	if a == nil {
		return nil, nil
	}
	key := attrKey{s.owner, name}
	s.l.attrs[key] = attrInfo{rng: a.Expr.Range()}
	val, ok := s.l.eval(a.Expr)
	if !ok {
		return a, nil
	}
	if val.IsNull() {
		// As in Terraform, null is as if it were not written.
		delete(s.l.attrs, key)
		if s.required(name) {
			s.l.errorf(a.Expr.Range().Ptr(), "Missing attribute", "%s needs %s; got null. Write, for example: %s",
				s.what, name, s.example(name))
		}
		return a, nil
	}
	return a, &val
}

func (s *section) required(name string) bool {
	return slices.ContainsFunc(s.attrs, func(a attrSpec) bool { return a.name == name && a.required })
}

// done notes that an attribute's value can be used.
func (s *section) done(a *hcl.Attribute, elems ...hcl.Range) {
	s.l.attrs[attrKey{s.owner, a.Name}] = attrInfo{rng: a.Expr.Range(), ok: true, elems: elems}
}

// kindName names a type as an administrator would: HCL tells tuples from lists and objects from maps, and a spec does not.
func kindName(t cty.Type) string {
	switch {
	case t == cty.Bool:
		return "boolean"
	case t.IsTupleType():
		return "list"
	case t.IsObjectType():
		return "map"
	}
	return t.FriendlyName()
}

// scalar is an attribute as a value of a primitive type.
func (s *section) scalar(name string, want cty.Type) (*hcl.Attribute, *cty.Value) {
	a, val := s.value(name)
	if val == nil {
		return nil, nil
	}
	conv, err := convert.Convert(*val, want)
	if want == cty.String {
		conv, err = s.asText(a, a.Expr, *val)
	}
	if errors.Is(err, errFound) {
		return nil, nil
	}
	if err != nil || conv.IsNull() {
		s.fail(a, nil, "%s must be a %s; got a %s. Write, for example: %s",
			name, kindName(want), kindName(val.Type()), s.example(name))
		return nil, nil
	}
	return a, &conv
}

func (s *section) text(name string, to *string) {
	if a, v := s.scalar(name, cty.String); v != nil {
		*to = v.AsString()
		s.done(a)
	}
}

// textOrSecret is a text that may hold secrets; then it is put into secret, and to is left alone.
func (s *section) textOrSecret(name string, to *string, secret *Text) {
	a, v := s.valueWithSecrets(name)
	if v == nil {
		return
	}
	if err := s.l.tokens.account(*v); err != nil {
		s.fail(a, nil, "%v", err)
		return
	}
	bare, _ := v.UnmarkDeep()
	conv, err := s.asText(a, a.Expr, bare)
	if errors.Is(err, errFound) {
		return
	}
	if err != nil || conv.IsNull() {
		s.fail(a, nil, "%s must be a string; got a %s. Write, for example: %s", name, kindName(bare.Type()), s.example(name))
		return
	}
	if text := conv.AsString(); s.l.tokens.holds(text) {
		*secret = s.l.tokens.split(text)
	} else {
		*to = text
	}
	s.done(a)
}

func (s *section) boolean(name string, to *bool) {
	if a, v := s.scalar(name, cty.Bool); v != nil {
		*to = v.True()
		s.done(a)
	}
}

func (s *section) integer(name string, to *int) {
	a, v := s.scalar(name, cty.Number)
	if v == nil {
		return
	}
	n, acc := v.AsBigFloat().Int64()
	if acc != big.Exact || n < -1<<31 || n >= 1<<31 {
		s.fail(a, nil, "%s must be a whole number, such as %s", name, s.example(name))
		return
	}
	*to = int(n)
	s.done(a)
}

func (s *section) float(name string, to *float64) {
	if a, v := s.scalar(name, cty.Number); v != nil {
		*to, _ = v.AsBigFloat().Float64()
		s.done(a)
	}
}

// parsed is an attribute whose text has a syntax of its own.
func parsed[T any](s *section, name string, parse func(string) (T, error), to *T) {
	a, v := s.scalar(name, cty.String)
	if v == nil {
		return
	}
	got, err := parse(v.AsString())
	if err != nil {
		s.fail(a, nil, "%s: %v", quote(v.AsString()), err)
		return
	}
	*to = got
	s.done(a)
}

func (s *section) size(name string, to *int64)             { parsed(s, name, parseSize, to) }
func (s *section) duration(name string, to *time.Duration) { parsed(s, name, parseDuration, to) }

// parsedList is a list of such texts.
func parsedList[T any](s *section, name string, parse func(string) (T, error), to *[]T) {
	a, v := s.value(name)
	if v == nil {
		return
	}
	t := v.Type()
	if t == cty.String {
		s.fail(a, nil, "%s must be a list: write %s = [%s]", name, name, quote(v.AsString()))
		return
	}
	if !t.IsListType() && !t.IsTupleType() && !t.IsSetType() {
		s.fail(a, nil, "%s must be a list; got a %s. Write, for example: %s", name, kindName(t), s.example(name))
		return
	}
	values, exprs := v.AsValueSlice(), elements(a.Expr, v.LengthInt())
	ranges := make([]hcl.Range, len(exprs))
	list, ok := make([]T, 0, len(values)), true
	for i, e := range values {
		ranges[i] = exprs[i].Range()
		text, err := s.asText(a, exprs[i], e)
		if errors.Is(err, errFound) {
			ok = false
			continue
		}
		if err != nil || text.IsNull() {
			s.fail(a, &ranges[i], "element %d of the list is %s. Write, for example: %s", i, typeOrNull(e), s.example(name))
			ok = false
			continue
		}
		got, err := parse(text.AsString())
		if err != nil {
			s.fail(a, &ranges[i], "%s: %v", quote(text.AsString()), err)
			ok = false
			continue
		}
		list = append(list, got)
	}
	if ok {
		*to = list
		s.done(a, ranges...)
	}
}

func typeOrNull(v cty.Value) string {
	if v.IsNull() {
		return "null"
	}
	return v.Type().FriendlyName()
}

func (s *section) texts(name string, to *[]string) {
	parsedList(s, name, func(t string) (string, error) { return t, nil }, to)
}

// elements are the expressions of n elements: each one's own if the list is written out, else the whole expression.
func elements(expr hcl.Expression, n int) []hcl.Expression {
	if exprs, diags := hcl.ExprList(expr); !diags.HasErrors() && len(exprs) == n {
		return exprs
	}
	return slices.Repeat([]hcl.Expression{expr}, n)
}

// reference is an attribute such as image.ubuntu: the name after the dot.
func (s *section) reference(name string, to *string) {
	a := s.content.Attributes[name]
	if a == nil {
		return
	}
	s.l.attrs[attrKey{s.owner, name}] = attrInfo{rng: a.Expr.Range()}
	var traversal hcl.Traversal
	if expr := unwrap(a.Expr); expr != nil {
		traversal, _ = hcl.AbsTraversalForExpr(expr)
	} else if text, ok := jsonString(a.Expr); ok {
		traversal, _ = hclsyntax.ParseTraversalAbs([]byte(text), "", hcl.InitialPos)
	}
	if got, ok := member(traversal, name); ok && len(traversal) == 2 {
		*to = got
		s.done(a)
		return
	}
	write := s.example(name)
	if text, ok := quotedText(a.Expr); ok && nameSyntax.MatchString(text) {
		write = fmt.Sprintf("%s = %s.%s", name, name, text)
	}
	s.fail(a, nil, "write the name of %s %s block: %s", article(name), name, write)
}

// quotedText is a string that is written out, in either syntax.
func quotedText(expr hcl.Expression) (string, bool) {
	if text, ok := jsonString(expr); ok {
		return text, true
	}
	if t, ok := expr.(*hclsyntax.TemplateExpr); !ok || !t.IsStringLiteral() {
		return "", false
	}
	val, _ := expr.Value(nil)
	return val.AsString(), true
}

// unwrap takes parentheses and "${…}" off an expression that is written out; nil for
// a plain string in JSON syntax.
func unwrap(expr hcl.Expression) hclsyntax.Expression {
	native, ok := expr.(hclsyntax.Expression)
	if !ok {
		text, ok := jsonString(expr)
		if !ok {
			return nil
		}
		parsed, diags := hclsyntax.ParseTemplate([]byte(text), expr.Range().Filename, expr.Range().Start)
		if _, wraps := parsed.(*hclsyntax.TemplateWrapExpr); diags.HasErrors() || !wraps {
			return nil
		}
		native = parsed
	}
	for {
		switch e := native.(type) {
		case *hclsyntax.ParenthesesExpr:
			native = e.Expression
		case *hclsyntax.TemplateWrapExpr:
			native = e.Wrapped
		default:
			return native
		}
	}
}

func article(noun string) string {
	if strings.ContainsRune("aeiou", rune(noun[0])) {
		return "an"
	}
	return "a"
}

// capital begins a sentence.
func capital(s string) string {
	if s == "" || s[0] < 'a' || s[0] > 'z' {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:]
}
