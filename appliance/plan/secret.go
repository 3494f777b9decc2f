package plan

import (
	"fmt"
	"strings"
	"unicode"
)

// Fill is the file's content with its secrets in the place of their placeholders; read gives a secret's value. Every
// format that has a secret in it has it between double quotes, so a value that would end them is an error. No
// error of Fill's own holds a value.
func (f *File) Fill(read func(Secret) (string, error)) (string, error) {
	var pairs []string
	for _, s := range f.Secrets {
		value, err := read(s.Secret)
		if err != nil {
			return "", fmt.Errorf("%s: secret %s: %w", f.Path, s.Secret.From, err)
		}
		if strings.ContainsFunc(value, func(r rune) bool { return r == '"' || r == '\\' || !unicode.IsPrint(r) }) {
			return "", fmt.Errorf("%s: secret %s: it has a quote, a backslash or a control character in it, "+
				"which no GitLab token has", f.Path, s.Secret.From)
		}
		pairs = append(pairs, s.Placeholder, value)
	}
	// One pass: what a secret's value holds is never taken for a placeholder.
	return strings.NewReplacer(pairs...).Replace(f.Content), nil
}
