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
	keys       map[string]any // the predecessor's; numbers are json.Number
}

const (
	keyPlan = "plan"
	keyPool = "pool"
	example = `write plan = "/etc/fleetingd/plan.json" and pool = "NAME"`
)

// parseConfig checks a plugin_config and reports all that is wrong with it, in one line. The values of the
// predecessor's keys are checked by who compiles them.
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
	var old []string // the predecessor's keys that are there
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
		problem("%s and %s cannot be mixed: keep plan and pool, or the older keys alone",
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

// text is a value that has to be a string, and not an empty one.
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

// show is a decoded JSON value for a message, short.
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

// loadPlan is the Plan that the plugin_config names, or that is compiled of the predecessor's keys.
func (g *Group) loadPlan() (*plan.Plan, error) {
	switch {
	case g.cfg.keys != nil:
		return g.predecessorPlan()
	case g.cfg.plan == "":
		return nil, errors.New("plugin_config: plan and pool are missing: " + example)
	}
	p, err := state.ReadPlan(g.cfg.plan)
	if err != nil {
		return nil, fmt.Errorf("plugin_config plan: %w (`fleetingd apply` writes it, or `fleetingd compile` below the folder that you give it)", err)
	}
	return p, nil
}

// predecessorPlan compiles the predecessor's keys. Its one pool is all that there is.
func (g *Group) predecessorPlan() (*plan.Plan, error) {
	if os.Getuid() != 0 {
		return nil, fmt.Errorf("plugin_config has the keys of the older fleeting-plugin-fleetingd, with which the plugin "+
			"brings the network up itself: that needs root, and this runs as uid %d; run gitlab-runner as root, "+
			"or set the host up with a host.hcl and write plan and pool", os.Getuid())
	}
	p, err := g.opts.Predecessor.Plan(g.cfg.keys)
	if err != nil {
		return nil, fmt.Errorf("plugin_config: %w", err)
	}
	if len(p.Pools) != 1 {
		return nil, fmt.Errorf("plugin_config: its keys made %d pools, not one", len(p.Pools))
	}
	g.cfg.pool = p.Pools[0].Name
	return p, nil
}
