package host

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	needs "github.com/fleetingd/fleetingd/appliance/need"
)

// doorCase is a Write that is hurt at each of its system calls. Everything lies below the folder that its functions are given.
type doorCase struct {
	door         func(root string) Door
	setup        func(t *testing.T, root string) // what is there before
	name         string
	before, want State
	folders      []string // in which system calls are hurt
	// files are more places where they are; tools are those of programs that the door runs, and hurt in the place of its own.
	files, tools []string
	// same is what must be equal again; nil is tree.
	same func(t *testing.T, root string) map[string]string
}

// hurtable are the system calls that change something, or make it last.
const hurtable = "openat,mkdirat,write,fchmod,fchmodat,fchown,fchownat,fsync,renameat,renameat2,unlinkat,rename,unlink,link,linkat"

func (c doorCase) hurtable() []string {
	if len(c.tools) > 0 {
		return c.tools
	}
	return strings.Split(hurtable, ",")
}

// hurt runs one Write in a process of its own for each of its system calls and each of {an error, killed before it}. After each of them a
// second Write of the same state, and one of the former, must end right, and nothing else may be left.
func (c doorCase) hurt(t *testing.T, self string) {
	t.Helper()
	needs.Root(t)
	needs.Tools(t, "strace")
	calls := c.calls(t, self)
	if len(calls) < 3 {
		t.Fatalf("only %d system calls were seen: %v", len(calls), calls)
	}
	failed, killed := 0, 0
	for _, call := range calls {
		for _, fault := range []string{"error=EIO", "signal=KILL"} {
			root := c.ready(t)
			out, err := c.child(self, root, "-e", fmt.Sprintf("inject=%s:%s:when=%d", call.name, fault, call.nth))
			what := fmt.Sprintf("%s %d, %s", call.name, call.nth, fault)
			switch {
			case strings.Contains(string(out), "killed by SIGKILL"):
				killed++
			case err != nil:
				failed++
			case fault == "signal=KILL":
				t.Errorf("%s: the process lived on: %s", what, out)
			}
			c.recovers(t, root, what)
		}
	}
	t.Logf("%s: %d system calls × {error, kill}: %d failed, %d were killed; all recovered", c.name, len(calls), failed, killed)
	if killed < len(calls) || failed == 0 {
		t.Errorf("faults missed: %d calls, %d failed, %d killed", len(calls), failed, killed)
	}
}

func (c doorCase) ready(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	if c.setup != nil {
		c.setup(t, root)
	}
	c.write(t, root, c.before)
	return root
}

func (c doorCase) recovers(t *testing.T, root, what string) {
	t.Helper()
	same := c.same
	if same == nil {
		same = tree
	}
	undone := c.ready(t)
	written := c.ready(t)
	c.write(t, written, c.want)
	for i, s := range []State{c.want, c.before} {
		c.write(t, root, s)
		found, err := c.door(root).Read(t.Context(), []string{c.name})
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if diff := cmp.Diff(s, found[c.name]); diff != "" {
			t.Fatalf("%s: (-want +have)\n%s", what, diff)
		}
		if diff := cmp.Diff(same(t, []string{written, undone}[i]), same(t, root)); diff != "" {
			t.Fatalf("%s: after Write of %v (-undisturbed +have)\n%s", what, s, diff)
		}
	}
}

func (c doorCase) write(t *testing.T, root string, s State) {
	t.Helper()
	if err := c.door(root).Write(context.Background(), c.name, s); err != nil {
		t.Fatal(err)
	}
}

