package hostspec

import (
	"cmp"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
)

// settingsCheck compares settings with what GitLab Runner reads. GitLab Runner silently ignores unknown keys, and refuses to
// start on a value of the wrong type.
//
// What is known to be wrong is an error: a type, a key in the wrong table, another spelling. A key in no table is only a
// warning, even if it looks like a typo: GitLab adds keys, and must not have to wait for fleetingd.
type settingsCheck struct {
	l     *loader
	owner any    // the struct that the settings belong to
	attr  string // "settings" or "gitlab_runner", where the keys' places are noted
	root  settings
	what  string // the root, in a message
}

// checkSettings checks a runner's settings.
func (l *loader) checkSettings(r *Runner) {
	if !l.ok(r, "settings") {
		return
	}
	c := settingsCheck{l: l, owner: r, attr: "settings", root: runnerSettings, what: "a [[runners]] section"}
	c.table(nil, r.Settings, runnerSettings)
	for _, key := range slices.Sorted(maps.Keys(r.Settings)) {
		if s := runnerSettings[key]; s.executor != "" && s.executor != r.Executor && l.ok(r, "executor") == l.given(r, "executor") {
			l.warnf(c.at(settingPath{key}), "A setting without effect", "%s is for executor = %q, but this runner has %q, so GitLab Runner ignores it.",
				quote(key), s.executor, r.Executor)
		}
	}
}

// checkConnector finds values of connector_config that the plugin refuses when it starts (fleet's checkSettings): no job could reach a worker.
func (l *loader) checkConnector(r *Runner, user string) {
	autoscaler, _ := r.Settings["autoscaler"].(map[string]any)
	connector, _ := autoscaler["connector_config"].(map[string]any)
	text := func(key string) string { v, _ := connector[key].(string); return v }
	bad := func(key, detail string, args ...any) {
		at := settingPath{"settings", "autoscaler", "connector_config", key}
		l.errorf(l.placeOf(r, at), "Invalid settings", "%s is %s, but %s", quote(at[1:].String()), quote(text(key)), fmt.Sprintf(detail, args...))
	}
	if v := text("protocol"); v != "" && v != "ssh" {
		bad("protocol", "workers are reached over SSH. Omit it.")
	}
	if v := text("os"); v != "" && v != "linux" {
		bad("os", "workers run Linux. Omit it.")
	}
	if static, _ := connector["use_static_credentials"].(bool); static {
		return
	}
	for _, key := range []string{"key_path", "password"} {
		if _, ok := connector[key]; ok {
			at := settingPath{"settings", "autoscaler", "connector_config", key}
			l.warnf(l.placeOf(r, at), "A setting without effect", "%s is used with use_static_credentials = true only: each worker has a key of its own otherwise.",
				quote(at[1:].String()))
		}
	}
	if v := text("username"); v != "" && user != "" && v != user {
		bad("username", "a worker's key is made for the image's user %q. Omit it, or write user = %s in the image block.", user, strconv.Quote(v))
	}
}

// checkGlobalSettings checks a host's gitlab_runner block.
func (l *loader) checkGlobalSettings(h *Host) {
	if l.ok(h, "gitlab_runner") {
		c := settingsCheck{l: l, owner: h, attr: "gitlab_runner", root: globalSettings, what: "gitlab_runner"}
		c.table(nil, h.GitLabRunner, globalSettings)
	}
}

// settingPath is where a setting is: keys, and "[0]" for an element of a list.
type settingPath []string

func (p settingPath) String() string {
	var b strings.Builder
	for i, step := range p {
		if i > 0 && !strings.HasPrefix(step, "[") {
			b.WriteByte('.')
		}
		b.WriteString(step)
	}
	return b.String()
}

// id names the path among a block's attributes: "cache.s3" as one key is another place than s3 in cache.
func (p settingPath) id() string { return strings.Join(p, "\x00") }

// to is the path of what is in it.
func (p settingPath) to(step string) settingPath { return append(slices.Clip(p), step) }

// write is a sentence that says what to write for the last key.
func (p settingPath) write(value string) string {
	const longest = 60
	switch key := p[len(p)-1]; {
	case strings.HasPrefix(key, "["), len(key) > longest:
		return fmt.Sprintf("Write %s instead.", value)
	case hclsyntax.ValidIdentifier(key):
		return fmt.Sprintf("Write %s = %s.", key, value)
	default:
		return fmt.Sprintf("Write %q = %s.", key, value)
	}
}

