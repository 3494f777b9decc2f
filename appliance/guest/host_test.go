package guest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/fleetingd/fleetingd/appliance/visible"
)

// link connects both real ends: each dial makes a pipe, whose other end the agent gets.
type link struct {
	conns chan net.Conn
	dials int
	wrap  func(net.Conn) net.Conn // the host's end, for breaking it
}

func newLink() *link {
	return &link{conns: make(chan net.Conn), wrap: func(c net.Conn) net.Conn { return c }}
}

func (l *link) dial(ctx context.Context) (net.Conn, error) {
	host, guest := net.Pipe()
	l.dials++
	select {
	case l.conns <- guest:
		return l.wrap(host), nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *link) open(ctx context.Context) (io.ReadWriteCloser, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// pair returns a Session and an agent with the given do, connected by a link.
func pair(t *testing.T, mode string, do func(context.Context, command, func(string)) result) (*Session, *agent, *link) {
	t.Helper()
	l := newLink()
	a := newAgent(mode, "0f1e2d3c-boot", "v1", slog.New(slog.DiscardHandler))
	a.do = do
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		a.serve(ctx, l.open)
		close(done)
	}()
	s := NewSession(l.dial, Options{})
	t.Cleanup(func() {
		s.Close()
		cancel()
		<-done
		if a.over != nil {
			a.over(nil)
		}
	})
	return s, a, l
}

func TestReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, a, _ := pair(t, modeWorker, nil)
		go func() {
			idle := a.beat("")
			time.Sleep(10 * time.Minute) // heartbeats keep the host patient
			a.report(message{Type: typeReady, Hostname: "w1", TookMS: 1500})
			idle()
		}()
		r, err := s.WaitReady(t.Context())
		if err != nil || r != (Ready{BootID: "0f1e2d3c-boot", Version: "v1", Took: 1500 * time.Millisecond, Hostname: "w1"}) {
			t.Fatalf("%+v, %v", r, err)
		}
		// Whoever asks later gets the answer at once.
		if r, err = s.WaitReady(t.Context()); err == nil {
			t.Fatalf("said twice in one session: %+v", r)
		} else if !strings.Contains(err.Error(), "sent nothing for 1m0s") {
			t.Fatal(err)
		}
	})
}

func TestReadyForTheNextHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, a, l := pair(t, modeWorker, nil)
		a.report(message{Type: typeReady, Hostname: "w1"})
		for range 3 {
			if _, err := s.WaitReady(t.Context()); err != nil {
				t.Fatal(err)
			}
			s.Close()
			s = NewSession(l.dial, Options{})
			defer s.Close()
		}
	})
}

// TestReadyAfterRestart: a guest that reboots while its host waits, or whose guest part is restarted, may be ready before the
// host has found it again. The host has seen heartbeats of the previous one, and must not take "ready" for one of them.
func TestReadyAfterRestart(t *testing.T) {
	for name, boots := range map[string][2]string{"reboot": {"boot-1", "boot-2"}, "restart": {"boot-1", "boot-1"}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := newLink()
				serve := func(a *agent) (end func()) {
					ctx, cancel := context.WithCancel(t.Context())
					done := make(chan struct{})
					go func() {
						a.serve(ctx, l.open)
						close(done)
					}()
					return func() { cancel(); <-done }
				}
				first := newAgent(modeWorker, boots[0], "v1", slog.New(slog.DiscardHandler))
				second := newAgent(modeWorker, boots[1], "v1", slog.New(slog.DiscardHandler))
				second.report(message{Type: typeReady, Hostname: "w1"})
				s := NewSession(l.dial, Options{})
				defer s.Close()
				over, ended := make(chan struct{}), make(chan struct{})
				go func() {
					defer close(ended)
					end := serve(first)
					idle := first.beat("")
					time.Sleep(35 * time.Second) // three heartbeats
					idle()
					end()
					end = serve(second)
					<-over
					end()
				}()
				if r, err := s.WaitReady(t.Context()); err != nil || r.Hostname != "w1" {
					t.Errorf("%+v, %v", r, err)
				}
				close(over)
				<-ended
			})
		})
	}
}

func TestNeverReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, a, _ := pair(t, modeWorker, nil)
		a.report(message{Type: typeFailed, Error: "no seed\x1b[2J"})
		_, err := s.WaitReady(t.Context())
		if err == nil || err.Error() != `the guest cannot get ready: no seed\x1b[2J` {
			t.Fatal(err)
		}
	})
}

