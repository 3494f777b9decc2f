package image

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/appliance/visible"
)

// Bounds on what a server may send, in bytes: a server that never stops must
// not fill the disk with what nobody can boot.
const (
	maxDisk   = 256 << 30
	maxKernel = 1 << 30 // and initrd
)

// Bounds on how a server may send a file, beside fetcher's own. A download ends when one of them is reached: with the right bytes or
// with an error, after a bounded time and a bounded multiple of the file's bytes.
const (
	// enoughProgress is how many bytes further than ever before a request must get for its failure not to count as the same again.
	enoughProgress = 1 << 20
	// smallestPiece is the least that a whole answer to a request for the rest may hold, if more is still missing (RFC 9110, 15.3.7,
	// lets a server send less than it was asked for). Smaller ones count as failures.
	smallestPiece = 64 << 10
	// repeats is how many times the bytes of a file may come in all, plus slack for small files.
	repeats      = 3
	repeatsSlack = 16 << 20
	// maxRetryAfter bounds how long a server may ask to be left alone (RFC 9110, 10.2.3).
	maxRetryAfter = 2 * time.Minute
	// reserve is what a download of unknown length leaves free on the file system.
	reserve = 512 << 20
)

// fetcher downloads over HTTP(S). Proxies come from the environment, as curl's do.
type fetcher struct {
	client *http.Client
	// stall is how long a server may send nothing, headers included.
	stall time.Duration
	// window and least: a server that sends fewer than least bytes in a window is given up. A slow line is no error, a server
	// that sends a byte now and then is.
	window time.Duration
	least  int64
	// attempts is how often in a row a download may fail without enoughProgress.
	attempts int
	// pause waits between two attempts, for at least as long as the server asked for.
	pause func(ctx context.Context, attempt int, least time.Duration) error
}

func newFetcher() *fetcher {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DisableCompression = true // offsets and digests are of the bytes as they are stored
	transport.MaxResponseHeaderBytes = 256 << 10
	return &fetcher{
		client:   &http.Client{Transport: transport, CheckRedirect: checkRedirect},
		stall:    time.Minute,
		window:   2 * time.Minute,
		least:    enoughProgress - 1, // some 9 KiB/s: what passes at every window also counts as progress
		attempts: 5,
		pause:    backOff,
	}
}

// redirectError is a redirect that is not followed.
type redirectError struct{ why string }

func (e *redirectError) Error() string { return e.why }

func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= 10 {
		return &redirectError{"more than 10 redirects"}
	}
	if via[0].URL.Scheme == "https" && req.URL.Scheme != "https" {
		return &redirectError{fmt.Sprintf("redirected from https to %s, which anyone on the way could change", req.URL.Redacted())}
	}
	return nil
}

// backOff waits 1, 2, 4 … seconds, or longer where the server asks for that.
func backOff(ctx context.Context, attempt int, least time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(max(time.Second<<attempt, least)):
		return nil
	}
}

// statusError is an answer that is no file.
type statusError struct {
	url, status string
	code        int
	after       time.Duration // Retry-After, bounded; 0: not said
}

func (e *statusError) Error() string {
	return fmt.Sprintf("GET %s: the server says %s", e.url, e.status)
}

// lasting reports an answer that asking again will not change.
func (e *statusError) lasting() bool {
	return e.code < 500 && e.code != http.StatusRequestTimeout && e.code != http.StatusTooManyRequests
}

// retryAfter is how long the server behind an error asked to be left alone.
func retryAfter(err error) time.Duration {
	if e, ok := errors.AsType[*statusError](err); ok {
		return e.after
	}
	return 0
}

func parseRetryAfter(value string, now time.Time) time.Duration {
	wait := time.Duration(0)
	if seconds, err := strconv.ParseUint(value, 10, 31); err == nil {
		wait = time.Duration(seconds) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		wait = at.Sub(now)
	}
	return min(max(wait, 0), maxRetryAfter)
}

// errChanged: the file is another one than the one whose beginning is there.
var errChanged = errors.New("the file changed on the server while it was downloaded")

// errPiece: the server has sent a part of what was asked for, and ended it properly.
var errPiece = errors.New("the server ends there")

// download is one file on its way.
type download struct {
	url      string
	dst      string   // .part is added until it is whole and verified
	want     checksum // empty: not known
	max      int64
	progress func(done, total int64) // may be nil
}

// transfer is a download over one or more requests.
type transfer struct {
	download
	part     string
	most     int64  // how many bytes of the file have been there at any time
	received int64  // how many bytes came in all
	encoding string // Content-Encoding of the last answer; "" for none
}

