package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/rpc"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
	"golang.org/x/sys/unix"
)

// backVariable is in a back's environment and nobody else's: it holds the pid of the process that started the front. Descriptor
// linkFD is the connection to the front, runnerFD a pidfd of that process.
const (
	backVariable = "FLEETINGD_PLUGIN_BACK"
	linkFD       = 3
	runnerFD     = 4
)

const (
	// birthTimeout is how long a back may take to start and to do Init.
	birthTimeout = 45 * time.Second // GitLab Runner gives Init a minute
	// quietTimeout is how long a replacement waits for workers that are being made.
	quietTimeout = 10 * time.Minute
	// goneTimeout is how long a back that has shut down may take to exit.
	goneTimeout = 5 * time.Second
)

// What the halves say to each other by net/rpc, which takes only exported types.
type (
	// InitArgs are what GitLab Runner gives the plugin at Init.
	InitArgs struct {
		Config   []byte // plugin_config as JSON
		Settings provider.Settings
	}
	// ShutdownArgs say how long Shutdown may take.
	ShutdownArgs struct{ Timeout time.Duration }
	// ShownWorker is one worker of an Update.
	ShownWorker struct {
		ID    string
		State provider.State
	}
)

// errBackGone is a call to a back that has ended before it answered.
var errBackGone = errors.New("the plugin's working half ended")

// back is the front's end of the connection to a back.
type back struct {
	pid    int
	client *rpc.Client
	gone   chan struct{} // closed when its process has ended

	mu  sync.Mutex
	err error // how it ended
}

// launchOptions say what a back is for.
type launchOptions struct {
	fresh bool // the binary that is installed now, or nothing
}

// launcher starts backs.
type launcher struct {
	path   string   // of the program, as the front was called
	env    []string // as the front was given it
	stderr *os.File // what the runner reads the log from
	parent int      // pid of the process that started the front
	pidfd  *os.File // of it
}

// newLauncher remembers what a back needs to know of the front's surroundings, before go-plugin redirects standard error.
func newLauncher() (*launcher, error) {
	l := &launcher{stderr: os.Stderr, parent: os.Getppid(), env: os.Environ()}
	// By the name that we were called by, not by the file that was behind it then: an upgrade puts another one there.
	if path, err := exec.LookPath(os.Args[0]); err == nil {
		l.path = path
	} else if path, err = os.Executable(); err == nil {
		l.path = path
	} else {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	fd, err := unix.PidfdOpen(l.parent, 0)
	if err != nil {
		return nil, fmt.Errorf("watch the process that started the plugin: %w", err)
	}
	l.pidfd = os.NewFile(uintptr(fd), "pidfd")
	return l, nil
}

// launch starts a back. Where the installed program cannot be executed, as in the middle of an upgrade, it is the program that is
// running already.
func (l *launcher) launch(o launchOptions) (*back, error) {
	b, err := l.exec(l.path)
	if err != nil && !o.fresh {
		var again error
		if b, again = l.exec("/proc/self/exe"); again != nil {
			err = errors.Join(err, again)
		} else {
			err = nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("start the plugin's working half: %w", err)
	}
	return b, nil
}

func (l *launcher) exec(path string) (*back, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "back"), os.NewFile(uintptr(pair[1]), "front")
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(slices.Clip(l.env), backVariable+"="+strconv.Itoa(l.parent))
	cmd.Stderr = l.stderr // the runner reads the log of both halves from one pipe
	cmd.ExtraFiles = []*os.File{theirs, l.pidfd}
	if err := cmd.Start(); err != nil {
		conn.Close()
		return nil, err
	}
	b := &back{pid: cmd.Process.Pid, client: rpc.NewClient(conn), gone: make(chan struct{})}
	go func() {
		err := cmd.Wait()
		b.mu.Lock()
		b.err = err
		b.mu.Unlock()
		b.client.Close()
		close(b.gone)
	}()
	return b, nil
}

// reason is how the back ended.
func (b *back) reason() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		return "exit status 0"
	}
	return b.err.Error()
}

