package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
)

// notes are what NetworkUp must remember: the state before it, and what it applied last.
type notes struct {
	Boot      string       `json:"boot"` // the kernel's boot id: the network of another boot is gone
	Sysctls   []noted      `json:"sysctls,omitempty"`
	Addresses []netip.Addr `json:"addresses,omitempty"` // of ours on lo
	Applied   *applied     `json:"applied,omitempty"`
	Trial     bool         `json:"trial,omitempty"` // it was made for a while: see Options.Trial
}

// noted is a sysctl's earlier value.
type noted struct {
	Path  string `json:"path"` // below /proc/sys
	Value string `json:"value"`
}

// applied is as much of a plan as it takes to have its network again.
type applied struct {
	EgressInterface string       `json:"egress_interface"`
	Network         plan.Network `json:"network"`
	Slots           []plan.Slot  `json:"slots"`
}

// maxNotes bounds the notes' size in bytes: those of 65,536 slots are a fifth of it.
const maxNotes = 64 << 20

// notesDir lies beside Paths.Run, not in it: the runtime user owns Paths.Run, and must not be able to tell root which settings to
// write.
func notesDir(p *plan.Plan) string { return p.Paths.Run + "-network" }

func notesPath(p *plan.Plan) string { return filepath.Join(notesDir(p), "network.json") }

// notedSetting matches the settings that notes may hold; we write no others.
var notedSetting = regexp.MustCompile(`^net/ipv[46]/(ip_forward|conf/[^/]{1,15}/forwarding)$`)

// readNotes returns empty notes if there are none, or only those of another boot.
func readNotes(p *plan.Plan) (*notes, error) {
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	fresh := &notes{Boot: boot}
	f, err := os.OpenFile(notesPath(p), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return fresh, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	if int(st.Uid) != os.Geteuid() {
		return nil, fmt.Errorf("%s belongs to uid %d, not to us; remove it", f.Name(), st.Uid)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxNotes))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	var n notes
	if err := json.Unmarshal(b, &n); err != nil {
		return nil, fmt.Errorf("%s is damaged (remove it; settings it noted stay as they are): %w", f.Name(), err)
	}
	for _, s := range n.Sysctls {
		if !notedSetting.MatchString(s.Path) || (s.Value != "0" && s.Value != "1") {
			return nil, fmt.Errorf("%s was not written by fleetingd (it contains %q = %q); remove it", f.Name(), s.Path, s.Value)
		}
	}
	if n.Boot != boot {
		return fresh, nil
	}
	return &n, nil
}

// writeNotes keeps the notes, or removes the file if there is nothing to remember.
func writeNotes(p *plan.Plan, n *notes) error {
	if len(n.Sysctls) == 0 && len(n.Addresses) == 0 && n.Applied == nil {
		if err := os.Remove(notesPath(p)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	b, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("network notes: %w", err)
	}
	return state.WriteFile(notesPath(p), b, 0o600)
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}
