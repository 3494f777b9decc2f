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
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/visible"
)

// Limits on the size of a file, in bytes, so that a server that never stops sending cannot fill the disk.
const (
	maxDisk   = 256 << 30
	maxKernel = 1 << 30 // and initrd
)

// Limits on how a server may send a file, besides those in fetcher. Together they ensure that a download ends, with the right bytes or
// an error, after a bounded time and a bounded multiple of the file's size.
const (
	// enoughProgress is how many new bytes, beyond the furthest point reached so far, a failed request must bring to reset the count
	// of failed attempts.
	enoughProgress = 1 << 20
	// smallestPiece is how much of the file a complete answer that does not reach its end must bring. RFC 9110, 15.3.7, lets a server
	// send less than was asked for; smaller pieces count as failures.
	smallestPiece = 64 << 10
	// repeats is how many times over a file may be received in total, plus some slack for small files.
	repeats      = 3
	repeatsSlack = 16 << 20
	// maxRetryAfter limits the pause that a server may ask for (RFC 9110, 10.2.3).
	maxRetryAfter = 2 * time.Minute
	// reserve is what a download of unknown length leaves free on the file system.
	reserve = 512 << 20
)

// fetcher downloads over HTTP(S). It takes proxies from the environment, as curl does.
type fetcher struct {
	client *http.Client
	// stall is how long a server may send nothing, and how long it may take for the headers.
	stall time.Duration
	// window and least: a request fails if it brings fewer than least bytes in a window. A slow line is acceptable; a server that
	// sends one byte now and then is not.
	window time.Duration
	least  int64
	// attempts is how many requests in a row may fail without enoughProgress.
	attempts int
	// pause waits between two attempts, at least as long as the server asked for.
	pause func(ctx context.Context, attempt int, least time.Duration) error
}

func newFetcher() *fetcher {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DisableCompression = true // offsets and digests refer to the bytes of the file itself
	transport.MaxResponseHeaderBytes = 256 << 10
	// A connection of HTTP/2 would be used again after a request on it has timed out, even if the other end is gone: each attempt would
	// fail like the first.
	transport.DisableKeepAlives = true
	return &fetcher{
		client:   &http.Client{Transport: transport, CheckRedirect: checkRedirect},
		stall:    time.Minute,
		window:   2 * time.Minute,
		least:    enoughProgress - 1, // about 9 KiB/s: whatever passes a window also counts as progress
		attempts: 5,
		pause:    backOff,
	}
}

// redirectError is a redirect that the client refuses to follow.
type redirectError struct{ why string }

func (e *redirectError) Error() string { return e.why }

func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= 10 {
		return &redirectError{"more than 10 redirects"}
	}
	if req.URL.Scheme != "https" && req.URL.Scheme != "http" {
		return &redirectError{fmt.Sprintf("redirected to %s, which is not an http:// or https:// URL", visible.Text(req.URL.Redacted()))}
	}
	if via[0].URL.Scheme == "https" && req.URL.Scheme != "https" {
		return &redirectError{fmt.Sprintf("redirected from https to %s, which anyone on the network path could change", req.URL.Redacted())}
	}
	return nil
}

// backOff waits 1, 2, 4 … seconds, or longer if the server asks for it.
func backOff(ctx context.Context, attempt int, least time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(max(time.Second<<attempt, least)):
		return nil
	}
}

// statusError is an answer other than the requested file.
type statusError struct {
	url, status string
	code        int
	after       time.Duration // Retry-After, limited to maxRetryAfter; 0: none
}

func (e *statusError) Error() string {
	return fmt.Sprintf("GET %s: the server answered %s", e.url, e.status)
}

// lasting reports whether asking again would give the same answer.
func (e *statusError) lasting() bool {
	return e.code < 500 && e.code != http.StatusRequestTimeout && e.code != http.StatusTooManyRequests
}

// retryAfter returns the pause that the server asked for, or 0.
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

// errChanged: what the server has is not the file whose beginning was downloaded.
var errChanged = errors.New("the file changed on the server during the download")

// errPiece: the server sent part of what was asked for, and ended it properly.
var errPiece = errors.New("the server ends there")

// download describes one file to fetch.
type download struct {
	url      string
	dst      string   // the file has .part appended until it is complete and verified
	want     checksum // empty: not known
	max      int64
	progress func(done, total int64) // may be nil
}

