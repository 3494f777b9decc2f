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

// MaxSize is the largest plan.json that Parse accepts, in bytes. The plan of 4,000
// slots takes less than 1 MB; the files of prebuilds take the rest.
const MaxSize = 64 << 20

// JSON returns the Plan's canonical form, as plan.json holds it: indented, fields
// in the order of the types, maps by key, no HTML escapes, a final newline.
func (p *Plan) JSON() ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(p); err != nil {
		return nil, fmt.Errorf("write plan of host %q: %w", p.Host, err)
	}
	if b.Len() > MaxSize { // Parse would refuse it
		return nil, fmt.Errorf("write plan of host %q: it has %d bytes, but at most %d are allowed: use smaller files in its prebuilds",
			p.Host, b.Len(), MaxSize)
	}
	return b.Bytes(), nil
}

// Digest returns the SHA-256, in hex, of the canonical JSON without the origins: two
// Plans with the same digest make the same host.
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

// Parse reads and checks a plan.json. Another format version, an unknown field
// and a contradiction are errors. The input may be hostile.
func Parse(data []byte) (*Plan, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("the plan is %d bytes, more than the %d that are allowed", len(data), MaxSize)
	}
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, notJSON(data, err)
	}
	if head.Version != Version {
		return nil, fmt.Errorf("the plan has format version %d, but this fleetingd reads and writes version %d: "+
			"compile the spec again with the fleetingd installed here", head.Version, Version)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var p Plan
	if err := d.Decode(&p); err != nil {
		return nil, notJSON(data, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("the plan is followed by more data (at byte %d)", d.InputOffset())
	}
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("the plan contradicts itself (was it edited by hand? compile it again): %w", err)
	}
	return &p, nil
}

// notJSON adds the line of a decoding error.
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
