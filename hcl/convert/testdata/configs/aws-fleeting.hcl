# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    concurrent         = 10
    connection_max_age = "15m0s"
    shutdown_timeout   = 0
  }
}

# Add to packages and run what else the machines of config.toml had.
image "docker" {
  ubuntu {
    release = "noble"
  }

  prebuild {
    packages = ["docker.io"]
    run = [
      "usermod -aG docker ubuntu",
    ]
  }
}

pool "docker-autoscaler-example" {
  image         = image.docker
  cpus          = 2 # not in config.toml: set what jobs need
  memory        = "4GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 10
  # [runners.autoscaler.plugin_config]
  #   config_file = "/home/user/.aws/config"
  #   credentials_file = "/home/user/.aws/credentials"
  #   name = "my-docker-asg"
  #   profile = "default"
  #   -> This configures another plugin.
}

# Called "docker autoscaler example" in config.toml.
runner "docker-autoscaler-example" {
  pool     = pool.docker-autoscaler-example
  url      = "https://gitlab.example.com"
  token    = file("/run/secrets/docker-autoscaler-example-token")
  executor = "docker-autoscaler"

  capacity_per_instance = 1
  max_use_count         = 1

  policy {
    idle_count = 5
    idle_time  = "20m"
  }
  # [runners.autoscaler] plugin = "aws:latest"
  #   -> fleetingd is the plugin here: workers are VMs on this host.
  # [runners.autoscaler.connector_config] use_external_addr = true
  #   -> Workers are reached over SSH at their own address, as the image's user, each with its own key.
  # [runners.autoscaler.connector_config] username = "ec2-user"
  #   -> Workers are reached over SSH at their own address, as the image's user, each with its own key.
  # [[runners]] token_obtained_at = 2025-06-17T13:05:47Z
  #   -> GitLab Runner records this itself when it renews a token.
  # [[runners]] token_expires_at = 0001-01-01T00:00:00Z
  #   -> GitLab Runner records this itself when it renews a token.

  settings = {
    autoscaler = {
      instance_acquire_timeout = "20m"
      scale_throttle = {
        burst = 200
        limit = 100
      }
    }
    docker = {
      allowed_pull_policies = ["if-not-present", "always", "never"]
      image                 = "busybox:latest"
      pull_policy           = ["if-not-present", "always"]
    }
    environment = [
      "DOCKER_AUTH_CONFIG=${file("/run/secrets/docker-autoscaler-example-environment-docker-auth-config")}", # the value that DOCKER_AUTH_CONFIG has in config.toml
    ]
    id    = 5
    limit = 5
  }
}
