package seed

import (
	"flag"
	"net/netip"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
	"golang.org/x/tools/txtar"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestFiles compares the files for cloud-init, for a prebuild and for a worker.
func TestFiles(t *testing.T) {
	const golden = "testdata/files.txtar"
	network := &Network{
		MAC:       "02:fd:00:00:00:02",
		Addresses: []netip.Addr{netip.MustParseAddr("172.16.120.2"), netip.MustParseAddr("fd7e:1ee7::2")},
		Gateways:  []netip.Addr{netip.MustParseAddr("172.16.120.1"), netip.MustParseAddr("fd7e:1ee7::1")},
		DNS:       []netip.Addr{netip.MustParseAddr("1.1.1.3")},
		MTU:       1500,
	}
	only4 := *network
	only4.Addresses, only4.Gateways = only4.Addresses[:1], only4.Gateways[:1]
	seeds := map[string]Seed{
		"worker": {
			InstanceID: "small-7", Hostname: "small-7", Network: network,
			Users: []User{{Name: "ubuntu", AuthorizedKeys: []string{"ssh-ed25519 AAAA job"}}},
		},
		"prebuild": {
			InstanceID: "prebuild-noble", Hostname: "prebuild", Network: &only4, Users: []User{{Name: "root"}},
			WriteFiles: []File{{Path: "/etc/odd", Content: "a: b # \"c\"\n\t- 'd'\n{{ e }}", Mode: "0644"}},
			RunCmd:     [][]string{{"sh", "-c", "echo \"$HOME\" '&&' : yes"}, {"true", "no", "0123", "~"}},
		},
		"bare": {InstanceID: "x: y", Hostname: "yes"},
	}
	var got txtar.Archive
	for _, name := range []string{"worker", "prebuild", "bare"} {
		s := seeds[name]
		files, err := s.files()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			got.Files = append(got.Files, txtar.File{Name: name + "/" + f.name, Data: f.data})
		}
	}
	if *update {
		if err := os.WriteFile(golden, txtar.Format(&got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), string(txtar.Format(&got))); d != "" {
		t.Errorf("other files (-golden +got); go test ./seed -update writes them anew:\n%s", d)
	}
}

// TestYAMLComesBack: text with a meaning in YAML stays text.
func TestYAMLComesBack(t *testing.T) {
	for _, text := range []string{
		"yes", "0644", "1e3", "~", "", " ", "a\nb\n", "- x", "{{ y }}", "#cloud-config", "\t", "é\u2028", "'\"", "!!binary x", "&a *a", "\x00\x1b[2J",
	} {
		s := Seed{
			InstanceID: text, Hostname: text, WriteFiles: []File{{Path: text, Content: text, Mode: text}}, RunCmd: [][]string{{text}},
			Users: []User{{Name: text, AuthorizedKeys: []string{text}}},
		}
		files, err := s.files()
		if err != nil {
			t.Fatal(err)
		}
		var meta metaData
		var user cloudConfig
		if err := yaml.Unmarshal(files[0].data, &meta); err != nil {
			t.Fatal(err)
		}
		if err := yaml.Unmarshal(files[1].data, &user); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(metaData{text, text}, meta); d != "" {
			t.Errorf("%q: meta-data: %s", text, d)
		}
		want := s.cloudConfig()
		if d := cmp.Diff(want, user); d != "" {
			t.Errorf("%q: user-data: %s", text, d)
		}
	}
}
