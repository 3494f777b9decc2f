package hostspec

import (
	"fmt"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
)

// Kind is a kind of block in the language, as the decoder has it.
type Kind struct {
	Path       []string // "host", "network", "egress"
	Labels     int
	Attributes []Attribute
}

// Attribute is one that a kind of block may have. The example is an expression.
type Attribute struct {
	Name, Example string
	Required      bool
}

// Language is every kind of block that the decoder knows, found by asking it: a spec that has all blocks that are known so
// far says which ones may be within them.
func Language() []Kind {
	kinds := map[string]*Kind{}
	var order []string
	add := func(path []string, b hcl.BlockHeaderSchema) {
		if key := strings.Join(path, "."); kinds[key] == nil {
			kinds[key] = &Kind{Path: path, Labels: len(b.LabelNames)}
			order = append(order, key)
		}
	}
	for _, b := range rootSchema.Blocks {
		if b.Type != "variable" && b.Type != "locals" { // nothing can be referred to in them, or everything
			add([]string{b.Type}, b)
		}
	}
	for known := 0; known < len(order); {
		known = len(order)
		var src strings.Builder
		at := map[int]string{} // line of a block: its kind
		line := 1
		var write func(path []string)
		write = func(path []string) {
			key := strings.Join(path, ".")
			at[line] = key
			fmt.Fprintf(&src, "%s%s {\n", path[len(path)-1], strings.Repeat(` "x"`, kinds[key].Labels))
			line++
			for _, k := range slices.Clone(order) {
				if len(kinds[k].Path) == len(path)+1 && strings.HasPrefix(k, key+".") {
					write(kinds[k].Path)
				}
			}
			src.WriteString("}\n")
			line++
		}
		for _, k := range slices.Clone(order) {
			if len(kinds[k].Path) == 1 {
				write(kinds[k].Path)
			}
		}
		l := newLoader(Options{Path: "host.hcl", Source: []byte(src.String())})
		l.opened = func(b *hcl.Block, attrs []attrSpec, blocks []hcl.BlockHeaderSchema) {
			k := kinds[at[b.DefRange.Start.Line]]
			k.Attributes = nil
			for _, a := range attrs {
				k.Attributes = append(k.Attributes, Attribute{a.name, a.example, a.required})
			}
			for _, b := range blocks {
				add(append(slices.Clone(k.Path), b.Type), b)
			}
		}
		l.load()
	}
	var all []Kind
	for _, k := range order {
		all = append(all, *kinds[k])
	}
	return all
}

// SettingKey is a key of config.toml that the spec may set.
type SettingKey struct {
	Path   []string // "cache", "s3", "SecretKey"
	Global bool     // of gitlab_runner
	Text   bool     // any text is a value of it, or a list or map of texts
	In     string   // "[…]" or "{…}" around an element, "" for a plain value
	Secret bool
}

// SettingKeys are all that the tables know.
func SettingKeys() []SettingKey {
	var all []SettingKey
	var walk func(path []string, global bool, known settings)
	walk = func(path []string, global bool, known settings) {
		for name, s := range known {
			if s.ours != "" {
				continue
			}
			at := append(slices.Clone(path), name)
			if s.kind == kindTable {
				walk(at, global, s.keys)
				continue
			}
			k := SettingKey{Path: at, Global: global, Secret: s.secret}
			leaf := s
			switch {
			case s.kind == kindList && s.elem != nil:
				k.In, leaf = "[]", *s.elem
			case s.kind == kindMap && s.elem != nil:
				k.In, leaf = "{}", *s.elem
			}
			k.Text = leaf.kind == kindText && leaf.values == nil
			all = append(all, k)
		}
	}
	walk(nil, false, runnerSettings)
	walk(nil, true, globalSettings)
	slices.SortFunc(all, func(a, b SettingKey) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
	return all
}
