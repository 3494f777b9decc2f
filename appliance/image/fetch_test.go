package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fleetingd/fleetingd/appliance/need"
)

var content = bytes.Repeat([]byte("0123456789abcdef"), 64<<10) // 1 MiB

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// hasty returns a fetcher that does not wait between attempts.
func hasty() *fetcher {
	f := newFetcher()
	f.stall, f.attempts = time.Minute, 3
	f.pause = func(ctx context.Context, _ int, _ time.Duration) error { return ctx.Err() }
	return f
}

// fetchFrom downloads one file.
func fetchFrom(t *testing.T, f *fetcher, d download) (dst, sum string, err error) {
	t.Helper()
	if d.dst == "" {
		d.dst = filepath.Join(t.TempDir(), "file")
	}
	if d.max == 0 {
		d.max = maxDisk
	}
	sum, err = f.file(t.Context(), d)
	return d.dst, sum, err
}

func serve(t *testing.T, h http.HandlerFunc) string {
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv.URL + "/disk.img"
}

// modified serves content as a file server does: ranges, validators.
func modified(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("ETag", `"v1"`)
	http.ServeContent(w, r, "disk.img", time.Time{}, bytes.NewReader(content))
}

// cut sends half of a body and resets the connection.
func cut(w http.ResponseWriter, header http.Header) {
	for k, v := range header {
		w.Header()[k] = v
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(content)))
	w.Write(content[:len(content)/2])
	w.(http.Flusher).Flush()
	c, _, err := w.(http.Hijacker).Hijack()
	if err == nil {
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
}

func wantFile(t *testing.T, dst string, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(dst)
	if err != nil || !bytes.Equal(got, content) {
		t.Fatalf("the file has %d bytes and is not what was served (%v)", len(got), err)
	}
	wantOnly(t, filepath.Dir(dst), filepath.Base(dst))
}

// wantOnly checks that a folder holds these names and nothing else.
func wantOnly(t *testing.T, dir string, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if strings.Join(got, " ") != strings.Join(names, " ") {
		t.Errorf("%s holds %q, want %q", dir, got, names)
	}
}

func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; it should say %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("the error does not say %q:\n  %v", p, err)
		}
	}
}

func TestFetch(t *testing.T) {
	var last, total int64
	dst, sum, err := fetchFrom(t, hasty(), download{url: serve(t, modified), want: checksum(digest(content)),
		progress: func(d, all int64) { last, total = d, all }})
	wantFile(t, dst, err)
	if sum != digest(content) || last != int64(len(content)) || total != last {
		t.Errorf("digest %s, progress %d of %d", sum, last, total)
	}
}

func TestFetchResumes(t *testing.T) {
	var ranges []string
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		ranges = append(ranges, r.Header.Get("Range")+r.Header.Get("If-Range"))
		if len(ranges) == 1 {
			cut(w, http.Header{"Etag": {`"v1"`}})
			return
		}
		modified(w, r)
	})
	dst, _, err := fetchFrom(t, hasty(), download{url: url, want: checksum(digest(content))})
	wantFile(t, dst, err)
	if len(ranges) != 2 || !strings.HasPrefix(ranges[1], "bytes=") || !strings.HasSuffix(ranges[1], `"v1"`) || ranges[1] == `bytes=0-"v1"` {
		t.Errorf("asked for %q: the second is to go on where the first ended", ranges)
	}
}

func TestFetchResumesWhatAnotherProcessLeft(t *testing.T) {
	dst := filepath.Join(t.TempDir(), "file")
	for name, b := range map[string][]byte{".part": content[:1000], ".part.validator": []byte(`"v1"`)} {
		if err := os.WriteFile(dst+name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	first := ""
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		first = r.Header.Get("Range")
		modified(w, r)
	})
	_, _, err := fetchFrom(t, hasty(), download{url: url, dst: dst, want: checksum(digest(content))})
	wantFile(t, dst, err)
	if first != "bytes=1000-" {
		t.Errorf("asked for %q", first)
	}
}

