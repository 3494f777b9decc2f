package image

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// odd is a server that answers in its own way, over connections in memory: inside a synctest bubble, minutes of waiting take no time.
type odd struct {
	requests atomic.Int64
	answer   func(n int, w http.ResponseWriter, r *http.Request) // n counts from 1
	conns    chan net.Conn
	bytes    atomic.Int64 // all that clients have read
	busy     sync.WaitGroup
}

const oddURL = "http://odd.example.com/disk.img"

// start serves until the test ends, which must be in a bubble, and makes f connect to it.
func (o *odd) start(t *testing.T, f *fetcher) {
	o.conns = make(chan net.Conn)
	srv := &http.Server{Handler: o, ErrorLog: log.New(io.Discard, "", 0)}
	go srv.Serve(o)
	t.Cleanup(func() {
		srv.Close()
		synctest.Wait() // every handler has begun
		o.busy.Wait()   // and ended: a bubble may leave no goroutine behind
	})
	transport := f.client.Transport.(*http.Transport)
	transport.Proxy = nil
	transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
		client, server := net.Pipe()
		select {
		case o.conns <- server:
			return &countedConn{client, &o.bytes}, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	t.Cleanup(transport.CloseIdleConnections)
}

func (o *odd) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	o.busy.Add(1)
	defer o.busy.Done()
	o.answer(int(o.requests.Add(1)), w, r)
}

func (o *odd) Accept() (net.Conn, error) {
	c, ok := <-o.conns
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (o *odd) Close() error   { close(o.conns); return nil }
func (o *odd) Addr() net.Addr { return &net.UnixAddr{} }

type countedConn struct {
	net.Conn
	n *atomic.Int64
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.n.Add(int64(n))
	return n, err
}

// cutAfter announces a whole file, sends its first n bytes and drops the connection.
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

// until calls do until it fails, because the client has closed the connection.
func until(r *http.Request, do func() error) {
	for r.Context().Err() == nil && do() == nil {
		continue
	}
}

// asked is the first byte that is asked for; ok if it is a request for a range.
func asked(r *http.Request) (first int, ok bool) {
	_, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &first)
	return first, err == nil
}

