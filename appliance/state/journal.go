package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Journal is what an apply that has not ended has done so far. Each record is on disk before the deed that it announces: whatever kills the
// process or the machine, the journal names every object that may have changed, and what it was before.
//
// It is a file of JSON lines. The first is the head, every other one a record. A line that is cut off announces a deed that was not begun.
type Journal struct {
	Head    JournalHead
	Steps   []JournalStep
	Waiting *Waiting // all steps are done, and the generation waits for its confirmation
	// Committed is set when the generation is to stay. What is left to do is to make it the current one.
	Committed bool

	file *os.File
	size int64 // of the records that are on disk, in bytes
}

// JournalHead says what an apply is about.
type JournalHead struct {
	Version    int       `json:"version"`
	Generation int       `json:"generation"` // that it makes; 0 for destroy
	From       int       `json:"from"`       // the generation that was current; 0: none
	Started    time.Time `json:"started"`
	Boot       string    `json:"boot"` // the kernel's boot id
	// Fresh is set if the generation did not exist before: it goes when the apply is taken back.
	Fresh bool `json:"fresh,omitempty"`
}

// JournalStep is one step that was begun.
type JournalStep struct {
	Kind   string            `json:"kind"`
	Name   string            `json:"name"`
	Before map[string]string `json:"before"` // null: it did not exist
	After  map[string]string `json:"after"`

	Done, Undone bool `json:"-"`
}

// Waiting is a deadline for a confirmation: it ends with the time, or with the boot.
type Waiting struct {
	Deadline time.Time `json:"deadline"`
	Boot     string    `json:"boot"`
}

// journalRecord is one line after the first. Exactly one field is set.
type journalRecord struct {
	Step      *JournalStep `json:"step,omitempty"`
	Done      *int         `json:"done,omitempty"`
	Undone    *int         `json:"undone,omitempty"`
	Waiting   *Waiting     `json:"waiting,omitempty"`
	Committed bool         `json:"committed,omitempty"`
}

const journalVersion = 1

// maxJournal bounds the journal, in bytes: the former contents of all files that are changed are in it.
const maxJournal = 1 << 30

// Begin starts a journal. There must be none.
func (d *Dir) Begin(head JournalHead) (*Journal, error) {
	head.Version = journalVersion
	path := d.Path("journal")
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return nil, errors.Join(fmt.Errorf("%s: an earlier apply has not ended", path), err)
	}
	line, err := json.Marshal(head)
	if err != nil {
		return nil, err
	}
	if err := WriteFile(path, append(line, '\n'), 0o600); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return &Journal{Head: head, file: f, size: int64(len(line)) + 1}, nil
}

// Journal reads the journal of an apply that has not ended, and returns nil if there is none. It changes nothing.
func (d *Dir) Journal() (*Journal, error) {
	j, _, err := d.readJournal()
	return j, err
}

// Resume opens the journal of an apply that has not ended, and returns nil if there is none. The caller must hold the lock.
func (d *Dir) Resume() (*Journal, error) {
	j, whole, err := d.readJournal()
	if err != nil || j == nil {
		return nil, err
	}
	if j.file, err = os.OpenFile(d.Path("journal"), os.O_WRONLY|os.O_APPEND|unix.O_CLOEXEC, 0); err != nil {
		return nil, err
	}
	j.size = int64(whole)
	// A record must not be appended to half of another.
	if err := j.file.Truncate(j.size); err != nil {
		return nil, errors.Join(err, j.file.Close())
	}
	return j, nil
}

func (d *Dir) readJournal() (j *Journal, whole int, err error) {
	path := d.Path("journal")
	b, err := readBounded(path, maxJournal)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	if j, whole, err = parseJournal(b); err != nil {
		return nil, 0, fmt.Errorf("%s: %w", path, err)
	}
	return j, whole, nil
}

