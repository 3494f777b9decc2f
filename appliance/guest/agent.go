package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"
)

const (
	beatEvery = 10 * time.Second
	// hostGone is how long a command may run while the host reads nothing. Then it is ended, because the host has gone.
	hostGone = 2 * time.Minute
	// keepSaid is how much is kept to be sent again on the next stream: more than the buffers between the two
	// ends hold. Unsent output is queued up to the same size; then the command waits.
	keepSaid = 512 << 10
)

var errSessionOver = errors.New("the host's session is over")

// command is a request of the host: to run a step or, if step is nil, to seal.
type command struct {
	id   uint64
	step *Step // nil for sealing
}

// result is the outcome of a command.
type result struct {
	code   int
	err    error // with code -1, or as a note
	export Export
}

// problem returns the error of a failed result, or nil.
func (r result) problem() error {
	if r.err == nil {
		return fmt.Errorf("exit code %d", r.code)
	}
	if r.code > 0 {
		return fmt.Errorf("exit code %d: %w", r.code, r.err)
	}
	return r.err
}

// agent is the guest's end of the channel. It answers the newest host only.
type agent struct {
	mode    string
	boot    string
	version string
	log     *slog.Logger
	// do runs one command of the host; nil if the host cannot send commands. line sends a line of output, and blocks while the host does
	// not read.
	do       func(ctx context.Context, c command, line func(string)) result
	poweroff func()

	mu      sync.Mutex
	changed *sync.Cond // of the fields below
	session string
	over    context.CancelCauseFunc // ends the session's commands
	queue   chan command
	seq     uint64
	said    []line // lines of this session, sent and unsent
	next    int    // said[next:] is unsent on the stream
	size    int    // bytes in said
	unsaid  int    // bytes in said[next:]
	state   *message
	wrote   time.Time // when the stream last accepted something
	cmd     uint64    // last command received in full
	data    []byte    // of the command being received
	dataID  uint64
}

type line struct {
	seq  uint64
	text []byte
}

func newAgent(mode, boot, version string, log *slog.Logger) *agent {
	a := &agent{mode: mode, boot: boot, version: version, log: log}
	a.changed = sync.NewCond(&a.mu)
	return a
}