// nested is the path as one writes it: cache = { s3 = VALUE }.
func (p settingPath) nested(value string) string {
	return strings.Join(p, " = { ") + " = " + value + strings.Repeat(" }", len(p)-1)
}

// placeOf is where a setting is, or the nearest table around it. The path begins with the attribute's name.
func (l *loader) placeOf(owner any, p settingPath) *hcl.Range {
	for ; len(p) > 1; p = p[:len(p)-1] {
		if at, ok := l.attrs[attrKey{owner, p.id()}]; ok {
			return &at.rng
		}
	}
	return l.at(owner, p[0])
}

func (c *settingsCheck) at(p settingPath) *hcl.Range {
	return c.l.placeOf(c.owner, append(settingPath{c.attr}, p...))
}

func (c *settingsCheck) errorf(p settingPath, detail string, args ...any) {
	c.l.errorf(c.at(p), "Invalid "+c.attr, "%s", fmt.Sprintf(detail, args...))
}

func (c *settingsCheck) warnf(p settingPath, detail string, args ...any) {
	c.l.warnf(c.at(p), "Unknown setting", "%s", fmt.Sprintf(detail, args...))
}

// table checks the keys of a table, and their values.
func (c *settingsCheck) table(p settingPath, table map[string]any, known settings) {
	for _, key := range slices.Sorted(maps.Keys(table)) {
		name := key
		if _, ok := known[key]; !ok {
			name = spelling(key, known)
		}
		at := p.to(key)
		switch s, ok := known[name]; {
		case ok && s.ours != "":
			c.errorf(at, "%s may not have %s: %s.", c.attr, quote(at.String()), s.ours)
		case ok && name != key:
			c.errorf(at, "GitLab Runner spells %s as %s. Write %s.", quote(at.String()), name, name)
		case ok:
			c.value(at, table[key], s)
		default:
			c.unknown(p, key, table[key], known)
		}
	}
}

// spelling is the known key that is the same word, or "".
func spelling(key string, known settings) string {
	for _, name := range slices.Sorted(maps.Keys(known)) {
		if sameWord(name, key) {
			return name
		}
	}
	return ""
}

var separators = strings.NewReplacer("_", "", "-", "", " ", "")

// sameWord compares names without case and separators: SecretKey is secret_key.
func sameWord(a, b string) bool {
	return strings.EqualFold(separators.Replace(a), separators.Replace(b))
}

// isSecretSetting reports whether a setting's value is a secret. A secret in the wrong table is one too.
func isSecretSetting(p settingPath) bool {
	known := runnerSettings
	for _, key := range p[:len(p)-1] {
		s := known[cmp.Or(spelling(key, known), key)]
		if s.kind == kindMap {
			return false // names of the user's own
		}
		known = s.keys
	}
	return slices.ContainsFunc(secretNames, func(name string) bool { return sameWord(name, p[len(p)-1]) })
}

// unknown is about a key that its table does not have.
func (c *settingsCheck) unknown(p settingPath, key string, value any, known settings) {
	at := p.to(key)
	if cure := c.elsewhere(p, key, value); cure != "" {
		c.errorf(at, "%s", cure)
		return
	}
	suggestion := "."
	if near := c.l.nearest(key, slices.Collect(maps.Keys(known))); near != "" {
		suggestion = fmt.Sprintf("; did you mean %q?", p.to(near).String())
	}
	c.warnf(at, "%s is not a setting of GitLab Runner %s%s GitLab Runner ignores unknown settings.", quote(at.String()), runnerVersion, suggestion)
}