// parseJournal returns the journal and the number of bytes that are whole lines.
func parseJournal(b []byte) (j *Journal, whole int, err error) {
	whole = bytes.LastIndexByte(b, '\n') + 1
	lines := strings.SplitAfter(string(b[:whole]), "\n")
	lines = lines[:len(lines)-1]
	if len(lines) == 0 {
		return nil, 0, errors.New("it is damaged: it has no head")
	}
	j = &Journal{}
	if err := json.Unmarshal([]byte(lines[0]), &j.Head); err != nil {
		return nil, 0, fmt.Errorf("it is damaged: line 1: %w", err)
	}
	if j.Head.Version != journalVersion {
		return nil, 0, fmt.Errorf("it has format version %d, and this fleetingd reads version %d", j.Head.Version, journalVersion)
	}
	for i, line := range lines[1:] {
		var r journalRecord
		err := json.Unmarshal([]byte(line), &r)
		if err == nil {
			err = j.add(r)
		}
		if err != nil {
			return nil, 0, fmt.Errorf("it is damaged: line %d: %w", i+2, err)
		}
	}
	return j, whole, nil
}

func (j *Journal) add(r journalRecord) error {
	switch {
	case r.Step != nil:
		if r.Step.Kind == "" {
			return errors.New("the step has no kind")
		}
		j.Steps = append(j.Steps, *r.Step)
	case r.Done != nil:
		if *r.Done < 0 || *r.Done >= len(j.Steps) {
			return fmt.Errorf("there is no step %d", *r.Done)
		}
		j.Steps[*r.Done].Done = true
	case r.Undone != nil:
		if *r.Undone < 0 || *r.Undone >= len(j.Steps) {
			return fmt.Errorf("there is no step %d", *r.Undone)
		}
		j.Steps[*r.Undone].Undone = true
	case r.Waiting != nil:
		j.Waiting = r.Waiting
	case r.Committed:
		j.Committed = true
	default:
		return errors.New("it says nothing")
	}
	return nil
}

// append puts a record on disk before it returns. If it fails, on a full disk for one, the journal is what it was: a later record is not
// appended to half of this one.
func (j *Journal) append(r journalRecord) error {
	line, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if j.file == nil {
		return errors.New("the journal was opened for reading")
	}
	line = append(line, '\n')
	if _, err = j.file.Write(line); err == nil {
		err = j.file.Sync()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write the journal: %w", err), j.file.Truncate(j.size))
	}
	j.size += int64(len(line))
	return j.add(r)
}

// Step announces a step, and returns its index.
func (j *Journal) Step(s JournalStep) (int, error) {
	return len(j.Steps), j.append(journalRecord{Step: &s})
}

// Done notes that a step is done.
func (j *Journal) Done(i int) error { return j.append(journalRecord{Done: &i}) }

// Undone notes that a step is taken back.
func (j *Journal) Undone(i int) error { return j.append(journalRecord{Undone: &i}) }

// Wait notes that all steps are done and wait for their confirmation.
func (j *Journal) Wait(w Waiting) error { return j.append(journalRecord{Waiting: &w}) }

// Commit notes that the generation stays.
func (j *Journal) Commit() error { return j.append(journalRecord{Committed: true}) }

// Open returns the indices of the steps that are to be taken back, in the order in which to do it: the last first.
func (j *Journal) Open() []int {
	var open []int
	for i, s := range slices.Backward(j.Steps) {
		if !s.Undone {
			open = append(open, i)
		}
	}
	return open
}

// Close closes the journal, which stays.
func (j *Journal) Close() error {
	if j.file == nil {
		return nil
	}
	return j.file.Close()
}

// End removes the journal: all that it speaks of is done, or undone.
func (d *Dir) End(j *Journal) error {
	if err := os.Remove(d.Path("journal")); err != nil {
		return err
	}
	return errors.Join(SyncFolder(d.path), j.Close())
}

// BootID returns the kernel's random number for this boot.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// readBounded reads a regular file of at most max bytes.
func readBounded(path string, max int64) ([]byte, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > max {
		return nil, fmt.Errorf("%s is not a regular file of at most %d bytes", path, max)
	}
	return os.ReadFile(path)
}
