// Package templates holds the text of what fleetingd writes to a host. It knows
// no types: what a template is given is said at its top.
package templates

import (
	"embed"
	"fmt"
	"strings"
	"text/template"
)

//go:embed *.tmpl
var files embed.FS

// missingkey=error: a misspelt name must not write "<no value>" into a unit.
var all = template.Must(template.New("").Option("missingkey=error").ParseFS(files, "*.tmpl"))

// Render fills the template NAME.tmpl with data.
func Render(name string, data any) (string, error) {
	var b strings.Builder
	if err := all.ExecuteTemplate(&b, name+".tmpl", data); err != nil {
		return "", fmt.Errorf("template %s: %w", name, err)
	}
	return b.String(), nil
}
