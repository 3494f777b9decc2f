package convert

import (
	"strings"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/hcl/v2/hclwrite"
	"github.com/zclconf/go-cty/cty"

	"github.com/fleetingd/fleetingd/appliance/visible"
)

// writer collects the spec's lines. hclwrite.Format lays them out later and keeps their number.
type writer struct {
	lines []string
	tags  []tag
}

// tag says where a line comes from.
type tag struct {
	place  string // the id of a place that can be left out
	needed string // what a spec cannot do without: its place as errors name it
}

func (w *writer) tagged(t tag, text string) {
	for line := range strings.SplitSeq(text, "\n") {
		w.lines = append(w.lines, line)
		w.tags = append(w.tags, t)
	}
}

func (w *writer) line(text string) { w.tagged(tag{}, text) }

// tagOf is the tag of a line, counted from 1.
func (w *writer) tagOf(line int) tag {
	if line < 1 || line > len(w.tags) {
		return tag{}
	}
	return w.tags[line-1]
}

// commentWidth is the length of a comment's line, without what it is indented by.
const commentWidth = 110

// note is a comment, wrapped.
func (w *writer) note(text string) { w.wrapped("# ", "# ", text) }

// wrapped is a comment whose first line begins with one text, and each further one with another.
func (w *writer) wrapped(first, prefix, text string) {
	line := first
	for word := range strings.FieldsSeq(oneLine(text)) {
		if len(line) > len(prefix) && len(line)+len(word) > commentWidth {
			w.line(strings.TrimRight(line, " "))
			line = prefix
		}
		line += word + " "
	}
	w.line(strings.TrimRight(line, " "))
}

// left is the comment about what the spec does not have: its text in the source, and why.
func (w *writer) left(table, text, why string) {
	if table != "" {
		table += " "
	}
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if len(lines) == 1 {
		w.line("# " + oneLine(table+lines[0]))
	} else {
		w.line("# " + strings.TrimRight(oneLine(table), " "))
		for _, l := range lines {
			w.line(strings.TrimRight("#   "+oneLine(l), " "))
		}
	}
	w.wrapped("#   -> ", "#      ", why)
}

// oneLine is text of the source for a line of a comment: nothing in it ends the comment, and it holds no secret.
func oneLine(s string) string {
	return visible.Text(mask(strings.NewReplacer("\n", `\n`, "\r", `\r`).Replace(s)))
}

// tomlText is a value of the source as TOML, its secrets masked.
func tomlText(key string, v any) string {
	var b strings.Builder
	e := toml.NewEncoder(&b)
	e.Indent = "  "
	masked := masked(key, v)
	if list, ok := masked.([]map[string]any); ok && len(list) == 0 {
		masked = []any{}
	}
	var doc any = map[string]any{mask(key): masked}
	if m, ok := masked.(map[string]any); ok && key == "" {
		doc = m
	}
	if err := e.Encode(doc); err != nil {
		return mask(key) + " = …"
	}
	return strings.TrimSpace(b.String())
}

// literal is a plain value in HCL.
func literal(v any) string {
	val := cty.NullVal(cty.DynamicPseudoType)
	switch v := v.(type) {
	case string:
		val = cty.StringVal(v)
	case bool:
		val = cty.BoolVal(v)
	case int:
		val = cty.NumberIntVal(int64(v))
	case int64:
		val = cty.NumberIntVal(v)
	case float64:
		val = cty.NumberFloatVal(v)
	case time.Duration:
		val = cty.StringVal(duration(v))
	}
	return string(hclwrite.TokensForValue(val).Bytes())
}

// textLiteral is a string in HCL, one of several lines as they are.
func textLiteral(s string) string {
	body, whole := strings.CutSuffix(s, "\n")
	if strings.Count(body, "\n") < 2 || !plainLines(body) {
		return literal(s)
	}
	heredoc := "<<EOT\n" + strings.NewReplacer("${", "$${", "%{", "%%{").Replace(body) + "\nEOT"
	if whole {
		return heredoc
	}
	return "chomp(" + heredoc + "\n)"
}

