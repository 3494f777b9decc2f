package fleet

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"gitlab.com/gitlab-org/fleeting/fleeting/provider"
)

// checkSettings refuses connector_config values with which no job could reach a worker.
func checkSettings(s provider.Settings, user string) error {
	var errs []error
	if s.Protocol != "" && s.Protocol != provider.ProtocolSSH {
		errs = append(errs, fmt.Errorf("connector_config protocol = %q: workers are reached over ssh; omit it", s.Protocol))
	}
	if s.OS != "" && s.OS != "linux" {
		errs = append(errs, fmt.Errorf("connector_config os = %q: workers run linux; omit it", s.OS))
	}
	if !s.UseStaticCredentials && s.Username != "" && s.Username != user {
		errs = append(errs, fmt.Errorf("connector_config username = %q, but workers' keys are for the image's "+
			"user %q: omit it, set user in the image, or set use_static_credentials = true and provide the key",
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

// ConnectInfo returns how to reach a running worker. With use_static_credentials it returns the credentials of
// connector_config, as other plugins do, otherwise the worker's own key.
func (g *Group) ConnectInfo(_ context.Context, id string) (provider.ConnectInfo, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	w, ok := g.workers[id]
	if !ok {
		return provider.ConnectInfo{}, fmt.Errorf("worker %s does not exist", id)
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
	if w.user != "" && !info.UseStaticCredentials {
		info.Username = w.user
	}
	if !info.UseStaticCredentials {
		info.Password, info.Key = "", w.key
	}
	return info, nil
}
