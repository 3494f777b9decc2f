package hostspec

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/ext/typeexpr"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/convert"
)

const envVarPrefix = "FLEETINGD_VAR_"

// scope is what expressions may refer to.
type scope struct {
	vars   map[string]*variable
	locals map[string]*local
	ctx    *hcl.EvalContext // var, local and functions
	hidden cty.Value        // var with all variables as if they were sensitive

	varNames, localNames []string // in order, for messages
}

type variable struct {
	name      string
	typ       cty.Type
	defaults  *typeexpr.Defaults
	deflt     *hcl.Attribute
	sensitive bool
	value     cty.Value
	byDefault bool       // nothing else has set it
	setAt     *hcl.Range // its value's text, in the spec or a variable file
	rng       hcl.Range
}

type local struct {
	attr  *hcl.Attribute
	value cty.Value
	state int // 0: not looked at, 1: being evaluated, 2: done
}

// defineScope evaluates the variable and locals blocks.
func (l *loader) defineScope(blocks hcl.Blocks) {
	l.scope = scope{vars: map[string]*variable{}, locals: map[string]*local{}}
	l.scope.ctx = &hcl.EvalContext{Variables: map[string]cty.Value{}, Functions: l.functions()}
	for _, b := range blocks.OfType("variable") {
		l.declareVariable(b)
	}
	l.scope.varNames = slices.Sorted(maps.Keys(l.scope.vars))
	l.assignVariables()
	for _, b := range blocks.OfType("locals") {
		l.declareLocals(b)
	}
	l.scope.localNames = slices.Sorted(maps.Keys(l.scope.locals))
	for _, name := range l.scope.localNames {
		l.evalLocal(name, nil)
	}
	l.publishLocals(nil)
}

var variableAttrs = []attrSpec{{name: "type"}, {name: "default"}, {name: "sensitive"}, {name: "description"}}

func (l *loader) declareVariable(b *hcl.Block) {
	v := &variable{name: b.Labels[0], typ: cty.DynamicPseudoType, value: cty.DynamicVal, rng: b.DefRange}
	if !hclsyntax.ValidIdentifier(v.name) {
		l.errorf(&b.LabelRanges[0], "Invalid variable name",
			"%s cannot be written as var.NAME. A name is letters, digits, - and _, and begins with a letter.", quote(v.name))
		return
	}
	if first, ok := l.scope.vars[v.name]; ok {
		l.errorf(&b.LabelRanges[0], "Duplicate variable", "The variable %q is already declared at %s.", v.name, first.rng)
		return
	}
	l.scope.vars[v.name] = v
	content, diags := b.Body.Content(schemaOf(variableAttrs))
	l.diags = append(l.diags, explain(diags, blockName(b), variableAttrs, nil)...)
	if a := content.Attributes["sensitive"]; a != nil {
		l.literal(a, cty.Bool, func(val cty.Value) { v.sensitive = val.True() })
	}
	if a := content.Attributes["description"]; a != nil {
		l.literal(a, cty.String, func(cty.Value) {})
	}
	v.deflt = content.Attributes["default"]
	if v.deflt != nil && v.sensitive {
		l.masks = append(l.masks, v.deflt.Expr.Range())
	}
	if a := content.Attributes["type"]; a != nil {
		if !l.guardType(a.Expr) {
			return
		}
		typ, defaults, diags := typeexpr.TypeConstraintWithDefaults(a.Expr)
		l.diags = append(l.diags, diags...)
		if !diags.HasErrors() {
			v.typ, v.defaults = typ, defaults
		}
	}
}

// literal evaluates an attribute that may refer to nothing.
func (l *loader) literal(a *hcl.Attribute, want cty.Type, set func(cty.Value)) {
	if !l.guardExpr(a.Expr) {
		return
	}
	val, diags := l.value(a.Expr, nil)
	l.diags = append(l.diags, diags...)
	if diags.HasErrors() {
		return
	}
	val, err := convert.Convert(val, want)
	if err != nil || val.IsNull() || !val.IsKnown() {
		l.errorf(a.Expr.Range().Ptr(), "Wrong type", "%q must be a literal %s.", a.Name, want.FriendlyName())
		return
	}
	set(val)
}

// given is a value from outside the spec.
type given struct {
	raw  string         // text from the command line or the environment, where expr is nil
	expr hcl.Expression // from a variable file
	from string         // for messages: `--var`, `FLEETINGD_VAR_x`
	rng  *hcl.Range     // nil for what has no file
}

// assignVariables gives every variable its value; the strongest source wins.
func (l *loader) assignVariables() {
	values := map[string]given{}
	for name := range l.scope.vars {
		if raw, ok := l.env[envVarPrefix+name]; ok {
			values[name] = given{raw: raw, from: envVarPrefix + name}
		}
	}
	for _, path := range l.opts.VarFiles {
		l.readVarFile(path, values)
	}
	for _, s := range l.opts.Vars {
		l.readVarFlag(s, values)
	}
	object, hidden := map[string]cty.Value{}, map[string]cty.Value{}
	for _, name := range l.scope.varNames {
		v := l.scope.vars[name]
		g, ok := values[name]
		v.byDefault, v.setAt = !ok, g.rng
		if !ok && v.deflt != nil {
			v.setAt = v.deflt.Expr.Range().Ptr()
		}
		v.value = l.variableValue(v, g, ok)
		hidden[name] = l.hide(v, v.value, "var:"+name)
		if v.sensitive {
			v.value = hidden[name]
		}
		object[name] = v.value
	}
	l.scope.ctx.Variables["var"] = cty.ObjectVal(object)
	l.scope.hidden = cty.ObjectVal(hidden)
}

