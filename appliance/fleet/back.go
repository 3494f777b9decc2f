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

// backVariable is only in a back's environment, and holds the pid of the process that started the front. Descriptor
// linkFD is the connection to the front, runnerFD a pidfd of that process.
const (
	backVariable = "FLEETINGD_PLUGIN_BACK"
	linkFD       = 3
	runnerFD     = 4
)

const (
	// birthTimeout is how long a back may take to start and to complete Init.
	birthTimeout = 45 * time.Second // GitLab Runner gives Init a minute
	// quietTimeout is how long a replacement waits for workers that are being created.
	quietTimeout = 10 * time.Minute
	// goneTimeout is how long a back that has shut down may take to exit.
	goneTimeout = 5 * time.Second
)

// The halves' messages. net/rpc requires exported types.
type (
	// InitArgs are the arguments that GitLab Runner passes to Init.
	InitArgs struct {
		Config   []byte // plugin_config as JSON
		Settings provider.Settings
	}
	// ShutdownArgs limits the time that Shutdown may take.
	ShutdownArgs struct{ Timeout time.Duration }
	// ShownWorker is one worker of an Update.
	ShownWorker struct {
		ID    string
		State provider.State
	}
)

// errBackGone is the error of a call to a back that ended before it answered.
var errBackGone = errors.New("the plugin's working half ended")

// back is the front's end of the connection to a back.
type back struct {
	pid    int
	client *rpc.Client
	gone   chan struct{} // closed once its process has ended

	mu  sync.Mutex
	err error // how it ended
}

// launchOptions configure a launch.
type launchOptions struct {
	fresh bool // only the currently installed binary will do
}

// launcher starts backs.
type launcher struct {
	path   string   // of the program, by the name that the front was called by
	env    []string // the front's
	stderr *os.File // where the runner reads the log
	parent int      // pid of the process that started the front
	pidfd  *os.File // of parent
}

// newLauncher records what a back inherits from the front, before go-plugin redirects standard error.
func newLauncher() (*launcher, error) {
	l := &launcher{stderr: os.Stderr, parent: os.Getppid(), env: os.Environ()}
	// The name that the front was called by, not the file behind it: an upgrade replaces that file.
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

// launch starts a back. If the installed program cannot be executed, for example during an upgrade, it uses the running program
// instead, unless o.fresh is set.
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
	cmd.Stderr = l.stderr // the runner reads the log of both halves from the same pipe
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

// reason returns how the back ended.
func (b *back) reason() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		return "exit status 0"
	}
	return b.err.Error()
}

// call calls a method of the back. Its error is the back's own, errBackGone, or ctx's.
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

// kill ends a back that has not done anything yet, or that hangs.
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

// Back serves a Group over net/rpc.
type Back struct {
	g *Group

	mu      sync.Mutex
	serving bool // Init has succeeded, and Shutdown was not called
}

// serveBack is the main function of a back.
func serveBack(g *Group) int {
	parent, err := strconv.Atoi(os.Getenv(backVariable))
	if err != nil {
		fmt.Fprintf(os.Stderr, "fleetingd: %s: %v\n", backVariable, err)
		return 1
	}
	// Children must not take themselves for a back.
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
	// Caught, not ignored, since VMMs would inherit ignored signals.
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
		reason = "the plugin's other half has ended"
		b.endRunner(parent)
	}
	return g.endOnce(reason)
}

// endRunner ends GitLab Runner gracefully if the front was killed and the runner is alive: it would never start a plugin again
// and take no jobs. SIGQUIT lets its jobs end; then systemd restarts it. Only GitLab Runner gets the signal: a test or
// `fleetingd run` may have started the front.
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
	b.g.log.Error("the plugin's front half was killed, and GitLab Runner does not restart it: stopping the runner gracefully "+
		"(SIGQUIT), so that its service restarts it", "pid", pid)
	// The pidfd is safe even if the pid has been reused.
	if err := unix.PidfdSendSignal(runnerFD, unix.SIGQUIT, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		b.g.log.Error("cannot stop GitLab Runner", "pid", pid, "error", err)
	}
}

// runnerName is the runner's name in /proc/PID/comm.
const runnerName = "gitlab-runner"

// Init calls the Group's Init.
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

// backLog writes log entries in the format that go-plugin's client, in the runner, parses: the same as fleeting's plugin.Serve.
func backLog() hclog.Logger {
	return hclog.New(&hclog.LoggerOptions{Level: hclog.Trace, Output: os.Stderr, JSONFormat: true})
}

// Check is Init without locking the pool: it tells whether a changed plan could be used.
func (b *Back) Check(args InitArgs, _ *struct{}) error {
	if err := json.Unmarshal(args.Config, b.g); err != nil {
		return err
	}
	return b.g.tryOut(context.Background(), args.Settings)
}

// Creating returns the number of workers that are being created.
func (b *Back) Creating(_ struct{}, n *int) error {
	*n = b.g.creating()
	return nil
}

// Update lists all workers with their states.
func (b *Back) Update(_ struct{}, all *[]ShownWorker) error {
	return b.g.Update(context.Background(), func(id string, s provider.State) { *all = append(*all, ShownWorker{id, s}) })
}

// Increase calls the Group's Increase. net/rpc carries either an answer or an error, like gRPC.
func (b *Back) Increase(n int, made *int) (err error) {
	*made, err = b.g.Increase(context.Background(), n)
	return err
}

// Decrease calls the Group's Decrease.
func (b *Back) Decrease(ids []string, removed *[]string) (err error) {
	*removed, err = b.g.Decrease(context.Background(), ids)
	return err
}

// ConnectInfo calls the Group's ConnectInfo.
func (b *Back) ConnectInfo(id string, info *provider.ConnectInfo) (err error) {
	*info, err = b.g.ConnectInfo(context.Background(), id)
	return err
}

// Heartbeat calls the Group's Heartbeat.
func (b *Back) Heartbeat(id string, _ *struct{}) error {
	return b.g.Heartbeat(context.Background(), id)
}

// Shutdown calls the Group's Shutdown. The end of the front is expected afterwards.
func (b *Back) Shutdown(args ShutdownArgs, _ *struct{}) error {
	b.mu.Lock()
	b.serving = false
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), args.Timeout)
	defer cancel()
	return b.g.Shutdown(ctx)
}
