package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// Dir is the folder in which apply keeps what must survive: the generations, the link to the current one, the journal of a running apply,
// and a lock. It belongs to root alone, since it tells root what to write:
//
//	lock                          held by whoever changes the host
//	journal                       what a running or unconfirmed apply has done so far
//	generations/N/plan.json       the plan of generation N
//	generations/N/generation.json what it put on the host
//	current                       a link to generations/N
type Dir struct{ path string }

// Owned is one object that a generation put on the host. Kind and name are those of a host.Object.
type Owned struct {
	Kind     string            `json:"kind"`
	Name     string            `json:"name"`
	State    map[string]string `json:"state"`    // as it was written
	Original map[string]string `json:"original"` // as it was before fleetingd first wrote it; null: it did not exist
}

// Generation is a plan that was applied, and all it takes to apply it again or to take it back. It holds no secret.
type Generation struct {
	Number    int       `json:"number"` // from 1
	Created   time.Time `json:"created"`
	Digest    string    `json:"digest"`    // of the plan
	Fleetingd string    `json:"fleetingd"` // the version that wrote it
	Objects   []Owned   `json:"objects"`   // in the order in which they were written

	Plan *plan.Plan `json:"-"`
}

// generationVersion is the format of generation.json.
const generationVersion = 1

// maxGeneration bounds generation.json, in bytes. The originals of all files are in it.
const maxGeneration = 1 << 30

// OpenDir makes the folder if it does not exist.
func OpenDir(path string) (*Dir, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(path, "generations"), 0o700); err != nil {
		return nil, err
	}
	return &Dir{path}, nil
}

// ReadDir is OpenDir for a caller that only reads: it makes nothing. A missing folder has no generations.
func ReadDir(path string) *Dir { return &Dir{path} }

// Path returns the path of something in the folder.
func (d *Dir) Path(name string) string { return filepath.Join(d.path, name) }

// Lock takes the lock, or returns ErrLocked at once.
func (d *Dir) Lock() (*Lock, error) { return TryLock(d.Path("lock")) }

func (d *Dir) generationPath(n int) string { return d.Path("generations/" + strconv.Itoa(n)) }

