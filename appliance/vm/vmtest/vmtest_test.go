package vmtest

import (
	"os"
	"testing"

	"github.com/fleetingd/fleetingd/appliance/need"
)

func TestGuest(t *testing.T) {
	need.Slow(t)
	kernel, initrd := Guest(t)
	for _, path := range []string{kernel, initrd} {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d KiB", path, st.Size()>>10)
	}
}
