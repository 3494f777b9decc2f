package hostspec

import (
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

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

// functions are HCL's usual ones, by the names that Terraform has made known, and ours.
func (l *loader) functions() map[string]function.Function {
	return map[string]function.Function{
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

		"csvdecode": stdlib.CSVDecodeFunc, "jsondecode": boundedNumbers(stdlib.JSONDecodeFunc), "jsonencode": stdlib.JSONEncodeFunc,
		"can": tryfunc.CanFunc, "try": tryfunc.TryFunc,

		"cidrhost": cidrHost, "cidrsubnet": cidrSubnet, "env": l.envFunc(), "file": l.fileFunc(),
	}
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

// fileFunc is file(path): the text of a regular file, looked up from the spec's folder.
func (l *loader) fileFunc() function.Function {
	return function.New(&function.Spec{
		Params: []function.Parameter{{Name: "path", Type: cty.String}},
		Type:   function.StaticReturnType(cty.String),
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
			path := args[0].AsString()
			if !filepath.IsAbs(path) {
				path = filepath.Join(l.dir, path)
			}
			b, err := readRegular(path, maxFile)
			if err != nil {
				return cty.UnknownVal(cty.String), function.NewArgErrorf(0, "cannot read %s: %w", path, err)
			}
			if !utf8.Valid(b) {
				return cty.UnknownVal(cty.String), function.NewArgErrorf(0, "%s is not text in UTF-8", path)
			}
			return cty.StringVal(string(b)), nil
		},
	})
}

// envFunc is env(name): a variable of the environment, which must be set.
func (l *loader) envFunc() function.Function {
	return function.New(&function.Spec{
		Params: []function.Parameter{{Name: "name", Type: cty.String}},
		Type:   function.StaticReturnType(cty.String),
		Impl: func(args []cty.Value, _ cty.Type) (cty.Value, error) {
			name := args[0].AsString()
			value, ok := l.env[name]
			if !ok {
				return cty.UnknownVal(cty.String), function.NewArgErrorf(0,
					"the environment has no %s; set it, or write try(env(%q), \"a default\")", name, name)
			}
			return cty.StringVal(strings.ToValidUTF8(value, "\uFFFD")), nil
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
		return nil, errors.New("a whole number is wanted here")
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
