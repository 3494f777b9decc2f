package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
)

// The kinds of the doors to accounts.
const (
	KindUser   Kind = "user"
	KindGroup  Kind = "group"
	KindMember Kind = "member"
)

// Users returns the door to system users: "comment", "home" and "shell" as in passwd(5). A user gets a group of its own name, and both get
// numbers that the host chooses. The home is not created. Files of a user that is removed stay, under its number.
//
// Like the doors of groups and members it has the tools of shadow (useradd and others) do it, also in a tree that is not the host's own.
func (t *Tree) Users() Door { return users{t} }

// Groups returns the door to system groups. A group's State has its "type": "system" for a number below 1000, else "ordinary".
func (t *Tree) Groups() Door { return groups{t} }

// Members returns the door to memberships of users in groups. Its objects are named "USER/GROUP", and their State is {"member": "yes"}. A missing
// group is made (a bare host has no kvm before some package brings it), and goes with its last member.
func (t *Tree) Members() Door { return members{t} }

// eachName reads objects one by one. Its errors name the object.
func eachName(kind Kind, names []string, read func(name string) (State, error)) (map[string]State, error) {
	found := make(map[string]State, len(names))
	var errs []error
	for _, name := range names {
		s, err := read(name)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s %s: %w", kind, name, err))
		}
		found[name] = s
	}
	return found, errors.Join(errs...)
}

// named gives an error its object.
func named(kind Kind, name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", kind, name, err)
}

// lines are the fields of each line of an account file, nil where it is missing.
func (t *Tree) lines(file string, fields int) ([][]string, error) {
	text, err := os.ReadFile(t.onHost(file))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var found [][]string
	for line := range strings.Lines(string(text)) {
		if f := strings.Split(strings.TrimSuffix(line, "\n"), ":"); len(f) >= fields {
			found = append(found, f)
		}
	}
	return found, nil
}

// passwd is a line of passwd(5): name, password, uid, gid, comment, home, shell; nil where there is no such user.
func (t *Tree) passwd(name string) ([]string, error) { return t.line("/etc/passwd", name, 7) }

// groupLine is a line of group(5): name, password, gid, members.
func (t *Tree) groupLine(name string) ([]string, error) { return t.line("/etc/group", name, 4) }

func (t *Tree) line(file, name string, fields int) ([]string, error) {
	all, err := t.lines(file, fields)
	if i := slices.IndexFunc(all, func(f []string) bool { return f[0] == name }); i >= 0 {
		return all[i], nil
	}
	return nil, err
}

// tool runs one of shadow's tools on the tree.
func (t *Tree) tool(ctx context.Context, name string, args ...string) error {
	if !t.live() {
		args = append([]string{"--prefix", t.root}, args...)
	}
	return command(ctx, name, args...)
}

type users struct{ *Tree }

func (d users) Read(_ context.Context, names []string) (map[string]State, error) {
	return eachName(KindUser, names, d.read)
}

func (d users) read(name string) (State, error) {
	f, err := d.passwd(name)
	if err != nil || f == nil {
		return nil, err
	}
	s := State{"comment": f[4], "home": f[5], "shell": f[6]}
	whole, err := d.isWhole(f)
	if !whole {
		s["half"] = "yes"
	}
	return s, err
}

// isWhole reports whether a user has all that useradd makes, one file after the other: a primary group, and a line in shadow(5), if there is
// such a file and we may read it.
func (d users) isWhole(user []string) (bool, error) {
	groups, err := d.lines("/etc/group", 4)
	if err != nil {
		return false, err
	}
	i := slices.IndexFunc(groups, func(g []string) bool { return g[2] == user[3] })
	if i < 0 {
		return false, nil
	}
	_, inShadow, err := d.shadowLine("/etc/shadow", user[0])
	_, inGshadow, err1 := d.shadowLine("/etc/gshadow", groups[i][0])
	return inShadow && inGshadow, errors.Join(err, err1)
}

