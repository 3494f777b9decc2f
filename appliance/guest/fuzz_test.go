package guest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"
)

// script is a stream with the given content, which ends the test's context afterwards.
type script struct {
	r   io.Reader
	end context.CancelFunc
}

func (s *script) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil {
		s.end()
	}
	return n, err
}
func (s *script) Write(p []byte) (int, error)      { return len(p), nil }
func (s *script) Close() error                     { return nil }
func (s *script) LocalAddr() net.Addr              { return nil }
func (s *script) RemoteAddr() net.Addr             { return nil }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

func FuzzHostSession(f *testing.F) {
	const hello = `{"type":"hello","v":1,"session":"s","boot":"b","mode":"prebuild"}` + "\n"
	f.Add([]byte(hello + `{"type":"output","session":"s","seq":1,"id":1,"line":"\u001b[2J"}` + "\n" +
		`{"type":"done","session":"s","seq":2,"id":1}` + "\n" + `{"type":"done","session":"s","seq":3,"id":2,"bytes":4096}` + "\n"))
	f.Add([]byte(hello + `{"type":"done","session":"s","seq":18446744073709551615,"id":1,"code":-7,"error":"x"}` + "\n"))
	f.Add([]byte(`{"type":"hello","v":1,"session":"s","mode":"worker"}` + "\n" + `{"type":"ready","session":"s","seq":1,"hostname":"h","took_ms":9223372036854775807}` + "\n"))
	f.Add([]byte(`{"type":"hello","v":2}` + "\n" + strings.Repeat("[", 70000) + "\n"))
	f.Fuzz(func(t *testing.T, said []byte) {
		safe := func(texts ...string) {
			for _, s := range texts {
				if strings.ContainsFunc(s, func(r rune) bool { return r != '\t' && !unicode.IsPrint(r) }) {
					t.Errorf("%q is not fit for a terminal", s)
				}
			}
		}
		talk := func() (*Session, context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(t.Context())
			s := NewSession(func(context.Context) (net.Conn, error) { return &script{bytes.NewReader(said), cancel}, nil }, Options{})
			s.id = "s"
			return s, ctx, cancel
		}
		s, ctx, cancel := talk()
		defer cancel()
		var out bytes.Buffer
		if err := s.Prebuild(ctx, []Step{{Name: "s", Command: "c"}}, &out); err != nil {
			safe(err.Error())
		} else if e, err := s.Seal(ctx); err == nil {
			safe(e.Kernel, e.Reason)
		}
		safe(strings.Split(out.String(), "\n")...)
		s.Close()

		s, ctx, cancel = talk()
		defer cancel()
		if r, err := s.WaitReady(ctx); err == nil {
			safe(r.BootID, r.Hostname, r.Version)
			if r.Took < 0 {
				t.Errorf("took %v", r.Took)
			}
		} else {
			safe(err.Error())
		}
		s.Close()
	})
}

func FuzzGuest(f *testing.F) {
	const hello = `{"type":"hello","v":1,"session":"s"}` + "\n"
	f.Add([]byte(hello + `{"type":"data","session":"s","id":1,"data":"eyJuYW1lIjoieCIsImNvbW1hbmQiOiJ0cnVlIn0="}` + "\n" + `{"type":"run","session":"s","id":1}` + "\n"))
	f.Add([]byte(hello + `{"type":"seal","session":"s","id":18446744073709551615}` + "\n" + `{"type":"poweroff","session":"s"}` + "\n"))
	f.Add([]byte(`{"type":"hello","session":"a","have":99}` + "\n" + `{"type":"hello","session":"b"}` + "\n" + `{"type":"run","session":"a","id":1}` + "\n"))
	f.Fuzz(func(t *testing.T, said []byte) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		a := newAgent(modePrebuild, "b", "v", slog.New(slog.DiscardHandler))
		a.do = func(ctx context.Context, c command, line func(string)) result {
			line("x")
			return result{}
		}
		a.talk(ctx, &script{bytes.NewReader(said), func() {}})
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.over != nil {
			a.over(errSessionOver)
		}
		if len(a.data) > maxStep || a.size > 2*keepSaid {
			t.Errorf("%d and %d bytes are kept", len(a.data), a.size)
		}
	})
}