func TestPrebuild(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		big := strings.Repeat("0123456789abcdef", 20_000)
		var ran []string
		s, _, _ := pair(t, modePrebuild, func(_ context.Context, c command, say func(string)) result {
			if c.step == nil {
				return result{export: Export{Bytes: 4096, Kernel: "6.12"}}
			}
			ran = append(ran, c.step.Name)
			switch c.step.Name {
			case "file":
				if c.step.File.Content != big {
					t.Errorf("%d bytes came in", len(c.step.File.Content))
				}
			case "bad":
				for i := range 30 {
					say(fmt.Sprintf("line %d\x07", i))
				}
				return result{code: 100}
			default:
				say("hello \x1b[31mred\x1b[0m")
			}
			return result{}
		})
		var out bytes.Buffer
		steps := []Step{{Name: "file", File: &File{Path: "/x", Content: big}}, {Name: "echo", Command: "echo"}}
		if err := s.Prebuild(t.Context(), steps, &out); err != nil {
			t.Fatal(err)
		}
		if out.String() != "echo: hello red\n" {
			t.Errorf("output %q", out.String())
		}
		var step *StepError
		err := s.Prebuild(t.Context(), []Step{{Name: "bad", Command: "x"}, {Name: "never", Command: "x"}}, io.Discard)
		if !errors.As(err, &step) || step.Code != 100 || len(step.Tail) != tailLines || step.Tail[19] != `line 29\a` {
			t.Fatalf("%#v", err)
		}
		if e, err := s.Seal(t.Context()); err != nil || e != (Export{Bytes: 4096, Kernel: "6.12"}) {
			t.Fatalf("%+v, %v", e, err)
		}
		if got := strings.Join(ran, " "); got != "file echo bad" {
			t.Errorf("ran %s", got)
		}
	})
}

// breaking fails after it has read a number of bytes.
type breaking struct {
	net.Conn
	left int
}

func (b *breaking) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := b.Conn.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

func TestPrebuildOverBrokenStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ran := 0
		s, _, l := pair(t, modePrebuild, func(_ context.Context, c command, say func(string)) result {
			ran++
			for i := range 200 {
				say(fmt.Sprint("line ", i))
			}
			return result{code: 3}
		})
		l.wrap = func(c net.Conn) net.Conn { return &breaking{c, 1000} }
		var out bytes.Buffer
		err := s.Prebuild(t.Context(), []Step{{Name: "s", Command: strings.Repeat("x", 1000)}}, &out)
		var step *StepError
		if !errors.As(err, &step) || step.Code != 3 {
			t.Fatal(err)
		}
		if n := strings.Count(out.String(), "\n"); n != 200 || !strings.HasPrefix(out.String(), "s: line 0\n") {
			t.Errorf("%d lines came through: none may be lost or doubled", n)
		}
		if ran != 1 || l.dials < 10 {
			t.Errorf("the step ran %d times over %d streams", ran, l.dials)
		}
	})
}

// TestReconnectsInAChattyStep: each time the stream breaks, the new one begins with the output since then, as much as
// the buffers of vsock and of its socket hold. That must not make the host give up on the guest.
func TestReconnectsInAChattyStep(t *testing.T) {
	const streams, buffered = 20, 5000
	streamsLeft, seq := streams, uint64(0)
	synctest.Test(t, func(t *testing.T) {
		s := hostile(t, func(c net.Conn, session string) {
			for i := range uint64(buffered) {
				say(c, message{Type: typeOutput, Session: session, Seq: seq + i + 1, ID: 1, Line: "chatter"})
			}
			hello := helloOf(session, modePrebuild, "b")
			hello.Cmd = 1
			seq++
			say(c, hello, message{Type: typeOutput, Session: session, Seq: seq, ID: 1, Line: fmt.Sprint("line ", seq)})
			if streamsLeft--; streamsLeft == 0 {
				say(c, message{Type: typeDone, Session: session, Seq: seq + 1, ID: 1})
			}
		})
		var out bytes.Buffer
		if err := s.Prebuild(t.Context(), []Step{{Name: "s", Command: "x"}}, &out); err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(out.String(), "s: line "); n != streams || strings.Count(out.String(), "\n") != streams {
			t.Errorf("%d lines came through of %d, each to be said once", n, streams)
		}
	})
}

