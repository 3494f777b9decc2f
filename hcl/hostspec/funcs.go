package hostspec

import (
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl/v2/ext/tryfunc"
	"github.com/zclconf/go-cty/cty"
	"github.com/zclconf/go-cty/cty/function"
	"github.com/zclconf/go-cty/cty/function/stdlib"
)

const (
	// maxFile is the largest file that file() reads into the spec, in bytes.
	maxFile = 1 << 18
	// maxWidth is the largest field width of format() and depth of indent().
	maxWidth = 128
)

// functions are HCL's usual ones, by the names that Terraform has made known, and ours. Those that look into a text
// refuse secrets; those that only put values together carry their tokens along.
func (l *loader) functions() map[string]function.Function {
	all := map[string]function.Function{
		"abs": stdlib.AbsoluteFunc, "ceil": stdlib.CeilFunc, "floor": stdlib.FloorFunc, "log": stdlib.LogFunc,
		"max": stdlib.MaxFunc, "min": stdlib.MinFunc, "parseint": stdlib.ParseIntFunc, "pow": stdlib.PowFunc,
		"signum": stdlib.SignumFunc,

		"chomp": stdlib.ChompFunc, "format": boundedFormat(stdlib.FormatFunc),
		"formatlist": boundedFormat(stdlib.FormatListFunc), "indent": boundedIndent, "join": stdlib.JoinFunc,
		"lower": stdlib.LowerFunc, "regex": stdlib.RegexFunc, "regexall": stdlib.RegexAllFunc,
		"replace": stdlib.ReplaceFunc, "split": stdlib.SplitFunc, "strlen": stdlib.StrlenFunc,
		"strrev": stdlib.ReverseFunc, "substr": stdlib.SubstrFunc, "title": stdlib.TitleFunc, "trim": stdlib.TrimFunc,
		"trimprefix": stdlib.TrimPrefixFunc, "trimspace": stdlib.TrimSpaceFunc, "trimsuffix": stdlib.TrimSuffixFunc,
		"upper": stdlib.UpperFunc,

		"chunklist": stdlib.ChunklistFunc, "coalesce": stdlib.CoalesceFunc, "coalescelist": stdlib.CoalesceListFunc,
		"compact": stdlib.CompactFunc, "concat": stdlib.ConcatFunc, "contains": stdlib.ContainsFunc,
		"distinct": stdlib.DistinctFunc, "element": stdlib.ElementFunc, "flatten": stdlib.FlattenFunc,
		"keys": stdlib.KeysFunc, "length": stdlib.LengthFunc, "lookup": stdlib.LookupFunc, "merge": stdlib.MergeFunc,
		"range": stdlib.RangeFunc, "reverse": stdlib.ReverseListFunc, "setintersection": stdlib.SetIntersectionFunc,
		"setproduct": stdlib.SetProductFunc, "setsubtract": stdlib.SetSubtractFunc, "setunion": stdlib.SetUnionFunc,
		"slice": stdlib.SliceFunc, "sort": stdlib.SortFunc, "values": stdlib.ValuesFunc, "zipmap": stdlib.ZipmapFunc,

		"tobool": stdlib.MakeToFunc(cty.Bool), "tonumber": boundedNumbers(stdlib.MakeToFunc(cty.Number)),
		"tostring": stdlib.MakeToFunc(cty.String),
		"tolist":   stdlib.MakeToFunc(cty.List(cty.DynamicPseudoType)),
		"tomap":    stdlib.MakeToFunc(cty.Map(cty.DynamicPseudoType)),
		"toset":    stdlib.MakeToFunc(cty.Set(cty.DynamicPseudoType)),

		"csvdecode": decoder(stdlib.CSVDecodeFunc), "jsondecode": decoder(boundedNumbers(stdlib.JSONDecodeFunc)),
		"jsonencode": l.jsonEncode(), "base64encode": base64Encode,
		"can": tryfunc.CanFunc, "try": tryfunc.TryFunc,

		"cidrhost": cidrHost, "cidrsubnet": cidrSubnet, "env": l.envFunc(), "file": l.fileFunc(),
	}
	for name, f := range all {
		switch {
		case name == "trimspace" || name == "chomp" || name == "base64encode":
			all[name] = l.onSecrets(name, f)
		case name == "format" || name == "formatlist":
			all[name] = l.formatsSecrets(name, f)
		case !slices.Contains(carriers, name):
			all[name] = noSecrets(name, f)
		}
	}
	return all
}

