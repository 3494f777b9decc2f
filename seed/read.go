package seed

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Limits on what ReadISO reads. Seeds are a few KB.
const (
	maxVolumes   = 16      // volume descriptors looked at
	maxDirectory = 1 << 16 // bytes of the root directory
	maxSeed      = 8 << 20 // bytes of the seed's JSON
)

// ErrNotSeed is ReadISO's error for anything that WriteISO did not write.
var ErrNotSeed = errors.New("not a fleetingd seed")

// ReadISO reads the Seed from an ISO image that WriteISO wrote, without
// its Extra files. It reads a limited part of r, which may hold anything.
func ReadISO(r io.ReaderAt) (Seed, error) {
	f, err := openISO(r, JSONName)
	if err != nil {
		return Seed{}, err
	}
	if f.Size() > maxSeed {
		return Seed{}, fmt.Errorf("%w: %s is %d bytes, more than %d", ErrNotSeed, JSONName, f.Size(), maxSeed)
	}
	data, err := io.ReadAll(f)
	if err != nil {
		return Seed{}, fmt.Errorf("read seed: %w", err)
	}
	return parseJSON(data)
}

func parseJSON(data []byte) (Seed, error) {
	d := json.NewDecoder(bytes.NewReader(data))
	// An unknown field would be ignored silently.
	d.DisallowUnknownFields()
	var s Seed
	if err := d.Decode(&s); err != nil {
		return Seed{}, fmt.Errorf("%w: %s: %w", ErrNotSeed, JSONName, err)
	}
	return s, nil
}

// openISO opens a file in the root directory of an ISO 9660 image (ECMA-119, level 1 to 3, one extent).
func openISO(r io.ReaderAt, name string) (*io.SectionReader, error) {
	root, err := rootDirectory(r)
	if err != nil {
		return nil, err
	}
	if root.Size() > maxDirectory {
		return nil, fmt.Errorf("%w: a root directory of %d bytes", ErrNotSeed, root.Size())
	}
	dir, err := io.ReadAll(root)
	if err != nil {
		return nil, fmt.Errorf("read seed: root directory: %w", err)
	}
	for at := 0; at < len(dir); {
		n := int(dir[at])
		if n == 0 { // records do not cross sectors: the rest of this one is empty
			at += sector - at%sector
			continue
		}
		if n > len(dir)-at || n < 34 {
			return nil, fmt.Errorf("%w: a directory record of %d bytes", ErrNotSeed, n)
		}
		id, section, err := record(r, dir[at:at+n])
		if err != nil {
			return nil, err
		}
		base, _, _ := strings.Cut(id, ";") // the version number
		if strings.EqualFold(strings.TrimSuffix(base, "."), name) {
			return section, nil
		}
		at += n
	}
	return nil, fmt.Errorf("%w: it has no %s", ErrNotSeed, name)
}

// rootDirectory opens the directory that the primary volume descriptor (ECMA-119 8.4) names.
func rootDirectory(r io.ReaderAt) (*io.SectionReader, error) {
	buf := make([]byte, sector)
	for i := range int64(maxVolumes) {
		if _, err := r.ReadAt(buf, (volumeSector+i)*sector); err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read seed: volume descriptor: %w", err)
		} else if err != nil {
			return nil, fmt.Errorf("%w: it has no volume descriptor before its end", ErrNotSeed)
		}
		if string(buf[1:6]) != "CD001" || buf[0] == 255 { // not a descriptor, or the last one
			break
		}
		if buf[0] != 1 {
			continue
		}
		if label := strings.TrimRight(string(buf[40:72]), " "); label != Label {
			return nil, fmt.Errorf("%w: its label is %q, not %q", ErrNotSeed, label, Label)
		}
		_, root, err := record(r, buf[156:190])
		return root, err
	}
	return nil, fmt.Errorf("%w: it has no ISO 9660 volume descriptor", ErrNotSeed)
}

// record decodes a directory record (ECMA-119 9.1) of at least 34 bytes.
func record(r io.ReaderAt, b []byte) (string, *io.SectionReader, error) {
	at := int64(binary.LittleEndian.Uint32(b[2:])) * sector
	size := int64(binary.LittleEndian.Uint32(b[10:]))
	n := int(b[32])
	if 33+n > len(b) {
		return "", nil, fmt.Errorf("%w: a directory record is shorter than its name", ErrNotSeed)
	}
	return string(b[33 : 33+n]), io.NewSectionReader(r, at, size), nil
}