// file fetches d.url to d.dst and returns its SHA-256. It resumes what an earlier try left in d.dst.part, if the server says that
// the file is still the same. After a wrong digest nothing is left.
func (f *fetcher) file(ctx context.Context, d download) (string, error) {
	t := &transfer{download: d, part: d.dst + ".part"}
	t.most = fileSize(t.part)
	for failed := 1; ; failed++ {
		reached := t.most
		sums, err := f.try(ctx, t)
		switch {
		case err == nil:
			return sums.sum(), t.keep(sums)
		case ctx.Err() != nil:
			return "", fmt.Errorf("GET %s: %w", redacted(d.url), context.Cause(ctx))
		case errors.Is(err, errChanged):
			removePart(t.part)
		case isLasting(err):
			removePart(t.part)
			return "", err
		}
		further := t.most - reached
		switch {
		case t.received > repeats*t.most+repeatsSlack:
			removePart(t.part)
			return "", fmt.Errorf("%w (the server has sent %s in all, and never more than the first %s of the file; given up)",
				err, bytesText(t.received), bytesText(t.most))
		case errors.Is(err, errPiece) && further >= smallestPiece:
			failed = 0
			continue
		case further >= enoughProgress:
			failed = 1
		}
		if failed >= f.attempts {
			return "", &unreachableError{fmt.Errorf("%w (tried %d times; what is there is kept and the next try goes on from it)", err, failed)}
		}
		if err := f.pause(ctx, failed-1, retryAfter(err)); err != nil {
			return "", fmt.Errorf("GET %s: %w", redacted(d.url), err)
		}
	}
}

// keep checks the digest and gives the file its name.
func (t *transfer) keep(sums *hashes) error {
	if got := sums.vouched(); t.want != "" && got != t.want {
		removePart(t.part)
		return &MismatchError{What: redacted(t.url), Want: string(t.want), Got: string(got), Encoding: t.encoding}
	}
	if err := os.Rename(t.part, t.dst); err != nil {
		return err
	}
	removePart(t.part) // its validator
	return nil
}

// isLasting reports an error that another try will meet again.
func isLasting(err error) bool {
	if e, ok := errors.AsType[*statusError](err); ok {
		return e.lasting()
	}
	_, local := errors.AsType[*os.PathError](err) // the disk is full, a folder is missing
	_, large := errors.AsType[*tooLargeError](err)
	_, redirect := errors.AsType[*redirectError](err)
	_, encoded := errors.AsType[*encodingError](err)
	_, cert := errors.AsType[*tls.CertificateVerificationError](err)
	_, noTLS := errors.AsType[tls.RecordHeaderError](err)
	return local || large || redirect || encoded || cert || noTLS || errors.Is(err, unix.ENOSPC)
}

// unreachableError is a server that did not answer, or did not get to the end, however often it was asked. It says nothing of the
// file: another day may be better.
type unreachableError struct{ error }

func (e *unreachableError) Unwrap() error { return e.error }

func isUnreachable(err error) bool {
	_, ok := errors.AsType[*unreachableError](err)
	return ok
}

// MismatchError is a file that is not the one that its publisher vouches for.
type MismatchError struct {
	What, Want, Got string
	Encoding        string // the Content-Encoding that the server claimed; "" for none
}

func (e *MismatchError) Error() string {
	why := "Either the download was tampered with, or the digest is that of another version"
	if e.Encoding != "" {
		why = fmt.Sprintf("The server sent it with Content-Encoding: %s, which fleetingd did not ask for: a proxy or the server seems to "+
			"compress it on the way. Turn that off for this URL, or use another mirror", e.Encoding)
	}
	return fmt.Sprintf("%s is not the file that it should be: its %s is %s, and %s was expected; nothing of it is kept. %s",
		e.What, checksum(e.Want).algorithm(), e.Got, e.Want, why)
}

type tooLargeError struct {
	url string
	max int64
}

func (e *tooLargeError) Error() string {
	return fmt.Sprintf("GET %s: more than %d bytes, which is more than such a file has", e.url, e.max)
}

// encodingError is an answer in another form than the file's own.
type encodingError struct{ url, encoding string }

func (e *encodingError) Error() string {
	return fmt.Sprintf("GET %s: the server sent it with Content-Encoding: %s, although fleetingd asks for files as they are "+
		"(Accept-Encoding: identity). Turn compression off for this URL on the server or the proxy", e.url, e.encoding)
}

// contentEncoding is the coding that an answer is in, or "" where it is the file itself.
func contentEncoding(resp *http.Response) string {
	v := strings.TrimSpace(strings.Join(resp.Header.Values("Content-Encoding"), ", "))
	if strings.EqualFold(v, "identity") {
		return ""
	}
	return visible.Text(v)
}