// call asks the back. Its error is the back's own, errBackGone, or ctx's.
func (b *back) call(ctx context.Context, method string, args, reply any) error {
	call := b.client.Go("Back."+method, args, reply, make(chan *rpc.Call, 1))
	select {
	case <-call.Done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	_, said := errors.AsType[rpc.ServerError](call.Error)
	switch {
	case call.Error == nil:
		return nil
	case said:
		return errors.New(call.Error.Error())
	default: // io.EOF, rpc.ErrShutdown, a reset
		return fmt.Errorf("%w (%w)", errBackGone, call.Error)
	}
}

// end closes the connection to a back that has shut down, and waits for its exit.
func (b *back) end(ctx context.Context) {
	b.client.Close()
	select {
	case <-b.gone:
	case <-ctx.Done():
		b.kill()
	case <-time.After(goneTimeout):
		b.kill()
	}
}

// kill ends a back that has done nothing yet, or that hangs.
func (b *back) kill() {
	select {
	case <-b.gone:
		return
	default:
	}
	if p, err := os.FindProcess(b.pid); err == nil {
		p.Kill()
	}
	<-b.gone
}

// Back is a Group as net/rpc serves it.
type Back struct {
	g *Group

	mu      sync.Mutex
	serving bool // Init is done, and Shutdown was not asked for
}

// serveBack is a back's main function.
func serveBack(g *Group) int {
	parent, err := strconv.Atoi(os.Getenv(backVariable))
	if err != nil {
		fmt.Fprintf(os.Stderr, "fleetingd: %s: %v\n", backVariable, err)
		return 1
	}
	// What we start must not take itself for a back.
	if err := os.Unsetenv(backVariable); err != nil {
		fmt.Fprintf(os.Stderr, "fleetingd: %v\n", err)
		return 1
	}
	unix.CloseOnExec(linkFD)
	unix.CloseOnExec(runnerFD)
	link := os.NewFile(linkFD, "front")
	conn, err := net.FileConn(link)
	link.Close()
	if err != nil {
		fmt.Fprintf(os.Stderr, "fleetingd: the connection to the plugin's other half: %v\n", err)
		return 1
	}
	// Caught and not ignored, since an ignored signal stays so in the VMMs that are started.
	caught := make(chan os.Signal, 1)
	signal.Notify(caught, unix.SIGPIPE, unix.SIGQUIT, unix.SIGHUP, unix.SIGINT)
	go func() {
		for range caught {
			continue
		}
	}()
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)

	b := &Back{g: g}
	server := rpc.NewServer()
	if err := server.Register(b); err != nil {
		fmt.Fprintf(os.Stderr, "fleetingd: %v\n", err)
		return 1
	}
	closed := make(chan struct{})
	go func() {
		server.ServeConn(conn)
		close(closed)
	}()
	reason := "SIGTERM"
	select {
	case <-term:
	case <-closed:
		reason = "the plugin's other half is gone"
		b.endRunner(parent)
	}
	return g.endOnce(reason)
}

// endRunner ends GitLab Runner gracefully where the front was killed and the runner lives on: it would never start a plugin again,
// and take no job. SIGQUIT lets its jobs end; then systemd starts it anew. Nobody else is sent one: a test or `fleetingd run` may have
// started the front.
func (b *Back) endRunner(pid int) {
	b.mu.Lock()
	serving := b.serving
	b.mu.Unlock()
	if !serving {
		return
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil || strings.TrimSpace(string(comm)) != runnerName {
		return
	}
	b.g.log.Error("the plugin's front half was killed, and GitLab Runner does not start one again: ending the runner in order "+
		"(SIGQUIT), so that its service starts it anew", "pid", pid)
	// The pidfd is of the process that started the front, whoever has its number now.
	if err := unix.PidfdSendSignal(runnerFD, unix.SIGQUIT, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		b.g.log.Error("end GitLab Runner", "pid", pid, "error", err)
	}
}

// runnerName is the runner's name in /proc/PID/comm.
const runnerName = "gitlab-runner"

// Init does the Group's.
func (b *Back) Init(args InitArgs, info *provider.ProviderInfo) (err error) {
	if err := json.Unmarshal(args.Config, b.g); err != nil {
		return err
	}
	if *info, err = b.g.Init(context.Background(), backLog(), args.Settings); err != nil {
		return err
	}
	b.mu.Lock()
	b.serving = true
	b.mu.Unlock()
	return nil
}

// backLog writes what go-plugin's client, in the runner, reads as log entries: as fleeting's plugin.Serve makes it.
func backLog() hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: os.Stderr, JSONFormat: true})
}

// Check is Init without taking the pool: it tells whether a changed plan would do.
func (b *Back) Check(args InitArgs, _ *struct{}) error {
	if err := json.Unmarshal(args.Config, b.g); err != nil {
		return err
	}
	return b.g.tryOut(context.Background(), args.Settings)
}

// Creating is how many workers are being made.
func (b *Back) Creating(_ struct{}, n *int) error {
	*n = b.g.creating()
	return nil
}

// Update lists the workers as they are to be shown.
func (b *Back) Update(_ struct{}, all *[]ShownWorker) error {
	return b.g.Update(context.Background(), func(id string, s provider.State) { *all = append(*all, ShownWorker{id, s}) })
}

// Increase is the Group's. net/rpc carries either an answer or an error, as gRPC does.
func (b *Back) Increase(n int, made *int) (err error) {
	*made, err = b.g.Increase(context.Background(), n)
	return err
}

// Decrease is the Group's.
func (b *Back) Decrease(ids []string, removed *[]string) (err error) {
	*removed, err = b.g.Decrease(context.Background(), ids)
	return err
}

// ConnectInfo is the Group's.
func (b *Back) ConnectInfo(id string, info *provider.ConnectInfo) (err error) {
	*info, err = b.g.ConnectInfo(context.Background(), id)
	return err
}

// Heartbeat is the Group's.
func (b *Back) Heartbeat(id string, _ *struct{}) error {
	return b.g.Heartbeat(context.Background(), id)
}

// Shutdown is the Group's. After it, the front's end is in order.
func (b *Back) Shutdown(args ShutdownArgs, _ *struct{}) error {
	b.mu.Lock()
	b.serving = false
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), args.Timeout)
	defer cancel()
	return b.g.Shutdown(ctx)
}