// carriers are the functions that look at no text: they work on the values around it, or put texts one after the other.
var carriers = []string{
	"chunklist", "coalesce", "coalescelist", "concat", "element", "flatten", "join", "jsonencode", "keys", "length", "lookup", "merge",
	"reverse", "slice", "tolist", "tomap", "tostring", "try", "can", "values", "zipmap",
}

// checked is a function whose arguments are looked at first, with their marks.
func checked(f function.Function, check func(args []cty.Value) error) function.Function {
	params := slices.Clone(f.Params())
	for i := range params {
		params[i].AllowMarked = true
	}
	rest := f.VarParam()
	if rest != nil {
		marked := *rest
		marked.AllowMarked = true
		rest = &marked
	}
	return function.New(&function.Spec{
		Params:   params,
		VarParam: rest,
		Type: func(args []cty.Value) (cty.Type, error) {
			if err := check(args); err != nil {
				return cty.DynamicPseudoType, err
			}
			return f.ReturnTypeForValues(args)
		},
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) { return f.Call(args) },
	})
}

// noSecrets refuses secrets: what the function makes of a token would have nothing to do with the secret.
func noSecrets(name string, f function.Function) function.Function {
	return checked(f, func(args []cty.Value) error { return refuseSecrets(name, args) })
}

func refuseSecrets(name string, args []cty.Value) error {
	for i, a := range args {
		if holdsSecret(a) {
			return function.NewArgErrorf(i, "this is a secret, which is read only when it is written, so %s cannot work on it. Secrets can be used in "+
				"templates, lists and maps, and with join, format (%%s), trimspace, chomp, jsonencode and base64encode. Otherwise store the secret "+
				"in its final form, with one file for each part. If it is not secret, use an ordinary variable, or a file whose path is relative to the spec", name)
		}
	}
	return nil
}

// onSecrets has a function of one text work on the secrets in it when they are read.
func (l *loader) onSecrets(op string, f function.Function) function.Function {
	return function.New(&function.Spec{
		Params: []function.Parameter{{Name: "str", Type: cty.String, AllowMarked: true}},
		Type:   function.StaticReturnType(cty.String),
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
			bare, marks := args[0].Unmark()
			if text := bare.AsString(); l.tokens.holds(text) {
				return l.tokens.apply(op, text).WithMarks(l.tokens.others(marks, text)), nil
			}
			return f.Call(args)
		},
	})
}

// formatsSecrets lets secrets through for %s and %v alone: %q, %x and widths work on the text.
func (l *loader) formatsSecrets(name string, f function.Function) function.Function {
	return checked(f, func(args []cty.Value) error {
		bare, _ := args[0].UnmarkDeep()
		if !holdsSecret(args[0]) && bare.Type() == cty.String && bare.IsKnown() && !bare.IsNull() && plainVerbs(bare.AsString()) {
			return nil
		}
		return refuseSecrets(name, args)
	})
}

var anyVerb = regexp.MustCompile(`%(\[[0-9]+\])?[^%sv]`)

// plainVerbs reports whether a format has no verbs but %s, %v and %%.
func plainVerbs(format string) bool {
	return !anyVerb.MatchString(strings.ReplaceAll(format, "%%", ""))
}

// decoder is a function whose result is data: what jsondecode reads of a file beside the spec is as if it stood in the spec.
func decoder(f function.Function) function.Function {
	params := slices.Clone(f.Params())
	params[0].AllowMarked = true
	return function.New(&function.Spec{
		Params: params,
		Type: func(args []cty.Value) (cty.Type, error) {
			bare, _ := args[0].Unmark()
			return f.ReturnTypeForValues([]cty.Value{bare})
		},
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
			bare, _ := args[0].Unmark()
			return f.Call([]cty.Value{bare})
		},
	})
}

var base64Encode = function.New(&function.Spec{
	Params: []function.Parameter{{Name: "str", Type: cty.String}},
	Type:   function.StaticReturnType(cty.String),
	Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
		return cty.StringVal(base64.StdEncoding.EncodeToString([]byte(args[0].AsString()))), nil
	},
})