// try is one request. It leaves in t.part what it got.
func (f *fetcher) try(ctx context.Context, t *transfer) (_ *hashes, err error) {
	out, err := os.OpenFile(t.part, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()

	sums := newHashes(t.want)
	offset, validator := int64(0), readValidator(t.part)
	if validator != "" {
		if offset, err = io.Copy(sums, out); err != nil {
			return nil, err
		}
	}
	ctx, alive, stop := f.watch(ctx)
	defer stop()
	resp, err := f.get(ctx, t.url, offset, validator)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	t.encoding = contentEncoding(resp)
	if t.encoding != "" && t.want == "" {
		return nil, &encodingError{redacted(t.url), t.encoding}
	}
	if resp.StatusCode != http.StatusPartialContent {
		offset = 0 // the server ignored Range, or If-Range told it that the file changed
		sums.reset()
	} else if !startsAt(resp, offset) {
		return nil, fmt.Errorf("GET %s: %w: asked for byte %d, got %q",
			redacted(t.url), errChanged, offset, resp.Header.Get("Content-Range"))
	} else if v := validatorOf(resp); v != "" && v != validator {
		// Not every server and cache knows If-Range. What it sends then is the rest of another file. One that does may
		// leave Last-Modified out of its answer (RFC 9110, 15.3.7).
		return nil, fmt.Errorf("GET %s: %w: it was %s and is %s", redacted(t.url), errChanged, visible.Text(validator), visible.Text(v))
	}
	if err := out.Truncate(offset); err != nil {
		return nil, err
	}
	if _, err := out.Seek(offset, io.SeekStart); err != nil {
		return nil, err
	}
	if offset == 0 { // else it is the one that is there
		if err := writeValidator(t.part, resp); err != nil {
			return nil, err
		}
	}
	c := counter{t: t, done: offset, total: -1, alive: alive, out: out, sums: sums}
	if resp.ContentLength >= 0 {
		c.total = offset + resp.ContentLength
	}
	if err := c.copy(resp.Body); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("GET %s: after %d bytes: %w", redacted(t.url), c.done, err)
	}
	if whole := completeLength(resp); whole >= 0 && whole != c.done {
		return nil, fmt.Errorf("GET %s: after %d bytes: %w, and the file has %d", redacted(t.url), c.done, errPiece, whole)
	}
	return sums, out.Sync()
}

// watch ends the context when alive has not been called for f.stall, or with fewer than f.least bytes in a window.
func (f *fetcher) watch(ctx context.Context) (_ context.Context, alive func(n int), stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	silence := time.AfterFunc(f.stall, func() {
		cancel(fmt.Errorf("the server has sent nothing for %v", f.stall))
	})
	var got atomic.Int64
	windows := time.NewTicker(f.window)
	go func() {
		defer windows.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-windows.C:
				if n := got.Swap(0); n < f.least {
					cancel(fmt.Errorf("the server is too slow: it has sent %d bytes in %v", n, f.window))
				}
			}
		}
	}()
	alive = func(n int) {
		got.Add(int64(n))
		silence.Reset(f.stall)
	}
	return ctx, alive, func() { silence.Stop(); cancel(nil) }
}

// get asks for the file from offset on, if it is still the one that validator stands for (RFC 9110, 13.1.5
// and 14.2).
func (f *fetcher) get(ctx context.Context, address string, offset int64, validator string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "fleetingd")
	// Without it a server may send what it likes (RFC 9110, 12.5.3).
	req.Header.Set("Accept-Encoding", "identity")
	if offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
		req.Header.Set("If-Range", validator)
	}
	resp, err := f.client.Do(req)
	if err != nil {
		// What net/http wraps it in names the last URL of a chain of redirects.
		if wrapped, ok := errors.AsType[*url.Error](err); ok {
			err = wrapped.Err
		}
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return nil, fmt.Errorf("GET %s: %w", redacted(address), err)
	}
	switch {
	case resp.StatusCode == http.StatusOK, resp.StatusCode == http.StatusPartialContent && offset > 0:
		return resp, nil
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable && offset > 0:
		err = fmt.Errorf("GET %s: %w", redacted(address), errChanged)
	default:
		err = &statusError{redacted(address), visible.Text(resp.Status), resp.StatusCode, parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())}
	}
	resp.Body.Close()
	return nil, err
}

// counter copies a body, and counts, hashes and bounds it.
type counter struct {
	t           *transfer
	done, total int64 // total is -1 where it is not known
	alive       func(n int)
	out         io.Writer
	sums        *hashes
	checked     int64 // done when there was last seen to be room
}