func (l *loader) readVarFlag(s string, values map[string]given) {
	name, raw, ok := strings.Cut(s, "=")
	if !ok {
		l.errorf(nil, "Invalid --var", "%s has no \"=\". Write --var name=value.", quote(s))
		return
	}
	name = strings.TrimSpace(name)
	v, ok := l.scope.vars[name]
	if !ok {
		l.errorf(nil, "Unknown variable", "--var sets %s, but %s declares no such variable%s. %s",
			quote(name), l.opts.Path, l.didYouMean(name, l.scope.varNames), l.declaredVariables())
		return
	}
	if v.sensitive {
		l.warnf(&v.rng, "Secret on the command line", "Every user of this machine can read --var %s=… in the process list. "+
			"Write %s%s in the environment, or use --var-file.", name, envVarPrefix, name)
	}
	values[name] = given{raw: raw, from: "--var " + name}
}

func (l *loader) readVarFile(path string, values map[string]given) {
	known := len(l.diags)
	body := l.parse(path, nil)
	if body == nil {
		l.hideFile(path, l.diags[known:])
		return
	}
	attrs, diags := body.JustAttributes()
	if diags.HasErrors() {
		l.hideFile(path, diags)
	}
	l.diags = append(l.diags, diags...)
	for _, a := range sortedAttrs(attrs) {
		v, ok := l.scope.vars[a.Name]
		if !ok {
			l.masks = append(l.masks, a.Expr.Range()) // a misspelled name may be a secret's
			l.warnf(&a.NameRange, "Unknown variable", "%s declares no variable %q%s. %s", l.opts.Path, a.Name,
				l.didYouMean(a.Name, l.scope.varNames), l.declaredVariables())
			continue
		}
		if v.sensitive {
			l.masks = append(l.masks, a.Expr.Range())
		}
		values[a.Name] = given{expr: a.Expr, from: path, rng: a.Expr.Range().Ptr()}
	}
}

// hideFile hides the text of a variable file that cannot be read as one: any line of it may be a secret.
func (l *loader) hideFile(path string, diags hcl.Diagnostics) {
	f := l.files[path]
	if f == nil {
		return // it could not even be opened
	}
	l.masks = append(l.masks, hcl.Range{Filename: path, End: hcl.Pos{Byte: len(f.Bytes)}})
	if strings.HasSuffix(path, ".json") { // the JSON parser quotes what it did not expect
		for _, d := range diags {
			d.Detail = "This is not valid JSON. The text is not shown, because a variable file may hold secrets."
		}
	}
}

// variableValue is the value of one variable, or unknown after a finding: what
// refers to it then gives no second one.
func (l *loader) variableValue(v *variable, g given, isGiven bool) cty.Value {
	unknown := cty.DynamicVal
	var val cty.Value
	switch {
	case isGiven && g.expr != nil:
		if !l.guardExpr(g.expr) {
			return unknown
		}
		var diags hcl.Diagnostics
		val, diags = l.value(g.expr, nil)
		l.diags = append(l.diags, l.withhold(diags, v.sensitive)...)
		if diags.HasErrors() {
			return unknown
		}
	case isGiven:
		var err error
		if val, err = l.parseGiven(v, g.raw); err != nil {
			l.errorf(&v.rng, "Invalid value for a variable", "%s: %v", g.from, err)
			return unknown
		}
	case v.deflt != nil:
		g = given{from: "its default", rng: v.deflt.Expr.Range().Ptr()}
		if !l.guardExpr(v.deflt.Expr) {
			return unknown
		}
		var diags hcl.Diagnostics
		val, diags = l.value(v.deflt.Expr, nil)
		l.diags = append(l.diags, l.withhold(diags, v.sensitive)...)
		if diags.HasErrors() {
			return unknown
		}
	default:
		l.errorf(&v.rng, "No value for a variable", "The variable %q has no default and was not set. "+
			"Set it with --var %s=VALUE, in a --var-file, or with %s%s in the environment.", v.name, v.name, envVarPrefix, v.name)
		return unknown
	}
	if v.defaults != nil && !val.IsNull() {
		val = v.defaults.Apply(val)
	}
	conv, err := convert.Convert(val, v.typ)
	if err != nil {
		at := g.rng
		if at == nil {
			at = &v.rng
		}
		l.errorf(at, "Wrong type for a variable", "The variable %q is declared as %s, and the value from %s does not fit: %v.",
			v.name, typeexpr.TypeString(v.typ), g.from, err)
		return unknown
	}
	if n := valueSize(conv); n > maxValue {
		l.errorf(&v.rng, "Too large a value", "The value of the variable %q has a size of %d; the most is %d.", v.name, n, maxValue)
		return unknown
	}
	return conv
}