// shadowLine returns a line of shadow(5) or gshadow(5). Where there is no such file, or we may not read it, every line is there, and nil.
func (t *Tree) shadowLine(file, name string) (fields []string, ok bool, err error) {
	if _, err := os.Lstat(t.onHost(file)); errors.Is(err, fs.ErrNotExist) {
		return nil, true, nil
	}
	fields, err = t.line(file, name, 4)
	if errors.Is(err, fs.ErrPermission) {
		return nil, true, nil
	}
	return fields, fields != nil, err
}

func (d users) Write(ctx context.Context, name string, want State) error {
	return named(KindUser, name, d.write(ctx, name, want))
}

func (d users) write(ctx context.Context, name string, want State) error {
	have, err := d.read(name)
	if err != nil {
		return err
	}
	if want == nil {
		return d.remove(ctx, name)
	}
	if err := onlyKeys(want, "comment", "home", "shell"); err != nil {
		return err
	}
	if have["half"] != "" {
		if err := d.removeHalf(ctx, name); err != nil {
			return err
		}
		have = nil
	}
	set := []string{"--comment", want["comment"], "--home", want["home"], "--shell", want["shell"], name}
	switch {
	case maps.Equal(have, want):
		return nil
	case have != nil:
		return d.tool(ctx, "usermod", set...)
	}
	group, err := d.groupLine(name)
	if err != nil {
		return err
	}
	own := []string{"--user-group"}
	if group != nil { // a killed useradd made it
		own = []string{"--gid", name}
	}
	return d.tool(ctx, "useradd", slices.Concat([]string{"--system", "--no-create-home"}, own, set)...)
}

// removeHalf removes what a killed useradd left. It cannot be in use yet.
func (d users) removeHalf(ctx context.Context, name string) error {
	user, err := d.passwd(name)
	if err != nil || user == nil {
		return err
	}
	if uid, err := strconv.Atoi(user[2]); err != nil || uid >= firstOrdinary {
		return fmt.Errorf("it has uid %s, but no primary group or no line in /etc/shadow; see what pwck and grpck say", user[2])
	}
	return d.remove(ctx, name)
}

func (d users) remove(ctx context.Context, name string) error {
	user, err := d.passwd(name)
	if err != nil {
		return err
	}
	if user != nil {
		if user[2] == "0" {
			return errors.New("it is root")
		}
		if err := d.tool(ctx, "userdel", name); err != nil {
			return err
		}
	}
	// userdel leaves the group in place if login.defs says so, and a killed useradd may have made nothing else.
	group, err := d.groupLine(name)
	if err != nil || group == nil || group[3] != "" {
		return err
	}
	all, err := d.lines("/etc/passwd", 4)
	if err != nil || slices.ContainsFunc(all, func(f []string) bool { return f[3] == group[2] }) {
		return err // somebody's primary group
	}
	return d.tool(ctx, "groupdel", name)
}

type groups struct{ *Tree }

func (d groups) Read(_ context.Context, names []string) (map[string]State, error) {
	return eachName(KindGroup, names, d.read)
}

// firstOrdinary is the first number that is not a system account's (login.defs(5)).
const firstOrdinary = 1000

func (d groups) read(name string) (State, error) {
	f, err := d.groupLine(name)
	if err != nil || f == nil {
		return nil, err
	}
	if gid, err := strconv.Atoi(f[2]); err != nil || gid >= firstOrdinary {
		return State{"type": "ordinary"}, nil
	}
	return State{"type": "system"}, nil
}

func (d groups) Write(ctx context.Context, name string, want State) error {
	return named(KindGroup, name, d.write(ctx, name, want))
}

func (d groups) write(ctx context.Context, name string, want State) error {
	have, err := d.read(name)
	switch {
	case err != nil || maps.Equal(have, want) && (have == nil) == (want == nil):
		return err
	case want == nil:
		return d.tool(ctx, "groupdel", name)
	case have != nil:
		return fmt.Errorf("it exists and is %s; its number stays", have["type"])
	case want["type"] != "system":
		return fmt.Errorf("only system groups are made, not %q", want["type"])
	}
	return d.tool(ctx, "groupadd", "--system", name)
}

