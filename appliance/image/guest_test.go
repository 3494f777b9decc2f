package image

import (
	"os"
	"path/filepath"
	"testing"
)

// Images get the small guest program if it lies beside this program, and this program otherwise.
func TestThisGuest(t *testing.T) {
	if got := thisGuest(); got != "/proc/self/exe" {
		t.Errorf("with nothing beside this program: %s", got)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	small := filepath.Join(filepath.Dir(self), GuestName)
	if err := os.WriteFile(small, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(small) })
	if got := thisGuest(); got != small {
		t.Errorf("with %s beside this program: %s", GuestName, got)
	}
}
