package convert

import (
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// place is where a value stands in the source: keys, and numbers of list elements.
type place []string

func (p place) to(step string) place { return append(slices.Clip(p), step) }

func (p place) at(i int) place { return p.to(strconv.Itoa(i)) }

// id is the place as one text: "a.b" as one key is another place than b in a.
func (p place) id() string { return strings.Join(p, "\x00") }

func (p place) key() string {
	if len(p) == 0 {
		return ""
	}
	return p[len(p)-1]
}

// table is the header that the value stands under: "[runners.docker]", or "" at the top.
func (p place) table() string {
	var steps []string
	for i, step := range p[:max(0, len(p)-1)] {
		if _, err := strconv.Atoi(step); err == nil && i > 0 {
			continue
		}
		steps = append(steps, step)
	}
	switch {
	case len(steps) == 0:
		return ""
	case len(steps) == 1 && steps[0] == "runners":
		return "[[runners]]"
	}
	return "[" + strings.Join(steps, ".") + "]"
}

// table is a table of the source while it is read: what was taken is gone from it, so that nothing is forgotten.
type table struct {
	at   place
	rest map[string]any
}

func newTable(at place, m map[string]any) *table { return &table{at: at, rest: maps.Clone(m)} }

// take returns a value and removes it; nil if there is none.
func (t *table) take(key string) any {
	v := t.rest[key]
	delete(t.rest, key)
	return v
}

// text takes a string. A value of another type stays in the table.
func (t *table) text(key string) string {
	s, ok := t.rest[key].(string)
	if ok {
		delete(t.rest, key)
	}
	return s
}

// number takes a whole number. A value of another type stays in the table.
func (t *table) number(key string) (int64, bool) {
	n, ok := t.rest[key].(int64)
	if ok {
		delete(t.rest, key)
	}
	return n, ok
}

// sub takes a table. A value of another type stays in this one.
func (t *table) sub(key string) *table {
	m, ok := t.rest[key].(map[string]any)
	if !ok {
		return newTable(t.at.to(key), map[string]any{})
	}
	delete(t.rest, key)
	return newTable(t.at.to(key), m)
}

// texts takes a list of strings. A value of another type stays in the table.
func (t *table) texts(key string) []string {
	list, ok := t.rest[key].([]any)
	if !ok {
		return nil
	}
	all := make([]string, len(list))
	for i, v := range list {
		if all[i], ok = v.(string); !ok {
			return nil
		}
	}
	delete(t.rest, key)
	return all
}

// tables takes an array of tables. A value of another type stays in the table.
func (t *table) tables(key string) []*table {
	list, ok := t.rest[key].([]map[string]any)
	if inline, isList := t.rest[key].([]any); isList { // [{ … }, { … }]
		ok = true
		for _, v := range inline {
			m, isTable := v.(map[string]any)
			ok = ok && isTable
			list = append(list, m)
		}
	}
	if !ok {
		return nil
	}
	delete(t.rest, key)
	all := make([]*table, len(list))
	for i, m := range list {
		all[i] = newTable(t.at.to(key).at(i), m)
	}
	return all
}

// keys are what is still in the table, sorted.
func (t *table) keys() []string { return slices.Sorted(maps.Keys(t.rest)) }

// isEmpty reports a table, or a list of them, that says nothing.
func isEmpty(v any) bool {
	switch v := v.(type) {
	case map[string]any:
		for _, e := range v {
			if !isEmpty(e) {
				return false
			}
		}
		return true
	case []map[string]any:
		return len(v) == 0
	}
	return false
}

// duration is a duration as a spec has it, "5m" for "5m0s".
func duration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
