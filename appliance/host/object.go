package host

import "context"

// Kind is a kind of object on a host.
type Kind string

// Object names one thing on a host: {"file", "/etc/…"}, {"sysctl", "net.ipv4.ip_forward"}, {"unit", "gitlab-runner.service"}.
type Object struct {
	Kind Kind   `json:"kind"`
	Name string `json:"name"`
}

func (o Object) String() string { return string(o.Kind) + " " + o.Name }

// State is what an object is, as flat text: {"content": …, "mode": "0644", "owner": "root", "group": "root"}; {"value": "1"}.
// nil means that the object does not exist. A State never holds a secret.
type State map[string]string

// Door reads and writes the objects of one kind.
type Door interface {
	// Read returns the state of each named object; absent ones are nil.
	Read(ctx context.Context, names []string) (map[string]State, error)
	// Write makes the object equal to want; nil removes it. It is idempotent: after a crash in the middle, a second Write of the same, or
	// of the former, state ends right. The undo of a step is therefore Write(before).
	Write(ctx context.Context, name string, want State) error
}