func (c *counter) copy(body io.Reader) error {
	if c.total > c.t.max {
		return &tooLargeError{redacted(c.t.url), c.t.max}
	}
	if err := c.room(); err != nil {
		return err
	}
	buf := make([]byte, 256<<10)
	for {
		n, err := body.Read(buf)
		if n > 0 {
			if err := c.take(buf[:n]); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (c *counter) take(b []byte) error {
	c.alive(len(b))
	c.t.received += int64(len(b))
	if c.done += int64(len(b)); c.done > c.t.max {
		return &tooLargeError{redacted(c.t.url), c.t.max}
	}
	if c.total < 0 && c.done-c.checked > reserve/8 {
		if err := c.room(); err != nil {
			return err
		}
	}
	if _, err := c.out.Write(b); err != nil {
		return err
	}
	c.t.most = max(c.t.most, c.done)
	if _, err := c.sums.Write(b); err != nil {
		return err
	}
	if c.t.progress != nil {
		c.t.progress(c.done, max(c.total, 0))
	}
	return nil
}

// room checks that the rest of the file fits on the disk, before it is there: a full disk is everybody's problem. Of a file whose
// length is not known it leaves some space to others.
func (c *counter) room() error {
	c.checked = c.done
	need := c.total - c.done
	if c.total < 0 {
		need = reserve
	}
	dir := filepath.Dir(c.t.dst)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < need {
		return fmt.Errorf("%w: %s has %s free, and %s more are to come", unix.ENOSPC, dir, bytesText(free), bytesText(need))
	}
	return nil
}

// bytes fetches a small file, of at most limit bytes.
func (f *fetcher) bytes(ctx context.Context, address string, limit int64) ([]byte, error) {
	for failed := 1; ; failed++ {
		data, err := f.tryBytes(ctx, address, limit)
		switch {
		case err == nil, isLasting(err):
			return data, err
		case ctx.Err() != nil:
			return nil, fmt.Errorf("GET %s: %w", redacted(address), context.Cause(ctx))
		case failed >= f.attempts:
			return nil, &unreachableError{fmt.Errorf("%w (tried %d times)", err, failed)}
		}
		if err := f.pause(ctx, failed-1, retryAfter(err)); err != nil {
			return nil, fmt.Errorf("GET %s: %w", redacted(address), err)
		}
	}
}

func (f *fetcher) tryBytes(ctx context.Context, address string, limit int64) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, f.stall, fmt.Errorf("not there after %v", f.stall))
	defer cancel()
	resp, err := f.get(ctx, address, 0, "")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if encoding := contentEncoding(resp); encoding != "" {
		return nil, &encodingError{redacted(address), encoding}
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return nil, fmt.Errorf("GET %s: %w", redacted(address), err)
	}
	if int64(len(data)) > limit {
		return nil, &tooLargeError{redacted(address), limit}
	}
	return data, nil
}

// startsAt reports a Content-Range (RFC 9110, 14.4: "bytes 100-199/200") that begins at offset.
func startsAt(resp *http.Response, offset int64) bool {
	span, ok := strings.CutPrefix(resp.Header.Get("Content-Range"), "bytes ")
	first, _, _ := strings.Cut(span, "-")
	n, err := strconv.ParseInt(first, 10, 64)
	return ok && err == nil && n == offset
}

// completeLength is the file's length as a Content-Range gives it, -1 where it does not.
func completeLength(resp *http.Response) int64 {
	_, whole, _ := strings.Cut(resp.Header.Get("Content-Range"), "/")
	n, err := strconv.ParseInt(whole, 10, 64)
	if err != nil || resp.StatusCode != http.StatusPartialContent {
		return -1
	}
	return n
}

// The validator of a part is what If-Range takes: a strong ETag, or else a date. It
// is kept beside the part; without it a part cannot be gone on with.

func validatorFile(part string) string { return part + ".validator" }

func readValidator(part string) string {
	b, err := os.ReadFile(validatorFile(part))
	if err != nil || len(b) > 1024 {
		return "" // never written, or not by us: start over
	}
	return string(b)
}

func writeValidator(part string, resp *http.Response) error {
	return state.WriteFile(validatorFile(part), []byte(validatorOf(resp)), 0o600)
}

func validatorOf(resp *http.Response) string {
	v := resp.Header.Get("ETag")
	if v == "" || strings.HasPrefix(v, "W/") {
		v = resp.Header.Get("Last-Modified")
	}
	if len(v) > 1024 {
		v = ""
	}
	return v
}

// removePart removes what is there of a file; there may be nothing.
func removePart(part string) {
	os.Remove(part)
	os.Remove(validatorFile(part))
}

func fileSize(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return fi.Size()
}

// redacted is a URL without its password, for messages.
func redacted(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return visible.Text(address)
	}
	return u.Redacted()
}