// jsonEncode is jsonencode. A secret is escaped for JSON when it is read.
func (l *loader) jsonEncode() function.Function {
	std := stdlib.JSONEncodeFunc
	params := slices.Clone(std.Params())
	params[0].AllowMarked = true
	return function.New(&function.Spec{
		Params: params,
		Type:   function.StaticReturnType(cty.String),
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
			bare, paths := args[0].UnmarkDeepWithPaths()
			out, err := std.Call([]cty.Value{bare})
			if err != nil || !out.IsKnown() || out.IsNull() {
				return out.WithMarks(allMarks(paths)), err
			}
			text := out.AsString()
			marks := []cty.ValueMarks{l.tokens.others(allMarks(paths), text)}
			text = l.tokens.syntax.ReplaceAllStringFunc(text, func(token string) string {
				escaped, mark := l.tokens.apply(OpJSONEncode, token).Unmark()
				marks = append(marks, mark)
				return escaped.AsString()
			})
			return cty.StringVal(text).WithMarks(marks...), nil
		},
	})
}

func allMarks(paths []cty.PathValueMarks) cty.ValueMarks {
	all := cty.ValueMarks{}
	for _, p := range paths {
		maps.Copy(all, p.Marks)
	}
	return all
}

var widths = regexp.MustCompile(`[0-9]+`)

// boundedFormat refuses widths such as %1000000000d, which would fill the memory.
func boundedFormat(f function.Function) function.Function {
	return function.New(&function.Spec{
		Params:   f.Params(),
		VarParam: f.VarParam(),
		Type:     func([]cty.Value) (cty.Type, error) { return cty.DynamicPseudoType, nil },
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
			if args[0].Type() == cty.String && args[0].IsKnown() && !args[0].IsNull() {
				for _, w := range widths.FindAllString(verbs(args[0].AsString()), -1) {
					if n, err := strconv.Atoi(w); err != nil || n > maxWidth {
						return cty.DynamicVal, function.NewArgErrorf(0, "a width of %s is too large; the most is %d", w, maxWidth)
					}
				}
			}
			return f.Call(args)
		},
	})
}

var verb = regexp.MustCompile(`%[^a-zA-Z%]*`)

// verbs is what stands between each % and its letter.
func verbs(format string) string { return strings.Join(verb.FindAllString(format, -1), " ") }

var boundedIndent = function.New(&function.Spec{
	Params: stdlib.IndentFunc.Params(),
	Type:   function.StaticReturnType(cty.String),
	Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
		if n, acc := args[0].AsBigFloat().Int64(); acc != big.Exact || n < 0 || n > maxWidth {
			return cty.UnknownVal(cty.String), function.NewArgErrorf(0, "between 0 and %d spaces", maxWidth)
		}
		return stdlib.IndentFunc.Call(args)
	},
})

var exponents = regexp.MustCompile(`[0-9.]+[eE][+-]?[0-9]+`)

// boundedNumbers refuses text with numbers such as 1e999999999: written out again, as
// any template may do, that is a GB of digits.
func boundedNumbers(f function.Function) function.Function {
	return function.New(&function.Spec{
		Params: f.Params(),
		Type: func(args []cty.Value) (cty.Type, error) {
			if v := args[0]; v.Type() == cty.String && v.IsKnown() && !v.IsNull() {
				for _, n := range exponents.FindAllString(v.AsString(), -1) {
					if !smallExponent([]byte(n)) {
						return cty.DynamicPseudoType, function.NewArgErrorf(0, "the exponent of a number may be at most %d", maxExponent)
					}
				}
			}
			return f.ReturnTypeForValues(args)
		},
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) { return f.Call(args) },
	})
}

// fileFunc is file(path). An absolute path is a place on the host: a secret, which is not read here. A relative one is
// looked up from the spec's folder and is part of the spec.
func (l *loader) fileFunc() function.Function {
	return function.New(&function.Spec{
		Params: []function.Parameter{{Name: "path", Type: cty.String}},
		Type:   function.StaticReturnType(cty.String),
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
			path := args[0].AsString()
			if filepath.IsAbs(path) {
				return l.tokens.of(fileSecret(path)), nil
			}
			name := path
			path = filepath.Join(l.dir, path)
			b, err := readRegular(path, maxFile)
			if err != nil {
				return cty.UnknownVal(cty.String), function.NewArgErrorf(0, "cannot read %s: %w", path, err)
			}
			if err := checkText(string(b)); err != nil {
				return cty.UnknownVal(cty.String), function.NewArgErrorf(0, "%s: %w", path, err)
			}
			return cty.StringVal(string(b)).Mark(fileMark(name)), nil
		},
	})
}

