package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
)

// qmpLine limits the size of one QMP message. The longest expected one is the
// greeting, with a few hundred bytes.
const qmpLine = 1 << 20

// qmpMessage is any message of the QEMU machine protocol
// (https://www.qemu.org/docs/master/interop/qmp-spec.html). The field that is set tells which kind it is.
type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	ID       uint64          `json:"id"`
	Return   json.RawMessage `json:"return"`
	Error    *qmpError       `json:"error"`
	Event    string          `json:"event"`
	Data     json.RawMessage `json:"data"`
}

type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

// qmpEventData is the used part of the data of SHUTDOWN, RESET and BLOCK_IO_ERROR.
type qmpEventData struct {
	Guest  bool   `json:"guest"`
	Reason string `json:"reason"`
	Device string `json:"node-name"`
}

func parseQMP(line []byte) (qmpMessage, error) {
	var m qmpMessage
	if err := json.Unmarshal(line, &m); err != nil {
		return qmpMessage{}, fmt.Errorf("QMP: %w", err)
	}
	if m.Greeting == nil && m.Return == nil && m.Error == nil && m.Event == "" {
		return qmpMessage{}, errors.New("QMP: a message that is not a greeting, an answer or an event")
	}
	return m, nil
}

// qmp is a client of one QEMU.
type qmp struct {
	conn    net.Conn
	onEvent func(name string, data qmpEventData) // on the reader's goroutine
	done    chan struct{}                        // closed when the connection has ended

	mu      sync.Mutex
	nextID  uint64
	waiting map[uint64]chan qmpMessage
	err     error // the reason why the connection ended
}

// newQMP takes over a new connection, and returns once QEMU answers commands on it.
func newQMP(ctx context.Context, conn net.Conn, onEvent func(string, qmpEventData)) (*qmp, error) {
	q := &qmp{conn: conn, onEvent: onEvent, done: make(chan struct{}), nextID: 1, waiting: map[uint64]chan qmpMessage{}}
	go q.read()
	// QEMU reads this after it has sent the greeting, so there is no need to wait for that.
	if err := q.execute(ctx, "qmp_capabilities", nil); err != nil {
		q.close()
		return nil, err
	}
	return q, nil
}

func (q *qmp) read() {
	lines := bufio.NewScanner(q.conn)
	lines.Buffer(nil, qmpLine)
	err := errors.New("QEMU closed its QMP socket")
	for lines.Scan() {
		if err = q.handle(lines.Bytes()); err != nil {
			break
		}
		err = errors.New("QEMU closed its QMP socket")
	}
	if lines.Err() != nil {
		err = fmt.Errorf("QMP: %w", lines.Err())
	}
	q.conn.Close()
	q.mu.Lock()
	q.err = err
	q.mu.Unlock()
	close(q.done)
}

func (q *qmp) handle(line []byte) error {
	m, err := parseQMP(line)
	switch {
	case err != nil:
		return err
	case m.Greeting != nil:
	case m.Event != "":
		var data qmpEventData
		// The data of an unknown event may have any form.
		_ = json.Unmarshal(m.Data, &data)
		q.onEvent(m.Event, data)
	default:
		q.mu.Lock()
		answer := q.waiting[m.ID]
		delete(q.waiting, m.ID)
		q.mu.Unlock()
		if answer != nil {
			answer <- m // buffered, and used only once
		}
	}
	return nil
}

// execute runs one command; result may be nil.
func (q *qmp) execute(ctx context.Context, command string, result any) error {
	answer := make(chan qmpMessage, 1)
	q.mu.Lock()
	id := q.nextID
	q.nextID++
	q.waiting[id] = answer
	q.mu.Unlock()
	defer func() {
		q.mu.Lock()
		delete(q.waiting, id)
		q.mu.Unlock()
	}()
	line, err := json.Marshal(map[string]any{"execute": command, "id": id})
	if err != nil {
		return err
	}
	deadline, _ := ctx.Deadline() // the zero time means no deadline here, too
	if err := q.conn.SetWriteDeadline(deadline); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	if _, err := q.conn.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case m := <-answer:
		if m.Error != nil {
			return fmt.Errorf("QMP %s: %s: %s", command, m.Error.Class, m.Error.Desc)
		}
		if result == nil {
			return nil
		}
		if err := json.Unmarshal(m.Return, result); err != nil {
			return fmt.Errorf("QMP %s: %w", command, err)
		}
		return nil
	case <-q.done:
		q.mu.Lock()
		defer q.mu.Unlock()
		return fmt.Errorf("QMP %s: %w", command, q.err)
	case <-ctx.Done():
		return fmt.Errorf("QMP %s: no answer: %w", command, ctx.Err())
	}
}

// close closes the connection and waits for its reader.
func (q *qmp) close() {
	q.conn.Close()
	<-q.done
}
