package plan

import (
	"strings"
	"testing"
)

func TestCanStart(t *testing.T) {
	if err := (&Pool{Name: "p", Start: "cold"}).CanStart(); err != nil {
		t.Errorf("cold: %v", err)
	}
	err := (&Pool{Name: "p", Start: "warm"}).CanStart()
	if err == nil || !strings.Contains(err.Error(), `pool "p"`) || !strings.Contains(err.Error(), `write start = "cold"`) {
		t.Errorf("warm: %v", err)
	}
}
