package guest

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/fleetingd/fleetingd/appliance/visible"
)

// Limits of an export. A distribution's kernel has 15 MB, its full initrd less than 100.
const (
	maxExportFile = 256 << 20
	maxExport     = 2*maxExportFile + 1<<20
)

// The names in an export, and of the files that ReadExport writes.
const (
	ExportKernel = "vmlinuz"
	ExportInitrd = "initrd"
)

// ReadExport unpacks what Seal wrote, from the start of the ExportSerial disk, into dst: the files ExportKernel and ExportInitrd, mode 0644.
// The stream comes from the guest and is not trusted: anything but these two
// regular files, once each and within their limits, is an error, and then neither file is left.
func ReadExport(r io.Reader, dst string, e Export) (err error) {
	if e.Bytes <= 0 || e.Bytes > maxExport {
		return fmt.Errorf("read the guest's export: its length is %d", e.Bytes)
	}
	var made []string
	defer func() {
		if err != nil {
			for _, p := range made {
				err = errors.Join(err, os.Remove(p))
			}
		}
	}()
	tr := tar.NewReader(io.LimitReader(r, e.Bytes))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read the guest's export: %w", err)
		}
		if h.Name != ExportKernel && h.Name != ExportInitrd {
			return fmt.Errorf("read the guest's export: it has a file %q; only %s and %s are allowed",
				visible.Cut(h.Name, maxName), ExportKernel, ExportInitrd)
		}
		if h.Typeflag != tar.TypeReg || h.Size <= 0 || h.Size > maxExportFile {
			return fmt.Errorf("read the guest's export: %s is of type %q and %d bytes; it must be a regular file of 1 to %d bytes",
				h.Name, h.Typeflag, h.Size, maxExportFile)
		}
		p := filepath.Join(dst, h.Name)
		// O_EXCL: a second file of the same name is an error, and an existing link is not followed.
		f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			return fmt.Errorf("read the guest's export: %w", err)
		}
		made = append(made, p)
		_, err = io.CopyN(f, tr, h.Size)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return fmt.Errorf("read the guest's export: %s: %w", h.Name, err)
		}
	}
	if len(made) != 2 {
		return fmt.Errorf("read the guest's export: it has %d of the two files %s and %s", len(made), ExportKernel, ExportInitrd)
	}
	return nil
}
