package host

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/BurntSushi/toml"

	"github.com/fleetingd/fleetingd/appliance/plan"
)

// KindSecretFile is the kind of the door that Tree.SecretFiles returns.
const KindSecretFile Kind = "secret-file"

// SecretFiles is the door to TOML files that hold secrets: GitLab Runner's config.toml. Their State is a file's, but its content never holds a
// secret: text that is as the plan wants it reads as the plan's text with its placeholders; a secret that fleetingd wrote and that the plan
// has changed since reads as FormerSecret, and any other text that might be one as OtherText.
//
// The content is compared by its meaning. Comments, the order of keys, and what GitLab Runner itself adds when it renews a token (id,
// token_obtained_at, token_expires_at, keys with their zero value) are no difference, and a renewed token is kept.
//
// The former file stays beside it, as a hard link, until Confirm, so that a Write of the former state restores every byte. The file that was
// there before fleetingd's first Write stays until its own state was written and confirmed.
type SecretFiles struct {
	tree  *Tree
	files map[string]*plan.File
	owned map[string]State
	read  func(from string) (string, error)
	notes string
}

// What a State shows in the place of text that may be a secret.
const (
	FormerSecret = "(former value)"
	OtherText    = "(differs)"
)

// SecretFiles returns the door to those of the files that hold secrets; read gives the value of a secret by its place. Without read, files can
// be looked at and restored, not written. owned are the states
// that the current generation wrote, by path. notes is the path in the tree of a file of the door's own.
func (t *Tree) SecretFiles(files []plan.File, owned map[string]State, read func(from string) (string, error), notes string) *SecretFiles {
	d := &SecretFiles{tree: t, files: map[string]*plan.File{}, owned: owned, read: read, notes: notes}
	for i := range files {
		if len(files[i].Secrets) > 0 && read != nil {
			d.files[files[i].Path] = &files[i]
		}
	}
	return d
}

// SameButSecrets reports whether a secret file is as its owner wrote it, if all that changed is the plan's secrets: then it is no drift.
func SameButSecrets(have, owned State) bool {
	if have == nil || owned == nil {
		return have == nil && owned == nil
	}
	had, now := maps.Clone(owned), maps.Clone(have)
	had["content"], now["content"] = withoutSecrets(had["content"]), withoutSecrets(now["content"])
	return maps.Equal(had, now)
}

// Read returns the states of the files.
func (d *SecretFiles) Read(_ context.Context, names []string) (map[string]State, error) {
	return d.tree.readAll(names, "secret file", d.readOne)
}

func (d *SecretFiles) readOne(name string, ids *accounts, notes *treeNotes) (State, error) {
	data, fi, err := d.tree.readFile(name)
	if err != nil || fi == nil {
		return nil, err
	}
	n, err := d.readNotes()
	if err != nil {
		return nil, err
	}
	s := d.tree.attributesOf(name, fi, ids, notes)
	s["content"], err = d.masked(name, data, n)
	return s, err
}

// masked is a file's content without secrets.
func (d *SecretFiles) masked(name string, data []byte, n *secretNotes) (string, error) {
	v, err := d.view(name, n)
	if err != nil {
		return "", err
	}
	have, err := decodeTOML(string(data))
	if err != nil {
		return unreadableTOML, nil
	}
	masked := v.table(have, v.want, v.owned)
	for _, known := range []struct {
		text  string
		table map[string]any
	}{{v.wantText, v.want}, {v.ownedText, v.owned}} {
		if known.table != nil && sameTOML(masked, known.table) {
			return known.text, nil
		}
	}
	return v.header + encodeTOML(masked), nil
}

// unreadableTOML is the content of a file that is not TOML: what in it is a secret, nobody can tell.
const unreadableTOML = "(this is not TOML; it is not shown because it may hold secrets)\n"

// Write makes the file what the plan says; any other state is that of the former file, or of the original one.
func (d *SecretFiles) Write(_ context.Context, name string, want State) error {
	if err := d.write(name, want); err != nil {
		return fmt.Errorf("secret file %s: %w", name, err)
	}
	return nil
}

// Undo is Write of a former state after a crash: a file that was not written since the last Confirm is left alone, whatever is in it.
func (d *SecretFiles) Undo(ctx context.Context, name string, before State) error {
	n, err := d.readNotes()
	if err != nil {
		return named(KindSecretFile, name, err)
	}
	if before != nil && !n.file(name).Pending {
		return nil
	}
	return d.Write(ctx, name, before)
}

