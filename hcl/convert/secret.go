package convert

import (
	"errors"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// quotedText is what a message quotes.
var quotedText = regexp.MustCompile(`"[^"]*"|'[^']*'|‘[^’]*’`)

var separators = strings.NewReplacer("_", "", "-", "", " ", "", ".", "")

// secretWords are in the names of what is secret, or close to it.
var secretWords = []string{"token", "secret", "password", "passwd", "passphrase", "privatekey", "accesskey", "accountkey", "apikey", "credential",
	"authconfig", "dsn", "bearer", "consumerkey", "applicationkey", "sharedkey"}

// secretKey reports whether the values of a key are secrets: of a setting, of a variable or of a machine's option. The path of a file is
// none.
func secretKey(key string) bool {
	k := strings.ToLower(separators.Replace(key))
	for _, suffix := range []string{"file", "path", "dir", "profile", "expiresat", "obtainedat", "withouttokens"} {
		if strings.HasSuffix(k, suffix) {
			return false
		}
	}
	return slices.ContainsFunc(secretWords, func(w string) bool { return strings.Contains(k, w) })
}

// secretShapes are texts that are, or hold, a secret whatever they are called: tokens by their prefixes, private keys, and passwords in
// URLs and commands. A variable in the place of the password is none.
var secretShapes = []*regexp.Regexp{
	regexp.MustCompile(`(glrt|glrtr|glpat|gldt|glcbt|glptt|glft|glimt|glagent|gloas|glsoat|glffct)-[A-Za-z0-9_.=-]{3,}`),
	regexp.MustCompile(`GR1348941[A-Za-z0-9_-]{3,}`),
	regexp.MustCompile(`(AKIA|ASIA)[A-Z0-9]{12,}`),
	regexp.MustCompile(`(ghp|gho|ghs|ghu|github_pat|dop_v1|hcloud|xox[abprs])[_-][A-Za-z0-9_-]{16,}`),
	regexp.MustCompile(`eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.?[A-Za-z0-9_-]*`),
	regexp.MustCompile(`(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*`),
	regexp.MustCompile(`://[^\s/@:$"']*:[^\s/@$"'][^\s/@"']*@`),
	regexp.MustCompile(`://[A-Za-z0-9_-]{16,}@`),
	regexp.MustCompile(`(?i)(token|secret|passw(or)?d|api[_-]?key|access[_-]?key|private[_-]?key)(\s*=\s*["']?|["']\s*:\s*["']?|:\s+["']?)[^\s"'$&|;,)}*…]{3}[^\s"']*`),
	regexp.MustCompile(`(?i)--(password|token|secret)[ =]["']?[^\s"'$-][^\s"']*`),
	regexp.MustCompile(`(?i)\blogin\b[^\n]*\s-p[ =]?["']?[^\s"'$-][^\s"']*`),
	regexp.MustCompile(`\$(1|5|6|y|gy|7|2[abxy]|argon2id?)\$[./A-Za-z0-9$=,]{8,}`), // crypt(5)
	regexp.MustCompile(`(?i)\b(bearer|basic)\s+[A-Za-z0-9+/._~=-]{8,}`),
	regexp.MustCompile(`"auth"\s*:\s*"[^"$]{4,}"`),
	regexp.MustCompile(`\bcurl\b[^\n]*\s-u[ =]?["']?[^\s"'$:]+:[^\s"'$]+`),
}

// looksSecret reports a text that is, or holds, a secret.
func looksSecret(s string) bool {
	return slices.ContainsFunc(secretShapes, func(r *regexp.Regexp) bool { return r.MatchString(s) })
}

// masking stands for a secret in comments and errors.
const masking = "***"

// mask replaces what looks like a secret.
func mask(s string) string {
	for _, r := range secretShapes {
		s = r.ReplaceAllLiteralString(s, masking)
	}
	return s
}

// masked is a copy of a value with its secrets masked: those by the key that it stands under, and those by their look.
func masked(key string, v any) any {
	switch v := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(v))
		for k, e := range v {
			out[mask(k)] = masked(k, e)
		}
		return out
	case []map[string]any:
		out := make([]map[string]any, len(v))
		for i, e := range v {
			out[i] = masked(key, e).(map[string]any)
		}
		return out
	case []any:
		out := make([]any, len(v))
		for i, e := range v {
			out[i] = masked(key, e)
		}
		return out
	case string:
		name, value, assigned := strings.Cut(v, "=")
		switch {
		case v == "":
			return v
		case secretKey(key):
			return masking
		case assigned && secretKey(name) && secretValue(value):
			return mask(name) + "=" + masking
		}
		return mask(v)
	case int64, float64:
		if secretKey(key) {
			return masking
		}
	}
	return v
}

// secretValue reports whether a value of a secret's name is one: a variable of the job's is none.
func secretValue(v string) bool { return v != "" && !strings.HasPrefix(v, "$") }

// isSecret reports whether a string at a place of the settings is, or holds, a secret.
func isSecret(p place, v string) bool {
	if v == "" {
		return false
	}
	if key := settingName(p); secretKey(key) || looksSecret(v) {
		return true
	}
	name, value, ok := strings.Cut(v, "=")
	return ok && secretKey(name) && secretValue(value)
}

// settingName is the key that a value, or the list that it is in, has.
func settingName(p place) string {
	for i := len(p) - 1; i >= 0; i-- {
		if _, err := strconv.Atoi(p[i]); err != nil {
			return p[i]
		}
	}
	return ""
}

// secretText is the expression for a string of the settings that is, or holds, a secret, and a comment about it.
func (c *converter) secretText(p place, v string) (expr, comment string, ok bool) {
	if !isSecret(p, v) {
		return "", "", false
	}
	what := settingName(p)
	// Of a variable, the name stays readable.
	if name, value, assigned := strings.Cut(v, "="); assigned && variableName.MatchString(name) && !secretKey(what) && value != "" && !looksSecret(name) {
		ref := c.secret(what+"-"+name, value)
		return `"` + name + `=${` + ref + `}"`, "the value that " + name + " has in " + oneLine(c.opts.Name), true
	}
	return c.secret(strings.Join(p[min(2, len(p)-1):], "-"), v), "the value of " + oneLine(what) + " in " + oneLine(c.opts.Name), true
}

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

var notInFileName = regexp.MustCompile(`[^a-z0-9]+`)

// secret keeps a secret and returns the expression that reads it. Name is what the file is called, as far as it can be.
func (c *converter) secret(name, value string) string {
	name = notInFileName.ReplaceAllString(strings.ToLower(mask(name)), "-")
	if name = strings.Trim(c.secretPrefix+"-"+name, "-"); len(name) > 80 {
		name = name[:80]
	}
	dir := c.opts.SecretsDir
	if dir == "" {
		dir = DefaultSecretsDir
	}
	file := path.Join(dir, name)
	for n := 2; slices.Contains(c.secretFiles, file); n++ {
		file = path.Join(dir, name+"-"+strconv.Itoa(n))
	}
	c.secretFiles = append(c.secretFiles, file)
	if value != "" {
		c.secrets = append(c.secrets, Secret{Path: file, Value: value})
	}
	return "file(" + literal(file) + ")"
}

// maskError is an error without the secrets that were found so far. What it quotes is masked already.
func (c *converter) maskError(err error) error {
	text := err.Error()
	for _, s := range c.secrets {
		const shortest = 6 // a shorter one is in other words, too
		if len(s.Value) >= shortest {
			text = strings.ReplaceAll(text, s.Value, masking)
		}
	}
	return errors.New(text)
}

func sortedKeys(m map[string]any) []string { return slices.Sorted(maps.Keys(m)) }
