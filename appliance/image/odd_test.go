package image

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// odd is a server that answers in a way of its own. It counts what it is asked.
type odd struct {
	requests atomic.Int64
	answer   func(n int, w http.ResponseWriter, r *http.Request) // n counts from 1
}

func (o *odd) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	o.answer(int(o.requests.Add(1)), w, r)
}

// counting counts the bytes of all bodies that a client reads.
type counting struct {
	http.RoundTripper
	bytes atomic.Int64
}

func (c *counting) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := c.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = &countedBody{resp.Body, &c.bytes}
	}
	return resp, err
}

type countedBody struct {
	io.ReadCloser
	n *atomic.Int64
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n.Add(int64(n))
	return n, err
}

// cutAfter sends the first n bytes of a file that is said to be longer, and drops the connection.
func cutAfter(w http.ResponseWriter, file []byte, n int) {
	w.Header().Set("Content-Length", fmt.Sprint(len(file)))
	w.Write(file[:n])
	w.(http.Flusher).Flush()
	if c, _, err := w.(http.Hijacker).Hijack(); err == nil {
		c.Close()
	}
}

// raw answers on the bare connection.
func raw(w http.ResponseWriter, speak func(net.Conn, *bufio.Writer)) {
	c, b, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer c.Close()
	speak(c, b.Writer)
	b.Flush()
}

// until calls do until it fails, which is when the client has hung up.
func until(r *http.Request, do func() error) {
	for r.Context().Err() == nil && do() == nil {
		continue
	}
}

func piece(w http.ResponseWriter, r *http.Request, file []byte, most int) {
	first := 0
	fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &first)
	last := min(first+most, len(file))
	w.Header().Set("ETag", `"v1"`)
	if r.Header.Get("Range") == "" {
		// The first answer is whole in its headers and cut in its body.
		cutAfter(w, file, last)
		return
	}
	w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last-1, len(file)))
	w.WriteHeader(http.StatusPartialContent)
	w.Write(file[first:last])
}

func zipped(b []byte) []byte {
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	w.Write(b)
	w.Close()
	return z.Bytes()
}

