package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/ProtonMail/go-crypto/openpgp"
	"github.com/ProtonMail/go-crypto/openpgp/armor"
)

// KindAptKey is the kind of the door that Tree.AptKeys returns.
const KindAptKey Kind = "apt-key"

// Get downloads at most max bytes.
type Get func(ctx context.Context, url string, max int64) ([]byte, error)

// AptKeys returns the door to the keys that sign package repositories, each in an armored file of its own for a source's Signed-By. A key's
// State has its "fingerprint" (upper-case hex) and the "url" that it comes from, which the file notes in its armor. Whatever else lies at that
// URL does not get into the file.
func (t *Tree) AptKeys(get Get) Door { return aptKeys{t, get} }

type aptKeys struct {
	*Tree
	get Get
}

// maxKeyring bounds what lies at a key's URL, in bytes.
const maxKeyring = 1 << 20

func (d aptKeys) Read(_ context.Context, names []string) (map[string]State, error) {
	return eachName(KindAptKey, names, d.read)
}

func (d aptKeys) read(name string) (State, error) {
	data, fi, err := d.readFile(name)
	if err != nil || fi == nil {
		return nil, err
	}
	keys, url, err := readKeys(data)
	if err != nil {
		return State{"fingerprint": "none: " + err.Error()}, nil // somebody else's file is drift, not a failure
	}
	var prints []string
	for _, k := range keys {
		prints = append(prints, fingerprint(k))
	}
	slices.Sort(prints)
	return State{"fingerprint": strings.Join(prints, " "), "url": url}, nil
}

// readKeys reads a keyring, armored or not. An armored one may say where it comes from.
func readKeys(data []byte) (keys openpgp.EntityList, url string, err error) {
	raw := io.Reader(bytes.NewReader(data))
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("-----BEGIN PGP")) {
		block, err := armor.Decode(raw)
		if err != nil {
			return nil, "", err
		}
		raw, url = block.Body, block.Header["Comment"]
	}
	keys, err = openpgp.ReadKeyRing(raw)
	return keys, url, err
}

func fingerprint(k *openpgp.Entity) string { return fmt.Sprintf("%X", k.PrimaryKey.Fingerprint) }

func (d aptKeys) Write(ctx context.Context, name string, want State) error {
	return named(KindAptKey, name, d.write(ctx, name, want))
}

func (d aptKeys) write(ctx context.Context, name string, want State) error {
	if want == nil {
		return d.removeFile(name)
	}
	if err := onlyKeys(want, "fingerprint", "url"); err != nil {
		return err
	}
	file := State{"mode": "0644", "owner": "root", "group": "root"}
	have, err := d.read(name)
	if err != nil {
		return err
	}
	if maps.Equal(have, want) {
		return d.replace(name, nil, file, true)
	}
	url := want["url"]
	data, err := d.get(ctx, url, maxKeyring)
	if err != nil {
		return err
	}
	keys, _, err := readKeys(data)
	if err != nil || len(keys) == 0 {
		return errors.Join(fmt.Errorf("%s has no OpenPGP keys", url), err)
	}
	var there []string
	for _, k := range keys {
		if fingerprint(k) != want["fingerprint"] {
			there = append(there, fingerprint(k))
			continue
		}
		text, err := armored(k, url)
		if err != nil {
			return err
		}
		return d.replace(name, text, file, false)
	}
	return fmt.Errorf("%s has no key with the fingerprint %s, but %s; find out from the vendor which is right", url, want["fingerprint"],
		strings.Join(there, ", "))
}

func armored(k *openpgp.Entity, url string) ([]byte, error) {
	var b bytes.Buffer
	w, err := armor.Encode(&b, openpgp.PublicKeyType, map[string]string{"Comment": url})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(k.Serialize(w), w.Close()); err != nil {
		return nil, err
	}
	return append(b.Bytes(), '\n'), nil
}