// plainLines reports text that reads the same in a heredoc.
func plainLines(s string) bool {
	for line := range strings.SplitSeq(s, "\n") {
		if strings.TrimSpace(line) == "EOT" || visible.Text(line) != line || strings.Contains(line, "$${") || strings.Contains(line, "%%{") {
			return false
		}
	}
	// chomp would take more than the last line's end.
	return s != "" && !strings.HasSuffix(s, "\n")
}

// attrName is a key as HCL has it within an object.
func attrName(key string) string {
	switch key {
	case "for", "true", "false", "null":
		return literal(key)
	}
	if hclsyntax.ValidIdentifier(key) {
		return key
	}
	return literal(key)
}

// expressible reports a value that HCL has, too: TOML's dates and NaN are none.
func expressible(v any) bool {
	switch v := v.(type) {
	case string, bool, int64, map[string]any, []any, []map[string]any:
		return true
	case float64:
		return v-v == 0 // neither infinite nor NaN
	}
	return false
}

// attrs writes a table's attributes, those of tables within as objects.
func (c *converter) attrs(p place, t map[string]any) {
	for _, key := range sortedKeys(t) {
		c.attr(p.to(key), key, t[key])
	}
}

func (c *converter) attr(p place, key string, v any) {
	switch {
	case isEmpty(v):
	case c.isDropped(p):
		c.leave(p.table(), key, v, c.dropped[p.id()])
	case looksSecret(key):
		c.leave(p.table(), key, v, "The key looks like a secret.")
	case !expressible(v):
		c.leave(p.table(), key, v, "A spec cannot express a value of this type.")
	default:
		c.value(p, attrName(key)+" = ", v, "")
	}
}

// value writes a value after a prefix, and before a suffix.
func (c *converter) value(p place, before string, v any, after string) {
	t := tag{place: p.id()}
	switch v := v.(type) {
	case map[string]any:
		c.out.tagged(t, before+"{")
		c.attrs(p, v)
		c.out.line("}" + after)
	case []map[string]any:
		list := make([]any, len(v))
		for i := range v {
			list[i] = v[i]
		}
		c.list(p, before, list, after)
	case []any:
		c.list(p, before, v, after)
	case string:
		if expr, comment, ok := c.secretText(p, v); ok {
			c.out.tagged(t, before+expr+after+" # "+comment)
			return
		}
		if after != "" {
			c.out.tagged(t, before+literal(v)+after) // a heredoc ends its line
			return
		}
		c.out.tagged(t, before+textLiteral(v))
	default:
		c.out.tagged(t, before+literal(v)+after)
	}
}

func (c *converter) list(p place, before string, list []any, after string) {
	t := tag{place: p.id()}
	if text, ok := c.shortList(p, list); ok {
		c.out.tagged(t, before+text+after)
		return
	}
	c.out.tagged(t, before+"[")
	for i, v := range list {
		at := p.at(i)
		switch {
		case c.isDropped(at):
			c.leave(p.table(), p.key(), []any{v}, c.dropped[at.id()])
		case !expressible(v):
			c.leave(p.table(), p.key(), []any{v}, "A spec cannot express a value of this type.")
		default:
			c.value(at, "", v, ",")
		}
	}
	c.out.line("]" + after)
}

// shortList is a list in one line: all plain values, none a secret.
func (c *converter) shortList(p place, list []any) (string, bool) {
	const longest = 80
	items := make([]string, len(list))
	for i, v := range list {
		switch v := v.(type) {
		case string:
			if isSecret(p, v) || c.isDropped(p.at(i)) {
				return "", false
			}
		case bool, int64:
		default:
			return "", false
		}
		items[i] = literal(v)
	}
	text := "[" + strings.Join(items, ", ") + "]"
	// Of several variables each has its line, since one may be wrong.
	return text, len(list) < 2 || len(text) <= longest && settingName(p) != "environment"
}

func (c *converter) isDropped(p place) bool { return c.dropped[p.id()] != "" }
