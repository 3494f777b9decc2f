package convert_test

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"

	"github.com/fleetingd/fleetingd/hcl/convert"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

var options = convert.Options{Name: "config.toml", SpecName: "host.hcl", Machine: "ci-01"}

// section is a config.toml with one runner of docker+machine, and what else is in its section.
func section(more string) string {
	return "concurrent = 4\n[[runners]]\n  name = \"a\"\n  url = \"https://gitlab.example.com\"\n  token = \"glrt-CANARYtoken\"\n  executor = \"docker+machine\"\n" + more
}

func TestErrors(t *testing.T) {
	for _, tt := range []struct{ src, want string }{
		{"", "config.toml: it has no [[runners]] section"},
		{"concurrent = 4\n", "config.toml: it has no [[runners]] section"},
		{"runners = 4\n", "config.toml: it has no [[runners]] section"},
		{"concurrent = 4\n[[runners]\n", `config.toml:2: not valid TOML: expected end of table array name delimiter ']', but got '\n' instead`},
		{"[[runners]]\ntoken = glrt-CANARY\n", "config.toml:2: not valid TOML: expected value"},
		{"[[runners]]\ntoken = \"glrt-CANARY\n", "config.toml:2: not valid TOML: strings cannot contain newlines"},
		{"[[runners]]\ntoken = 12-CANARY\n", "config.toml:2: not valid TOML: "},
		{"[[runners]]\ntoken = \"a\"\ntoken = \"b\"\n", "config.toml:3: not valid TOML: Key 'runners.token' has already been defined."},
		{"[[runners]]\nexecutor = \"shell\"\n", "config.toml: [[runners]] 1: it has no url"},
		{"[[runners]]\nname = \"x\"\nexecutor = \"kubernetes\"\n", `config.toml: none of its [[runners]] sections can be converted. fleetingd cannot run jobs of the executor "kubernetes"`},
		{strings.ReplaceAll(section(""), "https://", ""), `config.toml: [[runners]] 1 ("a"), url: "gitlab.example.com" is not a valid URL`},
		{strings.ReplaceAll(section(""), "https://", "https://ci:CANARYpw@"), `config.toml: [[runners]] 1 ("a"), url: `},
		{section("[runners.autoscaler.plugin_config]\nplan = \"/etc/fleetingd/plan.json\"\npool = \"a\"\n"), "its plugin_config names a plan, so fleetingd wrote this file"},
		{section("[runners.autoscaler.plugin_config]\nvm_num_cpu_cores = \"many\"\n"), "plugin_config needs egress_interface"},
		{section("[runners.machine]\nMachineOptions = [\"virtualbox-cpu-count=999\", \"virtualbox-memory=4096\"]\n"), `[[runners]] 1 ("a"), cpus: cpus must be between 1 and 254; got 999.`},
		{predecessor("a", "eth0") + strings.ReplaceAll(predecessor("b", "eth1"), "concurrent = 4\n", ""), `[[runners]] 1 ("a") has egress_interface "eth0" and [[runners]] 2 ("b") has "eth1"`},
	} {
		res, err := convert.Convert([]byte(tt.src), options)
		if err == nil {
			t.Errorf("%q became\n%s", tt.src, res.Spec)
			continue
		}
		if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%q: %v\nwant %s", tt.src, err, tt.want)
		}
		if strings.Contains(err.Error(), "CANARY") {
			t.Errorf("the error has a secret: %v", err)
		}
	}
}

func predecessor(name, egress string) string {
	return strings.ReplaceAll(section(""), `"a"`, fmt.Sprintf("%q", name)) + fmt.Sprintf(`
  [runners.autoscaler.plugin_config]
    egress_interface = %q
    vm_disk_directory = "/srv/x"
    vm_subnet = "172.16.120."
    vm_num_cpu_cores = 1
    vm_memory_mb = 512
    vm_disk_size_gb = 5
`, egress)
}

