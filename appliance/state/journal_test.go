package state

import (
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
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
