package hostspec

import (
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/zclconf/go-cty/cty"
)

// maxWork bounds one expression's evaluation and maxTotalWork that of all, in
// elements and bytes touched. An element costs about a microsecond.
const (
	maxWork      = 1 << 22
	maxTotalWork = 16 * maxWork
)

// extent is an upper bound of a value: how often a for expression over it would go
// round, and its elements and bytes all together.
type extent struct{ items, size float64 }

func (e extent) perItem() float64 { return max(1, e.size/max(1, e.items)) }

// estimator adds up what evaluating an expression would cost, without doing it: HCL
// has no way to stop an evaluation.
type estimator struct {
	resolve func(hcl.Traversal) cty.Value
	work    float64
	times   float64 // how often the expression at hand is evaluated
}

// estimate is an upper bound for the work of evaluating expr. Resolve gives
// what a reference stands for; nil where there is nothing to refer to.
func estimate(expr hcl.Expression, resolve func(hcl.Traversal) cty.Value) float64 {
	e := &estimator{resolve: resolve, times: 1}
	if native, ok := expr.(hclsyntax.Expression); ok {
		e.of(native, nil)
		return e.work
	}
	// JSON: each string is a template. With no context HCL gives the strings as they are.
	raw, _ := expr.Value(nil)
	_ = cty.Walk(raw, func(_ cty.Path, v cty.Value) (bool, error) {
		e.work++
		if v.Type().IsObjectType() {
			for name := range v.Type().AttributeTypes() {
				e.template(name)
			}
		}
		if v.Type() == cty.String && v.IsKnown() && !v.IsNull() {
			e.template(v.AsString())
		}
		return true, nil
	})
	return e.work
}

func (e *estimator) template(s string) {
	e.work += float64(len(s))
	if !strings.Contains(s, "${") && !strings.Contains(s, "%{") {
		return
	}
	if expr, diags := hclsyntax.ParseTemplate([]byte(s), "", hcl.InitialPos); !diags.HasErrors() {
		e.of(expr, nil)
	}
}

// bindings are the extents of a for expression's own names.
type bindings map[string]extent

func (e *estimator) of(expr hclsyntax.Expression, names bindings) extent {
	x := e.extentOf(expr, names)
	x.items, x.size = max(1, x.items), max(1, x.size)
	e.work += x.size * e.times
	return x
}

func (e *estimator) extentOf(expr hclsyntax.Expression, names bindings) extent {
	switch expr := expr.(type) {
	case *hclsyntax.LiteralValueExpr:
		return extentOfValue(expr.Val)
	case *hclsyntax.ScopeTraversalExpr:
		if x, ok := names[expr.Traversal.RootName()]; ok {
			return extent{x.size, x.size}
		}
		if e.resolve == nil {
			return extent{1, 1}
		}
		return extentOfValue(e.resolve(expr.Traversal))
	case *hclsyntax.FunctionCallExpr:
		return e.call(expr, names)
	case *hclsyntax.ForExpr:
		return e.loop(expr, names)
	case *hclsyntax.SplatExpr:
		coll := e.of(expr.Source, names)
		return extent{coll.items, coll.size + e.repeat(coll.items, func() extent { return e.of(expr.Each, names) }).size}
	case *hclsyntax.TupleConsExpr:
		x := e.all(names, expr.Exprs...)
		return extent{float64(len(expr.Exprs)), x.size + 1}
	case *hclsyntax.ObjectConsExpr:
		var size float64
		for _, item := range expr.Items {
			size += e.all(names, item.KeyExpr, item.ValueExpr).size
		}
		return extent{float64(len(expr.Items)), size + 1}
	case *hclsyntax.ObjectConsKeyExpr:
		return e.of(expr.Wrapped, names)
	case *hclsyntax.TemplateExpr:
		return extent{1, e.all(names, expr.Parts...).size}
	case *hclsyntax.TemplateWrapExpr:
		return e.of(expr.Wrapped, names)
	case *hclsyntax.TemplateJoinExpr:
		return extent{1, e.of(expr.Tuple, names).size}
	case *hclsyntax.ParenthesesExpr:
		return e.of(expr.Expression, names)
	case *hclsyntax.ConditionalExpr:
		return e.all(names, expr.Condition, expr.TrueResult, expr.FalseResult)
	case *hclsyntax.BinaryOpExpr:
		return extent{1, e.all(names, expr.LHS, expr.RHS).size}
	case *hclsyntax.UnaryOpExpr:
		return e.of(expr.Val, names)
	case *hclsyntax.IndexExpr:
		x := e.all(names, expr.Collection, expr.Key)
		return extent{x.size, x.size}
	case *hclsyntax.RelativeTraversalExpr:
		x := e.of(expr.Source, names)
		return extent{x.size, x.size}
	default:
		return extent{1, 1}
	}
}