// TestOddServers: whatever a server does, a download ends with the right bytes or with an error, after a bounded number of requests
// and a bounded multiple of the file's bytes, and nothing is taken for the file that is not it.
func TestOddServers(t *testing.T) {
	large := bytes.Repeat([]byte("fleetingd"), 4<<20) // 36 MiB
	type server struct {
		answer   func(n int, w http.ResponseWriter, r *http.Request)
		fetcher  func(*fetcher) // what is not hasty's
		blind    bool           // no digest is known
		file     []byte         // nil: content
		want     []string       // in the error; nil: it succeeds
		requests int            // at most
		times    int64          // how many times the file's bytes, at most; 0: once
	}
	impatient := func(f *fetcher) { f.stall = 30 * time.Millisecond }
	for name, c := range map[string]server{
		"is cut and does not know Range": {
			answer:   func(_ int, w http.ResponseWriter, _ *http.Request) { cutAfter(w, content, len(content)/2) },
			want:     []string{"after 524288 bytes", "tried 3 times"},
			requests: 3, times: 2,
		},
		"is cut, each time a byte later": {
			answer:   func(n int, w http.ResponseWriter, _ *http.Request) { cutAfter(w, content, len(content)/2+n) },
			want:     []string{"tried 3 times"},
			requests: 3, times: 2,
		},
		"is cut, each time a little later, for as long as one asks": {
			answer: func(n int, w http.ResponseWriter, _ *http.Request) {
				cutAfter(w, large, min(n*(enoughProgress+1), len(large)-1))
			},
			file:     large,
			want:     []string{"has sent", "in all", "given up"},
			requests: 16, times: 3,
		},
		"is cut and goes on at Range": {
			answer: func(n int, w http.ResponseWriter, r *http.Request) {
				if n == 1 {
					w.Header().Set("ETag", `"v1"`)
					cutAfter(w, content, 1000)
					return
				}
				modified(w, r)
			},
			requests: 2, times: 2,
		},
		"is cut and has another file each time": {
			answer: func(n int, w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("ETag", fmt.Sprintf(`"v%d"`, n))
				cutAfter(w, content, len(content)/2)
			},
			want:     []string{"tried 3 times"},
			requests: 3, times: 2,
		},
		"resumes at another byte": {
			answer: func(n int, w http.ResponseWriter, r *http.Request) {
				w.Header().Set("ETag", `"v1"`)
				if r.Header.Get("Range") == "" {
					cutAfter(w, content, 1000)
					return
				}
				w.Header().Set("Content-Range", "bytes 7-9/10")
				w.WriteHeader(http.StatusPartialContent)
			},
			want:     []string{"tried 3 times"},
			requests: 3,
		},
		"sends crumbs": {
			answer:   func(_ int, w http.ResponseWriter, r *http.Request) { piece(w, r, content, 1<<10) },
			want:     []string{"the server ends there", "the file has 1048576"},
			requests: 3,
		},
		"sends pieces": {
			answer:   func(_ int, w http.ResponseWriter, r *http.Request) { piece(w, r, content, smallestPiece) },
			requests: len(content)/smallestPiece + 1, times: 1,
		},
		"never answers": {
			answer:   func(_ int, _ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
			fetcher:  impatient,
			want:     []string{"sent nothing for 30ms", "tried 3 times"},
			requests: 3,
		},
		"sends headers without end": {
			answer: func(_ int, w http.ResponseWriter, _ *http.Request) {
				raw(w, func(_ net.Conn, b *bufio.Writer) {
					fmt.Fprint(b, "HTTP/1.1 200 OK\r\n")
					for i := 0; ; i++ {
						if _, err := fmt.Fprintf(b, "X-Header-%d: %s\r\n", i, strings.Repeat("x", 1000)); err != nil {
							return
						}
					}
				})
			},
			want:     []string{"header"},
			requests: 3,
		},
		"sends a header now and then": {
			answer: func(_ int, w http.ResponseWriter, _ *http.Request) {
				raw(w, func(c net.Conn, _ *bufio.Writer) {
					fmt.Fprint(c, "HTTP/1.1 200 OK\r\n")
					for range time.Tick(time.Millisecond) {
						if _, err := fmt.Fprint(c, "X-Wait: yes\r\n"); err != nil {
							return
						}
					}
				})
			},
			fetcher:  impatient,
			want:     []string{"sent nothing for 30ms"},
			requests: 3,
		},
		"stops in the middle": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				w.Write(content[:100])
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			},
			fetcher:  impatient,
			want:     []string{"sent nothing for 30ms", "tried 3 times"},
			requests: 3,
		},
		"sends a byte now and then": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Length", fmt.Sprint(len(content)))
				tick := time.NewTicker(time.Millisecond)
				defer tick.Stop()
				until(r, func() error {
					<-tick.C
					_, err := w.Write(content[:1])
					w.(http.Flusher).Flush()
					return err
				})
			},
			fetcher:  func(f *fetcher) { f.window = 50 * time.Millisecond },
			want:     []string{"too slow", "in 50ms", "tried 3 times"},
			requests: 3,
		},
		"sends without end": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				until(r, func() error { _, err := w.Write(content); return err })
			},
			want:     []string{"more than 3145728 bytes"},
			requests: 1, times: 4,
		},
		"announces more than any file has": {
			answer: func(_ int, w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Length", fmt.Sprint(int64(1)<<60))
				w.Write(content[:1])
			},
			want:     []string{"more than 3145728 bytes"},
			requests: 1,
		},
		"redirects in a circle": {
			answer:   func(_ int, w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) },
			want:     []string{"10 redirects"},
			requests: 11,
		},
		"drops the connection": {
			answer:   func(_ int, w http.ResponseWriter, _ *http.Request) { raw(w, func(net.Conn, *bufio.Writer) {}) },
			want:     []string{"tried 3 times"},
			requests: 6, // net/http itself asks again once on a connection that was kept
		},
		"speaks another protocol": {
			answer: func(_ int, w http.ResponseWriter, _ *http.Request) {
				raw(w, func(_ net.Conn, b *bufio.Writer) { fmt.Fprint(b, "220 smtp.example.com ESMTP\r\n") })
			},
			want:     []string{"malformed HTTP"},
			requests: 3,
		},
		"has nothing new":       {answer: status(http.StatusNotModified), want: []string{"304"}, requests: 1},
		"has no content":        {answer: status(http.StatusNoContent), want: []string{"204"}, requests: 1},
		"answers half unasked":  {answer: status(http.StatusPartialContent), want: []string{"206"}, requests: 1},
		"is gone":               {answer: status(http.StatusGone), want: []string{"410"}, requests: 1},
		"is overloaded":         {answer: status(http.StatusServiceUnavailable), want: []string{"503", "tried 3 times"}, requests: 3},
		"limits requests":       {answer: status(http.StatusTooManyRequests), want: []string{"429", "tried 3 times"}, requests: 3},
		"is not what it was":    {answer: body("another", ""), want: []string{"SHA-256", digest([]byte("another"))}, requests: 1},
		"says identity":         {answer: body(string(content), "identity"), requests: 1},
		"zips, digest known":    {answer: body(string(zipped(content)), "gzip"), want: []string{"Content-Encoding: gzip", "proxy"}, requests: 1},
		"zips, no digest known": {answer: body(string(zipped(content)), "gzip"), blind: true, want: []string{"Content-Encoding: gzip", "identity"}, requests: 1},
		"says that it zips what is the file all the same": {answer: body(string(content), "gzip"), requests: 1},
		"escapes for a terminal": {
			answer: body("x", "gz\x1b]0;owned\x07"), blind: true, want: []string{"Content-Encoding: gz"}, requests: 3},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := &odd{answer: c.answer}
			srv := httptest.NewServer(o)
			t.Cleanup(srv.CloseClientConnections)
			t.Cleanup(srv.Close)
			f := hasty()
			if c.fetcher != nil {
				c.fetcher(f)
			}
			count := &counting{RoundTripper: f.client.Transport}
			f.client.Transport = count
			file := c.file
			if file == nil {
				file = content
			}
			d := download{url: srv.URL + "/disk.img", dst: filepath.Join(t.TempDir(), "file"), max: max(3<<20, int64(len(file)))}
			if !c.blind {
				d.want = checksum(digest(file))
			}
			_, err := f.file(t.Context(), d)
			if c.want == nil {
				wantFile(t, d.dst, err)
			} else {
				wantError(t, err, append(c.want, srv.URL+"/disk.img")...)
				if strings.ContainsAny(err.Error(), "\x1b\x07") {
					t.Errorf("the error holds what a terminal obeys: %q", err)
				}
			}
			if n := int(o.requests.Load()); n > c.requests {
				t.Errorf("asked %d times, want at most %d", n, c.requests)
			}
			if most := max(c.times, 1) * int64(len(file)); count.bytes.Load() > most+repeatsSlack*min(c.times, 1) {
				t.Errorf("took %d bytes for a file of %d", count.bytes.Load(), len(file))
			}
		})
	}
}