func (d *SecretFiles) write(name string, want State) error {
	n, err := d.readNotes()
	if err != nil {
		return err
	}
	f := d.files[name]
	switch {
	case want == nil:
		return d.remove(name, n)
	case f != nil && want["content"] == f.Content:
		return d.fill(f, want, n)
	default:
		return d.restore(name, want, n)
	}
}

func (d *SecretFiles) remove(name string, n *secretNotes) error {
	if err := d.keepFormer(name, n); err != nil {
		return err
	}
	if err := d.tree.removeFile(name); err != nil || !n.file(name).Absent {
		return err
	}
	delete(n.Files, name) // as it was before
	return d.writeNotes(n)
}

// fill writes the plan's content with its secrets.
func (d *SecretFiles) fill(f *plan.File, want State, n *secretNotes) error {
	text, err := f.Fill(d.read)
	if err != nil {
		return err
	}
	v, err := d.view(f.Path, n)
	if err != nil {
		return err
	}
	data, fi, err := d.tree.readFile(f.Path)
	if err != nil {
		return err
	}
	if have, err := decodeTOML(string(data)); fi != nil && err == nil {
		if text, err = v.keepRunners(text, have); err != nil {
			return err
		}
	}
	have, err := d.tree.readOne(f.Path, d.readOne)
	if err != nil {
		return err
	}
	same := maps.Equal(have, want)
	if !same {
		if err := d.keepFormer(f.Path, n); err != nil {
			return err
		}
	}
	if err := d.tree.replace(f.Path, []byte(text), want, same); err != nil {
		return err
	}
	n.file(f.Path).Written = v.sums()
	return d.writeNotes(n)
}

// formerOf and originalOf are the names of the files that are kept beside one.
func formerOf(name string) string   { return besideOf(name, "former") }
func originalOf(name string) string { return besideOf(name, "original") }

func besideOf(name, what string) string {
	return filepath.Join(filepath.Dir(name), "."+filepath.Base(name)+".fleetingd-"+what)
}

// keepFormer keeps the present file for restore, once between two Confirms. A file that fleetingd did not write is kept as the original, too.
func (d *SecretFiles) keepFormer(name string, n *secretNotes) error {
	note := n.file(name)
	if note.Pending {
		return nil
	}
	at, err := d.tree.openAbove(name, trust{})
	if errors.Is(err, fs.ErrNotExist) {
		note.Pending, note.Absent = true, true
		return d.writeNotes(n)
	}
	if err != nil {
		return err
	}
	defer at.Close()
	fi, err := at.regular(filepath.Base(name))
	if err != nil {
		return err
	}
	if fi != nil {
		kept := []string{formerOf(name)}
		if note.Written == nil {
			kept = append(kept, originalOf(name))
		}
		for _, k := range kept {
			if err := gone(at.Remove(filepath.Base(k))); err != nil {
				return err
			}
			if err := at.Link(filepath.Base(name), filepath.Base(k)); err != nil {
				return err
			}
		}
		if err := at.flush(); err != nil {
			return err
		}
	}
	// Links first: without the note they are made again, and with it they are there.
	note.Pending, note.Absent = true, fi == nil
	return d.writeNotes(n)
}

// restore puts the former file back, or the original one where nothing is pending.
func (d *SecretFiles) restore(name string, want State, n *secretNotes) error {
	note := n.file(name)
	switch {
	case note.Pending && note.Absent:
		return errors.New("there was no file before, so its former state cannot be restored")
	case note.Pending:
		if err := d.renameBeside(name, formerOf(name)); err != nil {
			return err
		}
		if err := d.dropOriginalIfBack(name, n); err != nil {
			return err
		}
		note.Pending = false
		if note.Written == nil {
			delete(n.Files, name)
		}
		return d.writeNotes(n)
	}
	if have, err := d.tree.readOne(name, d.readOne); err != nil || maps.Equal(have, want) {
		return err
	}
	if _, fi, err := d.tree.readFile(originalOf(name)); err != nil || fi == nil {
		return errors.Join(errors.New("neither the plan nor a kept file has this content: the apply that replaced it was confirmed"), err)
	}
	if err := d.keepFormer(name, n); err != nil {
		return err
	}
	at, err := d.tree.openAbove(name, trust{})
	if err != nil {
		return err
	}
	defer at.Close()
	part := partOf(filepath.Base(name))
	err = gone(at.Remove(part))
	if err == nil {
		err = at.Link(filepath.Base(originalOf(name)), part)
	}
	if err == nil {
		err = at.Rename(part, filepath.Base(name))
	}
	return errors.Join(err, at.flush())
}