// all is several expressions together.
func (e *estimator) all(names bindings, exprs ...hclsyntax.Expression) extent {
	var sum extent
	for _, expr := range exprs {
		x := e.of(expr, names)
		sum.items += x.items
		sum.size += x.size
	}
	return sum
}

// repeat is the cost of a body that is evaluated n times.
func (e *estimator) repeat(n float64, body func() extent) extent {
	before := e.times
	e.times *= max(1, n)
	x := body()
	e.times = before
	return extent{n, x.size * max(1, n)}
}

func (e *estimator) loop(expr *hclsyntax.ForExpr, names bindings) extent {
	coll := e.of(expr.CollExpr, names)
	inner := bindings{}
	for k, v := range names {
		inner[k] = v
	}
	// What all rounds see of the collection together is its size.
	each := extent{coll.perItem(), coll.perItem()}
	inner[expr.ValVar] = each
	inner[expr.KeyVar] = each
	return e.repeat(coll.items, func() extent {
		var x extent
		for _, part := range []hclsyntax.Expression{expr.KeyExpr, expr.ValExpr, expr.CondExpr} {
			if part != nil {
				x.size += e.of(part, inner).size
			}
		}
		return x
	})
}

// call is a function's result. Most give no more than they take; these do not.
func (e *estimator) call(expr *hclsyntax.FunctionCallExpr, names bindings) extent {
	var sum extent
	product, most, perItem := 1.0, 1.0, 0.0
	for _, arg := range expr.Args {
		x := e.of(arg, names)
		sum.items += x.items
		sum.size += x.size
		product *= x.items
		most = max(most, x.items)
		perItem += x.perItem()
	}
	switch expr.Name {
	case "range":
		return extent{1024, 1024} // cty's own limit
	case "setproduct":
		return extent{product, product * perItem}
	case "formatlist":
		return extent{most, most * (perItem + maxWidth)}
	case "format":
		return extent{1, sum.size * maxWidth}
	case "indent":
		return extent{1, sum.size * maxWidth}
	case "replace":
		return extent{1, sum.size * sum.size / 4}
	case "join":
		return extent{1, perItem*most + sum.size}
	case "distinct":
		return extent{sum.items, sum.items*sum.items + sum.size}
	case "file":
		if len(expr.Args) == 1 && e.absolute(expr.Args[0]) {
			return extent{1, maxToken}
		}
		return extent{1, maxFile}
	case "env":
		return extent{1, 4096}
	case "jsonencode":
		return extent{1, 6 * sum.size} // \u0000
	case "split", "regexall", "regex", "csvdecode", "jsondecode", "flatten", "values", "slice", "chunklist":
		return extent{2 * sum.size, 2 * sum.size}
	default:
		return extent{sum.items, sum.size + 64}
	}
}

// maxToken is more than the length of a token, which file() of an absolute path evaluates to.
const maxToken = 64

// absolute reports a path that is written out, at least its start, and absolute.
func (e *estimator) absolute(path hclsyntax.Expression) bool {
	switch path := path.(type) {
	case *hclsyntax.TemplateExpr:
		return len(path.Parts) > 0 && e.absolute(path.Parts[0])
	case *hclsyntax.LiteralValueExpr:
		return path.Val.Type() == cty.String && strings.HasPrefix(path.Val.AsString(), "/")
	}
	return false
}

func extentOfValue(v cty.Value) extent {
	size := float64(valueSize(v))
	v, _ = v.Unmark()
	if v.IsKnown() && !v.IsNull() && v.CanIterateElements() {
		return extent{float64(v.LengthInt()), size}
	}
	return extent{1, size}
}
