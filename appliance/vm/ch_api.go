package vm

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/fleetingd/fleetingd/appliance/visible"
)

// chAnswer limits the size of an answer in bytes. The longest expected one is the chain of an error.
const chAnswer = 1 << 20

// chAPI is a client of the part of Cloud Hypervisor's REST API that is used here (vmm/src/api/openapi/cloud-hypervisor.yaml in its
// source). Each call uses a connection of its own: the server accepts ten and serves one request at a time.
type chAPI struct{ socket string }

// chError is an error answer of the API.
type chError struct {
	Call   string
	Status int
	Chain  []string // outermost first
}

func (e *chError) Error() string {
	if len(e.Chain) == 0 {
		return fmt.Sprintf("%s: HTTP status %d", e.Call, e.Status)
	}
	return fmt.Sprintf("%s: %s (HTTP status %d)", e.Call, strings.Join(e.Chain, ": "), e.Status)
}

// chPing is VmmPingResponse.
type chPing struct {
	BuildVersion string `json:"build_version"` // "v53.0.0"
	Version      string `json:"version"`       // "53.0.0"
}

// chConfig is VmConfig. It sets every default that is wrong here. The server silently ignores unknown fields.
type chConfig struct {
	Payload         chPayload     `json:"payload"`
	CPUs            chCPUs        `json:"cpus"`
	Memory          chMemory      `json:"memory"`
	Disks           []chDisk      `json:"disks,omitempty"`
	RateLimitGroups []chRateGroup `json:"rate_limit_groups,omitempty"`
	RNG             chRNG         `json:"rng"`
	Balloon         chBalloon     `json:"balloon"`
	Serial          chConsole     `json:"serial"`
	Console         chConsole     `json:"console"`
	Vsock           chVsock       `json:"vsock"`
	Landlock        bool          `json:"landlock_enable"`
}

type chPayload struct {
	Kernel    string `json:"kernel"`
	Initramfs string `json:"initramfs,omitempty"`
	Cmdline   string `json:"cmdline"`
}

type chCPUs struct {
	Boot   int  `json:"boot_vcpus"`
	Max    int  `json:"max_vcpus"`
	Nested bool `json:"nested"` // the default is true
}

type chMemory struct {
	Size int64 `json:"size"`
}

type chDisk struct {
	ID             string `json:"id"`
	Path           string `json:"path"`
	ReadOnly       bool   `json:"readonly"`
	ImageType      string `json:"image_type"` // always set: otherwise a guest could write a qcow2 header
	Queues         int    `json:"num_queues"`
	Serial         string `json:"serial,omitempty"`
	RateLimitGroup string `json:"rate_limit_group,omitempty"`
}

type chRateGroup struct {
	ID      string        `json:"id"`
	Limiter chRateLimiter `json:"rate_limiter_config"`
}

type chRateLimiter struct {
	Bandwidth *chTokens `json:"bandwidth,omitempty"` // bytes
	Ops       *chTokens `json:"ops,omitempty"`
}

// chTokens is TokenBucket: Size tokens are added every Refill milliseconds.
type chTokens struct {
	Size   int64 `json:"size"`
	Refill int64 `json:"refill_time"`
}

type chRNG struct {
	Source string `json:"src"`
}

type chBalloon struct {
	Size              int64 `json:"size"`
	DeflateOnOOM      bool  `json:"deflate_on_oom"`
	FreePageReporting bool  `json:"free_page_reporting"`
}

// chConsole is ConsoleConfig and SerialConfig. Both default to a terminal.
type chConsole struct {
	Mode string `json:"mode"` // "Off" or "File"
	File string `json:"file,omitempty"`
}

type chVsock struct {
	CID    int    `json:"cid"`
	Socket string `json:"socket"`
}

// chNet is NetConfig for a TAP that is passed as descriptors.
type chNet struct {
	ID      string         `json:"id"`
	MAC     string         `json:"mac"`
	Queues  int            `json:"num_queues"` // two per pair
	Limiter *chRateLimiter `json:"rate_limiter_config,omitempty"`
}

// get and put make one call; call is its name ("vm.boot"), and result may be nil.
func (a chAPI) get(ctx context.Context, call string, result any) error {
	return a.do(ctx, http.MethodGet, call, nil, nil, result)
}

// put sends body, which may be nil (an empty one would be a 400), and files as SCM_RIGHTS.
func (a chAPI) put(ctx context.Context, call string, body any, files ...*os.File) error {
	return a.do(ctx, http.MethodPut, call, body, files, nil)
}

func (a chAPI) do(ctx context.Context, method, call string, body any, files []*os.File, result any) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", a.socket)
	if err != nil {
		return fmt.Errorf("%s: %w", call, err)
	}
	defer conn.Close()
	// The end of the context interrupts the call; its cause is the better error then.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	err = chExchange(conn.(*net.UnixConn), method, call, body, files, result)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%s: no answer: %w", call, context.Cause(ctx))
	}
	return err
}

// chExchange writes one request and reads its answer.
func chExchange(conn *net.UnixConn, method, call string, body any, files []*os.File, result any) error {
	request := new(bytes.Buffer)
	fmt.Fprintf(request, "%s /api/v1/%s HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n", method, call)
	if body == nil {
		request.WriteString("\r\n")
	} else {
		data, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("%s: %w", call, err)
		}
		fmt.Fprintf(request, "Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(data), data)
	}
	if err := chSend(conn, request.Bytes(), files); err != nil {
		return fmt.Errorf("%s: %w", call, err)
	}
	answer, err := http.ReadResponse(bufio.NewReader(io.LimitReader(conn, chAnswer)), &http.Request{Method: method})
	if err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errors.New("the VMM closed the connection without an answer")
		}
		return fmt.Errorf("%s: %w", call, err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		return fmt.Errorf("%s: %w", call, err)
	}
	if answer.StatusCode != http.StatusOK && answer.StatusCode != http.StatusNoContent {
		return &chError{Call: call, Status: answer.StatusCode, Chain: chChain(data)}
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(data, result); err != nil {
		return fmt.Errorf("%s: %w", call, err)
	}
	return nil
}

// chSend writes a request, with its files attached to the first bytes.
func chSend(conn *net.UnixConn, request []byte, files []*os.File) error {
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		n, _, err := conn.WriteMsgUnix(request, unix.UnixRights(fds...), nil)
		if err != nil {
			return err
		}
		request = request[n:]
	}
	if len(request) == 0 {
		return nil
	}
	_, err := conn.Write(request)
	return err
}

// chChain decodes an error's body, which is a JSON array of strings since v50 and was plain text before. The result is safe to print.
func chChain(body []byte) []string {
	var chain []string
	if err := json.Unmarshal(body, &chain); err != nil {
		chain = strings.Split(strings.TrimSpace(string(body)), "\n")
	}
	const most, longest = 20, 500
	out := make([]string, 0, min(len(chain), most))
	for _, link := range chain[:min(len(chain), most)] {
		if link = visible.Text(strings.TrimSpace(link[:min(len(link), longest)])); link != "" {
			out = append(out, link)
		}
	}
	return out
}
