package image

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDownload(t *testing.T) {
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		asked++
		fmt.Fprint(w, "a program")
	}))
	defer server.Close()
	at := filepath.Join(t.TempDir(), "program")
	sum := fmt.Sprintf("%X", sha256.Sum256([]byte("a program")))
	for range 2 {
		if err := Download(t.Context(), server.URL, sum, at, 100); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(at); err != nil || string(b) != "a program" || asked != 1 {
		t.Errorf("%q, %v, %d requests", b, err, asked)
	}
	err := Download(t.Context(), server.URL, strings.Repeat("0", 64), at, 100)
	if mismatch, ok := errors.AsType[*MismatchError](err); !ok {
		t.Errorf("a file with another digest: %v, %v", mismatch, err)
	}
	if b, err := os.ReadFile(at); err != nil || string(b) != "a program" {
		t.Errorf("the file that was there: %q, %v", b, err)
	}
	if err := Download(t.Context(), server.URL, "abc", at, 100); err == nil || !strings.Contains(err.Error(), "64 hex digits") {
		t.Error(err)
	}
	if err := Download(t.Context(), server.URL, strings.Repeat("0", 64), at, 3); err == nil {
		t.Error("a file beyond the limit was fetched")
	}
	if b, err := Get(t.Context(), server.URL, 100); err != nil || string(b) != "a program" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := Get(t.Context(), server.URL, 3); err == nil {
		t.Error("more than the limit was fetched")
	}
}