func export(t testing.TB, files ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range files {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(make([]byte, h.Size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestReadExport(t *testing.T) {
	reg := func(name string, size int64) *tar.Header {
		return &tar.Header{Name: name, Typeflag: tar.TypeReg, Size: size}
	}
	for name, c := range map[string]struct {
		files []*tar.Header
		data  []byte
		bytes int64
		want  string // "": good
	}{
		"good":          {files: []*tar.Header{reg("vmlinuz", 5000), reg("initrd", 100)}},
		"other way":     {files: []*tar.Header{reg("initrd", 100), reg("vmlinuz", 5000)}},
		"one missing":   {files: []*tar.Header{reg("vmlinuz", 5000)}, want: "1 of the two files"},
		"twice":         {files: []*tar.Header{reg("vmlinuz", 5000), reg("vmlinuz", 1)}, want: "file exists"},
		"outside":       {files: []*tar.Header{reg("../vmlinuz", 5000)}, want: `it has a file "../vmlinuz"`},
		"absolute":      {files: []*tar.Header{reg("/etc/passwd", 5)}, want: `it has a file "/etc/passwd"`},
		"escape codes":  {files: []*tar.Header{reg("\x1b[2J", 5)}, want: `it has a file "\\x1b[2J"`},
		"link":          {files: []*tar.Header{{Name: "vmlinuz", Typeflag: tar.TypeSymlink, Linkname: "/etc/shadow"}}, want: "vmlinuz is of type '2'"},
		"device":        {files: []*tar.Header{{Name: "initrd", Typeflag: tar.TypeBlock}}, want: "initrd is of type '4'"},
		"empty":         {files: []*tar.Header{reg("vmlinuz", 0)}, want: "vmlinuz is of type '0' and 0 bytes"},
		"cut off":       {files: []*tar.Header{reg("vmlinuz", 50000), reg("initrd", 100)}, bytes: 20000, want: "vmlinuz: unexpected EOF"},
		"no tar":        {data: bytes.Repeat([]byte("x"), 2048), want: "invalid tar header"},
		"no length":     {data: []byte("x"), bytes: -1, want: "its length is -1"},
		"absurd length": {data: []byte("x"), bytes: 1 << 62, want: "its length is 4611686018427387904"},
	} {
		t.Run(name, func(t *testing.T) {
			data := c.data
			if data == nil {
				data = export(t, c.files...)
			}
			e := Export{Bytes: int64(len(data))}
			if c.bytes != 0 {
				e.Bytes = c.bytes
			}
			dir := t.TempDir()
			// The disk continues after what was written.
			err := ReadExport(io.MultiReader(bytes.NewReader(data), strings.NewReader("left over")), dir, e)
			left, _ := os.ReadDir(dir)
			switch {
			case c.want == "" && (err != nil || len(left) != 2):
				t.Errorf("%v, %d files", err, len(left))
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || len(left) != 0):
				t.Errorf("%v, %d files left; want … %s …", err, len(left), c.want)
			}
		})
	}
	t.Run("claims 200 MiB", func(t *testing.T) {
		var b bytes.Buffer
		if err := tar.NewWriter(&b).WriteHeader(reg("vmlinuz", 200<<20)); err != nil {
			t.Fatal(err)
		}
		err := ReadExport(&b, t.TempDir(), Export{Bytes: 4096})
		if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
			t.Error(err)
		}
	})
}

func FuzzReadExport(f *testing.F) {
	f.Add(export(f, &tar.Header{Name: "vmlinuz", Typeflag: tar.TypeReg, Size: 10}, &tar.Header{Name: "initrd", Typeflag: tar.TypeReg, Size: 20}))
	f.Add(export(f, &tar.Header{Name: "../x", Typeflag: tar.TypeSymlink, Linkname: "/etc"}))
	f.Fuzz(func(t *testing.T, data []byte) {
		above := t.TempDir()
		dir := filepath.Join(above, "export")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		err := ReadExport(bytes.NewReader(data), dir, Export{Bytes: int64(len(data))})
		files, _ := os.ReadDir(dir)
		if outside, _ := os.ReadDir(above); len(outside) != 1 {
			t.Fatal("it wrote outside of its folder")
		}
		if err != nil && len(files) != 0 || err == nil && len(files) != 2 {
			t.Fatalf("%v, and %d files", err, len(files))
		}
	})
}
