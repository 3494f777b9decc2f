package vm

import (
	"testing"
	"time"
)

// On any machine, the answer comes in time.
func TestProbeKVM(t *testing.T) {
	begin := time.Now()
	err := ProbeKVM(t.Context())
	took := time.Since(begin)
	t.Logf("after %v: %v", took, err)
	if took > 5*time.Second {
		t.Errorf("ProbeKVM took %v; it promises two seconds", took)
	}
}