// elsewhere is the cure for a key that is known at another place, or "".
func (c *settingsCheck) elsewhere(p settingPath, key string, value any) string {
	if strings.Contains(key, ".") {
		return c.dotted(p, key, value)
	}
	if len(p) == 0 && c.attr == "settings" && (key == "runners" || key == "settings") {
		return fmt.Sprintf("settings is the [[runners]] section itself. Write its settings without %s = { … } around them.", key)
	}
	if !settingNames()[key] {
		return ""
	}
	is := fmt.Sprintf("%s is not a setting of %s.", quote(p.to(key).String()), c.tableName(p))
	if places := placesOf(c.root, nil, key); len(places) > 0 {
		if len(places[0]) == 1 {
			return fmt.Sprintf("%s Write %s outside of it, directly in %s.", is, key, c.attr)
		}
		var ways []string
		for _, place := range places[:min(len(places), 3)] {
			ways = append(ways, place.nested("…"))
		}
		return fmt.Sprintf("%s Write %s.", is, strings.Join(ways, " or "))
	}
	if cure := replacement(runnerSettings, key); cure != "" {
		return fmt.Sprintf("%s may not have %s: %s.", c.attr, quote(p.to(key).String()), cure)
	}
	if c.attr == "settings" {
		if places := placesOf(globalSettings, nil, key); len(places) > 0 {
			return fmt.Sprintf("%s It is global in config.toml. Write gitlab_runner { %s } in the host block.", is, places[0].nested("…"))
		}
		return ""
	}
	if places := placesOf(runnerSettings, nil, key); len(places) > 0 {
		return fmt.Sprintf("%s It belongs to each runner. Write settings = { %s } in the runner block.", is, places[0].nested("…"))
	}
	return ""
}

// settingNames are the names of all settings, in whatever table they are.
var settingNames = sync.OnceValue(func() map[string]bool {
	names := map[string]bool{}
	var add func(known settings)
	add = func(known settings) {
		for name, s := range known {
			names[name] = true
			add(s.keys)
		}
	}
	add(runnerSettings)
	add(globalSettings)
	return names
})

// replacement is what to write instead of a setting that the spec has its own words for, wherever it was written.
func replacement(known settings, key string) string {
	if s := known[key]; s.ours != "" {
		return s.ours
	}
	for _, name := range slices.Sorted(maps.Keys(known)) {
		if cure := replacement(known[name].keys, key); cure != "" {
			return cure
		}
	}
	return ""
}

// tableName is a table in a message.
func (c *settingsCheck) tableName(p settingPath) string {
	if len(p) == 0 {
		return c.what
	}
	return quote(p.String())
}

// dotted is the cure for a key such as "cache.s3" or "runners.cache.s3", where a table is needed.
func (c *settingsCheck) dotted(p settingPath, key string, value any) string {
	shown := "…"
	if _, table := value.(map[string]any); table {
		shown = "{ … }"
	}
	keys := settingPath(strings.Split(key, "."))
	for len(keys) > 1 && (keys[0] == "runners" || keys[0] == c.attr) {
		keys = keys[1:]
	}
	for _, full := range []settingPath{append(slices.Clip(p), keys...), keys} {
		if _, ok := find(c.root, full); ok {
			return fmt.Sprintf("A key names one setting, not a path. Write %s for %s.", full.nested(shown), quote(key))
		}
	}
	if _, ok := find(globalSettings, keys); ok {
		return fmt.Sprintf("A key names one setting, not a path, and %s is global in config.toml. Write gitlab_runner { %s } in the host block.",
			quote(key), keys.nested(shown))
	}
	return fmt.Sprintf("A key names one setting, and %s has a dot. Write nested tables, such as cache = { s3 = { … } }.", quote(key))
}

// find returns the setting at a path.
func find(known settings, p settingPath) (setting, bool) {
	s, ok := known[p[0]]
	if !ok || len(p) == 1 {
		return s, ok
	}
	return find(s.keys, p[1:])
}

// placesOf returns the paths of the settings with a name, the shortest first. It leaves out rarely used tables.
func placesOf(known settings, p settingPath, name string) []settingPath {
	var places []settingPath
	if s, ok := known[name]; ok && s.ours == "" {
		places = append(places, p.to(name))
	}
	for _, key := range slices.Sorted(maps.Keys(known)) {
		if s := known[key]; s.kind == kindTable && key != "experimental" && key != "vm_isolation" {
			places = append(places, placesOf(s.keys, p.to(key), name)...)
		}
	}
	return places
}

