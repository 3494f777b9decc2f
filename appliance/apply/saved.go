package apply

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/fleetingd/fleetingd/appliance/plan"
	"github.com/fleetingd/fleetingd/appliance/state"
)

// savedVersion is the format of a saved change.
const savedVersion = 1

// saved is a change as `plan -o FILE` keeps it: the plan, and for which state of which host it was made. It holds no secret.
type saved struct {
	Version int             `json:"fleetingd_saved_plan"`
	Spec    string          `json:"spec"`
	Have    string          `json:"have"` // digest of the states of all objects of the change
	Plan    json.RawMessage `json:"plan"`
}

// Save writes a change to a file that only its owner reads: its prebuild steps may hold text that is not for everybody.
func (c *Change) Save(path, spec string) error {
	text, err := c.Plan.JSON()
	if err != nil {
		return err
	}
	have, err := c.HaveDigest()
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(saved{savedVersion, spec, have, text}, "", " ")
	if err != nil {
		return err
	}
	return state.WriteFile(path, append(b, '\n'), 0o600)
}

// Saved is what ReadSaved found.
type Saved struct {
	Plan *plan.Plan
	Spec string
	have string
}

// ErrNotSaved is the answer for a file that is no saved change: a spec, most likely.
var ErrNotSaved = errors.New("not a saved plan")

// ReadSaved reads a file that Save wrote.
func ReadSaved(path string) (*Saved, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > plan.MaxSize+1<<20 {
		return nil, ErrNotSaved
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return parseSaved(b)
}

func parseSaved(b []byte) (*Saved, error) {
	var s saved
	if err := json.Unmarshal(b, &s); err != nil || s.Version == 0 {
		return nil, ErrNotSaved
	}
	if s.Version != savedVersion {
		return nil, fmt.Errorf("the saved plan has format version %d, and this fleetingd reads version %d: make it again", s.Version, savedVersion)
	}
	p, err := plan.Parse(s.Plan)
	if err != nil {
		return nil, err
	}
	return &Saved{p, s.Spec, s.Have}, nil
}

// Moved returns an error if the host is no longer what the saved change was made for.
func (s *Saved) Moved(c *Change) error {
	have, err := c.HaveDigest()
	if err != nil {
		return err
	}
	if have != s.have {
		return errors.New("the host changed since the plan was saved; nothing was changed: make the plan again")
	}
	return nil
}