// Numbers returns the numbers of all generations, the lowest first.
func (d *Dir) Numbers() ([]int, error) {
	entries, err := os.ReadDir(d.Path("generations"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var numbers []int
	for _, e := range entries {
		if n, ok := generationNumber(e.Name()); ok {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

// generationNumber reads a folder's name. What a crash left under another name is no generation.
func generationNumber(name string) (int, bool) {
	n, err := strconv.Atoi(name)
	return n, err == nil && n > 0 && strconv.Itoa(n) == name
}

// ErrNoGeneration is the answer to a question for a generation that is not kept.
var ErrNoGeneration = errors.New("there is no such generation")

// Generation reads a generation.
func (d *Dir) Generation(n int) (*Generation, error) {
	dir := d.generationPath(n)
	b, err := readBounded(filepath.Join(dir, "generation.json"), maxGeneration)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("generation %d: %w", n, ErrNoGeneration)
	}
	if err != nil {
		return nil, err
	}
	g, err := parseGeneration(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, "generation.json"), err)
	}
	if g.Number != n {
		return nil, fmt.Errorf("%s is of generation %d", filepath.Join(dir, "generation.json"), g.Number)
	}
	g.Plan, err = ReadPlan(filepath.Join(dir, "plan.json"))
	return g, err
}

func parseGeneration(b []byte) (*Generation, error) {
	var g struct {
		Version int `json:"version"`
		Generation
	}
	if err := json.Unmarshal(b, &g); err != nil {
		return nil, fmt.Errorf("it is damaged: %w", err)
	}
	if g.Version != generationVersion {
		return nil, fmt.Errorf("it has format version %d, and this fleetingd reads version %d", g.Version, generationVersion)
	}
	for i, o := range g.Objects {
		if o.Kind == "" {
			return nil, fmt.Errorf("it is damaged: object %d has no kind", i)
		}
	}
	return &g.Generation, nil
}

// Current reads the generation that the host is now, and returns nil if there is none.
func (d *Dir) Current() (*Generation, error) {
	n, err := d.CurrentNumber()
	if err != nil || n == 0 {
		return nil, err
	}
	return d.Generation(n)
}

// CurrentNumber returns the number of the current generation, and 0 if there is none.
func (d *Dir) CurrentNumber() (int, error) {
	target, err := os.Readlink(d.Path("current"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	n, ok := generationNumber(filepath.Base(target))
	if !ok {
		return 0, fmt.Errorf("%s leads to %q, which is not a generation", d.Path("current"), target)
	}
	return n, nil
}

// Next returns a number that no kept generation has, nor one that was kept before it.
func (d *Dir) Next() (int, error) {
	all, err := d.Numbers()
	current, err1 := d.CurrentNumber()
	if err := errors.Join(err, err1); err != nil {
		return 0, err
	}
	return max(slices.Max(append(all, 0)), current) + 1, nil
}

// Save writes a generation, whole or not at all. It replaces one of the same number. It does not make it the current one.
func (d *Dir) Save(g *Generation) error {
	text, err := g.Plan.JSON()
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(struct {
		Version int `json:"version"`
		*Generation
	}{generationVersion, g}, "", " ")
	if err != nil {
		return fmt.Errorf("write generation %d: %w", g.Number, err)
	}
	dir := d.generationPath(g.Number)
	part := dir + ".new"
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	if err := os.Mkdir(part, 0o700); err != nil {
		return err
	}
	for name, data := range map[string][]byte{"plan.json": text, "generation.json": append(b, '\n')} {
		if err := WriteFile(filepath.Join(part, name), data, 0o600); err != nil {
			return err
		}
	}
	if err := os.Rename(part, dir); err != nil {
		if !errors.Is(err, fs.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
		if err := unix.Renameat2(unix.AT_FDCWD, part, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE); err != nil {
			return fmt.Errorf("replace %s: %w", dir, err)
		}
		if err := os.RemoveAll(part); err != nil {
			return err
		}
	}
	return SyncFolder(d.Path("generations"))
}

// SetCurrent makes a generation the current one; 0 means that the host is none of them.
func (d *Dir) SetCurrent(n int) error {
	link := d.Path("current")
	if n == 0 {
		if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return SyncFolder(d.path)
	}
	part := link + ".new"
	if err := os.Remove(part); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink("generations/"+strconv.Itoa(n), part); err != nil {
		return err
	}
	if err := os.Rename(part, link); err != nil {
		return err
	}
	return SyncFolder(d.path)
}

// Keep is how many generations Prune leaves.
const Keep = 10

// Prune removes all but the last keep generations and the current one, and what a crash left of others. It returns the numbers of those
// that it removed.
func (d *Dir) Prune(keep int) ([]int, error) {
	all, err := d.Numbers()
	if err != nil {
		return nil, err
	}
	current, err := d.CurrentNumber()
	if err != nil {
		return nil, err
	}
	var removed []int
	for i, n := range all {
		if i >= len(all)-keep || n == current {
			continue
		}
		if err := d.Remove(n); err != nil {
			return removed, err
		}
		removed = append(removed, n)
	}
	entries, err := os.ReadDir(d.Path("generations"))
	if err != nil {
		return removed, err
	}
	for _, e := range entries {
		if _, ok := generationNumber(e.Name()); !ok {
			if err := os.RemoveAll(d.Path("generations/" + e.Name())); err != nil {
				return removed, err
			}
		}
	}
	return removed, nil
}

// Remove removes a generation. A missing one is no error.
func (d *Dir) Remove(n int) error {
	// Renamed first: what is left of it after a crash is not mistaken for a generation.
	gone := d.generationPath(n) + ".gone"
	err := os.Rename(d.generationPath(n), gone)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(os.RemoveAll(gone), SyncFolder(d.Path("generations")))
}

// RemoveAll removes the folder with all that is in it.
func (d *Dir) RemoveAll() error {
	if err := os.RemoveAll(d.path); err != nil {
		return err
	}
	return SyncFolder(filepath.Dir(d.path))
}