// TestStepWithoutEnd: the error names the step that is still running when the prebuild's time is over, with its last lines, cut to
// a readable length, and with a hint about the network if the lines suggest that.
func TestStepWithoutEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lines := []string{"about to hang", strings.Repeat("é", maxText/4), "curl: (6) Could not resolve host: deb.invalid\x1b[2J"}
		s, _, _ := pair(t, modePrebuild, func(ctx context.Context, _ command, say func(string)) result {
			for _, l := range lines {
				say(l)
			}
			<-ctx.Done()
			return result{code: -1, err: context.Cause(ctx)}
		})
		over := errors.New("the time is over")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 5*time.Minute, over)
		defer cancel()
		err := s.Prebuild(ctx, []Step{{Name: "run[0]: hang", Command: "x"}}, io.Discard)
		var step *StepError
		if !errors.As(err, &step) || !errors.Is(err, over) {
			t.Fatalf("%#v", err)
		}
		text := strings.Join(step.Tail, "\n")
		if len(step.Tail) != 3 || step.Tail[0] != lines[0] || len(step.Tail[1]) > tailWidth+3 || !utf8.ValidString(text) || strings.Contains(text, "\x1b") {
			t.Errorf("its last lines are %q", step.Tail)
		}
		for _, want := range []string{`"run[0]: hang" did not finish: the time is over`, "names do not resolve", "egress"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q does not say %q", err, want)
			}
		}
	})
}

func TestNetworkHint(t *testing.T) {
	for line, want := range map[string]string{
		"W: Failed to fetch http://deb.invalid/debian/dists/trixie/InRelease  Temporary failure resolving 'deb.invalid'": "names do not resolve",
		"curl: (6) Could not resolve host: deb.invalid":                                                                  "names do not resolve",
		"wget: unable to resolve host address ‘deb.invalid’":                                                             "names do not resolve",
		"wget: bad address 'deb.invalid'":                                                                                "names do not resolve",
		"fatal: unable to access 'https://git.invalid/': Could not resolve host: git.invalid":                            "names do not resolve",
		"go: dial tcp: lookup proxy.invalid on 127.0.0.53:53: no such host":                                              "names do not resolve",
		"urllib3: [Errno -3] Temporary failure in name resolution":                                                       "names do not resolve",
		"E: Could not connect to deb.invalid:80 (192.0.2.1), connection timed out":                                       "could not connect",
		"curl: (7) Failed to connect to 192.0.2.1 port 443 after 3 ms: No route to host":                                 "could not connect",
		"ssh: connect to host 192.0.2.1 port 22: Network is unreachable":                                                 "could not connect",
		"E: Unable to locate package jq":                                                                                 "",
		"make: *** No rule to make target 'all'.  Stop.":                                                                 "",
	} {
		if got := networkHint([]string{"first", line}); (got == "") != (want == "") || !strings.Contains(got, want) {
			t.Errorf("%q gave %q, want %q", line, got, want)
		}
	}
}

// TestHostGone: a step ends when nobody reads its output any more.
func TestHostGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan error, 1)
		s, _, _ := pair(t, modePrebuild, func(ctx context.Context, c command, say func(string)) result {
			say("begun")
			<-ctx.Done()
			ended <- context.Cause(ctx)
			return result{code: -1}
		})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := s.Prebuild(ctx, []Step{{Name: "s", Command: "x"}}, io.Discard); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		s.Close()
		if err := <-ended; !errors.Is(err, errSessionOver) {
			t.Fatal(err)
		}
	})
}

// hostile is a guest of an attacker: it gets each stream that the host opens, and the host's first line.
func hostile(t *testing.T, guest func(c net.Conn, session string)) *Session {
	var guests sync.WaitGroup
	t.Cleanup(guests.Wait)
	s := NewSession(func(ctx context.Context) (net.Conn, error) {
		host, g := net.Pipe()
		guests.Go(func() {
			defer g.Close()
			line, err := bufio.NewReaderSize(g, maxLine).ReadSlice('\n')
			if err != nil {
				return
			}
			m, err := decode(line)
			if err != nil {
				t.Errorf("the host says %q: %v", line, err)
			}
			guest(g, m.Session)
		})
		return host, nil
	}, Options{})
	t.Cleanup(func() { s.Close() })
	return s
}

// say writes messages, and reports whether the host read them.
func say(c net.Conn, ms ...message) bool {
	for _, m := range ms {
		b, err := json.Marshal(m)
		if err != nil {
			return false
		}
		if _, err := c.Write(append(b, '\n')); err != nil {
			return false
		}
	}
	return true
}

func helloOf(session, mode, boot string) message {
	return message{Type: typeHello, V: protocolVersion, Session: session, Mode: mode, Boot: boot}
}

