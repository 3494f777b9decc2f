package host

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	needs "github.com/fleetingd/fleetingd/appliance/need"
	"github.com/fleetingd/fleetingd/appliance/plan"
)

const config = "/etc/gitlab-runner/config.toml"

// secretCase is a host with one config.toml.
type secretCase struct {
	*testing.T
	root   string
	values map[string]string
	owned  map[string]State
}

func newSecretCase(t *testing.T) *secretCase {
	t.Helper()
	needs.Root(t)
	root := accountsTree(t)
	if err := os.MkdirAll(filepath.Join(root, filepath.Dir(config)), 0o700); err != nil {
		t.Fatal(err)
	}
	return &secretCase{T: t, root: root, values: map[string]string{"env:TOKEN": "glrt-first", "env:PASS": `p"w`}, owned: map[string]State{}}
}

// planned is a config.toml of the plan, as the compiler would write it.
func planned(idle string, more ...string) plan.File {
	text := "# Written by fleetingd.\n\n" + strings.Join(append([]string{`concurrent = 2`, ``, `[[runners]]`,
		`  environment = ["A=b", "PASS=@SECRET:runner.small.environment.1@"]`,
		`  executor = "instance"`, `  name = "small"`, `  pre_build_script = "echo ` + idle + `"`,
		`  token = "@SECRET:runner.small.token@"`, `  url = "https://gitlab.example.com"`}, more...), "\n") + "\n"
	return plan.File{Path: config, Mode: "0600", Owner: "fleet", Group: "fleet", Content: text, Secrets: []plan.FileSecret{
		{Placeholder: "@SECRET:runner.small.token@", Secret: plan.Piece{From: "env:TOKEN"}},
		{Placeholder: "@SECRET:runner.small.environment.1@", Secret: plan.Piece{From: "env:PASS"}},
	}}
}

func wanted(f plan.File) State {
	return State{"content": f.Content, "mode": f.Mode, "owner": f.Owner, "group": f.Group}
}

func (c *secretCase) door(files ...plan.File) *SecretFiles {
	return NewTree(c.root, "/notes.json").SecretFiles(files, c.owned, func(from string) (string, error) {
		if v, ok := c.values[from]; ok {
			return v, nil
		}
		return "", errors.New(from + " is not set")
	}, "/secrets.json")
}

func (c *secretCase) read(d *SecretFiles) State {
	c.Helper()
	s := readOne(c.T, d, config)
	for _, v := range []string{"glrt-", `p"w`, `p\"w`, "hunter2"} {
		if strings.Contains(s["content"], v) {
			c.Errorf("a secret is in the state: %s", s["content"])
		}
	}
	return s
}

// apply writes the plan's file and confirms it, as a generation of its own.
func (c *secretCase) apply(f plan.File) {
	c.Helper()
	d := c.door(f)
	writeOne(c.T, d, config, wanted(f))
	if err := d.Confirm(); err != nil {
		c.Fatal(err)
	}
	c.owned[config] = wanted(f)
}

func (c *secretCase) file() string {
	c.Helper()
	b, err := os.ReadFile(filepath.Join(c.root, config))
	if err != nil {
		c.Fatal(err)
	}
	return string(b)
}

func (c *secretCase) put(text string) {
	c.Helper()
	if err := os.WriteFile(filepath.Join(c.root, config), []byte(text), 0o600); err != nil {
		c.Fatal(err)
	}
}

