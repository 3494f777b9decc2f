package host

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"

	"github.com/fleetingd/fleetingd/appliance/state"
)

// KindProgram is the kind of the door that Tree.Programs returns.
const KindProgram Kind = "program"

// Programs returns the door to programs that are single files elsewhere. A program's State has its "sha256" (hex), and "mode", "owner" and
// "group" as a file's. urls says where the program with a digest is. folder is the door's own, below the state folder: what was downloaded or
// replaced is kept there by its digest, so that a former program can be put back without a network.
func (t *Tree) Programs(folder string, urls map[string]string, fetch Fetch) Door {
	return programs{t, folder, urls, fetch}
}

type programs struct {
	*Tree
	folder string
	urls   map[string]string
	fetch  Fetch
}

func (d programs) Read(_ context.Context, names []string) (map[string]State, error) {
	return d.readAll(names, "program", d.read)
}

func (d programs) read(name string, ids *accounts, notes *treeNotes) (State, error) {
	data, fi, err := d.readFile(name)
	if err != nil || fi == nil {
		return nil, err
	}
	s := d.attributesOf(name, fi, ids, notes)
	s["sha256"] = digest(data)
	return s, nil
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func (d programs) Write(ctx context.Context, name string, want State) error {
	return named(KindProgram, name, d.write(ctx, name, want))
}

func (d programs) write(ctx context.Context, name string, want State) error {
	if err := onlyKeys(want, "sha256", "mode", "owner", "group"); err != nil {
		return err
	}
	present, fi, err := d.readFile(name)
	if err != nil {
		return err
	}
	have, err := d.readOne(name, d.read)
	if err != nil {
		return err
	}
	if maps.Equal(have, want) && want != nil {
		return d.replace(name, nil, want, true)
	}
	if fi != nil {
		if err := d.keep(present); err != nil {
			return err
		}
	}
	if want == nil {
		return d.removeFile(name)
	}
	data, err := d.kept(ctx, want["sha256"])
	if err != nil {
		return err
	}
	return d.replace(name, data, want, false)
}

// keep stores a program that is about to be replaced.
func (d programs) keep(data []byte) error {
	if err := os.MkdirAll(d.folder, 0o755); err != nil {
		return err
	}
	at := filepath.Join(d.folder, digest(data))
	if _, err := os.Stat(at); err == nil {
		return nil
	}
	return state.WriteFile(at, data, 0o644)
}

// kept is the program with a digest, from the folder or from its URL.
func (d programs) kept(ctx context.Context, want string) ([]byte, error) {
	if b, err := hex.DecodeString(want); err != nil || len(b) != sha256.Size {
		return nil, fmt.Errorf("%q is not a SHA-256 digest", want)
	}
	at := filepath.Join(d.folder, want)
	data, err := os.ReadFile(at)
	if err == nil && digest(data) == want {
		return data, nil
	}
	url, ok := d.urls[want]
	if !ok {
		return nil, errors.New("the program with the digest " + want + " is not kept here, and the plan names no URL for it")
	}
	if err := os.MkdirAll(d.folder, 0o755); err != nil {
		return nil, err
	}
	if err := d.fetch(ctx, url, want, at, maxFile); err != nil {
		return nil, err
	}
	if data, err = os.ReadFile(at); err == nil && digest(data) != want {
		err = fmt.Errorf("%s changed while it was read", at)
	}
	return data, err
}
