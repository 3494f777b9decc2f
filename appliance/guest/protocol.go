package guest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// The protocol is one JSON object per line, in both directions, over a byte stream
// that may break anywhere and may carry leftovers from an earlier boot or
// another host process (a virtio-serial port is one endless stream for the
// guest's whole life). So each side skips anything that is not a message, up to the next newline, and the host
// names its session: messages with another session's name are ignored.
//
// From the host:
//
//	hello     {v, session, have}  I am here. `have` is the last `seq` of this session that I saw: repeat what came after it.
//	data      {session, id, data} a part of command id's step, base64; the parts of one id are joined in order.
//	run       {session, id}       run the step whose JSON is in the data lines of id.
//	seal      {session, id}       make the image ready to be cloned and write the export.
//	poweroff  {session}           after seal: the host has everything it needs.
//
// From the guest:
//
//	hello     {v, session, boot, mode, version, cmd}  the answer to a hello, or, without session, "I have opened the
//	                              port, say hello". `cmd` is the last command id received in full.
//	beat      {session, seq}      I am working. At least every 10 s while there is work, never otherwise.
//	output    {session, seq, id, line}  a line of command id's output.
//	done      {session, seq, id, code, error}  command id ended. seal adds {bytes, kernel}.
//	ready     {session, seq, hostname, took_ms}  the worker has its identity and its sshd answers.
//	failed    {session, seq, error}  the worker will never be ready.
//
// Within one version, fields and types may be added; both sides skip those they do not know.
const protocolVersion = 1

// Limits of the protocol. A line outside them is not a message.
const (
	maxLine    = 64 << 10 // bytes of a line with its newline
	maxText    = 8 << 10  // bytes of one line of output, or of an error
	maxName    = 128      // bytes of an id, a version
	chunkBytes = 32 << 10 // of a step, in one data line
	maxStep    = 16 << 20 // bytes of a step's JSON
)

const (
	typeHello    = "hello"
	typeData     = "data"
	typeRun      = "run"
	typeSeal     = "seal"
	typePoweroff = "poweroff"
	typeBeat     = "beat"
	typeOutput   = "output"
	typeDone     = "done"
	typeReady    = "ready"
	typeFailed   = "failed"
)

// The guest part's modes, as in its hello.
const (
	modePrebuild = "prebuild"
	modeWorker   = "worker"
)

// message is any message of either side; Type determines which fields are used.
type message struct {
	Type    string `json:"type"`
	Session string `json:"session,omitempty"`
	V       int    `json:"v,omitempty"`
	Seq     uint64 `json:"seq,omitempty"`
	ID      uint64 `json:"id,omitempty"`

	Have uint64 `json:"have,omitempty"`
	Data []byte `json:"data,omitempty"`

	Boot     string `json:"boot,omitempty"`
	Mode     string `json:"mode,omitempty"`
	Version  string `json:"version,omitempty"`
	Cmd      uint64 `json:"cmd,omitempty"`
	Line     string `json:"line,omitempty"`
	Code     int    `json:"code,omitempty"`
	Error    string `json:"error,omitempty"`
	Hostname string `json:"hostname,omitempty"`
	TookMS   int64  `json:"took_ms,omitempty"`
	Bytes    int64  `json:"bytes,omitempty"`
	Kernel   string `json:"kernel,omitempty"`
}

// encode returns a message as a line, newline included.
func encode(m message) ([]byte, error) {
	b, err := json.Marshal(m)
	if err != nil {
		return nil, err
	}
	if len(b)+1 > maxLine {
		return nil, fmt.Errorf("a %s message of %d bytes is longer than the longest line (%d)", m.Type, len(b), maxLine)
	}
	return append(b, '\n'), nil
}

var errJunk = errors.New("not a message")

// decode parses one line. Accepted messages are within the limits above.
func decode(line []byte) (message, error) {
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, fmt.Errorf("%w: %w", errJunk, err)
	}
	for _, s := range []string{m.Type, m.Session, m.Boot, m.Mode, m.Version, m.Kernel} {
		if len(s) > maxName {
			return message{}, fmt.Errorf("%w: a name of %d bytes", errJunk, len(s))
		}
	}
	if len(m.Line) > maxText || len(m.Error) > maxText || len(m.Hostname) > 253 || len(m.Data) > chunkBytes {
		return message{}, fmt.Errorf("%w: a text is too long", errJunk)
	}
	if m.Type == "" || m.TookMS < 0 || m.Bytes < 0 {
		return message{}, fmt.Errorf("%w: no type, or a negative number", errJunk)
	}
	return m, nil
}

// lineReader reads lines of at most maxLine bytes from a stream.
type lineReader struct{ r *bufio.Reader }

func newLineReader(r io.Reader) *lineReader {
	return &lineReader{r: bufio.NewReaderSize(r, maxLine)}
}

// next returns the next line without its newline, valid until the next call. It skips a line
// that is too long and reports its length to skipped, which can stop the
// reading with an error. It drops a line that is cut off by the end of the stream.
func (l *lineReader) next(skipped func(n int) error) ([]byte, error) {
	for {
		line, err := l.r.ReadSlice('\n')
		switch {
		case err == nil:
			return line[:len(line)-1], nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
		for errors.Is(err, bufio.ErrBufferFull) {
			if serr := skipped(len(line)); serr != nil {
				return nil, serr
			}
			line, err = l.r.ReadSlice('\n')
		}
		if serr := skipped(len(line)); serr != nil {
			return nil, serr
		}
		if err != nil {
			return nil, err
		}
	}
}
