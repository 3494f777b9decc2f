package hostspec

import (
	"errors"
	"fmt"
	"regexp"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/function"

	"github.com/fleetingd/fleetingd/appliance/suggest"
)

// eval gives an expression's value; false after a finding, which it has added, and
// where the value is unknown because an earlier finding left it so.
func (l *loader) eval(expr hcl.Expression) (cty.Value, bool) { return l.evalIn(expr, l.scope.ctx) }

func (l *loader) evalIn(expr hcl.Expression, ctx *hcl.EvalContext) (cty.Value, bool) {
	if !l.guardExpr(expr) || !l.checkReferences(expr) || l.decides(expr) || !l.checkNumbers(expr) {
		return cty.DynamicVal, false
	}
	val, diags := l.value(expr, ctx)
	for _, d := range diags {
		d.Summary, d.Detail = l.tokens.scrub(d.Summary), l.tokens.scrub(d.Detail)
	}
	l.diags = append(l.diags, diags...)
	if diags.HasErrors() {
		return cty.DynamicVal, false
	}
	if !val.IsWhollyKnown() {
		// Of a sensitive variable only text is known to stand somewhere; anything else would be computed with.
		// Without a mark it is most often what an earlier finding has left unknown.
		if holdsSecret(val) || !l.diags.HasErrors() && l.mentionsSecret(expr) {
			l.errorf(expr.Range().Ptr(), "Secret is not text", "Only text can be kept secret: declare the sensitive variable as a string. "+
				"Numbers and booleans are written to the plan, so remove sensitive = true from their variable.")
		}
		return cty.DynamicVal, false
	}
	return val, true
}

// value evaluates without letting a bug below end the program: specs come from
// people and from other programs, and a finding with a line helps them more.
func (l *loader) value(expr hcl.Expression, ctx *hcl.EvalContext) (val cty.Value, diags hcl.Diagnostics) {
	defer func() {
		if r := recover(); r != nil {
			val = cty.DynamicVal
			diags = append(diags, &hcl.Diagnostic{
				Severity: hcl.DiagError,
				Summary:  "This expression cannot be evaluated",
				Detail:   fmt.Sprintf("The HCL library gave up on it: %v. Write it in another way.", r),
				Subject:  expr.Range().Ptr(),
			})
		}
	}()
	val, diags = expr.Value(ctx)
	explainTemplates(diags)
	for _, d := range diags {
		d.EvalContext = nil // a printer would show the values of all variables
		withoutStack(d)
	}
	return val, diags
}

// explainTemplates adds to the finding about an unknown %{word} how to write such a thing as text: curl's -w has many.
func explainTemplates(diags hcl.Diagnostics) {
	for _, d := range diags {
		if d.Summary == "Invalid template control keyword" {
			d.Detail += " If it is meant as text, write %%{ instead of %{."
		}
	}
}

// withoutStack shortens the finding that a library function has panicked, as
// log(-1, 0) does: it comes with a stack trace.
func withoutStack(d *hcl.Diagnostic) {
	call, ok := hcl.DiagnosticExtra[hclsyntax.FunctionCallDiagExtra](d)
	if !ok {
		return
	}
	var p function.PanicError
	if errors.As(call.FunctionCallError(), &p) {
		d.Detail = fmt.Sprintf("%s cannot use these arguments. Write others.", call.CalledFunctionName())
	}
}

// withhold takes the details out of findings about the values of sensitive variables.
func (l *loader) withhold(diags hcl.Diagnostics, secret bool) hcl.Diagnostics {
	if secret {
		for _, d := range diags {
			d.Detail = "The reason is not shown, because it may hold the value of a sensitive variable."
		}
	}
	return diags
}

// checkReferences finds var.x and local.x that are not there, with a suggestion,
// and says so once for each expression.
func (l *loader) checkReferences(expr hcl.Expression) bool {
	ok := true
	for _, t := range expr.Variables() {
		at := t.SourceRange()
		if name, is := member(t, "var"); is && l.scope.vars[name] == nil {
			l.errorf(&at, "Unknown variable", "There is no variable %q%s. %s",
				name, l.didYouMean(name, l.scope.varNames), l.declaredVariables())
			ok = false
		}
		if name, is := member(t, "local"); is && l.scope.locals[name] == nil {
			known := l.scope.localNames
			detail := "There are no locals."
			if len(known) > 0 {
				detail = "The locals are " + quotedList(known) + "."
			}
			l.errorf(&at, "Unknown local", "There is no local.%s%s. %s", name, l.didYouMean(name, known), detail)
			ok = false
		}
		if _, is := member(t, "local"); !is && t.RootName() == "local" {
			l.errorf(&at, "Which local?", "Write local.NAME: the locals all together have no value.")
			ok = false
		}
		switch root := t.RootName(); root {
		case "var", "local":
		case "image", "pool":
			l.errorf(&at, "A reference in the wrong place", "%s.NAME must stand alone, as in %s = %s.NAME; "+
				"it has no value to use in an expression.", root, root, root)
			ok = false
		default:
			// Most of these are a shell's variables in a command.
			shell := root
			if len(shell) > 64 {
				shell = "NAME"
			}
			l.errorf(&at, "Unknown name", "There is no %s%s. An expression can refer to var.NAME and local.NAME. "+
				"If it is meant for a shell, write $${%s} instead of ${%s}.", quote(root), suggest.DidYouMean(root, []string{"local", "var"}), shell, shell)
			ok = false
		}
	}
	return ok
}

// numberSyntax is what cty takes for a number.
var numberSyntax = regexp.MustCompile(`^[+-]?[0-9.]+[eE][+-]?[0-9]+$`)

// valueSize is the number of elements of a value and bytes of its strings.
func valueSize(v cty.Value) int {
	v, _ = v.UnmarkDeep()
	n := 0
	_ = cty.Walk(v, func(_ cty.Path, v cty.Value) (bool, error) {
		n++
		if v.IsKnown() && !v.IsNull() {
			switch v.Type() {
			case cty.String:
				text := v.AsString()
				n += len(text)
				if numberSyntax.MatchString(text) && !smallExponent([]byte(text)) {
					n += maxWork // as a number, which it may become at any time
				}
			case cty.Number:
				// 1e9999999 is a few bytes until it is written out in decimal.
				exp := v.AsBigFloat().MantExp(nil)
				n += max(exp, -exp) / 3
			}
		}
		return true, nil
	})
	return n
}