// serve uses the streams that open returns, one after another, until ctx ends.
func (a *agent) serve(ctx context.Context, open func(context.Context) (io.ReadWriteCloser, error)) error {
	wait := 10 * time.Millisecond
	for {
		conn, err := open(ctx)
		if err == nil {
			started := time.Now()
			err = a.talk(ctx, conn)
			if time.Since(started) > time.Minute {
				wait = 10 * time.Millisecond
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		a.log.Debug("the channel to the host broke", "error", err, "again_in", wait)
		if !pause(ctx, wait) {
			return nil
		}
		wait = min(2*wait, 10*time.Second)
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// talk uses one stream until it breaks.
func (a *agent) talk(ctx context.Context, conn io.ReadWriteCloser) error {
	ctx, cancel := context.WithCancel(ctx)
	closed := context.AfterFunc(ctx, func() { conn.Close() })
	defer func() {
		if closed() {
			conn.Close()
		}
	}()
	out := make(chan message, 1) // hellos
	var wg sync.WaitGroup
	wg.Go(func() {
		defer cancel() // a stream that cannot be written to is broken
		if err := a.write(ctx, conn, out); err != nil && ctx.Err() == nil {
			a.log.Debug("write to the host", "error", err)
		}
	})
	// The writer waits on the condition variable, which has no context.
	stop := context.AfterFunc(ctx, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.changed.Broadcast()
	})
	defer func() {
		cancel()
		stop()
		a.mu.Lock()
		a.changed.Broadcast()
		a.mu.Unlock()
		wg.Wait()
	}()
	out <- message{}
	a.mu.Lock()
	a.next, a.unsaid = len(a.said), 0 // until the host says what it has received
	a.data, a.dataID = nil, 0
	a.changed.Broadcast()
	a.mu.Unlock()

	r := newLineReader(conn)
	for {
		b, err := r.next(func(int) error { return nil })
		if err != nil {
			return err
		}
		m, err := decode(b)
		if err != nil {
			continue // a fragment from an earlier host
		}
		a.hear(m, out)
	}
}

// write sends hellos and unsent lines.
func (a *agent) write(ctx context.Context, w io.Writer, hellos chan message) error {
	for {
		a.mu.Lock()
		for ctx.Err() == nil && len(hellos) == 0 && a.next >= len(a.said) {
			a.changed.Wait()
		}
		if ctx.Err() != nil {
			a.mu.Unlock()
			return ctx.Err()
		}
		var text []byte
		if len(hellos) > 0 {
			m := <-hellos
			m.Type, m.V, m.Boot, m.Mode, m.Version, m.Cmd = typeHello, protocolVersion, a.boot, a.mode, a.version, a.cmd
			b, err := encode(m)
			if err != nil {
				a.mu.Unlock()
				return err
			}
			text = b
		} else {
			text = a.said[a.next].text
			a.next++
			a.unsaid -= len(text)
		}
		a.trim()
		a.changed.Broadcast()
		a.mu.Unlock()

		if _, err := w.Write(text); err != nil {
			return err
		}
		a.mu.Lock()
		a.wrote = time.Now()
		a.mu.Unlock()
	}
}

// trim drops the oldest lines sent. a.mu is held.
func (a *agent) trim() {
	for a.next > 0 && a.size > keepSaid {
		a.size -= len(a.said[0].text)
		a.said = a.said[1:]
		a.next--
	}
}

// hear handles one message from the host.
func (a *agent) hear(m message, hellos chan message) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if m.Type == typeHello {
		if m.Session == "" {
			return
		}
		if m.Session != a.session {
			a.begin(m.Session, m.Have)
		}
		a.rewind(m.Have)
		a.data, a.dataID = nil, 0
		select {
		case <-hellos: // an unsent one is out of date
		default:
		}
		hellos <- message{Session: m.Session}
		a.wrote = time.Now()
		a.changed.Broadcast()
		return
	}
	if a.session == "" || m.Session != a.session || a.do == nil {
		return
	}
	switch m.Type {
	case typeData:
		if m.ID != a.dataID {
			a.data, a.dataID = nil, m.ID
		}
		if len(a.data)+len(m.Data) <= maxStep {
			a.data = append(a.data, m.Data...)
		}
	case typeRun, typeSeal:
		a.command(m)
	case typePoweroff:
		if a.poweroff != nil {
			go a.poweroff()
		}
	}
}

// begin ends the previous session and its commands, and starts another. a.mu is held.
//
// have is the last seq the host has seen in this session. As the session is new to this program, that was in an earlier boot, or before
// the guest part was restarted. Counting continues from there: the host would drop lower numbers as repetitions.
func (a *agent) begin(session string, have uint64) {
	if a.over != nil {
		a.over(errSessionOver)
	}
	a.session, a.seq, a.cmd = session, have, 0
	a.said, a.next, a.size, a.unsaid = nil, 0, 0, 0
	if a.state != nil {
		a.enqueue(*a.state)
	}
	if a.do != nil {
		ctx, over := context.WithCancelCause(context.Background())
		a.over, a.queue = over, make(chan command, 1)
		go a.obey(ctx, session, a.queue)
	}
}

// rewind marks everything after seq as unsent again. a.mu is held.
func (a *agent) rewind(seq uint64) {
	a.next = 0
	for a.next < len(a.said) && a.said[a.next].seq <= seq {
		a.next++
	}
	a.unsaid = 0
	for _, l := range a.said[a.next:] {
		a.unsaid += len(l.text)
	}
}

// command accepts a complete command. a.mu is held.
func (a *agent) command(m message) {
	if m.ID <= a.cmd {
		return // repeated after a reconnect
	}
	c := command{id: m.ID}
	if m.Type == typeRun {
		c.step = &Step{}
		if m.ID != a.dataID || json.Unmarshal(a.data, c.step) != nil {
			a.enqueue(message{Type: typeDone, ID: m.ID, Code: -1, Error: "the step arrived incomplete"})
			a.cmd = m.ID
			return
		}
		a.data, a.dataID = nil, 0
	}
	select {
	case a.queue <- c:
		a.cmd = m.ID
	default:
		a.enqueue(message{Type: typeDone, ID: m.ID, Code: -1, Error: "another command is already waiting"})
	}
}

// obey runs a session's commands in order.
func (a *agent) obey(ctx context.Context, session string, queue <-chan command) {
	for {
		select {
		case <-ctx.Done():
			return
		case c := <-queue:
			stop := a.beat(session)
			r := a.do(ctx, c, func(text string) {
				a.say(ctx, session, message{Type: typeOutput, ID: c.id, Line: text})
			})
			m := message{Type: typeDone, ID: c.id, Code: r.code, Bytes: r.export.Bytes, Kernel: r.export.Kernel, Error: r.export.Reason}
			if r.err != nil {
				m.Error = cut(r.err.Error(), maxText)
			}
			a.say(ctx, session, m)
			stop()
		}
	}
}

// cut returns at most n bytes of s with invalid UTF-8 replaced by "?": JSON would make three bytes of each invalid one.
func cut(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return string(bytes.ToValidUTF8([]byte(s), []byte("?")))
}

// say sends m in the session. It waits while too much is unsent.
func (a *agent) say(ctx context.Context, session string, m message) {
	stop := context.AfterFunc(ctx, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.changed.Broadcast()
	})
	defer stop()
	a.mu.Lock()
	defer a.mu.Unlock()
	for a.unsaid > keepSaid && a.session == session && ctx.Err() == nil {
		a.changed.Wait()
	}
	if a.session == session {
		a.enqueue(m)
	}
}

// enqueue numbers m and appends it to the unsent lines. a.mu is held.
func (a *agent) enqueue(m message) {
	m.Session = a.session
	a.seq++
	m.Seq = a.seq
	text, err := encode(m)
	if err != nil {
		// Every text in m was cut to its limit, which is far below a line's.
		a.log.Error("cannot send a message", "type", m.Type, "error", err)
		return
	}
	a.said = append(a.said, line{m.Seq, text})
	a.size += len(text)
	a.unsaid += len(text)
	a.changed.Broadcast()
}

// report sets what every host of this boot is told: that the worker is ready, or that it failed.
func (a *agent) report(m message) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.state = &m
	if a.session != "" {
		a.enqueue(m)
	}
}

// beat sends heartbeats until stop is called. If nothing can be sent for hostGone, it ends the session.
func (a *agent) beat(session string) (stop func()) {
	done := make(chan struct{})
	go func() {
		t := time.NewTicker(beatEvery)
		defer t.Stop()
		for {
			select {
			case <-done:
				return
			case <-t.C:
			}
			a.mu.Lock()
			switch {
			case session != "" && a.session != session:
			case a.next < len(a.said):
				if a.over != nil && time.Since(a.wrote) > hostGone {
					a.over(fmt.Errorf("%w: nothing could be sent for %v", errSessionOver, hostGone))
				}
			case a.session != "":
				a.enqueue(message{Type: typeBeat})
			}
			a.mu.Unlock()
		}
	}()
	return func() { close(done) }
}
