// Package seed holds cloud-init NoCloud seeds as values and writes them as ISO
// 9660 images. It knows the format
// (https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html) but
// nothing about hosts, pools or hypervisors.
package seed

import "net/netip"

// Seed is what a guest gets for one boot: its identity, its network and its
// users. The volume label of its ISO is "cidata".
type Seed struct {
	InstanceID string   `json:"instance_id"` // a new one makes cloud-init run again
	Hostname   string   `json:"hostname"`
	Network    *Network `json:"network,omitempty"` // nil: cloud-init's own default
	Users      []User   `json:"users,omitempty"`
	// WriteFiles and RunCmd are cloud-config's write_files and runcmd.
	WriteFiles []File     `json:"write_files,omitempty"`
	RunCmd     [][]string `json:"run_cmd,omitempty"`
	// Extra holds more files for the root of the ISO, by name. They are not part of the JSON
	// form, because the guest binary would add tens of MB to it.
	Extra map[string][]byte `json:"-"`
}

// Network is the guest's only interface. It is routed: each address is a /32 or
// /128, and the gateway is on-link.
type Network struct {
	MAC       string       `json:"mac"`
	Addresses []netip.Addr `json:"addresses"`
	Gateways  []netip.Addr `json:"gateways"` // one per family in Addresses
	DNS       []netip.Addr `json:"dns"`
	MTU       int          `json:"mtu"`
}

// User is an account that can log in with a key and use sudo.
type User struct {
	Name           string   `json:"name"`
	AuthorizedKeys []string `json:"authorized_keys,omitempty"`
}

// File is a file that cloud-init writes.
type File struct {
	Path    string `json:"path"`
	Content string `json:"content"`
	Mode    string `json:"mode"` // octal, "0644"
}