// Answers to a request for the rest of a file after which the download starts over.
func TestFetchStartsOver(t *testing.T) {
	for name, second := range map[string]http.HandlerFunc{
		"ignores Range": func(w http.ResponseWriter, r *http.Request) { w.Write(content) },
		"has another file": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"v2"`)
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
		},
		"answers another range": func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") == "" {
				w.Write(content)
				return
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 5-%d/%d", len(content)-1, len(content)))
			w.WriteHeader(http.StatusPartialContent)
			w.Write(content[5:])
		},
		"cannot satisfy": func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Range") != "" {
				w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
				return
			}
			w.Write(content)
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := 0
			url := serve(t, func(w http.ResponseWriter, r *http.Request) {
				if n++; n == 1 {
					cut(w, http.Header{"Etag": {`"v1"`}})
					return
				}
				second(w, r)
			})
			dst, _, err := fetchFrom(t, hasty(), download{url: url, want: checksum(digest(content))})
			wantFile(t, dst, err)
		})
	}
}

// Answers to a request for the rest of a file by servers with their own ideas of ranges. The file's digest is not known, but the result must
// be the file.
func TestFetchOddRanges(t *testing.T) {
	rest := func(w http.ResponseWriter, r *http.Request, b []byte, most int) {
		first, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(r.Header.Get("Range"), "bytes="), "-"))
		last := min(first+most, len(b))
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last-1, len(b)))
		w.WriteHeader(http.StatusPartialContent)
		w.Write(b[first:last])
	}
	old := bytes.Repeat([]byte("old"), len(content)/3)
	for name, c := range map[string]struct {
		first  []byte // of which a half comes, at first
		second http.HandlerFunc
	}{
		"a piece at a time": {content, func(w http.ResponseWriter, r *http.Request) { rest(w, r, content, len(content)/5) }},
		"does not know If-Range": {old, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("ETag", `"v2"`)
			if r.Header.Get("Range") == "" {
				w.Write(content)
				return
			}
			rest(w, r, content, len(content))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			dst := filepath.Join(t.TempDir(), "file")
			for name, b := range map[string][]byte{".part": c.first[:1000], ".part.validator": []byte(`"v1"`)} {
				if err := os.WriteFile(dst+name, b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			_, sum, err := fetchFrom(t, hasty(), download{url: serve(t, c.second), dst: dst})
			wantFile(t, dst, err)
			if sum != digest(content) {
				t.Errorf("its digest is said to be %s", sum)
			}
		})
	}
}

func TestFetchMismatch(t *testing.T) {
	n := 0
	url := serve(t, func(w http.ResponseWriter, r *http.Request) { n++; modified(w, r) })
	dst, _, err := fetchFrom(t, hasty(), download{url: url, want: checksum(digest([]byte("other")))})
	wantError(t, err, url, digest(content), digest([]byte("other")))
	if _, ok := errors.AsType[*MismatchError](err); !ok {
		t.Errorf("%T is no *MismatchError", err)
	}
	wantOnly(t, filepath.Dir(dst))
	if n != 1 {
		t.Errorf("asked %d times: the same file would come again", n)
	}
}

func TestFetchStatus(t *testing.T) {
	for status, tries := range map[int]int{404: 1, 403: 1, 503: 3, 429: 3} {
		n := 0
		url := serve(t, func(w http.ResponseWriter, r *http.Request) { n++; w.WriteHeader(status) })
		dst, _, err := fetchFrom(t, hasty(), download{url: url})
		wantError(t, err, url, fmt.Sprint(status))
		if n != tries {
			t.Errorf("%d: asked %d times, want %d", status, n, tries)
		}
		if tries == 1 {
			wantOnly(t, filepath.Dir(dst))
		}
	}
}

func TestFetchCancelled(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		cancel(errors.New("the user had enough"))
		<-r.Context().Done()
	})
	_, err := hasty().file(ctx, download{url: url, dst: filepath.Join(t.TempDir(), "x"), max: maxDisk})
	wantError(t, err, "the user had enough")
}

func TestFetchTooLarge(t *testing.T) {
	n := 0
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		n++
		for r.Context().Err() == nil {
			if _, err := w.Write(content); err != nil {
				return
			}
		}
	})
	dst, _, err := fetchFrom(t, hasty(), download{url: url, max: 3 << 20})
	wantError(t, err, url, "larger than 3145728 bytes")
	wantOnly(t, filepath.Dir(dst))
	if n != 1 {
		t.Errorf("asked %d times", n)
	}
	if _, err := hasty().bytes(t.Context(), url, 100); err == nil {
		t.Error("a small file without end is taken")
	}
}

func TestFetchRedirects(t *testing.T) {
	plain := serve(t, modified)
	dst, _, err := fetchFrom(t, hasty(), download{url: serve(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain, http.StatusFound)
	}), want: checksum(digest(content))})
	wantFile(t, dst, err)

	secure := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, plain, http.StatusFound)
	}))
	defer secure.Close()
	f := hasty()
	f.attempts = 1
	f.client = secure.Client()
	f.client.CheckRedirect = checkRedirect
	_, _, err = fetchFrom(t, f, download{url: secure.URL})
	wantError(t, err, "redirected from https to http://")
}

func TestFetchHidesPasswords(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(404) })
	_, _, err := fetchFrom(t, hasty(), download{url: strings.Replace(url, "http://", "http://me:secret@", 1)})
	wantError(t, err, "404")
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("the password is in the error: %v", err)
	}
}

func TestFetchOnFullDisk(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=256k", "test", dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v\n%s", err, out)
	}
	t.Cleanup(func() { exec.Command("umount", dir).Run() })
	n := 0
	url := serve(t, func(w http.ResponseWriter, r *http.Request) { n++; modified(w, r) })
	_, _, err := fetchFrom(t, hasty(), download{url: url, dst: filepath.Join(dir, "file")})
	wantError(t, err, url, "no space left on device")
	wantOnly(t, dir)
	if n != 1 {
		t.Errorf("asked %d times", n)
	}
}
