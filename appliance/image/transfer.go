package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/state"
	"github.com/fleetingd/fleetingd/appliance/visible"
)

// transfer is a download over one or more requests.
type transfer struct {
	download
	part     string
	out      *os.File // the part, positioned at done
	sums     *hashes  // of the first done bytes: each byte is hashed once, however often a request is resumed
	done     int64
	most     int64  // the highest value of done so far
	received int64  // bytes received in total
	encoding string // Content-Encoding of the last answer; "" for none
	// validator is what If-Range takes for the file that the part belongs to: a strong ETag, or else a date. It is kept beside the
	// part; a part without one cannot be resumed.
	validator string
}

// openTransfer opens the part of a download, and hashes what an earlier process left there.
func openTransfer(ctx context.Context, d download) (*transfer, error) {
	t := &transfer{download: d, part: d.dst + ".part", sums: newHashes(d.want)}
	var err error
	if t.out, err = os.OpenFile(t.part, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	if t.validator = readValidator(t.part); t.validator != "" {
		t.done, err = io.Copy(t.sums, &contextReader{ctx, t.out})
	} else if err = t.restart(""); err != nil {
		t.remove()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("resume %s: %w", t.part, err), t.out.Close())
	}
	t.most = t.done
	return t, nil
}

// contextReader is a reader that fails once ctx has ended.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *contextReader) Read(b []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(b)
}

// restart empties the part. validator stands for the file that comes next; "" if that is not known or cannot be resumed.
func (t *transfer) restart(validator string) error {
	// In this order: a validator must never lie beside the bytes of another file.
	if err := t.out.Truncate(0); err != nil {
		return err
	}
	if _, err := t.out.Seek(0, io.SeekStart); err != nil {
		return err
	}
	t.done, t.validator = 0, validator
	t.sums.reset()
	return state.WriteFile(validatorFile(t.part), []byte(validator), 0o600)
}

// finish checks the digest and gives the file its name.
func (t *transfer) finish() error {
	if got := t.sums.vouched(); t.want != "" && got != t.want {
		t.remove()
		return &MismatchError{What: redacted(t.url), Want: string(t.want), Got: string(got), Encoding: t.encoding}
	}
	if err := t.out.Sync(); err != nil {
		t.remove()
		return err
	}
	if err := os.Rename(t.part, t.dst); err != nil {
		return err
	}
	t.remove() // only the validator is left
	return nil
}

// leave keeps what a later download can resume, removes anything else, and says which.
func (t *transfer) leave() string {
	if t.done == 0 || t.validator == "" {
		t.remove()
		return "nothing was kept"
	}
	return fmt.Sprintf("the first %s are kept, and the next download resumes there", bytesText(t.done))
}

// remove deletes the part and its validator; either may be missing.
func (t *transfer) remove() {
	os.Remove(t.part)
	os.Remove(validatorFile(t.part))
}

// answer is what the headers of an answer say about its body; -1 for what they do not say.
type answer struct {
	end   int64 // where in the file the body ends
	whole int64 // the file's length
}

// rest checks the headers of a 206 answer to a request for the rest of the file. It takes nothing but that.
func (t *transfer) rest(resp *http.Response) (answer, error) {
	header := resp.Header.Get("Content-Range")
	r, ok := parseContentRange(header)
	if !ok || r.first != t.done {
		return answer{}, fmt.Errorf("%w: asked for everything from byte %d, got %.80q", errChanged, t.done, header)
	}
	if n := resp.ContentLength; n >= 0 && n != r.last-r.first+1 {
		return answer{}, fmt.Errorf("%w: got %.80q, but Content-Length: %d", errChanged, header, n)
	}
	if r.whole < 0 && t.want == "" {
		return answer{}, fmt.Errorf("%w: got %.80q, which does not say where the file ends", errChanged, header)
	}
	// Not every server and cache knows If-Range: without it they send the rest of another file. Those that know it may leave
	// Last-Modified out of their answer (RFC 9110, 15.3.7).
	if v := validatorOf(resp); v != "" && v != t.validator {
		return answer{}, fmt.Errorf("%w: it was %s and is now %s", errChanged, visible.Text(t.validator), visible.Text(v))
	}
	return answer{r.last + 1, r.whole}, nil
}

