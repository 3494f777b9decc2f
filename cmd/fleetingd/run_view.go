package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/term"
)

// Phase is one timed part of a run, as `--timings` prints it.
type Phase struct {
	Name    string  `json:"name"`
	Worker  string  `json:"worker,omitempty"`
	Detail  string  `json:"detail,omitempty"`
	Cached  bool    `json:"cached,omitempty"` // nothing was done: it was there already
	Seconds float64 `json:"seconds"`
}

// view shows a person what a run does: one line a phase, the current one
// rewritten in place. It writes nothing where w is no terminal, but keeps the timings.
type view struct {
	mu     sync.Mutex
	w      io.Writer // nil: quiet
	live   string    // the line that is being rewritten
	drawn  time.Time
	phases []Phase
}

// newView shows on f if that is a terminal.
func newView(f *os.File) *view {
	v := &view{}
	if term.IsTerminal(int(f.Fd())) {
		v.w = f
	}
	return v
}

// running is a phase that has begun.
type running struct {
	v     *view
	p     Phase
	start time.Time
}

// begin starts a phase and shows it.
func (v *view) begin(name, detail string) *running {
	r := &running{v: v, p: Phase{Name: name, Detail: detail}, start: time.Now()}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.redraw(fmt.Sprintf("  %-10s %s", name, detail))
	return r
}

// update replaces what the phase's line says, at most ten times a second.
func (r *running) update(detail string) {
	r.v.mu.Lock()
	defer r.v.mu.Unlock()
	r.p.Detail = detail
	if time.Since(r.v.drawn) < 100*time.Millisecond {
		return
	}
	r.v.redraw(fmt.Sprintf("  %-10s %s", r.p.Name, detail))
}

// done ends the phase.
func (r *running) done(detail string) {
	r.p.Detail = detail
	r.p.Seconds = time.Since(r.start).Seconds()
	r.v.add(r.p)
}

// add shows a finished phase.
func (v *view) add(p Phase) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.phases = append(v.phases, p)
	took := fmt.Sprintf("%7.2f s", p.Seconds)
	if p.Cached {
		took = "   cached"
	}
	v.printLine(fmt.Sprintf("%s  %-10s %s", took, p.Name, p.Detail))
	v.live = ""
}

// log shows a line between the phases: a prebuild's output, a warning.
func (v *view) log(line string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.printLine("           │ " + line)
	v.redraw(v.live)
}

// clear takes the live line away, so that a job's output begins in column one.
func (v *view) clear() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.w != nil && v.live != "" {
		fmt.Fprint(v.w, "\r\x1b[K")
	}
	v.live = ""
}

func (v *view) redraw(line string) {
	v.live, v.drawn = line, time.Now()
	if v.w != nil && line != "" {
		fmt.Fprint(v.w, "\r\x1b[K"+v.fit(line))
	}
}

func (v *view) printLine(line string) {
	if v.w != nil {
		fmt.Fprint(v.w, "\r\x1b[K"+v.fit(line)+"\n")
	}
}

// fit cuts a line to the terminal's width: one that wraps cannot be rewritten.
func (v *view) fit(line string) string {
	f, ok := v.w.(*os.File)
	if !ok {
		return line
	}
	width, _, err := term.GetSize(int(f.Fd()))
	if runes := []rune(line); err == nil && width > 1 && len(runes) >= width {
		return string(runes[:width-2]) + "…"
	}
	return line
}

// timings is what `--timings` prints.
type timings struct {
	Phases  []Phase `json:"phases"`
	Seconds float64 `json:"total_seconds"`
}

func printTimings(w io.Writer, phases []Phase, total time.Duration) error {
	return json.NewEncoder(w).Encode(timings{Phases: phases, Seconds: total.Seconds()})
}

// lines is a Writer that hands on whole lines, each with a prefix, so that the
// output of jobs that run side by side is never mixed within one. A line longer than
// maxLine is handed on in parts.
type lines struct {
	mu     *sync.Mutex // shared by all that write to w
	w      io.Writer
	prefix string
	buf    []byte
}

const maxLine = 64 << 10

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := len(p)
	for len(p) > 0 {
		i := strings.IndexByte(string(p), '\n')
		if i < 0 {
			i = len(p) - 1
		}
		l.buf = append(l.buf, p[:i+1]...)
		p = p[i+1:]
		if l.buf[len(l.buf)-1] == '\n' || len(l.buf) >= maxLine {
			if err := l.flush(); err != nil {
				return n - len(p), err
			}
		}
	}
	return n, nil
}

// Close hands on what has no newline yet, and adds one.
func (l *lines) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.buf) == 0 {
		return nil
	}
	l.buf = append(l.buf, '\n')
	return l.flush()
}

func (l *lines) flush() error {
	_, err := l.w.Write(append([]byte(l.prefix), l.buf...))
	l.buf = l.buf[:0]
	return err
}
