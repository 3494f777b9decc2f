package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/guest"
	"github.com/fleetingd/fleetingd/appliance/vm"
)

// fakeDriver runs no VM: it checks the configuration of one, and plays a guest that behaves as the test wants. The real guest part would
// change the machine that it runs on; TestDebianVM has it in a real VM.
type fakeDriver struct {
	t        *testing.T
	startErr error
	silent   bool   // the guest never answers
	dies     bool   // the VMM is killed in the first step
	failStep string // a step with this command exits with 7
	badSeal  string // the answer to seal
	noExport bool
	noOff    bool     // it does not power off
	canary   string   // may be on no disk of the VM
	files    []string // contents that came by the channel

	mu      sync.Mutex
	started []vm.Config
	running int
	left    vm.VM // what Adopt finds
	adopted int
}

func (d *fakeDriver) Name() string                           { return "fake" }
func (d *fakeDriver) Probe(context.Context) (vm.Info, error) { return vm.Info{}, nil }

func (d *fakeDriver) Adopt(context.Context, string) (vm.VM, error) {
	d.adopted++
	if d.left == nil {
		return nil, vm.ErrNotRunning
	}
	return d.left, nil
}

func (d *fakeDriver) Start(_ context.Context, cfg vm.Config) (vm.VM, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.started = append(d.started, cfg)
	if d.startErr != nil {
		return nil, d.startErr
	}
	d.checkConfig(cfg)
	d.running++
	v := &fakeVM{driver: d, cfg: cfg, done: make(chan struct{})}
	return v, os.WriteFile(cfg.Console, []byte("booting\x1b[2J\r\nlast words\n"), 0o600)
}

func (d *fakeDriver) checkConfig(cfg vm.Config) {
	for _, disk := range cfg.Disks {
		if b, err := os.ReadFile(disk.Path); err != nil {
			d.t.Errorf("a disk of the VM: %v", err)
		} else if d.canary != "" && bytes.Contains(b, []byte(d.canary)) {
			d.t.Errorf("a secret is on the VM's disk %s", disk.Path)
		}
	}
	if entries, err := os.ReadDir(cfg.Dir); err != nil || len(entries) > 0 || len(cfg.Dir) > 80 {
		d.t.Errorf("the VM's folder %s must exist, be empty and have a path of at most 80 bytes: %v, %v", cfg.Dir, entries, err)
	}
	if len(cfg.Disks) != 3 || !cfg.Disks[1].ReadOnly || cfg.Disks[2].Serial != guest.ExportSerial {
		d.t.Errorf("the VM's disks are %+v", cfg.Disks)
	}
}

type fakeVM struct {
	driver *fakeDriver
	cfg    vm.Config
	once   sync.Once
	done   chan struct{}
	exit   error
}

func (v *fakeVM) PID() int              { return 4711 }
func (v *fakeVM) Done() <-chan struct{} { return v.done }

func (v *fakeVM) Exit() error {
	select {
	case <-v.done:
		return v.exit
	default:
		return nil
	}
}

func (v *fakeVM) end(err error) {
	v.once.Do(func() {
		v.driver.mu.Lock()
		v.driver.running--
		v.driver.mu.Unlock()
		v.exit = err
		close(v.done)
	})
}

func (v *fakeVM) Stop(context.Context) error { v.end(vm.ErrPoweredOff); return nil }
func (v *fakeVM) Kill() error                { v.end(errors.New("signal: killed")); return nil }

func (v *fakeVM) Channel(ctx context.Context) (net.Conn, error) {
	select {
	case <-v.done:
		return nil, errors.New("the VM is gone")
	default:
	}
	host, inside := net.Pipe()
	if v.driver.silent {
		go io.Copy(io.Discard, inside)
	} else {
		go v.talk(inside)
	}
	return host, nil
}

// line is a message in package guest's protocol.
type line struct {
	Type    string `json:"type"`
	Session string `json:"session,omitempty"`
	V       int    `json:"v,omitempty"`
	Seq     uint64 `json:"seq,omitempty"`
	ID      uint64 `json:"id,omitempty"`
	Data    []byte `json:"data,omitempty"`
	Boot    string `json:"boot,omitempty"`
	Mode    string `json:"mode,omitempty"`
	Version string `json:"version,omitempty"`
	Cmd     uint64 `json:"cmd,omitempty"`
	Line    string `json:"line,omitempty"`
	Code    int    `json:"code,omitempty"`
	Error   string `json:"error,omitempty"`
	Bytes   int64  `json:"bytes,omitempty"`
}

func (v *fakeVM) talk(c net.Conn) {
	defer c.Close()
	d := v.driver
	out := json.NewEncoder(c)
	seq, step := uint64(0), []byte(nil)
	say := func(m line) { seq++; m.Seq = seq; out.Encode(m) }
	in := bufio.NewScanner(c)
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		var m line
		if json.Unmarshal(in.Bytes(), &m) != nil {
			continue
		}
		switch m.Type {
		case "hello":
			out.Encode(line{Type: "hello", V: 1, Session: m.Session, Boot: "b", Mode: "prebuild", Version: "test"})
		case "data":
			step = append(step, m.Data...)
		case "run":
			if d.dies {
				v.end(errors.New("signal: killed"))
				return
			}
			var s guest.Step
			if err := json.Unmarshal(step, &s); err != nil {
				d.t.Errorf("step: %v", err)
			}
			step = nil
			if s.File != nil {
				d.files = append(d.files, s.File.Content)
				s.Command = s.File.Content // it says too much
			}
			for text := range strings.Lines(s.Command) {
				say(line{Type: "output", Session: m.Session, ID: m.ID, Line: "did " + text})
			}
			code := 0
			if d.failStep != "" && s.Command == d.failStep {
				code = 7
			}
			say(line{Type: "done", Session: m.Session, ID: m.ID, Code: code})
		case "seal":
			done := line{Type: "done", Session: m.Session, ID: m.ID, Error: d.badSeal}
			if d.badSeal != "" {
				done.Code = 1
			} else if !d.noExport {
				done.Bytes = v.export()
			}
			say(done)
		case "poweroff":
			if !d.noOff {
				v.end(vm.ErrPoweredOff)
			}
			return
		}
	}
}

// export writes what a guest writes to the export disk.
func (v *fakeVM) export() int64 {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, text := range map[string]string{guest.ExportKernel: "new kernel", guest.ExportInitrd: "new initrd"} {
		w.WriteHeader(&tar.Header{Name: name, Size: int64(len(text)), Mode: 0o644, Typeflag: tar.TypeReg})
		io.WriteString(w, text)
	}
	w.Close()
	f, err := os.OpenFile(v.cfg.Disks[2].Path, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.Write(b.Bytes())
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		v.driver.t.Error(err)
	}
	return int64(b.Len())
}

// wantNothingLeft checks that a failed build left no VM, no draft and no run folder.
func (d *fakeDriver) wantNothingLeft(s *Store) {
	d.t.Helper()
	if d.running != 0 {
		d.t.Errorf("%d VMs still run", d.running)
	}
	for _, kind := range []string{kindBase, kindSealed} {
		entries, err := os.ReadDir(filepath.Join(s.plan.Paths.Images, kind))
		if err != nil {
			d.t.Error(err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), building) {
				d.t.Errorf("a draft is left: %s", e.Name())
			}
		}
	}
	if entries, err := os.ReadDir(s.plan.Paths.Run); err == nil && len(entries) > 0 {
		d.t.Errorf("the run folder holds %v", entries)
	}
	wantOnly(d.t, filepath.Join(s.plan.Paths.Images, kindSealed))
}
