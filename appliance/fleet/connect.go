package fleet

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
)

// checkSettings refuses connector_config values with which no job could ever reach a worker.
func checkSettings(s provider.Settings, user string) error {
	var errs []error
	if s.Protocol != "" && s.Protocol != provider.ProtocolSSH {
		errs = append(errs, fmt.Errorf("connector_config protocol = %q: workers are reached by ssh; leave it out", s.Protocol))
	}
	if s.OS != "" && s.OS != "linux" {
		errs = append(errs, fmt.Errorf("connector_config os = %q: workers run linux; leave it out", s.OS))
	}
	if !s.UseStaticCredentials && s.Username != "" && s.Username != user {
		errs = append(errs, fmt.Errorf("connector_config username = %q, but a worker's key is made for the image's "+
			"user %q: leave it out, set user in the image, or write use_static_credentials = true and bring the key",
			s.Username, user))
	}
	return errors.Join(errs...)
}

func (g *Group) user() string {
	if g.settings.Username != "" {
		return g.settings.Username
	}
	return g.image.User
}

// ConnectInfo is how to reach a running worker. With use_static_credentials it is what connector_config
// says, as other plugins do it, and the worker's own key otherwise.
func (g *Group) ConnectInfo(_ context.Context, id string) (provider.ConnectInfo, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	w, ok := g.workers[id]
	if !ok {
		return provider.ConnectInfo{}, fmt.Errorf("there is no worker %s", id)
	}
	if w.state != provider.StateRunning {
		return provider.ConnectInfo{}, fmt.Errorf("worker %s is %s, not running", id, w.state)
	}
	info := provider.ConnectInfo{
		ConnectorConfig: g.settings.ConnectorConfig,
		ID:              id,
		InternalAddr:    w.slot.Address.String(),
		ExternalAddr:    w.slot.Address.String(),
	}
	info.OS = "linux"
	if info.Arch == "" {
		info.Arch = runtime.GOARCH
	}
	info.Protocol = provider.ProtocolSSH
	info.ProtocolPort = g.sshPort()
	info.Username = g.user()
	if !info.UseStaticCredentials {
		info.Password, info.Key = "", w.key
	}
	return info, nil
}
