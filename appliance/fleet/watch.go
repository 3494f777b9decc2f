package fleet

import (
	"encoding/json"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// watchInterval is how often the front checks whether the plan or the binary has changed. Tests shorten it.
var watchInterval = 2 * time.Second

// fileStamp identifies the content of a file, provided that writers rename or touch the file.
type fileStamp struct {
	dev, ino uint64
	size     int64
	mtime    time.Time
}

func stampOf(path string) fileStamp {
	fi, err := os.Stat(path)
	if err != nil {
		return fileStamp{}
	}
	s := fileStamp{size: fi.Size(), mtime: fi.ModTime()}
	if sys, ok := fi.Sys().(*syscall.Stat_t); ok {
		s.dev, s.ino = uint64(sys.Dev), sys.Ino
	}
	return s
}

// watcher notices changes of the plan and the binary. A change counts once two looks in a row see the same file: it may be written in
// steps.
type watcher struct {
	paths    map[string]string // by "plan" or "binary"
	accepted map[string]fileStamp
	last     map[string]fileStamp
}

// newWatcher watches the plan, unless plan is "", and this program under the name that it was called by.
func newWatcher(plan string) *watcher {
	w := &watcher{paths: map[string]string{}}
	if plan != "" {
		w.paths["plan"] = plan
	}
	if self, err := exec.LookPath(os.Args[0]); err == nil {
		w.paths["binary"] = self
	}
	w.accept(w.look())
	return w
}

// accept records a look as the state in use.
func (w *watcher) accept(seen map[string]fileStamp) { w.accepted, w.last = seen, seen }

func (w *watcher) look() map[string]fileStamp {
	now := make(map[string]fileStamp, len(w.paths))
	for what, path := range w.paths {
		now[what] = stampOf(path)
	}
	return now
}

// changed returns "binary" or "plan" if that differs from the accepted state and has not changed since the last look, or "". A missing
// file is not a change: it is being replaced. seen is the look to accept.
func (w *watcher) changed() (what string, seen map[string]fileStamp) {
	now := w.look()
	defer func() { w.last = now }()
	for _, what := range []string{"binary", "plan"} {
		s := now[what]
		if s != (fileStamp{}) && s != w.accepted[what] && s == w.last[what] {
			return what, now
		}
	}
	return "", now
}

// planPath returns the plan that a plugin_config names, or "" if it has the predecessor's keys.
func planPath(config []byte) string {
	var c struct {
		Plan string `json:"plan"`
	}
	if json.Unmarshal(config, &c) != nil {
		return ""
	}
	return c.Plan
}
