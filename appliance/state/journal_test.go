package state

import (
	"errors"
	"os"
	"os/signal"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
)

var sameJournal = cmpopts.IgnoreUnexported(Journal{})

// writeJournal is an apply with two steps, the second of which is begun and not done.
func writeJournal(t *testing.T, d *Dir) *Journal {
	t.Helper()
	j, err := d.Begin(JournalHead{Generation: 2, From: 1, Started: time.Unix(5, 0).UTC(), Boot: "b"})
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []JournalStep{
		{Kind: "file", Name: "/etc/x", After: map[string]string{"content": "new\n"}},
		{Kind: "sysctl", Name: "a.b", Before: map[string]string{"value": "0"}, After: map[string]string{"value": "1"}},
	} {
		i, err := j.Step(s)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			if err := j.Done(i); err != nil {
				t.Fatal(err)
			}
		}
	}
	return j
}

func TestJournal(t *testing.T) {
	d := openDir(t)
	if j, err := d.Journal(); j != nil || err != nil {
		t.Fatalf("a new folder has the journal %v, %v", j, err)
	}
	j := writeJournal(t, d)
	if _, err := d.Begin(JournalHead{}); err == nil {
		t.Error("a second journal was begun over the first")
	}
	back, err := d.Resume()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(j, back, sameJournal); diff != "" {
		t.Errorf("(-written +read)\n%s", diff)
	}
	if !slices.Equal(back.Open(), []int{1, 0}) {
		t.Errorf("to be taken back: %v", back.Open())
	}
	if err := errors.Join(back.Undone(1), back.Wait(Waiting{Deadline: time.Unix(9, 0).UTC(), Boot: "b"}), back.Commit()); err != nil {
		t.Fatal(err)
	}
	again, err := d.Journal()
	if err != nil || !slices.Equal(again.Open(), []int{0}) || again.Waiting == nil || !again.Committed {
		t.Errorf("%+v, %v", again, err)
	}
	if err := d.End(back); err != nil {
		t.Fatal(err)
	}
	if j, err := d.Journal(); j != nil || err != nil {
		t.Errorf("after its end the journal is %v, %v", j, err)
	}
}

// A power cut leaves any number of the last line's bytes.
func TestJournalCutOff(t *testing.T) {
	d := openDir(t)
	if err := writeJournal(t, d).Close(); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(d.Path("journal"))
	if err != nil {
		t.Fatal(err)
	}
	lines := []int{}
	for i, b := range whole {
		if b == '\n' {
			lines = append(lines, i+1)
		}
	}
	for n := lines[0]; n <= len(whole); n++ {
		if err := os.WriteFile(d.Path("journal"), whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		j, err := d.Resume()
		if err != nil {
			t.Fatalf("%d of %d bytes: %v", n, len(whole), err)
		}
		steps := 0
		for _, end := range []int{lines[1], lines[3]} {
			if n >= end {
				steps++
			}
		}
		if len(j.Steps) != steps {
			t.Fatalf("%d of %d bytes: %d steps; want %d", n, len(whole), len(j.Steps), steps)
		}
		// What is written next is a line of its own.
		if err := errors.Join(j.Commit(), j.Close()); err != nil {
			t.Fatal(err)
		}
		if j, err := d.Journal(); err != nil || !j.Committed || len(j.Steps) != steps {
			t.Fatalf("%d of %d bytes, and a record more: %v, %v", n, len(whole), j, err)
		}
	}
}

// On a full disk, a part of a record is written. When there is space again, the next record is a line of its own.
func TestJournalDiskFull(t *testing.T) {
	signal.Ignore(unix.SIGXFSZ) // a write fails with EFBIG instead
	defer signal.Reset(unix.SIGXFSZ)
	d := openDir(t)
	j := writeJournal(t, d)
	for room := range uint64(40) {
		if err := stepWithRoom(t, j, room); !errors.Is(err, unix.EFBIG) {
			t.Fatalf("%d bytes free: %v", room, err)
		}
		if err := j.Undone(1); err != nil {
			t.Fatal(err)
		}
		back, err := d.Journal()
		if err != nil {
			t.Fatalf("%d bytes free: %v", room, err)
		}
		if diff := cmp.Diff(j, back, sameJournal); diff != "" {
			t.Fatalf("%d bytes free (-written +read)\n%s", room, diff)
		}
	}
}

// stepWithRoom announces a step while the journal can grow by room bytes.
func stepWithRoom(t *testing.T, j *Journal, room uint64) error {
	t.Helper()
	fi, err := j.file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	var former unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &former); err != nil {
		t.Fatal(err)
	}
	limit := unix.Rlimit{Cur: uint64(fi.Size()) + room, Max: former.Max} //nolint:gosec // a size is positive
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	_, stepErr := j.Step(JournalStep{Kind: "file", Name: "/etc/y"})
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &former); err != nil {
		t.Fatal(err)
	}
	return stepErr
}

func FuzzJournal(f *testing.F) {
	f.Add([]byte(`{"version":1,"generation":1}` + "\n" + `{"step":{"kind":"file","name":"/x","before":null,"after":{}}}` + "\n" + `{"done":0}` + "\n"))
	f.Add([]byte(`{"version":1}` + "\n" + `{"done":-1}` + "\n"))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		j, whole, err := parseJournal(b)
		if err != nil {
			return
		}
		if whole > len(b) || len(j.Open()) > len(j.Steps) {
			t.Errorf("%d of %d bytes, %d of %d steps", whole, len(b), len(j.Open()), len(j.Steps))
		}
	})
}
