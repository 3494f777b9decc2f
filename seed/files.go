package seed

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"

	"go.yaml.in/yaml/v3"
)

// The files of a seed in the root of its ISO. The first three are for cloud-init.
// JSONName holds the Seed as JSON for the guest part, which uses neither YAML
// nor cloud-init.
const (
	Label       = "cidata" // the volume label that cloud-init looks for
	MetaData    = "meta-data"
	UserData    = "user-data"
	NetworkData = "network-config"
	JSONName    = "fleetingd.json"
)

// metaData is the "meta-data" of https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html.
type metaData struct {
	InstanceID    string `yaml:"instance-id"`
	LocalHostname string `yaml:"local-hostname"`
}

// cloudConfig is the part of https://docs.cloud-init.io/en/latest/reference/modules.html that a Seed needs.
type cloudConfig struct {
	Hostname       string      `yaml:"hostname"`
	ManageEtcHosts string      `yaml:"manage_etc_hosts"`
	SSHPwauth      bool        `yaml:"ssh_pwauth"`
	DisableRoot    bool        `yaml:"disable_root"`
	Users          []cloudUser `yaml:"users"`
	BootCmd        [][]string  `yaml:"bootcmd,omitempty"`
	WriteFiles     []cloudFile `yaml:"write_files,omitempty"`
	RunCmd         [][]string  `yaml:"runcmd,omitempty"`
}

type cloudUser struct {
	Name              string   `yaml:"name"`
	Shell             string   `yaml:"shell"`
	LockPasswd        bool     `yaml:"lock_passwd"`
	Sudo              string   `yaml:"sudo,omitempty"`
	SSHAuthorizedKeys []string `yaml:"ssh_authorized_keys,omitempty"`
}

type cloudFile struct {
	Path        string `yaml:"path"`
	Content     string `yaml:"content"`
	Permissions string `yaml:"permissions"` // a string: YAML 1.1 reads 0644 as a number
	Owner       string `yaml:"owner"`
}

// networkConfig is cloud-init's version 2, which is netplan's format.
type networkConfig struct {
	Version   int                 `yaml:"version"`
	Ethernets map[string]ethernet `yaml:"ethernets"`
}

type ethernet struct {
	Match       match       `yaml:"match"`
	DHCP4       bool        `yaml:"dhcp4"`
	DHCP6       bool        `yaml:"dhcp6"`
	AcceptRA    bool        `yaml:"accept-ra"`
	LinkLocal   []string    `yaml:"link-local"`
	Addresses   []string    `yaml:"addresses"`
	Routes      []route     `yaml:"routes"`
	Nameservers nameservers `yaml:"nameservers"`
	MTU         int         `yaml:"mtu,omitempty"`
}

type match struct {
	MACAddress string `yaml:"macaddress"`
}

type route struct {
	To     string `yaml:"to"`
	Via    string `yaml:"via"`
	OnLink bool   `yaml:"on-link"`
}

type nameservers struct {
	Addresses []string `yaml:"addresses"`
}

type namedFile struct {
	name string
	data []byte
}

// files returns the seed's files except Extra, in a fixed order.
func (s *Seed) files() ([]namedFile, error) {
	meta, err := toYAML("", metaData{InstanceID: s.InstanceID, LocalHostname: s.Hostname})
	if err != nil {
		return nil, err
	}
	user, err := toYAML("#cloud-config\n", s.cloudConfig())
	if err != nil {
		return nil, err
	}
	var own bytes.Buffer
	e := json.NewEncoder(&own)
	e.SetEscapeHTML(false)
	if err := e.Encode(s); err != nil {
		return nil, fmt.Errorf("write seed %q: %w", s.InstanceID, err)
	}
	files := []namedFile{{MetaData, meta}, {UserData, user}, {JSONName, own.Bytes()}}
	if s.Network != nil {
		network, err := toYAML("", s.Network.config())
		if err != nil {
			return nil, err
		}
		files = append(files, namedFile{NetworkData, network})
	}
	return files, nil
}

