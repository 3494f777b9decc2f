package plan

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// MaxSize is the largest plan.json that Parse reads, in bytes. A host with 4,000
// slots writes less than 1 MB; prebuild files are the rest.
const MaxSize = 64 << 20

// JSON is the Plan's canonical form, as plan.json holds it: indented, in the
// order of the types' fields, maps by key, no HTML escapes, a newline at the end.
func (p *Plan) JSON() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(p); err != nil {
		return nil, fmt.Errorf("write plan of host %q: %w", p.Host, err)
	}
	if b.Len() > MaxSize { // Parse would refuse it
		return nil, fmt.Errorf("write plan of host %q: it has %d bytes, and may have %d: put less into the files of its prebuilds",
			p.Host, b.Len(), MaxSize)
	}
	return b.Bytes(), nil
}

// Digest is the SHA-256, in hex, of the canonical JSON without the origins: two
// Plans with one digest make the same host.
func (p *Plan) Digest() (string, error) {
	bare := *p
	bare.Origins = nil
	b, err := bare.JSON()
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}

// Parse reads a plan.json and checks it: a format of another version, an unknown
// field and a Plan that contradicts itself are errors. The input may be hostile.
func Parse(data []byte) (*Plan, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("the plan is %d bytes, more than the %d that a plan may have", len(data), MaxSize)
	}
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, notJSON(data, err)
	}
	if head.Version != Version {
		return nil, fmt.Errorf("the plan has format version %d, and this fleetingd reads and writes version %d: "+
			"compile the spec again with the fleetingd that is installed here", head.Version, Version)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var p Plan
	if err := d.Decode(&p); err != nil {
		return nil, notJSON(data, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("the plan has more after its end (byte %d)", d.InputOffset())
	}
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("the plan contradicts itself (was it edited by hand? compile it again): %w", err)
	}
	return &p, nil
}

// notJSON says at which line a plan stops being one.
func notJSON(data []byte, err error) error {
	offset := int64(-1)
	if e, ok := errors.AsType[*json.SyntaxError](err); ok {
		offset = e.Offset
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		offset = e.Offset
	}
	if offset < 0 || offset > int64(len(data)) {
		return fmt.Errorf("not a plan: %w", err)
	}
	return fmt.Errorf("not a plan: line %d: %w", 1+bytes.Count(data[:offset], []byte("\n")), err)
}
