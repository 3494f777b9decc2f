package fleet

import (
	"encoding/json"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// watchInterval is how often the front looks whether plan or binary changed. Tests look more often.
var watchInterval = 2 * time.Second

// fileStamp tells one content of a file from the next, as long as writers rename or touch it.
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

// watcher notices another plan or another binary. A change counts once it has stood for one look: a file may be written in steps.
type watcher struct {
	paths    map[string]string // what it is: path
	accepted map[string]fileStamp
	last     map[string]fileStamp
}

// newWatcher watches the plan, which may be "", and the program that we were called by.
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

// accept takes what a look has seen for what is in use.
func (w *watcher) accept(seen map[string]fileStamp) { w.accepted, w.last = seen, seen }

func (w *watcher) look() map[string]fileStamp {
	now := make(map[string]fileStamp, len(w.paths))
	for what, path := range w.paths {
		now[what] = stampOf(path)
	}
	return now
}

// changed names what is another than was accepted, and the same as at the last look; "" for nothing. A file that is gone is no change:
// the next one is on its way. seen is for accept: what changes after it is another change.
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

// planPath is the plan that a plugin_config names, "" where it has the predecessor's keys.
func planPath(config []byte) string {
	var c struct {
		Plan string `json:"plan"`
	}
	if json.Unmarshal(config, &c) != nil {
		return ""
	}
	return c.Plan
}
