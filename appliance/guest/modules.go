package guest

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// modules is a kernel's module tree, as depmod(8) indexes it.
type modules struct {
	dir     string              // /lib/modules/VERSION
	file    map[string]string   // module name → path below dir
	deps    map[string][]string // module name → names it needs, in modules.dep's order
	soft    map[string][]string // module name → names or aliases to load before it, if they exist
	builtin map[string]bool
	alias   map[string][]string
}

// moduleName is the name of a module file; to the kernel - and _ are the same.
func moduleName(path string) string {
	base, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(base, "-", "_")
}

func readModules(dir string) (*modules, error) {
	m := &modules{
		dir: dir, file: map[string]string{}, deps: map[string][]string{}, soft: map[string][]string{},
		builtin: map[string]bool{}, alias: map[string][]string{},
	}
	err := eachLine(filepath.Join(dir, "modules.dep"), func(l string) {
		path, needs, ok := strings.Cut(l, ":")
		if !ok {
			return
		}
		name := moduleName(path)
		m.file[name] = path
		for _, n := range strings.Fields(needs) {
			m.deps[name] = append(m.deps[name], moduleName(n))
		}
	})
	if err != nil {
		return nil, err
	}
	if err := eachLine(filepath.Join(dir, "modules.builtin"), func(l string) { m.builtin[moduleName(l)] = true }); err != nil {
		return nil, err
	}
	// These two files are optional.
	_ = eachLine(filepath.Join(dir, "modules.softdep"), func(l string) { // softdep ext4 pre: crypto-crc32c post: …
		w := strings.Fields(l)
		if len(w) < 3 || w[0] != "softdep" {
			return
		}
		pre := false
		for _, x := range w[2:] {
			switch {
			case strings.HasSuffix(x, ":"):
				pre = x == "pre:"
			case pre:
				name := strings.ReplaceAll(w[1], "-", "_")
				m.soft[name] = append(m.soft[name], x)
			}
		}
	})
	_ = eachLine(filepath.Join(dir, "modules.alias"), func(l string) { // alias crypto-crc32c crc32c_generic
		if w := strings.Fields(l); len(w) == 3 && strings.HasPrefix(w[1], "crypto-") {
			m.alias[w[1]] = append(m.alias[w[1]], w[2])
		}
	})
	return m, nil
}

func eachLine(path string, f func(string)) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	s := bufio.NewScanner(file)
	for s.Scan() {
		f(s.Text())
	}
	return s.Err()
}

// closure returns the module files to load for a module, in order, except those in have. A built-in module needs none;
// an unknown one is an error.
func (m *modules) closure(name string, have []string) ([]string, error) {
	var order []string
	var add func(name string, depth int) error
	add = func(name string, depth int) error {
		name = strings.ReplaceAll(name, "-", "_")
		path, ok := m.file[name]
		switch {
		case m.builtin[name] || slices.Contains(have, path) && ok || slices.Contains(order, path) && ok:
			return nil
		case !ok:
			return fmt.Errorf("the kernel %s has no module %s, not even built in", filepath.Base(m.dir), name)
		case depth > 32:
			return fmt.Errorf("the modules of %s depend on one another in a cycle", name)
		}
		for _, s := range m.soft[name] {
			// A soft dependency may be missing.
			for _, alias := range append(m.alias[s], s) {
				if _, ok := m.file[strings.ReplaceAll(alias, "-", "_")]; ok {
					if err := add(alias, depth+1); err != nil {
						return err
					}
				}
			}
		}
		needs := slices.Clone(m.deps[name])
		slices.Reverse(needs) // modules.dep lists the last to be loaded first
		for _, n := range needs {
			if err := add(n, depth+1); err != nil {
				return err
			}
		}
		order = append(order, path)
		return nil
	}
	if err := add(name, 0); err != nil {
		return nil, err
	}
	return order, nil
}

// read returns a module's content, uncompressed: the initrd is not compressed.
func (m *modules) read(ctx context.Context, path string) ([]byte, error) {
	p := filepath.Join(m.dir, path)
	switch filepath.Ext(p) {
	case ".gz":
		f, err := os.Open(p)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		z, err := gzip.NewReader(f)
		if err != nil {
			return nil, err
		}
		return io.ReadAll(z)
	case ".zst":
		return capture(ctx, "zstd", "-dcq", p)
	case ".xz":
		if onPath("xz") {
			return capture(ctx, "xz", "-dc", p)
		}
		// cloud-init needs Python, whose standard library can do it.
		return capture(ctx, "python3", "-c", "import lzma,sys,shutil; shutil.copyfileobj(lzma.open(sys.argv[1]), sys.stdout.buffer)", p)
	}
	data, err := os.ReadFile(p)
	return bytes.Clone(data), err
}