// envFunc is env(name): a secret in the environment of the command that reads it.
func (l *loader) envFunc() function.Function {
	return function.New(&function.Spec{
		Params: []function.Parameter{{Name: "name", Type: cty.String}},
		Type:   function.StaticReturnType(cty.String),
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
			name := args[0].AsString()
			if name == "" || strings.ContainsAny(name, "=\x00") {
				return cty.UnknownVal(cty.String), function.NewArgErrorf(0, "%s is not the name of an environment variable", quote(name))
			}
			return l.tokens.of(envSecret(l.env, name)), nil
		},
	})
}

// cidrHost is Terraform's cidrhost(prefix, n): the n-th address, from the end for a negative n.
var cidrHost = function.New(&function.Spec{
	Params: []function.Parameter{{Name: "prefix", Type: cty.String}, {Name: "hostnum", Type: cty.Number}},
	Type:   function.StaticReturnType(cty.String),
	Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
		unknown := cty.UnknownVal(cty.String)
		prefix, err := netip.ParsePrefix(args[0].AsString())
		if err != nil {
			return unknown, function.NewArgErrorf(0, "it is not a prefix such as 10.0.0.0/24")
		}
		n, err := wholeArg(args[1])
		if err != nil {
			return unknown, function.NewArgError(1, err)
		}
		bits := prefix.Addr().BitLen() - prefix.Bits()
		size := new(big.Int).Lsh(big.NewInt(1), uint(bits))
		if n.Sign() < 0 {
			n.Add(n, size)
		}
		if n.Sign() < 0 || n.Cmp(size) >= 0 {
			return unknown, function.NewArgErrorf(1, "a /%d has %s addresses", prefix.Bits(), size)
		}
		addr, err := addrPlus(prefix.Masked().Addr(), n)
		if err != nil {
			return unknown, err
		}
		return cty.StringVal(addr.String()), nil
	},
})

// cidrSubnet is Terraform's cidrsubnet(prefix, newbits, n): the n-th subnet whose
// length is newbits more.
var cidrSubnet = function.New(&function.Spec{
	Params: []function.Parameter{
		{Name: "prefix", Type: cty.String}, {Name: "newbits", Type: cty.Number}, {Name: "netnum", Type: cty.Number},
	},
	Type: function.StaticReturnType(cty.String),
	Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
		unknown := cty.UnknownVal(cty.String)
		prefix, err := netip.ParsePrefix(args[0].AsString())
		if err != nil {
			return unknown, function.NewArgErrorf(0, "it is not a prefix such as 10.0.0.0/16")
		}
		more, err := wholeArg(args[1])
		if err != nil {
			return unknown, function.NewArgError(1, err)
		}
		left := prefix.Addr().BitLen() - prefix.Bits()
		if more.Sign() < 0 || more.Cmp(big.NewInt(int64(left))) > 0 {
			return unknown, function.NewArgErrorf(1, "a /%d can be made between 0 and %d bits longer", prefix.Bits(), left)
		}
		n, err := wholeArg(args[2])
		if err != nil {
			return unknown, function.NewArgError(2, err)
		}
		newbits := int(more.Int64())
		if n.Sign() < 0 || n.BitLen() > newbits {
			return unknown, function.NewArgErrorf(2, "%d more bits make the subnets 0 to %s",
				newbits, new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), uint(newbits)), big.NewInt(1)))
		}
		addr, err := addrPlus(prefix.Masked().Addr(), n.Lsh(n, uint(left-newbits)))
		if err != nil {
			return unknown, err
		}
		return cty.StringVal(netip.PrefixFrom(addr, prefix.Bits()+newbits).String()), nil
	},
})

func wholeArg(v cty.Value) (*big.Int, error) {
	f := v.AsBigFloat()
	if f.IsInf() || !f.IsInt() || f.MantExp(nil) > 256 {
		return nil, errors.New("must be a whole number")
	}
	n, _ := f.Int(nil)
	return n, nil
}

// addrPlus is the address n after base.
func addrPlus(base netip.Addr, n *big.Int) (netip.Addr, error) {
	sum := new(big.Int).Add(new(big.Int).SetBytes(base.AsSlice()), n)
	size := base.BitLen() / 8
	if sum.BitLen() > base.BitLen() {
		return netip.Addr{}, fmt.Errorf("%s plus %s is beyond the last address", base, n)
	}
	addr, _ := netip.AddrFromSlice(sum.FillBytes(make([]byte, size)))
	return addr, nil
}
