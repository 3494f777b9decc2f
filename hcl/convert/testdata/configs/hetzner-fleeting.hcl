# Written by fleetingd convert from config.toml. Settings that a spec has no place for are in comments where
# they would be. Read each of them: jobs may depend on it.
#
# It holds no secrets. Put each one into the file named below, readable by root only. To write all of them at
# once:
#   fleetingd convert config.toml --secrets-dir /etc/fleetingd/secrets -o host.hcl

host "ci-01" {
  egress_interface = "eno1" # the interface of the default route (ip route show default)

  gitlab_runner {
    concurrent = 50
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

pool "hetzner-docker-autoscaler" {
  image         = image.docker
  cpus          = 8 # server-type=cpx42
  memory        = "16GiB"
  disk          = "30GiB" # not in config.toml: set what jobs need
  start         = "cold"
  max_instances = 5
  # [runners.autoscaler.plugin_config]
  #   image = "debian-12"
  #   location = "hel1"
  #   name = "hetzner-docker-autoscaler"
  #   private_networks = []
  #   server_type = "cpx42"
  #   token = "***"
  #   user_data = "#cloud-config\npackage_update: true\npackages:\n  - docker-ce\nchpasswd: { list: \"root:x\", *** }\n"
  #   -> This configures another plugin.
}

# Called "hetzner docker autoscaler" in config.toml.
runner "hetzner-docker-autoscaler" {
  pool     = pool.hetzner-docker-autoscaler
  url      = "https://gitlab.com"
  token    = file("/run/secrets/hetzner-docker-autoscaler-token")
  executor = "docker-autoscaler"

  capacity_per_instance = 4
  max_use_count         = 0 # no limit, as in config.toml; 1 gives each job a fresh VM

  policy {
    idle_count = 0
    idle_time  = "50m"
    periods    = ["* * * * *"]
    timezone   = "Europe/Berlin"
  }

  policy {
    idle_count = 8
    idle_time  = "50m"
    periods    = ["* 7-19 * * 1-5"]
    timezone   = "Europe/Berlin"
  }
  # [runners.autoscaler] plugin = "hetznercloud/fleeting-plugin-hetzner:latest"
  #   -> fleetingd is the plugin here: workers are VMs on this host.
  # [runners.autoscaler.connector_config] use_external_addr = true
  #   -> Workers are reached over SSH at their own address, as the image's user, each with its own key.

  settings = {
    autoscaler = {
      instance_ready_command = "docker info"
    }
    docker = {
      image = "alpine:latest"
    }
  }
}
