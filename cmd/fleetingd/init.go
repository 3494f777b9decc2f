package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/fleetingd/fleetingd/appliance/host"
	"github.com/fleetingd/fleetingd/appliance/image"
	"github.com/fleetingd/fleetingd/appliance/vm"
	"github.com/fleetingd/fleetingd/hcl/hostspec"
)

func initCommand() *cli.Command {
	return &cli.Command{
		Name:  "init",
		Usage: "write a first host spec for this machine",
		Description: "Looks at this machine (default route, memory, CPUs, KVM, disks, distribution), asks what it cannot see, and writes a spec with a comment on\n" +
			"each decision. What is given as a flag is not asked; without a terminal all four must be. Nothing on the machine is changed.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "write the spec to `FILE`, or to standard output with -", Value: "host.hcl"},
			&cli.StringFlag{Name: "gitlab-url", Usage: "where GitLab is: `URL`"},
			&cli.StringFlag{Name: "token-file", Usage: "the `FILE` with the runner's token; it is not read now"},
			&cli.StringFlag{Name: "packages", Usage: "what jobs need in the image: Debian packages, `NAME,…`; may be empty"},
			&cli.IntFlag{Name: "workers", Usage: "`NUMBER` of jobs at once, each in a VM of its own"},
			&cli.BoolFlag{Name: "force", Usage: "overwrite the spec if it exists"},
		},
		Action: initHost,
	}
}

func initHost(c *cli.Context) error {
	if c.NArg() != 0 {
		return usageError{fmt.Errorf("init takes no arguments; got %q: fleetingd init -o host.hcl", c.Args().First())}
	}
	out, force := c.String("output"), c.Bool("force")
	if out == "" {
		return usageError{errors.New("init: where to? Write -o FILE, or -o - for standard output")}
	}
	if out != "-" && !force {
		if err := mustNotExist(out); err != nil {
			return fmt.Errorf("init: %w", err)
		}
	}
	in := &initInput{c: c, terminal: term.IsTerminal(int(os.Stdin.Fd()))}
	if err := in.flags(); err != nil {
		return err
	}
	survey, err := host.Look(c.Context, initStateDir, host.Probes{KVM: vm.ProbeKVM, CanClone: image.CanClone})
	if err != nil {
		return fmt.Errorf("init: %w", err)
	}
	answers, err := in.answers(survey)
	if err != nil {
		return err
	}
	facts := initFacts{Survey: survey, gitlab: resolveGitLab(c, answers.url)}
	facts.subnet, _ = host.FreeSubnet(initSubnetBits(answers.workers))
	text, err := initSpec(facts, answers)
	if err != nil {
		return fmt.Errorf("init: %w", err)
	}
	return writeInit(c, out, text, answers)
}

// writeInit checks the spec, writes it, and says what comes next.
func writeInit(c *cli.Context, out string, text []byte, a initAnswers) error {
	name := out
	if out == "-" {
		name = "host.hcl"
	}
	res, diags := hostspec.Load(hostspec.Options{Path: name, Source: text})
	printDiagnostics(c.App.ErrWriter, res.Files, diags)
	if diags.HasErrors() {
		return errDiagnosed
	}
	if out == "-" {
		_, err := c.App.Writer.Write(text)
		return err
	}
	if err := writeFile(out, text, 0o644, c.Bool("force")); err != nil {
		return fmt.Errorf("init: %w", err)
	}
	p := res.Host.Pools[0]
	fmt.Fprintf(c.App.Writer, "%s: host %s, %s with %s and %s each\n", out, res.Host.Name, count(p.MaxInstances, "worker"), count(p.CPUs, "CPU"), sizeText(p.Memory))
	if _, err := os.Stat(a.tokenFile); errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(c.App.Writer, "Put the runner's token into %s (mode 0600).\n", a.tokenFile)
	}
	fmt.Fprintf(c.App.Writer, "Read the spec. Then: fleetingd doctor %[1]s, and fleetingd apply %[1]s\n", out)
	return nil
}

// resolveGitLab asks for GitLab's addresses: workers must be allowed to private ones. No answer is no failure, since doctor asks again.
func resolveGitLab(c *cli.Context, text string) []netip.Addr {
	u, err := url.Parse(text)
	if err != nil {
		return nil
	}
	if a, err := netip.ParseAddr(u.Hostname()); err == nil {
		return []netip.Addr{a.Unmap().WithZone("")}
	}
	const patience = 3 * time.Second
	ctx, cancel := context.WithTimeout(c.Context, patience)
	defer cancel()
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", u.Hostname())
	if err != nil {
		fmt.Fprintf(c.App.ErrWriter, "fleetingd: init: cannot resolve %s now (%v); if its address is private, allow it with an egress block\n", u.Hostname(), err)
		return nil
	}
	for i := range found {
		found[i] = found[i].Unmap().WithZone("")
	}
	return found
}

