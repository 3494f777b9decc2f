package guest

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/fleetingd/fleetingd/appliance/visible"
)

// Limits on what a Session accepts from a guest, so that a hostile guest can only use a limited amount of anything.
const (
	maxJunk    = 1 << 20  // bytes that are not messages for this Session, before and after a stream's hello;
	junkLine   = 64       // each line counts as at least this many
	maxHellos  = 200      // from one guest in one Session
	maxStreams = 200      // opened by one Session
	maxReboots = 2        // during WaitReady; a prebuild may not reboot at all
	maxOutput  = 32 << 20 // bytes written to Prebuild's out
	tailLines  = 20       // of a StepError
	tailWidth  = 1 << 10  // bytes of each of them

	paceBurst   = 4 << 20 // bytes read at full speed, and then
	paceRate    = 4 << 20 // bytes a second
	paceMessage = 256     // cost of a line besides its bytes: parsing many short ones is work too
)

// helloTimeout is how long writing a hello may take: it fits any socket's buffer.
const helloTimeout = 10 * time.Second

var errClosed = errors.New("the session with the guest was closed")

// Session is the host's end of the channel to one guest. Its methods may be called
// concurrently but run one at a time; Close ends the one that is running.
type Session struct {
	dial    Dial
	log     *slog.Logger
	silence time.Duration
	id      string // names this Session to the guest
	ctx     context.Context
	cancel  context.CancelCauseFunc

	op      sync.Mutex // guards the fields below
	cur     *stream
	cmd     uint64 // id of the last command sent
	have    uint64 // seq of the last message seen
	boot    string // the guest's boot id
	mode    string
	version string
	heard   time.Time // of the last message; zero: nothing yet
	streams int
	hellos  int
	junk    int64
}

