package host

import (
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// secretView compares a TOML file with what the plan wants in it and with what was written last.
type secretView struct {
	notes               *secretNotes
	wantText, ownedText string
	header              string // comments above the first key, as the plan has them
	want, owned         map[string]any
	filled              map[string]string // what the plan's text with placeholders stands for
}

// placeholder is what compile writes in the place of a secret.
var placeholder = regexp.MustCompile(`@SECRET:[A-Za-z0-9._:-]*@`)

// withoutSecrets makes texts equal that differ in secrets and comments alone.
func withoutSecrets(text string) string {
	text = placeholder.ReplaceAllString(text, FormerSecret)
	table, err := decodeTOML(text)
	if err != nil {
		return text
	}
	return encodeTOML(table)
}

func (d *SecretFiles) view(name string, n *secretNotes) (*secretView, error) {
	v := &secretView{notes: n, filled: map[string]string{}}
	if s := d.owned[name]; s != nil {
		v.ownedText = s["content"]
		v.owned, _ = decodeTOML(v.ownedText) // a State that was damaged since hides nothing and shows nothing
	}
	f := d.files[name]
	if f == nil {
		return v, nil
	}
	var err error
	if v.want, err = decodeTOML(f.Content); err != nil {
		return nil, fmt.Errorf("the plan's content: %w", err)
	}
	v.wantText = f.Content
	if end := regexp.MustCompile(`(?m)^[^#\n]`).FindStringIndex(f.Content); end != nil {
		v.header = f.Content[:end[0]]
	}
	var errs error
	eachString(v.want, func(text string) {
		if !placeholder.MatchString(text) || errs != nil {
			return
		}
		value, err := fillText(f, text, d.read)
		if err != nil {
			errs = err
		}
		v.filled[text] = value
	})
	return v, errs
}

// fillText puts secrets into one decoded string of a file.
func fillText(f *plan.File, text string, read func(from string) (string, error)) (string, error) {
	var pairs []string
	for _, s := range f.Secrets {
		if !strings.Contains(text, s.Placeholder) {
			continue
		}
		value, err := plan.Text{s.Secret}.Read(read)
		if err != nil {
			return "", fmt.Errorf("secret for %s: %w", s.Placeholder, err)
		}
		pairs = append(pairs, s.Placeholder, value)
	}
	return strings.NewReplacer(pairs...).Replace(text), nil
}

func eachString(value any, visit func(string)) {
	switch value := value.(type) {
	case string:
		visit(value)
	case map[string]any:
		for _, v := range value {
			eachString(v, visit)
		}
	case []map[string]any:
		for _, v := range value {
			eachString(v, visit)
		}
	case []any:
		for _, v := range value {
			eachString(v, visit)
		}
	}
}

// sums are what the notes remember of the secrets that were written.
func (v *secretView) sums() map[string]string {
	sums := make(map[string]string, len(v.filled))
	for text, value := range v.filled {
		sums[text] = v.notes.sum(text, value)
	}
	return sums
}

// written reports whether the value is what was last written for the plan's text.
func (v *secretView) written(text, value string) bool {
	for _, f := range v.notes.Files {
		if sum, ok := f.Written[text]; ok && sum == v.notes.sum(text, value) {
			return true
		}
	}
	return false
}

// runnersOwn are the keys that GitLab Runner writes into a section when it registers a runner or renews its token.
var runnersOwn = []string{"id", "token_obtained_at", "token_expires_at"}

// runnersDefaults are what it then writes for keys that the file did not have, where that is not the zero value.
var runnersDefaults = map[string]any{"session_timeout": int64(1800), "connection_max_age": "15m0s"}

// table masks a table. want and owned are those in the same place of the plan's and of the last written file, or nil.
func (v *secretView) table(have, want, owned map[string]any) map[string]any {
	masked := make(map[string]any, len(have))
	renewed := v.renewed(have, want)
	for key, value := range have {
		w, o := want[key], owned[key]
		if w == nil && o == nil && v.added(key, value) {
			continue
		}
		if renewed && key == "token" {
			masked[key] = w
			continue
		}
		masked[key] = v.value(key, value, w, o)
	}
	return masked
}

// added reports what GitLab Runner adds to a file that lacks it.
func (v *secretView) added(key string, value any) bool {
	return slices.Contains(runnersOwn, key) || reflect.DeepEqual(runnersDefaults[key], value) || isZero(value)
}

// isZero reports a value that means the same as leaving it out.
func isZero(value any) bool {
	switch value := value.(type) {
	case map[string]any:
		for key, v := range value {
			if !isZero(v) && !reflect.DeepEqual(runnersDefaults[key], v) {
				return false
			}
		}
		return true
	case []any:
		return len(value) == 0
	case []map[string]any:
		return len(value) == 0
	}
	return value == nil || reflect.ValueOf(value).IsZero()
}

func (v *secretView) value(key string, have, want, owned any) any {
	switch have := have.(type) {
	case string:
		return v.text(key, have, want, owned)
	case map[string]any:
		return v.table(have, asTable(want), asTable(owned))
	case []map[string]any:
		masked := make([]map[string]any, len(have))
		for i, t := range have {
			masked[i] = v.table(t, counterpart(t, i, want), counterpart(t, i, owned))
		}
		return masked
	case []any:
		masked := make([]any, len(have))
		for i, e := range have {
			masked[i] = v.value(key, e, element(want, i), element(owned, i))
		}
		return masked
	}
	return have
}

// plainKeys are keys whose text is never a secret.
var plainKeys = []string{"name", "url", "executor", "plugin", "plan", "pool", "os", "arch", "protocol", "username", "keepalive", "timeout",
	"update_interval", "update_interval_when_expecting", "instance_ready_command", "periods", "timezone", "idle_time", "dir", "image", "log_level",
	"log_format", "listen_address"}

// text masks a string.
func (v *secretView) text(key, have string, want, owned any) string {
	w, _ := want.(string)
	o, _ := owned.(string)
	switch {
	case w != "" && !placeholder.MatchString(w) && have == w:
		return w
	case w != "" && placeholder.MatchString(w) && have == v.filled[w]:
		return w
	case o != "" && !placeholder.MatchString(o) && have == o:
		return o
	case o != "" && placeholder.MatchString(o) && v.written(o, have):
		return placeholder.ReplaceAllString(o, FormerSecret)
	case slices.Contains(plainKeys, key) && !strings.Contains(have, "@"): // a URL may have a password
		return have
	}
	return OtherText
}

// renewed reports a section whose token GitLab Runner renewed: it says when it got it, and the plan's is still the one that was written.
func (v *secretView) renewed(have, want map[string]any) bool {
	w, _ := want["token"].(string)
	at, _ := have["token_obtained_at"].(time.Time)
	return placeholder.MatchString(w) && !at.IsZero() && have["token"] != v.filled[w] && v.written(w, v.filled[w])
}

// keepRunners adds to the text with secrets what is GitLab Runner's own in the present file: a renewed token, and what it noted beside it.
func (v *secretView) keepRunners(text string, have map[string]any) (string, error) {
	table, err := decodeTOML(text)
	if err != nil {
		return "", err
	}
	sections, _ := table["runners"].([]map[string]any)
	wanted, _ := v.want["runners"].([]map[string]any)
	kept := false
	for i, section := range sections {
		present := counterpart(section, i, have["runners"])
		if present == nil || i >= len(wanted) {
			continue
		}
		renewed := v.renewed(present, wanted[i])
		if !renewed && present["token"] != section["token"] {
			continue // another runner's
		}
		section["token"] = present["token"]
		for _, key := range runnersOwn {
			if value, ok := present[key]; ok && section[key] == nil && !isZero(value) {
				section[key], kept = value, true
			}
		}
	}
	if !kept {
		return text, nil
	}
	return v.header + encodeTOML(table), nil
}

// counterpart is the table of the same name in another list, or without names the one at the same index.
func counterpart(t map[string]any, i int, list any) map[string]any {
	tables, _ := list.([]map[string]any)
	if name, ok := t["name"]; ok {
		for _, other := range tables {
			if other["name"] == name {
				return other
			}
		}
		return nil
	}
	if i < len(tables) {
		return tables[i]
	}
	return nil
}

func asTable(value any) map[string]any {
	t, _ := value.(map[string]any)
	return t
}

func element(list any, i int) any {
	if l, _ := list.([]any); i < len(l) {
		return l[i]
	}
	return nil
}
