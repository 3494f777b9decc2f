package vm

import (
	"bufio"
	"encoding/json"
	"io"
)

// chEventBytes limits the size of one event; real ones have 100 to 200 bytes.
const chEventBytes = 16 << 10

// chEvent is one message of --event-monitor (event_monitor/src/lib.rs in Cloud Hypervisor's source).
type chEvent struct {
	Source string `json:"source"` // "vm", "vmm"
	Event  string `json:"event"`  // "booted", "rebooting", "shutdown", …
}

// readEvents calls each for every event until the stream ends. Events are JSON over several lines, followed by a blank
// line. Text that is too long or not JSON is skipped up to the next blank line: the VMM does not wait for the reader of
// the pipe, and drops the rest of an event when the pipe is full.
func readEvents(stream io.Reader, each func(chEvent)) {
	in := bufio.NewReaderSize(stream, 4096)
	var text []byte
	skip := false
	for {
		line, partial, err := in.ReadLine()
		if len(line) > 0 {
			skip = skip || len(text)+len(line) > chEventBytes
			if !skip {
				text = append(text, line...)
			}
		} else if err == nil && !partial { // a blank line completes the event
			if !skip {
				handleEvent(text, each)
			}
			text, skip = text[:0], false
		}
		if err != nil {
			return
		}
	}
}

func handleEvent(text []byte, each func(chEvent)) {
	var e chEvent
	if json.Unmarshal(text, &e) == nil && e.Event != "" {
		each(e)
	}
}