func piece(w http.ResponseWriter, r *http.Request, file []byte, most int) {
	first, _ := asked(r)
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

// drip calls do every d until it fails.
func drip(r *http.Request, d time.Duration, do func() error) {
	until(r, func() error {
		time.Sleep(d)
		return do()
	})
}

// speaks writes text to the bare connection, and then calls more until it fails; more may be nil.
func speaks(text string, more func(w io.Writer) error) func(int, http.ResponseWriter, *http.Request) {
	return func(_ int, w http.ResponseWriter, _ *http.Request) {
		raw(w, func(c net.Conn, _ *bufio.Writer) {
			_, err := io.WriteString(c, text)
			for more != nil && err == nil {
				err = more(c)
			}
		})
	}
}

// says is a more of speaks.
func says(every time.Duration, text string) func(io.Writer) error {
	return func(w io.Writer) error {
		time.Sleep(every)
		_, err := io.WriteString(w, text)
		return err
	}
}

// resumes cuts the first answer after 1000 bytes, answers a request for a range with a 206 that has these headers and this body, and
// sends the whole file when it is asked for it again.
func resumes(contentRange string, header http.Header, body []byte) func(int, http.ResponseWriter, *http.Request) {
	return func(n int, w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"v1"`)
		_, ranged := asked(r)
		switch {
		case n == 1:
			cutAfter(w, content, 1000)
			return
		case !ranged:
			w.Write(content)
			return
		}
		w.Header().Set("Content-Range", contentRange)
		for k, v := range header {
			w.Header()[k] = v
		}
		w.WriteHeader(http.StatusPartialContent)
		w.(http.Flusher).Flush() // chunked, unless a header says otherwise
		w.Write(body)
	}
}

// TestOddServers: whatever a server does, a download ends with the right bytes or with an error, after a bounded time, a bounded number
// of requests and a bounded multiple of the file's bytes. What is not the expected file is never taken for it. The limits are the real ones.
func TestOddServers(t *testing.T) {
	large := bytes.Repeat([]byte("fleetingd"), 4<<20) // 36 MiB
	half := len(content) / 2
	const small = 3 << 20 // the largest file that is accepted
	type server struct {
		answer   func(n int, w http.ResponseWriter, r *http.Request)
		blind    bool          // no digest is known
		file     []byte        // nil: content
		want     []string      // in the error; nil: it succeeds
		requests int           // at most
		times    int64         // how many times the file's bytes, at most; 0: less than one time
		within   time.Duration // 0: a minute, which is a bit more than the pauses between five attempts take
		kept     bool          // the part is left for the next download
	}
	for name, c := range map[string]server{
		"is cut and does not know Range": {
			answer:   func(_ int, w http.ResponseWriter, _ *http.Request) { cutAfter(w, content, half) },
			want:     []string{"after 524288 bytes", "tried 5 times", "nothing was kept"},
			requests: 5, times: 3,
		},
		"is cut, each time a byte later": {
			answer:   func(n int, w http.ResponseWriter, _ *http.Request) { cutAfter(w, content, half+n) },
			want:     []string{"tried 5 times"},
			requests: 5, times: 3,
		},
		"is cut, each time a little later, for as long as one asks": {
			answer: func(n int, w http.ResponseWriter, _ *http.Request) {
				cutAfter(w, large, min(n*(enoughProgress+1), len(large)-1))
			},
			file:     large,
			want:     []string{"the server sent", "in total", "giving up"},
			requests: 16, times: 2,
		},
		"is cut and resumes": {
			answer: func(n int, w http.ResponseWriter, r *http.Request) {
				if n == 1 {
					w.Header().Set("ETag", `"v1"`)
					cutAfter(w, content, 1000)
					return
				}
				modified(w, r)
			},
			requests: 2, times: 1,
		},
		"resumes, and is cut after each MiB": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				first, _ := asked(r)
				w.Header().Set("ETag", `"v1"`)
				w.Header().Set("Content-Length", fmt.Sprint(len(large)-first))
				if first > 0 {
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, len(large)-1, len(large)))
					w.WriteHeader(http.StatusPartialContent)
				}
				w.Write(large[first:min(first+enoughProgress, len(large))])
			},
			file:     large,
			requests: 36, times: 1,
		},
		"resumes, and is cut after each KiB": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				first, _ := asked(r)
				w.Header().Set("ETag", `"v1"`)
				w.Header().Set("Content-Length", fmt.Sprint(len(content)-first))
				if first > 0 {
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, len(content)-1, len(content)))
					w.WriteHeader(http.StatusPartialContent)
				}
				w.Write(content[first : first+1<<10])
			},
			want:     []string{"after 5120 bytes", "tried 5 times", "the first 5 KiB are kept", "resumes there"},
			requests: 5, kept: true,
		},
		"is cut and has another file each time": {
			answer: func(n int, w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("ETag", fmt.Sprintf(`"v%d"`, n))
				cutAfter(w, content, half)
			},
			want:     []string{"tried 5 times", "the first 512 KiB are kept"},
			requests: 5, times: 3, kept: true,
		},
		"is cut and has only a weak ETag": {
			answer: func(n int, w http.ResponseWriter, r *http.Request) {
				w.Header().Set("ETag", `W/"v1"`)
				switch {
				case r.Header.Get("Range") != "":
					http.Error(w, "a weak ETag is not a validator for a range", http.StatusBadRequest)
				case n == 1:
					cutAfter(w, content, half)
				default:
					w.Write(content)
				}
			},
			requests: 2, times: 2,
		},
		"resumes another file than it began, each time": {
			answer: func(n int, w http.ResponseWriter, r *http.Request) {
				w.Header().Set("ETag", fmt.Sprintf(`"v%d"`, n))
				if r.Header.Get("Range") == "" {
					cutAfter(w, content, half)
					return
				}
				w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", half, len(content)-1, len(content)))
				w.WriteHeader(http.StatusPartialContent)
				w.Write(content[half:])
			},
			want:     []string{"tried 5 times"},
			requests: 5, times: 3, kept: true,
		},
		"says at last that the file changed": {
			answer: func(n int, w http.ResponseWriter, r *http.Request) {
				w.Header().Set("ETag", `"v1"`)
				switch {
				case n == 4:
					cutAfter(w, content, half)
				case n == 5:
					w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
				default:
					w.WriteHeader(http.StatusBadGateway)
				}
			},
			want:     []string{"the file changed", "tried 5 times", "nothing was kept"},
			requests: 5, times: 1,
		},
		"cannot satisfy any range": {
			answer: func(n int, w http.ResponseWriter, r *http.Request) {
				w.Header().Set("ETag", `"v1"`)
				if _, ok := asked(r); ok {
					w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
					return
				}
				cutAfter(w, content, 1000)
			},
			want:     []string{"tried 5 times", "the first 1000 B are kept"},
			requests: 5, kept: true,
		},
		"resumes at another byte":            {answer: resumes("bytes 7-9/10", nil, content[7:10]), requests: 3, times: 1},
		"resumes before the part":            {answer: resumes("bytes 0-1048575/1048576", nil, content), requests: 3, times: 1},
		"resumes with a range backwards":     {answer: resumes("bytes 1000-7/1048576", nil, content[1000:]), requests: 3, times: 1},
		"resumes with a range past the end":  {answer: resumes("bytes 1000-1048576/1048576", nil, content[1000:]), requests: 3, times: 1},
		"resumes without a range":            {answer: resumes("", nil, content[1000:]), requests: 3, times: 1},
		"resumes with more than it says":     {answer: resumes("bytes 1000-1048575/1048576", nil, slices.Concat(content[1000:], []byte("garbage"))), requests: 3, times: 2},
		"resumes with less than it says":     {answer: resumes("bytes 1000-1048575/1048576", nil, content[1000:2000]), requests: 4, times: 1},
		"resumes with another length":        {answer: resumes("bytes 1000-1048575/1048576", http.Header{"Content-Length": {"1000"}}, content[1000:2000]), requests: 3, times: 1},
		"resumes with several ranges":        {answer: resumes("", http.Header{"Content-Type": {"multipart/byteranges; boundary=x"}}, content[1000:]), requests: 3, times: 1},
		"resumes without saying how far":     {answer: resumes("bytes 1000-1048575/*", nil, content[1000:]), requests: 2, times: 1},
		"resumes a part, without the length": {answer: resumes("bytes 1000-1999/*", nil, content[1000:2000]), want: []string{"is not the expected file"}, requests: 2},
		"resumes a part, without the length, no digest known": {
			answer: resumes("bytes 1000-1999/*", nil, content[1000:2000]), blind: true, requests: 3, times: 1},
		"resumes what is compressed": {
			answer: resumes("bytes 1000-1048575/1048576", http.Header{"Content-Encoding": {"gzip"}}, content[1000:]), blind: true,
			want: []string{"Content-Encoding: gzip"}, requests: 2},
		"sends crumbs": {
			answer:   func(_ int, w http.ResponseWriter, r *http.Request) { piece(w, r, content, 1<<10) },
			want:     []string{"the server ends there", "the file has 1048576", "the first 5 KiB are kept"},
			requests: 5, kept: true,
		},
		"sends pieces": {
			answer:   func(_ int, w http.ResponseWriter, r *http.Request) { piece(w, r, content, smallestPiece) },
			requests: len(content)/smallestPiece + 1, times: 1,
		},
		"never answers": {
			answer:   func(_ int, _ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
			want:     []string{"sent nothing for 1m0s", "tried 5 times"},
			requests: 5, within: 6 * time.Minute,
		},
		"sends headers without end": {
			answer:   speaks("HTTP/1.1 200 OK\r\n", says(0, "X-Header: "+strings.Repeat("x", 1000)+"\r\n")),
			want:     []string{"header"},
			requests: 5, times: 3,
		},
		"sends a header now and then": {
			answer:   speaks("HTTP/1.1 200 OK\r\n", says(30*time.Second, "X-Wait: yes\r\n")),
			want:     []string{"sent nothing for 1m0s"},
			requests: 5, within: 6 * time.Minute,
		},
		"says to go on, without end": {
			answer:   speaks("", says(0, "HTTP/1.1 100 Continue\r\n\r\n")),
			want:     []string{"headers exceeded"},
			requests: 5, times: 2,
		},
		"says to go on, now and then": {
			answer:   speaks("", says(20*time.Second, "HTTP/1.1 103 Early Hints\r\n\r\n")),
			want:     []string{"sent nothing for 1m0s"},
			requests: 5, within: 6 * time.Minute,
		},
		"stops in the middle": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				w.Write(content[:100])
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			},
			want:     []string{"sent nothing for 1m0s", "tried 5 times"},
			requests: 5, within: 6 * time.Minute,
		},
		"sends a byte each 30 seconds": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Length", fmt.Sprint(len(content)))
				drip(r, 30*time.Second, func() error {
					_, err := w.Write(content[:1])
					w.(http.Flusher).Flush()
					return err
				})
			},
			want:     []string{"too slow", "5 bytes in 2m0s", "tried 5 times"},
			requests: 5, within: 13 * time.Minute,
		},
		"sends a chunk each 30 seconds, and resumes": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				first, ok := asked(r)
				w.Header().Set("ETag", `"v1"`)
				if ok {
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, len(content)-1, len(content)))
					w.WriteHeader(http.StatusPartialContent)
				}
				drip(r, 30*time.Second, func() error {
					_, err := w.Write(content[first : first+1])
					w.(http.Flusher).Flush()
					first++
					return err
				})
			},
			want:     []string{"too slow", "tried 5 times", "the first 25 B are kept"},
			requests: 5, within: 13 * time.Minute, kept: true,
		},
		"is slow, but not too slow": { // some 10 KiB/s
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Length", fmt.Sprint(len(content)))
				for at := 0; at < len(content); at += 256 << 10 {
					time.Sleep(25 * time.Second)
					w.Write(content[at : at+256<<10])
					w.(http.Flusher).Flush()
				}
			},
			requests: 1, times: 1, within: 2 * time.Minute,
		},
		"sends without end": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				until(r, func() error { _, err := w.Write(content); return err })
			},
			want:     []string{"larger than 3145728 bytes"},
			requests: 1, times: 4,
		},
		"sends small chunks without end": {
			answer:   speaks("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", says(0, "40000\r\n"+strings.Repeat("x", 0x40000)+"\r\n")),
			want:     []string{"larger than 3145728 bytes"},
			requests: 1, times: 4,
		},
		"sends empty lines for chunks": {
			answer:   speaks("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", says(0, "\r\n")),
			want:     []string{"chunk", "tried 5 times"},
			requests: 5,
		},
		"sends chunks with long comments": {
			answer:   speaks("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", says(0, "1;"+strings.Repeat("x", 2000)+"\r\nx\r\n")),
			want:     []string{"chunk", "tried 5 times"},
			requests: 5, times: 1,
		},
		"sends trailers without end": {
			answer:   speaks("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", says(0, "X-Trailer: "+strings.Repeat("x", 1000)+"\r\n")),
			want:     []string{"trailer", "tried 5 times"},
			requests: 5,
		},
		"sends a trailer now and then": {
			answer:   speaks("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", says(30*time.Second, "X-Trailer: x\r\n")),
			want:     []string{"tried 5 times"},
			requests: 5, within: 6 * time.Minute,
		},
		"announces a chunk larger than any file": {
			answer:   speaks("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffff0\r\n", nil),
			want:     []string{"tried 5 times"},
			requests: 5,
		},
		"announces more than any file has": {
			answer: func(_ int, w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Length", fmt.Sprint(int64(1)<<60))
				w.Write(content[:1])
			},
			want:     []string{"larger than 3145728 bytes"},
			requests: 1,
		},
		"announces more than it sends": {
			answer: func(_ int, w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Length", fmt.Sprint(len(content)+1))
				w.Write(content)
			},
			want:     []string{"unexpected EOF", "tried 5 times"},
			requests: 5, times: 5,
		},
		"announces less than it sends": {
			answer: speaks(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%sgarbage", len(content), content), nil), requests: 1, times: 1,
		},
		"announces two lengths": {
			answer: speaks("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxy", nil), want: []string{"Content-Length"}, requests: 5,
		},
		"announces a negative length": {
			answer: speaks("HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nx", nil), want: []string{"Content-Length"}, requests: 5,
		},
		"announces no length": {
			answer: speaks(fmt.Sprintf("HTTP/1.0 200 OK\r\n\r\n%s", content), nil), requests: 1, times: 1,
		},
		"announces no length and is cut": {
			answer: speaks(fmt.Sprintf("HTTP/1.0 200 OK\r\n\r\n%s", content[:half]), nil), want: []string{"is not the expected file"}, requests: 1, times: 1,
		},
		"announces no length and is cut, no digest known": {
			answer: speaks(fmt.Sprintf("HTTP/1.1 200 OK\r\n\r\n%s", content[:half]), nil), blind: true,
			want: []string{"how long the file is", "sha256sums"}, requests: 1, times: 1,
		},
		"adds garbage": {
			answer: body(string(content)+"garbage", ""), want: []string{"is not the expected file"}, requests: 1, times: 2,
		},
		"redirects in a circle": {
			answer:   func(_ int, w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) },
			want:     []string{"10 redirects"},
			requests: 11,
		},
		"redirects ever further": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, r.URL.Path+"x", http.StatusFound)
			},
			want:     []string{"10 redirects"},
			requests: 11,
		},
		"redirects each 30 seconds": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				time.Sleep(30 * time.Second)
				http.Redirect(w, r, r.URL.Path, http.StatusFound)
			},
			want:     []string{"sent nothing for 1m0s"},
			requests: 15, within: 6 * time.Minute,
		},
		"redirects to a file": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, "file:///etc/shadow", http.StatusFound)
			},
			want:     []string{"file:///etc/shadow", "is not an http"},
			requests: 1,
		},
		"redirects nowhere": {
			answer: status(http.StatusFound), want: []string{"302"}, requests: 5,
		},
		"redirects with a body without end": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Location", r.URL.Path)
				w.WriteHeader(http.StatusFound)
				until(r, func() error { _, err := w.Write(content); return err })
			},
			want:     []string{"10 redirects"},
			requests: 11, times: 1,
		},
		"sends an error without end": {
			answer: func(_ int, w http.ResponseWriter, r *http.Request) {
				w.WriteHeader(http.StatusInternalServerError)
				until(r, func() error { _, err := w.Write(content); return err })
			},
			want:     []string{"500", "tried 5 times"},
			requests: 5, times: 1,
		},
		"drops the connection": {
			answer:   speaks("", nil),
			want:     []string{"tried 5 times"},
			requests: 5,
		},
		"speaks another protocol": {answer: speaks("220 smtp.example.com ESMTP\r\n", nil), want: []string{"malformed HTTP"}, requests: 5},
		"switches protocols": {
			answer: speaks("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", says(time.Second, "x")),
			want:   []string{"101"}, requests: 1},
		"has nothing new":      {answer: status(http.StatusNotModified), want: []string{"304"}, requests: 1},
		"has no content":       {answer: status(http.StatusNoContent), want: []string{"204"}, requests: 1},
		"answers half unasked": {answer: status(http.StatusPartialContent), want: []string{"206"}, requests: 1},
		"is gone":              {answer: status(http.StatusGone), want: []string{"410"}, requests: 1},
		"is overloaded":        {answer: status(http.StatusServiceUnavailable), want: []string{"503", "tried 5 times", "nothing was kept"}, requests: 5},
		"asks to be left alone for a day": {
			answer: func(_ int, w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Retry-After", "86400")
				w.WriteHeader(http.StatusTooManyRequests)
			},
			want: []string{"429", "tried 5 times"}, requests: 5, within: 4*maxRetryAfter + time.Second},
		"is not what it was":    {answer: body("another", ""), want: []string{"SHA-256", digest([]byte("another"))}, requests: 1},
		"is empty":              {answer: body("", ""), want: []string{"is not the expected file"}, requests: 1},
		"says identity":         {answer: body(string(content), "identity"), requests: 1, times: 1},
		"zips, digest known":    {answer: body(string(zipped(content)), "gzip"), want: []string{"Content-Encoding: gzip", "proxy"}, requests: 1},
		"zips, no digest known": {answer: body(string(zipped(content)), "gzip"), blind: true, want: []string{"Content-Encoding: gzip", "identity"}, requests: 1},
		"claims to zip what is the file all the same": {answer: body(string(content), "gzip"), requests: 1, times: 1},
		"escapes for a terminal": {
			answer: body("x", "gz\x1b]0;owned\x07"), blind: true, want: []string{"Content-Encoding: gz"}, requests: 5},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				o, f := &odd{answer: c.answer}, newFetcher()
				o.start(t, f)
				file := c.file
				if file == nil {
					file = content
				}
				d := download{url: oddURL, dst: filepath.Join(dir, "file"), max: max(small, int64(len(file)))}
				if !c.blind {
					d.want = checksum(digest(file))
				}
				start := time.Now()
				_, err := f.file(t.Context(), d)
				took := time.Since(start)
				switch got, rerr := os.ReadFile(d.dst); {
				case c.want != nil:
					wantError(t, err, append(c.want, oddURL)...)
					if strings.ContainsAny(err.Error(), "\x1b\x07") {
						t.Errorf("the error holds what a terminal obeys: %q", err)
					}
				case err != nil:
					t.Error(err)
				case rerr != nil || !bytes.Equal(got, file):
					t.Errorf("the file has %d bytes and is not what was served (%v)", len(got), rerr)
				}
				switch {
				case c.want == nil:
					wantOnly(t, dir, "file")
				case c.kept:
					wantOnly(t, dir, "file.part", "file.part.validator")
				default:
					wantOnly(t, dir)
				}
				if n := int(o.requests.Load()); n > c.requests {
					t.Errorf("asked %d times, want at most %d", n, c.requests)
				}
				const overhead = 512 << 10 // headers, and what is read ahead of a refused body
				if n := o.bytes.Load(); n > c.times*int64(len(file))+overhead {
					t.Errorf("took %d bytes for a file of %d", n, len(file))
				}
				if limit := max(c.within, time.Minute); took > limit {
					t.Errorf("took %v, want at most %v", took, limit)
				}
			})
		})
	}
}

// An answer to a request for the rest of a file is that rest, or an error that says what is wrong with it.
func TestFetchRest(t *testing.T) {
	for _, c := range []struct {
		contentRange, etag string
		length             int64
		want               string // in the error; "" for none
	}{
		{"bytes 1000-1999/2000", `"v1"`, 1000, ""},
		{"bytes 1000-1499/2000", "", -1, ""},
		{"bytes 1000-1999/*", "", -1, "does not say where the file ends"},
		{"bytes 999-1999/2000", `"v1"`, -1, "from byte 1000, got \"bytes 999"},
		{"bytes 1000-1999/2000", `"v1"`, 999, "Content-Length: 999"},
		{"bytes 1000-1999/2000", `"v2"`, 1000, `it was "v1" and is now "v2"`},
		{"bytes 1000-999/2000", "", -1, "from byte 1000"},
		{"bytes 1000-2000/2000", "", -1, "from byte 1000"},
		{"bytes 1000-", "", -1, "from byte 1000"},
		{"bytes 1000-1999/-1", "", -1, "from byte 1000"},
		{"bytes 1000-99999999999999999999/*", "", -1, "from byte 1000"},
		{"chapters 1000-1999/2000", "", -1, "from byte 1000"},
		{"", "", 1000, "from byte 1000"},
		{"\x1b]0;owned\x07" + strings.Repeat("x", 1000), "", -1, `got "\x1b]0;owned\ax`},
	} {
		tr := &transfer{done: 1000, validator: `"v1"`}
		resp := &http.Response{ContentLength: c.length, Header: http.Header{"Content-Range": {c.contentRange}, "Etag": {c.etag}}}
		a, err := tr.rest(resp)
		if c.want != "" {
			wantError(t, err, "the file changed", c.want)
		} else if err != nil || a.whole != 2000 {
			t.Errorf("%q: %+v, %v", c.contentRange, a, err)
		}
	}
}

// HTTP/2 uses one connection for all requests. After a failed request, which may be the connection's fault, a download resumes on another.
func TestFetchHTTP2(t *testing.T) {
	for name, first := range map[string]func(w http.ResponseWriter, r *http.Request){
		"never answers": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"is reset": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("ETag", `"v1"`)
			w.Write(content[:1000])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		},
		"stops in the middle": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"v1"`)
			w.Write(content[:1000])
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var mu sync.Mutex
			var protocols, clients, ranges []string
			srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				protocols, clients, ranges = append(protocols, r.Proto), append(clients, r.RemoteAddr), append(ranges, r.Header.Get("Range"))
				n := len(clients)
				mu.Unlock()
				if n == 1 {
					first(w, r)
					return
				}
				modified(w, r)
			}))
			srv.EnableHTTP2 = true
			srv.StartTLS()
			defer srv.Close()
			f := hasty()
			f.client.Transport.(*http.Transport).TLSClientConfig = srv.Client().Transport.(*http.Transport).TLSClientConfig
			if name != "is reset" {
				f.stall = time.Second
			}
			dst, _, err := fetchFrom(t, f, download{url: srv.URL, want: checksum(digest(content))})
			wantFile(t, dst, err)
			mu.Lock()
			defer mu.Unlock()
			if protocols[0] != "HTTP/2.0" || len(clients) < 2 || clients[0] == clients[1] {
				t.Errorf("%s from %s", protocols, clients)
			}
			if name != "never answers" && ranges[1] != "bytes=1000-" {
				t.Errorf("asked for %q: the second request does not go on", ranges)
			}
		})
	}
}

// Small files have the same limits.
func TestOddServersSmallFiles(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(n int, w http.ResponseWriter, r *http.Request)
		want   string
	}{
		"never answers": {func(_ int, _ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, "tried 5 times"},
		"sends a byte now and then": {func(_ int, w http.ResponseWriter, r *http.Request) {
			drip(r, 30*time.Second, func() error { _, err := w.Write(content[:1]); w.(http.Flusher).Flush(); return err })
		}, "tried 5 times"},
		"sends without end": {func(_ int, w http.ResponseWriter, r *http.Request) {
			until(r, func() error { _, err := w.Write(content); return err })
		}, "larger than 100 bytes"},
		"redirects in a circle":    {func(_ int, w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) }, "10 redirects"},
		"is cut":                   {func(_ int, w http.ResponseWriter, _ *http.Request) { cutAfter(w, content[:50], 20) }, "unexpected EOF"},
		"zips":                     {body(string(zipped([]byte("x"))), "gzip"), "Content-Encoding: gzip"},
		"is cut, without a length": {speaks("HTTP/1.0 200 OK\r\n\r\nhalf", nil), "how long the file is"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				o, f := &odd{answer: c.answer}, newFetcher()
				o.start(t, f)
				start := time.Now()
				_, err := f.bytes(t.Context(), oddURL, 100)
				wantError(t, err, c.want, oddURL)
				if took := time.Since(start); took > 6*time.Minute {
					t.Errorf("took %v", took)
				}
				if n := o.bytes.Load(); n > 512<<10 {
					t.Errorf("took %d bytes for a file of 100 at most", n)
				}
			})
		})
	}
}

// A slow disk is not a silent server: only the time spent waiting for the server counts.
func TestFetchSlowDisk(t *testing.T) {
	dst := filepath.Join(t.TempDir(), "file")
	synctest.Test(t, func(t *testing.T) {
		o, f := &odd{answer: func(_ int, w http.ResponseWriter, r *http.Request) { modified(w, r) }}, newFetcher()
		o.start(t, f)
		start := time.Now()
		_, err := f.file(t.Context(), download{url: oddURL, dst: dst, want: checksum(digest(content)), max: maxDisk,
			progress: func(int64, int64) { time.Sleep(5 * time.Minute) }})
		wantFile(t, dst, err)
		if n := o.requests.Load(); n != 1 || time.Since(start) < 5*time.Minute {
			t.Errorf("asked %d times in %v", n, time.Since(start))
		}
	})
}

// A byte is hashed once, when it arrives, however often the connection drops: what the test writes over the part's beginning between
// two requests does not change the digest.
func TestFetchHashesOnce(t *testing.T) {
	dst := filepath.Join(t.TempDir(), "file")
	o := &odd{answer: func(n int, w http.ResponseWriter, r *http.Request) {
		if n == 1 {
			w.Header().Set("ETag", `"v1"`)
			cutAfter(w, content, len(content)/2)
			return
		}
		part, err := os.OpenFile(dst+".part", os.O_WRONLY, 0)
		if err == nil {
			_, err = part.WriteAt([]byte("other bytes"), 0)
			err = errors.Join(err, part.Close())
		}
		if err != nil {
			t.Error(err)
		}
		modified(w, r)
	}}
	synctest.Test(t, func(t *testing.T) {
		f := newFetcher()
		o.start(t, f)
		sum, err := f.file(t.Context(), download{url: oddURL, dst: dst, want: checksum(digest(content)), max: maxDisk})
		if n := o.requests.Load(); err != nil || sum != digest(content) || n != 2 {
			t.Errorf("%s, %v after %d requests", sum, err, n)
		}
	})
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

// Errors without an answer, and whether they count as a server that may answer later.
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