func toYAML(header string, v any) ([]byte, error) {
	b := bytes.NewBufferString(header)
	e := yaml.NewEncoder(b)
	e.SetIndent(2)
	if err := e.Encode(v); err != nil {
		return nil, fmt.Errorf("write seed: %w", err)
	}
	if err := e.Close(); err != nil {
		return nil, fmt.Errorf("write seed: %w", err)
	}
	return b.Bytes(), nil
}

func (s *Seed) cloudConfig() cloudConfig {
	c := cloudConfig{
		Hostname: s.Hostname,
		// "localhost" only adds the name to the line of 127.0.1.1. Without it sudo waits for DNS.
		ManageEtcHosts: "localhost",
		DisableRoot:    true,
		Users:          []cloudUser{}, // never omitted: cloud-init would create the distribution's default user
		RunCmd:         s.RunCmd,
	}
	if s.Network != nil {
		c.BootCmd = s.Network.bootCmd()
	}
	for _, u := range s.Users {
		user := cloudUser{
			Name: u.Name, Shell: "/bin/bash", LockPasswd: true, SSHAuthorizedKeys: u.AuthorizedKeys,
			Sudo: "ALL=(ALL) NOPASSWD:ALL",
		}
		if u.Name == "root" {
			// Otherwise cloud-init puts a "Please login as…" command before root's keys.
			c.DisableRoot = false
			user.Sudo = ""
		}
		c.Users = append(c.Users, user)
	}
	for _, f := range s.WriteFiles {
		c.WriteFiles = append(c.WriteFiles, cloudFile{
			Path: f.Path, Content: f.Content, Permissions: f.Mode, Owner: "root:root",
		})
	}
	return c
}

// keepGateways does for a guest whose network cloud-init configures what the guest part does itself (see keepGateway in
// appliance/guest). Its arguments are the interface's MAC, then each address of the worker with its gateway. It always
// succeeds: a guest whose ip(8) cannot do this works otherwise.
const keepGateways = `dev=$(ip -o link | sed -n "s/^[0-9]*: \\([^:@]*\\)[:@].* link\\/ether $1 .*/\\1/p" | head -n 1)
shift
while [ $# -ge 2 ]; do
  case $1 in *:*) f=-6 ;; *) f=-4 ;; esac
  ip $f route replace "$2" dev "$dev" proto kernel
  ip $f rule show | grep -q not ||
    { ip $f rule add not from "$1" to "$2" iif lo lookup local pref 0 protocol kernel && ip $f rule del pref 0 lookup local; }
  shift 2
done
exit 0
`

// bootCmd runs at every boot, once the network is up.
func (n *Network) bootCmd() [][]string {
	cmd := []string{"sh", "-c", keepGateways, "keep-gateways", strings.ToLower(n.MAC)}
	for _, g := range n.Gateways {
		for _, a := range n.Addresses {
			if a.Is4() == g.Is4() {
				cmd = append(cmd, a.String(), g.String())
			}
		}
	}
	return [][]string{cmd}
}

// config matches the interface by its MAC and keeps its name: renaming can
// fail once the link is up, and nothing needs another name.
func (n *Network) config() networkConfig {
	e := ethernet{
		Match: match{n.MAC},
		// IPv6 needs a link-local address for its neighbour probes (RFC 4861, 7.3.3). Without IPv6
		// an empty list turns it off; IPv4 link-local is never wanted.
		LinkLocal:   []string{},
		Addresses:   []string{},
		Routes:      []route{},
		Nameservers: nameservers{Addresses: []string{}},
		MTU:         n.MTU,
	}
	for _, a := range n.Addresses {
		e.Addresses = append(e.Addresses, netip.PrefixFrom(a, a.BitLen()).String())
		if a.Is6() {
			e.LinkLocal = []string{"ipv6"}
		}
	}
	for _, g := range n.Gateways {
		to := "0.0.0.0/0"
		if g.Is6() {
			to = "::/0"
		}
		// The gateway is outside the address's own /32: on-link makes it reachable without a route.
		e.Routes = append(e.Routes, route{To: to, Via: g.String(), OnLink: true})
	}
	for _, a := range n.DNS {
		e.Nameservers.Addresses = append(e.Nameservers.Addresses, a.String())
	}
	return networkConfig{Version: 2, Ethernets: map[string]ethernet{"worker": e}}
}
