package plan

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"strconv"
)

// Path is where the Plan lies on its host. It is not one of the Plan's own Files.
const Path = "/etc/fleetingd/plan.json"

// TreeFile is one file of a host's tree.
type TreeFile struct {
	Path string // absolute on the host
	Mode os.FileMode
	Data []byte
}

// Tree returns the host's files: those of the Plan, the Plan itself and, for inspection, below State/seeds the seeds of its prebuilds
// and of each pool's first worker (with a key that has no private half). If read is not nil, it resolves the secrets, and files that hold
// one get mode 0600; otherwise the placeholders stay.
func (p *Plan) Tree(read func(from string) (string, error)) ([]TreeFile, error) {
	own, err := p.JSON()
	if err != nil {
		return nil, err
	}
	// Prebuild steps may hold text that is not for everybody on the host.
	tree := []TreeFile{{Path: Path, Mode: 0o640, Data: own}}
	for i := range p.Files {
		f := &p.Files[i]
		mode, err := strconv.ParseUint(f.Mode, 8, 12)
		if err != nil {
			return nil, fmt.Errorf("%s: mode %q: %w", f.Path, f.Mode, err)
		}
		t := TreeFile{Path: f.Path, Mode: os.FileMode(mode), Data: []byte(f.Content)}
		if read != nil && len(f.Secrets) > 0 {
			filled, err := f.Fill(read)
			if err != nil {
				return nil, err
			}
			t.Data, t.Mode = []byte(filled), 0o600
		}
		tree = append(tree, t)
	}
	seeds, err := p.seeds()
	return append(tree, seeds...), err
}

// sampleKey is a key in form only: its 32 bytes are zero, and it has no private key.
const sampleKey = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA sample"

func (p *Plan) seeds() ([]TreeFile, error) {
	var tree []TreeFile
	add := func(name string, write func(*bytes.Buffer) error) error {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		tree = append(tree, TreeFile{Path: path.Join(p.Paths.State, "seeds", name), Mode: 0o644, Data: b.Bytes()})
		return nil
	}
	for i := range p.Images {
		pre := p.Images[i].Prebuild
		if pre == nil {
			continue
		}
		err := add("prebuild-"+p.Images[i].Name+".iso", func(b *bytes.Buffer) error { return pre.Seed.WriteISO(b) })
		if err != nil {
			return nil, err
		}
	}
	for i := range p.Pools {
		pool := &p.Pools[i]
		s := p.WorkerSeed(pool, p.Slots[pool.FirstSlot], pool.Name+"-sample", sampleKey)
		err := add("worker-"+pool.Name+".iso", func(b *bytes.Buffer) error { return s.WriteISO(b) })
		if err != nil {
			return nil, err
		}
	}
	return tree, nil
}