// tree lists what is below a folder, with modes, owners and contents; but for temporary files of renameio,
// which a kill leaves, and notes with a random key.
func tree(t *testing.T, root string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || regexp.MustCompile(`^(\.\w+\.json\d+|secrets\.json)$`).MatchString(d.Name()) {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st := stat(fi)
		text := fmt.Sprintf("%o %d:%d", st.Mode, st.Uid, st.Gid)
		if fi.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += " " + string(b)
		}
		rel, err := filepath.Rel(root, path)
		found[rel] = text
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

type systemCall struct {
	name string
	nth  int
}

const childOrder = "FLEETINGD_TEST_DOOR_CHILD"

// child runs the Write of want in a process under strace.
func (c doorCase) child(self, root string, args ...string) ([]byte, error) {
	args = append([]string{"-f", "-qq", "-e", "trace=" + strings.Join(c.hurtable(), ",")}, args...)
	for _, file := range c.files {
		args = append(args, "-P", filepath.Join(root, file))
	}
	for _, dir := range c.folders {
		at := filepath.Join(root, dir)
		args = append(args, "-P", at, "-P", filepath.Join(at, partOf(filepath.Base(c.name))))
	}
	cmd := exec.Command("strace", append(args, os.Args[0], "-test.run=^"+self+"$", "-test.count=1")...)
	cmd.Env = append(os.Environ(), childOrder+"="+root)
	return cmd.CombinedOutput()
}

// calls are the system calls of an undisturbed Write.
func (c doorCase) calls(t *testing.T, self string) []systemCall {
	t.Helper()
	root := c.ready(t)
	out, err := c.child(self, root)
	if err != nil {
		if needs.Full() {
			t.Fatalf("%v\n%s", err, out)
		}
		t.Skipf("skipped: strace cannot trace here: %v\n%s", err, out)
	}
	line := regexp.MustCompile(`(?m)^(\[pid +\d+\] )?(\w+)\(`)
	seen := map[string]int{}
	var calls []systemCall
	for _, m := range line.FindAllStringSubmatch(string(out), -1) {
		if !slices.Contains(c.hurtable(), m[2]) {
			continue
		}
		seen[m[1]+m[2]]++ // strace counts the calls of each process; of two tools, the first that gets so far is hurt
		if call := (systemCall{m[2], seen[m[1]+m[2]]}); !slices.Contains(calls, call) {
			calls = append(calls, call)
		}
	}
	return calls
}

// isChild does the Write and reports true in the process that child started.
func (c doorCase) isChild(t *testing.T) bool {
	t.Helper()
	root := os.Getenv(childOrder)
	if root == "" {
		return false
	}
	runtime.LockOSThread() // strace counts the calls of each thread
	if err := c.door(root).Write(t.Context(), c.name, c.want); err != nil {
		t.Fatal(err)
	}
	return true
}

func TestFileFaults(t *testing.T) {
	c := doorCase{
		door: func(root string) Door { return NewTree(root, "/notes.json").Files() },
		name: "/etc/made/here/x.conf", want: State{"content": "new\n", "mode": "0640", "owner": "root", "group": "12345"},
		folders: []string{"etc", "etc/made", "etc/made/here"},
		setup: func(t *testing.T, root string) {
			if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
				t.Fatal(err)
			}
		},
	}
	if !c.isChild(t) {
		c.hurt(t, "TestFileFaults")
	}
}

func TestFileReplaceFaults(t *testing.T) {
	c := doorCase{
		door: func(root string) Door { return NewTree(root, "/notes.json").Files() },
		name: "/x.conf", before: State{"content": "old, and longer\n", "mode": "4755", "owner": "12345", "group": "root"},
		want:    State{"content": "new\n", "mode": "0600", "owner": "root", "group": "root"},
		folders: []string{"."},
	}
	if c.isChild(t) {
		return
	}
	c.hurt(t, "TestFileReplaceFaults")
	// What a power cut would take, no test can: the file is flushed before it gets its name, and its folder after that.
	var order []string
	for _, call := range c.calls(t, "TestFileReplaceFaults") {
		if call.name == "fsync" || strings.HasPrefix(call.name, "rename") {
			order = append(order, call.name)
		}
	}
	if diff := cmp.Diff([]string{"fsync", "renameat", "fsync"}, order); diff != "" {
		t.Errorf("what is flushed when (-want +have)\n%s", diff)
	}
}

func TestFileRemoveFaults(t *testing.T) {
	c := doorCase{
		door: func(root string) Door { return NewTree(root, "/notes.json").Files() },
		name: "/made/x.conf", before: State{"content": "old\n", "mode": "0644", "owner": "root", "group": "root"},
		folders: []string{".", "made"},
	}
	if !c.isChild(t) {
		c.hurt(t, "TestFileRemoveFaults")
	}
}

func TestFolderFaults(t *testing.T) {
	c := doorCase{
		door: func(root string) Door { return NewTree(root, "/notes.json").Folders() },
		name: "/made/folder", want: State{"mode": "2750", "owner": "12345", "group": "root"},
		folders: []string{".", "made", "made/folder"},
	}
	if !c.isChild(t) {
		c.hurt(t, "TestFolderFaults")
	}
}