// NewSession returns a Session. It dials once there is something to wait for, and
// again whenever the stream breaks. An error from dial is final: dial must block until there is a stream.
func NewSession(dial Dial, opts Options) *Session {
	s := &Session{dial: dial, log: opts.Log, silence: opts.Silence, id: rand.Text()}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.silence == 0 {
		s.silence = time.Minute
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s
}

// Close closes the stream and ends the call in progress. It always returns nil.
func (s *Session) Close() error {
	s.cancel(errClosed)
	s.op.Lock()
	defer s.op.Unlock()
	s.drop()
	return nil
}

// WaitReady waits, without polling, until the worker has its identity and its sshd answers.
// It fails when ctx ends, or earlier if the guest reports that it will never be ready, keeps rebooting, stops
// sending after it has started, or uses another protocol.
func (s *Session) WaitReady(ctx context.Context) (Ready, error) {
	const doing = "waiting for the guest to be ready"
	ctx, end := s.begin(ctx)
	defer end()
	reboots, boot := 0, ""
	for {
		m, err := s.next(ctx, doing)
		if err != nil {
			return Ready{}, err
		}
		switch m.Type {
		case typeHello:
			if m.Mode != modeWorker {
				return Ready{}, fmt.Errorf("%s: the guest part is in mode %q: this disk was not sealed", doing, visible.Cut(m.Mode, maxName))
			}
			if boot != "" && boot != m.Boot {
				if reboots++; reboots > maxReboots {
					return Ready{}, fmt.Errorf("%s: the guest has rebooted %d times; see its console log", doing, reboots)
				}
			}
			boot = m.Boot
		case typeFailed:
			return Ready{}, fmt.Errorf("the guest cannot get ready: %s", visible.Cut(m.Error, maxText))
		case typeReady:
			return Ready{
				BootID: s.boot, Version: s.version, Hostname: visible.Cut(m.Hostname, 253),
				Took: time.Duration(min(m.TookMS, int64(24*time.Hour/time.Millisecond))) * time.Millisecond,
			}, nil
		}
	}
}

// Prebuild runs the steps in order and writes each line of output to out as "name: line\n",
// escaped and bounded. It stops at the first step that fails, with a *StepError.
func (s *Session) Prebuild(ctx context.Context, steps []Step, out io.Writer) error {
	ctx, end := s.begin(ctx)
	defer end()
	o := &output{w: out}
	for _, step := range steps {
		if err := s.step(ctx, step, o); err != nil {
			return err
		}
	}
	return nil
}

func (s *Session) step(ctx context.Context, step Step, o *output) error {
	data, err := json.Marshal(step)
	if err != nil {
		return fmt.Errorf("prebuild step %q: %w", step.Name, err)
	}
	if len(data) > maxStep {
		return fmt.Errorf("prebuild step %q is %d bytes, more than the %d that the guest accepts", step.Name, len(data), maxStep)
	}
	o.step, o.tail = step.Name, nil
	started := time.Now()
	s.log.Info("prebuild step started", "step", step.Name)
	done, err := s.command(ctx, fmt.Sprintf("prebuild step %q", step.Name), o.line, func(id uint64) []message {
		var ms []message
		for rest := data; len(rest) > 0; {
			n := min(len(rest), chunkBytes)
			ms = append(ms, message{Type: typeData, ID: id, Data: rest[:n]})
			rest = rest[n:]
		}
		return append(ms, message{Type: typeRun, ID: id})
	})
	switch {
	case err == nil && (done.Code != 0 || done.Error != ""):
		err = &StepError{Step: step.Name, Code: done.Code, Reason: visible.Cut(done.Error, maxText), Hint: networkHint(o.tail), Tail: o.tail}
	case err == nil || s.heard.IsZero():
	case ctx.Err() != nil:
		reason := context.Cause(ctx).Error()
		if time.Since(s.heard) > 2*beatEvery {
			reason += "; " + s.state()
		}
		err = &StepError{Step: step.Name, Code: -1, Reason: reason, Hint: networkHint(o.tail), Tail: o.tail, err: context.Cause(ctx)}
	case len(o.tail) > 0:
		err = fmt.Errorf("%w; the step's last lines:\n  %s", err, strings.Join(o.tail, "\n  "))
	}
	if err != nil {
		s.log.Error("prebuild step failed", "step", step.Name, "error", err, "after", time.Since(started))
		return err
	}
	s.log.Info("prebuild step finished", "step", step.Name, "took", time.Since(started))
	return nil
}

// Seal makes the image ready to be cloned: the guest installs its unit, shortens later boots, removes
// everything that two machines must not share, writes the kernel and a small initrd to the ExportSerial disk and powers off. When
// Seal returns, the guest may not have powered off yet: wait for the VM to end before using its disks.
func (s *Session) Seal(ctx context.Context) (Export, error) {
	ctx, end := s.begin(ctx)
	defer end()
	o := &output{w: io.Discard}
	done, err := s.command(ctx, "sealing the image", o.line, func(id uint64) []message {
		return []message{{Type: typeSeal, ID: id}}
	})
	if err != nil {
		return Export{}, err
	}
	if done.Code != 0 {
		return Export{}, fmt.Errorf("sealing the image failed in the guest: %s", strings.Join(append(o.tail, visible.Cut(done.Error, maxText)), "; "))
	}
	if done.Bytes > maxExport {
		return Export{}, fmt.Errorf("sealing the image: the guest claims an export of %d bytes, more than %d", done.Bytes, int64(maxExport))
	}
	if err := s.send(ctx, message{Type: typePoweroff}); err != nil {
		// The guest powers off by itself after hostGone.
		s.log.Warn("could not tell the sealed guest to power off", "error", err)
	}
	return Export{Bytes: done.Bytes, Kernel: visible.Cut(done.Kernel, maxName), Reason: visible.Cut(done.Error, maxText)}, nil
}

// command sends the messages that make returns, and sends them again if a stream breaks before the guest has received
// all of them. It waits for the answer.
func (s *Session) command(
	ctx context.Context, doing string, line func(string) error, make func(id uint64) []message,
) (message, error) {
	s.cmd++
	id := s.cmd
	if s.cur != nil && s.cur.greeted {
		if err := s.send(ctx, make(id)...); err != nil {
			s.broken(err)
		}
	}
	boot := s.boot
	for {
		m, err := s.next(ctx, doing)
		if err != nil {
			return message{}, err
		}
		switch {
		case m.Type == typeHello:
			if m.Mode != modePrebuild {
				return message{}, fmt.Errorf("%s: the guest is in mode %q and takes no commands: the disk has already been sealed",
					doing, visible.Cut(m.Mode, maxName))
			}
			if boot != "" && m.Boot != boot {
				return message{}, fmt.Errorf("%s: the guest rebooted, which a prebuild step must not do: the "+
					"remaining steps cannot be resumed", doing)
			}
			boot = m.Boot
			if m.Cmd < id {
				if err := s.send(ctx, make(id)...); err != nil {
					s.broken(err)
				}
			}
		case m.Type == typeOutput && m.ID == id:
			if err := line(m.Line); err != nil {
				return message{}, fmt.Errorf("%s: writing its output: %w", doing, err)
			}
		case m.Type == typeDone && m.ID == id:
			return m, nil
		}
	}
}

// begin starts a call once the previous one has ended; silence counts from now.
func (s *Session) begin(parent context.Context) (context.Context, func()) {
	s.op.Lock()
	ctx, cancel := context.WithCancelCause(parent)
	stop := context.AfterFunc(s.ctx, func() { cancel(context.Cause(s.ctx)) })
	if !s.heard.IsZero() {
		s.heard = time.Now()
	}
	return ctx, func() {
		stop()
		cancel(nil)
		s.op.Unlock()
	}
}

// next returns the next message of this Session, including hellos but not beats. It opens streams as needed.
func (s *Session) next(ctx context.Context, doing string) (message, error) {
	for {
		if ctx.Err() != nil {
			return message{}, fmt.Errorf("%s: %w (%s)", doing, context.Cause(ctx), s.state())
		}
		if s.cur == nil {
			if err := s.connect(ctx); err != nil {
				if ctx.Err() != nil {
					continue
				}
				return message{}, fmt.Errorf("%s: %w", doing, err)
			}
			continue
		}
		ev, err := s.receive(ctx, doing)
		if err != nil {
			return message{}, err
		}
		if ev.err != nil {
			s.broken(ev.err)
			continue
		}
		ok, err := s.accept(ctx, ev)
		if err != nil {
			return message{}, fmt.Errorf("%s: %w", doing, err)
		}
		if ok && ev.msg.Type != typeBeat {
			return ev.msg, nil
		}
	}
}

// receive waits for the stream, for ctx, and for the silence of a guest that has spoken before.
func (s *Session) receive(ctx context.Context, doing string) (event, error) {
	var silent <-chan time.Time
	if !s.heard.IsZero() {
		t := time.NewTimer(time.Until(s.heard.Add(s.silence)))
		defer t.Stop()
		silent = t.C
	}
	select {
	case ev := <-s.cur.events:
		return ev, nil
	case <-silent:
		return event{}, fmt.Errorf("%s: the guest has sent nothing for %v: it hangs, has rebooted, or its guest part was killed",
			doing, s.silence)
	case <-ctx.Done():
		return event{}, fmt.Errorf("%s: %w (%s)", doing, context.Cause(ctx), s.state())
	}
}

// accept reports whether an event is a message of this Session. An error ends the call.
func (s *Session) accept(ctx context.Context, ev event) (bool, error) {
	m := ev.msg
	if s.junk += ev.junk; s.junk > maxJunk {
		return false, fmt.Errorf("the guest has sent %d bytes that are not messages of protocol %d: this is not "+
			"fleetingd's guest part", s.junk, protocolVersion)
	}
	if ev.junk > 0 {
		return false, nil
	}
	if m.Type == typeHello {
		return s.hello(ctx, m)
	}
	if m.Session != s.id || !s.cur.greeted {
		s.junk += junkLine // from an earlier boot or for another host: expected, but bounded
		return false, nil
	}
	if m.Seq != 0 {
		if m.Seq <= s.have {
			return false, nil // repeated after a reconnect
		}
		s.have = m.Seq
	}
	s.heard = time.Now()
	return true, nil
}

func (s *Session) hello(ctx context.Context, m message) (bool, error) {
	if m.V != protocolVersion {
		return false, fmt.Errorf("the guest uses protocol %d, but this fleetingd uses %d: another version built the "+
			"image. Rebuild it with `fleetingd refresh`", m.V, protocolVersion)
	}
	if s.hellos++; s.hellos > maxHellos {
		return false, fmt.Errorf("the guest has said hello %d times without sending anything else", s.hellos)
	}
	if m.Session == "" {
		if err := s.send(ctx, s.greeting()); err != nil {
			s.broken(err)
		}
		return false, nil
	}
	if m.Session != s.id {
		return false, nil
	}
	if s.boot != m.Boot {
		s.have = 0 // each boot counts from 1
	}
	if !s.cur.greeted {
		// Earlier junk was in the buffers on the way: lines of this Session from a step with much output, which are now
		// repeated, and a torn line. Every reconnect can bring that much; the guest is not to blame.
		s.junk = 0
	}
	s.cur.greeted, s.heard = true, time.Now()
	s.boot, s.mode, s.version = visible.Cut(m.Boot, maxName), m.Mode, visible.Cut(m.Version, maxName)
	return true, nil
}

func (s *Session) greeting() message {
	return message{Type: typeHello, V: protocolVersion, Have: s.have}
}

// state describes how far the guest has come, for an error.
func (s *Session) state() string {
	switch {
	case s.heard.IsZero() && s.cur == nil:
		return "no stream to the guest could be opened"
	case s.heard.IsZero():
		return "the guest part has not answered: the guest has not booted that far, or its image has no guest part; " +
			"see its console log"
	}
	return fmt.Sprintf("the guest's last message came %v ago", time.Since(s.heard).Round(100*time.Millisecond))
}

// connect opens a stream and sends a hello on it. It waits longer after each failure.
func (s *Session) connect(ctx context.Context) error {
	if s.streams++; s.streams > maxStreams {
		return fmt.Errorf("the channel to the guest broke %d times", maxStreams)
	}
	if s.streams > 1 {
		wait := time.NewTimer(min(2*time.Second, 10*time.Millisecond<<min(s.streams, 10)))
		defer wait.Stop()
		select {
		case <-wait.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	conn, err := s.dial(ctx)
	if err != nil {
		return fmt.Errorf("open the channel to the guest: %w", err)
	}
	s.cur = newStream(conn)
	if err := s.send(ctx, s.greeting()); err != nil {
		s.broken(err)
	}
	return nil
}

func (s *Session) broken(err error) {
	s.log.Debug("the channel to the guest broke", "error", err, "streams", s.streams)
	s.drop()
}

func (s *Session) drop() {
	if s.cur != nil {
		s.cur.close()
		s.cur = nil
	}
}

// send writes messages of this Session. It fails in bounded time if the guest does not read.
func (s *Session) send(ctx context.Context, ms ...message) error {
	if s.cur == nil {
		return net.ErrClosed
	}
	conn := s.cur.conn
	stop := context.AfterFunc(ctx, func() { _ = conn.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	for _, m := range ms {
		m.Session = s.id
		b, err := encode(m)
		if err != nil {
			return err
		}
		limit := s.silence
		if m.Type == typeHello {
			limit = min(limit, helloTimeout)
		}
		if err := conn.SetWriteDeadline(time.Now().Add(limit)); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err() // the deadline just set may be later than the end of ctx
		}
		if _, err := conn.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// event is a message, a number of bytes that were not a message, or the end of the stream.
type event struct {
	msg  message
	junk int64
	err  error
}

// stream is one connection; a goroutine reads it, no faster than paceRate and no faster than events are consumed.
type stream struct {
	conn    net.Conn
	events  chan event
	done    chan struct{}
	greeted bool // the guest answered the hello
}

func newStream(conn net.Conn) *stream {
	st := &stream{conn: conn, events: make(chan event), done: make(chan struct{})}
	go st.read()
	return st
}

func (st *stream) close() {
	close(st.done)
	st.conn.Close()
}

func (st *stream) read() {
	r := newLineReader(st.conn)
	p := pacer{start: time.Now()}
	skipped := func(n int) error {
		if !p.wait(n, st.done) || !st.emit(event{junk: int64(n)}) {
			return net.ErrClosed
		}
		return nil
	}
	for {
		line, err := r.next(skipped)
		if err != nil {
			st.emit(event{err: err})
			return
		}
		if !p.wait(len(line), st.done) {
			return
		}
		ev := event{}
		if ev.msg, err = decode(line); err != nil {
			ev = event{junk: int64(max(len(line)+1, junkLine))}
		}
		if !st.emit(ev) {
			return
		}
	}
}

func (st *stream) emit(ev event) bool {
	select {
	case st.events <- ev:
		return true
	case <-st.done:
		return false
	}
}

// pacer lets paceBurst bytes through at once, and afterwards paceRate bytes per second.
type pacer struct {
	start time.Time
	spent int64
}

func (p *pacer) wait(n int, done <-chan struct{}) bool {
	now := time.Now()
	// Unused allowance is kept, up to the burst.
	if earned := int64(now.Sub(p.start).Seconds() * paceRate); p.spent < earned {
		p.start, p.spent = now, 0
	}
	p.spent += int64(n) + paceMessage
	over := p.spent - paceBurst - int64(now.Sub(p.start).Seconds()*paceRate)
	if over <= 0 {
		return true
	}
	t := time.NewTimer(time.Duration(float64(over) / paceRate * float64(time.Second)))
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-done:
		return false
	}
}

// output writes the lines of the steps to w and keeps the last of them.
type output struct {
	w       io.Writer
	step    string
	tail    []string
	written int64
}

func (o *output) line(s string) error {
	s = visible.Cut(s, maxText)
	if len(o.tail) == tailLines {
		o.tail = o.tail[1:]
	}
	last := s
	if len(last) > tailWidth {
		last = cut(last[:tailWidth], tailWidth) + "…"
	}
	o.tail = append(o.tail, last)
	if o.written > maxOutput {
		return nil
	}
	n, err := fmt.Fprintf(o.w, "%s: %s\n", o.step, s)
	if o.written += int64(n); err == nil && o.written > maxOutput {
		_, err = fmt.Fprintf(o.w, "%s: (more than %d MiB of output: the rest is not shown)\n", o.step, maxOutput>>20)
	}
	return err
}

// What programs print when a name does not resolve (apt, curl, wget, busybox, git, glibc, musl, Go), and when no packet comes back.
var (
	noName = regexp.MustCompile(`(?i)temporary failure (resolving|in name resolution)|could not resolve|unable to resolve host|` +
		`name or service not known|name does not resolve|bad address '|no such host`)
	noRoute = regexp.MustCompile(`(?i)network is unreachable|no route to host|could not connect to|unable to connect to|` +
		`connection timed out|connect: .*timeout|connection failed`)
)

// networkHint says where to look if a step's last lines show that it could not reach something.
func networkHint(tail []string) string {
	text := strings.Join(tail, "\n")
	const look = "check dns and the egress blocks in the spec, and the host's own connection; `fleetingd doctor` checks these"
	switch {
	case noName.MatchString(text):
		return "names do not resolve in the guest: " + look
	case noRoute.MatchString(text):
		return "the guest could not connect: " + look
	}
	return ""
}