// value checks the type of a value. A leaf that is none of the plain types is text that holds a secret.
func (c *settingsCheck) value(p settingPath, value any, s setting) {
	switch s.kind {
	case kindAny:
	case kindTable:
		if table, ok := value.(map[string]any); ok {
			c.table(p, table, s.keys)
		} else {
			c.wrongType(p, value, s, "a table", p.write("{ … }"))
		}
	case kindTables:
		c.tables(p, value, s)
	case kindMap:
		c.freeMap(p, value, s)
	case kindList:
		c.list(p, value, s)
	case kindTextOrList:
		if _, ok := value.([]any); ok {
			c.list(p, value, listOf(oneOfTexts(s.values...)))
		} else {
			c.text(p, value, s)
		}
	case kindText, kindAddress:
		c.text(p, value, s)
	case kindDuration:
		c.duration(p, value, s)
	default:
		c.scalar(p, value, s)
	}
}

// wrongType says what was wanted, what there is, and what to write.
func (c *settingsCheck) wrongType(p settingPath, value any, s setting, want, cure string) {
	got := typeName(value)
	if shown := asWritten(value); shown != "" && !s.secret {
		got += " " + shown
	}
	c.errorf(p, "%s must be %s; got %s. %s", quote(p.String()), want, got, cure)
}

// typeName is the type of a settings value, in a message.
func typeName(v any) string {
	switch v.(type) {
	case bool:
		return "the boolean"
	case int64, float64:
		return "the number"
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	case string:
		return "the string"
	}
	return "a secret, which is a string"
}

// asWritten is a plain value as one writes it, or "" for one that is long or has parts.
func asWritten(v any) string {
	const longest = 60
	switch v := v.(type) {
	case bool:
		return strconv.FormatBool(v)
	case int64:
		return strconv.FormatInt(v, 10)
	case float64:
		return strconv.FormatFloat(v, 'g', -1, 64)
	case string:
		if len(v) <= longest {
			return strings.NewReplacer("${", "$${", "%{", "%%{").Replace(strconv.Quote(v))
		}
	}
	return ""
}

func (c *settingsCheck) text(p settingPath, value any, s setting) {
	switch v := value.(type) {
	case string:
		switch {
		case s.values != nil && !slices.Contains(s.values, v):
			c.errorf(p, "%s must be one of %s; got %s%s.", quote(p.String()), quotedList(nonEmpty(s.values)), quote(v), c.l.didYouMean(v, s.values))
		case s.kind == kindAddress:
			address := v
			if s.portless && !strings.Contains(strings.Trim(v, "[]"), ":") && v != "" {
				address += ":1"
			}
			if host, port, err := net.SplitHostPort(address); err != nil || !isPort(port) || strings.Contains(host, "/") {
				c.errorf(p, "%s must be an address with a port; got %s. %s", quote(p.String()), quote(v), p.write(`"127.0.0.1:9252" or ":9252", for example`))
			}
		}
	case bool, int64, float64:
		cure := strconv.Quote(asWritten(v))
		switch {
		case s.values != nil:
			cure = strconv.Quote(nonEmpty(s.values)[0]) + ", for example"
		case s.kind == kindAddress:
			cure = strconv.Quote(":" + asWritten(v))
		}
		c.wrongType(p, value, s, "a string", p.write(cure))
	case []any:
		cure := `"…"`
		if key := p[len(p)-1]; strings.HasSuffix(key, "_script") || strings.HasSuffix(key, "_command") {
			cure = `join("\n", [ … ])`
		}
		c.wrongType(p, value, s, "a string", p.write(cure))
	case map[string]any:
		c.wrongType(p, value, s, "a string", p.write(`"…"`))
	}
}

func nonEmpty(values []string) []string {
	return slices.DeleteFunc(slices.Clone(values), func(v string) bool { return v == "" })
}

// scalar checks booleans and numbers.
func (c *settingsCheck) scalar(p settingPath, value any, s setting) {
	text, _ := value.(string)
	number := wholeNumber(text)
	switch s.kind {
	case kindBool:
		if _, ok := value.(bool); ok {
			return
		}
		cure := "true or false"
		if b, err := strconv.ParseBool(text); err == nil {
			cure = strconv.FormatBool(b)
		}
		c.wrongType(p, value, s, "true or false", p.write(cure))
	case kindNumber:
		switch value.(type) {
		case int64, float64:
			return
		}
		c.wrongType(p, value, s, "a number", p.write(cmp.Or(number, "1.5, for example")))
	case kindInteger:
		switch n, ok := value.(int64); {
		case !ok:
			c.wrongType(p, value, s, "a whole number", p.write(cmp.Or(number, "10, for example")))
		case s.least > 0 && n < s.least:
			c.errorf(p, "%s must be at least %d; got %d.", quote(p.String()), s.least, n)
		}
	case kindSeconds:
		if _, ok := value.(int64); ok {
			return
		}
		if d, err := time.ParseDuration(text); number == "" && err == nil {
			number = strconv.FormatInt(int64(d/time.Second), 10)
		}
		c.wrongType(p, value, s, "a whole number of seconds", p.write(cmp.Or(number, "30, for example")))
	}
}

