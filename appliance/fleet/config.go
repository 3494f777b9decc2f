package fleet

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/appliance/suggest"
)

// config is a checked plugin_config: plan and pool, or the predecessor's keys.
type config struct {
	plan, pool string
	keys       map[string]any // of the predecessor; numbers are json.Number
}

const (
	keyPlan = "plan"
	keyPool = "pool"
	example = `write plan = "/etc/fleetingd/plan.json" and pool = "NAME"`
)

// parseConfig checks a plugin_config and reports everything that is wrong with it in one line. The values of the
// predecessor's keys are checked when they are compiled.
func parseConfig(data []byte, predecessor []string) (config, error) {
	var raw map[string]any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&raw); err != nil {
		return config{}, fmt.Errorf("plugin_config is not a table of keys: %w: %s", err, example)
	}
	var c config
	var problems []string
	problem := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	known := append([]string{keyPlan, keyPool}, predecessor...)
	var old []string // those of the predecessor's keys that are set
	for _, key := range sortedKeys(raw) {
		switch {
		case key == keyPlan:
			c.plan = text(key, raw[key], problem)
		case key == keyPool:
			c.pool = text(key, raw[key], problem)
		case slices.Contains(predecessor, key):
			old = append(old, key)
		default:
			problem("unknown key %s%s", quote(key), cmp.Or(suggest.DidYouMean(key, known), ": known are "+strings.Join(known, ", ")))
		}
	}
	_, hasPlan := raw[keyPlan]
	_, hasPool := raw[keyPool]
	switch {
	case len(old) > 0 && (hasPlan || hasPool):
		problem("%s and %s cannot be mixed: keep either plan and pool or the older keys",
			strings.Join(present(hasPlan, hasPool), " and "), quoteAll(old))
	case len(old) > 0:
		c.keys = raw
	case !hasPlan && !hasPool && len(problems) == 0:
		problem("plan and pool are missing: %s", example)
	case !hasPlan && (hasPool || len(problems) == 0):
		problem("plan is missing: %s", example)
	case !hasPool && hasPlan:
		problem("pool is missing: %s", example)
	}
	if len(problems) > 0 {
		return config{}, errors.New("plugin_config: " + strings.Join(problems, "; "))
	}
	return c, nil
}

func present(hasPlan, hasPool bool) []string {
	var keys []string
	if hasPlan {
		keys = append(keys, keyPlan)
	}
	if hasPool {
		keys = append(keys, keyPool)
	}
	return keys
}

// text returns a value that must be a non-empty string.
func text(key string, v any, problem func(string, ...any)) string {
	s, ok := v.(string)
	switch {
	case !ok:
		problem("%s must be a string such as %q, not %s", key, exampleOf[key], show(v))
	case s == "":
		problem("%s is empty: write for example %s = %q", key, key, exampleOf[key])
	}
	return s
}

var exampleOf = map[string]string{keyPlan: "/etc/fleetingd/plan.json", keyPool: "small"}

// show describes a decoded JSON value briefly, for a message.
func show(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case bool:
		return fmt.Sprint(v)
	case json.Number:
		return "the number " + cut(v.String())
	case string:
		return "the string " + quote(v)
	case []any:
		return fmt.Sprintf("a list of %d", len(v))
	case map[string]any:
		return "a table"
	}
	return fmt.Sprintf("a %T", v)
}

const maxShown = 64

func cut(s string) string {
	if len(s) > maxShown {
		return strings.ToValidUTF8(s[:maxShown], "") + "…"
	}
	return s
}

func quote(s string) string { return fmt.Sprintf("%q", cut(s)) }

func quoteAll(keys []string) string {
	quoted := make([]string, len(keys))
	for i, k := range keys {
		quoted[i] = quote(k)
	}
	return strings.Join(quoted, ", ")
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// loadPlan returns the Plan that the plugin_config names, or compiles it from the predecessor's keys.
func (g *Group) loadPlan() (*plan.Plan, error) {
	switch {
	case g.cfg.keys != nil:
		return g.predecessorPlan()
	case g.cfg.plan == "":
		return nil, errors.New("plugin_config: plan and pool are missing: " + example)
	}
	p, err := state.ReadPlan(g.cfg.plan)
	if err != nil {
		return nil, fmt.Errorf("plugin_config plan: %w (`fleetingd compile HOST -o DIR` writes it below DIR)", err)
	}
	return p, nil
}

// predecessorPlan compiles the predecessor's keys to a Plan with exactly one pool.
func (g *Group) predecessorPlan() (*plan.Plan, error) {
	if os.Getuid() != 0 {
		return nil, fmt.Errorf("plugin_config has the keys of the older fleeting-plugin-fleetingd, with which the plugin "+
			"sets up the network itself; that needs root, but this runs as uid %d: run gitlab-runner as root, "+
			"or set the host up with a host.hcl and write plan and pool", os.Getuid())
	}
	p, err := g.opts.Predecessor.Plan(g.cfg.keys)
	if err != nil {
		return nil, fmt.Errorf("plugin_config: %w", err)
	}
	if len(p.Pools) != 1 {
		return nil, fmt.Errorf("plugin_config: its keys compiled to %d pools instead of one", len(p.Pools))
	}
	g.cfg.pool = p.Pools[0].Name
	return p, nil
}
