package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/fleetingd/fleetingd/appliance/state"
)

// Bounds on what a server may send, in bytes: a server that never stops must
// not fill the disk with what nobody can boot.
const (
	maxDisk   = 1 << 40
	maxKernel = 1 << 30 // and initrd
)

// fetcher downloads over HTTP(S). Proxies come from the environment, as curl's do.
type fetcher struct {
	client *http.Client
	// stall is how long a server may send nothing. There is no limit in total: a slow line is no error.
	stall time.Duration
	// attempts is how often in a row a download may fail without one new byte.
	attempts int
	pause    func(ctx context.Context, attempt int) error // between two attempts
}

func newFetcher() *fetcher {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.DisableCompression = true // offsets and digests are of the bytes as they are stored
	return &fetcher{
		client:   &http.Client{Transport: transport, CheckRedirect: checkRedirect},
		stall:    time.Minute,
		attempts: 5,
		pause:    backOff,
	}
}

func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= 10 {
		return errors.New("more than 10 redirects")
	}
	if via[0].URL.Scheme == "https" && req.URL.Scheme != "https" {
		return fmt.Errorf("redirected from https to %s, which anyone on the way could change", req.URL.Redacted())
	}
	return nil
}

// backOff waits 1, 2, 4 … seconds.
func backOff(ctx context.Context, attempt int) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(time.Second << attempt):
		return nil
	}
}

// statusError is an answer that is no file.
type statusError struct {
	url, status string
	code        int
}

func (e *statusError) Error() string {
	return fmt.Sprintf("GET %s: the server says %s", e.url, e.status)
}

// lasting reports an answer that asking again will not change.
func (e *statusError) lasting() bool {
	return e.code < 500 && e.code != http.StatusRequestTimeout && e.code != http.StatusTooManyRequests
}

// errChanged: the file is another one than the one whose beginning is there.
var errChanged = errors.New("the file changed on the server while it was downloaded")

// download is one file on its way.
type download struct {
	url      string
	dst      string // .part is added until it is whole and verified
	want     string // its SHA-256 in hex; empty: not known
	max      int64
	progress func(done, total int64) // may be nil
}

// file fetches d.url to d.dst and gives its SHA-256. What an earlier try left in
// d.dst.part is gone on with, where the server says that the file is still the same.
// After a wrong digest nothing is left, since what is there is of no use.
func (f *fetcher) file(ctx context.Context, d download) (string, error) {
	part := d.dst + ".part"
	for failed := 0; ; {
		before := fileSize(part)
		sum, err := f.try(ctx, d, part)
		switch {
		case err == nil:
			return sum, f.keep(d, part, sum)
		case ctx.Err() != nil:
			return "", fmt.Errorf("GET %s: %w", redacted(d.url), context.Cause(ctx))
		case errors.Is(err, errChanged):
			removePart(part)
		case isLasting(err):
			removePart(part)
			return "", err
		}
		if failed++; fileSize(part) > before {
			failed = 1 // it got further: not the same failure again
		}
		if failed >= f.attempts {
			return "", fmt.Errorf("%w (tried %d times; what is there is kept and the next try goes on from it)", err, failed)
		}
		if err := f.pause(ctx, failed-1); err != nil {
			return "", fmt.Errorf("GET %s: %w", redacted(d.url), err)
		}
	}
}

// keep checks the digest and gives the file its name.
func (f *fetcher) keep(d download, part, sum string) error {
	if d.want != "" && sum != d.want {
		removePart(part)
		return &MismatchError{What: redacted(d.url), Want: d.want, Got: sum}
	}
	if err := os.Rename(part, d.dst); err != nil {
		return err
	}
	removePart(part) // its validator
	return nil
}

// isLasting reports an error that another try will meet again.
func isLasting(err error) bool {
	if e, ok := errors.AsType[*statusError](err); ok {
		return e.lasting()
	}
	_, local := errors.AsType[*os.PathError](err) // the disk is full, a folder is missing
	_, large := errors.AsType[*tooLargeError](err)
	return local || large
}

// MismatchError is a file that is not the one that its publisher vouches for.
type MismatchError struct {
	What, Want, Got string
}

func (e *MismatchError) Error() string {
	return fmt.Sprintf("%s is not the file that it should be: its SHA-256 is %s, and %s was expected; "+
		"nothing of it is kept. Either the download was tampered with, or the digest is that of another version",
		e.What, e.Got, e.Want)
}

type tooLargeError struct {
	url string
	max int64
}

func (e *tooLargeError) Error() string {
	return fmt.Sprintf("GET %s: more than %d bytes, which is more than such a file has", e.url, e.max)
}