// endless repeats the same until the host gives up.
func endless(c net.Conn, text string) {
	for b := []byte(text); ; {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

func swallow(c net.Conn) { io.Copy(io.Discard, c) }

func TestSessionWithHostileGuest(t *testing.T) {
	for name, c := range map[string]struct {
		guest func(c net.Conn, session string)
		want  string
		step  bool // a prebuild step, else WaitReady
		flood bool // it continues until ctx ends: the host does not give up
	}{
		"endless line":    {guest: func(c net.Conn, _ string) { endless(c, strings.Repeat("a", 5000)) }, want: "bytes that are not messages of protocol 1"},
		"garbage":         {guest: func(c net.Conn, _ string) { endless(c, "\x00\xff{]\n") }, want: "bytes that are not messages"},
		"empty lines":     {guest: func(c net.Conn, _ string) { endless(c, "\n\n\n\n") }, want: "bytes that are not messages"},
		"huge numbers":    {guest: func(c net.Conn, _ string) { endless(c, `{"type":"hello","v":1e999999999}`+"\n") }, want: "bytes that are not messages"},
		"deep JSON":       {guest: func(c net.Conn, _ string) { endless(c, strings.Repeat(`{"a":[`, 8000)+"\n") }, want: "bytes that are not messages"},
		"another session": {guest: func(c net.Conn, _ string) { endless(c, `{"type":"ready","session":"x","seq":1}`+"\n") }, want: "bytes that are not messages"},
		"ready before hello": {guest: func(c net.Conn, s string) {
			for say(c, message{Type: typeReady, Session: s, Seq: 1}) {
			}
		}, want: "bytes that are not messages"},
		"silence from the start": {guest: func(c net.Conn, _ string) { swallow(c) }, want: "the guest part has not answered"},
		"silence after hello": {guest: func(c net.Conn, s string) {
			say(c, helloOf(s, modeWorker, "b"))
			swallow(c)
		}, want: "has sent nothing for 1m0s"},
		"only heartbeats": {flood: true, guest: func(c net.Conn, s string) {
			for say(c, helloOf(s, modeWorker, "b")) && say(c, message{Type: typeBeat, Session: s}) {
				for say(c, message{Type: typeBeat, Session: s}) {
				}
			}
		}, want: "context deadline exceeded"},
		"endless reconnects": {guest: func(c net.Conn, s string) {}, want: "broke 200 times"},
		"endless reconnects with hello": {guest: func(c net.Conn, s string) {
			say(c, helloOf(s, modeWorker, "b"))
		}, want: "broke 200 times"},
		"endless hellos": {guest: func(c net.Conn, s string) {
			go swallow(c)
			for say(c, helloOf(s, modeWorker, "b")) {
			}
		}, want: "times without sending anything else"},
		"endless questions for a hello": {guest: func(c net.Conn, s string) {
			go swallow(c)
			for say(c, message{Type: typeHello, V: protocolVersion}) {
			}
		}, want: "times without sending anything else"},
		"questions, and reads nothing": {guest: func(c net.Conn, s string) {
			say(c, message{Type: typeHello, V: protocolVersion})
			time.Sleep(time.Hour)
		}, want: "broke 200 times"},
		"another version": {guest: func(c net.Conn, s string) {
			say(c, message{Type: typeHello, V: 2, Session: s})
			swallow(c)
		}, want: "the guest uses protocol 2, but this fleetingd uses 1"},
		"reboots for ever": {guest: func(c net.Conn, s string) {
			for i := 0; say(c, helloOf(s, modeWorker, fmt.Sprint(i))); i++ {
			}
		}, want: "the guest has rebooted 3 times"},
		"not sealed": {guest: func(c net.Conn, s string) {
			say(c, helloOf(s, modePrebuild, "b"))
			swallow(c)
		}, want: `the guest part is in mode "prebuild"`},
		"a step in a worker": {step: true, guest: func(c net.Conn, s string) {
			say(c, helloOf(s, "\x1b[2Jworker", "b"))
			swallow(c)
		}, want: `the guest is in mode "\\x1b[2Jworker"`},
		"reboots in a step": {step: true, guest: func(c net.Conn, s string) {
			go swallow(c)
			say(c, helloOf(s, modePrebuild, "b"))
			say(c, helloOf(s, modePrebuild, "c"))
			time.Sleep(time.Hour)
		}, want: "the guest rebooted"},
		"never reads the step": {step: true, guest: func(c net.Conn, s string) {
			say(c, helloOf(s, modePrebuild, "b"))
			time.Sleep(time.Hour)
		}, want: "has sent nothing for 1m0s"},
		"answers to other steps": {step: true, flood: true, guest: func(c net.Conn, s string) {
			go swallow(c)
			say(c, helloOf(s, modePrebuild, "b"))
			for i := uint64(1); say(c, message{Type: typeDone, Session: s, ID: 1000 + i, Seq: i}); i++ {
			}
		}, want: "context deadline exceeded"},
		"a wrong exit code": {step: true, guest: func(c net.Conn, s string) {
			go swallow(c)
			say(c, helloOf(s, modePrebuild, "b"), message{Type: typeDone, Session: s, Seq: 1, ID: 1, Code: -1 << 62, Error: "\x1b]0;x\a"})
			time.Sleep(time.Hour)
		}, want: `prebuild step "s" failed: \x1b]0;x\a`},
		"a step's output without end": {step: true, flood: true, guest: func(c net.Conn, s string) {
			go swallow(c)
			say(c, helloOf(s, modePrebuild, "b"))
			for i := uint64(1); say(c, message{Type: typeOutput, Session: s, ID: 1, Seq: i, Line: strings.Repeat("\x1b", 1000)}); i++ {
			}
		}, want: "context deadline exceeded"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := hostile(t, c.guest)
				patience := time.Hour
				if c.flood {
					patience = 3 * time.Second
				}
				// The time is synctest's: no case waits, but a flood is read as fast as a host would read it in that time.
				ctx, cancel := context.WithTimeout(t.Context(), patience)
				defer cancel()
				var err error
				out := &bytes.Buffer{}
				if c.step {
					err = s.Prebuild(ctx, []Step{{Name: "s", Command: strings.Repeat("x", 100_000)}}, out)
				} else {
					_, err = s.WaitReady(ctx)
				}
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want … %s …", err, c.want)
				}
				if err != nil && strings.ContainsFunc(err.Error(), func(r rune) bool { return !unicode.IsPrint(r) }) {
					t.Errorf("%q: not fit for a terminal", err)
				}
			})
		})
	}
}