// TestSecrets: each secret is in the file that the spec reads it from, and nowhere else.
func TestSecrets(t *testing.T) {
	src, err := os.ReadFile("testdata/configs/aws-spot.toml")
	if err != nil {
		t.Fatal(err)
	}
	o := options
	o.SecretsDir = "/etc/fleetingd/se\"cret"
	res, err := convert.Convert(src, o)
	if err != nil {
		t.Fatal(err)
	}
	const prefix = "/etc/fleetingd/se\"cret/eu-west-spot-runner-prod-"
	want := []convert.Secret{
		{Path: "/etc/fleetingd/se\"cret/gitlab-runner-sentry-dsn", Value: "https://CANARY0123456789abcdef@o12345.ingest.example.com/42"},
		{Path: prefix + "token", Value: "glrt-CANARY-aws-spot-runner-token"},
		{Path: prefix + "cache-s3-accesskey", Value: "AKIACANARYEXAMPLE123"},
		{Path: prefix + "cache-s3-secretkey", Value: "CANARY-s3-secret-key"},
		{Path: prefix + "environment-aws-secret-access-key", Value: "CANARY/secret+access=key"},
	}
	if diff := cmp.Diff(want, res.Secrets); diff != "" {
		t.Errorf("secrets (-want +got)\n%s", diff)
	}
	if !strings.Contains(string(res.Spec), "fleetingd convert has written each one to the file") || strings.Contains(string(res.Spec), "--secrets-dir") {
		t.Errorf("the spec does not say where its secrets are\n%s", res.Spec)
	}
	loaded, _ := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: res.Spec})
	n := 0
	for range loaded.Host.GitLabRunnerSecrets() {
		n++
	}
	for _, r := range loaded.Host.Runners {
		for range r.Secrets() {
			n++
		}
	}
	if n != len(want) {
		t.Errorf("the spec has %d secrets, want %d", n, len(want))
	}
}

// TestLooksSecret: what a comment, or the spec, would show.
func TestLooksSecret(t *testing.T) {
	for _, tt := range []struct {
		line   string
		secret bool
	}{
		{`environment = ["A=glpat-CANARYabc"]`, true},
		{`environment = ["A=xglpat-CANARYabc"]`, true},
		{`environment = ["A=AKIACANARY0123456789"]`, true},
		{`environment = ["MY_PASSWORD=CANARY"]`, true},
		{`environment = ["GITHUB=ghp_CANARY0123456789abcdef"]`, true},
		{`environment = ["JWT=eyJhbGciOiJIUzI1.eyJDQU5BUlki.CANARY"]`, true},
		{`environment = ["P=http://u:CANARY@proxy.example.com"]`, true},
		{`environment = ["AUTH={\"auths\":{\"r\":{\"auth\":\"CANARYQ0FOQVJZ\"}}}"]`, true},
		{`pre_build_script = "docker login -u x -p CANARY r.example.com"`, true},
		{`pre_build_script = "docker login --password CANARY r.example.com"`, true},
		{`pre_build_script = "export NPM_TOKEN=CANARY && npm ci"`, true},
		{`pre_build_script = "curl -u ci:CANARY https://example.com"`, true},
		{`pre_build_script = "curl -H 'Authorization: Bearer CANARYCANARY' https://example.com"`, true},
		{`pre_build_script = "echo -----BEGIN RSA PRIVATE KEY-----\nCANARY"`, true},
		{`no_such_thing = "passwd: $6$CANARYsalt$CANARYhash"`, true},
		{`no_such_secret = "CANARY"`, true},
		{`no_such_credential = 4711`, true},
		{`[runners.no_such_table]` + "\n" + `password = "CANARY"`, true},
		{`pre_build_script = "echo CANARY | docker login -u $U --password-stdin $R"`, false},
		{`pre_build_script = "docker login -u $U -p $CANARY $R"`, false},
		{`environment = ["TOKEN=$CANARY"]`, false},
		{`environment = ["TOKEN_FILE=/run/CANARY"]`, false},
		{`environment = ["URL=https://CANARY.example.com/a:b@c"]`, false},
		{`clone_url = "https://CANARY.example.com"`, false},
		{`[runners.docker]` + "\n" + `volumes = ["/run/secrets:/run/secrets:ro", "/srv/CANARY:/x"]`, false},
		{`[runners.cache.gcs]` + "\n" + `CredentialsFile = "/etc/CANARY.json"`, false},
	} {
		res, err := convert.Convert([]byte(section(tt.line+"\n")), options)
		if err != nil {
			t.Errorf("%s: %v", tt.line, err)
			continue
		}
		shown := strings.Contains(string(res.Spec), "CANARY") || strings.Contains(string(res.Spec), "4711")
		if shown == tt.secret {
			t.Errorf("%s: secret %v, and the spec is\n%s", tt.line, tt.secret, res.Spec)
		}
	}
}

// TestManySecrets: a runner, or a file, can have any number of them.
func TestManySecrets(t *testing.T) {
	var env []string
	for i := range 40 {
		env = append(env, fmt.Sprintf("\"V%d_TOKEN=CANARY%d\"", i, i))
	}
	one := section("environment = [" + strings.Join(env, ", ") + "]\n")
	_, next, _ := strings.Cut(one, "\n")
	res, err := convert.Convert([]byte(one+strings.Repeat(next, 29)), options)
	if err != nil {
		t.Fatal(err)
	}
	paths := map[string]bool{}
	for _, s := range res.Secrets {
		paths[s.Path] = true
	}
	if want := 30 * 41; len(paths) != want || res.Runners != 30 || strings.Contains(string(res.Spec), "CANARY") {
		t.Errorf("%d secrets of %d, %d runners", len(paths), want, res.Runners)
	}
}