// parseGiven reads a value from the command line or the environment: as it stands
// for a plain type, as an expression for a list, map or object.
func (l *loader) parseGiven(v *variable, raw string) (cty.Value, error) {
	if err := checkText(raw); err != nil {
		return cty.DynamicVal, err
	}
	if v.typ.IsPrimitiveType() || v.typ == cty.DynamicPseudoType {
		return cty.StringVal(raw), nil
	}
	hint := fmt.Errorf("the variable is declared as %s: write it as in the spec, such as '%s'",
		typeexpr.TypeString(v.typ), exampleOf(v.typ))
	if len(raw) > maxSource || guardExprText([]byte(raw)) != nil {
		return cty.DynamicVal, errors.New("the value is too large or too deeply nested")
	}
	expr, diags := hclsyntax.ParseExpression([]byte(raw), "", hcl.InitialPos)
	if diags.HasErrors() {
		return cty.DynamicVal, hint
	}
	if estimate(expr, nil) > maxWork {
		return cty.DynamicVal, errors.New("the value takes too much work to compute")
	}
	val, diags := l.value(expr, nil)
	if diags.HasErrors() {
		return cty.DynamicVal, hint
	}
	return val, nil
}

func exampleOf(t cty.Type) string {
	switch {
	case t.IsListType() || t.IsSetType() || t.IsTupleType():
		return `["a", "b"]`
	default:
		return `{ a = "b" }`
	}
}

func (l *loader) declareLocals(b *hcl.Block) {
	attrs, diags := b.Body.JustAttributes()
	l.diags = append(l.diags, diags...)
	for _, a := range sortedAttrs(attrs) {
		if first, ok := l.scope.locals[a.Name]; ok {
			l.errorf(&a.NameRange, "Duplicate local", "local.%s is already defined at %s.", a.Name, first.attr.NameRange)
			continue
		}
		l.scope.locals[a.Name] = &local{attr: a, value: cty.DynamicVal}
	}
}

// evalLocal evaluates a local after those that it refers to. Path is the locals
// that are waiting for it.
func (l *loader) evalLocal(name string, path []string) {
	loc := l.scope.locals[name]
	switch {
	case loc.state == 2:
		return
	case loc.state == 1:
		cycle := slices.Concat(path[slices.Index(path, name):], []string{name})
		for i := range cycle {
			cycle[i] = "local." + cycle[i]
		}
		l.errorf(&loc.attr.NameRange, "Locals in a circle", "Each of these depends on the next one: %s.", strings.Join(cycle, " → "))
		return
	case len(path) > maxDepth:
		l.errorf(&loc.attr.NameRange, "Locals nested too deeply", "More than %d locals refer to each other in a row.", maxDepth)
		loc.state = 2
		return
	}
	loc.state = 1
	for _, t := range loc.attr.Expr.Variables() {
		if dep, ok := member(t, "local"); ok && l.scope.locals[dep] != nil {
			l.evalLocal(dep, append(slices.Clone(path), name))
		}
	}
	l.publishLocals(loc.attr.Expr)
	if val, ok := l.eval(loc.attr.Expr); ok {
		if n := valueSize(val); n > maxValue {
			l.errorf(loc.attr.Expr.Range().Ptr(), "Too large a value",
				"The value of local.%s has a size of %d (elements and bytes); the most is %d.", name, n, maxValue)
		} else {
			loc.value = val
		}
	}
	loc.state = 2
}

// publishLocals makes the locals visible that an expression refers to, or all (nil).
// Building the whole object for each of thousands of locals would be quadratic.
func (l *loader) publishLocals(expr hcl.Expression) {
	object := map[string]cty.Value{}
	if expr == nil {
		for name, loc := range l.scope.locals {
			object[name] = loc.value
		}
	} else {
		for _, t := range expr.Variables() {
			if name, ok := member(t, "local"); ok && l.scope.locals[name] != nil {
				object[name] = l.scope.locals[name].value
			}
		}
	}
	l.scope.ctx.Variables["local"] = cty.ObjectVal(object)
}

// member is NAME of a reference root.NAME or root["NAME"].
func member(t hcl.Traversal, root string) (string, bool) {
	if t.IsRelative() || t.RootName() != root || len(t) < 2 {
		return "", false
	}
	switch step := t[1].(type) {
	case hcl.TraverseAttr:
		return step.Name, true
	case hcl.TraverseIndex:
		if step.Key.Type() == cty.String && step.Key.IsKnown() && !step.Key.IsNull() {
			return step.Key.AsString(), true
		}
	}
	return "", false
}

func (l *loader) declaredVariables() string {
	if len(l.scope.vars) == 0 {
		return "It declares none."
	}
	return "It declares " + quotedList(l.scope.varNames) + "."
}

func sortedAttrs(attrs hcl.Attributes) []*hcl.Attribute {
	return slices.SortedFunc(maps.Values(attrs), func(a, b *hcl.Attribute) int {
		return a.NameRange.Start.Byte - b.NameRange.Start.Byte
	})
}
