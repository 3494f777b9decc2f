package host

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	needs "github.com/fleetingd/fleetingd/appliance/need"
)

// accountFiles are the files of a tree with accounts, without the copies that shadow keeps ("passwd-").
func accountFiles(t *testing.T, root string) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, name := range []string{"passwd", "group", "shadow", "gshadow"} {
		b, err := os.ReadFile(filepath.Join(root, "etc", name))
		if err != nil {
			t.Fatal(err)
		}
		found[name] = string(b)
	}
	return found
}

func shadowTree(t *testing.T) string {
	t.Helper()
	needs.Root(t)
	needs.Tools(t, "useradd", "usermod", "userdel", "groupadd", "groupdel")
	root := accountsTree(t)
	for name, text := range map[string]string{
		"group": "root:x:0:\nfleet:x:991:\nkvm:x:992:fleet\ndocker:x:993:fleet\npeople:x:1000:\n", "shadow": "root:*:1::::::\nfleet:*:1::::::\nalias:*:1::::::\n",
		"gshadow": "root:*::\nfleet:!::\nkvm:!::fleet\ndocker:!::fleet\npeople:!::\n",
	} {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestUsers(t *testing.T) {
	root := shadowTree(t)
	before := accountFiles(t, root)
	tr := NewTree(root, "/notes.json")
	if s := readOne(t, tr.Users(), "fleetingd"); s != nil {
		t.Errorf("a missing user is %v", s)
	}
	want := State{"comment": "fleetingd runner and VMs", "home": "/var/lib/fleetingd/runner", "shell": "/usr/sbin/nologin"}
	for range 2 {
		writeOne(t, tr.Users(), "fleetingd", want)
	}
	user, err := tr.passwd("fleetingd")
	if err != nil || len(user) != 7 || user[1] != "x" || len(user[2]) != 3 {
		t.Errorf("not a system user without a password: %q, %v", user, err)
	}
	if s := readOne(t, tr.Groups(), "fleetingd"); s["type"] != "system" {
		t.Errorf("its group is %v", s)
	}
	if _, err := os.Stat(filepath.Join(root, want["home"])); err == nil {
		t.Error("the home was created; it is a folder of the plan's")
	}
	for range 2 {
		writeOne(t, tr.Members(), "fleetingd/kvm", State{"member": "yes"})
	}
	want["shell"] = "/bin/false"
	writeOne(t, tr.Users(), "fleetingd", want)
	for range 2 {
		writeOne(t, tr.Members(), "fleetingd/kvm", nil)
	}
	for range 2 {
		writeOne(t, tr.Users(), "fleetingd", nil)
	}
	if diff := cmp.Diff(before, accountFiles(t, root)); diff != "" {
		t.Errorf("after all was taken back (-before +after)\n%s", diff)
	}
}

// A user that was there keeps the memberships that are not ours.
func TestMembersOfOthers(t *testing.T) {
	root := shadowTree(t)
	before := accountFiles(t, root)
	d := NewTree(root, "/notes.json").Members()
	if s := readOne(t, d, "fleet/kvm"); s == nil {
		t.Error("fleet is in kvm")
	}
	writeOne(t, d, "fleet/people", State{"member": "yes"})
	writeOne(t, d, "fleet/kvm", nil)
	writeOne(t, d, "fleet/kvm", State{"member": "yes"})
	writeOne(t, d, "fleet/people", nil)
	if diff := cmp.Diff(before, accountFiles(t, root)); diff != "" {
		t.Errorf("after all was taken back (-before +after)\n%s", diff)
	}
}

func TestGroups(t *testing.T) {
	root := shadowTree(t)
	before := accountFiles(t, root)
	d := NewTree(root, "/notes.json").Groups()
	if s := readOne(t, d, "people"); s["type"] != "ordinary" {
		t.Errorf("people: %v", s)
	}
	for range 2 {
		writeOne(t, d, "fresh", State{"type": "system"})
	}
	for range 2 {
		writeOne(t, d, "fresh", nil)
	}
	if diff := cmp.Diff(before, accountFiles(t, root)); diff != "" {
		t.Errorf("after all was taken back (-before +after)\n%s", diff)
	}
}

func TestAccountsRefuse(t *testing.T) {
	root := shadowTree(t)
	passwd, err := os.OpenFile(filepath.Join(root, "etc/passwd"), os.O_APPEND|os.O_WRONLY, 0)
	if err == nil {
		_, err = passwd.WriteString("odd:x:2000:2000::/:/bin/sh\n")
	}
	if err != nil {
		t.Fatal(err)
	}
	before := accountFiles(t, root)
	tr := NewTree(root, "/notes.json")
	for _, c := range []struct {
		door Door
		name string
		want State
		err  string
	}{
		{tr.Users(), "root", nil, "user root: it is root"},
		{tr.Users(), "x", State{"uid": "5"}, `user x: its state has the unknown key "uid"`},
		{tr.Users(), "no:good", State{"comment": "", "home": "/", "shell": "/bin/sh"}, "user no:good: useradd"},
		{tr.Users(), "odd", State{"comment": "", "home": "/", "shell": "/bin/sh"}, "user odd: it has uid 2000, but no primary group"},
		{tr.Groups(), "people", State{"type": "system"}, "group people: it exists and is ordinary"},
		{tr.Members(), "fleet", State{"member": "yes"}, "named USER/GROUP"},
		{tr.Members(), "nosuch/kvm", State{"member": "yes"}, "member nosuch/kvm: usermod"},
	} {
		if err := c.door.Write(t.Context(), c.name, c.want); err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%s: %v; want %q", c.name, err, c.err)
		}
	}
	if diff := cmp.Diff(before, accountFiles(t, root)); diff != "" {
		t.Errorf("something changed (-before +after)\n%s", diff)
	}
}

// shadow's own files are locked, copied and renamed one after the other; a killed tool leaves some of it.
func accountCase(t *testing.T, name string, before, want State, door func(*Tree) Door) doorCase {
	c := doorCase{
		name: name, before: before, want: want, tools: []string{"rename", "unlink", "link", "fsync", "fchmod"},
		door: func(root string) Door { return door(NewTree(root, "/notes.json")) },
		same: accountFiles,
		setup: func(t *testing.T, root string) {
			if out, err := exec.Command("cp", "-a", filepath.Join(shadowTree(t), "etc"), root).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		},
	}
	for _, file := range []string{"passwd", "group", "shadow", "gshadow"} {
		for _, suffix := range []string{"", "+", "-", ".lock"} {
			c.files = append(c.files, "etc/"+file+suffix)
		}
	}
	return c
}

func TestUserFaults(t *testing.T) {
	want := State{"comment": "fleetingd runner and VMs", "home": "/var/lib/fleetingd/runner", "shell": "/usr/sbin/nologin"}
	c := accountCase(t, "fleetingd", nil, want, func(tr *Tree) Door { return tr.Users() })
	if !c.isChild(t) {
		needs.Slow(t)
		c.hurt(t, "TestUserFaults")
	}
}

func TestMemberFaults(t *testing.T) {
	c := accountCase(t, "fleet/people", nil, State{"member": "yes"}, func(tr *Tree) Door { return tr.Members() })
	if !c.isChild(t) {
		needs.Slow(t)
		c.hurt(t, "TestMemberFaults")
	}
}

// A group that a membership made goes with it, and not before.
func TestMemberMakesGroup(t *testing.T) {
	root := shadowTree(t)
	before := accountFiles(t, root)
	d := NewTree(root, "/notes.json").Members()
	for range 2 {
		writeOne(t, d, "fleet/fresh", State{"member": "yes"})
	}
	writeOne(t, d, "alias/fresh", State{"member": "yes"})
	writeOne(t, d, "fleet/fresh", nil)
	if s := readOne(t, d, "alias/fresh"); s == nil {
		t.Error("the group went with its first member")
	}
	for range 2 {
		writeOne(t, d, "alias/fresh", nil)
	}
	if diff := cmp.Diff(before, accountFiles(t, root)); diff != "" {
		t.Errorf("after all was taken back (-before +after)\n%s", diff)
	}
	if _, err := os.Stat(filepath.Join(root, "notes.json")); err == nil {
		t.Error("the notes stayed")
	}
}

func TestMemberMakesGroupFaults(t *testing.T) {
	c := accountCase(t, "fleet/fresh", nil, State{"member": "yes"}, func(tr *Tree) Door { return tr.Members() })
	if !c.isChild(t) {
		needs.Slow(t)
		c.hurt(t, "TestMemberMakesGroupFaults")
	}
}