// file fetches d.url to d.dst and returns its SHA-256. It resumes what an earlier try left in d.dst.part if the server confirms that
// the file is still the same. After a wrong digest nothing is left.
func (f *fetcher) file(ctx context.Context, d download) (_ string, err error) {
	t, err := openTransfer(ctx, d)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, t.out.Close()) }()
	for failed := 1; ; failed++ {
		reached := t.most
		err := f.try(ctx, t)
		switch {
		case err == nil:
			return t.sums.sum(), t.finish()
		case ctx.Err() != nil:
			t.leave()
			return "", fmt.Errorf("GET %s: %w", redacted(d.url), context.Cause(ctx))
		case isLasting(err):
			t.remove()
			return "", err
		case errors.Is(err, errChanged):
			if err := t.restart(""); err != nil {
				t.remove()
				return "", err
			}
		}
		further := t.most - reached
		switch {
		case t.received > repeats*t.most+repeatsSlack:
			t.remove()
			return "", fmt.Errorf("%w (giving up: the server sent %s in total, but never got past the first %s of the file)",
				err, bytesText(t.received), bytesText(t.most))
		case errors.Is(err, errPiece) && further >= smallestPiece:
			failed = 0
			continue
		case further >= enoughProgress:
			failed = 1
		}
		if failed >= f.attempts {
			return "", &unreachableError{fmt.Errorf("%w (tried %d times; %s)", err, failed, t.leave())}
		}
		if err := f.pause(ctx, failed-1, retryAfter(err)); err != nil {
			t.leave()
			return "", fmt.Errorf("GET %s: %w", redacted(d.url), err)
		}
	}
}

// isLasting reports whether another attempt would fail in the same way.
func isLasting(err error) bool {
	if e, ok := errors.AsType[*statusError](err); ok {
		return e.lasting()
	}
	_, local := errors.AsType[*os.PathError](err) // the disk is full, a folder is missing
	_, large := errors.AsType[*tooLargeError](err)
	_, redirect := errors.AsType[*redirectError](err)
	_, unusable := errors.AsType[*answerError](err)
	_, cert := errors.AsType[*tls.CertificateVerificationError](err)
	_, noTLS := errors.AsType[tls.RecordHeaderError](err)
	return local || large || redirect || unusable || cert || noTLS || errors.Is(err, unix.ENOSPC)
}

// unreachableError means that the server did not answer, or did not send the whole file, in all attempts. It may work later.
type unreachableError struct{ error }

func (e *unreachableError) Unwrap() error { return e.error }

func isUnreachable(err error) bool {
	_, ok := errors.AsType[*unreachableError](err)
	return ok
}

// MismatchError is a file whose digest is not the expected one.
type MismatchError struct {
	What, Want, Got string
	Encoding        string // the Content-Encoding that the server claimed; "" for none
}

func (e *MismatchError) Error() string {
	why := "Either the download was tampered with, or the digest belongs to another version"
	if e.Encoding != "" {
		why = fmt.Sprintf("The server sent it with Content-Encoding: %s, which fleetingd did not ask for: the server or a proxy seems to "+
			"compress it. Turn compression off for this URL, or use another mirror", e.Encoding)
	}
	return fmt.Sprintf("%s is not the expected file: its %s is %s, expected %s; it was discarded. %s",
		e.What, checksum(e.Want).algorithm(), e.Got, e.Want, why)
}

type tooLargeError struct {
	url string
	max int64
}

func (e *tooLargeError) Error() string {
	return fmt.Sprintf("GET %s: the file is larger than %d bytes, the limit for such files", e.url, e.max)
}

// answerError is an unusable answer that would be the same if asked again.
type answerError struct{ url, why string }

func (e *answerError) Error() string { return fmt.Sprintf("GET %s: %s", e.url, e.why) }

func encodingError(address, encoding string) error {
	return &answerError{address, fmt.Sprintf("the server sent it with Content-Encoding: %s, although fleetingd asks for files as they are "+
		"(Accept-Encoding: identity). Turn off compression for this URL on the server or the proxy", encoding)}
}

// checkUnverified refuses answers that are only safe to use if the file's digest is known.
func checkUnverified(resp *http.Response, address string) error {
	if encoding := contentEncoding(resp); encoding != "" {
		return encodingError(address, encoding)
	}
	if resp.ProtoMajor == 1 && resp.ContentLength < 0 && len(resp.TransferEncoding) == 0 {
		return &answerError{address, "the server does not say how long the file is, so a dropped connection would look like its end. " +
			"Name a list of checksums that has it with sha256sums, or use another server"}
	}
	return nil
}

