# Written by fleetingd convert from config.toml. What has no place in a spec stands beside where it would be,
# in comments that begin with its table: read each of them, since jobs may need what it says.
#
# The secrets are not in here. Put each into the file that stands for it below, readable by root alone. For
# all of them at once:
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
  cpus          = 2 # the source does not say: write what a job needs
  memory        = "4GiB"
  disk          = "30GiB" # the source does not say: write what a job needs
  start         = "cold"
  max_instances = 10
  # [runners.autoscaler.plugin_config]
  #   config_file = "/home/user/.aws/config"
  #   credentials_file = "/home/user/.aws/credentials"
  #   name = "my-docker-asg"
  #   profile = "default"
  #   -> It is for another plugin, which starts machines elsewhere.
}

# The source calls it "docker autoscaler example".
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
  #   -> fleetingd is the plugin, so the workers are VMs on this host.
  # [runners.autoscaler.connector_config] use_external_addr = true
  #   -> A worker is reached over SSH at its own address, as the user of its image and with a key of its own.
  # [runners.autoscaler.connector_config] username = "ec2-user"
  #   -> A worker is reached over SSH at its own address, as the user of its image and with a key of its own.
  # [[runners]] token_obtained_at = 2025-06-17T13:05:47Z
  #   -> GitLab Runner notes it down itself when it renews a token.
  # [[runners]] token_expires_at = 0001-01-01T00:00:00Z
  #   -> GitLab Runner notes it down itself when it renews a token.

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