// renameBeside puts a kept file in the place of another. Where it is missing, that was done already.
func (d *SecretFiles) renameBeside(name, kept string) error {
	at, err := d.tree.openAbove(name, trust{})
	if err != nil {
		return err
	}
	defer at.Close()
	// A rename of two links to one file does nothing (rename(2)); the kept one goes all the same.
	err = gone(at.Rename(filepath.Base(kept), filepath.Base(name)))
	return errors.Join(err, gone(at.Remove(filepath.Base(kept))), gone(at.Remove(partOf(filepath.Base(name)))), at.flush())
}

// dropOriginalIfBack forgets a file's original if that is in its place again: then fleetingd has nothing there.
func (d *SecretFiles) dropOriginalIfBack(name string, n *secretNotes) error {
	at, err := d.tree.openAbove(name, trust{})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer at.Close()
	original, err := at.regular(filepath.Base(originalOf(name)))
	present, err1 := at.regular(filepath.Base(name))
	if err := errors.Join(err, err1); err != nil || original == nil || present == nil || !os.SameFile(original, present) {
		return err
	}
	n.file(name).Written = nil
	return errors.Join(at.Remove(filepath.Base(originalOf(name))), at.flush())
}

// Confirm makes the last Writes final: the former files go. From then on only the original file can be restored.
func (d *SecretFiles) Confirm() error {
	n, err := d.readNotes()
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(n.Files)) {
		if !n.file(name).Pending {
			continue
		}
		err := d.tree.removeFile(formerOf(name))
		if err == nil {
			err = d.dropOriginalIfBack(name, n)
		}
		if err != nil {
			return fmt.Errorf("secret file %s: %w", name, err)
		}
		note := n.file(name)
		note.Pending, note.Absent = false, false
		if _, fi, err := d.tree.readFile(name); err == nil && fi == nil {
			note.Written = nil
		}
		if note.Written == nil {
			delete(n.Files, name)
		}
	}
	return d.writeNotes(n)
}

// secretNotes are what the door must remember. Nothing in them tells a secret: the sums are keyed, and of what lies in the file itself.
type secretNotes struct {
	Key   string                 `json:"key"` // hex, random
	Files map[string]*secretNote `json:"files,omitempty"`
}

type secretNote struct {
	Pending bool              `json:"pending,omitempty"` // a former file is kept
	Absent  bool              `json:"absent,omitempty"`  // there was none
	Written map[string]string `json:"written,omitempty"` // by the plan's text with placeholders, the sum of what was written
}

func (n *secretNotes) file(name string) *secretNote {
	if n.Files == nil {
		n.Files = map[string]*secretNote{}
	}
	if n.Files[name] == nil {
		n.Files[name] = &secretNote{}
	}
	return n.Files[name]
}

// sum is a keyed digest, so that the notes tell whether text is what was written and nothing else about it.
func (n *secretNotes) sum(place, text string) string {
	h := hmac.New(sha256.New, []byte(n.Key))
	fmt.Fprintf(h, "%d:%s%s", len(place), place, text)
	return hex.EncodeToString(h.Sum(nil))
}

func (d *SecretFiles) readNotes() (*secretNotes, error) {
	n := &secretNotes{}
	if err := readJSON(d.tree.onHost(d.notes), n); err != nil {
		return nil, err
	}
	if n.Key == "" {
		var key [32]byte
		rand.Read(key[:]) // never fails
		n.Key = hex.EncodeToString(key[:])
	}
	return n, nil
}

func (d *SecretFiles) writeNotes(n *secretNotes) error {
	return writeJSON(d.tree.onHost(d.notes), n, len(n.Files) == 0)
}

func decodeTOML(text string) (map[string]any, error) {
	table := map[string]any{}
	_, err := toml.Decode(text, &table)
	return table, err
}

// encodeTOML is a table with its keys sorted, as the compiler writes it.
func encodeTOML(table map[string]any) string {
	var b bytes.Buffer
	if err := toml.NewEncoder(&b).Encode(table); err != nil {
		return unreadableTOML
	}
	return b.String()
}

func sameTOML(a, b map[string]any) bool { return encodeTOML(a) == encodeTOML(b) }