func (c *secretCase) beside(want ...string) {
	c.Helper()
	entries, err := os.ReadDir(filepath.Join(c.root, filepath.Dir(config)))
	if err != nil {
		c.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if diff := cmp.Diff(want, names); diff != "" {
		c.Errorf("files in the folder (-want +have)\n%s", diff)
	}
}

func TestSecretFile(t *testing.T) {
	c := newSecretCase(t)
	f := planned("1")
	if s := c.read(c.door(f)); s != nil {
		t.Errorf("a missing file is %v", s)
	}
	c.apply(f)
	for _, want := range []string{`token = "glrt-first"`, `"PASS=p\"w"`, "# Written by fleetingd."} {
		if !strings.Contains(c.file(), want) {
			t.Errorf("%s is missing in\n%s", want, c.file())
		}
	}
	c.beside("config.toml")

	// A secret that changed in the spec shows as changed, and is no drift.
	c.values["env:TOKEN"] = "glrt-second"
	have := c.read(c.door(f))
	if !strings.Contains(have["content"], `token = "(former value)"`) || !SameButSecrets(have, c.owned[config]) {
		t.Errorf("after the spec's token changed:\n%s", have["content"])
	}
	c.apply(f)
	if !strings.Contains(c.file(), "glrt-second") {
		t.Error("the new token was not written")
	}

	// What somebody else changed is drift, whatever it is.
	for _, change := range [][2]string{
		{"glrt-second", "glrt-hunter2"}, {`p\"w`, "hunter2"}, {"echo 1", "echo hunter2"}, {"concurrent = 2", "concurrent = 3"},
		{"concurrent = 2", "concurrent = 2\nsentry_dsn = \"hunter2\""}, {`"A=b", `, ""}, {`name = "small"`, `name = "other"`}, {"[[runners]]", "[[runners"},
		{"[[runners]]", "[[runners]]\n[[runners]]\n  token = \"hunter2\"\n[[runners]]"},
	} {
		whole := c.file()
		changed := strings.Replace(whole, change[0], change[1], 1)
		if changed == whole {
			t.Fatalf("%q is not in\n%s", change[0], whole)
		}
		c.put(changed)
		have := c.read(c.door(f))
		if SameButSecrets(have, c.owned[config]) || have["content"] == f.Content {
			t.Errorf("%q → %q is no drift:\n%s", change[0], change[1], have["content"])
		}
		// Without its secrets, as destroy and status read it.
		bare := NewTree(c.root, "/notes.json").SecretFiles([]plan.File{f}, c.owned, nil, "/secrets.json")
		if SameButSecrets(c.read(bare), c.owned[config]) {
			t.Errorf("%q → %q is no drift without the secrets", change[0], change[1])
		}
		c.put(whole)
		if !SameButSecrets(c.read(bare), c.owned[config]) {
			t.Errorf("what was written is drift without the secrets: %s", cmp.Diff(c.owned[config], c.read(bare)))
		}
	}
	// Comments and order are not.
	c.put("# mine\n" + strings.Replace(c.file(), `  executor = "instance"`+"\n", "", 1) + "  executor = \"instance\"\n")
	if have := c.read(c.door(f)); have["content"] != f.Content {
		t.Errorf("a comment is drift:\n%s", cmp.Diff(f.Content, have["content"]))
	}
}

// An installation of somebody else's is kept to the byte until it is restored.
func TestSecretFileOriginal(t *testing.T) {
	c := newSecretCase(t)
	const foreign = "# an old friend: glrt-comment\nconcurrent = 7\n[[runners]]\nname=\"old\"\ntoken = 'glrt-old'\nenvironment=['P=hunter2']\n"
	c.put(foreign)
	f := planned("1")
	original := c.read(c.door(f))
	if !strings.Contains(original["content"], `token = "(differs)"`) || !strings.Contains(original["content"], `name = "old"`) {
		t.Errorf("the foreign file reads\n%s", original["content"])
	}
	// Undone before it is confirmed, twice.
	writeOne(t, c.door(f), config, wanted(f))
	c.beside(".config.toml.fleetingd-former", ".config.toml.fleetingd-original", "config.toml")
	for range 2 {
		writeOne(t, c.door(f), config, original)
		if c.file() != foreign {
			t.Fatalf("after the undo:\n%s", c.file())
		}
		c.beside("config.toml")
	}
	// Confirmed, changed by a second generation, that undone, and destroyed.
	c.apply(f)
	c.beside(".config.toml.fleetingd-original", "config.toml")
	g, gen1 := planned("2"), c.file()
	before := c.read(c.door(g))
	writeOne(t, c.door(g), config, wanted(g))
	c.values = nil // as at boot, where /run/secrets is not there yet
	if err := c.door().Write(t.Context(), config, before); err != nil {
		t.Fatal(err)
	}
	if c.file() != gen1 {
		t.Errorf("after the undo of generation 2:\n%s", c.file())
	}
	d := c.door()
	if err := d.Write(t.Context(), config, original); err != nil {
		t.Fatal(err)
	}
	if c.file() != foreign {
		t.Errorf("after destroy:\n%s", c.file())
	}
	// destroy can fail later, and is undone.
	if err := d.Write(t.Context(), config, before); err != nil || c.file() != gen1 {
		t.Errorf("after the undo of destroy: %v\n%s", err, c.file())
	}
	if err := d.Write(t.Context(), config, original); err != nil {
		t.Fatal(err)
	}
	if err := d.Confirm(); err != nil {
		t.Fatal(err)
	}
	if c.file() != foreign {
		t.Errorf("in the end:\n%s", c.file())
	}
	c.beside("config.toml")
	if _, err := os.Stat(filepath.Join(c.root, "secrets.json")); err == nil {
		t.Error("the notes stayed")
	}
	if err := d.Write(t.Context(), config, before); err == nil || !strings.Contains(err.Error(), "the apply that replaced it was confirmed") {
		t.Errorf("a state that nobody kept: %v", err)
	}
}

// Where administrators keep secrets in files that fleetingd never wrote.
func TestSecretFileForeign(t *testing.T) {
	c := newSecretCase(t)
	c.put(`# hunter2 in a comment
concurrent = 1
sentry_dsn = "https://hunter2@sentry.example.com/1"
[session_server]
  advertise_address = "hunter2"
[[runners]]
  name = "old" # hunter2
  url = "https://user:hunter2@gitlab.example.com"
  token = "glrt-hunter2"
  clone_url = 'hunter2'
  pre_clone_script = """
  hunter2
  """
  environment = ["DOCKER_AUTH_CONFIG={\"auths\":\"hunter2\"}", "http_proxy=http://u:hunter2@proxy"]
  [[runners.feature]]
    values = [["hunter2"], {inner = "hunter2"}]
  [runners.ssh]
    password = "hunter2"
  [runners.custom]
    config_args = ["hunter2"]
  [runners.cache.s3]
    AccessKey = "hunter2"
    SecretKey = "hunter2"
  [runners.machine]
    MachineOptions = ["amazonec2-secret-key=hunter2"]
`)
	have := c.read(c.door(planned("1"))) // which looks for them
	if !strings.Contains(have["content"], `name = "old"`) || strings.Count(have["content"], OtherText) < 12 {
		t.Errorf("it reads\n%s", have["content"])
	}
	if _, err := decodeTOML(have["content"]); err != nil {
		t.Error(err)
	}
}

// GitLab Runner renews a token by itself, and writes the whole file anew.
func TestSecretFileRenewed(t *testing.T) {
	c := newSecretCase(t)
	f := planned("1")
	c.apply(f)
	c.put(`concurrent = 2
check_interval = 0
connection_max_age = "15m0s"
shutdown_timeout = 0
[session_server]
  session_timeout = 1800
[[runners]]
  name = "small"
  url = "https://gitlab.example.com"
  id = 42
  token = "glrt-renewed"
  token_obtained_at = 2026-11-20T10:00:00Z
  token_expires_at = 2026-12-20T10:00:00Z
  executor = "instance"
  environment = ["A=b", "PASS=p\"w"]
  pre_build_script = "echo 1"
  [runners.cache]
    MaxUploadedArchiveSize = 0
    [runners.cache.s3]
    [runners.cache.gcs]
`)
	if have := c.read(c.door(f)); have["content"] != f.Content {
		t.Errorf("a renewed token is a change:\n%s", cmp.Diff(f.Content, have["content"]))
	}
	g := planned("2")
	c.apply(g)
	for _, want := range []string{`token = "glrt-renewed"`, "id = 42", "token_expires_at = 2026-12-20T10:00:00Z", "echo 2", "# Written by fleetingd."} {
		if !strings.Contains(c.file(), want) {
			t.Errorf("%s is missing in\n%s", want, c.file())
		}
	}
	c.apply(g) // again
	// A new token in the spec is the administrator's word.
	c.values["env:TOKEN"] = "glrt-second"
	if have := c.read(c.door(g)); have["content"] == g.Content {
		t.Error("a new token in the spec is no change")
	}
	c.apply(g)
	if text := c.file(); !strings.Contains(text, "glrt-second") || strings.Contains(text, "renewed") || strings.Contains(text, "id = 42") {
		t.Errorf("after the spec's token changed:\n%s", text)
	}
}

func TestSecretFileFailures(t *testing.T) {
	c := newSecretCase(t)
	f := planned("1")
	delete(c.values, "env:TOKEN")
	if err := c.door(f).Write(t.Context(), config, wanted(f)); err == nil || !strings.Contains(err.Error(), "env:TOKEN is not set") {
		t.Errorf("a secret that cannot be read: %v", err)
	}
	c.beside()
	c.values["env:TOKEN"] = "glrt-first"
	if err := os.Symlink("/dev/null", filepath.Join(c.root, config)); err != nil {
		t.Fatal(err)
	}
	if err := c.door(f).Write(t.Context(), config, wanted(f)); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("a link in its place: %v", err)
	}
}