type members struct{ *Tree }

func (d members) Read(_ context.Context, names []string) (map[string]State, error) {
	return eachName(KindMember, names, func(name string) (State, error) {
		user, group, err := splitMember(name)
		if err != nil {
			return nil, err
		}
		return d.read(user, group)
	})
}

// read looks at group(5) and gshadow(5): a killed usermod may have changed one of them alone.
func (d members) read(user, group string) (State, error) {
	of, err := d.groupsOf(user)
	if err != nil {
		return nil, err
	}
	is := slices.Contains(of, group)
	line, ok, err := d.shadowLine("/etc/gshadow", group)
	switch {
	case err != nil:
		return nil, err
	case line != nil && slices.Contains(strings.Split(line[3], ","), user) != is, is && !ok:
		return State{"member": "half"}, nil
	case is:
		return State{"member": "yes"}, nil
	}
	return nil, nil
}

func splitMember(name string) (user, group string, err error) {
	user, group, ok := strings.Cut(name, "/")
	if !ok || user == "" || group == "" {
		return "", "", errors.New("a membership is named USER/GROUP")
	}
	return user, group, nil
}

// groupsOf are the supplementary groups of a user, in the order of the file.
func (t *Tree) groupsOf(user string) ([]string, error) {
	all, err := t.lines("/etc/group", 4)
	var of []string
	for _, f := range all {
		if slices.Contains(strings.Split(f[3], ","), user) {
			of = append(of, f[0])
		}
	}
	return of, err
}

func (d members) Write(ctx context.Context, name string, want State) error {
	return named(KindMember, name, d.write(ctx, name, want))
}

func (d members) write(ctx context.Context, name string, want State) error {
	user, group, err := splitMember(name)
	if err != nil {
		return err
	}
	have, err := d.read(user, group)
	of, err1 := d.groupsOf(user)
	switch err := errors.Join(err, err1); {
	case err != nil || maps.Equal(have, want) && want != nil:
		return err
	case want != nil:
		if err := d.makeGroup(ctx, group); err != nil {
			return err
		}
		return d.tool(ctx, "usermod", "--append", "--groups", group, user)
	case have == nil:
		return d.dropGroup(ctx, group)
	}
	rest := slices.DeleteFunc(of, func(g string) bool { return g == group })
	if err := d.tool(ctx, "usermod", "--groups", strings.Join(rest, ","), user); err != nil {
		return err
	}
	return d.dropGroup(ctx, group)
}

func (d members) makeGroup(ctx context.Context, group string) error {
	line, err := d.groupLine(group)
	_, inGshadow, err1 := d.shadowLine("/etc/gshadow", group)
	n, err2 := d.readNotes()
	if err := errors.Join(err, err1, err2); err != nil {
		return err
	}
	ours := slices.Contains(n.Groups, group)
	switch {
	case line != nil && (inGshadow || !ours):
		return nil
	case line != nil: // a killed groupadd left half of it
		if err := d.tool(ctx, "groupdel", group); err != nil {
			return err
		}
	}
	if !ours {
		n.Groups = append(n.Groups, group)
		if err := d.writeNotes(n); err != nil {
			return err
		}
	}
	return d.tool(ctx, "groupadd", "--system", group)
}

// dropGroup removes a group that makeGroup made, when nobody is in it.
func (d members) dropGroup(ctx context.Context, group string) error {
	n, err := d.readNotes()
	if err != nil || !slices.Contains(n.Groups, group) {
		return err
	}
	line, err := d.groupLine(group)
	if err != nil || line != nil && line[3] != "" {
		return err
	}
	if line != nil {
		if err := d.tool(ctx, "groupdel", group); err != nil {
			return err
		}
	}
	n.Groups = slices.DeleteFunc(n.Groups, func(g string) bool { return g == group })
	return d.writeNotes(n)
}