// contentEncoding returns the encoding of an answer's body, or "" if the body is the file itself.
func contentEncoding(resp *http.Response) string {
	v := strings.TrimSpace(strings.Join(resp.Header.Values("Content-Encoding"), ", "))
	if strings.EqualFold(v, "identity") {
		return ""
	}
	return visible.Text(v)
}

// try makes one request and adds what it brings to t.
func (f *fetcher) try(ctx context.Context, t *transfer) error {
	ctx, patience := f.patience(ctx)
	defer patience.end()
	from := t.done
	if t.validator == "" {
		from = 0
	}
	resp, err := f.get(ctx, t.url, from, t.validator)
	patience.pause()
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	t.encoding = contentEncoding(resp)
	if t.want == "" {
		if err := checkUnverified(resp, redacted(t.url)); err != nil {
			return err
		}
	}
	a := answer{end: resp.ContentLength, whole: resp.ContentLength}
	if resp.StatusCode == http.StatusPartialContent {
		if a, err = t.rest(resp); err != nil {
			return fmt.Errorf("GET %s: %w", redacted(t.url), err)
		}
	} else if err := t.restart(validatorOf(resp)); err != nil { // the whole file: Range is ignored, or If-Range shows a change
		return err
	}
	if err := t.copy(patience, resp.Body, a.end); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("GET %s: after %d bytes: %w", redacted(t.url), t.done, err)
	}
	if t.done < max(a.end, a.whole) {
		return fmt.Errorf("GET %s: after %d bytes: %w, and the file has %d", redacted(t.url), t.done, errPiece, max(a.end, a.whole))
	}
	return nil
}

// patience limits how long a server may keep the client waiting. It counts only the time spent waiting for the server: a disk that
// takes minutes for a write is not the server's fault.
type patience struct {
	*fetcher
	cancel  context.CancelCauseFunc
	silence *time.Timer
	waited  time.Duration // in this window
	got     int64         // bytes, in this window
}

// patience starts with the wait for an answer's headers. The context ends when the server has been silent for f.stall.
func (f *fetcher) patience(ctx context.Context) (context.Context, *patience) {
	ctx, cancel := context.WithCancelCause(ctx)
	silence := time.AfterFunc(f.stall, func() {
		cancel(fmt.Errorf("the server sent nothing for %v", f.stall))
	})
	return ctx, &patience{fetcher: f, cancel: cancel, silence: silence}
}

func (p *patience) pause() { p.silence.Stop() }

func (p *patience) end() {
	p.silence.Stop()
	p.cancel(nil)
}

// read reads from a body. It fails when a whole window passed with fewer than p.least bytes.
func (p *patience) read(body io.Reader, buf []byte) (int, error) {
	p.silence.Reset(p.stall)
	start := time.Now()
	n, err := body.Read(buf)
	p.silence.Stop()
	p.waited += time.Since(start)
	p.got += int64(n)
	if p.waited < p.window {
		return n, err
	}
	if p.got < p.least && err == nil {
		err = fmt.Errorf("the server is too slow: it sent %d bytes in %v", p.got, p.waited.Round(time.Millisecond))
	}
	p.waited, p.got = 0, 0
	return n, err
}

// get asks for the file from offset on, provided that it is still the one that validator stands for (RFC 9110, 13.1.5 and 14.2).
func (f *fetcher) get(ctx context.Context, address string, offset int64, validator string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "fleetingd")
	// Without this header a server may choose any encoding (RFC 9110, 12.5.3).
	req.Header.Set("Accept-Encoding", "identity")
	if offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
		req.Header.Set("If-Range", validator)
	}
	resp, err := f.client.Do(req)
	if err != nil {
		// net/http wraps it in an error that names the last URL of a chain of redirects.
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

// bytes fetches a small file of at most limit bytes.
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
	ctx, cancel := context.WithTimeoutCause(ctx, f.stall, fmt.Errorf("not received within %v", f.stall))
	defer cancel()
	resp, err := f.get(ctx, address, 0, "")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if err := checkUnverified(resp, redacted(address)); err != nil {
		return nil, err
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

// redacted returns a URL without its password, for messages.
func redacted(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return visible.Text(address)
	}
	return u.Redacted()
}