func status(code int) func(int, http.ResponseWriter, *http.Request) {
	return func(_ int, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
}

func body(text, encoding string) func(int, http.ResponseWriter, *http.Request) {
	return func(_ int, w http.ResponseWriter, r *http.Request) {
		if got := r.Header.Get("Accept-Encoding"); got != "identity" {
			http.Error(w, "Accept-Encoding is "+got, http.StatusBadRequest)
			return
		}
		if encoding != "" {
			w.Header().Set("Content-Encoding", encoding)
		}
		io.WriteString(w, text)
	}
}

// Errors that come before any answer, and that asking again does not change.
func TestFetchNoServer(t *testing.T) {
	secure := httptest.NewTLSServer(http.HandlerFunc(modified))
	defer secure.Close()
	_, _, err := fetchFrom(t, hasty(), download{url: secure.URL})
	wantError(t, err, "certificate")
	if isUnreachable(err) {
		t.Errorf("a wrong certificate is taken for a server that does not answer: %v", err)
	}
	plain := httptest.NewServer(http.HandlerFunc(modified))
	defer plain.Close()
	_, _, err = fetchFrom(t, hasty(), download{url: strings.Replace(plain.URL, "http:", "https:", 1)})
	wantError(t, err, "HTTP response to HTTPS client")

	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	_, _, err = fetchFrom(t, hasty(), download{url: "http://" + l.Addr().String() + "/disk.img"})
	wantError(t, err, "connection refused", "tried 3 times")
	if !isUnreachable(err) {
		t.Errorf("%v is not taken for a server that does not answer", err)
	}
	if _, err := hasty().bytes(t.Context(), "http://"+l.Addr().String()+"/SHA256SUMS", 100); !isUnreachable(err) {
		t.Errorf("%v is not taken for a server that does not answer", err)
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"": 0, "0": 0, "7": 7 * time.Second, "-3": 0, "soon": 0, "99999999999999999999": 0, "86400": maxRetryAfter,
		now.Add(9 * time.Second).Format(http.TimeFormat):  9 * time.Second,
		now.Add(-9 * time.Second).Format(http.TimeFormat): 0,
		now.Add(9 * time.Hour).Format(http.TimeFormat):    maxRetryAfter,
	} {
		if got := parseRetryAfter(value, now); got != want {
			t.Errorf("%q: %v, want %v", value, got, want)
		}
	}
	var asked []time.Duration
	f := hasty()
	f.pause = func(_ context.Context, _ int, least time.Duration) error {
		asked = append(asked, least)
		return nil
	}
	url := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(http.StatusServiceUnavailable)
	})
	_, _, err := fetchFrom(t, f, download{url: url})
	wantError(t, err, "503")
	if fmt.Sprint(asked) != "[7s 7s]" {
		t.Errorf("waited for at least %v", asked)
	}
}

func TestFetchSHA512(t *testing.T) {
	sum := sha512.Sum512(content)
	dst, got, err := fetchFrom(t, hasty(), download{url: serve(t, modified), want: checksum(hex.EncodeToString(sum[:]))})
	wantFile(t, dst, err)
	if got != digest(content) {
		t.Errorf("its SHA-256 is said to be %s", got)
	}
	sum[0]++
	_, _, err = fetchFrom(t, hasty(), download{url: serve(t, modified), want: checksum(hex.EncodeToString(sum[:]))})
	wantError(t, err, "its SHA-512 is ", hex.EncodeToString(sum[:]))
}