// TestSizes: the names that clouds give to sizes.
func TestSizes(t *testing.T) {
	for option, want := range map[string]string{
		"amazonec2-instance-type=t3.micro":         "2 1GiB",
		"amazonec2-instance-type=t3.medium":        "2 4GiB",
		"amazonec2-instance-type=m5.large":         "2 8GiB",
		"amazonec2-instance-type=c6a.2xlarge":      "8 16GiB",
		"amazonec2-instance-type=r5d.4xlarge":      "16 128GiB",
		"amazonec2-instance-type=m7i-flex.large":   "2 8GiB",
		"amazonec2-instance-type=u-6tb1.metal":     "2 4GiB", // not known
		"google-machine-type=n1-standard-8":        "8 32GiB",
		"google-machine-type=e2-highcpu-4":         "4 4GiB",
		"google-machine-type=c2d-highcpu-16":       "16 32GiB",
		"google-machine-type=n2-highmem-2":         "2 16GiB",
		"google-machine-type=custom-2-5120":        "2 5GiB",
		"google-machine-type=g1-small":             "1 2GiB",
		"digitalocean-size=s-2vcpu-4gb":            "2 4GiB",
		"digitalocean-size=c2-4vcpu-8gb-intel":     "4 8GiB",
		"hetzner-server-type=cx22":                 "2 4GiB",
		"azure-size=Standard_D4s_v3":               "4 16GiB",
		"azure-size=Standard_F2s_v2":               "2 4GiB",
		"openstack-flavor-name=m1.large":           "4 8GiB",
		"openstack-flavor-name=r2.4-16":            "2 4GiB", // not known
		"amazonec2-instance-type=m5.99999xlarge":   "2 4GiB", // no such thing
		"google-machine-type=n1-standard-99999999": "2 4GiB",
		"virtualbox-cpu-count=3":                   "3 4GiB",
		"virtualbox-memory=2048":                   "2 2GiB",
	} {
		src := section(fmt.Sprintf("  [runners.machine]\n    MachineOptions = [%q]\n", option))
		res, err := convert.Convert([]byte(src), options)
		if err != nil {
			t.Errorf("%s: %v", option, err)
			continue
		}
		loaded, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: res.Spec})
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		p := loaded.Host.Pools[0]
		if got := fmt.Sprintf("%d %dGiB", p.CPUs, p.Memory>>30); got != want {
			t.Errorf("%s: %s, want %s", option, got, want)
		}
	}
}

// TestPeriods: the periods of docker+machine have seconds before and a year behind.
func TestPeriods(t *testing.T) {
	for period, want := range map[string]string{
		"* * 9-17 * * mon-fri *":      "* 9-17 * * mon-fri",
		"0-59 */5 * * * * *":          "*/5 * * * *",
		"* * * ? * sat,sun *":         "* * * * sat,sun",
		"* * 0-6,22-23 * * SUN-THU *": "* 0-6,22-23 * * 0-4",
		"* 8-18 * * mon-fri":          "* 8-18 * * mon-fri",
		"* 8-18 * * 1-5 *":            "* 8-18 * * 1-5",
		"30 * * * * * *":              "", // seconds
		"* * * * * * 2030":            "", // a year
		"* * * L * * *":               "",
		"@daily":                      "",
	} {
		src := section(fmt.Sprintf("  [runners.machine]\n    IdleCount = 1\n  [[runners.machine.autoscaling]]\n    Periods = [%q]\n    IdleCount = 2\n", period))
		res, err := convert.Convert([]byte(src), options)
		if err != nil {
			t.Errorf("%s: %v", period, err)
			continue
		}
		loaded, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: res.Spec})
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		var got []string
		for _, p := range loaded.Host.Runners[0].Policies[1:] {
			got = append(got, p.Periods...)
		}
		if strings.Join(got, "") != want {
			t.Errorf("%s: %q, want %q", period, got, want)
		}
	}
}

// FuzzConvert: any text becomes a valid spec or an error, and a token is in neither, wherever it stands. Whatever a runner's token, a key of
// its cache or a password is, the spec is the same. Most texts are not TOML, so the seed changes what is: see shake.
func FuzzConvert(f *testing.F) {
	files, err := filepath.Glob("testdata/configs/*.toml")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for _, file := range files {
		src, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		for seed := range uint64(6) {
			f.Add(strings.ReplaceAll(string(src), "CANARY", canary), seed)
		}
	}
	f.Add(section("environment = [\""+canary+"\", \"A="+canary+"\"]\n\""+canary+"\" = \""+canary+"\"\n[runners."+canary+"]\nx = 1\n"), uint64(0))
	f.Add(section("[runners.docker]\nx = [[{a = {b = [nan, inf, 1979-05-27, 07:32:00]}}]]\n[runners.machine.autoscaling.x]\ny = 2\n"), uint64(0))
	f.Fuzz(func(t *testing.T, src string, seed uint64) {
		var doc map[string]any
		if _, err := toml.Decode(src, &doc); err != nil {
			convertAny(t, src)
			return
		}
		if seed == 0 {
			convertAny(t, src)
		} else {
			r := rand.New(rand.NewPCG(seed, 1))
			for range 1 + r.IntN(6) {
				shake(r, doc)
			}
		}
		var specs [2]string
		for i, value := range []string{canary, strings.Repeat("another secret ", 3)} {
			text, ok := encode(withSecrets(doc, value))
			if !ok {
				return
			}
			specs[i] = convertAny(t, text)
		}
		if specs[0] != specs[1] {
			t.Fatalf("the spec depends on a secret\n%s", cmp.Diff(specs[0], specs[1]))
		}
	})
}