// wholeNumber is the whole number that a text holds, or "".
func wholeNumber(text string) string {
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	if err != nil {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

func (c *settingsCheck) duration(p settingPath, value any, s setting) {
	switch v := value.(type) {
	case string:
		if _, err := time.ParseDuration(v); err == nil {
			return
		}
		cure := `"30s", for example`
		if n := wholeNumber(v); n != "" {
			cure = strconv.Quote(n + "s")
		}
		c.wrongType(p, value, s, "a duration with a unit", p.write(cure))
	case int64, float64:
		cure := asWritten(v) + "s"
		if n, ok := v.(int64); ok && n >= int64(time.Second) { // nanoseconds were meant
			cure = time.Duration(n).String()
		}
		c.errorf(p, "%s must be a duration with a unit; got %s, which GitLab Runner reads as nanoseconds. %s",
			quote(p.String()), asWritten(v), p.write(strconv.Quote(cure)))
	default:
		c.wrongType(p, value, s, "a duration with a unit", p.write(`"30s", for example`))
	}
}

func (c *settingsCheck) list(p settingPath, value any, s setting) {
	environment := p[len(p)-1] == "environment"
	list, ok := value.([]any)
	if !ok {
		cure := "[ … ]"
		table, isTable := value.(map[string]any)
		if lit := asWritten(value); lit != "" {
			if _, text := value.(string); !text && s.elem.kind == kindText {
				lit = strconv.Quote(lit)
			}
			cure = "[" + lit + "]"
		} else if isTable && environment {
			cure = asVariables(table)
		}
		c.wrongType(p, value, s, "a list", p.write(cure))
		return
	}
	for i, v := range list {
		at := p.to(fmt.Sprintf("[%d]", i))
		c.value(at, v, *s.elem)
		if text, ok := v.(string); ok && environment && !strings.Contains(text, "=") {
			c.errorf(at, "%s must be NAME=value; got %s.", quote(at.String()), quote(text))
		}
	}
}

// asVariables is a table of variables as the list that environment takes.
func asVariables(table map[string]any) string {
	const most = 3
	var list []string
	for _, key := range slices.Sorted(maps.Keys(table)) {
		value, ok := table[key].(string)
		text := asWritten(key + "=" + value)
		if !ok || text == "" || len(list) == most {
			return `["NAME=value"]`
		}
		list = append(list, text)
	}
	return "[" + strings.Join(list, ", ") + "]"
}

// freeMap checks a table whose keys may have any name. Those of feature_flags are known.
func (c *settingsCheck) freeMap(p settingPath, value any, s setting) {
	table, ok := value.(map[string]any)
	if !ok {
		c.wrongType(p, value, s, "a table", p.write("{ … }"))
		return
	}
	for _, key := range slices.Sorted(maps.Keys(table)) {
		at := p.to(key)
		c.value(at, table[key], *s.elem)
		if p.String() == "feature_flags" && !slices.Contains(featureFlags, key) {
			c.warnf(at, "%s is not a feature flag of GitLab Runner %s%s. GitLab Runner ignores unknown ones.", quote(key), runnerVersion, c.l.didYouMean(key, featureFlags))
		}
	}
}

func (c *settingsCheck) tables(p settingPath, value any, s setting) {
	list, ok := value.([]any)
	if !ok {
		c.wrongType(p, value, s, "a list of tables", p.write("[{ … }]"))
		return
	}
	for i, v := range list {
		at := p.to(fmt.Sprintf("[%d]", i))
		if table, ok := v.(map[string]any); ok {
			c.table(at, table, s.keys)
		} else {
			c.wrongType(at, v, s, "a table", at.write("{ … }"))
		}
	}
}
