package seed

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"

	"github.com/google/renameio/v2"
	"github.com/kdomanski/iso9660"
)

const sector = 2048 // ECMA-119 6.1.2

// volumeSector is the sector of the primary volume descriptor (ECMA-119 6.2.1).
const volumeSector = 16

// WriteISO writes the seed's ISO image; the same seed gives the same bytes. Names
// in Extra must be lower case, at most 28 bytes long, and not one of the seed's own.
func (s *Seed) WriteISO(w io.Writer) (err error) {
	files, err := s.files()
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(s.Extra)) {
		files = append(files, namedFile{name, s.Extra[name]})
	}
	iso, err := iso9660.NewWriter()
	if err != nil {
		return fmt.Errorf("write seed ISO: %w", err)
	}
	defer func() { err = errors.Join(err, iso.Cleanup()) }()
	seen := map[string]bool{}
	for _, f := range files {
		if !isoName(f.name) || seen[f.name] {
			return fmt.Errorf("write seed ISO: %q is not a valid file name, or is used twice", f.name)
		}
		seen[f.name] = true
		if err := iso.AddFile(bytes.NewReader(f.data), f.name); err != nil {
			return fmt.Errorf("write seed ISO: %s: %w", f.name, err)
		}
	}
	// The library writes sector by sector, 12,000 times for the guest binary. A larger buffer would cost a worker's seed more than it saves.
	b := bufio.NewWriterSize(&undated{w: w}, 64<<10)
	if err := iso.WriteTo(b, Label); err != nil {
		return fmt.Errorf("write seed ISO: %w", err)
	}
	if err := b.Flush(); err != nil {
		return fmt.Errorf("write seed ISO: %w", err)
	}
	return nil
}

// ISOFile writes the seed's ISO to path, whole or not at all. The mode is not subject to the umask.
func (s *Seed) ISOFile(path string, mode os.FileMode) error {
	f, err := renameio.NewPendingFile(path, renameio.WithStaticPermissions(mode))
	if err != nil {
		return fmt.Errorf("write seed ISO: %w", err)
	}
	defer f.Cleanup() // a no-op once the file is in place
	if err := s.WriteISO(f); err != nil {
		return err
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return fmt.Errorf("write seed ISO: %w", err)
	}
	return nil
}

// isoName reports whether Linux's isofs and ReadISO return a name unchanged without
// Rock Ridge: the library stores lower case and dashes, which ECMA-119 does not allow
// but isofs accepts, and 30 bytes including the version ";1".
func isoName(s string) bool {
	if s == "" || len(s) > 28 {
		return false
	}
	dots := 0
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', '0' <= c && c <= '9', c == '-', c == '_':
		case c == '.' && i > 0 && i < len(s)-1 && len(s)-1-i <= 8:
			dots++
		default:
			return false
		}
	}
	return dots <= 1
}

// undated passes on an ISO image without the time of day, which the library writes
// into the primary volume descriptor (ECMA-119 8.4.26-29) and nowhere else.
type undated struct {
	w  io.Writer
	at int64
}

// dates is the part of an image that holds the four dates of 17 bytes.
const (
	datesStart = volumeSector*sector + 813
	datesEnd   = datesStart + 4*17
)

func (u *undated) Write(p []byte) (int, error) {
	first, last := max(datesStart-u.at, 0), min(datesEnd-u.at, int64(len(p)))
	if first < last {
		p = bytes.Clone(p)
		for i := first; i < last; i++ {
			// "Not specified" is sixteen digits 0 and time zone 0.
			p[i] = '0'
			if (u.at+i-datesStart)%17 == 16 {
				p[i] = 0
			}
		}
	}
	n, err := u.w.Write(p)
	u.at += int64(n)
	return n, err
}