// initInput is where the answers come from: flags, then questions.
type initInput struct {
	c        *cli.Context
	terminal bool
	lines    *bufio.Reader
}

// initQuestion is one thing that no look at the machine tells.
type initQuestion struct {
	flag, text string
	proposed   string // for an empty answer; "" takes none, unless empty answers are fine
	empty      bool
	set        func(a *initAnswers, answer string) error
}

func initQuestions(most, proposed int) []initQuestion {
	room := ""
	if most > 0 {
		room = fmt.Sprintf(" (this machine has room for %d)", most)
	}
	return []initQuestion{
		{flag: "gitlab-url", text: "URL of GitLab, such as https://gitlab.example.com", set: func(a *initAnswers, s string) error {
			a.url = s
			return hostspec.CheckURL(s)
		}},
		{flag: "token-file", text: "File with the runner's token", proposed: "/etc/fleetingd/gitlab-token", set: func(a *initAnswers, s string) (err error) {
			a.tokenFile, err = filepath.Abs(s)
			return err
		}},
		{flag: "packages", text: "Debian packages that jobs need, such as build-essential docker.io", empty: true, set: func(a *initAnswers, s string) error {
			a.packages = nil
			for name := range strings.FieldsFuncSeq(s, func(r rune) bool { return r == ',' || r == ' ' || r == '\t' }) {
				if err := hostspec.CheckPackage(name); err != nil {
					return err
				}
				if !slices.Contains(a.packages, name) {
					a.packages = append(a.packages, name)
				}
			}
			return nil
		}},
		{flag: "workers", text: "Jobs at once, each in a VM of its own" + room, proposed: strconv.Itoa(proposed), set: func(a *initAnswers, s string) error {
			n, err := strconv.Atoi(s)
			switch {
			case err != nil || n < 1:
				return errors.New("it must be a whole number, 1 or more")
			case most > 0 && n > most:
				return fmt.Errorf("this machine has room for %d", most)
			}
			a.workers = n
			return nil
		}},
	}
}

// flags checks the flags, before anything is looked at or asked.
func (in *initInput) flags() error {
	var missing []string
	for _, q := range initQuestions(0, 1) {
		if !in.c.IsSet(q.flag) {
			missing = append(missing, "--"+q.flag)
			continue
		}
		answer := fmt.Sprint(in.c.Value(q.flag))
		if answer == "" && !q.empty {
			return usageError{fmt.Errorf("init: --%s is empty", q.flag)}
		}
		if err := q.set(&initAnswers{}, answer); err != nil {
			return usageError{fmt.Errorf("init: --%s: %w", q.flag, err)}
		}
	}
	if len(missing) > 0 && !in.terminal {
		return usageError{fmt.Errorf("init: there is no terminal to ask on: write %s, too", strings.Join(missing, ", "))}
	}
	return nil
}

// answers takes the flags, and asks for the rest.
func (in *initInput) answers(s host.Survey) (initAnswers, error) {
	var a initAnswers
	if in.c.IsSet("workers") {
		// initSpec says why so many do not fit.
		a.workers = in.c.Int("workers")
	} else if mostWorkers(s) == 0 {
		_, err := sizeWorkers(s, 1)
		return a, fmt.Errorf("init: %w", err)
	}
	if in.terminal {
		fmt.Fprintf(in.c.App.ErrWriter, "This is %s, with %s.\n", plainLine(describe(s)), resources(s))
	}
	for _, q := range initQuestions(mostWorkers(s), proposedWorkers(s)) {
		switch {
		case q.flag == "workers" && in.c.IsSet(q.flag):
		case in.c.IsSet(q.flag):
			if err := q.set(&a, fmt.Sprint(in.c.Value(q.flag))); err != nil {
				return a, err
			}
		default:
			if err := in.ask(q, &a); err != nil {
				return a, err
			}
		}
	}
	return a, nil
}

// ask asks until the answer is right.
func (in *initInput) ask(q initQuestion, a *initAnswers) error {
	if in.lines == nil {
		in.lines = bufio.NewReader(in.c.App.Reader)
	}
	for {
		proposed := ""
		if q.proposed != "" {
			proposed = " [" + q.proposed + "]"
		}
		fmt.Fprintf(in.c.App.ErrWriter, "%s%s: ", q.text, proposed)
		line, err := in.lines.ReadString('\n')
		if err != nil {
			fmt.Fprintln(in.c.App.ErrWriter)
			return fmt.Errorf("init: no answer to the question for --%s (%w); nothing was written", q.flag, err)
		}
		answer := strings.TrimSpace(line)
		if answer == "" {
			answer = q.proposed
		}
		if answer == "" && !q.empty {
			continue
		}
		if err := q.set(a, answer); err != nil {
			fmt.Fprintf(in.c.App.ErrWriter, "  %v\n", err)
			continue
		}
		return nil
	}
}