// try is one request. It leaves in part what it got.
func (f *fetcher) try(ctx context.Context, d download, part string) (sum string, err error) {
	out, err := os.OpenFile(part, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, out.Close()) }()

	digest := sha256.New()
	offset, validator := int64(0), readValidator(part)
	if validator != "" {
		if offset, err = io.Copy(digest, out); err != nil {
			return "", err
		}
	}
	ctx, alive, stop := f.watch(ctx)
	defer stop()
	resp, err := f.get(ctx, d.url, offset, validator)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusPartialContent {
		offset = 0 // the server ignored Range, or If-Range told it that the file changed
		digest.Reset()
	} else if !startsAt(resp, offset) {
		return "", fmt.Errorf("GET %s: %w: asked for byte %d, got %q",
			redacted(d.url), errChanged, offset, resp.Header.Get("Content-Range"))
	} else if v := validatorOf(resp); v != "" && v != validator {
		// Not every server and cache knows If-Range. What it sends then is the rest of another file. One that does may
		// leave Last-Modified out of its answer (RFC 9110, 15.3.7).
		return "", fmt.Errorf("GET %s: %w: it was %s and is %s", redacted(d.url), errChanged, printable(validator), printable(v))
	}
	if err := out.Truncate(offset); err != nil {
		return "", err
	}
	if _, err := out.Seek(offset, io.SeekStart); err != nil {
		return "", err
	}
	if offset == 0 { // else it is the one that is there
		if err := writeValidator(part, resp); err != nil {
			return "", err
		}
	}
	c := counter{d: d, done: offset, total: -1, alive: alive, digest: digest}
	if resp.ContentLength >= 0 {
		c.total = offset + resp.ContentLength
	}
	if err := c.copy(out, resp.Body); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return "", fmt.Errorf("GET %s: after %d bytes: %w", redacted(d.url), c.done, err)
	}
	if whole := completeLength(resp); whole >= 0 && whole != c.done {
		// A server may send less than the range that was asked for (RFC 9110, 15.3.7).
		return "", fmt.Errorf("GET %s: after %d bytes: the server ends there, and the file has %d", redacted(d.url), c.done, whole)
	}
	return hex.EncodeToString(digest.Sum(nil)), out.Sync()
}

// watch ends the context when alive has not been called for f.stall.
func (f *fetcher) watch(ctx context.Context) (_ context.Context, alive, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(f.stall, func() {
		cancel(fmt.Errorf("the server has sent nothing for %v", f.stall))
	})
	return ctx, func() { timer.Reset(f.stall) }, func() { timer.Stop(); cancel(nil) }
}

// get asks for the file from offset on, if it is still the one that validator stands for (RFC 9110, 13.1.5
// and 14.2).
func (f *fetcher) get(ctx context.Context, address string, offset int64, validator string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("User-Agent", "fleetingd")
	if offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
		req.Header.Set("If-Range", validator)
	}
	resp, err := f.client.Do(req)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("GET %s: %w", redacted(address), cause)
		}
		return nil, err
	}
	switch {
	case resp.StatusCode == http.StatusOK, resp.StatusCode == http.StatusPartialContent && offset > 0:
		return resp, nil
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable && offset > 0:
		err = fmt.Errorf("GET %s: %w", redacted(address), errChanged)
	default:
		err = &statusError{redacted(address), printable(resp.Status), resp.StatusCode}
	}
	resp.Body.Close()
	return nil, err
}

// counter copies a body, and counts, hashes and bounds it.
type counter struct {
	d           download
	done, total int64
	alive       func()
	digest      hash.Hash
}

func (c *counter) copy(out io.Writer, body io.Reader) error {
	buf := make([]byte, 256<<10)
	for {
		n, err := body.Read(buf)
		if n > 0 {
			c.alive()
			if c.done += int64(n); c.done > c.d.max {
				return &tooLargeError{redacted(c.d.url), c.d.max}
			}
			if _, err := out.Write(buf[:n]); err != nil {
				return err
			}
			c.digest.Write(buf[:n])
			if c.d.progress != nil {
				c.d.progress(c.done, max(c.total, 0))
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

// bytes fetches a small file, of at most limit bytes.
func (f *fetcher) bytes(ctx context.Context, address string, limit int64) ([]byte, error) {
	for failed := 1; ; failed++ {
		data, err := f.tryBytes(ctx, address, limit)
		if err == nil || ctx.Err() != nil || isLasting(err) || failed >= f.attempts {
			return data, err
		}
		if err := f.pause(ctx, failed-1); err != nil {
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
	data, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
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
		return printable(address)
	}
	return u.Redacted()
}

// printable escapes what came from elsewhere for a terminal: what is no visible character is written as Go
// writes it.
func printable(s string) string {
	var b strings.Builder
	for _, r := range s {
		if unicode.IsPrint(r) {
			b.WriteRune(r)
		} else {
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}