// contentRange is the value of a Content-Range header (RFC 9110, 14.4): "bytes 100-199/200".
type contentRange struct{ first, last, whole int64 } // whole is -1 for "*"

func parseContentRange(v string) (contentRange, bool) {
	span, ok := strings.CutPrefix(v, "bytes ")
	span, whole, ok2 := strings.Cut(span, "/")
	first, last, ok3 := strings.Cut(span, "-")
	var r contentRange
	var err1, err2, err3 error
	r.first, err1 = strconv.ParseInt(first, 10, 64)
	r.last, err2 = strconv.ParseInt(last, 10, 64)
	if r.whole = -1; whole != "*" {
		r.whole, err3 = strconv.ParseInt(whole, 10, 64)
	}
	ok = ok && ok2 && ok3 && errors.Join(err1, err2, err3) == nil
	return r, ok && r.first >= 0 && r.last >= r.first && (whole == "*" || r.last < r.whole)
}

// copy appends a body to the part, and counts, hashes and limits it. end is where in the file the body ends, or -1.
func (t *transfer) copy(p *patience, body io.Reader, end int64) error {
	if end > t.max {
		return &tooLargeError{redacted(t.url), t.max}
	}
	checked := t.done
	if err := t.room(end); err != nil {
		return err
	}
	buf := make([]byte, 256<<10)
	for {
		n, err := p.read(body, buf)
		if n > 0 {
			if err := t.take(buf[:n], end); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if end < 0 && t.done-checked > reserve/8 {
			checked = t.done
			if err := t.room(end); err != nil {
				return err
			}
		}
	}
}

func (t *transfer) take(b []byte, end int64) error {
	t.received += int64(len(b))
	switch after := t.done + int64(len(b)); {
	case after > t.max:
		return &tooLargeError{redacted(t.url), t.max}
	case end >= 0 && after > end:
		return fmt.Errorf("%w: it sent more than the %d bytes that it announced", errChanged, end)
	}
	if _, err := t.out.Write(b); err != nil {
		return err
	}
	t.done += int64(len(b))
	t.most = max(t.most, t.done)
	if _, err := t.sums.Write(b); err != nil {
		return err
	}
	if t.progress != nil {
		t.progress(t.done, max(end, 0))
	}
	return nil
}

// room checks in advance that the rest of the file fits on the disk: a full disk affects everything else on the host. For a file of
// unknown length it leaves some space free.
func (t *transfer) room(end int64) error {
	need := end - t.done
	if end < 0 {
		need = reserve
	}
	dir := filepath.Dir(t.dst)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("free space of %s: %w", dir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < need {
		return fmt.Errorf("%w: %s has %s free, but the download needs %s more", unix.ENOSPC, dir, bytesText(free), bytesText(need))
	}
	return nil
}

func validatorFile(part string) string { return part + ".validator" }

// readValidator returns "" if there is none that fleetingd wrote.
func readValidator(part string) string {
	b, err := os.ReadFile(validatorFile(part))
	if err != nil || len(b) > maxValidator {
		return ""
	}
	return string(b)
}

// maxValidator is the length of the longest validator that is used, in bytes.
const maxValidator = 1024

func validatorOf(resp *http.Response) string {
	v := resp.Header.Get("ETag")
	if v == "" || strings.HasPrefix(v, "W/") {
		v = resp.Header.Get("Last-Modified")
	}
	if len(v) > maxValidator {
		v = ""
	}
	return v
}

// fileSize returns 0 if there is no such file.
func fileSize(path string) int64 {
	fi, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return fi.Size()
}