// canary looks like a token of GitLab's.
const canary = "glrt-CANARY0123456789"

// convertAny returns the spec of any text at all, or "" where there is none.
func convertAny(t *testing.T, src string) string {
	t.Helper()
	res, err := convert.Convert([]byte(src), options)
	if err != nil {
		if strings.Contains(err.Error(), canary) {
			t.Fatalf("the error has a token: %v", err)
		}
		return ""
	}
	if strings.Contains(string(res.Spec), canary) {
		t.Fatalf("the spec has a token\n%s", res.Spec)
	}
	loaded, diags := hostspec.Load(hostspec.Options{Path: "host.hcl", Source: res.Spec})
	if diags.HasErrors() || loaded.Host == nil {
		t.Fatalf("not a valid spec: %v\n%s", diags, res.Spec)
	}
	if len(loaded.Host.Runners) != res.Runners {
		t.Fatalf("%d runners, and %d", len(loaded.Host.Runners), res.Runners)
	}
	formatted, diags := hostspec.Format(res.Spec, "host.hcl")
	if diags.HasErrors() || string(formatted) != string(res.Spec) {
		t.Fatalf("not formatted\n%s", cmp.Diff(string(res.Spec), string(formatted)))
	}
	return string(res.Spec)
}

// withSecrets is a copy of a config in which each text that a key makes a secret has another value.
func withSecrets(v any, secret string) any {
	switch v := v.(type) {
	case map[string]any:
		out := map[string]any{}
		for key, e := range v {
			text, isText := e.(string)
			if isText && text != "" && slices.Contains([]string{"token", "SecretKey", "AccessKey", "AccountKey", "PrivateKey", "password"}, key) {
				e = secret
			}
			out[key] = withSecrets(e, secret)
		}
		return out
	case []map[string]any:
		out := make([]map[string]any, len(v))
		for i := range v {
			out[i] = withSecrets(v[i], secret).(map[string]any)
		}
		return out
	}
	return v
}

// shake makes one change somewhere in a config: a value of another type, a key gone, or a value under another's key.
func shake(r *rand.Rand, doc map[string]any) {
	var tables []map[string]any
	var collect func(v any)
	collect = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			tables = append(tables, v)
			for _, key := range sortedKeys(v) {
				collect(v[key])
			}
		case []map[string]any:
			for _, e := range v {
				collect(e)
			}
		}
	}
	collect(doc)
	table := tables[r.IntN(len(tables))]
	keys := sortedKeys(table)
	if len(keys) == 0 {
		return
	}
	key := keys[r.IntN(len(keys))]
	values := []any{"", canary, "a=b", "NAME=" + canary, "line\nline ${x}\n%{y}\nEOT\nline\n", "a\r\n\x1b[1m\u202e", "* * * * sun", int64(-1), int64(0), int64(1) << 62, 1.5, math.NaN(),
		true, time.Unix(0, 0).UTC(), []any{}, []any{"a", int64(1), []any{canary}}, []any{map[string]any{"a b": canary}}, map[string]any{}, map[string]any{"for": int64(1), canary: ""}}
	switch r.IntN(4) {
	case 0:
		delete(table, key)
	case 1:
		other := tables[r.IntN(len(tables))]
		for _, o := range sortedKeys(other) {
			flat := map[string]any{}
			if flatten("", other[o], flat); flat[""] != nil && r.IntN(2) == 0 { // no table, which could hold itself then
				table[key] = other[o]
				break
			}
		}
	case 2:
		table[[]string{"for", "a.b", "x y", "ü", "null", canary, "token", "limit", "host", "environment"}[r.IntN(10)]] = values[r.IntN(len(values))]
	default:
		table[key] = values[r.IntN(len(values))]
	}
}

func encode(doc any) (text string, ok bool) {
	defer func() {
		if recover() != nil {
			ok = false // the encoder's, of a list with what it cannot write
		}
	}()
	var b strings.Builder
	err := toml.NewEncoder(&b).Encode(doc)
	return b.String(), err == nil
}