func TestOutputIsBounded(t *testing.T) {
	var out bytes.Buffer
	o := &output{w: &out, step: "s"}
	for range 3 * maxOutput / maxText {
		if err := o.line(strings.Repeat("x", 2*maxText)); err != nil {
			t.Fatal(err)
		}
	}
	if n := out.Len(); n < maxOutput || n > maxOutput+2*maxText || !strings.HasSuffix(out.String(), "the rest is not shown)\n") {
		t.Errorf("%d bytes were let through", n)
	}
	if err := o.line("last"); err != nil || o.tail[tailLines-1] != "last" {
		t.Errorf("the tail ends with %q, %v", o.tail[tailLines-1], err)
	}
}

// TestCloseEndsCall also while dial blocks.
func TestCloseEndsCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewSession(func(ctx context.Context) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}, Options{})
		go func() {
			time.Sleep(time.Second)
			s.Close()
		}()
		if _, err := s.WaitReady(t.Context()); !errors.Is(err, errClosed) {
			t.Fatal(err)
		}
	})
}

func TestDialError(t *testing.T) {
	gone := errors.New("the VM is gone")
	s := NewSession(func(context.Context) (net.Conn, error) { return nil, gone }, Options{})
	defer s.Close()
	if _, err := s.WaitReady(t.Context()); !errors.Is(err, gone) {
		t.Fatal(err)
	}
}

func TestEscape(t *testing.T) {
	for in, want := range map[string]string{
		"plain\ttext é 😀":        "plain\ttext é 😀",
		"\x1b[1;31mred\x1b[m":    "red",
		"\x1b[2Jcleared":         `\x1b[2Jcleared`,
		"\x1b]0;title\a":         `\x1b]0;title\a`,
		"evil\u202etxt\r\n\x00":  `evil\u202etxt\r\n\x00`,
		"\xff\xfe":               `\xff\xfe`,
		"\x1b[12":                `\x1b[12`,
		"\u00a0\ufeff\U000e0041": `\u00a0\ufeff\U000e0041`,
	} {
		if got := visible.Cut(in, 1000); got != want {
			t.Errorf("visible.Cut(%q) = %q, want %q", in, got, want)
		}
	}
	if got := visible.Cut(strings.Repeat("x", 100), 10); got != strings.Repeat("x", 10) {
		t.Errorf("%q", got)
	}
}
