package apply

import (
	"encoding/json"
	"io"
	"maps"
	"slices"

	"github.com/fleetingd/fleetingd/appliance/host"
)

// ReportVersion is the version of the JSON that WriteJSON writes. Fields are only added; anything else makes another version.
const ReportVersion = 1

// report is a change for programs. packaging/docs/apply.md documents it.
type report struct {
	Version    int            `json:"version"`
	Host       string         `json:"host"`
	Plan       string         `json:"plan"`       // digest; "" for destroy
	Now        string         `json:"now"`        // digest of the current generation's plan; "" if there is none
	Generation int            `json:"generation"` // the current one; 0 if there is none
	Changed    bool           `json:"changed"`
	Words      []Word         `json:"words"`
	Changes    []reportChange `json:"changes"`
	Unchanged  map[string]int `json:"unchanged"`
	Skipped    []host.Object  `json:"skipped"`
}

type reportChange struct {
	Action   string     `json:"action"` // create, update, delete, run
	Kind     host.Kind  `json:"kind"`
	Name     string     `json:"name"`
	Origin   string     `json:"origin,omitempty"`
	Conflict Conflict   `json:"conflict,omitempty"`
	Before   host.State `json:"before"` // without contents; null: it does not exist
	After    host.State `json:"after"`
	Diff     string     `json:"diff,omitempty"`
}

// WriteJSON writes a change for programs. It holds no secret. The same change is always the same text.
func (c *Change) WriteJSON(w io.Writer) error {
	r := report{
		Version: ReportVersion, Plan: c.Digest, Changed: !c.Empty(), Words: append([]Word{}, c.Words()...), Changes: []reportChange{},
		Unchanged: map[string]int{}, Skipped: append([]host.Object{}, c.Skipped...),
	}
	if c.Current != nil {
		r.Host, r.Now, r.Generation = c.Current.Plan.Host, c.Current.Digest, c.Current.Number
	}
	if c.Plan != nil {
		r.Host = c.Plan.Host
	}
	for _, kind := range slices.Sorted(maps.Keys(c.Unchanged)) {
		r.Unchanged[string(kind)] = c.Unchanged[kind]
	}
	for _, s := range slices.Concat(c.Steps, c.last) {
		if isAction(s.Kind) && s.After["do"] != "yes" {
			continue // it is done on the way back alone
		}
		r.Changes = append(r.Changes, reportChange{
			Action: s.action(), Kind: s.Kind, Name: s.Name, Origin: s.Origin, Conflict: s.Conflict,
			Before: withoutContents(s.Before), After: withoutContents(s.After), Diff: s.Diff(),
		})
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(r)
}

func withoutContents(s host.State) host.State {
	s = maps.Clone(s)
	for _, key := range contents {
		delete(s, key)
	}
	return s
}
