package hostspec

import (
	"cmp"
	"path/filepath"
	"slices"
	"strings"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/hcl/v2/json"
)

// maxSource is the largest spec or variable file that is read. A spec for
// thousands of workers is a few KiB; HCL needs about 100 times the source's size in memory.
const maxSource = 1 << 20

// Options says what to load and what its variables are.
type Options struct {
	// Path is host.hcl, or host.hcl.json for HCL's JSON syntax. Files that the spec names
	// with file("x") are looked up from its folder.
	Path string
	// Source is the text itself where it does not come from a file; Path then only
	// names it in diagnostics.
	Source []byte

	// Vars are "name=value", VarFiles paths to files of `name = value` lines (or .json),
	// Environ "NAME=value" lines as os.Environ gives them, for FLEETINGD_VAR_name and
	// env("NAME"). A value in Vars wins over one in VarFiles (there the last file wins),
	// and that over the environment.
	Vars     []string
	VarFiles []string
	Environ  []string

	// Host picks a host block by its label. Where it is empty the only block is
	// taken, or among several the one whose label is Machine: the name of this
	// machine, which the caller knows and this package never asks for.
	Host    string
	Machine string
	// AnyHost is for who only wants to know whether the spec is valid: no host need be
	// picked, and Result.Host is the first where none is.
	AnyHost bool
}

// Result is what was read.
type Result struct {
	Host  *Host    // nil where the diagnostics have errors
	Hosts []string // the labels of all host blocks, in the order of the source

	// Files are the sources that the diagnostics' ranges point into, by file name.
	// Literal secrets in them are masked, so that a snippet can be shown.
	Files map[string]*hcl.File
}

// Load reads, decodes, defaults and validates a host spec. All findings are
// returned at once; Result is never nil and its Files serve to print them.
func Load(opts Options) (*Result, hcl.Diagnostics) {
	l := newLoader(opts)
	host, hosts := l.load()
	l.maskSecrets()
	sortByPlace(l.diags)
	if l.diags.HasErrors() {
		host = nil
	}
	return &Result{Host: host, Hosts: hosts, Files: l.files}, l.diags
}

func newLoader(opts Options) *loader {
	return &loader{
		opts:  opts,
		dir:   filepath.Dir(opts.Path),
		env:   environ(opts.Environ),
		files: map[string]*hcl.File{},
		attrs: map[attrKey]attrInfo{},

		tokens: newTokens(),
	}
}

// loader is one Load: what was read and what was found.
type loader struct {
	opts  Options
	dir   string
	env   map[string]string
	files map[string]*hcl.File
	diags hcl.Diagnostics

	scope  scope
	tokens tokens // of secrets
	attrs  map[attrKey]attrInfo
	masks  []hcl.Range // literal secrets
	// opened, if not nil, is told what each block may hold: tests learn the language from it.
	opened   func(b *hcl.Block, attrs []attrSpec, blocks []hcl.BlockHeaderSchema)
	work     float64 // of all expressions so far
	compared int     // names, for suggestions
}

func (l *loader) load() (*Host, []string) {
	body := l.parse(l.opts.Path, l.opts.Source)
	if body == nil {
		return nil, nil
	}
	content, diags := body.Content(rootSchema)
	l.diags = append(l.diags, explain(diags, "A spec", nil, rootSchema.Blocks)...)

	l.defineScope(content.Blocks)
	s := l.decode(content)
	l.setDefaults(s)
	l.validate(s)

	var names []string
	for _, h := range s.hosts {
		names = append(names, h.Name)
	}
	return l.pick(s), names
}

// parse reads one file of HCL or JSON; nil where nothing in it can be used.
func (l *loader) parse(path string, src []byte) hcl.Body {
	if src == nil {
		var err error
		if src, err = ReadSource(path); err != nil {
			l.errorf(nil, "Cannot read "+path, "%v.", err)
			return nil
		}
	}
	var file *hcl.File
	var diags hcl.Diagnostics
	isJSON := strings.HasSuffix(path, ".json")
	src = unixLines(src)
	// The file is known before it is parsed, so that a refusal can show its line.
	l.files[path] = &hcl.File{Bytes: src}
	if d := guardSource(src, path, isJSON); d != nil {
		l.diags = append(l.diags, d)
		return nil
	}
	if d := checkSource(src, path, isJSON); d != nil {
		l.diags = append(l.diags, d)
	}
	if isJSON {
		file, diags = json.Parse(src, path)
	} else {
		file, diags = hclsyntax.ParseConfig(src, path, hcl.InitialPos)
	}
	explainTemplates(diags)
	l.diags = append(l.diags, diags...)
	if file == nil || file.Body == nil {
		return nil
	}
	l.files[path] = file
	if diags.HasErrors() {
		// What a broken parse has left would only give misleading findings.
		return nil
	}
	return file.Body
}

// pick is the one host that was asked for.
func (l *loader) pick(s *spec) *Host {
	names := make([]string, len(s.hosts))
	for i, h := range s.hosts {
		names[i] = h.Name
	}
	want := l.opts.Host
	if want == "" {
		if len(s.hosts) == 1 {
			return s.hosts[0]
		}
		want = l.opts.Machine
		if short, _, _ := strings.Cut(want, "."); !slices.Contains(names, want) && slices.Contains(names, short) {
			want = short
		}
	}
	if i := slices.Index(names, want); i >= 0 {
		return s.hosts[i]
	}
	switch {
	case len(names) == 0: // already said
	case l.opts.AnyHost && l.opts.Host == "":
		return s.hosts[0]
	case l.opts.Host != "":
		l.errorf(nil, "No such host", "%s has no host block %q%s. It has %s.",
			l.opts.Path, want, l.didYouMean(want, names), quotedList(names))
	case want == "":
		l.errorf(nil, "Which host?", "%s has %d host blocks. Choose one with --host: %s.",
			l.opts.Path, len(names), quotedList(names))
	default:
		l.errorf(nil, "Which host?", "%s has %d host blocks, and none has this machine's name, %q. "+
			"Choose one with --host: %s.", l.opts.Path, len(names), want, quotedList(names))
	}
	return nil
}

// sortByPlace puts findings in the order of the source, those without a place first.
func sortByPlace(diags hcl.Diagnostics) {
	slices.SortStableFunc(diags, func(a, b *hcl.Diagnostic) int {
		switch {
		case a.Subject == nil && b.Subject == nil:
			return 0
		case a.Subject == nil:
			return -1
		case b.Subject == nil:
			return 1
		}
		return cmp.Or(cmp.Compare(a.Subject.Filename, b.Subject.Filename), cmp.Compare(a.Subject.Start.Byte, b.Subject.Start.Byte))
	})
}