// faultySecret is a Write of config.toml to a folder that holds what setup put there.
func faultySecret(t *testing.T, before State, present string) doorCase {
	want := wanted(planned("2"))
	want["owner"], want["group"] = "12345", "12345" // no accounts in this tree
	return doorCase{
		name: config, before: before, want: want, folders: []string{"etc/gitlab-runner"},
		door: func(root string) Door {
			c := &secretCase{T: t, root: root, values: map[string]string{"env:TOKEN": "glrt-first", "env:PASS": "x"}}
			return c.door(planned("2"))
		},
		setup: func(t *testing.T, root string) {
			if err := os.MkdirAll(filepath.Join(root, filepath.Dir(config)), 0o700); err != nil {
				t.Fatal(err)
			}
			if before == nil {
				return
			}
			if err := os.WriteFile(filepath.Join(root, config), []byte(present), 0o640); err != nil {
				t.Fatal(err)
			}
		},
	}
}

func TestSecretFileFaults(t *testing.T) {
	c := faultySecret(t, nil, "")
	if !c.isChild(t) {
		c.hurt(t, "TestSecretFileFaults")
	}
}

func TestSecretFileReplaceFaults(t *testing.T) {
	before := State{"content": "# Written by fleetingd.\n\nconcurrent = 3\n", "mode": "0640", "owner": "root", "group": "root"}
	c := faultySecret(t, before, "concurrent=3 # hunter2\n")
	if !c.isChild(t) {
		c.hurt(t, "TestSecretFileReplaceFaults")
	}
}
