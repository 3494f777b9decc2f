// Package templates holds the text of the files that fleetingd writes to a host.
// Their values come from a type of package compile.
package templates

import (
	"embed"
	"fmt"
	"strings"
	"text/template"
)

//go:embed *.tmpl
var files embed.FS

// missingkey=error: a misspelt name must be an error, not "<no value>" in a unit.
var all = template.Must(template.New("").Option("missingkey=error").ParseFS(files, "*.tmpl"))

// Render fills the template NAME.tmpl with data. A value that data lacks is an error.
func Render(name string, data any) (string, error) {
	var b strings.Builder
	if err := all.ExecuteTemplate(&b, name+".tmpl", data); err != nil {
		return "", fmt.Errorf("template %s: %w", name, err)
	}
	return b.String(), nil
}
